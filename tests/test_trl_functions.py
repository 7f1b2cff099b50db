"""`opdc.trl.generalized_jsd_loss` and `chunked_divergence_loss` against the functions of TRL that
they stand in for: values, gradients, errors."""

from __future__ import annotations

import inspect

import pytest
import torch

pytest.importorskip("trl")

# First, because it sets what keeps TRL off the network.
from trainers import assert_same, distillation, frozen, gkd, train  # isort: skip
from trl.experimental.gkd import GKDTrainer
from trl.experimental.gold import GOLDTrainer
from trl.experimental.iw_opd import IWOPDTrainer
from trl.trainer import distillation_trainer

import opdc.trl

__all__ = ["frozen"]  # a fixture

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
B, C, V, HIDDEN, WIDE = 3, 7, 33, 8, 12
THEIRS = {
    "GKD": GKDTrainer.generalized_jsd_loss,
    "GOLD": GOLDTrainer.generalized_jsd_loss,
    "IW-OPD": IWOPDTrainer.generalized_jsd_loss,
}


def logits(dtype=torch.float32):
    """Of one token more, the last of which is cut off: as trainers give them, a view."""
    student = (3 * torch.randn(B, C + 1, V)).to(dtype).requires_grad_()
    teacher = (3 * torch.randn(B, C + 1, V)).to(dtype)
    return student, teacher


def some_labels():
    labels = torch.randint(V, (B, C))
    labels[0, :3] = -100
    labels[1] = -100
    labels[2, -2:] = -100
    return labels


def value_and_gradient(function, student, teacher, **keywords):
    student = student.detach().requires_grad_()
    loss = function(student[:, :-1], teacher[:, :-1], **keywords)
    loss.backward()
    return loss.detach(), student.grad


def assert_close(ours, theirs, relative=1e-5):
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        one, other = one.double(), other.double()
        assert (one - other).norm() <= relative * other.norm() + 1e-12


# ------------------------------------------------------------------------- generalized_jsd_loss


@pytest.mark.parametrize("beta", BETAS)
def test_jsd_is_every_trainers_own(beta):
    student, teacher = logits()
    labels = some_labels()
    for theirs in THEIRS.values():
        for keywords in (
            {"labels": labels},
            {"labels": labels, "temperature": 0.7, "num_items_in_batch": 17},
            {"labels": labels, "num_items_in_batch": torch.tensor(5)},
            {"labels": labels, "reduction": "sum"},
            {"labels": labels, "reduction": "mean"},
            {"temperature": 2.0},
            {"reduction": "mean"},
        ):
            keywords = {"beta": beta, **keywords}
            assert_close(
                value_and_gradient(opdc.trl.generalized_jsd_loss, student, teacher, **keywords),
                value_and_gradient(theirs, student, teacher, **keywords),
            )


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("add_tail", [True, False])
def test_jsd_on_a_support_is_that_of_iw_opd(beta, add_tail):
    student, teacher = logits()
    keywords = {"labels": some_labels(), "beta": beta, "temperature": 0.9, "add_tail": add_tail}
    # One id, normalised, always has all the mass: opdc says so, TRL trains on zeros.
    for top_k in (1 if add_tail else 2, 5, V, V + 1):
        assert_close(
            value_and_gradient(
                opdc.trl.generalized_jsd_loss, student, teacher, top_k=top_k, **keywords
            ),
            value_and_gradient(THEIRS["IW-OPD"], student, teacher, top_k=top_k, **keywords),
            # TRL's tail is the log of 1 − Σ of float32 probabilities.
            relative=2e-5,
        )


@pytest.mark.parametrize("beta", BETAS)
def test_jsd_of_probabilities_is_that_of_gold(beta):
    student, teacher = (x.softmax(-1).detach() for x in logits())
    keywords = {"labels": some_labels(), "beta": beta, "logits_are_probs": True}
    ours = value_and_gradient(opdc.trl.generalized_jsd_loss, student, teacher, **keywords)
    theirs = value_and_gradient(THEIRS["GOLD"], student, teacher, **keywords)
    assert ours[0] == pytest.approx(theirs[0].item(), rel=1e-5)
    # A softmax is part of ours: the gradients agree along the directions in which the
    # probabilities keep their sum, which are the only ones in which they can move.
    flat = [
        gradient - (student * gradient).sum(-1, keepdim=True) for gradient in (ours[1], theirs[1])
    ]
    torch.testing.assert_close(student * flat[0], student * flat[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_jsd_without_an_active_position_is_zero(beta):
    student, teacher = logits()
    labels = torch.full((B, C), -100)
    for num_items in (None, 7, torch.tensor(9)):
        loss, gradient = value_and_gradient(
            opdc.trl.generalized_jsd_loss,
            student,
            teacher,
            labels=labels,
            beta=beta,
            num_items_in_batch=num_items,
        )
        assert loss == 0 and not gradient.any()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_jsd_of_bfloat16_errs_less_than_trls(beta):
    student, teacher = logits(torch.bfloat16)
    keywords = {"labels": some_labels(), "beta": beta, "temperature": 0.8}
    exact = value_and_gradient(THEIRS["GKD"], student.double(), teacher.double(), **keywords)
    ours, theirs = (
        value_and_gradient(function, student, teacher, **keywords)
        for function in (opdc.trl.generalized_jsd_loss, THEIRS["GKD"])
    )
    for one, other, truth in zip(ours, theirs, exact, strict=True):
        assert (one.double() - truth).norm() <= (other.double() - truth).norm()


def test_jsd_never_reads_what_has_no_label():
    student, teacher = logits()
    labels = some_labels()
    clean = value_and_gradient(opdc.trl.generalized_jsd_loss, student, teacher, labels=labels)
    unread = torch.cat([labels == -100, torch.ones(B, 1, dtype=torch.bool)], dim=1)
    with torch.no_grad():
        student[unread] = torch.nan
        teacher[unread] = torch.inf
    poisoned = value_and_gradient(opdc.trl.generalized_jsd_loss, student, teacher, labels=labels)
    assert all(map(torch.equal, clean, poisoned))


# ---------------------------------------------------------------------- chunked_divergence_loss


def heads(dtype=torch.float32, bias=True):
    """Hidden states of two widths, masks and heads, as the keywords of TRL's function."""
    mask = torch.tensor([[1] * C, [1] * 4 + [0] * (C - 4), [0] * C])
    mask[0, 2] = 0
    tensors = {
        "student_hidden_states": torch.randn(B, C, HIDDEN),
        "teacher_hidden_states": torch.randn(B, C, WIDE),
        "student_lm_head_weight": torch.randn(V, HIDDEN),
        "teacher_lm_head_weight": torch.randn(V, WIDE),
    }
    if bias:
        tensors |= {
            "student_lm_head_bias": torch.randn(V),
            "teacher_lm_head_bias": torch.randn(V),
        }
    # As in a trainer, the parameters of the teacher do require a gradient.
    tensors = {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}
    tensors["teacher_hidden_states"].requires_grad_(False)
    return {**tensors, "completion_mask": mask}


def run(function, tensors, **settings):
    """The triple, and the gradients of the student's tensors; those of the teacher's are none."""
    tensors = {
        name: tensor.detach().requires_grad_(tensor.requires_grad)
        for name, tensor in tensors.items()
    }
    loss, entropy, count = function(**tensors, **settings)
    loss.backward()
    assert all(tensors[name].grad is None for name in tensors if name.startswith("teacher"))
    gradients = [tensors[name].grad for name in tensors if name.startswith("student")]
    return [loss.detach(), *gradients], entropy, count


SETTINGS = {
    "plain": {},
    "items": {"num_items_in_batch": torch.tensor(29), "temperature": 0.7},
    "number": {"num_items_in_batch": 13.5},
    "scaled": {"student_logit_scale": 0.5, "teacher_logit_scale": 1.5, "temperature": 1.3},
    "capped": {"student_final_logit_softcapping": 3.0, "teacher_final_logit_softcapping": 5.0},
}


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", SETTINGS)
def test_chunked_divergence_is_trls(name, beta):
    settings = {**SETTINGS[name], "beta": beta}
    tensors = heads(bias=name != "plain")
    ours, entropy, count = run(opdc.trl.chunked_divergence_loss, tensors, **settings)
    theirs, their_entropy, their_count = run(
        distillation_trainer._chunked_divergence_loss, tensors, **settings
    )
    assert_close(ours, theirs)
    assert count == their_count == 10 and count.shape == ()
    assert entropy.item() == pytest.approx(their_entropy.item(), rel=1e-5)
    assert not entropy.requires_grad


def test_chunked_divergence_takes_trls_parameters():
    ours, theirs = (
        [
            (parameter.name, parameter.default, parameter.kind)
            for parameter in inspect.signature(function).parameters.values()
        ]
        for function in (
            opdc.trl.chunked_divergence_loss,
            distillation_trainer._chunked_divergence_loss,
        )
    )
    assert ours == theirs


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_chunked_divergence_without_an_active_position_is_zero(beta):
    tensors = heads()
    tensors["completion_mask"] = torch.zeros(B, C, dtype=torch.long)
    for num_items in (None, torch.tensor(9)):
        results, entropy, count = run(
            opdc.trl.chunked_divergence_loss, tensors, beta=beta, num_items_in_batch=num_items
        )
        assert not any(result.any() for result in results)
        assert entropy == 0 and count == 0


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_chunked_divergence_of_bfloat16_errs_less_than_trls(beta):
    tensors = heads(torch.bfloat16, bias=False)
    exact = {
        name: tensor.detach().double().requires_grad_(tensor.requires_grad)
        for name, tensor in tensors.items()
        if name != "completion_mask"
    }
    truth = divergence(**exact, mask=tensors["completion_mask"], beta=beta)
    truth.backward()
    truth = [truth.detach(), *(exact[name].grad for name in exact if name.startswith("student"))]
    ours, *_ = run(opdc.trl.chunked_divergence_loss, tensors, beta=beta)
    theirs, *_ = run(distillation_trainer._chunked_divergence_loss, tensors, beta=beta)
    for one, other, value in zip(ours, theirs, truth, strict=True):
        least = torch.finfo(other.dtype).eps * value.norm()  # both may round to the best there is
        assert (one.double() - value).norm() <= max((other.double() - value).norm(), least / 2)


def divergence(
    student_hidden_states,
    teacher_hidden_states,
    student_lm_head_weight,
    teacher_lm_head_weight,
    mask,
    beta,
):
    return GKDTrainer.generalized_jsd_loss(
        student_hidden_states @ student_lm_head_weight.T,
        (teacher_hidden_states @ teacher_lm_head_weight.T).detach(),
        labels=mask - 1 - 99 * (mask == 0),
        beta=beta,
    )


def test_chunked_divergence_never_reads_masked_rows():
    """TRL's own projects them too, and 0 · NaN is NaN in the gradient of the head."""
    tensors = heads()
    clean = run(opdc.trl.chunked_divergence_loss, tensors, beta=0.5)
    masked = tensors["completion_mask"] == 0
    with torch.no_grad():
        tensors["student_hidden_states"][masked] = torch.nan
        tensors["teacher_hidden_states"][masked] = torch.nan
    poisoned = run(opdc.trl.chunked_divergence_loss, tensors, beta=0.5)
    assert all(map(torch.equal, clean[0], poisoned[0])) and clean[1:] == poisoned[1:]
    theirs = run(distillation_trainer._chunked_divergence_loss, tensors, beta=0.5)
    assert any(result.isnan().any() for result in theirs[0])


# ------------------------------------------------------------------------------- as one line


def test_the_functions_stand_in_for_trls(monkeypatch):
    settings = {"max_steps": 2, "beta": 0.3}
    theirs = train(gkd(lmbda=0.0, **settings)), train(distillation(**settings))
    monkeypatch.setattr(
        GKDTrainer, "generalized_jsd_loss", staticmethod(opdc.trl.generalized_jsd_loss)
    )
    monkeypatch.setattr(
        distillation_trainer, "_chunked_divergence_loss", opdc.trl.chunked_divergence_loss
    )
    ours = train(gkd(lmbda=0.0, **settings)), train(distillation(**settings))
    for mine, their in zip(ours, theirs, strict=True):
        assert_same(mine, their)
    assert ours[1].logs[0]["entropy"] == pytest.approx(theirs[1].logs[0]["entropy"], rel=1e-5)
