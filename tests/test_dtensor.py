"""DTensors: a loss of tensors spread over a mesh of processes is that of the whole ones."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import opdc
from processes import Raised, attempt, on_ranks
from projections import parts, with_parts
from shards import Answer, Call, answer, is_projection

V = 23
POSITIONS = (5, 3)  # over four processes the last one has none
REPLICATE, BATCH, SEQUENCE, VOCABULARY = Replicate(), Shard(0), Shard(1), Shard(2)
ROWS = Shard(0)  # of a head
Placements = tuple[Any, ...]

# Over two, three or four processes in a row, or over two by two.
LAYOUTS: dict[str, Placements] = {
    "replicate": (REPLICATE,),
    "batch": (BATCH,),
    "sequence": (SEQUENCE,),
    "vocabulary": (Shard(-1),),
    "batch and vocabulary": (BATCH, VOCABULARY),
    "vocabulary and batch": (VOCABULARY, BATCH),
    "batch and sequence": (BATCH, SEQUENCE),
    "batch twice": (BATCH, BATCH),
    "replicate and sequence": (REPLICATE, SEQUENCE),
    "vocabulary and replicate": (VOCABULARY, REPLICATE),
}
HEAD_LAYOUTS: dict[str, tuple[Placements, Placements]] = {  # of the hidden states and of the head
    "replicate": ((REPLICATE,), (REPLICATE,)),
    "batch": ((BATCH,), (REPLICATE,)),
    "sequence": ((SEQUENCE,), (REPLICATE,)),
    "vocabulary": ((REPLICATE,), (ROWS,)),
    "batch and vocabulary": ((BATCH, REPLICATE), (REPLICATE, ROWS)),
    "vocabulary and sequence": ((REPLICATE, SEQUENCE), (ROWS, REPLICATE)),
}


# ----------------------------------------------------------------- in the processes


@functools.cache
def mesh_of(group: Any, dimensions: int) -> DeviceMesh:
    if dimensions == 1:
        return DeviceMesh.from_group(group, "cpu")
    return init_device_mesh("cpu", (2, 2))


def spread(tensor: Tensor, mesh: DeviceMesh, placements: Placements) -> DTensor:
    """A leaf, if the tensor asks for a gradient."""
    spread = distribute_tensor(tensor.detach(), mesh, placements)
    return spread.requires_grad_(tensor.requires_grad)


def spread_student(call: Call, mesh: DeviceMesh, placements: Any) -> tuple[Any, dict[str, DTensor]]:
    if not is_projection(call.student):
        student = spread(call.student.requires_grad_(), mesh, placements)
        return student, {"logits": student}
    hidden, head = placements
    leaves = {
        name: spread(
            x.requires_grad_(), mesh, hidden if name in ("hidden", "adapter_inputs") else head
        )
        for name, x in parts(call.student).items()
    }
    return with_parts(call.student, leaves), leaves


def spread_answers(
    group: Any, calls: list[Call], placements: Any, of_arguments: dict[str, Placements]
) -> list[Answer]:
    """With the arguments in `of_arguments` as DTensors, and the others whole on every process."""
    mesh = mesh_of(group, len(placements[0] if isinstance(placements[0], tuple) else placements))
    results = []
    for call in calls:
        student, leaves = spread_student(call, mesh, placements)
        arguments = {
            name: spread(x, mesh, of_arguments[name]) if name in of_arguments else x
            for name, x in call.arguments.items()
        }
        value = getattr(opdc, call.function)(student, **arguments)
        value, metrics = value if isinstance(value, tuple) else (value, {})
        assert isinstance(value, DTensor) and value.device_mesh == mesh
        if value.dim() == 0:
            assert value.placements == (REPLICATE,) * mesh.ndim
        else:
            of_hidden = placements[0] if is_projection(student) else placements
            split = [x for x in of_hidden if x in (BATCH, SEQUENCE)]
            assert [x for x in value.placements if x.is_shard()] == split
        upstream = torch.ones_like(value.full_tensor()) if call.upstream is None else call.upstream
        value.backward(spread(upstream, mesh, value.placements))
        for name, leaf in leaves.items():
            assert isinstance(leaf.grad, DTensor), name
            assert leaf.grad.placements == leaf.placements, name
        gradients = {name: leaf.grad.full_tensor() for name, leaf in leaves.items()}
        assert not any(isinstance(metric, DTensor) for metric in metrics.values())
        results.append(Answer(value.detach().full_tensor(), metrics, gradients))
    return results


# ----------------------------------------------------------------- calls


def models(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    head = opdc.Projection(
        normal(*POSITIONS, 6),
        normal(V, 6),
        bias=normal(V),
        scale=0.5,
        adapter=(normal(*POSITIONS, 2), normal(V, 2)),
    )
    student, teacher = 2 * normal(*POSITIONS, V), 2 * normal(*POSITIONS, V)
    logprobs = torch.log_softmax(teacher.double(), -1).to(dtype)
    tokens = torch.randint(0, V, POSITIONS, generator=generator)
    ids = teacher.argsort(-1, descending=True)[..., :5]
    served = opdc.TopK(
        ids,
        logprobs.gather(-1, ids),
        token_logprobs=logprobs.gather(-1, tokens[..., None])[..., 0],
        entropy=-(logprobs.exp() * logprobs).sum(-1),
    )
    mask = torch.rand(POSITIONS, generator=generator) < 0.7
    mask[1] = False  # a sequence, and for some layouts a process, with nothing in it
    return {
        "student": student,
        "teacher": teacher,
        "tokens": tokens,
        "served": served,
        "head": head,
        "teacher_head": opdc.Projection(normal(*POSITIONS, 4), normal(V, 4)),
        "old_logprobs": served.token_logprobs + 0.3 * normal(*POSITIONS),
        "uniforms": torch.rand(POSITIONS, generator=generator, dtype=torch.float64).to(dtype),
        "mask": mask,
        "weights": normal(*POSITIONS),
        "upstream": normal(*POSITIONS),
    }


NAMED = ("teacher", "tokens", "old_logprobs", "uniforms")
# What a loss takes besides the student: options, and names in `models` under NAMED.
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "reverse_kl": ("reverse_kl", {}),
    "jsd": ("jsd", {"beta": 0.2, "temperature": 0.7, "valid_vocab": 21}),
    "skew_kl": ("skew_kl", {"direction": "reverse"}),
    "lsm": ("lsm", {"k": 5}),
    "lsm of the student": ("lsm", {"k": 5, "support": "student"}),
    "tail": (
        "forward_kl",
        {"support": "teacher+token", "k": 4, "normalize": "tail", "tokens": "tokens"},
    ),
    "k1": ("k1", {"tokens": "tokens", "old_logprobs": "old_logprobs", "clip_range": 0.2}),
    "discount": ("k1", {"tokens": "tokens", "discount": 0.9}),
    "k3": ("k3", {"tokens": "tokens", "teacher": "logprobs"}),
    "served": ("reverse_kl", {"teacher": "served", "normalize": "tail", "tokens": "tokens"}),
    "served eopd": ("eopd", {"teacher": "served", "tokens": "tokens"}),
    "tropd": ("tropd", {"tokens": "tokens", "k": 5, "uniforms": "uniforms"}),
    "exploration": ("reopold", {"tokens": "tokens", "num_items": 7}),
    "refinement": (
        "reopold",
        {"tokens": "tokens", "phase": "refinement", "entropy_threshold": 1.5, "num_items": 7},
    ),
}


def call_of(name: str, reduction: str, student: str = "student", teacher: str = "teacher") -> Call:
    given = models()
    given["logprobs"] = given["served"].token_logprobs
    if name == "served":
        given["served"] = given["served"]._replace(token_logprobs=None, entropy=None)
    function, options = LOSSES[name]
    arguments = {
        key: given[option] if key in NAMED else option
        for key, option in ({"teacher": teacher} | options).items()
    }
    if reduction in ("none", "sum"):
        arguments.pop("num_items", None)
    upstream = given["upstream"] if reduction == "none" else torch.tensor(-2.5).double()
    common = {"mask": given["mask"], "weights": given["weights"], "return_metrics": True}
    return Call(function, given[student], arguments | common | {"reduction": reduction}, upstream)


def works_with(name: str, layout: str, reduction: str) -> bool:
    parted = "sequence" in layout and (name == "discount" or reduction == "seq_mean")
    return not parted


def close(result: Answer, whole: Answer, tolerance: float = 1e-12) -> None:
    def compare(what: str, x: Tensor, truth: Tensor, size: float) -> None:
        torch.testing.assert_close(
            x, truth, rtol=0, atol=tolerance * size, equal_nan=True, msg=lambda m: f"{what}: {m}"
        )

    compare("value", result.value, whole.value, max(1.0, whole.value.abs().max().item()))
    assert list(result.metrics) == list(whole.metrics)
    for name, metric in whole.metrics.items():
        compare(name, result.metrics[name], metric, 10 * max(1.0, abs(metric.item())))
    assert set(result.gradients) == set(whole.gradients)
    for name, gradient in whole.gradients.items():
        compare(name, result.gradients[name], gradient, gradient.abs().max().item())


def agree(
    sizes: tuple[int, ...], calls: list[Call], placements: Any, **of_arguments: Placements
) -> None:
    wholes = [answer(call) for call in calls]
    for size in sizes:
        for results in on_ranks(size, spread_answers, calls, placements, of_arguments):
            for result, whole in zip(results, wholes, strict=True):
                close(result, whole)


# ----------------------------------------------------------------- logits


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LOSSES)
def test_logits(name, layout):
    calls = [
        call_of(name, reduction)
        for reduction in ("none", "sum", "mean", "seq_mean")
        if (reduction != "sum" or name == "reverse_kl") and works_with(name, layout, reduction)
    ]
    if layout in ("batch", "vocabulary"):
        sizes = (3,) if name != "reverse_kl" else (1, 2, 3, 4)
    else:
        sizes = (2,) if len(LAYOUTS[layout]) == 1 else (4,)
    agree(sizes, calls, LAYOUTS[layout])


@pytest.mark.parametrize("layout", ["batch", "vocabulary", "batch and sequence"])
def test_statistics(layout):
    given = models()
    calls = [
        Call("token_logprobs", given["student"], {"tokens": given["tokens"]}, given["upstream"]),
        Call("entropy", given["student"], {"mask": given["mask"]}, given["upstream"]),
    ]
    agree((4,), calls, LAYOUTS[layout])


@pytest.mark.parametrize("layout", ["replicate", "batch", "sequence", "vocabulary"])
def test_arguments_of_other_placements_are_brought_to_the_students(layout):
    reductions = ("none", "mean") if layout == "sequence" else ("none", "mean", "seq_mean")
    for teacher in (BATCH, SEQUENCE, VOCABULARY, REPLICATE):
        agree(
            (2,),
            [call_of("tropd", reduction) for reduction in reductions],
            LAYOUTS[layout],
            teacher=(teacher,),
            tokens=(SEQUENCE,),
            mask=(REPLICATE,),
            weights=(BATCH,),
            uniforms=(BATCH,),
        )


def test_without_a_mask_all_positions_count():
    for layout in ("batch", "sequence", "batch twice"):
        calls = [call_of("reverse_kl", reduction) for reduction in ("mean", "seq_mean")]
        for call in calls:
            del call.arguments["mask"]
        agree((4,), calls[: 1 if layout == "sequence" else 2], LAYOUTS[layout])


def test_nothing_active_and_a_row_that_is_undefined():
    nothing = call_of("reverse_kl", "mean")
    nothing.arguments["mask"] = torch.zeros(POSITIONS).bool()
    undefined = call_of("reverse_kl", "none")
    undefined.student[0, 1, 3] = math.nan
    undefined.arguments["mask"] = None
    whole = answer(undefined)
    for layout in ("batch", "vocabulary"):
        agree((2,), [nothing], LAYOUTS[layout])
        for [result] in on_ranks(2, spread_answers, [undefined], LAYOUTS[layout], {}):
            assert torch.equal(result.value.isnan(), whole.value.isnan())
            assert torch.equal(
                result.gradients["logits"].isnan(), whole.gradients["logits"].isnan()
            )


def counted_items(group, call):
    """A number of items that is a DTensor itself."""
    mesh = mesh_of(group, 1)
    mask = spread(call.arguments["mask"], mesh, (BATCH,))
    student = spread(call.student, mesh, (BATCH,))
    arguments = call.arguments | {"mask": mask, "num_items": mask.sum(), "return_metrics": False}
    return getattr(opdc, call.function)(student, **arguments).full_tensor()


def test_num_items_may_be_a_dtensor():
    call = call_of("jsd", "mean")
    whole = answer(call).value
    for value in on_ranks(2, counted_items, call):
        torch.testing.assert_close(value, whole, rtol=1e-12, atol=0)


# ----------------------------------------------------------------- heads


@pytest.mark.parametrize("teacher", ["teacher", "teacher_head"])
@pytest.mark.parametrize("layout", HEAD_LAYOUTS)
@pytest.mark.parametrize("name", ["reverse_kl", "k1", "tropd", "lsm of the student"])
def test_heads(name, layout, teacher):
    calls = [
        call_of(name, reduction, "head", teacher)
        for reduction in ("none", "mean")
        if works_with(name, layout, reduction)
    ]
    agree((2,) if len(HEAD_LAYOUTS[layout][0]) == 1 else (4,), calls, HEAD_LAYOUTS[layout])


@pytest.mark.parametrize("layout", ["batch", "vocabulary", "batch and vocabulary"])
def test_a_head_with_a_sparse_teacher(layout):
    calls = [call_of("served", reduction, "head") for reduction in ("none", "mean")]
    for call in calls:
        call.arguments["normalize"] = "both"
    agree((2,) if " " not in layout else (4,), calls, HEAD_LAYOUTS[layout])


@pytest.mark.parametrize("layout", ["batch", "vocabulary", "batch and vocabulary"])
def test_logits_with_the_head_of_the_teacher(layout):
    calls = [call_of("jsd", "mean", "student", "teacher_head")]
    agree((2,) if " " not in layout else (4,), calls, LAYOUTS[layout])


def spread_teacher_head(group, call):
    mesh = mesh_of(group, 1)
    student, leaves = spread_student(call, mesh, ((REPLICATE,), (ROWS,)))
    teacher = call.arguments["teacher"]
    hidden, weight = (
        spread(teacher.hidden, mesh, (BATCH,)),
        spread(teacher.weight, mesh, (Shard(1),)),
    )
    arguments = call.arguments | {"teacher": teacher._replace(hidden=hidden, weight=weight)}
    value, metrics = getattr(opdc, call.function)(student, **arguments)
    value.backward(torch.full_like(value, call.upstream.item()))
    gradients = {name: leaf.grad.full_tensor() for name, leaf in leaves.items()}
    return Answer(value.detach().full_tensor(), metrics, gradients)


def test_the_head_of_the_teacher_of_other_placements():
    call = call_of("jsd", "mean", "head", "teacher_head")
    for result in on_ranks(2, spread_teacher_head, call):
        close(result, answer(call))


# ----------------------------------------------------------------- bad input


def refused(group, name: str) -> None:
    mesh = mesh_of(group, 1)
    given = models()
    student = {axis: spread(given["student"], mesh, (Shard(axis),)) for axis in range(3)}
    whole, teacher, tokens = given["student"], given["teacher"], given["tokens"]
    hidden, weight = given["head"].hidden, given["head"].weight
    mask_of_a_rank = given["mask"] if dist.get_rank(group) else torch.ones(4)
    kl = opdc.reverse_kl
    calls = {
        "plain student": lambda: kl(whole, spread(teacher, mesh, (BATCH,))),
        "plain hidden": lambda: kl(opdc.Projection(hidden, spread(weight, mesh, (ROWS,))), teacher),
        "plain weight": lambda: kl(
            opdc.Projection(spread(hidden, mesh, (BATCH,)), weight), teacher
        ),
        "plain bias": lambda: kl(
            opdc.Projection(
                spread(hidden, mesh, (REPLICATE,)),
                spread(weight, mesh, (ROWS,)),
                given["head"].bias,
            ),
            teacher,
        ),
        "plain head beside a mask": lambda: kl(
            opdc.Projection(hidden, weight), teacher, mask=spread(given["mask"], mesh, (BATCH,))
        ),
        "both split": lambda: kl(
            opdc.Projection(spread(hidden, mesh, (BATCH,)), spread(weight, mesh, (ROWS,))), teacher
        ),
        "hidden size split": lambda: kl(
            opdc.Projection(spread(hidden, mesh, (Shard(2),)), spread(weight, mesh, (Shard(1),))),
            teacher,
        ),
        "partial": lambda: kl(DTensor.from_local(whole, mesh, [Partial()]), teacher),
        "local mask": lambda: kl(student[0], teacher, mask=given["mask"][:2]),
        "local teacher": lambda: kl(student[0], teacher[:2]),
        "other vocabulary": lambda: kl(
            student[2], torch.zeros(*POSITIONS, V + 4, dtype=torch.float64), valid_vocab=V
        ),
        "seq_mean": lambda: kl(student[1], teacher, reduction="seq_mean"),
        "discount": lambda: opdc.k1(student[1], teacher, tokens, discount=0.5),
        "keep": lambda: opdc.reopold(student[0], teacher, tokens, phase="refinement", num_items=3),
        "selected": lambda: opdc.reopold(student[0], teacher, tokens),
        "inplace": lambda: kl(student[0], teacher, inplace=True),
        "process_group": lambda: kl(student[2], teacher, process_group=group),
        "sparse_gradient": lambda: opdc.lsm(
            opdc.Projection(
                spread(hidden, mesh, (REPLICATE,)),
                spread(weight, mesh, (REPLICATE,)),
                sparse_gradient=True,
            ),
            given["served"]._replace(token_logprobs=None, entropy=None),
        ),
        "bad token": lambda: opdc.k2(
            student[0],
            teacher,
            DTensor.from_local(
                torch.full((3 - dist.get_rank(group), 3), 99 * dist.get_rank(group)),
                mesh,
                [BATCH],
                shape=POSITIONS,
                stride=(3, 1),
            ),
        ),
        "bad mask": lambda: kl(student[0], teacher, mask=mask_of_a_rank),
        "bad mask over the vocabulary": lambda: kl(student[2], teacher, mask=mask_of_a_rank),
    }
    calls[name]()


REFUSED = {
    "plain student": ("student is a plain tensor",),
    "plain hidden": ("full_tensor(", "to_local()", "process_group", "student.weight"),
    "plain weight": ("student.weight is a plain tensor", "distribute_tensor"),
    "plain bias": ("student.bias is a plain tensor",),
    "plain head beside a mask": ("student.hidden is a plain tensor",),
    "both split": ("student.hidden", "student.weight", "redistribute"),
    "hidden size split": ("student.hidden", "student.weight", "redistribute"),
    "partial": ("Partial", "redistribute"),
    "local mask": ("mask", "(2, 3)", "(5, 3)"),
    "local teacher": ("teacher", "(2, 3, 23)", "(5, 3)"),
    "other vocabulary": ("23", "27", "valid_vocab"),
    "seq_mean": ("seq_mean", "sequences"),
    "discount": ("discount=0.5", "sequences"),
    "keep": ("entropy_threshold",),
    "selected": ("num_items", "selected"),
    "inplace": ("inplace",),
    "process_group": ("process_group",),
    "sparse_gradient": ("sparse_gradient",),
    "bad token": ("99",),
    "bad mask": ("mask", "(4,)"),
    "bad mask over the vocabulary": ("mask", "(4,)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_on_every_rank(name):
    for raised in attempt(2, refused, name):
        assert isinstance(raised, Raised) and raised.type is ValueError, raised
        for words in REFUSED[name]:
            assert words in raised.text, raised.text


def test_an_error_on_one_rank_names_it_and_the_group_goes_on():
    first, second = attempt(2, refused, "bad token")
    assert "rank" in first.text and "rank" not in second.text
    agree((2,), [call_of("jsd", "mean")], (BATCH,))


def refused_on_four(group, name: str) -> None:
    mesh = mesh_of(group, 2)
    given = models()
    if name == "vocabulary twice":
        student = spread(given["student"], mesh, (VOCABULARY, VOCABULARY))
        opdc.reverse_kl(student, given["teacher"])
    elif name == "descending":
        mesh = DeviceMesh("cpu", [3, 2, 1, 0])
        student = spread(given["student"], mesh, (VOCABULARY,))
        opdc.reverse_kl(student, given["teacher"])
    else:  # a token that is bad for the two processes of one half of the batch
        mine = mesh.get_coordinate()[0]
        local = torch.full((3 - mine, 3), 99 * mine)
        tokens = DTensor.from_local(
            local, mesh, [BATCH, REPLICATE], run_check=False, shape=POSITIONS, stride=(3, 1)
        )
        student = spread(given["student"], mesh, (BATCH, VOCABULARY))
        opdc.k2(student, given["teacher"], tokens)


@pytest.mark.parametrize(
    ("name", "words"),
    [("vocabulary twice", "two dimensions"), ("descending", "order"), ("bad token", "99")],
)
def test_what_is_refused_on_meshes_of_four(name, words):
    for raised in attempt(4, refused_on_four, name):
        assert isinstance(raised, Raised) and raised.type is ValueError, raised
        assert words in raised.text, raised


# ----------------------------------------------------------------- imports


def replicas_that_draw(group):
    torch.manual_seed(dist.get_rank(group))
    student, teacher = torch.randn(2, 40, 9, generator=torch.Generator().manual_seed(5)).unbind()
    mesh = mesh_of(group, 1)
    whole = [spread(x, mesh, (REPLICATE,)) for x in (student, teacher)]
    return opdc.tropd(*whole, torch.arange(40) % 9, k=3, reduction="none").to_local()


def test_replicas_draw_the_same_numbers():
    first, second = on_ranks(2, replicas_that_draw)
    assert torch.equal(first, second)


def test_import_stays_light():
    """What no plain call needs is not loaded."""
    program = (
        "import sys, torch, opdc\n"
        "student = torch.randn(2, 5, requires_grad=True)\n"
        "opdc.reverse_kl(student, torch.randn(2, 5)).backward()\n"
        "assert 'torch.distributed.tensor' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
