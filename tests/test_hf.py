"""`opdc.hf`: rollouts of tiny random models against a slow loop with the same uniforms, and every
way in which `generate`, caches and padding can go wrong."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import os
import sys
import warnings

import pytest
import torch

pytest.importorskip("transformers")

from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import (
    GenerationMixin,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MambaConfig,
    MambaForCausalLM,
    MaxLengthCriteria,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    MistralConfig,
    MistralForCausalLM,
    NoRepeatNGramLogitsProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
    StoppingCriteria,
    SuppressTokensLogitsProcessor,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

import opdc
import opdc.hf
import oracle_sampling as oracle
from opdc.hf import BlendLogitsProcessor, BlendSampler, generating
from slow_generate import logits_of, slow_generate, slow_speculate

os.environ["HF_HUB_OFFLINE"] = "1"

V, C = 23, 9
STOPS = [2, 7]
NUMBERS = ("logprobs", "student_logprobs", "teacher_logprobs", "beta", "kl")
PROMPTS = [[5, 9, 11, 4, 3], [8, 6], [13], [12, 10, 3, 22]]
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def llama(seed, vocabulary=V, **changes):
    torch.manual_seed(seed)
    config = {"vocab_size": vocabulary, "initializer_range": 0.4, **SHAPE, **changes}
    return LlamaForCausalLM(LlamaConfig(**config)).eval()


def qwen2(seed, vocabulary=V):
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary, initializer_range=0.4, num_key_value_heads=2, **SHAPE
    )
    return Qwen2ForCausalLM(config).eval()


def gpt2(seed, vocabulary=V):
    """Learned positions, not one more than the longest prompt and its response need."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=max(map(len, PROMPTS)) + C,
        initializer_range=0.4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config).eval()


def mistral(seed):
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=V, initializer_range=0.4, sliding_window=4, num_key_value_heads=2, **SHAPE
    )
    return MistralForCausalLM(config).eval()


FAMILIES = [llama, qwen2, gpt2]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.__name__)
def pair(request):
    return request.param(0), request.param(1)


@pytest.fixture(scope="module")
def llamas():
    return llama(0), llama(1)


def padded(prompts):
    width = max(map(len, prompts))
    rows = [(width - len(prompt), prompt) for prompt in prompts]
    return {
        "input_ids": torch.tensor([[0] * left + prompt for left, prompt in rows]),
        "attention_mask": torch.tensor([[0] * left + [1] * len(prompt) for left, prompt in rows]),
    }


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def roll_out(student, sampler, prompts=PROMPTS, *, stops=STOPS, max_new_tokens=C, **keywords):
    """The responses, of which a stop token is the last."""
    settings = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "eos_token_id": stops}
    sequences = student.generate(
        **padded(prompts),
        max_new_tokens=max_new_tokens,
        custom_generate=sampler,
        **{**settings, **keywords},
    )
    rollout = sampler.last
    if isinstance(sequences, torch.Tensor):
        assert torch.equal(sequences, rollout.sequences)
    return responses(rollout)


def responses(rollout):
    """The tokens of each row, of a rollout whose fields agree with each other."""
    tokens, mask = rollout.tokens, rollout.mask
    assert mask.dtype == rollout.prefix_mask.dtype == torch.bool
    assert mask[:, 0].all()
    assert mask.any(0).all(), "longer than its longest response"
    assert not (mask[:, 1:] & ~mask[:, :-1]).any()
    assert torch.equal(rollout.sequences[:, -tokens.shape[1] :], tokens)
    assert (tokens[~mask] == 0).all()
    for name in NUMBERS:
        numbers = getattr(rollout, name)
        assert numbers.shape == tokens.shape
        assert (numbers[~mask] == 0).all()
    return [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)]


def check_numbers(rollout, rows):
    """Against the blended samples of the slow loop."""
    for name in NUMBERS:
        oracle_name = "student_kl" if name == "kl" else name
        wanted = torch.stack([getattr(one, oracle_name) for row in rows for one in row])
        got = getattr(rollout, name)[rollout.mask].double()
        torch.testing.assert_close(
            got, wanted, rtol=3e-4, atol=3e-5, msg=f"{name}: {got}, {wanted}"
        )


def tokens_of(rows):
    return [[int(one.tokens) for one in row] for row in rows]


# ----------------------------------------------------------------- token by token


@pytest.mark.parametrize(
    ("epsilon", "options"),
    [(0.05, {}), (0.3, {"temperature": 0.7, "top_k": 6}), (math.inf, {"top_p": 0.8})],
    ids=str,
)
def test_generate_equals_the_slow_loop(pair, epsilon, options):
    student, teacher = pair
    sampler = BlendSampler(teacher, epsilon, generator=seeded())
    got = roll_out(student, sampler, **options)
    rows = slow_generate(student, teacher, PROMPTS, epsilon, C, seeded(), stop_ids=STOPS, **options)
    assert got == tokens_of(rows)
    check_numbers(sampler.last, rows)
    lengths = {len(row) for row in got}
    assert len(lengths) > 1, "all responses are equally long: nothing is tested of rows that end"
    statistics = sampler.last.statistics
    assert statistics.student_forwards == statistics.teacher_forwards == max(lengths)
    assert statistics.drafted == statistics.accepted == 0


@pytest.mark.parametrize(
    ("epsilon", "draft_length", "options"),
    [
        (0.02, 3, {}),
        (0.5, 4, {"temperature": 0.7, "top_k": 6}),
        (math.inf, 2, {}),
        (0.3, 1, {"top_p": 0.8}),
        (0.3, 20, {}),
    ],
    ids=str,
)
def test_blocks_of_drafts_equal_the_slow_loop(pair, epsilon, draft_length, options):
    """Rejected drafts leave holes in the caches; learned positions and rotary ones are right
    behind them, and no draft lies beyond the positions that GPT-2 has."""
    student, teacher = pair
    sampler = BlendSampler(teacher, epsilon, draft_length=draft_length, generator=seeded())
    got = roll_out(student, sampler, **options)
    wanted, blocks = slow_speculate(
        student,
        teacher,
        PROMPTS,
        epsilon,
        C,
        draft_length,
        seeded(),
        stop_ids=STOPS,
        **options,
    )
    assert got == wanted
    statistics = sampler.last.statistics
    assert statistics.student_forwards == sum(blocks)
    assert statistics.teacher_forwards == len(blocks)
    assert 0 < statistics.accepted <= statistics.drafted == sum(map(len, got))
    check_recomputed(sampler, student, teacher, epsilon, **options)


@torch.no_grad()
def predictions(model, prompt, tokens):
    """The logits `(len(tokens), V)` that predict each of the tokens, without any cache."""
    ids = torch.tensor([[*prompt, *tokens]])
    return model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]


def check_recomputed(sampler, student, teacher, epsilon, **options):
    """The numbers of a rollout against the laws of its own tokens, without any cache."""
    common = {"temperature": options.get("temperature", 1.0)}
    truncation = options.get("top_k"), options.get("top_p", 1.0)
    rollout = sampler.last
    for number, prompt in enumerate(PROMPTS):
        tokens = rollout.tokens[number][rollout.mask[number]]
        at = torch.arange(len(tokens))
        p, q = (predictions(model, prompt, tokens.tolist()) for model in (student, teacher))
        mu = oracle.blend(p, q, epsilon, **common)
        law = [oracle.truncated(row, row, *truncation) for row in mu.logprobs]
        laws = torch.stack(law), oracle.log_law(p, **common), oracle.log_law(q, **common)
        wanted = [*(rows[at, tokens] for rows in laws), mu.beta, mu.student_kl]
        got = [getattr(rollout, name)[number, : len(tokens)].double() for name in NUMBERS]
        torch.testing.assert_close(got, wanted, rtol=3e-4, atol=3e-5)


@pytest.mark.parametrize("draft_length", [0, 1, 3])
def test_greedy_is_the_student_or_the_teacher_itself(pair, draft_length):
    for epsilon, model in ((0.0, pair[0]), (math.inf, pair[1])):
        settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": STOPS}
        wanted = model.generate(**padded(PROMPTS), max_new_tokens=C, **settings)
        sampler = BlendSampler(pair[1], epsilon, draft_length=draft_length)
        roll_out(pair[0], sampler, do_sample=False, top_k=None)
        assert torch.equal(sampler.last.sequences, wanted)
        assert (sampler.last.logprobs == 0).all()


def test_greedy_drafts_are_the_students_best(llamas):
    """A teacher that agrees rejects none of them."""
    sampler = BlendSampler(llama(0), 0.1, draft_length=3)
    roll_out(llamas[0], sampler, do_sample=False, top_k=None)
    assert sampler.last.statistics.accepted == sampler.last.statistics.drafted > 0


def test_without_padding(llamas):
    """generate gives a mask of ones as None."""
    prompts = [[4, 5, 6], [7, 8, 9]]
    sampler = BlendSampler(llamas[1], 0.1, generator=seeded())
    rows = slow_generate(*llamas, prompts, 0.1, C, seeded(), stop_ids=STOPS)
    assert roll_out(llamas[0], sampler, prompts) == tokens_of(rows)


def test_no_row_is_hidden_from_a_single_row(llamas, monkeypatch):
    """One row drops what it rejects, so its attention needs no mask."""
    masks = []
    for model in llamas:
        original = model.forward

        def forward(*arguments, original=original, **keywords):
            masks.append(keywords.get("attention_mask"))
            return original(*arguments, **keywords)

        forward.__signature__ = inspect.signature(original)
        monkeypatch.setattr(model, "forward", forward)
    sampler = BlendSampler(llamas[1], 1.0, draft_length=3, generator=seeded())
    got = roll_out(llamas[0], sampler, PROMPTS[:1])
    calls = len(masks)
    wanted, _ = slow_speculate(*llamas, PROMPTS[:1], 1.0, C, 3, seeded(), stop_ids=STOPS)
    assert got == wanted
    statistics = sampler.last.statistics
    assert statistics.accepted < statistics.drafted, "nothing was rejected: nothing is tested"
    assert calls == statistics.student_forwards + statistics.teacher_forwards
    assert all(mask is None for mask in masks[:calls])


def test_sliding_windows_are_for_single_tokens():
    student, teacher = mistral(0), mistral(1)
    sampler = BlendSampler(teacher, 0.1, generator=seeded())
    rows = slow_generate(student, teacher, PROMPTS, 0.1, C, seeded(), stop_ids=STOPS)
    assert roll_out(student, sampler) == tokens_of(rows)
    for models in ((student, llama(1)), (llama(0), teacher)):
        with pytest.raises(ValueError, match=r"sliding window.*draft_length=0"):
            roll_out(models[0], BlendSampler(models[1], 0.1, draft_length=2))


# ----------------------------------------------------------------- caches


@pytest.mark.parametrize("draft_length", [0, 3])
def test_checkpointing_that_drops_the_cache_in_silence(draft_length):
    student, teacher = gpt2(0), gpt2(1)
    settings = {"draft_length": draft_length}
    wanted = roll_out(student, BlendSampler(teacher, 0.3, generator=seeded(), **settings))
    student.gradient_checkpointing_enable()
    student.train()
    sampler = BlendSampler(teacher, 0.3, generator=seeded(), **settings)
    assert roll_out(student, sampler) == wanted
    assert student.training
    check_recomputed(sampler, student, teacher, 0.3)
    sampler.generator = seeded()
    assert roll_out(student, sampler, use_cache=False) == wanted


def test_use_cache_false_changes_nothing(llamas):
    rows = [
        roll_out(llamas[0], BlendSampler(llamas[1], 0.3, generator=seeded()), use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert rows[0] == rows[1]


class WithoutCache(nn.Module):
    """A model whose forward is only ids to logits."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, input_ids, attention_mask=None, position_ids=None, return_dict=True):
        return self.inner(input_ids, attention_mask=attention_mask, position_ids=position_ids)


def mamba():
    torch.manual_seed(0)
    shape = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    return MambaForCausalLM(MambaConfig(initializer_range=0.4, **shape)).eval()


def test_students_without_a_cache_read_everything_again(llamas):
    student, prompts = mamba(), [[4, 5, 6], [7, 8, 9]]
    sampler = BlendSampler(llamas[1], 0.3, generator=seeded())
    rows = slow_generate(student, llamas[1], prompts, 0.3, C, seeded(), stop_ids=STOPS)
    assert roll_out(student, sampler, prompts) == tokens_of(rows)
    drafting = BlendSampler(llamas[1], 0.3, draft_length=2)
    refused(student, drafting, r"the student Mamba.*draft_length=0")


def test_teachers_without_a_cache_are_refused(llamas):
    with pytest.raises(ValueError, match=r"the teacher WithoutCache.*past_key_values"):
        roll_out(llamas[0], BlendSampler(WithoutCache(llamas[1])))
    with pytest.raises(ValueError, match="the teacher Mamba"):
        roll_out(llamas[0], BlendSampler(mamba()))
    teacher = llama(1)
    teacher.forward = lambda input_ids, past_key_values=None, **rest: llamas[1](input_ids)
    with pytest.raises(ValueError, match=r"the teacher Llama.*DynamicCache"):
        roll_out(llamas[0], BlendSampler(teacher))


# ----------------------------------------------------------------- what generate was told


@pytest.mark.parametrize("draft_length", [0, 3])
def test_processors_act_on_the_student_before_the_blend(llamas, draft_length):
    """Each row is shown its own prefix, at its own length, whatever the others have."""
    keywords = {
        "suppress_tokens": [0, 5],
        "min_new_tokens": 4,
        "repetition_penalty": 1.5,
        "no_repeat_ngram_size": 2,
        "temperature": 0.8,
    }

    def constrain(prompt, ids, scores):
        processors = LogitsProcessorList(
            [
                RepetitionPenaltyLogitsProcessor(1.5),
                NoRepeatNGramLogitsProcessor(2),
                MinNewTokensLengthLogitsProcessor(prompt, 4, STOPS),
                SuppressTokensLogitsProcessor([0, 5]),
            ]
        )
        return processors(ids, scores.clone())

    options = {"stop_ids": STOPS, "constrain": constrain, "temperature": 0.8}
    sampler = BlendSampler(llamas[1], 0.5, draft_length=draft_length, generator=seeded())
    got = roll_out(llamas[0], sampler, **keywords)
    if draft_length:
        wanted, _ = slow_speculate(*llamas, PROMPTS, 0.5, C, draft_length, seeded(), **options)
        assert got == wanted
    else:
        rows = slow_generate(*llamas, PROMPTS, 0.5, C, seeded(), **options)
        assert got == tokens_of(rows)
        check_numbers(sampler.last, rows)
    assert all(len(row) >= 4 and 5 not in row for row in got)


def test_drafts_do_not_overwrite_rows_that_are_full(llamas):
    """Where processors are to see the drafts, these lie among the tokens for a while."""
    for seed in range(5):
        sampler = BlendSampler(llamas[1], 0.5, draft_length=4, generator=seeded(seed))
        keywords = {"stops": None, "suppress_tokens": [0, 5]}
        rows = roll_out(llamas[0], sampler, max_new_tokens=7, **keywords)
        assert not any({0, 5} & set(row) for row in rows)
        for number, prompt in enumerate(PROMPTS):
            scores = [logits_of(llamas[0], [*prompt, *rows[number][:at]])[0] for at in range(7)]
            laws = (
                torch.stack(scores).index_fill(1, torch.tensor([0, 5]), -math.inf).log_softmax(-1)
            )
            wanted = laws.gather(1, torch.tensor(rows[number])[:, None])[:, 0]
            got = sampler.last.student_logprobs[number]
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4, check_dtype=False)


def test_top_p_of_0_keeps_one_id(llamas):
    greedy, cut = (BlendSampler(llamas[1], 0.5, generator=seeded()) for _ in range(2))
    wanted = roll_out(llamas[0], greedy, do_sample=False)
    assert roll_out(llamas[0], cut, top_p=0.0) == wanted


class Favour(LogitsProcessor):
    """Records what it sees and raises the score of an id by log 3."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append((input_ids.clone(), scores.clone()))
        scores[:, 3] += math.log(3)  # in place, which must reach nobody else
        return scores


def test_own_processors_see_the_models_scores(llamas):
    """Before the temperature, one call for a token, in float32."""
    favour = Favour()
    sampler = BlendSampler(llamas[1], 0.0, generator=seeded())
    roll_out(llamas[0], sampler, temperature=0.5, logits_processor=[favour])
    rollout = sampler.last
    assert len(favour.seen) == rollout.tokens.shape[1]
    for step, (ids, scores) in enumerate(favour.seen):
        assert torch.equal(ids, rollout.sequences[:, : 5 + step])
        for number, prompt in enumerate(PROMPTS):
            if rollout.mask[number, step]:
                row = [*prompt, *rollout.tokens[number, :step].tolist()]
                torch.testing.assert_close(
                    scores[number], logits_of(llamas[0], row)[0], rtol=1e-4, atol=1e-5
                )
    first = logits_of(llamas[0], PROMPTS[0])
    first[:, 3] += math.log(3)
    law = oracle.log_law(first, 0.5)[0]
    wanted = float(law[rollout.tokens[0, 0]])
    assert float(rollout.logprobs[0, 0]) == pytest.approx(wanted, rel=1e-4)


def test_other_warpers_cut_the_blended_law(llamas):
    sampler = BlendSampler(llamas[1], 0.3, generator=seeded())
    got = roll_out(llamas[0], sampler, temperature=0.9, top_k=9, min_p=0.15)
    assert got == responses(sampler.last)
    generator = seeded()
    uniforms = [torch.rand(4, dtype=torch.float64, generator=generator) for _ in range(C)]
    for number, (prompt, row) in enumerate(zip(PROMPTS, got, strict=True)):
        p, q = (predictions(model, prompt, row) for model in llamas)
        mus = oracle.blend(p, q, 0.3, temperature=0.9).logprobs
        for step, (token, mu) in enumerate(zip(row, mus, strict=True)):
            nine = oracle.truncated(mu, mu, 9, 1.0)
            law = torch.log_softmax(MinPLogitsWarper(0.15)(None, nine[None]), -1)[0]
            assert token == oracle.drawn(law, float(uniforms[step][number]))
            rollout = sampler.last
            got_numbers = [
                float(x[number, step])
                for x in (rollout.logprobs, rollout.student_logprobs, rollout.teacher_logprobs)
            ]
            wanted = [law, oracle.log_law(p, 0.9)[step], oracle.log_law(q, 0.9)[step]]
            wanted = [float(x[token]) for x in wanted]
            assert got_numbers == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    drafting = BlendSampler(llamas[1], draft_length=2)
    refused(llamas[0], drafting, r"MinPLogitsWarper.*draft_length=0", min_p=0.1)
    refused(llamas[0], drafting, r"FreeGuidance.*draft_length=0", guidance_scale=1.5)


def test_generate_truncates_to_50_unless_told_otherwise():
    student, teacher = llama(0, 80), llama(1, 80)
    sampler = BlendSampler(teacher, 0.1, generator=seeded())
    inputs = {**padded(PROMPTS), "eos_token_id": STOPS, "pad_token_id": 0}
    student.generate(**inputs, do_sample=True, max_new_tokens=C, custom_generate=sampler)
    rows = slow_generate(student, teacher, PROMPTS, 0.1, C, seeded(), stop_ids=STOPS, top_k=50)
    assert responses(sampler.last) == tokens_of(rows)
    check_numbers(sampler.last, rows)


class Repeats(StoppingCriteria):
    """Ends a row whose last token is among the two before it."""

    def __call__(self, input_ids, scores, **keywords):
        return (input_ids[:, -1:] == input_ids[:, -3:-1]).any(-1)


@pytest.mark.parametrize("draft_length", [0, 4])
def test_stopping_criteria_see_each_rows_own_end(llamas, draft_length):
    sampler = BlendSampler(llamas[1], 0.3, draft_length=draft_length)
    ended = 0
    for _ in range(4):
        rows = roll_out(
            llamas[0], sampler, PROMPTS * 2, temperature=0.5, stopping_criteria=[Repeats()]
        )
        for prompt, row in zip(PROMPTS * 2, rows, strict=True):
            whole = [0, 0, *prompt, *row]
            ends = [
                whole[-len(row) :][i] in whole[len(whole) - len(row) + i - 2 :][:2]
                for i in range(len(row))
            ]
            assert not any(ends[:-1])
            assert ends[-1] or row[-1] in STOPS or len(row) == C
            ended += ends[-1]
        if draft_length:
            assert sampler.last.statistics.drafted == sum(map(len, rows))
    assert ended > 3


@pytest.mark.parametrize("draft_length", [0, 4])
def test_responses_end_with_a_stop_token(llamas, draft_length):
    sampler = BlendSampler(llamas[1], 0.3, draft_length=draft_length, generator=seeded())
    prompts = PROMPTS * 5
    rows = roll_out(llamas[0], sampler, prompts, stops=[2, 7, 11, 13], max_new_tokens=6)
    assert any(len(row) < 6 for row in rows)
    for row in rows:
        assert not {2, 7, 11, 13} & set(row[:-1])
        assert len(row) == 6 or row[-1] in (2, 7, 11, 13)


def test_a_callers_own_length(llamas):
    """Instead of generate's. Criteria are asked after a token, so one there is in any case."""
    for draft_length in (0, 4):
        sampler = BlendSampler(llamas[1], 0.3, draft_length=draft_length)
        for length, wanted in ((8, 3), (5, 1), (3, 1)):
            criteria = [MaxLengthCriteria(length)]
            rows = roll_out(llamas[0], sampler, stops=None, stopping_criteria=criteria)
            assert [len(row) for row in rows] == [wanted] * 4


def test_no_stop_token_at_all(llamas):
    for draft_length in (0, 4):
        sampler = BlendSampler(llamas[1], 0.3, draft_length=draft_length)
        rows = roll_out(llamas[0], sampler, stops=None, pad_token_id=None, max_new_tokens=7)
        assert [len(row) for row in rows] == [7] * 4


def test_several_responses_and_a_dict(llamas):
    sampler = BlendSampler(llamas[1], 0.3, generator=seeded())
    rows = roll_out(llamas[0], sampler, num_return_sequences=3, max_new_tokens=None, max_length=10)
    assert len(rows) == 12
    assert max(map(len, rows)) == 5
    assert torch.equal(
        sampler.last.sequences[:, :5], padded(PROMPTS)["input_ids"].repeat_interleave(3, 0)
    )
    output = llamas[0].generate(
        **padded(PROMPTS),
        do_sample=True,
        max_new_tokens=2,
        return_dict_in_generate=True,
        custom_generate=sampler,
    )
    assert torch.equal(output.sequences, sampler.last.sequences)


def test_random_numbers_come_from_where_they_are_told(llamas):
    torch.manual_seed(1)
    own = [
        roll_out(llamas[0], BlendSampler(llamas[1], generator=seeded(3)), stops=None)
        for _ in range(2)
    ]
    assert own[0] == own[1]
    untouched = torch.random.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), untouched)
    sampled = roll_out(llamas[0], BlendSampler(llamas[1]), stops=None)
    torch.manual_seed(1)
    assert roll_out(llamas[0], BlendSampler(llamas[1]), stops=None) == sampled != own[0]


# ----------------------------------------------------------------- budget and vocabularies


@pytest.mark.parametrize("draft_length", [0, 3])
def test_no_budget_no_teacher(llamas, draft_length):
    student, teacher = llamas[0], llama(1)
    teacher.forward = None  # not to be called
    sampler = BlendSampler(teacher, opdc.BlendBudget(0.1, 5), draft_length=draft_length)
    sampler.step = 5
    sampler.generator = seeded()
    got = roll_out(student, sampler, temperature=0.8)
    options = {"stop_ids": STOPS, "temperature": 0.8}
    rows = slow_generate(student, student, PROMPTS, 0.0, C, seeded(), **options)
    assert got == tokens_of(rows)
    rollout = sampler.last
    assert rollout.teacher_logprobs[rollout.mask].isnan().all()
    assert torch.equal(rollout.logprobs, rollout.student_logprobs)
    assert (rollout.beta == 0).all()
    assert (rollout.kl == 0).all()
    assert rollout.statistics.teacher_forwards == 0
    sampler.teacher_model = None
    sampler.generator = seeded()
    assert roll_out(student, sampler, temperature=0.8) == got


def test_budget_follows_the_step(llamas):
    sampler = BlendSampler(llamas[1], opdc.BlendBudget(0.4, 10))
    for step, epsilon in ((0, 0.4), (5, 0.2), (9, 0.04)):
        sampler.step = step
        roll_out(llamas[0], sampler)
        kl = sampler.last.kl[sampler.last.mask]
        assert kl.max().item() == pytest.approx(epsilon, rel=1e-3)


@pytest.mark.parametrize("stop", [2, 7])
@pytest.mark.parametrize(("epsilon", "draft_length"), [(0.0, 0), (0.3, 0), (0.3, 3)])
def test_two_ends_of_a_sequence(draft_length, epsilon, stop):
    """The teacher ends with 4, the student with 2: 4 is never drawn, its mass is 2's. And 2 is what
    both read where they go on behind it."""
    student, teacher = llama(0, 8), llama(1, 8)
    prompts = [[5, 3, 6], [1, 6], [3], [5, 1]] * 2
    sampler = BlendSampler(
        teacher, epsilon, draft_length=draft_length, eos_map=(2, 4), generator=seeded()
    )
    got = roll_out(student, sampler, prompts, stops=stop, temperature=1.5)
    options = {"stop_ids": [stop], "eos_map": (2, 4), "temperature": 1.5}
    if draft_length:
        wanted, _ = slow_speculate(
            student, teacher, prompts, epsilon, C, draft_length, seeded(), **options
        )
    else:
        other = teacher if epsilon else student
        rows = slow_generate(student, other, prompts, epsilon, C, seeded(), **options)
        wanted = tokens_of(rows)
    assert got == wanted
    assert sum(2 in row for row in got) > 1
    assert not any(4 in row for row in got)


@pytest.mark.parametrize("draft_length", [0, 3])
def test_vocabularies_that_differ_by_padding(llamas, draft_length):
    student, teacher = llamas[0], llama(1, V + 9)
    sampler = BlendSampler(teacher, 0.3, draft_length=draft_length)
    with pytest.raises(ValueError, match=rf"{V}.*{V + 9}.*valid_vocab"):
        roll_out(student, sampler)
    sampler = BlendSampler(teacher, 0.3, draft_length=draft_length, valid_vocab=20)
    sampler.generator = seeded()
    got = roll_out(student, sampler)
    options = {"stop_ids": STOPS, "valid_vocab": 20}
    if draft_length:
        wanted, _ = slow_speculate(
            student, teacher, PROMPTS, 0.3, C, draft_length, seeded(), **options
        )
    else:
        wanted = tokens_of(slow_generate(student, teacher, PROMPTS, 0.3, C, seeded(), **options))
    assert got == wanted
    assert max(map(max, got)) < 20
    with pytest.raises(ValueError, match=r"the prompts.*22"):
        roll_out(student, BlendSampler(llama(1, 21), 0.3, valid_vocab=20))


@pytest.mark.parametrize("draft_length", [0, 3])
def test_padding_may_be_an_id_that_the_teacher_lacks(llamas, draft_length):
    student, padding = llama(0, V + 9), V + 8
    inputs = padded(PROMPTS)
    inputs["input_ids"][inputs["attention_mask"] == 0] = padding
    settings = {"do_sample": True, "top_k": 0, "pad_token_id": padding, "eos_token_id": STOPS}
    settings |= {"max_new_tokens": C, **inputs}
    sampler = BlendSampler(llamas[1], 0.3, draft_length=draft_length, valid_vocab=V)
    student.generate(**settings, custom_generate=sampler)
    assert (sampler.last.tokens == padding).any(), "no row ended before the others"
    blend = BlendLogitsProcessor(llamas[1], inputs["attention_mask"], 0.3, valid_vocab=V)
    torch.manual_seed(1)
    sequences = student.generate(**settings, logits_processor=[blend])
    assert (sequences[:, 5:] == padding).any()


# ----------------------------------------------------------------- prefixes


PREFIX_IDS = [[3, 4, 5, 6], [], [9, 2, 9], [11]]


@pytest.mark.parametrize("epsilon", [0.0, 0.3])
@pytest.mark.parametrize("draft_length", [0, 3])
def test_forced_beginnings(llamas, draft_length, epsilon):
    """Rows of any length; a stop token among them ends the row."""
    sampler = BlendSampler(llamas[1], epsilon, draft_length=draft_length, generator=seeded())
    sampler.prefix_ids = PREFIX_IDS
    got = roll_out(llamas[0], sampler, temperature=0.7, top_k=5)
    rollout = sampler.last
    assert [row[: len(ids)] for row, ids in zip(got, PREFIX_IDS, strict=True)] == [
        PREFIX_IDS[0],
        [],
        [9, 2],
        PREFIX_IDS[3],
    ]
    assert got[2] == [9, 2]
    assert rollout.prefix_mask.sum(-1).tolist() == [4, 0, 2, 1]
    for number, prompt in enumerate(PROMPTS):
        p, q = (predictions(model, prompt, got[number]) for model in llamas)
        laws = oracle.blend(p, q, epsilon, temperature=0.7).logprobs
        for step, (token, law) in enumerate(zip(got[number], laws, strict=True)):
            if not rollout.prefix_mask[number, step]:
                law = oracle.truncated(law, law, 5, 1.0)
            own = oracle.log_law(p, 0.7)[step, token]
            wanted = [float(law[token]), float(own)]
            numbers = [rollout.logprobs, rollout.student_logprobs]
            numbers = [float(x[number, step]) for x in numbers]
            assert numbers == pytest.approx(wanted, rel=3e-4, abs=3e-5)
    if draft_length and epsilon:
        assert 0 < rollout.statistics.teacher_forwards < rollout.tokens.shape[1]


def test_forced_beginnings_are_cut_to_the_room_and_repeated(llamas):
    sampler = BlendSampler(llamas[1])
    sampler.prefix_ids = [[3] * 50, [4], [5], []]
    rows = roll_out(llamas[0], sampler, num_return_sequences=2, max_new_tokens=5)
    assert rows[0] == rows[1] == [3] * 5
    assert rows[2][0] == rows[3][0] == 4
    assert rows[4][0] == rows[5][0] == 5
    assert not sampler.last.prefix_mask[6:].any()
    for wrong, match in (
        ([[3], [4], [5]], "3 rows for a batch of 4"),
        ([], "0 rows"),
        ([[3], [V], [4], [5]], rf"prefix_ids.*{V}"),
        ([[3], [-1], [4], [5]], r"prefix_ids.*-1"),
    ):
        sampler.prefix_ids = wrong
        with pytest.raises(ValueError, match=match):
            roll_out(llamas[0], sampler)


def test_the_teacher_begins(llamas):
    """Its own response, of which the schedule leaves a part that depends on its length."""
    student, teacher = llamas
    sampler = BlendSampler(teacher, 0.0, prefix=opdc.PrefixLength(10), generator=seeded())
    sampler.step = 4
    got = roll_out(student, sampler)
    generator = seeded()
    said = tokens_of(slow_generate(teacher, teacher, PROMPTS, 0.0, C, generator, stop_ids=STOPS))
    lengths = [opdc.PrefixLength(10)(4, len(row)) for row in said]
    assert len(set(lengths)) > 1
    assert sampler.last.prefix_mask.sum(-1).tolist() == lengths
    for row, response, length in zip(got, said, lengths, strict=True):
        assert row[:length] == response[:length]
    statistics = sampler.last.statistics
    assert statistics.teacher_forwards == max(map(len, said))
    assert statistics.teacher_seconds > 0

    sampler.step = 0  # everything is the teacher's
    sampler.generator = seeded()
    assert roll_out(student, sampler) == said
    assert torch.equal(sampler.last.prefix_mask, sampler.last.mask)
    sampler.step = 10  # nothing is, so nobody asks it
    roll_out(student, sampler)
    assert sampler.last.statistics.teacher_forwards == 0
    assert not sampler.last.prefix_mask.any()


# ----------------------------------------------------------------- speculation is exact


class TableConfig(PreTrainedConfig):
    model_type = "opdc-table"


class TableModel(PreTrainedModel, GenerationMixin):
    """A law for each sequence of at most four tokens out of four.

    The cache holds `(id + 1) · 5^position` of each token, whose sum over what may be seen says
    which sequence that is. A rejected draft that is seen, or a wrong position, gives another.
    """

    config_class = TableConfig

    def __init__(self, seed):
        super().__init__(TableConfig(vocab_size=4, num_hidden_layers=1))
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(5**4, 4, generator=generator, dtype=torch.float64))

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=None,
        logits_to_keep=0,
        return_dict=True,
    ):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])
        states = ((input_ids + 1) * 5**position_ids)[:, None, :, None]
        if past_key_values is not None:
            states, _ = past_key_values.update(states, states, 0)
        states = states[:, 0, :, 0]
        if attention_mask is not None:
            states = states * attention_mask
        context = states.cumsum(-1)[:, -input_ids.shape[1] :]
        return CausalLMOutputWithPast(logits=self.table[context][:, -logits_to_keep:])


def branches(p, mu):
    """How one draft may be judged: its uniforms (in the middle of where they lead to this outcome),
    the probability, the token, and whether the draft stood."""

    def middles(law):
        law = law / law.sum()
        return (law.cumsum(-1) - law / 2).tolist(), law.tolist()

    found = []
    for draft, (u, mass) in enumerate(zip(*middles(p), strict=True)):
        stands = min(1.0, float(mu[draft] / p[draft]))
        if stands > 0:
            found.append(((u, stands / 2, 0.5), mass * stands, draft, True))
        if stands < 1:
            surplus = zip(*middles((mu - p).clamp(min=0)), strict=True)
            for token, (u1, share) in enumerate(surplus):
                if share > 0:
                    outcome = (u, (1 + stands) / 2, u1), mass * (1 - stands) * share
                    found.append((*outcome, token, False))
    return found


@pytest.mark.parametrize(("draft_length", "top_k"), [(2, None), (3, None), (2, 3), (1, None)])
def test_speculation_is_distributed_as_the_blend_exactly(monkeypatch, draft_length, top_k):
    """Every way that three tokens can come about, each in a row of one batch, with uniforms that
    lead there; the probabilities of the ways to a response add up to its probability under μ."""
    length, prompt, epsilon = 3, [1], 0.2
    student, teacher = TableModel(0), TableModel(1)

    @functools.cache
    def laws(*ids):
        p, q = logits_of(student, ids), logits_of(teacher, ids)
        mu = oracle.blend(p, q, epsilon).logprobs[0]
        return p[0].softmax(-1), oracle.truncated(mu, mu, top_k, 1.0).exp()

    ways = []  # (uniforms by block and index, probability, tokens)
    exact = {}

    def walk(tokens, probability, uniforms, block, index):
        if len(tokens) == length:
            ways.append((uniforms, probability, tuple(tokens)))
            return
        for u, share, token, stood in branches(*laws(*prompt, *tokens)):
            follows = (block, index + 1) if stood and index + 1 < draft_length else (block + 1, 0)
            used = {**uniforms, (block, index): u}
            walk([*tokens, token], probability * share, used, *follows)

    def enumerate_exactly(tokens, probability):
        if len(tokens) == length:
            exact[tuple(tokens)] = probability
            return
        for token, share in enumerate(laws(*prompt, *tokens)[1].tolist()):
            enumerate_exactly([*tokens, token], probability * share)

    walk([], 1.0, {}, 0, 0)
    enumerate_exactly([], 1.0)
    # Rows need their blocks at different times: all take part until the last is done.
    blocks = iter(range(length))

    def uniforms(self, device, rows, count, kinds):
        block = next(blocks)
        void = (0.5,) * kinds
        at = [(block, index) for index in range(count)]
        result = [[used.get(place, void) for place in at] for used, _, _ in ways]
        return torch.tensor(result, dtype=torch.float64)

    monkeypatch.setattr("opdc.hf.generation.Behaviour.uniforms", uniforms)
    sampler = BlendSampler(teacher, epsilon, draft_length=draft_length)
    options = {"stops": None, "max_new_tokens": length, "top_k": top_k or 0}
    got = roll_out(student, sampler, [prompt] * len(ways), **options)
    total = dict.fromkeys(exact, 0.0)
    for row, (_, probability, tokens) in zip(got, ways, strict=True):
        assert tuple(row) == tokens
        total[tuple(row)] += probability
    assert sum(total.values()) == pytest.approx(1, abs=1e-12)
    assert total == pytest.approx(exact, abs=2e-5)  # beta is solved to 1e-4 of epsilon


@pytest.mark.parametrize("draft_length", [0, 2])
def test_law_of_the_responses(draft_length):
    """10,000 responses of three tokens out of five, by χ²."""
    length, count, rows, epsilon = 3, 5, 10_000, 0.3
    student, teacher = llama(3, count), llama(4, count)
    expected = {(): float(rows)}
    for _ in range(length):
        longer = {}
        for tokens, number in expected.items():
            ids = [4, *tokens]
            mu = oracle.blend(logits_of(student, ids), logits_of(teacher, ids), epsilon)
            for token, share in enumerate(mu.logprobs[0].exp().tolist()):
                longer[(*tokens, token)] = number * share
        expected = longer
    sampler = BlendSampler(teacher, epsilon, draft_length=draft_length, generator=seeded())
    got = roll_out(student, sampler, [[4]] * rows, stops=None, max_new_tokens=length)
    observed = dict.fromkeys(expected, 0)
    for row in got:
        observed[tuple(row)] += 1
    common = [tokens for tokens, number in expected.items() if number >= 10]
    statistic = sum((observed[key] - expected[key]) ** 2 / expected[key] for key in common)
    degrees = len(common) - 1
    assert degrees > 20
    assert statistic < degrees + 4 * math.sqrt(2 * degrees), (statistic, degrees)
    if draft_length:
        statistics = sampler.last.statistics
        rejected = 1 - statistics.accepted / statistics.drafted
        assert 0.02 < rejected < math.sqrt(epsilon / 2)  # Pinsker's inequality


# ----------------------------------------------------------------- rollouts


@pytest.mark.parametrize("name", opdc.hf.__all__)
def test_public_names_are_documented(name):
    assert inspect.getdoc(getattr(opdc.hf, name))
    if not name.startswith("Rollout"):
        assert ">>>" in inspect.getdoc(getattr(opdc.hf, name))


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "opdc.hf")
    with pytest.raises(ImportError, match=r"pip install '\.\[hf\]'"):
        importlib.import_module("opdc.hf")


def test_metrics_are_sums(llamas):
    sampler = BlendSampler(llamas[1], 0.3)
    roll_out(llamas[0], sampler)
    rollout = sampler.last
    metrics = rollout.metrics()
    assert list(metrics) == ["beta", "kl", "positions"]
    assert metrics["positions"] == rollout.mask.sum()
    means = opdc.metrics.mean(metrics)
    assert means["beta"].item() == pytest.approx(rollout.beta[rollout.mask].mean().item())
    assert means["kl"].item() == pytest.approx(rollout.kl[rollout.mask].mean().item())
    assert all(value.shape == () and value.dtype == torch.float64 for value in metrics.values())
    sampler = BlendSampler(llamas[1], 0.3, draft_length=3)
    roll_out(llamas[0], sampler)
    metrics = sampler.last.metrics()
    assert list(metrics) == ["beta", "kl", "positions", "drafted", "accepted"]
    statistics = sampler.last.statistics
    assert metrics["accepted"].item() == statistics.accepted
    assert metrics["drafted"].item() == statistics.drafted
    for seconds in ("student_seconds", "teacher_seconds", "sampling_seconds"):
        assert getattr(statistics, seconds) > 0


def test_numbers_have_the_accuracy_of_the_models(llamas):
    sampler = BlendSampler(llamas[1], 0.3)
    roll_out(llamas[0], sampler)
    assert sampler.last.logprobs.dtype == torch.float32
    student, teacher = llama(0).double(), llama(1).bfloat16()
    sampler = BlendSampler(teacher, 0.3, draft_length=2)
    roll_out(student, sampler)
    assert sampler.last.logprobs.dtype == torch.float64
    sampler.prefix_ids = [[4]] * 4
    roll_out(student, sampler)
    assert sampler.last.logprobs.dtype == torch.float64
    sampler.prefix_ids = None
    favour = Favour()
    roll_out(llama(0).bfloat16(), sampler, logits_processor=[favour])
    assert sampler.last.logprobs.dtype == torch.float32
    sampler.draft_length = 0
    roll_out(llama(0).bfloat16(), sampler, logits_processor=[favour])
    assert {scores.dtype for _, scores in favour.seen} == {torch.float32}, "generate gives these"


def test_nothing_is_differentiated(llamas):
    sampler = BlendSampler(llamas[1], 0.3)
    with torch.enable_grad():
        roll_out(llamas[0], sampler)
    assert not sampler.last.logprobs.requires_grad
    assert not sampler.last.logprobs.is_inference()  # which autograd would refuse


@pytest.mark.parametrize("fails", [False, True])
def test_the_teacher_is_in_eval_mode_for_the_call(llamas, fails):
    teacher = llama(1).train()
    teacher.model.norm.eval()
    modes = {name: part.training for name, part in teacher.named_modules()}
    seen = []

    def look(module, arguments):
        seen.append(any(part.training for part in teacher.modules()))
        if fails:
            raise RuntimeError("stop")

    teacher.register_forward_pre_hook(look)
    student = llama(0).train()
    if fails:
        with pytest.raises(RuntimeError, match="stop"):
            roll_out(student, BlendSampler(teacher))
    else:
        roll_out(student, BlendSampler(teacher))
    assert seen
    assert not any(seen)
    assert {name: part.training for name, part in teacher.named_modules()} == modes
    assert student.training


# ----------------------------------------------------------------- generating


def test_generating_serves_whoever_calls(llamas):
    student = llama(0)
    sampler = BlendSampler(llamas[1], 0.3)
    with generating(student, sampler) as inside:
        assert inside is student
        sequences = student.generate(**padded(PROMPTS), do_sample=True, max_new_tokens=3)
    assert torch.equal(sequences, sampler.last.sequences)
    assert "generate" not in vars(student)
    sampler.last = None
    student.generate(**padded(PROMPTS), do_sample=True, max_new_tokens=3)
    assert sampler.last is None


def test_generating_restores_after_an_exception(llamas):
    student = llama(0)

    def own(*arguments, **keywords):
        return "own"

    student.generate = own
    with pytest.raises(RuntimeError, match="stop"), generating(student, BlendSampler(llamas[1])):
        assert student.generate is not own
        raise RuntimeError("stop")
    assert student.generate is own
    with (
        pytest.raises(TypeError, match="Linear has no generate"),
        generating(nn.Linear(1, 1), None),
    ):
        pass


@pytest.mark.parametrize("name", ["assistant_model", "streamer", "custom_generate"])
def test_generating_sees_what_a_callable_is_not_told(llamas, name):
    with (
        generating(llama(0), BlendSampler(llamas[1])) as student,
        pytest.raises(ValueError, match=name),
    ):
        student.generate(**padded(PROMPTS), max_new_tokens=3, **{name: llamas[1]})


class Wrapped(nn.Module):
    """As PEFT wraps a model: `generate` goes to the inner one, `forward` says nothing."""

    def __init__(self, model):
        super().__init__()
        self.base = model
        self.config = model.config

    def get_base_model(self):
        return self.base

    def forward(self, *arguments, **keywords):
        return self.base(*arguments, **keywords)

    def generate(self, *arguments, **keywords):
        return self.base.generate(*arguments, **keywords)


@pytest.mark.parametrize("draft_length", [0, 3])
def test_models_inside_of_wrappers(llamas, draft_length):
    options = {"draft_length": draft_length}
    wanted = roll_out(llamas[0], BlendSampler(llamas[1], 0.3, generator=seeded(), **options))
    sampler = BlendSampler(Wrapped(llamas[1]), 0.3, generator=seeded(), **options)
    with generating(Wrapped(llamas[0]), sampler) as student:
        settings = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "eos_token_id": STOPS}
        student.generate(**padded(PROMPTS), max_new_tokens=C, **settings)
    assert responses(sampler.last) == wanted


# ----------------------------------------------------------------- bad input


def refused(student, sampler, match, **keywords):
    sampler.last = "older"
    with pytest.raises(ValueError, match=match):
        roll_out(student, sampler, **keywords)
    assert sampler.last is None, "an older rollout may be taken for this one"


def test_requests_that_are_refused(llamas):
    student, sampler = llamas[0], BlendSampler(llamas[1])
    sampling = {"do_sample": False, "top_k": None}
    refused(student, sampler, "num_beams=2", num_beams=2, **sampling)
    refused(student, sampler, "assisted", prompt_lookup_num_tokens=3)
    refused(student, sampler, "cache_implementation='static'", cache_implementation="static")
    cache = StaticCache(config=student.config, max_cache_len=30)
    refused(student, sampler, "past_key_values", past_key_values=cache)
    dynamic = opdc.hf.transcript.DynamicCache(config=student.config)
    refused(student, sampler, "past_key_values", past_key_values=dynamic)
    scores = {"return_dict_in_generate": True, "output_scores": True}
    refused(student, sampler, "output_scores", **scores)
    refused(student, sampler, "output_hidden_states", output_hidden_states=True)


def test_inputs_that_are_not_ids(llamas):
    sampler = BlendSampler(llamas[1])
    embeddings = llamas[0].get_input_embeddings()(torch.tensor([[4, 5]]))
    with pytest.raises(ValueError, match="inputs_embeds"):
        llamas[0].generate(inputs_embeds=embeddings, max_new_tokens=2, custom_generate=sampler)
    shape = {"vocab_size": V, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    t5 = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **shape))
    with pytest.raises(ValueError, match=r"T5.*encoder-decoder"):
        t5.generate(torch.tensor([[4, 5]]), max_new_tokens=2, custom_generate=sampler)
    refused(llamas[0], BlendSampler(t5), "T5.*encoder-decoder")


@pytest.mark.parametrize("budget", [-0.1, math.nan])
def test_budgets_that_are_none(llamas, budget):
    with pytest.raises(ValueError, match="budget must be at least 0"):
        BlendSampler(llamas[1], budget)
    with pytest.raises(ValueError, match=r"budget must be at least 0.*step 3"):
        sampler = BlendSampler(llamas[1], lambda step: budget)
        sampler.step = 3
        roll_out(llamas[0], sampler)
    with pytest.raises(ValueError, match="epsilon must be at least 0"):
        BlendLogitsProcessor(llamas[1], None, budget)


def test_arguments_of_the_constructor(llamas):
    with pytest.raises(ValueError, match="draft_length must be at least 0, got -1"):
        BlendSampler(llamas[1], draft_length=-1)
    with pytest.raises(TypeError, match=r"draft_length must be an integer, got 2\.0"):
        BlendSampler(llamas[1], draft_length=2.0)
    for sampler in (BlendSampler(None, 0.1), BlendSampler(None, 0, prefix=opdc.PrefixLength(9))):
        refused(llamas[0], sampler, "teacher_model is None")


@pytest.mark.parametrize("draft_length", [0, 3])
@pytest.mark.parametrize("who", [0, 1])
def test_scores_that_hold_nan(who, draft_length):
    models = [llama(0), llama(1)]
    models[who].lm_head.weight.data[3, 2] = math.nan
    sampler = BlendSampler(models[1], 0.1, draft_length=draft_length)
    refused(models[0], sampler, r"rows \[0, 1, 2, 3\].*NaN")


@pytest.mark.parametrize("draft_length", [0, 3])
def test_processors_that_leave_nothing(llamas, draft_length):
    sampler = BlendSampler(llamas[1], 0.1, draft_length=draft_length)
    refused(llamas[0], sampler, "no token", suppress_tokens=list(range(V)))


def test_finished_rows_may_hold_anything(llamas, monkeypatch):
    """Scores of NaN after the end of a row are nobody's."""
    student = llama(0)
    original = opdc.hf.transcript.Reader.logits

    def logits(self, transcript, count):
        result = original(self, transcript, count).clone()
        if self.role == "student" and transcript.length > 5 + 2:
            result[1] = math.nan
        return result

    monkeypatch.setattr(opdc.hf.transcript.Reader, "logits", logits)
    for draft_length in (0, 2):
        sampler = BlendSampler(llamas[1], 0.1, draft_length=draft_length, generator=seeded())
        sampler.prefix_ids = [[], [4, 2], [], []]
        rows = roll_out(student, sampler)
        assert rows[1] == [4, 2]


# ----------------------------------------------------------------- the processor


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_processor_gives_the_blended_law(pair, temperature):
    """With padding, finished rows and several responses, to the sampler's own log μ."""
    student, teacher = pair
    inputs = padded(PROMPTS)
    blend = BlendLogitsProcessor(teacher, inputs["attention_mask"], 0.3, temperature=temperature)
    torch.manual_seed(0)
    output = student.generate(
        **inputs,
        do_sample=True,
        top_k=0,
        max_new_tokens=C,
        num_return_sequences=2,
        eos_token_id=STOPS,
        pad_token_id=0,
        logits_processor=[blend],
        return_dict_in_generate=True,
        output_scores=True,
    )
    tokens = output.sequences[:, 5:].tolist()
    assert {2, 7} & {token for row in tokens for token in row}
    for number, row in enumerate(tokens):
        p, q = (predictions(model, PROMPTS[number // 2], row) for model in pair)
        wanted = oracle.blend(p, q, 0.3, temperature=temperature).logprobs
        got = torch.stack([scores[number] for scores in output.scores]).double()
        length = next((at + 1 for at, token in enumerate(row) if token in STOPS), C)
        torch.testing.assert_close(got[:length], wanted[:length], rtol=3e-4, atol=3e-5)


def test_processor_at_the_ends_of_the_budget(pair):
    for epsilon, model in ((0.0, pair[0]), (math.inf, pair[1])):
        settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": STOPS}
        settings |= {"max_new_tokens": C, **padded(PROMPTS)}
        blend = BlendLogitsProcessor(pair[1], settings["attention_mask"], epsilon)
        got = pair[0].generate(**settings, logits_processor=[blend])
        assert torch.equal(got, model.generate(**settings))


def test_processor_serves_one_call(llamas):
    inputs = padded(PROMPTS)
    blend = BlendLogitsProcessor(llamas[1], inputs["attention_mask"], 0.3)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 3, "eos_token_id": None}
    llamas[0].generate(**inputs, **settings, logits_processor=[blend])
    with pytest.raises(ValueError, match="one call of generate"):
        llamas[0].generate(**inputs, **settings, logits_processor=[blend])
    blend = BlendLogitsProcessor(llamas[1], inputs["attention_mask"][:3], 0.3)
    with pytest.raises(ValueError, match=r"attention_mask has the shape \(3, 5\)"):
        llamas[0].generate(**inputs, **settings, logits_processor=[blend])
    changed = torch.tensor([[4, 5, 6]])
    blend = BlendLogitsProcessor(llamas[1], None, 0.3)
    blend(torch.tensor([[4, 7]]), torch.zeros(1, V))
    with pytest.raises(ValueError, match="do not continue"):
        blend(changed, torch.zeros(1, V))
    with pytest.raises(ValueError, match="past_key_values"):
        BlendLogitsProcessor(WithoutCache(llamas[1]), None, 0.3)


def test_processor_puts_the_teacher_into_eval_mode():
    teacher = llama(1).train()
    seen = []
    teacher.register_forward_pre_hook(lambda module, arguments: seen.append(module.training))
    blend = BlendLogitsProcessor(teacher, None, 0.3)
    blend(torch.tensor([[4, 7]]), torch.zeros(1, V))
    assert seen == [False]
    assert teacher.training


# ----------------------------------------------------------------- sharded models


def prompts_of(rank):
    """The second process has the longer responses and the longer prefix."""
    return PROMPTS[2 * rank : 2 * rank + 2], [[[2], [7]], [[3, 4, 5], []]][rank]


def roll_out_sharded(student, teacher, rank, draft_length):
    prompts, prefix_ids = prompts_of(rank)
    sampler = BlendSampler(teacher, 0.3, draft_length=draft_length, generator=seeded(rank))
    sampler.prefix_ids = prefix_ids
    return roll_out(student, sampler, prompts), sampler.last.statistics


def one_of_two(rank, store, results):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    student, teacher = (fully_shard(llama(seed), mesh=mesh) for seed in (0, 1))
    got = [roll_out_sharded(student, teacher, rank, draft_length) for draft_length in (0, 3)]
    torch.save(got, f"{results}.{rank}")
    torch.distributed.barrier()
    os._exit(0)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_processes_that_share_models_take_the_same_steps(tmp_path, llamas):
    """Each of two processes holds half of both models, so the one whose rows have ended goes on
    calling them for the other's."""
    results = tmp_path / "results"
    # A fork, for it need not import everything again.
    torch.multiprocessing.start_processes(
        one_of_two, (tmp_path / "store", results), nprocs=2, start_method="fork"
    )
    forwards = []
    for rank in range(2):
        got = torch.load(f"{results}.{rank}", weights_only=False)
        for (rows, statistics), draft_length in zip(got, (0, 3), strict=True):
            forwards.append((statistics.student_forwards, statistics.teacher_forwards))
            alone, cost = roll_out_sharded(*llamas, rank, draft_length)
            assert rows == alone
            if rank == 0:
                assert cost.student_forwards < statistics.student_forwards
    assert forwards[:2] == forwards[2:]
