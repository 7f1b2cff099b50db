"""`opdc.hf.DistillLoss` inside transformers' own Trainer, against a Trainer subclass written by
hand, and `opdc.hf.projection` against the logits that models make themselves."""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

import accelerate.state
import transformers
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import opdc
import opdc.hf
from opdc.bench import textbook
from trainers import Run, assert_same, distance, frozen, gpt2, llama, qwen2, settings, train

__all__ = ["frozen"]  # a fixture

V, WIDTH = 160, 9
IGNORED = -100


# ------------------------------------------------------------------------- what is read


def rows(lengths=(9, 5, 7, 4, 8, 6, 3, 9)) -> list[dict[str, list[int]]]:
    """Sequences of unequal lengths; the first third of each is prompt."""
    generator = torch.Generator().manual_seed(3)
    result = []
    for length in lengths:
        ids = torch.randint(2, V, (length,), generator=generator).tolist()
        prompt = length // 3
        result.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    return result


def padded(batch: list[dict[str, list[int]]], side: str = "right") -> dict[str, Tensor]:
    def fill(values: list[int], filler: int) -> list[int]:
        empty = [filler] * (WIDTH - len(values))
        return empty + values if side == "left" else values + empty

    return {
        "input_ids": torch.tensor([fill(row["input_ids"], 0) for row in batch]),
        "attention_mask": torch.tensor([fill([1] * len(row["input_ids"]), 0) for row in batch]),
        "labels": torch.tensor([fill(row["labels"], IGNORED) for row in batch]),
    }


def padded_left(batch: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    return padded(batch, "left")


def padded_and_shifted(batch: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Labels that stand where they are predicted already."""
    result = padded(batch)
    result["shift_labels"] = F.pad(result["labels"], (0, 1), value=IGNORED)[:, 1:]
    # Of these nothing but their presence may be used: a loss that shifts them has another value.
    result["labels"] = result["shift_labels"].clone()
    return result


def packed(batch: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """One row, in which positions begin again with each sequence."""
    starts = [[IGNORED, *row["labels"][1:]] for row in batch]
    return {
        "input_ids": torch.tensor([[x for row in batch for x in row["input_ids"]]]),
        "labels": torch.tensor([[x for labels in starts for x in labels]]),
        "position_ids": torch.tensor([[x for row in batch for x in range(len(row["input_ids"]))]]),
    }


# ---------------------------------------------------------------------- the two trainers


def reverse_kl_by_hand(student: Tensor, teacher: Tensor, labels: Tensor, items: Any) -> Tensor:
    """In float64, of the positions that have a label."""
    valid = labels != IGNORED
    rows = textbook.reverse_kl(student[valid].double(), teacher[valid].double())
    return (rows.sum() / (valid.sum() if items is None else items)).to(student.dtype)


class ByHand(Trainer):
    """What one would write without `DistillLoss`."""

    loss_is_scaled_for_ga = True
    teacher: Any

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        with torch.no_grad():
            # A cache would hide from the attention that sequences are packed.
            teacher = self.teacher(**inputs, use_cache=False).logits
        if "shift_labels" in inputs:
            labels, student = inputs["shift_labels"], outputs.logits
        else:
            labels, student, teacher = labels[:, 1:], outputs.logits[:, :-1], teacher[:, :-1]
        loss = reverse_kl_by_hand(student, teacher, labels, num_items_in_batch)
        # DistributedDataParallel takes the mean over processes; each has a part of the sum.
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


def run_of(
    kind: str,
    student: Any,
    teacher: Any,
    *,
    collator: Any = padded,
    dataset: Any = None,
    evaluate: bool = False,
    **changes: Any,
) -> Run:
    dataset = rows() if dataset is None else dataset
    common = {
        "args": settings(
            TrainingArguments, **{"remove_unused_columns": False, "max_steps": 2, **changes}
        ),
        "data_collator": collator,
        "train_dataset": dataset,
        "eval_dataset": dataset[:5],
    }
    if kind == "by hand":
        trainer = ByHand(student, **common)
        trainer.teacher = teacher.eval()
    else:
        loss = opdc.hf.DistillLoss(opdc.nn.ReverseKLLoss(), student, teacher)
        trainer = Trainer(student, compute_loss_func=loss, **common)
    if evaluate:
        run = Run()
        run.logs.append(trainer.evaluate())
        return run
    return train(trainer)


def both(student: Any, teacher: Any, **changes: Any) -> tuple[Run, Run]:
    """The same students: training changes them."""
    return tuple(
        run_of(kind, copy.deepcopy(student), copy.deepcopy(teacher), **changes)
        for kind in ("opdc", "by hand")
    )


# ------------------------------------------------------------------- equal to that by hand


@pytest.mark.parametrize("collator", [padded, padded_left], ids=["right", "left"])
@pytest.mark.parametrize("split", [(4, 1), (2, 2), (1, 4)], ids="{0[0]}x{0[1]}".format)
def test_accumulation_and_padding(split, collator):
    size, steps = split
    changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
    assert_same(*both(llama(0), llama(1, width=24), collator=collator, **changes))


def test_accumulation_changes_nothing():
    """The same gradients however a batch is split: divided by the tokens of all its parts."""
    runs = [
        run_of(
            "opdc",
            llama(0),
            llama(1),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
        )
        for size in (4, 2, 1)
    ]
    for run in runs[1:]:
        assert distance(run.gradients[0], runs[0].gradients[0]) < 2e-6
        assert run.losses == pytest.approx(runs[0].losses, rel=1e-5)


@pytest.mark.parametrize("family", [gpt2, qwen2], ids=["gpt2", "qwen2"])
def test_learned_positions_and_tied_heads(family):
    """GPT-2 does not forgive a teacher that is not told how the student was padded."""
    assert_same(*both(family(0), family(1), collator=padded_left))


def test_gradient_checkpointing():
    plain, _ = runs = both(llama(0), llama(1), gradient_checkpointing=True)
    assert_same(*runs)
    assert_same(plain, run_of("opdc", llama(0), llama(1)))


def test_bfloat16_autocast():
    """accelerate's autocast is around the student; the teacher computes in its own dtype."""
    runs = both(llama(0), llama(1), bf16=True)
    assert_same(*runs)
    plain = run_of("opdc", llama(0), llama(1))
    assert runs[0].losses != plain.losses, "nothing was rounded"
    assert runs[0].losses == pytest.approx(plain.losses, rel=0.05)


def test_bfloat16_models():
    """Logits come as bfloat16 and are not rounded once more: the loss is that of those numbers."""
    student, teacher = llama(0).bfloat16(), llama(1).bfloat16()
    # The gradients of bfloat16 parameters have eight bits.
    assert_same(*both(student, teacher), loss=1e-2, norm=2e-2)


def test_low_rank_adapters():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)

    def student():
        torch.manual_seed(5)
        return peft.get_peft_model(llama(0), config)

    runs = [run_of(kind, student(), llama(1)) for kind in ("opdc", "by hand")]
    assert_same(*runs)
    assert all("lora" in name for name in runs[0].gradients[0])


def test_labels_that_are_shifted_already():
    shifted, by_hand = both(llama(0), llama(1), collator=padded_and_shifted)
    assert_same(shifted, by_hand)
    assert_same(shifted, run_of("opdc", llama(0), llama(1)))


def test_packed_sequences():
    """`position_ids` keep the sequences of a row apart, for the teacher too: the loss is that of
    the rows one by one."""
    changes = {"per_device_train_batch_size": 4}
    runs = both(llama(0), llama(1), collator=packed, **changes)
    assert_same(*runs)
    assert_same(runs[0], run_of("opdc", llama(0), llama(1), **changes), loss=1e-4, norm=1e-3)


def test_evaluation_is_the_distillation_loss():
    student, teacher = llama(0), llama(1)
    runs = both(student, teacher, evaluate=True, per_device_eval_batch_size=3)
    got, wanted = (run.logs[0]["eval_loss"] for run in runs)
    assert got == pytest.approx(wanted, rel=1e-5)
    whole = both(student, teacher, evaluate=True, per_device_eval_batch_size=5)
    batch = padded(rows()[:5])
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        logits = [model.eval()(**batch).logits[:, :-1] for model in (student, teacher)]
    exact = reverse_kl_by_hand(*logits, labels, None).item()
    assert whole[0].logs[0]["eval_loss"] == pytest.approx(exact, rel=1e-5)


def test_every_loss_of_one_call_sees_the_tokens():
    """The labels, for losses of the sampled token; -100 is no id of any vocabulary."""
    student, teacher, batch = llama(0), llama(1), padded(rows())
    labels = batch.pop("labels")
    mask = labels[:, 1:] != IGNORED
    tokens = labels[:, 1:].clamp(min=0)
    logits = [model(**batch).logits.detach()[:, :-1] for model in (student, teacher)]
    for loss in (opdc.nn.K1Loss(), opdc.nn.TrOPDLoss(k=8, region="expected"), opdc.nn.LSMLoss(k=8)):
        function = opdc.hf.DistillLoss(loss, student, teacher)
        got = function(student(**batch), labels, num_items_in_batch=torch.tensor(17))
        wanted = loss(*logits, tokens=tokens, mask=mask, num_items=17)
        torch.testing.assert_close(got, wanted)
        function.remove()


def test_a_loss_of_ones_own():
    """Any callable of the same arguments; it may return a plain tensor."""
    seen: dict[str, Any] = {}

    def loss(student, teacher, *, mask, tokens, num_items, **rest):
        seen.update(rest, shapes=(student.shape, teacher.shape, mask.shape, tokens.shape))
        return textbook.reverse_kl(student, teacher)[mask].sum() / num_items

    student, teacher, batch = llama(0), llama(1), padded(rows())
    labels = batch.pop("labels")
    function = opdc.hf.DistillLoss(loss, student, teacher)
    got = function(student(**batch), labels, num_items_in_batch=9)
    reference = opdc.hf.DistillLoss(opdc.nn.ReverseKLLoss(), student, teacher)
    wanted = reference(student(**batch), labels, num_items_in_batch=9)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)
    inner = (8, WIDTH - 1)
    assert seen["shapes"] == ((*inner, V), (*inner, V), inner, inner)
    assert all(seen[name] is None for name in ("weights", "old_logprobs", "prefix_mask"))


def test_vocabularies_that_differ_by_padding():
    student, teacher, batch = llama(0), llama(1, vocabulary=V + 32), padded(rows())
    labels = batch.pop("labels")
    function = opdc.hf.DistillLoss(opdc.nn.ReverseKLLoss(valid_vocab=V), student, teacher)
    with torch.no_grad():
        logits = student(**batch).logits[:, :-1], teacher(**batch).logits[:, :-1, :V]
    wanted = reverse_kl_by_hand(*logits, labels[:, 1:], None)
    torch.testing.assert_close(function(student(**batch), labels).detach(), wanted)
    with pytest.raises(ValueError, match=rf"teacher_model.*{V + 32}.*{V}.*valid_vocab"):
        opdc.hf.DistillLoss(opdc.nn.ReverseKLLoss(), student, teacher)


# --------------------------------------------------------------------- two processes


def one_of_two(rank: int, store: Any, results: Any, kind: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # not used: there is a store
    # What this process inherited is of a single one.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    run = run_of(kind, llama(0), llama(1), ddp_backend="gloo", **changes)
    torch.save(run, f"{results}.{rank}")
    torch.distributed.barrier()
    os._exit(0)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_two_processes_are_one(tmp_path):
    """Trainer itself multiplies by the number of processes, so the loss must not."""
    results = tmp_path / "results"
    runs = {}
    for kind in ("opdc", "by hand"):
        # A fork, for it need not import everything again.
        arguments = (tmp_path / f"store {kind}", results, kind)
        torch.multiprocessing.start_processes(one_of_two, arguments, nprocs=2, start_method="fork")
        runs[kind] = [torch.load(f"{results}.{rank}", weights_only=False) for rank in range(2)]
        # The gradients after all-reduce are those of both.
        assert distance(runs[kind][0].gradients[0], runs[kind][1].gradients[0]) == 0
    assert_same(runs["opdc"][0], runs["by hand"][0])
    alone = run_of("opdc", llama(0), llama(1), per_device_train_batch_size=8)
    assert distance(runs["opdc"][0].gradients[0], alone.gradients[0]) < 2e-6


# --------------------------------------------------------------------- the teacher


def test_the_teacher_is_frozen_and_never_differentiated():
    student, teacher = llama(0), llama(1).train()
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    before = copy.deepcopy(teacher.state_dict())
    run_of("opdc", student, teacher, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(parameter.is_inference() for parameter in student.parameters())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_teacher_has_no_dropout():
    """In whatever mode it came, and in whatever mode the student is."""
    torch.manual_seed(0)
    student, teacher, batch = llama(0), llama(1, attention_dropout=0.5).train(), padded(rows())
    labels = batch.pop("labels")
    function = opdc.hf.DistillLoss(opdc.nn.ReverseKLLoss(), student, teacher)
    losses = [function(student(**batch), labels).item() for _ in range(2)]
    with torch.no_grad():
        logits = [model.eval()(**batch).logits[:, :-1] for model in (student, teacher)]
    exact = reverse_kl_by_hand(*logits, labels[:, 1:], None).item()
    assert losses == pytest.approx([exact] * 2, rel=1e-5)


def test_the_teacher_reads_what_the_student_read():
    """Except what concerns the student's own loss or cache."""
    student, teacher = llama(0), llama(1)
    calls = []
    teacher.register_forward_pre_hook(
        lambda module, arguments, keywords: calls.append((arguments, keywords)), with_kwargs=True
    )
    function = opdc.hf.DistillLoss(opdc.nn.ReverseKLLoss(), student, teacher)
    batch = padded(rows())
    labels = batch.pop("labels")
    own = {"labels": labels, "shift_labels": labels, "num_items_in_batch": torch.tensor(3)}
    outputs = student(**batch, **own, use_cache=True)
    function(outputs, labels)
    function(student(batch["input_ids"], batch["attention_mask"]), labels)  # by position
    assert len(calls) == 2
    keywords = calls[0][1]
    assert torch.equal(keywords["input_ids"], batch["input_ids"])
    assert torch.equal(keywords["attention_mask"], batch["attention_mask"])
    assert not own.keys() & keywords.keys()
    assert not keywords.get("use_cache")
    given = [*calls[1][0], *calls[1][1].values()]
    assert any(x is batch["input_ids"] for x in given)
    assert any(x is batch["attention_mask"] for x in given)


def test_removed():
    """Nothing of it stays with the model, which trains on as it did before."""
    student, teacher = llama(0), llama(1)
    hooks = dict(student._forward_pre_hooks)
    function = opdc.hf.DistillLoss(opdc.nn.ReverseKLLoss(), student, teacher)
    assert len(student._forward_pre_hooks) == len(hooks) + 1
    other = opdc.hf.DistillLoss(opdc.nn.ForwardKLLoss(), student, teacher)  # none disturbs another
    batch = padded(rows())
    labels = batch.pop("labels")
    outputs = student(**batch)
    function.remove()
    function.remove()  # twice is once
    assert other(outputs, labels).isfinite()
    other.remove()
    assert dict(student._forward_pre_hooks) == hooks
    assert not student._forward_pre_hooks_with_kwargs
    with pytest.raises((RuntimeError, ValueError), match=r"remove|forward"):
        function(student(**batch), labels)


# ---------------------------------------------------------------------------- bad input


def function_and_batch() -> tuple[Any, Any, dict[str, Tensor], Tensor]:
    student, teacher = llama(0), llama(1)
    function = opdc.hf.DistillLoss(opdc.nn.ReverseKLLoss(), student, teacher)
    batch = padded(rows())
    return function, student, batch, batch.pop("labels")


def test_without_labels():
    function, student, batch, _ = function_and_batch()
    with pytest.raises(ValueError, match="labels"):
        function(student(**batch), None)


def test_a_trainer_whose_batches_have_no_labels():
    def collator(batch):
        return {name: x for name, x in padded(batch).items() if name != "labels"}

    with pytest.raises(ValueError, match="labels"):
        run_of("opdc", llama(0), llama(1), collator=collator)


def test_no_label_is_valid():
    """A micro-batch of prompts only: nothing is learned from it, and nothing becomes NaN."""
    function, student, batch, labels = function_and_batch()
    labels = torch.full_like(labels, IGNORED)
    for number, items in enumerate((None, 7, torch.tensor(7))):
        student.zero_grad()
        outputs = student(**batch)
        with contextlib.ExitStack() as stack:
            if number == 0:  # said once
                stack.enter_context(pytest.warns(UserWarning, match="labels.*-100"))
            loss = function(outputs, labels, num_items_in_batch=items)
        assert loss.item() == 0
        loss.backward()
        gradients = [x.grad for x in student.parameters() if x.grad is not None]
        assert gradients
        assert all((gradient == 0).all() for gradient in gradients)


def test_another_ignore_index():
    student, teacher = llama(0), llama(1)
    batch = padded(rows())
    labels = batch.pop("labels")
    usual = opdc.hf.DistillLoss(opdc.nn.ReverseKLLoss(), student, teacher)
    other = opdc.hf.DistillLoss(opdc.nn.ReverseKLLoss(), student, teacher, ignore_index=-1)
    outputs = student(**batch)
    wanted = usual(outputs, labels)
    outputs = student(**batch)
    assert other(outputs, labels.masked_fill(labels == IGNORED, -1)).item() == wanted.item()


def test_labels_of_another_shape():
    function, student, batch, labels = function_and_batch()
    with pytest.raises(ValueError, match=r"labels.*\(8, 6\)"):
        function(student(**batch), labels[:, :6])


def test_outputs_that_are_a_tuple():
    function, student, batch, labels = function_and_batch()
    with pytest.raises((TypeError, ValueError), match=r"outputs.*tuple.*return_dict"):
        function(student(**batch, return_dict=False), labels)


def test_data_parallel_is_refused():
    """Its replicas share one hook and run at once: which inputs it holds is chance."""
    student, teacher = llama(0), llama(1)
    function = opdc.hf.DistillLoss(opdc.nn.ReverseKLLoss(), student, teacher)
    batch = padded(rows())
    batch.pop("labels")
    replica = student._replicate_for_data_parallel()
    with pytest.raises(ValueError, match="DataParallel"):
        replica(**batch)
    function.remove()


def test_outputs_without_a_forward_before():
    """Of another model, or from before."""
    function, _, batch, labels = function_and_batch()
    outputs = llama(2)(**batch)
    with pytest.raises((RuntimeError, ValueError), match=r"forward|model"):
        function(outputs, labels)


def test_arguments_of_the_constructor():
    student, teacher = llama(0), llama(1)
    with pytest.raises(TypeError, match="loss"):
        opdc.hf.DistillLoss("reverse_kl", student, teacher)
    with pytest.raises(TypeError, match=r"loss.*ReverseKLLoss"):
        opdc.hf.DistillLoss(opdc.nn.ReverseKLLoss, student, teacher)  # the class
    for loss in (opdc.nn.ReverseKLLoss(reduction="seq_mean"), opdc.nn.REOPOLDLoss()):
        with pytest.raises(ValueError, match=r"loss.*denominator.*mean"):
            opdc.hf.DistillLoss(loss, student, teacher)
    with pytest.raises(TypeError, match="model"):
        opdc.hf.DistillLoss(opdc.nn.ReverseKLLoss(), lambda x: x, teacher)
    with pytest.raises(TypeError, match="teacher_model"):
        opdc.hf.DistillLoss(opdc.nn.ReverseKLLoss(), student, None)
    with pytest.raises(ValueError, match="teacher_model"):
        opdc.hf.DistillLoss(opdc.nn.ReverseKLLoss(), student, student)  # it would be frozen


# ------------------------------------------------------------------- opdc.hf.projection

SHAPE = {
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.4,
    "pad_token_id": None,
}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
GPT2 = {"vocab_size": 29, "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.4}
# Name of the family, configuration, and the scale, softcap and bias that a projection must have.
FAMILIES = {
    "Llama": (SHAPE, 1.0, None, False),
    "Qwen2": (SHAPE | {"tie_word_embeddings": True}, 1.0, None, False),
    "Gemma2": (SHAPE | {"head_dim": 8, "final_logit_softcapping": 1.5}, 1.0, 1.5, False),
    "Cohere": (SHAPE | {"logit_scale": 0.3}, 0.3, None, False),
    "Granite": (SHAPE | {"logits_scaling": 3.0}, 1 / 3, None, False),
    "HyperCLOVAX": (SHAPE | {"logits_scaling": 3.0}, 3.0, None, False),
    "FalconH1": (SHAPE | MAMBA | {"lm_head_multiplier": 0.3, "head_dim": 8}, 0.3, None, False),
    "GPT2": (GPT2, 1.0, None, False),
    "Phi": (SHAPE, 1.0, None, True),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """A model in float64, and what its projection must say."""
    name = request.param
    config, *wanted = FAMILIES[name]
    ending = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    if not hasattr(transformers, f"{name}{ending}"):
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}{ending}")(
        getattr(transformers, f"{name}Config")(**config)
    )
    if model.get_output_embeddings().bias is not None:
        nn.init.normal_(model.get_output_embeddings().bias)
    return model.double().eval(), *wanted


IDS = torch.tensor([[5, 9, 11, 4, 3], [8, 6, 28, 1, 2]])


def logits_of(projection: opdc.Projection) -> Tensor:
    """As the documentation of `Projection` says."""
    logits = projection.hidden @ projection.weight.T
    logits = projection.scale * (logits if projection.bias is None else logits + projection.bias)
    if projection.softcap is None:
        return logits
    return projection.softcap * torch.tanh(logits / projection.softcap)


def test_projection_makes_the_models_logits(family):
    model, scale, softcap, has_bias = family
    hidden = model.base_model(IDS).last_hidden_state
    projection = opdc.hf.projection(model, hidden)
    assert isinstance(projection, opdc.Projection)
    assert projection.hidden is hidden
    assert projection.weight is model.get_output_embeddings().weight
    assert projection.scale == pytest.approx(scale)
    assert projection.softcap == softcap
    assert (projection.bias is not None) == has_bias
    logits = model(IDS).logits
    torch.testing.assert_close(logits_of(projection), logits, rtol=1e-12, atol=1e-12)
    if softcap is not None:
        assert logits.abs().max() > 0.8 * softcap, "the cap changes nothing here"
    # And so does the core: the divergence of a model from itself is none.
    assert opdc.reverse_kl(projection, logits.detach()).item() < 1e-20


@pytest.mark.parametrize("loss", [opdc.nn.JSDLoss(), opdc.nn.K1Loss()], ids=["jsd", "k1"])
def test_a_training_step_from_projections_is_that_from_logits(family, loss):
    model, *_ = family
    teacher = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(4)
    for parameter in teacher.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data.add_(0.2 * noise)
    arguments = {"tokens": IDS.roll(-1, 1), "mask": torch.arange(5).expand(2, 5) < 4}
    with torch.no_grad():
        behind = teacher.base_model(IDS).last_hidden_state
        logits = teacher(IDS).logits
    steps = []
    for student, target in (
        (lambda x: x(IDS).logits, logits),
        (
            lambda x: opdc.hf.projection(x, x.base_model(IDS).last_hidden_state),
            opdc.hf.projection(teacher, behind),
        ),
    ):
        trained = copy.deepcopy(model)
        optimizer = torch.optim.SGD(trained.parameters(), 0.5)
        value = loss(student(trained), target, **arguments)
        value.backward()
        optimizer.step()
        steps.append((value.detach(), trained))
    assert all(parameter.grad is None for parameter in teacher.parameters())
    torch.testing.assert_close(steps[0][0], steps[1][0], rtol=1e-11, atol=1e-13)
    for got, wanted in zip(*(x.parameters() for _, x in reversed(steps)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)
    before = model.get_output_embeddings().weight
    assert not torch.equal(steps[1][1].get_output_embeddings().weight, before)


def test_projection_of_an_adapted_head_is_refused():
    """Half of the head would be missing."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        llama(0), peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    )
    with pytest.raises(ValueError, match=r"(?s)head.*modules_to_save"):
        opdc.hf.projection(model, torch.zeros(1, 2, 16))


def test_projection_of_a_head_that_is_trained_as_a_whole():
    """PEFT keeps a copy of it; the copy is what counts."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(llama(0), config).double()
    copied = [x for name, x in model.named_parameters() if "modules_to_save" in name]
    assert len(copied) == 1
    copied[0].data.mul_(1.5)
    hidden = model.get_base_model().model(IDS).last_hidden_state
    projection = opdc.hf.projection(model, hidden)
    assert projection.weight is copied[0]
    torch.testing.assert_close(logits_of(projection), model(IDS).logits, rtol=1e-12, atol=1e-12)
    # PEFT's wrapper taken off, as trainers do.
    assert opdc.hf.projection(model.get_base_model(), hidden).weight is copied[0]


def test_projection_without_a_head():
    model = llama(0)
    with pytest.raises(ValueError, match=r"LlamaModel.*(head|output embeddings)"):
        opdc.hf.projection(model.model, torch.zeros(1, 2, 16))
    with pytest.raises((TypeError, ValueError), match="Linear"):
        opdc.hf.projection(nn.Linear(2, 2), torch.zeros(1, 2))


def test_names_are_public():
    assert {"DistillLoss", "projection"} <= set(opdc.hf.__all__)
