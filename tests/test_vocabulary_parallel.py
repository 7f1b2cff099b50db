"""A vocabulary that is split over processes gives the loss of the whole one.

Every process of a group holds the logits, or the rows of a head, of some ids. What it returns is
compared with the same call of one process that has them all, and for small errors with the oracle.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import opdc
import test_published
import test_support
import test_value_and_gradient
from judge import Result, check, expected
from processes import Raised, attempt, on_ranks
from projections import logits as logits_of
from regimes import BY_NAME, CASES, DIVERGENCES, STATISTICS, Case, Inputs, Regime, make_inputs
from shards import SPLIT_AXES, Answer, Call, answer, answers, collectives, columns_of, cut

V = 23
# The last of four processes has less than the others, and one of them nothing.
WIDTHS = {1: (23,), 2: (11, 12), 3: (7, 3, 13), 4: (5, 0, 10, 8)}
VALID = 12  # inside of a shard, and one or two shards lie beyond it
POSITIONS = (2, 4)
K = 5


# ----------------------------------------------------------------- calls


def plain(case: Case, inputs: Inputs) -> Call:
    arguments = dict(case.options)
    if case not in STATISTICS:
        arguments["teacher"] = inputs.teacher
    if case.reads_tokens:
        arguments["tokens"] = inputs.tokens
    return Call(case.function, inputs.student, arguments | inputs.keywords(case))


def published(case: Case, inputs: Inputs) -> Call:
    arguments = {"teacher": inputs.teacher, "tokens": inputs.tokens}
    return Call(case.function, inputs.student, arguments | inputs.keywords(case))


def on_support(cell: Any, support: str, inputs: Inputs, temperature: float) -> Call:
    """From logits."""
    arguments = {"teacher": inputs.teacher, "support": support, "k": K, **cell.options}
    if support == "teacher+token":
        arguments["tokens"] = inputs.tokens
    return Call(cell.function, inputs.student, arguments | {"normalize": cell.normalize})


def served(cell: Any, support: str, inputs: Inputs, temperature: float) -> Call:
    """From a teacher that is known on a few ids."""
    call = on_support(cell, support, inputs, temperature)
    teacher = test_published.topk_of(inputs, K, temperature)
    if support == "teacher":
        teacher = teacher._replace(token_logprobs=None)
    return replace(call, arguments=call.arguments | {"teacher": teacher})


def calls_of_all() -> dict[str, Any]:
    """By name, what makes a call from inputs and a temperature."""
    calls: dict[str, Any] = {}
    for case in CASES:
        calls[case.name] = lambda inputs, T, case=case: plain(case, inputs)
    for case in test_published.LOSSES:
        calls[case.name] = lambda inputs, T, case=case: published(case, inputs)
    for name, support in (("lsm", "teacher"), ("lsm_student", "student")):
        lsm = {"k": 32 if support == "student" else None, "support": support}
        calls[name] = lambda inputs, T, lsm=lsm: Call(
            "lsm", inputs.student, {"teacher": inputs.teacher, **lsm, "k": K if lsm["k"] else None}
        )
    for cell in test_support.FEW:
        for support in test_support.SUPPORTS:
            calls[f"{cell}-{support}"] = lambda *a, c=cell, s=support: on_support(c, s, *a)
        for support in ("teacher", "teacher+token"):
            calls[f"{cell}-{support}-served"] = lambda *a, c=cell, s=support: served(c, s, *a)
    for case in (*test_published.EOPD[:2], test_published.AOPD[0], test_published.TROPD[0]):
        calls[f"{case.name}-served"] = lambda inputs, T, case=case: replace(
            published(case, inputs),
            arguments=published(case, inputs).arguments
            | {"k": None, "teacher": test_published.topk_of(inputs, K, T)},
        )
    for case in (CASES[11], test_published.REOPOLD[0], test_published.REOPOLD[4]):
        calls[f"{case.name}-logprobs"] = lambda inputs, T, case=case: Call(
            case.function,
            inputs.student,
            inputs.keywords(case)
            | {
                "tokens": inputs.tokens,
                "teacher": test_published.topk_of(inputs, K, T).token_logprobs,
            },
        )
    return calls


CALLS = calls_of_all()
SAMPLE = (
    *("reverse_kl", "forward_kl", "jsd", "skew_reverse", "k1_clip", "k3", "entropy"),
    *("token_logprobs", "lsm", "reverse_kl-tail-student", "forward_kl-teacher-teacher+token"),
    *("tropd_sampled_forward_kl", "eopd_old", "aopd", "reopold_refinement", "reopold_old"),
)


def inputs_of(
    vocabulary: int = V, dtype: torch.dtype = torch.float64, regime: Regime = test_published.MIXED
) -> Inputs:
    return test_published.prepare(regime, POSITIONS, vocabulary, dtype)


def widened(call: Call) -> Call:
    """The logits with more ids, which do not exist."""

    def wide(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.shape != (*POSITIONS, VALID):
            return value
        more = torch.full((*POSITIONS, V - VALID), math.nan, dtype=value.dtype)
        return torch.cat([value, more], -1)

    arguments = {name: wide(value) for name, value in call.arguments.items()}
    return replace(call, student=wide(call.student), arguments=arguments)


def with_common(call: Call, inputs: Inputs, **common: Any) -> Call:
    """What a statistic does not take is left out; a loss also returns its metrics."""
    if call.function in ("token_logprobs", "entropy"):
        taken = ("temperature", "mask", "valid_vocab")
        common = {name: value for name, value in common.items() if name in taken}
        return replace(call, arguments=call.arguments | common, upstream=inputs.upstream)
    upstream = inputs.upstream if common["reduction"] == "none" else torch.tensor(-1.5)
    common["return_metrics"] = True
    return replace(
        call, arguments=call.arguments | common, upstream=upstream.to(inputs.upstream.dtype)
    )


def variants(name: str, dtype: torch.dtype = torch.float64) -> list[Call]:
    """Every reduction; mask, weights, a count, another temperature, ids that do not exist."""
    make, inputs = CALLS[name], inputs_of(dtype=dtype)
    masked = inputs_of(dtype=dtype)
    masked.student[~inputs.mask] = masked.teacher[~inputs.mask] = math.nan
    if "served" in name or "logprobs" in name:
        masked = inputs
    few = inputs_of(VALID, dtype)
    return [
        with_common(make(inputs, 1.0), inputs, reduction="none"),
        with_common(
            make(masked, 1.0), inputs, reduction="mean", mask=inputs.mask, weights=inputs.weights
        ),
        with_common(make(inputs, 1.0), inputs, reduction="seq_mean", mask=inputs.mask, num_items=3),
        with_common(
            widened(make(few, 0.7)), few, reduction="sum", temperature=0.7, valid_vocab=VALID
        ),
    ]


# ----------------------------------------------------------------- how results are compared


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def joined(results: list[Answer]) -> Answer:
    """The answer of all processes: one value and metrics, gradients of the ids in their order."""
    first = results[0]
    for result in results[1:]:
        assert bits(result.value) == bits(first.value)
        assert {name: bits(x) for name, x in result.metrics.items()} == {
            name: bits(x) for name, x in first.metrics.items()
        }
    gradients = {}
    for name, gradient in first.gradients.items():
        shares = [result.gradients[name] for result in results]
        if name in SPLIT_AXES:
            gradients[name] = torch.cat(shares, SPLIT_AXES[name])
        else:
            assert len({bits(share) for share in shares}) == 1, f"{name} differs between ranks"
            gradients[name] = gradient
    return Answer(first.value, first.metrics, gradients)


def close(result: Answer, whole: Answer, tolerance: float = 1e-12) -> None:
    """Equal to rounding, on the scale of the largest number; undefined where the whole is."""

    def compare(what: str, x: torch.Tensor, truth: torch.Tensor) -> None:
        assert x.dtype == truth.dtype and x.shape == truth.shape, what
        finite = truth[truth.isfinite()]
        scale = finite.abs().max().item() if finite.numel() else 0.0
        torch.testing.assert_close(
            x,
            truth,
            rtol=2**-7 if x.dtype == torch.bfloat16 else 0,  # rounded to the other neighbour
            atol=tolerance * scale,
            equal_nan=True,
            msg=lambda m: f"{what}: {m}",
        )

    compare("value", result.value, whole.value)
    assert list(result.metrics) == list(whole.metrics)
    for name, metric in whole.metrics.items():
        # A sum of terms of both signs: on the scale of one nat a position.
        size = max(1.0, abs(metric.item())) if math.isfinite(metric.item()) else 0.0
        torch.testing.assert_close(
            result.metrics[name],
            metric,
            rtol=0,
            atol=10 * tolerance * size,
            equal_nan=True,
            msg=lambda m, name=name: f"metric {name}: {m}",
        )
    assert set(result.gradients) == set(whole.gradients)
    for name, gradient in whole.gradients.items():
        compare(f"gradient of {name}", result.gradients[name], gradient)


def agree(
    sizes: int | tuple[int, ...],
    calls: list[Call],
    tolerance: float = 1e-12,
    frozen: tuple[str, ...] = (),
) -> list[Answer]:
    """For groups of the given sizes; the answers of the last one."""
    wholes = [answer(call, frozen=frozen) for call in calls]
    results: list[Answer] = []
    for size in (sizes,) if isinstance(sizes, int) else sizes:
        by_rank = on_ranks(size, answers, calls, WIDTHS[size], frozen)
        results = [joined(list(shares)) for shares in zip(*by_rank, strict=True)]
        for result, whole in zip(results, wholes, strict=True):
            close(result, whole, tolerance)
    return results


# ----------------------------------------------------------------- the same as the whole


@pytest.mark.parametrize("name", CALLS)
def test_shards_give_the_loss_of_the_whole_vocabulary(name):
    agree((1, 2, 3, 4) if name in SAMPLE else (2 + len(name) % 2,), variants(name))


@pytest.mark.parametrize("name", SAMPLE)
def test_shards_in_single_precision(name):
    agree(4, variants(name, torch.float32), 2e-6)


JUDGED = [
    *(case for case in DIVERGENCES if case.name in ("reverse_kl", "forward_kl", "jsd")),
    *(case for case in DIVERGENCES if case.name in ("skew_forward", "skew_reverse")),
    *(case for case in CASES if case.name in ("k1_old", "k2", "token_logprobs", "entropy")),
]
HAZARDS = (
    *("far", "near_1e-02", "near_1e-04", "near_1e-06", "peaked_0.99999", "offset_1e4_student"),
    *("masked_both", "masked_teacher", "masked_student", "wide_1e+02"),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", JUDGED, ids=str)
def test_hazard_10_and_12_shards_are_as_near_to_the_truth_as_the_whole(case, dtype):
    regimes = [BY_NAME[name.replace("+0", "")] for name in HAZARDS if name != "wide_1e+02"]
    regimes = [regime for regime in [*regimes, BY_NAME["wide_1e2"]] if case.is_finite_in(regime)]
    if dtype == torch.bfloat16:  # where logits of both models are equal at 8 bits, nothing is near
        regimes = regimes[:2] + regimes[4:]
    all_inputs = [make_inputs(regime, (4,), 41, dtype) for regime in regimes]
    calls = [
        replace(with_common(plain(case, inputs), inputs, reduction="none")) for inputs in all_inputs
    ]
    by_rank = on_ranks(3, answers, calls, (20, 4, 17))
    for inputs, regime, results in zip(
        all_inputs, regimes, zip(*by_rank, strict=True), strict=True
    ):
        result = joined(list(results))
        check(
            case,
            inputs,
            Result(result.value, result.gradients["logits"]),
            expected(case, inputs, inputs.upstream),
            inputs.upstream,
            floor=test_value_and_gradient.saturation_floor(regime),
            tolerance=1e-5 if regime.name == "near_1e-06" else None,
        )


@pytest.mark.parametrize("name", SAMPLE)
def test_hazard_02_a_slice_of_ids_that_do_not_exist(name):
    """−inf in both models, for a whole process or for a part of its ids."""
    calls = []
    for absent in (slice(7, 10), slice(0, 9), slice(10, V)):
        inputs = inputs_of()
        inputs.student[..., absent] = inputs.teacher[..., absent] = -math.inf
        present = [id for id in range(V) if id not in range(V)[absent]]
        inputs.tokens = torch.tensor(present)[inputs.tokens % len(present)]
        calls.append(with_common(CALLS[name](inputs, 1.0), inputs, reduction="none"))
    agree(3, calls)


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("name", SAMPLE)
def test_hazard_04_undefined_rows_are_undefined_everywhere_and_alone(name, who):
    inputs = inputs_of()
    logits = getattr(inputs, who)
    logits[0, 1, 20], logits[0, 3, 2], logits[1, 2] = math.nan, math.inf, -math.inf
    logits[1, 0, 7:10] = -math.inf  # a slice of this model alone: +inf or nothing, by the formula
    call = CALLS[name](inputs, 1.0)
    calls = [with_common(call, inputs, reduction=reduction) for reduction in ("none", "mean")]
    agree((3, 4), calls)


@pytest.mark.parametrize("name", SAMPLE)
def test_hazard_06_nothing_active_and_no_position(name):
    inputs = inputs_of()
    nothing = torch.zeros(POSITIONS, dtype=torch.bool)
    calls = [
        with_common(CALLS[name](inputs, 1.0), inputs, reduction=reduction, mask=nothing)
        for reduction in ("none", "mean", "seq_mean")
    ]
    empty = make_inputs("realistic", (0, 3), V, torch.float64)
    empty.uniforms, empty.prefix_mask = torch.zeros(0, 3).double(), torch.zeros(0, 3).bool()
    calls.append(with_common(CALLS[name](empty, 1.0), empty, reduction="none"))
    calls.append(with_common(CALLS[name](empty, 1.0), empty, reduction="mean"))
    for result in agree(3, calls):
        assert (result.value == 0).all()
        assert (result.gradients["logits"] == 0).all()


def test_hazard_13_ties_over_the_edges_of_shards_go_to_the_lower_id():
    inputs = inputs_of()
    inputs.teacher, inputs.student = inputs.teacher.round(), inputs.student.round()
    inputs.teacher[0] = 0.0
    names = [name for name in CALLS if "reverse_kl-both-" in name or "forward_kl-teacher-" in name]
    calls = [
        with_common(CALLS[name](inputs, 1.0), inputs, reduction="none")
        for name in (*names, "tropd_expected_forward_kl", "aopd", "eopd")
        if "served" not in name
    ]
    agree((2, 3, 4), calls)


def test_a_support_wider_than_a_shard_and_the_default_k():
    inputs = inputs_of()
    for k in (None, 1 + max(WIDTHS[2]), V):
        arguments = {"teacher": inputs.teacher, "k": k}
        calls = [Call("lsm", inputs.student, arguments | {"support": "student"})]
        if k is None:  # 32, 64 and 16 or all ids
            policy = {"teacher": inputs.teacher, "tokens": inputs.tokens}
            calls += [Call(name, inputs.student, policy) for name in ("eopd", "aopd")]
            calls.append(Call("tropd", inputs.student, policy | {"region": "expected"}))
        agree((2, 4), calls)


def test_hazard_22_student_and_teacher_of_different_dtypes():
    for student, teacher in ((torch.bfloat16, torch.float32), (torch.float32, torch.float64)):
        inputs = make_inputs("realistic", POSITIONS, V, student, teacher)
        arguments = {"teacher": inputs.teacher, "reduction": "none"}
        agree(3, [Call("jsd", inputs.student, arguments, inputs.upstream.to(teacher))], 2e-6)


def test_gradients_in_bfloat16():
    inputs = make_inputs("realistic", POSITIONS, V, torch.bfloat16)
    for name in ("reverse_kl", "k1_clip", "lsm"):
        call = with_common(CALLS[name](inputs, 1.0), inputs, reduction="none")
        [result] = agree(3, [call], 2e-6)
        assert result.gradients["logits"].dtype == torch.bfloat16


def without_gradient(group, call, widths):
    columns = columns_of(group, widths)
    arguments = call.arguments | {"teacher": cut(call.arguments["teacher"], columns)}
    student = cut(call.student, columns)
    function = getattr(opdc, call.function)
    value = function(student, **arguments, process_group=group)
    leaf = student.clone().requires_grad_()
    with torch.no_grad():
        again = function(leaf, **arguments, process_group=group)
    loss = function(leaf, **arguments, process_group=group)
    loss.backward(retain_graph=True)
    loss.backward()
    return value, again, leaf.grad


@pytest.mark.parametrize("name", ["jsd", "k1_clip", "reverse_kl-tail-teacher", "reopold"])
def test_without_a_gradient_and_with_two(name):
    call = CALLS[name](inputs_of(), 1.0)
    whole = answer(call)
    results = on_ranks(3, without_gradient, call, WIDTHS[3])
    for value, again, _ in results:
        torch.testing.assert_close(value, whole.value, rtol=1e-12, atol=1e-12)
        assert torch.equal(value, again) and not value.requires_grad
    gradient = torch.cat([gradient for *_, gradient in results], -1)
    torch.testing.assert_close(gradient, 2 * whole.gradients["logits"], rtol=1e-11, atol=1e-13)


def other_draws(group, student, teacher, tokens, widths):
    """Every process has drawn another number of random numbers before."""
    rank = dist.get_rank(group)
    torch.manual_seed(rank)
    columns = columns_of(group, widths)
    leaf = cut(student, columns).requires_grad_()
    value = opdc.tropd(leaf, cut(teacher, columns), tokens, k=K, process_group=group)
    value.backward()
    return value.detach(), leaf.grad


def test_numbers_drawn_by_one_process_decide_for_all():
    inputs = inputs_of()
    results = on_ranks(2, other_draws, inputs.student, inputs.teacher, inputs.tokens, WIDTHS[2])
    assert len({bits(value) for value, _ in results}) == 1
    gradient = torch.cat([gradient for _, gradient in results], -1)
    # Every row sums to 0 only if all processes agree on which positions are trusted.
    torch.testing.assert_close(
        gradient.sum(-1), torch.zeros(POSITIONS, dtype=torch.float64), rtol=0, atol=1e-12
    )


# ----------------------------------------------------------------- heads


def heads(dtype: torch.dtype = torch.float64, **options: Any) -> dict[str, Any]:
    """Projections with everything, of different hidden sizes, and the logits that they are."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    student = opdc.Projection(
        normal(*POSITIONS, 6),
        normal(V, 6),
        bias=normal(V),
        scale=0.7,
        softcap=5.0,
        adapter=(normal(*POSITIONS, 2), normal(V, 2)),
    )
    teacher = opdc.Projection(normal(*POSITIONS, 9), normal(V, 9))
    return {"student": student, "teacher": teacher}


HEAD_CASES = {
    "reverse_kl": ("reverse_kl", {}),
    "jsd": ("jsd", {"beta": 0.3}),
    "skew_kl": ("skew_kl", {}),
    "k1": ("k1", {"discount": 0.5}),
    "tropd": ("tropd", {"k": K}),
    "reopold": ("reopold", {"phase": "refinement", "keep": 0.5}),
    "lsm": ("lsm", {"k": K, "support": "student"}),
    "tail": ("forward_kl", {"k": K, "support": "teacher+token", "normalize": "tail"}),
}


def head_call(name: str, which: str, inputs: Inputs, dtype: torch.dtype = torch.float64) -> Call:
    function, options = HEAD_CASES[name]
    models = heads(dtype)
    student, teacher = models["student"], models["teacher"]
    arguments = dict(options)
    if which == "student":
        teacher = logits_of(teacher).to(dtype)
    if which == "teacher":
        student = logits_of(student).to(dtype)
    arguments["teacher"] = teacher
    if function in ("k1", "tropd", "reopold") or name == "tail":
        arguments["tokens"] = inputs.tokens
    if function == "tropd":
        arguments["uniforms"] = inputs.uniforms
    return Call(function, student, arguments)


@pytest.mark.parametrize("which", ["student", "teacher", "both"])
@pytest.mark.parametrize("name", HEAD_CASES)
def test_a_head_that_is_split(name, which):
    inputs = inputs_of()
    call = head_call(name, which, inputs)
    calls = [
        with_common(call, inputs, reduction="none"),
        with_common(call, inputs, reduction="mean", mask=inputs.mask, weights=inputs.weights),
        with_common(call, inputs, reduction="sum", temperature=0.7, valid_vocab=VALID),
    ]
    calls[-1].arguments["valid_vocab"] = VALID if "tokens" not in call.arguments else V - 1
    if "tokens" in call.arguments:
        calls[-1].arguments["tokens"] = inputs.tokens.clamp(max=V - 2)
    agree((2, 4), calls, 1e-11)


def test_a_head_that_is_split_and_a_chunk_for_every_position():
    inputs = inputs_of()
    call = head_call("reverse_kl", "both", inputs)
    small = call.student._replace(max_bytes=2 * 8 * V * 4)
    agree(3, [replace(call, student=small)], 1e-11)


@pytest.mark.parametrize(
    "frozen", [("weight", "bias", "adapter_weight"), ("hidden", "adapter_inputs"), ("bias",)]
)
def test_a_head_of_which_a_part_is_frozen(frozen):
    agree(3, [head_call("jsd", "both", inputs_of())], 1e-11, frozen=frozen)


def test_a_head_in_single_precision_and_bfloat16():
    inputs = inputs_of(dtype=torch.float32)
    call = with_common(head_call("jsd", "both", inputs, torch.float32), inputs, reduction="none")
    agree(3, [call], 4e-6)
    call = head_call("jsd", "both", inputs, torch.bfloat16)
    agree(3, [with_common(call, inputs, reduction="none")], 2**-7)


@pytest.mark.parametrize("sparse_gradient", [False, True])
@pytest.mark.parametrize("name", ["lsm", "forward_kl", "jsd"])
def test_rows_of_a_head_that_is_split(name, sparse_gradient):
    """The teacher names the rows; nothing else of the head is read."""
    inputs = inputs_of()
    teacher = test_published.topk_of(inputs, K)
    teacher.ids[0, 1, 2:4] = -1
    student = heads()["student"]._replace(sparse_gradient=sparse_gradient)
    arguments = {} if name == "lsm" else {"normalize": "both"}
    with_token = {"tokens": inputs.tokens, "support": "teacher+token"}
    bare = teacher._replace(token_logprobs=None, entropy=None)
    calls = [
        with_common(
            Call(name, student, arguments | {"teacher": bare}),
            inputs,
            reduction="mean",
            mask=inputs.mask,
        ),
        with_common(
            Call(name, student, arguments | with_token | {"teacher": teacher}),
            inputs,
            reduction="none",
        ),
    ]
    agree((2, 4), calls, 1e-11)


# ----------------------------------------------------------------- what is sent


def wide_call(name: str, rows: int, vocabulary: int) -> tuple[Call, tuple[int, ...]]:
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(rows, vocabulary, generator=generator)
    teacher = torch.randn(rows, vocabulary, generator=generator)
    tokens = torch.randint(0, vocabulary, (rows,), generator=generator)
    cases = {
        "reverse_kl": {},
        "jsd": {"return_metrics": False},
        "k1": {"tokens": tokens},
        "k3": {"tokens": tokens},
        "lsm": {"k": K},
        "forward_kl": {"support": "student", "k": K, "normalize": "tail"},
        "tropd": {"tokens": tokens, "k": K},
        "eopd": {"tokens": tokens, "k": K},
        "reopold": {"tokens": tokens, "phase": "refinement"},
    }
    call = Call(name, student, cases[name] | {"teacher": teacher})
    return call, (vocabulary // 2, vocabulary - vocabulary // 2)


SENT_BY = ("reverse_kl", "jsd", "k1", "k3", "lsm", "forward_kl", "tropd", "eopd", "reopold")


@pytest.mark.parametrize("name", SENT_BY)
def test_what_is_sent_grows_with_the_positions_and_not_with_the_vocabulary(name):
    sent = {}
    for rows, vocabulary in ((64, 50), (64, 500), (128, 50)):
        by_rank = on_ranks(2, collectives, *wide_call(name, rows, vocabulary))
        assert by_rank[0] == by_rank[1]
        forward, backward = by_rank[0]
        assert backward == []
        # One of a fixed size, in which the processes compare their arguments, and two more.
        assert 0 < len(forward) <= 3, forward
        sent[rows, vocabulary] = [size for _, size in forward]
    assert sent[64, 50] == sent[64, 500]
    assert len(sent[64, 50]) == len(sent[128, 50])
    grown = [b for a, b in zip(sent[64, 50], sent[128, 50], strict=True) if b != a]
    assert len(grown) <= 2
    assert sum(sent[128, 50]) <= 2 * sum(sent[64, 50])
    # A few numbers for each position and slot, sent by one and received from two processes.
    assert sum(sent[64, 50]) <= 3 * 64 * 8 * (24 + 6 * K)


def head_collectives(group, student, teacher, widths):
    columns = columns_of(group, widths)
    return collectives(group, Call("reverse_kl", student, {"teacher": teacher}), widths), columns


def test_a_head_sends_the_gradient_of_the_hidden_states_besides():
    models = heads()
    call = Call(
        "reverse_kl", models["student"]._replace(adapter=None), {"teacher": models["teacher"]}
    )
    forward, backward = on_ranks(2, collectives, call, WIDTHS[2])[0]
    assert 0 < len(forward) + len(backward) <= 4
    hidden = call.student.hidden
    assert sum(size for _, size in [*forward, *backward]) <= 8 * hidden.numel() * 4 + 8192


# ----------------------------------------------------------------- bad input


def raising(group, changes: dict[int, dict[str, Any]], function: str = "reverse_kl"):
    """What a call raises whose arguments are changed on some ranks; and a good call after it."""
    rank = dist.get_rank(group)
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(6, 10, generator=generator)
    arguments = {"teacher": torch.randn(6, 10, generator=generator), "process_group": group}
    if function != "reverse_kl":
        arguments["tokens"] = torch.arange(6)
    changed = {"student": student, **arguments} | changes.get(rank, {})
    try:
        getattr(opdc, changed.pop("function", function))(**changed)
        raised = None
    except Exception as error:
        raised = Raised(type(error), str(error), "")
    return raised, opdc.reverse_kl(student, arguments["teacher"], process_group=group)


def everywhere(changes: dict[str, Any], size: int = 2) -> dict[int, dict[str, Any]]:
    return dict.fromkeys(range(size), changes)


LOGITS = torch.zeros(6, 10)
SERVED = opdc.TopK(torch.tensor([[1, 2]] * 6), torch.full((6, 2), -1.0))
BAD = {
    "shards that are fewer than valid_vocab": (
        everywhere({"valid_vocab": 30}),
        "reverse_kl",
        ("30", "20", "valid_vocab"),
    ),
    "other numbers of positions": (
        {1: {"student": LOGITS[:4], "teacher": LOGITS[:4]}},
        "reverse_kl",
        ("4", "6"),
    ),
    "other shapes of as many positions": (
        {1: {"student": LOGITS.view(2, 3, 10), "teacher": LOGITS.view(2, 3, 10)}},
        "reverse_kl",
        ("rank", "position"),
    ),
    "other dtypes": (
        {1: {"student": LOGITS.double(), "teacher": LOGITS.double()}},
        "reverse_kl",
        ("rank", "float64"),
    ),
    "other losses": ({1: {"function": "forward_kl"}}, "reverse_kl", ("rank",)),
    "other reductions": ({1: {"reduction": "sum"}}, "reverse_kl", ("rank", "reduction")),
    "other temperatures": ({1: {"temperature": 0.5}}, "reverse_kl", ("rank", "settings")),
    "other valid_vocab": ({1: {"valid_vocab": 15}}, "reverse_kl", ("rank", "valid_vocab")),
    "other k": (
        {0: {"k": 3}, 1: {"k": 4}},
        "aopd",
        ("rank", "k"),
    ),
    "other supports": (
        {1: {"support": "teacher", "k": 3, "normalize": "tail"}},
        "reverse_kl",
        ("rank",),
    ),
    "other masks": ({1: {"mask": torch.arange(6) < 5}}, "reverse_kl", ("rank", "active")),
    "other tokens": ({1: {"tokens": torch.arange(6).flip(0)}}, "k2", ("rank", "tokens")),
    "a sparse teacher on one rank": (
        {0: {"teacher": SERVED, "normalize": "tail"}},
        "reverse_kl",
        ("rank",),
    ),
    "student and teacher split apart": (
        {0: {"teacher": LOGITS[:, :8]}, 1: {"teacher": torch.zeros(6, 12)}},
        "reverse_kl",
        ("10", "8"),
    ),
    "student and teacher split apart on one rank": (
        {1: {"teacher": torch.zeros(6, 12)}},
        "reverse_kl",
        ("10", "12"),
    ),
    "a token beyond the vocabulary": (everywhere({"tokens": torch.full((6,), 20)}), "k2", ("20",)),
    "a bad token on one rank": (
        {1: {"tokens": torch.tensor([0, 1, 2, 99, 4, 5])}},
        "k2",
        ("rank", "tokens"),
    ),
    "a mask of the wrong shape on one rank": ({1: {"mask": torch.ones(5).bool()}}, "k2", ("mask",)),
    "k beyond the vocabulary": (everywhere({"k": 21}), "aopd", ("21", "20")),
    "k beyond all memory": (everywhere({"k": 10**10}), "aopd", ("10000000000", "20")),
    "masks of other positions": (
        {r: {"mask": torch.arange(6) != r} for r in range(2)},
        "reverse_kl",
        ("rank", "mask"),
    ),
    "other normalisations": (
        {r: {"support": "teacher", "k": 3, "normalize": n} for r, n in enumerate(("none", "tail"))},
        "reverse_kl",
        ("rank", "normalize"),
    ),
    "an argument that one rank refuses by itself": (
        {1: {"support": "teacher", "k": 3}},
        "reverse_kl",
        ("normalize",),
    ),
    "a head that does not fit on one rank": (
        {1: {"teacher": opdc.Projection(torch.zeros(6, 3), torch.zeros(10, 4))}},
        "reverse_kl",
        ("teacher.weight",),
    ),
    "hidden states beside logits": (
        {1: {"student": opdc.Projection(torch.zeros(6, 3), torch.zeros(10, 3))}},
        "reverse_kl",
        ("rank", "models"),
    ),
    "other scales": (
        {
            r: {"student": opdc.Projection(torch.zeros(6, 3), torch.zeros(10, 3), scale=1.0 + r)}
            for r in range(2)
        },
        "reverse_kl",
        ("rank", "scale"),
    ),
    "hidden states that are frozen on one rank": (
        {
            r: {"student": opdc.Projection(hidden, torch.zeros(10, 3))}
            for r, hidden in enumerate((torch.zeros(6, 3), torch.zeros(6, 3, requires_grad=True)))
        },
        "reverse_kl",
        ("rank", "gradients"),
    ),
    "a bfloat16 shard": (
        {1: {"student": LOGITS.bfloat16(), "reduction": "none"}, 0: {"reduction": "none"}},
        "reverse_kl",
        ("rank", "dtypes"),
    ),
    "inplace over the teacher": (
        everywhere({"student": LOGITS, "teacher": LOGITS, "inplace": True}),
        "reverse_kl",
        ("overwrite the teacher",),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_an_error_on_every_rank_and_the_group_goes_on(name):
    changes, function, words = BAD[name]
    results = on_ranks(2, raising, changes, function)
    for rank, (raised, _) in enumerate(results):
        assert raised is not None, f"rank {rank} raised nothing"
        assert raised.type in (ValueError, TypeError), raised
        for word in words:
            assert word in raised.text, f"{word} is not in: {raised.text}"
    assert len({value.item() for _, value in results}) == 1


def test_bad_input_of_four_processes_names_the_rank():
    results = on_ranks(4, raising, {2: {"student": LOGITS[:4], "teacher": LOGITS[:4]}})
    for raised, _ in results:
        assert "rank" in raised.text and "[6, 6, 4, 6]" in raised.text


def head_of_a_rank(group, dtype, *, teacher_rows=5):
    """A Projection of 5 ids a rank whose gradients nearly cancel in the hidden states' sum."""
    rank = dist.get_rank(group)
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(6, 4, generator=generator).to(dtype).requires_grad_()
    weight = 30 * torch.randn(10, 4, generator=generator)
    teacher = torch.randn(6, 10, generator=generator)
    mine = slice(5 * rank, 5 * rank + 5)
    return hidden, weight[mine].to(dtype), teacher[:, mine], (weight.to(dtype), teacher)


def rounded_after_the_sum(group):
    hidden, weight, teacher, whole = head_of_a_rank(group, torch.bfloat16)
    found = []
    for head, logits, among in ((weight, teacher, group), (*whole, None)):
        hidden.grad = None
        student = opdc.Projection(hidden, head)
        opdc.reverse_kl(student, logits, process_group=among).backward()
        found.append(hidden.grad.float())
    return found


def test_hazard_10_the_gradient_of_hidden_states_is_rounded_when_the_ranks_are_summed():
    for shards, whole in on_ranks(2, rounded_after_the_sum):
        assert (shards - whole).abs().max() <= 2**-8 * whole.abs().max()
        assert torch.allclose(shards, whole, rtol=2**-7, atol=1e-6 * whole.abs().max().item())


def penalised(group, reduction):
    hidden, weight, teacher, _ = head_of_a_rank(group, torch.float32)
    value = opdc.reverse_kl(
        opdc.Projection(hidden, weight), teacher, reduction=reduction, process_group=group
    ).sum()
    [gradient] = torch.autograd.grad(value, hidden, create_graph=True)
    gradient.square().sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_hazard_20_second_derivatives_are_refused(reduction):
    for raised in attempt(2, penalised, reduction):
        assert raised.type is RuntimeError and "second derivatives" in raised.text


def heads_of_other_padding(group):
    """Beyond valid_vocab = 10 the heads of the last rank end at different ids."""
    rank = dist.get_rank(group)
    hidden, weight, _, (whole, _) = head_of_a_rank(group, torch.float64)
    pad = torch.nn.functional.pad
    student = opdc.Projection(hidden, pad(weight, (0, 0, 0, 1)) if rank == 1 else weight)
    teacher = opdc.Projection(hidden.detach().flip(0), weight)
    shards = opdc.reverse_kl(student, teacher, valid_vocab=10, process_group=group)
    shards.backward()
    of_shards, hidden.grad = hidden.grad, None
    teacher = opdc.Projection(hidden.detach().flip(0), whole)
    value = opdc.reverse_kl(opdc.Projection(hidden, whole), teacher)
    value.backward()
    return shards.item() - value.item(), (of_shards - hidden.grad).abs().max().item()


def test_heads_may_be_padded_differently():
    assert max(abs(x) for result in on_ranks(2, heads_of_other_padding) for x in result) < 1e-12


def not_a_group(group, student):
    opdc.reverse_kl(student, student, process_group="world")


def not_a_member(group, student):
    opdc.reverse_kl(student, student, process_group=dist.GroupMember.NON_GROUP_MEMBER)


def test_what_is_not_a_group():
    [raised] = attempt(1, not_a_group, LOGITS)
    assert raised.type is TypeError and "process_group" in raised.text and "str" in raised.text
    [raised] = attempt(1, not_a_member, LOGITS)
    assert raised.type in (TypeError, ValueError) and "process_group" in raised.text


def overwriting(group, student, teacher, widths):
    columns = columns_of(group, widths)
    leaf = cut(student, columns).requires_grad_()
    logits = leaf * 1.0
    value = opdc.jsd(logits, cut(teacher, columns), inplace=True, process_group=group)
    value.backward()
    return Answer(value.detach(), {}, {"logits": leaf.grad})


def test_overwritten_logits_give_the_same():
    inputs = inputs_of()
    result = joined(on_ranks(3, overwriting, inputs.student, inputs.teacher, WIDTHS[3]))
    close(result, answer(Call("jsd", inputs.student, {"teacher": inputs.teacher})))
