"""Trainers, teachers, losses and installations that do not fit: one line that names the argument,
what came, what is wanted and, where there is one, the way out. Nothing is changed before it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("trl")

import trainers as build  # isort: skip  first, because it sets what keeps TRL off the network
import trl
import trl.trainer.distillation_trainer as of_trl
from transformers import Trainer, TrainingArguments

import opdc
import opdc.hf
import opdc.trl
from trainers import VOCABULARY, frozen, llama, train

__all__ = ["frozen"]  # a fixture

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings('ignore:.*normalizer="local"'),
    pytest.mark.filterwarnings('ignore:.*advantage="old"'),
]

LOSS = opdc.nn.ReverseKLLoss()


def sampler(**keywords: Any) -> opdc.hf.BlendSampler:
    return opdc.hf.BlendSampler(None, 0.1, **keywords)


_built = functools.cache(lambda name: getattr(build, name)())


@pytest.fixture(params=["distillation"])
def trainer(request: pytest.FixtureRequest) -> Iterator[Any]:
    """One for all tests in which it is not trained: it is refused, and then as it was."""
    trainer = _built(request.param)
    yield trainer
    with contextlib.suppress(ValueError):  # a test that failed may have left a loss there
        opdc.trl.detach(trainer)


of_gkd = pytest.mark.parametrize("trainer", ["gkd"], indirect=True)


def refused(
    trainer: Any, error: type[Exception], words: list[str], loss: Any = LOSS, **keywords: Any
) -> None:
    """The error has the words in this order, is one line and leaves the trainer untouched."""
    before = dict(vars(trainer))
    with pytest.raises(error) as raised:
        opdc.trl.attach(trainer, loss, **keywords)
    said(raised.value, words)
    assert vars(trainer).keys() == before.keys()
    assert all(vars(trainer)[name] is value for name, value in before.items())


def said(error: BaseException, words: list[str]) -> None:
    message = str(error)
    assert "\n" not in message
    assert re.search(".*".join(map(re.escape, words)), message), (message, words)


# ------------------------------------------------------------------------------- trainers


def test_trainers_without_a_hook(tmp_path):
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    for trainer in (Trainer(llama(0), arguments), object(), llama(0)):
        with pytest.raises(TypeError) as raised:
            opdc.trl.attach(trainer, LOSS)
        said(raised.value, ["trainer", type(trainer).__name__, "DistillationTrainer"])


def test_a_class_in_the_place_of_a_trainer():
    with pytest.raises(TypeError, match="trainer"):
        opdc.trl.attach(build.DistillationTrainer, LOSS)


def test_a_namesake_is_no_trainer_of_trl():
    class DistillationTrainer:
        pass

    with pytest.raises(TypeError, match=r"trainer.*DistillationTrainer"):
        opdc.trl.attach(DistillationTrainer(), LOSS)


def test_everything_is_set_or_nothing(trainer):
    """A failure in the middle, here while a teacher is prepared, leaves no half of it."""
    failing = mock.patch.object(trainer.accelerator, "prepare_model", side_effect=MemoryError)
    with failing:
        refused(trainer, MemoryError, [], teacher_model=llama(1))
    opdc.trl.attach(trainer, LOSS)


def test_a_second_attach():
    """It may be of another loss, of a subclass's `__init__`, or of a cell that is run twice."""
    trainer = build.distillation()
    opdc.trl.attach(trainer, LOSS)
    refused(trainer, ValueError, ["trainer", "DistillationTrainer", "detach"])
    opdc.trl.detach(trainer)
    opdc.trl.attach(trainer, opdc.nn.K1Loss())


def test_detach_without_attach(trainer):
    with pytest.raises(ValueError) as raised:
        opdc.trl.detach(trainer)
    said(raised.value, ["trainer", "DistillationTrainer"])
    opdc.trl.detach(opdc.trl.attach(trainer, LOSS))
    with pytest.raises(ValueError, match="trainer"):
        opdc.trl.detach(trainer)


def test_gold_that_compares_tokenizers():
    trainer = build.gold()
    trainer.use_uld_loss = True
    refused(trainer, ValueError, ["GOLDTrainer", "use_uld_loss", "False"])


@pytest.mark.parametrize(
    ("objective", "beta", "k"), [("iw_opd", 0.0, 1), ("iw_opd", 1.0, 0), ("jsd", 0.5, 1)]
)
def test_iw_opd_that_calls_another_function(objective, beta, k):
    trainer = build.iw_opd(distillation_objective=objective, beta=beta, loss_top_k=k)
    words = ["IWOPDTrainer", "distillation_objective", objective, f"loss_top_k={k}", "jsd"]
    refused(trainer, ValueError, words)


def test_iw_opd_that_calls_it():
    trainer = build.iw_opd(distillation_objective="jsd", beta=0.0, loss_top_k=1)
    opdc.trl.attach(trainer, LOSS)


@pytest.mark.parametrize("name", ["iw_opd", "sdft"])
def test_teachers_behind_a_server_of_trainers_that_want_logits(name):
    trainer = getattr(build, name)()
    trainer.use_teacher_server = True
    refused(trainer, ValueError, ["trainer", type(trainer).__name__, "server"])


def test_self_distillation_without_weight():
    trainer = build.sdpo()
    trainer.args.distillation_weight = 0
    refused(trainer, ValueError, ["trainer", "SDPOTrainer", "distillation_weight=0"])


def test_async_configurations_that_leave_out_ids_or_sequences():
    trainer = build.asynchronous()
    trainer.args.beta = 0.5
    refused(trainer, ValueError, ["AsyncDistillationConfig", "beta=0.5", "beta=0.0"])
    trainer.args.beta = 0.0
    loss = opdc.nn.ReverseKLLoss(reduction="seq_mean", support="teacher", normalize="tail")
    refused(trainer, ValueError, ["loss", "seq_mean", "AsyncDistillationTrainer"], loss)


# ------------------------------------------------------------------------------- options


@pytest.mark.parametrize("path", ["dense", "", None])
def test_paths_that_there_are_not(trainer, path):
    words = ["path", repr(path), '"auto", "hidden" or "logits"']
    refused(trainer, ValueError, words, path=path)


@of_gkd
@pytest.mark.parametrize("path", ["hidden", "logits"])
def test_paths_of_trainers_that_have_one(trainer, path):
    refused(trainer, ValueError, ["path", "GKDTrainer", '"auto"'], path=path)


@of_gkd
def test_normalizers_that_there_are_not(trainer):
    refused(trainer, ValueError, ["normalizer", "'mean'", '"trl" or "local"'], normalizer="mean")


def test_options_that_a_trainer_has_no_use_for():
    """Not one of them is ignored."""
    options = {
        "normalizer": ("local", ["distillation", "sdft", "sft"]),
        "autocast": (True, ["gkd", "gold", "sft"]),
        "prefix_column": ("teacher_response", ["gkd", "iw_opd"]),
        "rollout": (sampler(), ["gold", "iw_opd", "sdft", "sft"]),
    }
    for option, (value, names) in options.items():
        for name in names:
            trainer = _built(name)
            teacher = {"teacher_model": llama(1)} if name == "sft" else {}
            words = [option, type(trainer).__name__]
            refused(trainer, ValueError, words, **{option: value}, **teacher)


# ------------------------------------------------------------------------------- teachers


def test_fine_tuning_without_a_teacher():
    refused(build.sft(), ValueError, ["teacher_model", "SFTTrainer", "attach"])


def test_distillation_without_a_teacher():
    trainer = build.distillation(remote=True)
    refused(trainer, ValueError, ["teacher_model", "DistillationTrainer", "attach"])


def test_teachers_that_are_no_model(trainer):
    words = ["teacher_model", "str"]
    refused(trainer, TypeError, words, teacher_model="Qwen/Qwen3-8B")


def test_the_student_is_no_teacher_of_itself(trainer):
    """It would be frozen."""
    words = ["teacher_model", "student"]
    refused(trainer, ValueError, words, teacher_model=trainer.model)
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


@pytest.mark.parametrize("path", ["hidden", "logits"])
def test_vocabularies_that_differ(trainer, path):
    """Both sizes and the way out; with it they are compared on what they share."""
    larger = llama(1, vocabulary=VOCABULARY + 32)
    words = ["teacher_model", f"{VOCABULARY + 32}", f"{VOCABULARY}", "valid_vocab"]
    refused(trainer, ValueError, words, teacher_model=larger, path=path)
    assert all(parameter.requires_grad for parameter in larger.parameters())
    loss = opdc.nn.ReverseKLLoss(valid_vocab=VOCABULARY)
    opdc.trl.detach(opdc.trl.attach(trainer, loss, teacher_model=larger, path=path))


def test_a_valid_vocabulary_that_one_of_them_lacks():
    loss = opdc.nn.ReverseKLLoss(valid_vocab=VOCABULARY + 1)
    trainer = build.distillation(max_steps=1)
    with pytest.raises(ValueError, match=rf"valid_vocab.*{VOCABULARY + 1}.*{VOCABULARY}"):
        train(opdc.trl.attach(trainer, loss))


@pytest.mark.parametrize("name", ["distillation", "gkd", "sft"])
def test_teachers_on_another_device(name):
    trainer = getattr(build, name)()
    teacher = llama(1).to("meta")
    words = ["teacher_model", "meta", "cpu", "to("]
    refused(trainer, ValueError, words, teacher_model=teacher)


def test_tokenizers_that_differ():
    """Ids that mean something else: no loss of ids can be right."""
    mine, other = build.tokenizer(), build.tokenizer()
    count = len(mine)
    assert opdc.hf.shared_vocabulary(mine, mine) == count
    other.add_tokens(["<think>"])
    with pytest.raises(ValueError) as raised:
        opdc.hf.shared_vocabulary(mine, renamed(other))
    said(raised.value, ["tokenizer"])


def renamed(tokenizer: Any) -> Any:
    """Two words have changed places."""
    vocabulary = tokenizer.get_vocab()
    vocabulary["w7"], vocabulary["w8"] = vocabulary["w8"], vocabulary["w7"]

    class Renamed:
        def get_vocab(self) -> dict[str, int]:
            return dict(vocabulary)

        def __len__(self) -> int:
            return len(vocabulary)

    return Renamed()


# ------------------------------------------------------------------------------- rollouts


@pytest.mark.parametrize("option", ["use_vllm", "tools"])
def test_rollouts_that_another_engine_writes(option):
    trainer = build.distillation()
    setattr(trainer, option, [print] if option == "tools" else True)
    refused(trainer, ValueError, ["rollout", "DistillationTrainer", option], rollout=sampler())
    opdc.trl.attach(trainer, LOSS)  # the loss alone is fine


def test_rollouts_of_gkd_at_another_temperature():
    trainer = build.gkd(temperature=0.9)
    words = ["rollout", "0.9", "GKDConfig(temperature=1.0)"]
    refused(trainer, ValueError, words, rollout=sampler())
    opdc.trl.attach(trainer, LOSS)


def test_rollouts_that_are_no_sampler(trainer):
    words = ["rollout", "float", "BlendSampler"]
    refused(trainer, TypeError, words, rollout=0.02)
    refused(trainer, TypeError, ["rollout", "BlendBudget"], rollout=opdc.BlendBudget())


def test_columns_without_a_schedule(trainer):
    """How much of the column should a response begin with?"""
    column = {"prefix_column": "teacher_response"}
    refused(trainer, ValueError, ["prefix_column", "rollout", "PrefixLength"], **column)
    words = ["prefix_column", "prefix=opdc.PrefixLength"]
    refused(trainer, ValueError, words, rollout=sampler(), **column)


def test_columns_that_the_data_lacks():
    trainer = build.distillation(max_steps=1)
    begun = sampler(prefix=opdc.PrefixLength(9))
    opdc.trl.attach(trainer, LOSS, rollout=begun, prefix_column="teachers_response")
    with pytest.raises((KeyError, TypeError, ValueError)) as raised:
        train(trainer)
    said(raised.value, ["prefix_column", "teachers_response", "prompt"])


def test_columns_of_something_else():
    replies = build.prompts().add_column("teacher_response", [1.5] * len(build.prompts()))
    trainer = build.distillation(max_steps=1, train_dataset=replies)
    begun = sampler(prefix=opdc.PrefixLength(9))
    opdc.trl.attach(trainer, LOSS, rollout=begun, prefix_column="teacher_response")
    with pytest.raises(TypeError) as raised:
        train(trainer)
    said(raised.value, ["prefix_column", "teacher_response", "float", "text"])


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("name", ["distillation", "gkd"])
def test_generations_that_bypass_the_sampler(name, used):
    """An older rollout is not taken for this one, whatever the sampler did before."""
    own = sampler()
    if used:
        train(opdc.trl.attach(build.distillation(max_steps=1), opdc.nn.K1Loss(), rollout=own))
        assert own.last is not None
    trainer = getattr(build, name)(max_steps=1, **({"lmbda": 1.0} if name == "gkd" else {}))
    model = trainer.model
    method = "_generate_and_score_completions"
    if name == "gkd":
        method = "generate_on_policy_outputs"
    generate = getattr(trainer, method)

    def bypassing(*arguments: Any, **keywords: Any) -> Any:
        with mock.patch.object(model, "generate", functools.partial(type(model).generate, model)):
            return generate(*arguments, **keywords)

    setattr(trainer, method, bypassing)
    opdc.trl.attach(trainer, opdc.nn.K1Loss(), rollout=own)
    with pytest.raises(RuntimeError) as raised:
        train(trainer)
    said(raised.value, ["rollout", "without the sampler"])


def test_completions_that_trl_changed(monkeypatch):
    """Their log-probs are those of other tokens."""
    trainer = build.distillation(max_steps=1)
    generate = trainer._generate_and_score_completions

    def changed(inputs: Any) -> Any:
        batch = generate(inputs)
        batch["completion_ids"] = batch["completion_ids"].roll(1, 0)
        return batch

    trainer._generate_and_score_completions = changed
    opdc.trl.attach(trainer, opdc.nn.K1Loss(), rollout=sampler())
    with pytest.raises(RuntimeError) as raised:
        train(trainer)
    said(raised.value, ["completions", "sampler", "log-probs"])


# --------------------------------------------------------------------------------- losses


def test_losses_that_are_none(trainer):
    for loss in ("reverse_kl", None, 3.0):
        refused(trainer, TypeError, ["loss", type(loss).__name__], loss)
    refused(trainer, TypeError, ["loss", "ReverseKLLoss"], opdc.nn.ReverseKLLoss)  # a class


def test_losses_that_are_not_reduced(trainer):
    words = ["loss", 'reduction="none"', "mean"]
    refused(trainer, ValueError, words, opdc.nn.ReverseKLLoss(reduction="none"))


def test_losses_that_overwrite_logits_that_there_are_not(trainer):
    loss = opdc.nn.ReverseKLLoss(inplace=True)
    refused(trainer, ValueError, ["loss", "inplace", "logits"], loss)
    opdc.trl.detach(opdc.trl.attach(trainer, loss, path="logits"))


def test_temperatures_of_teachers_that_have_one():
    """A remote teacher's log-probs, and logits that are divided already."""
    for name, own in (("server", 2.0), ("sdft", 2.0)):
        trainer = getattr(build, name)()
        words = ["loss", "temperature", "2.0"]
        refused(trainer, ValueError, words, opdc.nn.ReverseKLLoss(temperature=own))


def test_temperatures_of_samplers(trainer):
    loss = opdc.nn.K1Loss(temperature=2.0)
    refused(trainer, ValueError, ["loss", "2.0", "1.0"], loss, rollout=sampler())
    opdc.trl.detach(opdc.trl.attach(trainer, loss))  # without a sampler it is one's own affair


def reporting(metrics: Any) -> Any:
    """A loss of one's own that returns metrics too."""

    def loss(student, teacher, *, mask, num_items, **_):
        return opdc.reverse_kl(student, teacher, mask=mask, num_items=num_items), metrics(mask)

    return loss


BROKEN = {
    "a loss of each position": (
        lambda student, teacher, *, mask, **_: opdc.reverse_kl(
            student, teacher, mask=mask, reduction="none"
        ),
        TypeError,
        ["loss", "shape"],
    ),
    "a number of Python": (lambda *_, **__: 1.0, TypeError, ["loss", "float", "tensor"]),
    "nothing": (lambda *_, **__: None, TypeError, ["loss", "NoneType", "tensor"]),
    "no graph": (
        lambda student, teacher, *, mask, **_: opdc.reverse_kl(
            student, teacher, mask=mask
        ).detach(),
        ValueError,
        ["loss", "gradient"],
    ),
    "metrics without a count": (reporting(lambda mask: {"mine": 3.0}), TypeError, ["positions"]),
    "metrics of each row": (
        reporting(lambda mask: {"mine": mask.sum(-1), "positions": mask.sum()}),
        TypeError,
        ["loss", "metrics", "numbers"],
    ),
    "a list of metrics": (reporting(lambda mask: [1, 2]), TypeError, ["loss", "metrics", "list"]),
}


@pytest.mark.parametrize("path", ["hidden", "logits"])
@pytest.mark.parametrize("name", BROKEN)
def test_losses_that_return_something_else(name, path):
    loss, error, words = BROKEN[name]
    trainer = opdc.trl.attach(build.distillation(max_steps=1), loss, path=path)
    with pytest.raises(error) as raised:
        train(trainer)
    said(raised.value, words)


@pytest.mark.parametrize("name", ["gkd", "sft"])
def test_losses_of_other_trainers_that_return_something_else(name):
    keywords = {"teacher_model": llama(1)} if name == "sft" else {}
    for loss, error, words in BROKEN.values():
        trainer = getattr(build, name)(max_steps=1)
        opdc.trl.attach(trainer, loss, **keywords)
        with pytest.raises(error) as raised:
            train(trainer)
        said(raised.value, words)


def test_metrics_may_be_plain_numbers():
    loss = reporting(lambda mask: {"mine": 3.0 * int(mask.sum()), "positions": int(mask.sum())})
    run = train(opdc.trl.attach(build.distillation(max_steps=1), loss))
    assert run.logs[0]["opdc/mine"] == pytest.approx(3.0)


def test_a_loss_that_needs_what_a_remote_teacher_does_not_send():
    """A top-K of the teacher has no whole rows: the loss itself says so, by its own name."""
    trainer = opdc.trl.attach(build.server(max_steps=1), opdc.nn.SkewKLLoss())
    with pytest.raises((TypeError, ValueError), match="teacher"):
        train(trainer)


@pytest.mark.parametrize("reduction", ["none", "token_mean"])
def test_reductions_of_the_function(reduction):
    logits = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError) as raised:
        opdc.trl.generalized_jsd_loss(logits, logits, reduction=reduction)
    said(raised.value, ["reduction", repr(reduction), "batchmean"])
    with pytest.raises(ValueError) as raised:
        opdc.trl.generalized_jsd_loss(logits, logits, reduction="mean", top_k=2)
    said(raised.value, ["reduction", "mean", "top_k", "batchmean"])


# --------------------------------------------------------------------- nothing to train on


def test_nothing_to_train_on():
    """Every label is -100: said once, a loss of 0 and no NaN, and the weights stay."""
    trainer = build.sft(max_steps=2)

    def ignored(batch: Any) -> Any:
        result = collate(batch)
        result["labels"] = torch.full_like(result["labels"], -100)
        return result

    collate = trainer.data_collator
    trainer.data_collator = ignored
    opdc.trl.attach(trainer, LOSS, teacher_model=llama(1))
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = train(trainer)
    lines = [str(x.message) for x in caught if "no position" in str(x.message)]
    assert len(lines) == 1
    assert "labels" in lines[0] and "-100" in lines[0]
    assert run.losses == [0, 0]
    assert run.norms == [0, 0]
    for parameter, old in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


def test_batches_without_labels():
    trainer = build.sft(max_steps=1)
    collate = trainer.data_collator
    trainer.data_collator = lambda batch: {
        name: value for name, value in collate(batch).items() if name != "labels"
    }
    opdc.trl.attach(trainer, LOSS, teacher_model=llama(1))
    with pytest.raises(ValueError) as raised:
        train(trainer)
    said(raised.value, ["labels", "input_ids"])


def test_images_have_a_path_of_their_own():
    trainer = build.distillation(max_steps=1)
    generate = trainer._generate_and_score_completions

    def with_images(inputs: Any) -> Any:
        batch = generate(inputs)
        batch["pixel_values"] = torch.zeros(len(batch["prompt_ids"]), 3)
        return batch

    trainer._generate_and_score_completions = with_images
    opdc.trl.attach(trainer, LOSS, path="logits")
    with pytest.raises(ValueError) as raised:
        train(trainer)
    said(raised.value, ["path", "logits", "pixel_values", "hidden"])


@pytest.mark.parametrize("path", ["hidden", "logits"])
def test_responses_that_are_masked_altogether(path):
    """As of tools that wrote everything: a step of 0, no NaN."""
    trainer = build.distillation(max_steps=1)
    generate = trainer._generate_and_score_completions

    def masked(inputs: Any) -> Any:
        batch = generate(inputs)
        batch["tool_mask"] = torch.zeros_like(batch["completion_mask"])
        return batch

    trainer._generate_and_score_completions = masked
    opdc.trl.attach(trainer, LOSS, path=path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no position")
        run = train(trainer)
    assert run.losses == [0]
    assert run.norms == [0]


# ------------------------------------------------------------------------- what is installed


def test_without_trl(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "opdc.trl")
    with pytest.raises(ImportError) as raised:
        importlib.import_module("opdc.trl")
    said(raised.value, ["opdc.trl", "pip install", "trl"])


@pytest.mark.parametrize("version", ["0.29.0", "2.0.0"])
def test_versions_without_the_hook(monkeypatch, version):
    """Not the number decides, but what is there; the number is named."""
    monkeypatch.setattr(trl, "__version__", version)
    monkeypatch.delattr(of_trl, "_chunked_divergence_loss")
    trainer = build.distillation()
    refused(trainer, RuntimeError, ["path", "TRL", "_chunked_divergence_loss"], path="hidden")


def test_versions_without_gkds_hook(monkeypatch):
    monkeypatch.delattr("trl.experimental.gkd.gkd_trainer.GKDTrainer.generalized_jsd_loss")
    refused(build.gkd(), RuntimeError, ["TRL", trl.__version__, "generalized_jsd_loss"])


def test_versions_without_a_trainer(monkeypatch):
    """`support` says which there are; an old TRL is one line for each, not a traceback."""
    everything = opdc.trl.support()
    assert set(everything) >= {"DistillationTrainer", "GKDTrainer", "SFTTrainer"}
    assert all(isinstance(line, str) and line for line in everything.values())
    monkeypatch.setitem(sys.modules, "trl.experimental.gkd", None)
    monkeypatch.setitem(sys.modules, "trl.experimental.gkd.gkd_trainer", None)
    lacking = opdc.trl.support()
    assert lacking["DistillationTrainer"] == everything["DistillationTrainer"]
    assert lacking["GKDTrainer"] != everything["GKDTrainer"]
    assert "\n" not in lacking["GKDTrainer"]


def test_the_names_are_public():
    assert set(opdc.trl.__all__) == {
        "attach",
        "chunked_divergence_loss",
        "detach",
        "generalized_jsd_loss",
        "support",
    }
    assert importlib.import_module("opdc.trl").attach is opdc.trl.attach


# ------------------------------------------------------------------------------- denominators


def of_two_processes(trainer: Any) -> Any:
    two = property(lambda _: 2)
    return mock.patch.object(type(trainer.accelerator), "num_processes", two)


@pytest.mark.parametrize("name", ["gkd", "gold", "iw_opd"])
def test_wrong_denominators_are_named(name):
    """Each by itself: what TRL counts twice, and what it counts of the data set."""
    trainer = getattr(build, name)(lmbda=0.0)
    arguments = trainer.args

    def warned(loss: Any = LOSS, **keywords: Any) -> str:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            opdc.trl.attach(trainer, loss, **keywords)
        opdc.trl.detach(trainer)
        return " ".join(str(one.message) for one in caught if "normalizer" in str(one.message))

    assert warned() == ""
    with of_two_processes(trainer):
        assert "processes twice" in warned()
        assert warned(normalizer="local") == ""
        with mock.patch.object(arguments, "average_tokens_across_devices", False):
            assert warned() == ""  # each process counts its own tokens
    with mock.patch.object(arguments, "gradient_accumulation_steps", 2):
        assert ("steps twice" in warned()) == (name != "gkd")
        assert warned(opdc.nn.ReverseKLLoss(reduction="seq_mean")) == ""
    with mock.patch.object(trainer, "lmbda", 1.0):
        assert "tokens of the data set" in warned()


def test_an_evaluation_accumulates_nothing():
    """IW-OPD's evaluation is the one that comes with a number of items."""
    results = []
    for normalizer in ("trl", "local"):
        trainer = build.iw_opd(
            lmbda=0.0, beta=1.0, gradient_accumulation_steps=2, eval_dataset=build.conversations()
        )
        opdc.trl.attach(trainer, LOSS, normalizer=normalizer)
        results.append(trainer.evaluate()["eval_loss"])
    assert results[1] == pytest.approx(results[0], rel=1e-5)


# ------------------------------------------------------------------------------- what would be lost


class AddsToTheLoss(trl.SFTTrainer):
    def compute_loss(self, *arguments, **keywords):
        return super().compute_loss(*arguments, **keywords) + 1


def test_what_a_subclass_adds_is_not_lost(monkeypatch):
    monkeypatch.setattr(build, "SFTTrainer", AddsToTheLoss)
    words = ["AddsToTheLoss.compute_loss", "replaced"]
    refused(build.sft(), ValueError, words, teacher_model=llama(1))


def test_other_losses_of_a_trainer_are_not_lost():
    trainer = build.sft()
    with mock.patch.object(trainer, "compute_loss_func", lambda *_, **__: 0):
        refused(trainer, ValueError, ["compute_loss_func"], teacher_model=llama(1))
    with mock.patch.object(trainer, "aux_loss_enabled", True):
        refused(trainer, ValueError, ["router_aux_loss_coef"], teacher_model=llama(1))


def test_advantages_of_a_blend():
    """Of the sampled token, at the policy that drew it: the gradient would be 1 − β of itself."""
    trainer = _built("distillation")
    with pytest.warns(UserWarning, match=r'K1Loss with advantage="old".*"current"'):
        opdc.trl.attach(trainer, opdc.nn.K1Loss(), rollout=sampler())
    opdc.trl.detach(trainer)
    current = opdc.nn.K1Loss(advantage="current")
    for loss, budget in ((current, 0.1), (opdc.nn.K1Loss(), 0), (LOSS, 1)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            opdc.trl.attach(trainer, loss, rollout=opdc.hf.BlendSampler(None, budget))
        opdc.trl.detach(trainer)


def test_a_trainer_on_an_accelerator(trainer):
    elsewhere = property(lambda _: torch.device("xpu", 0))
    with mock.patch.object(type(trainer.accelerator), "device", elsewhere):
        refused(trainer, ValueError, ["trainer", "xpu:0", "CUDA", "use_cpu=True"])
    on_a_gpu = property(lambda _: torch.device("cuda", 0))
    with mock.patch.object(type(trainer.accelerator), "device", on_a_gpu):
        opdc.trl.detach(opdc.trl.attach(trainer, opdc.nn.ReverseKLLoss()))


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_losses_without_a_denominator(trainer, reduction):
    loss = opdc.nn.ReverseKLLoss(reduction=reduction)
    refused(trainer, ValueError, ["loss", reduction, '"mean"'], loss)
    with pytest.raises(ValueError, match=rf'{reduction}.*"mean"'):
        opdc.hf.DistillLoss(loss, llama(0), llama(1))


# ------------------------------------------------------------------------------- the log


def test_a_log_without_metrics():
    trainer = opdc.trl.attach(build.distillation(max_steps=1), LOSS, metrics=False)
    assert not [name for name in train(trainer).logs[0] if name.startswith("opdc/")]


def test_batches_without_a_position_are_not_logged():
    """Their zeros would weigh in the mean of a log, and extremes of nothing are infinite."""
    trainer = build.gkd(lmbda=0.0, max_steps=1, per_device_train_batch_size=2)
    opdc.trl.attach(trainer, opdc.nn.K1Loss())
    of_trainer = trainer.generalized_jsd_loss
    trainer.generalized_jsd_loss = lambda **given: of_trainer(
        **{**given, "labels": torch.full_like(given["labels"], -100)}
    )
    with pytest.warns(UserWarning, match="no position to train on"):
        logged = train(trainer).logs[0]
    assert not [name for name in logged if name.startswith("opdc/")]
