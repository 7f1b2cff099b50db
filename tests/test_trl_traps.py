"""What is easy to get wrong in the trainers of TRL, what opdc does in face of each, and how it
knows the hook that it stands in.

1. A callable for `custom_generate` is told no mask that is all ones, nothing that it does not name.
2. `generate` samples from the 50 best ids unless it is told otherwise.
3. Gradient checkpointing drops the cache in silence.
4. Processors run before the warpers, and on some devices once more than there are tokens.
5. TRL projects masked positions too, where they are NaN so is the gradient of the head: see
   `test_masked_positions_are_never_read` and `test_chunked_divergence_never_reads_masked_rows`.
6. Rollouts run in train mode, with dropout; bf16 and checkpointing are on by default.
7. `entropy` in the log is a mean of means.
8. A sampler's temperature may not be the loss's.
9. A LoRA of the head is not in its weight: TRL's constructors refuse it, and so does
   `opdc.hf.projection` (`test_projection_of_an_adapted_head_is_refused`).
10. `num_items_in_batch` is there in evaluation too.
11. Rollouts are of the weights of the step that learns from them, however it is accumulated.
12. Rotary models forgive wrong positions, and TRL's own forward takes those of the padding.
13. A trainer that is built sends telemetry.
"""

from __future__ import annotations

import inspect
import os
import socket
import threading
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

import trainers as build  # isort: skip  first, because it sets what keeps TRL off the network
import trl
import trl.trainer.distillation_trainer as of_trl
from trl import DistillationConfig, DistillationTrainer

import opdc
import opdc.hf
import opdc.trl
from trainers import assert_same, frozen, gpt2, llama, train

__all__ = ["frozen"]  # a fixture

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings('ignore:.*normalizer="local"'),
    pytest.mark.filterwarnings('ignore:.*advantage="old"'),
    # GPT-2 is here because it shows wrong positions; see trap 12.
    pytest.mark.filterwarnings("ignore:rollout. GPT2LMHeadModel has learned positions"),
]


class Recorder:
    """A loss that notes what it was given."""

    def __init__(self, loss: Any = None) -> None:
        self.loss = opdc.nn.K1Loss() if loss is None else loss
        self.calls: list[dict[str, Any]] = []

    def __call__(self, student: Any, teacher: Any, **arguments: Any) -> Any:
        temperature = 1.0 if arguments["temperature"] is None else arguments["temperature"]
        own = opdc.token_logprobs(student, arguments["tokens"], temperature=temperature)
        self.calls.append({**arguments, "own": own.detach(), "grad": torch.is_grad_enabled()})
        return self.loss(student, teacher, **arguments)


def sampled(trainer: Any, budget: float = 0.0, **keywords: Any) -> list[dict[str, Any]]:
    """What reached the loss in a run with a sampler; without a budget it is the student's own."""
    loss = Recorder()
    sampler = opdc.hf.BlendSampler(None, budget)
    train(opdc.trl.attach(trainer, loss, rollout=sampler, **keywords))
    assert loss.calls
    return loss.calls


def on_policy(calls: list[dict[str, Any]]) -> float:
    """How far the sampler's log-probs are from those that the loss sees, at most."""
    return max(
        float((call["old_logprobs"] - call["own"])[call["mask"] != 0].abs().max()) for call in calls
    )


# ------------------------------------------------------------------------------ the traps


@pytest.mark.parametrize("family", [llama, gpt2], ids=["llama", "gpt2"])
def test_trap_01_masks_of_ones_do_not_arrive(family):
    questions = [f"w{number} w{number + 1}" for number in range(40, 52, 2)]
    alike = build.Dataset.from_dict({"prompt": [[build.said("user", q)] for q in questions]})
    calls = sampled(build.distillation(family(0), family(1), train_dataset=alike, max_steps=2))
    assert on_policy(calls) < 1e-5


def test_trap_01_what_the_sampler_cannot_read_is_an_error():
    """It names no `token_type_ids`, so it would leave them out."""
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match="token_type_ids"):
        gpt2(0).generate(
            ids,
            token_type_ids=ids,
            max_new_tokens=2,
            custom_generate=opdc.hf.BlendSampler(gpt2(1)),
        )


def test_trap_02_nothing_is_truncated_unless_told():
    """With fewer ids to draw from, the log-probs under the behaviour policy are larger."""
    assert on_policy(sampled(build.distillation(max_steps=1))) < 1e-5
    (call,) = sampled(build.distillation(max_steps=1, top_k=20))
    chosen = call["mask"] != 0
    larger = (call["old_logprobs"] - call["own"])[chosen]
    assert (larger > -1e-5).all()
    assert larger.max() > 1e-2


@pytest.mark.parametrize("name", ["distillation", "gkd"])
def test_trap_03_checkpointing_drops_the_cache(name):
    """The rollouts are the same as without."""
    changes = {"lmbda": 1.0} if name == "gkd" else {}
    make = getattr(build, name)
    calls = [
        sampled(make(gpt2(0), gpt2(1), max_steps=1, gradient_checkpointing=on, **changes), 0.2)
        for on in (False, True)
    ]
    (plain,), (checkpointed,) = calls
    assert torch.equal(plain["tokens"], checkpointed["tokens"])
    chosen = plain["mask"] != 0
    got, wanted = (call["old_logprobs"][chosen] for call in (checkpointed, plain))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_trap_04_processors_may_be_asked_once_more():
    """Behind the last token; that call is undone, and was a law like any other."""
    student, teacher = gpt2(0).eval(), gpt2(1).eval()
    ids = torch.tensor([[5, 6, 7], [8, 9, 4]])
    blend = opdc.hf.BlendLogitsProcessor(teacher, None, 0.3)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 3, "eos_token_id": None}
    sequences = student.generate(ids, logits_processor=[blend], **settings)
    again = opdc.hf.BlendLogitsProcessor(teacher, None, 0.3)
    with torch.no_grad():
        logits = student(sequences).logits[:, -1]
    once_more = blend(sequences, logits)
    torch.testing.assert_close(once_more, again(sequences, logits), rtol=1e-4, atol=1e-5)
    assert once_more.logsumexp(-1).abs().max() < 1e-4


def test_trap_06_dropout_makes_another_policy():
    """The ratio to the rollout is not 1 then, which the log shows; without dropout it is."""

    def run(**changes: Any) -> float:
        student = llama(0)
        student.model.norm = torch.nn.Sequential(student.model.norm, torch.nn.Dropout(0.3))
        return on_policy(sampled(build.distillation(student, max_steps=1, **changes)))

    assert run() > 1e-2
    assert run(disable_dropout=True) < 1e-5


def test_trap_06_the_defaults_of_trl():
    """Checkpointing, bf16 that the training forward leaves out, the reverse KL."""
    defaults = DistillationConfig(output_dir=str(build.folder()), use_cpu=True, report_to="none")
    names = ("gradient_checkpointing", "bf16", "beta", "disable_dropout", "temperature")
    changes = {name: getattr(defaults, name) for name in names}
    assert changes["gradient_checkpointing"]
    assert changes["beta"] == 1.0
    ours = opdc.trl.attach(build.distillation(**changes, max_steps=2), opdc.nn.ReverseKLLoss())
    assert_same(train(ours), train(build.distillation(**changes, max_steps=2)))


def test_trap_07_entropy_is_trls_own():
    """As it logs it without opdc, where the loss has read whole rows; else there is none."""
    make = lambda: build.distillation(max_steps=1, gradient_accumulation_steps=2)  # noqa: E731
    theirs = train(make()).logs[0]
    ours = train(opdc.trl.attach(make(), opdc.nn.JSDLoss(beta=0.5))).logs[0]
    assert ours["entropy"] == pytest.approx(theirs["entropy"], rel=1e-5)
    if "opdc/student_entropy" in ours:
        assert ours["opdc/student_entropy"] == pytest.approx(theirs["entropy"], rel=1e-5)

    def plain(student, teacher, *, mask, num_items, **_):
        return opdc.reverse_kl(student, teacher, mask=mask, num_items=num_items)

    log = train(opdc.trl.attach(make(), plain)).logs[0]
    assert log.get("entropy") is None
    assert not [name for name in log if name.startswith("opdc/")]


def test_trap_08_a_sampler_of_another_temperature():
    sampler = opdc.hf.BlendSampler(None, 0.1)
    with pytest.raises(ValueError, match=r"0\.9.*temperature=1\.0"):
        opdc.trl.attach(build.gkd(temperature=0.9), opdc.nn.K1Loss(), rollout=sampler)
    with pytest.raises(ValueError, match=r"loss.*temperature.*2\.0.*0\.7"):
        opdc.trl.attach(
            build.distillation(temperature=0.7), opdc.nn.K1Loss(temperature=2.0), rollout=sampler
        )
    # Sampled and trained at the same one: on policy.
    assert on_policy(sampled(build.distillation(temperature=0.7, max_steps=1))) < 1e-5
    same = opdc.nn.K1Loss(temperature=0.7)
    opdc.trl.attach(build.distillation(temperature=0.7), same, rollout=sampler)


def test_trap_08_gkd_computes_its_loss_at_1():
    """Whatever temperature it samples at, and unless the loss says otherwise."""
    loss = Recorder()
    train(opdc.trl.attach(build.gkd(temperature=0.9, lmbda=1.0, max_steps=1), loss))
    assert loss.calls[0]["temperature"] in (None, 1.0)
    assert loss.calls[0]["old_logprobs"] is None


def test_trap_09_a_head_that_is_trained_as_a_whole():
    """PEFT keeps a copy of it, and that is the one that is projected and trained."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    runs = [
        train(
            opdc.trl.attach(
                build.distillation(peft_config=config, max_steps=1), opdc.nn.K1Loss(), path=path
            )
        )
        for path in ("hidden", "logits")
    ]
    assert_same(*runs)
    heads = [name for name in runs[0].gradients[0] if "lm_head" in name]
    assert len(heads) == 1
    assert runs[0].gradients[0][heads[0]].any()


@pytest.mark.parametrize("path", ["hidden", "logits"])
def test_trap_10_items_are_for_training(path):
    loss = Recorder(opdc.nn.ReverseKLLoss())
    trainer = build.distillation(
        eval_dataset=build.prompts(),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
    )
    opdc.trl.attach(trainer, loss, path=path)
    train(trainer)
    for first, second in zip(loss.calls[::2], loss.calls[1::2], strict=True):
        total = sum(int((call["mask"] != 0).sum()) for call in (first, second))
        assert float(first["num_items"]) == float(second["num_items"]) == total
        assert first["grad"]
    loss.calls.clear()
    logs = trainer.evaluate()
    assert loss.calls
    assert all(call["num_items"] is None for call in loss.calls)
    assert not any(call["grad"] for call in loss.calls)
    assert logs["eval_loss"] > 0


def test_trap_12_positions_of_padded_prompts():
    """Rows that stand in a padded batch, a cache behind them, against rows alone without one. What
    TRL makes of such rows when it learns from them is another model, which is said."""
    trainer = build.distillation(gpt2(0), gpt2(1), max_steps=1)
    with pytest.warns(UserWarning, match=r"rollout.*GPT2LMHeadModel.*positions"):
        opdc.trl.attach(trainer, opdc.nn.K1Loss(), rollout=opdc.hf.BlendSampler(None, 0.0))
    student = trainer.model.train()  # without dropout; evaluation has no behaviour policy
    batch = trainer._generate_and_score_completions(list(build.prompts()))
    assert (batch["prompt_mask"] == 0).any()
    for number in range(len(batch["prompt_ids"])):
        prompt, reply = (
            batch[f"{part}_ids"][number][batch[f"{part}_mask"][number] != 0]
            for part in ("prompt", "completion")
        )
        with torch.no_grad():
            logits = student(torch.cat([prompt, reply])[None]).logits[0, len(prompt) - 1 : -1]
        wanted = opdc.token_logprobs(logits, reply)
        got = batch["opdc_old_logprobs"][number][: len(reply)]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_trap_11_rollouts_are_of_the_current_weights(accumulation):
    """Three steps that move the weights, shuffled."""
    changes = {
        "per_device_train_batch_size": 4 // accumulation,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 0.5,
    }
    calls = sampled(build.distillation(**changes))
    assert len(calls) == 3 * accumulation
    assert on_policy(calls) < 1e-5
    first, last = calls[0], calls[-1]
    assert first["own"].shape != last["own"].shape or not torch.equal(first["own"], last["own"])


def test_trap_13_no_telemetry(monkeypatch):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert os.environ["CI"] == "true"
    asked = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        asked.append(arguments)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    trainer = opdc.trl.attach(build.distillation(max_steps=1), opdc.nn.ReverseKLLoss())
    train(trainer)
    assert not asked
    # Nor does TRL see opdc when it saves or reports: the class is its own.
    assert type(trainer) is DistillationTrainer


# ----------------------------------------------------------- the hook, in other versions of TRL

ORIGINAL = inspect.signature(of_trl._chunked_divergence_loss)
# All but the divergence itself, which is opdc's business.
READ = [name for name in ORIGINAL.parameters if name != "beta"]


def another_trl(
    monkeypatch: pytest.MonkeyPatch, order: list[str], names: dict[str, str] | None = None
) -> None:
    """A TRL whose function has its parameters in another order, or under other names."""
    own = of_trl._chunked_divergence_loss
    names = names or {}

    def changed(*arguments: Any, **keywords: Any) -> Any:
        given = changed.__signature__.bind(*arguments, **keywords).arguments
        return own(**{back.get(name, name): value for name, value in given.items()})

    back = {new: old for old, new in names.items()}
    changed.__signature__ = inspect.Signature(
        [
            ORIGINAL.parameters[name].replace(
                name=names.get(name, name),
                # Those that have defaults come last.
                **({} if order == [*ORIGINAL.parameters] else {"default": inspect.Parameter.empty}),
            )
            for name in order
        ]
    )
    compute = DistillationTrainer._compute_loss

    def calling(self, unwrapped_student, inputs, num_items_in_batch):
        installed = of_trl._chunked_divergence_loss  # opdc's, while it has replaced it

        def bridge(*arguments: Any, **keywords: Any) -> Any:
            given = ORIGINAL.bind(*arguments, **keywords)
            given.apply_defaults()
            return installed(*(given.arguments[name] for name in order))

        of_trl._chunked_divergence_loss = bridge
        try:
            return compute(self, unwrapped_student, inputs, num_items_in_batch)
        finally:
            of_trl._chunked_divergence_loss = installed

    monkeypatch.setattr(of_trl, "_chunked_divergence_loss", changed)
    monkeypatch.setattr(DistillationTrainer, "_compute_loss", calling)


def untrained(*, complete: bool = False) -> DistillationTrainer:
    """`complete`: no parameter has its default value, as far as TRL's function is concerned."""
    models = llama(0), llama(1, width=24)
    if complete:
        for number, model in enumerate(models):
            model.config.logit_scale = (0.5, 0.7)[number]
            model.config.final_logit_softcapping = (2.0, 3.0)[number]
            head = torch.nn.Linear(*reversed(model.lm_head.weight.shape))
            head.weight.data = 2 * model.lm_head.weight.data
            torch.nn.init.normal_(head.bias, generator=torch.Generator().manual_seed(number))
            model.lm_head = head
    return build.distillation(*models, temperature=0.7, max_steps=1, gradient_accumulation_steps=2)


def distilled(path: str, **keywords: Any) -> build.Run:
    """One step."""
    return train(opdc.trl.attach(untrained(**keywords), opdc.nn.JSDLoss(beta=0.5), path=path))


@pytest.fixture(scope="module")
def reference() -> build.Run:
    """Of TRL's own loss."""
    return train(untrained())


@pytest.mark.parametrize("order", ["reversed", "sorted"])
def test_parameters_in_another_order(monkeypatch, reference, order):
    """TRL hands them over by position; opdc takes them by the names that the function has."""
    another_trl(
        monkeypatch,
        list(reversed([*READ, "beta"])) if order == "reversed" else sorted(ORIGINAL.parameters),
    )
    whole = train(untrained(complete=True))
    assert whole.losses[0] != pytest.approx(reference.losses[0], rel=1e-2)
    assert_same(distilled("hidden", complete=True), whole)


@pytest.mark.parametrize("name", READ)
def test_parameters_of_another_name(monkeypatch, name):
    """None is left out in silence: whether opdc cannot do without it or would take its default."""
    another_trl(monkeypatch, [*ORIGINAL.parameters], {name: f"new_{name}"})
    changed = of_trl._chunked_divergence_loss
    with pytest.raises(RuntimeError, match=f"{name}"):
        distilled("hidden", complete=True)
    assert of_trl._chunked_divergence_loss is changed


def test_fallback_to_logits(monkeypatch, reference):
    """One warning, at `attach`, and the same numbers."""
    another_trl(monkeypatch, [*ORIGINAL.parameters], {"student_hidden_states": "student_states"})
    trainer = untrained()
    with pytest.warns(UserWarning, match=r"student_hidden_states.*logits") as said:
        opdc.trl.attach(trainer, opdc.nn.JSDLoss(beta=0.5))
    assert len(said) == 1
    assert_same(train(trainer), reference)
    assert opdc.trl.support()["DistillationTrainer"].startswith("logits")


def test_a_parameter_more_that_opdc_does_not_know(monkeypatch):
    """With a value that is not its default it may be anything."""
    own, compute = of_trl._chunked_divergence_loss, DistillationTrainer._compute_loss

    def changed(*arguments, teacher_bias_scale=1.0, **keywords):
        return own(*arguments, **keywords)

    changed.__signature__ = inspect.Signature(
        [
            *ORIGINAL.parameters.values(),
            inspect.Parameter("teacher_bias_scale", inspect.Parameter.KEYWORD_ONLY, default=1.0),
        ]
    )

    def calling(self, unwrapped_student, inputs, num_items_in_batch):
        installed = of_trl._chunked_divergence_loss
        of_trl._chunked_divergence_loss = lambda *arguments, **keywords: installed(
            *arguments, **keywords, teacher_bias_scale=2.0
        )
        try:
            return compute(self, unwrapped_student, inputs, num_items_in_batch)
        finally:
            of_trl._chunked_divergence_loss = installed

    monkeypatch.setattr(of_trl, "_chunked_divergence_loss", changed)
    monkeypatch.setattr(DistillationTrainer, "_compute_loss", calling)
    with pytest.raises(RuntimeError, match="teacher_bias_scale"):
        distilled("hidden")


def new_method(self, model, batch, items):
    raise AssertionError("not to be called")


@pytest.mark.parametrize("what", ["no function", "no method", "another method"])
def test_hooks_that_are_gone(monkeypatch, reference, what):
    if what == "no function":
        monkeypatch.delattr(of_trl, "_chunked_divergence_loss")
    elif what == "no method":
        monkeypatch.delattr(DistillationTrainer, "_compute_loss")
    else:
        monkeypatch.setattr(DistillationTrainer, "_compute_loss", new_method)
    missing = "_chunked_divergence_loss" if what == "no function" else "_compute_loss"
    with pytest.raises(RuntimeError, match=f"(?s)hidden.*{trl.__version__}.*{missing}"):
        distilled("hidden")
    trainer = untrained()
    with pytest.warns(UserWarning, match=missing):
        opdc.trl.attach(trainer, opdc.nn.JSDLoss(beta=0.5))
    assert_same(train(trainer), reference)
    # Asked for, so there is nothing to warn of.
    opdc.trl.attach(untrained(), opdc.nn.JSDLoss(), path="logits")


def test_a_batch_that_lacks_a_key(monkeypatch):
    """The error lists what came."""
    generate = DistillationTrainer._generate_and_score_completions

    def renamed(self, inputs):
        batch = generate(self, inputs)
        batch["response_ids"] = batch.pop("completion_ids")
        return batch

    monkeypatch.setattr(DistillationTrainer, "_generate_and_score_completions", renamed)
    for path in ("hidden", "logits"):
        with pytest.raises(RuntimeError, match=r"(?s)completion_ids.*response_ids"):
            distilled(path)


def test_the_module_is_as_it_was_after_an_exception():
    function = of_trl._chunked_divergence_loss

    class Own(Exception):
        pass

    def failing(student, teacher, **_):
        assert of_trl._chunked_divergence_loss is not function
        raise Own("of the loss")

    trainer = opdc.trl.attach(build.distillation(max_steps=1), failing)
    assert of_trl._chunked_divergence_loss is function, "replaced for good, not for the call"
    with pytest.raises(Own):
        train(trainer)
    assert of_trl._chunked_divergence_loss is function
    opdc.trl.detach(trainer)
    assert_same(train(trainer), train(build.distillation(max_steps=1)))


def test_two_trainers_do_not_meet():
    """One with a loss of opdc, one without, in turns: each has its own."""
    attached = opdc.trl.attach(
        build.distillation(eval_dataset=build.prompts()), opdc.nn.ForwardKLLoss()
    )
    plain = build.distillation(eval_dataset=build.prompts(), beta=1.0)
    losses = {}
    for _ in range(2):
        for name, trainer in (("forward", attached), ("reverse", plain)):
            torch.manual_seed(5)
            losses.setdefault(name, []).append(trainer.evaluate()["eval_loss"])
    assert losses["forward"][0] == losses["forward"][1]
    assert losses["reverse"][0] == losses["reverse"][1]
    assert losses["forward"][0] != pytest.approx(losses["reverse"][0], rel=1e-3)


def test_another_thread_has_trls_own():
    """While this one is inside of its loss."""
    generator = torch.Generator().manual_seed(2)
    hidden, other = torch.randn(2, 2, 3, 4, generator=generator).unbind()
    head, mask = torch.randn(7, 4, generator=generator), torch.ones(2, 3)
    ask = lambda: of_trl._chunked_divergence_loss(hidden, other, head, head, mask, 1.0)  # noqa: E731
    wanted, answers = ask(), []

    def loss(student, teacher, *, mask, num_items, **_):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: answers.append(ask()))
            thread.start()
            thread.join(30)
        return opdc.reverse_kl(student, teacher, mask=mask, num_items=num_items)

    train(opdc.trl.attach(build.distillation(max_steps=1), loss))
    assert len(answers) == 1
    torch.testing.assert_close(answers[0], wanted, rtol=0, atol=0)


# --------------------------------------------------------------------- no step without a call


class WithALossOfItsOwn(DistillationTrainer):
    """Overrides the method that calls the hook."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        return model(ids).logits.square().mean()


def test_no_step_without_a_call(monkeypatch):
    monkeypatch.setattr(build, "DistillationTrainer", WithALossOfItsOwn)
    trainer = opdc.trl.attach(build.distillation(), opdc.nn.ReverseKLLoss())
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    with pytest.raises(RuntimeError, match=r"WithALossOfItsOwn.*without calling opdc's loss"):
        train(trainer)
    assert trainer.state.global_step == 0
    for parameter, old in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


def test_the_defaults_of_iw_opd_never_call_it():
    trainer = build.iw_opd(distillation_objective="iw_opd", loss_top_k=1)
    with pytest.raises(ValueError, match=r"distillation_objective.*iw_opd.*jsd"):
        opdc.trl.attach(trainer, opdc.nn.ReverseKLLoss())
    assert "generalized_jsd_loss" not in vars(trainer)


class WithAttach(DistillationTrainer):
    """As a subclass does it for itself."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        opdc.trl.attach(self, opdc.nn.JSDLoss(beta=0.5))


def test_subclasses_attach_themselves(monkeypatch, reference):
    monkeypatch.setattr(build, "DistillationTrainer", WithAttach)
    run = train(untrained())
    assert_same(run, reference)
    assert any(name.startswith("opdc/") for name in run.logs[0])
