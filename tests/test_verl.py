"""opdc's losses in verl's registry, against the float64 oracle: packed sequences, several
micro-batches, sequences and vocabularies that are split over processes, other versions of verl."""

from __future__ import annotations

import importlib
import math
import sys

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import opdc
import opdc.verl
import oracle
import oracle_published
import verl_standin
from processes import on_ranks

VOCABULARY, K = 23, 5
LENGTHS = [[(3, 4), (2, 1), (4, 3)], [(1, 5), (5, 2)]]  # of prompts and responses, by micro-batch
LOSSES = {
    **opdc.verl.LOSSES,
    "a_jsd": opdc.nn.JSDLoss(beta=0.1, normalize="both"),
    "a_tropd": opdc.nn.TrOPDLoss(region="expected", reduction="seq_mean"),  # verl reduces
}
ORACLES = {
    "opdc_aopd": oracle_published.aopd,
    "opdc_forward_kl": lambda *a, **k: _divergence(oracle.forward_kl, *a, **k),
    "opdc_jsd": lambda *a, **k: _divergence(oracle.jsd, *a, **k),
    "opdc_lsm": lambda s, t, _, **k: oracle.lsm(s, t, **k),
    "opdc_reverse_kl": lambda *a, **k: _divergence(oracle.reverse_kl, *a, **k),
    "a_jsd": lambda s, t, _, **k: oracle.jsd(s, t, beta=0.1, normalize="both", k=K, **k),
    "a_tropd": lambda *a, **k: oracle_published.tropd(*a, region="expected", **k),
}


def _divergence(function, student, teacher, _tokens, **keywords):
    return function(student, teacher, normalize="tail", k=K, **keywords)


@pytest.fixture
def verl():
    with verl_standin.installed() as losses:
        opdc.verl.register(LOSSES)
        yield losses


def nested(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def micro_batch(lengths: list[tuple[int, int]], padded: bool) -> dict[str, Tensor]:
    """Data as it comes to verl's loss: the teacher's top K of every position, at the last one of a
    sequence all zeros; some slots are missing, some tokens are none of the top K."""
    tokens = [torch.randint(VOCABULARY, (sum(both),)) for both in lengths]
    input_ids = nested(tokens)
    teacher = 2 * torch.randn(len(input_ids.values()), VOCABULARY, dtype=torch.float64)
    best = opdc.topk(teacher, K)
    ids, logprobs = best.ids.int(), best.logprobs
    ids[::3, K - 2] = -1
    ends = input_ids.offsets()[1:] - 1
    ids[ends], logprobs[ends] = 0, 0.0
    mask = [torch.ones(response, dtype=torch.int64) for _, response in lengths]
    mask[0][1] = 0  # as the answer of a tool
    return {
        "input_ids": input_ids,
        "prompts": nested([x[:n] for x, (n, _) in zip(tokens, lengths, strict=True)]),
        "responses": nested([x[n:] for x, (n, _) in zip(tokens, lengths, strict=True)]),
        "response_mask": nested(mask).to_padded_tensor(0) if padded else nested(mask),
        "teacher_ids": torch.nested.nested_tensor_from_jagged(ids, input_ids.offsets()),
        "teacher_logprobs": torch.nested.nested_tensor_from_jagged(logprobs, input_ids.offsets()),
    }


def update() -> list[tuple[dict[str, Tensor], Tensor]]:
    """Micro-batches and the student's logits."""
    batches = [micro_batch(lengths, padded=i == 1) for i, lengths in enumerate(LENGTHS)]
    return [
        (data, torch.randn(1, len(data["input_ids"].values()), VOCABULARY, dtype=torch.float64))
        for data in batches
    ]


def active(data: dict[str, Tensor]) -> Tensor:
    """Which packed positions predict an active token of a response."""
    whole: list[Tensor] = []
    for tokens, mask in zip(
        data["input_ids"].unbind(), data["response_mask"].unbind(), strict=True
    ):
        response = len(data["responses"].unbind()[len(whole)])
        row = torch.zeros(len(tokens), dtype=torch.bool)
        row[-response - 1 : -1] = mask[:response].bool()
        whole.append(row)
    return torch.cat(whole)


def expected(loss_mode: str, batches: list[tuple[dict[str, Tensor], Tensor]]) -> Tensor:
    count = sum(int(active(data).sum()) for data, _ in batches)
    total = torch.zeros((), dtype=torch.float64)
    for data, logits in batches:
        tokens = data["input_ids"].values().roll(-1)
        ids, logprobs = data["teacher_ids"].values(), data["teacher_logprobs"].values()
        known = [
            next((lp for i, lp in zip(*row, strict=True) if i == y), -math.inf)
            for y, *row in zip(tokens.tolist(), ids.tolist(), logprobs.tolist(), strict=True)
        ]
        teacher = opdc.TopK(ids, logprobs, torch.tensor(known, dtype=torch.float64))
        total = total + ORACLES[loss_mode](
            logits[0], teacher, tokens, mask=active(data), num_items=count
        )
    return total


def poisoned(batches: list[tuple[dict[str, Tensor], Tensor]]) -> None:
    """NaN wherever nothing is active, in both models."""
    for data, logits in batches:
        logits.data[0, ~active(data)] = math.nan
        data["teacher_logprobs"].values()[~active(data)] = math.nan


@pytest.mark.parametrize("loss_mode", ORACLES)
def test_an_update_is_that_of_the_oracle(verl, loss_mode):
    batches = update()
    logits = [logits.requires_grad_() for _, logits in batches]
    want = expected(loss_mode, batches)
    want_gradients = torch.autograd.grad(want, logits)
    poisoned(batches)
    got, _ = verl_standin.step(loss_mode, batches)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12, check_dtype=False)
    gradients = torch.autograd.grad(got, logits)
    for gradient, want_gradient, (data, _) in zip(gradients, want_gradients, batches, strict=True):
        assert (gradient[0, ~active(data)] == 0).all()
        torch.testing.assert_close(gradient, want_gradient, rtol=1e-8, atol=1e-12)


def test_metrics_are_means_over_the_responses(verl):
    (data, logits), *_ = update()
    _, (metrics,) = verl_standin.step("opdc_tropd", [(data, logits)])
    where = active(data)
    assert metrics["opdc/teacher_mass"].aggregation == "mean"
    teacher = data["teacher_logprobs"].values().exp() * (data["teacher_ids"].values() >= 0)
    assert metrics["opdc/teacher_mass"].value == pytest.approx(float(teacher[where].sum(-1).mean()))
    entropy = opdc.entropy(logits[0, where]).mean()
    assert metrics["opdc/student_entropy"].value == pytest.approx(float(entropy))
    assert "opdc/trusted" in metrics
    assert "opdc/k1" not in metrics and "opdc/positions" not in metrics
    assert all(math.isfinite(metric.value) for metric in metrics.values())


def test_bfloat16_logits_and_a_batch_that_has_old_log_probs(verl):
    seen = {}

    def loss(student, teacher, **given):
        seen.update(given, student=student, teacher=teacher)
        values, sums = opdc.reverse_kl(
            student, teacher, normalize="tail", mask=given["mask"], reduction="none",
            return_metrics=True,
        )  # fmt: skip
        return values, sums

    opdc.verl.register({"mine": loss})
    (data, logits), *_ = update()
    old = torch.randn(3, 4)
    data["old_log_probs"] = old
    logits = logits.bfloat16().requires_grad_()
    verl_standin.step("mine", [(data, logits)])[0].backward()
    assert logits.grad.dtype is torch.bfloat16 and logits.grad.isfinite().all()
    mask = data["response_mask"].to_padded_tensor(0).bool()
    assert torch.equal(seen["old_logprobs"][seen["mask"]], old[mask])
    predicted = data["responses"].to_padded_tensor(-1)[mask]
    assert torch.equal(seen["tokens"][seen["mask"]], predicted)


def test_losses_of_verl_stay_its_own(verl):
    (data, logits), *_ = update()
    output = verl.compute_topk_loss(
        *verl_standin.configuration("forward_kl_topk"), data, logits, "thd"
    )
    assert torch.equal(output["distillation_losses"], logits.sum(-1))
    settings = verl.settings["opdc_lsm"]
    assert settings.use_topk and not settings.use_estimator


def test_register_may_be_called_again(verl):
    dispatch = verl.compute_topk_loss
    opdc.verl.register()
    opdc.verl.register({"a_jsd": opdc.nn.JSDLoss(beta=0.9, normalize="tail")})
    assert verl.compute_topk_loss is dispatch
    assert opdc.verl._registered["a_jsd"].beta == 0.9
    assert LOSSES["a_jsd"].reduction == "mean"  # a copy was registered


# ----------------------------------------------------------------- over processes


def _of_ranks(group, seed: int) -> list[bool]:
    """Loss, gradient and a metric of two ranks, beside those of one."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    torch.manual_seed(seed)
    batches = update()
    whole = [logits.requires_grad_() for _, logits in batches]
    want = expected("a_jsd", batches)
    wanted = torch.autograd.grad(want, whole)
    agreed = []

    def gathered(values: Tensor) -> Tensor:
        """All positions, of which only this rank's own have a gradient."""
        parts = [torch.empty_like(values) for _ in range(size)]
        dist.all_gather(parts, values.detach().contiguous(), group=group)
        parts[rank] = values
        return torch.cat(parts)

    with verl_standin.installed(ulysses=group):
        opdc.verl.register(LOSSES)
        one_rank = []
        for data, logits in batches:
            padding = logits.new_zeros(1, -logits.shape[1] % size, VOCABULARY)
            local = torch.cat([logits.detach(), padding], 1).chunk(size, 1)[rank]
            one_rank.append((data, local.clone().requires_grad_()))
        got, metrics = verl_standin.step("a_jsd", one_rank, gather=gathered)
        agreed.append(torch.allclose(got.double(), want.detach(), rtol=1e-9))
        gradients = torch.autograd.grad(got, [logits for _, logits in one_rank])
        for gradient, all_gradients in zip(gradients, wanted, strict=True):
            padding = all_gradients.new_zeros(1, -all_gradients.shape[1] % size, VOCABULARY)
            mine = torch.cat([all_gradients, padding], 1).chunk(size, 1)[rank]
            agreed.append(torch.allclose(gradient, mine, rtol=1e-8, atol=1e-12))
        data, logits = batches[0]
        entropy = opdc.entropy(logits.detach()[0, active(data)]).mean()
        agreed.append(math.isclose(metrics[0]["opdc/student_entropy"].value, float(entropy)))

    with verl_standin.installed(tensor_parallel=group):
        opdc.verl.register(LOSSES)
        bounds = [0, 9, VOCABULARY]
        slices, places = [], []
        for data, logits in batches:
            lengths = data["input_ids"].offsets().diff().tolist()
            rows = [
                torch.cat([row, row.new_zeros(-len(row) % size, VOCABULARY)])
                for row in logits.detach()[0].split(lengths)
            ]
            local = torch.cat(rows)[None, :, bounds[rank] : bounds[rank + 1]]
            slices.append((data, local.clone().requires_grad_()))
            kept = [torch.arange(len(row)) < n for row, n in zip(rows, lengths, strict=True)]
            places.append(torch.cat(kept))
        # Without padding again, as Megatron's engine gives model outputs back.
        by_length = {len(kept): kept for kept in places}
        got, _ = verl_standin.step(
            "a_jsd", slices, gather=lambda x: x[by_length[len(x)]], strategy="megatron"
        )
        agreed.append(torch.allclose(got.double(), want.detach(), rtol=1e-9))
        gradients = torch.autograd.grad(got, [logits for _, logits in slices])
        for gradient, kept, all_gradients in zip(gradients, places, wanted, strict=True):
            mine = all_gradients[0, :, bounds[rank] : bounds[rank + 1]]
            agreed.append(torch.allclose(gradient[0, kept], mine, rtol=1e-8, atol=1e-12))
    return agreed


def test_sequences_and_vocabularies_over_two_processes():
    for agreed in on_ranks(2, _of_ranks, 3):
        assert all(agreed), agreed


# ----------------------------------------------------------------- what is an error


@pytest.mark.parametrize("name", ["K1Loss", "K2Loss", "K3Loss", "EOPDLoss", "REOPOLDLoss"])
def test_losses_of_all_tokens_are_refused(verl, name):
    with pytest.raises(TypeError, match=f"{name}, which needs the teacher's log-prob"):
        opdc.verl.register({"mine": getattr(opdc.nn, name)()})


def test_bad_losses(verl):
    with pytest.raises(TypeError, match='support="teacher"'):
        loss = opdc.nn.JSDLoss(support="student", k=3, normalize="tail")
        opdc.verl.register({"mine": loss})
    with pytest.raises(ValueError, match='"forward_kl_topk" already'):
        opdc.verl.register({"forward_kl_topk": opdc.nn.LSMLoss()})


def test_a_callable_cannot_have_its_vocabulary_split(verl, monkeypatch):
    opdc.verl.register({"mine": lambda *_, **__: None})
    state = sys.modules["megatron.core.parallel_state"]
    monkeypatch.setattr(state, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(state, "get_tensor_model_parallel_group", object)
    with pytest.raises(TypeError, match="process_group, which function has not"):
        verl_standin.step("mine", update(), strategy="megatron")


def test_policy_gradients_and_fused_kernels_are_errors(verl):
    batches = update()
    with pytest.raises(ValueError, match="use_policy_gradient=False"):
        verl_standin.step("opdc_lsm", batches, use_policy_gradient=True)
    data, _ = batches[0]
    actor, distillation = verl_standin.configuration("opdc_lsm")
    with pytest.raises(RuntimeError, match="use_fused_kernels=False"):
        verl.registry["opdc_lsm"](
            config=actor, distillation_config=distillation, model_output={}, data=data
        )


def test_a_mask_of_another_shape(verl):
    (data, logits), *_ = update()
    data["response_mask"] = torch.ones(3, 9)
    with pytest.raises(ValueError, match=r"response_mask has the shape \(3, 9\).*\(3, 4\)"):
        verl_standin.step("opdc_lsm", [(data, logits)])


def test_another_version_of_verl():
    with verl_standin.installed() as losses:
        del losses.compute_topk_loss
        sys.modules["verl.utils.metric"].Metric = lambda value: value
        with pytest.raises(RuntimeError) as error:
            opdc.verl.register()
    assert str(error.value).startswith(
        "verl 0.9.0 has no verl.trainer.distillation.losses.compute_topk_loss, "
        "verl.utils.metric.Metric(aggregation, value): opdc.verl was made for verl 0.8 to 0.9"
    )
    with verl_standin.installed() as losses:
        sys.modules.pop("verl.workers.utils.padding")
        with pytest.raises(RuntimeError, match=r"no verl\.workers\.utils\.padding\.no_padding_2"):
            opdc.verl.register()


def test_without_verl(monkeypatch):
    monkeypatch.setitem(sys.modules, "verl", None)
    with pytest.raises(ImportError, match=r"opdc\.verl needs verl: pip install verl"):
        opdc.verl.register()


def test_verl_registers_by_importing(monkeypatch):
    monkeypatch.delitem(sys.modules, "opdc.verl")
    monkeypatch.setattr(opdc, "verl", None)
    with verl_standin.installed() as losses:
        importlib.import_module("opdc.verl")
    assert set(opdc.verl.LOSSES) < set(losses.registry)
