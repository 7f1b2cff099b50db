"""Teachers behind a server: answers as vLLM and SGLang give them, and answers that do not fit."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import opdc
import opdc.teachers

VOCABULARY, K = 29, 4
PROMPTS, COMPLETIONS, LONGEST = [3, 1, 2], [4, 2, 0], 5


@pytest.fixture
def rollout() -> tuple[list[Tensor], Tensor, Tensor]:
    """Sequences of prompt and completion, padded completions, and the teacher's logits of each
    token but the first."""
    sequences = [
        torch.randint(VOCABULARY, (p + c,)) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    tokens = torch.full((3, LONGEST), 99)
    for row, sequence, start in zip(tokens, sequences, PROMPTS, strict=True):
        row[: len(sequence) - start] = sequence[start:]
    return sequences, tokens, 3 * torch.randn(3, 7, VOCABULARY)


def ranked(row: Tensor, token: int, k: int) -> list[tuple[int, float, int]]:
    """Id, log-prob and rank of the token and of the k best, as vLLM has them in a mapping."""
    logprobs = row.log_softmax(-1)
    order = logprobs.argsort(descending=True).tolist()
    ids = dict.fromkeys([token, *order[:k]])
    return [(i, float(logprobs[i]), order.index(i) + 1) for i in ids]


def vllm(sequences, logits, k=K, of=lambda logprob, rank: {"logprob": logprob, "rank": rank}):
    return [
        [None]
        + [
            {i: of(logprob, rank) for i, logprob, rank in ranked(row, token, k)}
            for row, token in zip(rows, sequence[1:].tolist(), strict=False)
        ]
        for sequence, rows in zip(sequences, logits, strict=True)
    ]


def sglang(sequences, logits, k=K):
    infos = []
    for sequence, rows in zip(sequences, logits, strict=True):
        of_tokens, best = [(None, int(sequence[0]), None)], [None]
        for row, token in zip(rows, sequence[1:].tolist(), strict=False):
            entries = sorted(ranked(row, token, k), key=lambda entry: entry[2])
            of_tokens += [(lp, i, None) for i, lp, _ in entries if i == token]
            best.append([(lp, i, None) for i, lp, rank in entries if rank <= k])
        infos.append({"input_token_logprobs": of_tokens, "input_top_logprobs": best})
    return infos


def check(teacher: opdc.TopK, rollout, k: int = K) -> None:
    """Against the top K of the logits of each completion's tokens."""
    _, tokens, logits = rollout
    assert teacher.ids.shape == teacher.logprobs.shape == (*tokens.shape, k)
    assert teacher.token_logprobs.shape == tokens.shape
    for b, (start, length) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        own = logits[b, start - 1 : start - 1 + length]
        best = opdc.topk(own, k)
        torch.testing.assert_close(teacher.ids[b, :length], best.ids)
        torch.testing.assert_close(teacher.logprobs[b, :length], best.logprobs)
        expected = opdc.token_logprobs(own, tokens[b, :length])
        torch.testing.assert_close(teacher.token_logprobs[b, :length], expected)
        assert (teacher.ids[b, length:] == -1).all()
        assert teacher.token_logprobs[b, length:].isnan().all()


def test_vllm_objects(rollout):
    sequences, tokens, logits = rollout
    answers = vllm(sequences, logits, of=lambda lp, rank: SimpleNamespace(logprob=lp, rank=rank))
    check(opdc.teachers.from_vllm(answers, tokens, PROMPTS, k=K), rollout)


@pytest.mark.parametrize("k", [1, 3, K])
def test_vllm_json(rollout, k):
    sequences, tokens, logits = rollout
    answers = json.loads(json.dumps(vllm(sequences, logits)))
    assert all(isinstance(key, str) for key in answers[0][1])
    check(opdc.teachers.from_vllm(answers, tokens.int(), PROMPTS, k=k), rollout, k)


def test_more_slots_than_the_server_sends(rollout):
    sequences, tokens, logits = rollout
    teacher = opdc.teachers.from_vllm(vllm(sequences, logits), tokens, PROMPTS, k=K + 3)
    assert (teacher.ids[..., K + 1 :] == -1).all()
    check(teacher._replace(ids=teacher.ids[..., :K], logprobs=teacher.logprobs[..., :K]), rollout)


def test_a_token_beyond_the_top_k_is_no_slot():
    entry = {"4": {"logprob": -0.1, "rank": 1}, "5": {"logprob": -6.0, "rank": 31}}
    teacher = opdc.teachers.from_vllm([[None, entry]], torch.tensor([[5]]), [1], k=3)
    assert teacher.ids.tolist() == [[[4, -1, -1]]]
    torch.testing.assert_close(teacher.token_logprobs, torch.tensor([[-6.0]]))


def test_without_ranks_the_largest_stand(rollout):
    sequences, tokens, logits = rollout
    answers = vllm(sequences, logits, of=lambda lp, rank: {"logprob": lp})
    check(opdc.teachers.from_vllm(answers, tokens, PROMPTS, k=K), rollout)


@pytest.mark.parametrize("k", [1, K])
def test_sglang(rollout, k):
    sequences, tokens, logits = rollout
    answers = json.loads(json.dumps(sglang(sequences, logits)))
    check(opdc.teachers.from_sglang(answers, tokens, PROMPTS, k=k), rollout, k)


def test_a_loss_of_it_is_that_of_the_logits(rollout):
    """With the mask of the completions; what is beyond them would make the loss NaN."""
    sequences, tokens, logits = rollout
    mask = torch.arange(LONGEST) < torch.tensor(COMPLETIONS)[:, None]
    teacher = opdc.teachers.from_vllm(vllm(sequences, logits), tokens, PROMPTS, k=K)
    aligned = torch.zeros(3, LONGEST, VOCABULARY)
    for b, (start, length) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        aligned[b, :length] = logits[b, start - 1 : start - 1 + length]
    student = torch.randn(3, LONGEST, VOCABULARY)
    for loss in (opdc.nn.LSMLoss(k=K), opdc.nn.K1Loss(), opdc.nn.TrOPDLoss(k=K, region="expected")):
        of_answers = loss(student, teacher, tokens=tokens, mask=mask)
        of_logits = loss(student, aligned, tokens=tokens, mask=mask)
        torch.testing.assert_close(of_answers, of_logits)
    assert opdc.k1(student, teacher, tokens.clamp(max=VOCABULARY - 1)).isnan()


def test_probabilities_of_zero():
    """vLLM's objects have the logarithm, its server a number that JSON can hold."""
    for zero in (-math.inf, -9999.0):
        answers = [[None, {3: {"logprob": 0.0}, 5: {"logprob": zero}}]]
        teacher = opdc.teachers.from_vllm(answers, torch.tensor([[5]]), [1], k=2)
        assert teacher.ids.tolist() == [[[3, -1]]]
        assert teacher.token_logprobs.tolist() == [[-math.inf]]


def test_no_sequences_and_no_completions():
    teacher = opdc.teachers.from_vllm([], torch.zeros(0, 3, dtype=torch.int64), [], k=2)
    assert teacher.ids.shape == (0, 3, 2)
    teacher = opdc.teachers.from_vllm([[None]], torch.zeros(1, 0, dtype=torch.int64), [1], k=2)
    assert teacher.ids.shape == (1, 0, 2) and teacher.token_logprobs.shape == (1, 0)


GOOD = {"7": {"logprob": -0.5, "rank": 1}, "4": {"logprob": -2.0, "rank": 2}}


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ([None, GOOD, {"4": {"logprob": -1.0}}], r"\[0\]\[2\], of the token 8: it has nothing for"),
        (
            [{"7": GOOD["7"]}, {"8": GOOD["7"]}],
            r"\[0\]\[1\].*it has nothing for it; send",
        ),
        ([None, None], r"\[0\]\[1\], of the token 7: it is None, as for the first"),
        ([None] + [GOOD] * 3, "4 entries for a prompt of 1 tokens and a completion of at most 2"),
        ([], "0 entries for a prompt of 1 tokens"),
        ([None, GOOD | {7: {"logprob": -0.5}}], r"\[0\]\[1\].*: an id comes twice"),
        ([None, {"7": {"logprob": None}}], "its log-prob must be a number, got NoneType"),
        ([None, {"7": {"logprob": math.nan}}], "its log-prob is nan"),
        ([None, {"7": {"logprob": math.inf}}], "its log-prob is inf"),
        ([None, {"seven": {"logprob": -1.0}}], "seven"),
        ([None, [7, -0.5]], "has no attribute 'items'"),
    ],
)
def test_answers_of_vllm_that_do_not_fit(answer, error):
    with pytest.raises(ValueError, match=error):
        opdc.teachers.from_vllm([answer], torch.tensor([[7, 8]]), [1], k=2)


def test_answers_of_sglang_that_do_not_fit():
    tokens = torch.tensor([[7]])
    first, best = (None, 3, None), [(-0.5, 7, None)]
    info = {"input_token_logprobs": [first, (-0.5, 7, None)], "input_top_logprobs": [None, best]}
    assert opdc.teachers.from_sglang([info], tokens, [1], k=1).ids.tolist() == [[[7]]]
    for changed, error in [
        ({"input_token_logprobs": [first, (-0.5, 8, None)]}, "it is of the token 8; send prompt"),
        ({"input_top_logprobs": None}, r"lengths 2 and None: ask with return_logprob=True"),
        ({"input_token_logprobs": [first]}, "lengths 1 and 2"),
        ({"input_top_logprobs": [None, best * 2]}, "an id comes twice"),
    ]:
        with pytest.raises(ValueError, match=error):
            opdc.teachers.from_sglang([info | changed], tokens, [1], k=1)
    missing = info | {"input_top_logprobs": [None, None]}
    assert opdc.teachers.from_sglang([missing], tokens, [1], k=1).ids.tolist() == [[[-1]]]


def test_bad_arguments():
    answers, tokens = [[None, GOOD]], torch.tensor([[7]])
    with pytest.raises(ValueError, match=r"tokens has the shape \(1,\), want \(B, C\) for B = 1"):
        opdc.teachers.from_vllm(answers, tokens[0], [1], k=1)
    with pytest.raises(ValueError, match="1 sequences in prompt_logprobs and 2 prompt_lengths"):
        opdc.teachers.from_vllm(answers, tokens, [1, 1], k=1)
    with pytest.raises(ValueError, match="prompt_lengths must be at least 1, got 0"):
        opdc.teachers.from_vllm(answers, tokens, [0], k=1)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        opdc.teachers.from_vllm(answers, tokens, [1], k=0)
    with pytest.raises(TypeError, match=r"tokens must be a torch\.Tensor, got list"):
        opdc.teachers.from_vllm(answers, [[7]], [1], k=1)
