"""TRL's trainers with `opdc.trl.attach`: real runs of a few steps, next to TRL's own loss wherever
it has the same one."""

from __future__ import annotations

import functools
import os
import warnings
from unittest import mock

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("peft")

# First, because it sets what keeps TRL off the network.
import trainers as build  # isort: skip
from accelerate.state import AcceleratorState, PartialState
from peft import LoraConfig

import opdc.hf
import opdc.trl
import oracle_sampling as oracle
from processes import on_ranks
from trainers import (
    RESPONSE,
    VOCABULARY,
    assert_same,
    distance,
    frozen,
    gpt2,
    llama,
    prompts,
    qwen2,
    train,
)

__all__ = ["frozen"]  # a fixture

# opdc's own hints, of which others are the tests.
pytestmark = [
    pytest.mark.filterwarnings('ignore:.*normalizer="local"'),
    pytest.mark.filterwarnings('ignore:.*advantage="old"'),
]

JSD = opdc.nn.JSDLoss(beta=0.5)


def divergence(beta, **keywords):
    """The loss that TRL means by its `beta`."""
    if beta == 0:
        return opdc.nn.ForwardKLLoss(**keywords)
    return (
        opdc.nn.ReverseKLLoss(**keywords) if beta == 1 else opdc.nn.JSDLoss(beta=beta, **keywords)
    )


def attached(trainer, loss=JSD, **keywords):
    assert opdc.trl.attach(trainer, loss, **keywords) is trainer
    return trainer


def greedy(trainer):
    """Responses depend on the prompts alone, in however many batches these come."""
    trainer.generation_config.do_sample = False
    for name in ("temperature", "top_p", "top_k"):
        setattr(trainer.generation_config, name, None)
    return trainer


# ------------------------------------------------------------------------ parity with TRL's loss

DISTILLATION = {
    "llama": {"temperature": 0.7, "gradient_accumulation_steps": 2},
    "qwen2": {"per_device_train_batch_size": 2, "pad_to_multiple_of": 8},
    "gpt2": {"temperature": 1.5, "max_completion_length": 5},
}
PAIRS = {
    "llama": lambda: (llama(0), llama(1, width=24)),
    "qwen2": lambda: (qwen2(0), llama(1, width=24)),
    "gpt2": lambda: (gpt2(0), gpt2(1)),
}


def distillation(name, beta):
    return build.distillation(*PAIRS[name](), beta=beta, **DISTILLATION[name])


@functools.cache
def distillation_of_trl(name, beta):
    return train(distillation(name, beta))


@pytest.mark.parametrize("path", ["hidden", "logits"])
@pytest.mark.parametrize("beta, name", [(0.0, "qwen2"), (0.5, "llama"), (1.0, "gpt2")])
def test_distillation_is_trls(name, beta, path):
    ours = train(attached(distillation(name, beta), divergence(beta), path=path))
    theirs = distillation_of_trl(name, beta)
    assert_same(ours, theirs)
    if path == "hidden":
        for mine, their in zip(ours.logs[:3], theirs.logs[:3], strict=True):
            assert mine["entropy"] == pytest.approx(their["entropy"], rel=1e-5)


OTHERS = {
    "gkd": lambda beta: build.gkd(lmbda=0.5, seed=3, beta=beta),
    "gkd on policy": lambda beta: build.gkd(
        lmbda=1.0, beta=beta, gradient_accumulation_steps=2, per_device_train_batch_size=2
    ),
    "gold": lambda beta: build.gold(lmbda=0.5, beta=beta, gradient_accumulation_steps=2),
    "iw-opd": lambda beta: build.iw_opd(lmbda=0.5, beta=beta, gradient_accumulation_steps=2),
    "sdft": lambda beta: build.sdft(distillation_alpha=beta, gradient_accumulation_steps=2),
    "sdpo": lambda beta: build.sdpo(distillation_alpha=beta),
}


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", OTHERS)
def test_other_trainers_are_trls(name, beta):
    """Also where TRL's denominator is wrong: `normalizer="trl"` is its number."""
    keywords = {"reduction": "seq_mean"} if name in ("sdft", "sdpo") else {}
    ours = train(attached(OTHERS[name](beta), divergence(beta, **keywords)))
    assert_same(ours, train(OTHERS[name](beta)))


REMOTE = {"server": {"temperature": 0.8}, "asynchronous": {"teacher_temperature": 1.0}}


@pytest.mark.parametrize("name", REMOTE)
def test_remote_teachers_are_trls(name):
    """The forward KL on the teacher's best ids, all others counting as one."""
    make = functools.partial(
        getattr(build, name), gradient_accumulation_steps=2, beta=0.0, **REMOTE[name]
    )
    ours = train(attached(make(), opdc.nn.ForwardKLLoss(normalize="tail")))
    assert_same(ours, train(make()), loss=2e-5)


def test_a_server_scores_the_sampled_tokens_as_the_teacher_would():
    """Responses and loss are those of the trainer that has the same teacher in its process."""
    near = build.distillation(temperature=0.8)
    far = build.server(temperature=0.8)
    runs = [train(attached(trainer, opdc.nn.K1Loss())) for trainer in (far, near)]
    assert_same(*runs)


def test_packed_rows_score_the_sampled_tokens_as_the_teacher_would():
    trainer = build.asynchronous(max_steps=1)
    worker = build.Worker(top_k=8)
    worker.start()
    ratios = []
    for _ in range(4):
        sample = worker.rollout_buffer.get()
        ids = torch.tensor(sample.input_ids)
        laws = [
            build.scores(model, ids.tolist(), 1.0)[:-1] for model in (trainer.model, worker.teacher)
        ]
        p, q = (law.gather(-1, ids[1:, None])[:, 0] for law in laws)
        ratios.append((p - q)[torch.tensor(sample.completion_mask[1:]) != 0])
    run = train(attached(trainer, opdc.nn.K1Loss()))
    assert run.losses[0] == pytest.approx(torch.cat(ratios).mean().item(), rel=1e-5)


def test_supervised_fine_tuning_with_a_teacher_is_the_hand_written_loss():
    def by_hand(trainer):
        teacher = llama(1, width=24).eval()

        def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            with torch.no_grad():
                q = teacher(**inputs).logits[:, :-1].log_softmax(-1)
            p = model(**inputs).logits[:, :-1].log_softmax(-1)
            divergences = (q.exp() * (q - p)).sum(-1)
            return divergences[labels[:, 1:] != -100].sum() / num_items_in_batch

        trainer.compute_loss = compute_loss
        return trainer

    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    ours = attached(
        build.sft(**settings), opdc.nn.ForwardKLLoss(), teacher_model=llama(1, width=24)
    )
    assert_same(train(ours), train(by_hand(build.sft(**settings))))


def test_supervised_fine_tuning_without_padding_is_that_with_it():
    """The rows are one row then, and `position_ids` begin anew in it, for the teacher too."""
    runs = []
    for padding_free in (False, True):
        trainer = build.sft(max_steps=2, max_length=None, padding_free=padding_free)
        runs.append(train(attached(trainer, teacher_model=llama(1, width=24))))
    assert_same(*runs)


# ---------------------------------------------------------------- accumulation and two processes

SPLITS = [(4, 1), (2, 2), (1, 4)]


def in_float64(path="hidden", loss=JSD, **split):
    """The shapes of matrix products change with the split, and with them float32's last digits."""
    trainer = build.distillation(
        llama(0).double(), llama(1, width=24).double(), max_steps=1, temperature=0.8, **split
    )
    return attached(greedy(trainer), loss, path=path)


def of_equal_lengths(name, loss=JSD, **keywords):
    """With a denominator of each micro-batch: a mean of means is the mean then."""

    def make(**split):
        student = llama(0).double()
        student.generation_config.eos_token_id = None
        models = {"student": student}
        if name != "server":
            models |= {"teacher": llama(1, width=24).double(), "lmbda": 1.0}
        return attached(
            greedy(getattr(build, name)(**models, max_steps=1, **split)), loss, **keywords
        )

    return make


def supervised(**split):
    trainer = build.sft(llama(0).double(), max_steps=1, **split)
    return attached(trainer, teacher_model=llama(1, width=24).double())


REPAIRED = ["gkd", "gold", "iw_opd"]
INVARIANT = {
    "hidden": in_float64,
    "logits": functools.partial(in_float64, path="logits"),
    "sequences": functools.partial(
        in_float64, loss=opdc.nn.JSDLoss(beta=0.5, reduction="seq_mean")
    ),
    **{name: of_equal_lengths(name, normalizer="local") for name in REPAIRED},
    "server": of_equal_lengths("server", opdc.nn.ForwardKLLoss(normalize="tail")),
    "sft": supervised,
}


@functools.cache
def in_one_process(name, batch=4, accumulation=1):
    make = INVARIANT[name]
    return train(make(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation))


@pytest.mark.parametrize("name", INVARIANT)
def test_accumulation_does_not_change_the_gradient(name):
    whole = in_one_process(name)
    if name in ("hidden", "logits", "sequences"):
        assert whole.logs[0]["completions/min_length"] < whole.logs[0]["completions/max_length"]
    for split in SPLITS[1:]:
        run = in_one_process(name, *split)
        assert run.losses[0] == pytest.approx(whole.losses[0], rel=1e-6)
        assert distance(run.gradients[0], whole.gradients[0]) <= 1e-6


def test_two_processes_give_the_gradient_of_one():
    on_ranks(2, in_this_process_of_two, [])  # imports TRL, which takes long enough for one call
    everywhere = on_ranks(2, in_this_process_of_two, list(INVARIANT))
    for name in INVARIANT:
        whole = in_one_process(name)
        for runs in everywhere:
            run = runs[name]
            assert run.losses[0] == pytest.approx(whole.losses[0], rel=1e-6), name
            assert distance(run.gradients[0], whole.gradients[0]) <= 1e-6, name
            measured = {key: x for key, x in whole.logs[0].items() if key.startswith("opdc/")}
            assert measured
            for key, value in measured.items():
                assert run.logs[0][key] == pytest.approx(value, rel=1e-5, abs=1e-9), (name, key)


def in_this_process_of_two(group, names):
    """As started by `accelerate launch`, with the group as the whole world."""
    rank = torch.distributed.get_rank(group)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    environment = {name: str(value) for name, value in ranks.items()}
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1"}
    world = torch.distributed.group.WORLD
    torch.distributed.group.WORLD = group
    try:
        with mock.patch.dict(os.environ, environment):
            runs = {
                name: train(
                    INVARIANT[name](per_device_train_batch_size=2, gradient_accumulation_steps=1)
                )
                for name in names
            }
            if names:
                blended_rollouts_reach_the_loss(build.distillation(max_steps=2), budget=0.3)
            return runs
    finally:
        torch.distributed.group.WORLD = world
        AcceleratorState._reset_state()
        PartialState._reset_state()


@pytest.mark.parametrize("name", REPAIRED)
def test_trls_denominators_are_wrong_and_told(name):
    """TRL's loss is not the mean over the tokens, or that of micro-batches; with "local" it is."""
    make = functools.partial(
        getattr(build, name), lmbda=1.0, max_steps=1, gradient_accumulation_steps=2, seed=4
    )
    off = []
    for normalizer in ("trl", "local"):
        loss = Recording(JSD)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            run = train(attached(make(), loss, normalizer=normalizer))
        hints = sum('normalizer="local"' in str(warning.message) for warning in told)
        assert hints == (normalizer == "trl")
        means = [call["value"].item() for call in loss.calls]
        assert len(means) == 2
        off.append(abs(run.losses[0] / (sum(means) / 2) - 1))
    assert off[0] > 0.05 and off[1] < 1e-5


# ------------------------------------------------------------- adapters, dtypes, checkpointing

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
VARIANTS = {
    "lora": lambda: {"peft_config": LoraConfig(**LORA)},
    "lora with a head": lambda: {"peft_config": LoraConfig(**LORA, modules_to_save=["lm_head"])},
    "checkpointing": lambda: {"gradient_checkpointing": True},
    "bf16": lambda: {"bf16": True},
    "loaded in bfloat16": lambda: {
        "student": llama(0).bfloat16(),
        "teacher": llama(1, width=24).bfloat16(),
    },
}


@functools.cache
def variant_of_trl(name):
    return train(build.distillation(max_steps=2, **VARIANTS[name]()))


@pytest.mark.parametrize("path", ["hidden", "logits"])
@pytest.mark.parametrize("name", VARIANTS)
def test_distillation_variants_are_trls(name, path):
    run = train(attached(build.distillation(max_steps=2, **VARIANTS[name]()), path=path))
    theirs = variant_of_trl(name)
    if name == "bf16" and path == "logits":
        # TRL's forward, and the hidden path with it, is in float32 all the same: this one is not.
        assert run.losses == pytest.approx(theirs.losses, rel=2e-2)
        assert run.losses[0] != theirs.losses[0]
    elif name == "loaded in bfloat16":
        assert run.losses == pytest.approx(theirs.losses, rel=2e-3)
        assert run.norms == pytest.approx(theirs.norms, rel=2e-2)
    else:
        assert_same(run, theirs)
    if name == "lora with a head":
        assert any("lm_head" in parameter for parameter in run.gradients[0])


def test_autocast_makes_the_hidden_path_a_bf16_run():
    make = functools.partial(build.distillation, max_steps=1, bf16=True)
    hidden, logits = attached(make(), autocast=True), attached(make(), path="logits")
    assert train(hidden).losses == pytest.approx(train(logits).losses, rel=2e-3)
    assert train(attached(make())).losses[0] != train(attached(make(), autocast=True)).losses[0]


def test_gkd_trains_an_adapter_with_checkpointing():
    settings = {"peft_config": LoraConfig(**LORA), "gradient_checkpointing": True, "max_steps": 2}
    ours = train(attached(build.gkd(lmbda=1.0, **settings)))
    assert_same(ours, train(build.gkd(lmbda=1.0, **settings)))


# ----------------------------------------------------------------- losses that TRL does not have


@pytest.mark.parametrize(
    "loss", [opdc.nn.K1Loss(), opdc.nn.TrOPDLoss(k=8)], ids=lambda loss: type(loss).__name__
)
def test_losses_of_tokens_are_the_same_through_both_paths(loss):
    """And the tokens are those that were drawn: `k1` is their log ratio."""
    runs = []
    for path in ("hidden", "logits"):
        trainer = build.distillation(temperature=0.9, gradient_accumulation_steps=2)
        recording = Recording(loss)
        runs.append(train(attached(trainer, recording, path=path)))
        logs = [log for log in runs[-1].logs if "loss" in log]
        assert len(recording.calls) == 6 and len(logs) == 3
        for step, log in enumerate(logs):
            calls = recording.calls[2 * step : 2 * step + 2]
            means = [
                (call["student_logprobs"] - call["teacher_logprobs"])[call["mask"] != 0].mean()
                for call in calls
            ]
            assert log["opdc/k1"] == pytest.approx(sum(means).item() / 2, rel=1e-4)
            assert log["opdc/positions"] == sum(int(c["mask"].sum()) for c in calls) / 2
    assert_same(*runs)


def test_greedy_tokens_are_the_best_ids():
    """Tokens, masks and logits stand at the same positions."""
    for make, keywords in (
        (build.distillation, {"path": "hidden"}),
        (build.distillation, {"path": "logits"}),
        (functools.partial(build.gkd, lmbda=1.0), {}),
        (functools.partial(build.gold, lmbda=1.0), {}),
        (functools.partial(build.iw_opd, lmbda=1.0), {}),
    ):
        loss = Recording(JSD)
        train(attached(greedy(make(max_steps=1)), loss, **keywords))
        (call,) = loss.calls
        chosen = call["mask"] != 0
        assert chosen.sum(-1).unique().numel() > 1  # of unequal lengths
        assert torch.equal(call["student"].argmax(-1)[chosen], call["tokens"][chosen])
        for tokens, active in zip(call["tokens"], chosen, strict=True):
            response = tokens[active].tolist()
            ended = [token in build.STOPS for token in response]
            assert not any(ended[:-1]) and (ended[-1] or len(response) == RESPONSE)


class Recording:
    """A loss that notes what it was called with."""

    def __init__(self, loss):
        self.loss = loss
        self.calls = []

    @property
    def uses_num_items(self):
        return self.loss.uses_num_items

    def __call__(self, student, teacher, *, tokens, mask, **arguments):
        result = self.loss(student, teacher, tokens=tokens, mask=mask, **arguments)
        temperature = arguments["temperature"] or 1.0
        call = {**arguments, "tokens": tokens.clone(), "mask": mask.clone()}
        call["value"] = self.loss(
            student, teacher, tokens=tokens, mask=mask, temperature=temperature
        ).detach()
        rows = {"student": student, "teacher": teacher}
        for name, row in rows.items():
            if isinstance(row, opdc.TopK):
                call[f"{name}_logprobs"] = row.token_logprobs
                continue
            call[name] = logits_of(row)
            law = (call[name].double() / temperature).log_softmax(-1)
            call[f"{name}_logprobs"] = law.gather(-1, tokens.clamp(min=0)[..., None])[..., 0]
        self.calls.append(call)
        return result


@torch.no_grad()
def logits_of(rows):
    if isinstance(rows, torch.Tensor):
        return rows.detach().clone()
    logits = rows.hidden @ rows.weight.T
    if rows.bias is not None:
        logits = logits + rows.bias
    return logits * rows.scale


@pytest.mark.parametrize("name", ["hidden", "logits", "gkd"])
def test_a_padded_teacher_is_the_teacher_without_its_padding(name):
    """A head of 32 ids more, which the softmaxes leave out; TRL itself refuses it."""
    teacher, padded = llama(1, width=24), llama(1, VOCABULARY + 32, width=24)
    cut = padded.state_dict()
    names = ("lm_head.weight", "model.embed_tokens.weight")
    teacher.load_state_dict({**cut, **{name: cut[name][:VOCABULARY] for name in names}})
    loss = opdc.nn.JSDLoss(beta=0.5, valid_vocab=VOCABULARY)
    if name == "gkd":
        theirs, trainer = build.gkd(teacher=teacher, lmbda=1.0), build.gkd(lmbda=1.0)
        keywords = {"rollout": blended(0.0)}
    else:
        theirs, trainer = build.distillation(teacher=teacher), build.distillation(remote=True)
        keywords = {"path": name}
    ours = train(attached(trainer, loss, teacher_model=padded, **keywords))
    assert not any(parameter.requires_grad for parameter in padded.parameters())
    if name == "gkd":
        attached(theirs, rollout=blended(0.0))
    assert_same(ours, train(theirs))


# ------------------------------------------------------------------------------------- rollouts


def blended(budget=0.3, **keywords):
    return opdc.hf.BlendSampler(None, budget, **keywords)


def behaviour(call, epsilon):
    """log μ of the tokens, by bisection on the logits that the loss saw."""
    temperature = call["temperature"] or 1.0
    s, tau = (
        (call[name].double() / temperature).log_softmax(-1) for name in ("student", "teacher")
    )
    if epsilon == 0:
        law = s
    else:
        law = oracle.blended(s, tau, oracle.largest_beta(s, tau, torch.tensor(epsilon)))
    return law.gather(-1, call["tokens"][..., None])[..., 0]


def blended_rollouts_reach_the_loss(trainer, budget, **keywords):
    loss = Recording(opdc.nn.K1Loss())
    run = train(attached(trainer, loss, rollout=blended(budget), **keywords))
    assert all(torch.isfinite(torch.tensor(run.losses)))
    steps = trainer.args.gradient_accumulation_steps
    for number, call in enumerate(loss.calls):
        if call["old_logprobs"] is None:
            continue
        epsilon = budget(number // steps) if callable(budget) else budget
        chosen = call["mask"] != 0
        mu = call["old_logprobs"][chosen].double()
        torch.testing.assert_close(mu, behaviour(call, epsilon)[chosen], rtol=0, atol=1e-4)
        off_policy = (mu - call["student_logprobs"][chosen]).abs().max()
        assert off_policy > 1e-3 if epsilon else off_policy < 1e-5
        assert call["prefix_mask"] is None or not call["prefix_mask"].any()
    return loss.calls


@pytest.mark.parametrize("path", ["hidden", "logits"])
def test_blended_rollouts_reach_the_loss(path):
    """Shuffled and accumulated; the budget ends after two steps, and with it the blend. With
    adapters and checkpointing, which would drop the cache."""
    trainer = build.distillation(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        peft_config=LoraConfig(**LORA),
    )
    budget = opdc.BlendBudget(0.4, steps=2)
    assert len(blended_rollouts_reach_the_loss(trainer, budget, path=path)) == 6


@pytest.mark.parametrize("adapter", [None, LoraConfig(**LORA)], ids=["whole", "lora"])
def test_blended_rollouts_reach_the_loss_of_gkd(adapter):
    """In steps off policy there is no behaviour policy, not even that of the step before."""
    trainer = build.gkd(
        lmbda=0.5,
        seed=3,
        max_steps=4,
        gradient_accumulation_steps=2,
        gradient_checkpointing=adapter is not None,
        peft_config=adapter,
    )
    calls = blended_rollouts_reach_the_loss(trainer, 0.3)
    on_policy = sum(call["old_logprobs"] is not None for call in calls)
    assert 0 < on_policy < len(calls) == 8


@pytest.mark.parametrize("name", ["sdft", "sdpo"])
def test_rollouts_that_serve_two_steps_are_of_an_older_policy(name):
    """In the first step it is the current one still. The temperature is in the logits already."""
    trainer = getattr(build, name)(max_steps=2, steps_per_generation=2, temperature=0.7)
    loss = Recording(opdc.nn.K1Loss())
    train(attached(trainer, loss))
    distances = []
    for call in loss.calls:
        assert call["temperature"] == 1.0
        difference = call["old_logprobs"] - call["student_logprobs"]
        distances.append(difference[call["mask"] != 0].abs().max().item())
    assert len(distances) == 2 and distances[0] < 1e-5 and distances[1] > 1e-3


def test_evaluation_samples_from_the_student_alone():
    def evaluated(trainer):
        torch.manual_seed(11)
        return trainer.evaluate()

    make = functools.partial(build.distillation, eval_dataset=prompts(), beta=1.0)
    theirs = evaluated(make())
    loss = opdc.nn.ReverseKLLoss()
    for keywords in ({"rollout": blended(5.0)}, {"path": "logits"}):
        ours = evaluated(attached(make(), loss, **keywords))
        assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-5)
    for keywords in ({}, {"rollout": blended(5.0)}):
        trainer = attached(make(eval_strategy="steps", eval_steps=1, max_steps=2), loss, **keywords)
        logs = train(trainer).logs
        measured = [log["eval_opdc/reverse_kl"] for log in logs if "eval_loss" in log]
        losses = [log["eval_loss"] for log in logs if "eval_loss" in log]
        assert len(losses) == 2 and measured == pytest.approx(losses, rel=0.2)
        assert sum("opdc/reverse_kl" in log for log in logs) == 2


@pytest.mark.parametrize("name", ["gkd", "gold", "iw_opd", "sdft"])
def test_other_trainers_evaluate_as_trl_does(name):
    data = "eval_dataset"
    settings = {"lmbda": 1.0, "beta": 1.0, data: build.conversations()}
    if name == "sdft":
        settings = {"distillation_alpha": 1.0, data: build.hints(), "num_generations_eval": 1}
    loss = opdc.nn.ReverseKLLoss(reduction="seq_mean" if name == "sdft" else "mean")
    results = []
    for trainer in (getattr(build, name)(**settings) for _ in range(2)):
        if results:
            attached(trainer, loss)
        torch.manual_seed(11)
        results.append(trainer.evaluate()["eval_loss"])
    assert results[1] == pytest.approx(results[0], rel=1e-5)


@pytest.mark.parametrize("kind", ["texts", "ids"])
def test_prefixes_are_the_columns_tokens(kind):
    """As far as the schedule says, and no further than a response may be long."""
    words = build.tokenizer()
    long = "w80 w81 w82 w83 w84 w85 w86 w87 w88 w89"
    answers = [*build.ANSWERS[:4], *(f"w{number} {long}" for number in range(90, 94))]
    ids = [words(reply)["input_ids"] for reply in answers]
    column = {"texts": answers, "ids": ids}[kind]
    data = build.prompts().add_column("teacher_response", column)
    answer_of = {
        tuple(words(f"<user> {question} <assistant>")["input_ids"]): reply[:RESPONSE]
        for question, reply in zip(build.QUESTIONS, ids, strict=True)
    }
    length = opdc.PrefixLength(steps=3)
    loss = Recording(opdc.nn.TrOPDLoss())
    trainer = build.distillation(
        train_dataset=data,
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    sampler = blended(0.1, prefix=length)
    attached(trainer, loss, rollout=sampler, prefix_column="teacher_response")
    generate, batches = trainer._generate_and_score_completions, []

    def recording(inputs):
        batches.append(generate(inputs))
        return batches[-1]

    trainer._generate_and_score_completions = recording
    train(trainer)
    assert len(batches) == 4 and len(loss.calls) == 8
    for step, batch in enumerate(batches):
        calls = loss.calls[2 * step : 2 * step + 2]
        seen = [
            prefix for call in calls for prefix in prefixes(call["tokens"], call["prefix_mask"])
        ]
        written = prefixes(batch["completion_ids"], batch["opdc_prefix_mask"])
        assert sorted(seen) == sorted(written)
        for row, prefix in enumerate(written):
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row] != 0]
            answer = answer_of[tuple(prompt.tolist())]
            assert prefix == answer[: length(step, len(answer))]
    assert not batches[-1]["opdc_prefix_mask"].any()


def prefixes(tokens, forced):
    """The tokens under a mask that is 1 from the first position on, as far as it goes."""
    counts = forced.sum(-1).tolist()
    assert all(mask[:count].all() for mask, count in zip(forced, counts, strict=True))
    return [row[:count].tolist() for row, count in zip(tokens, counts, strict=True)]


# ----------------------------------------------------------------- what is left as it was


def test_training_goes_on_from_a_checkpoint(tmp_path):
    def begun():
        trainer = build.distillation(
            per_device_train_batch_size=2,  # one epoch: TRL itself shuffles the next one anew
            max_steps=4,
            lr_scheduler_type="linear",
            save_strategy="steps",
            save_steps=2,
            output_dir=str(tmp_path),
        )
        budget = opdc.BlendBudget(0.2, steps=8)
        return attached(trainer, opdc.nn.TrOPDLoss(k=8), rollout=blended(budget))

    whole = train(begun())
    resumed = train(begun(), resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.losses == pytest.approx(whole.losses[2:], rel=1e-6)
    assert resumed.norms == pytest.approx(whole.norms[2:], rel=1e-5)


def test_detach_gives_trls_trainer_back():
    """Bit for bit, and nothing of opdc is left on the object."""
    for make, keywords in (
        (lambda: build.distillation(max_steps=2), {"path": "hidden", "rollout": blended()}),
        (lambda: build.distillation(max_steps=2), {"path": "logits"}),
        (lambda: build.gkd(lmbda=1.0, max_steps=2), {"rollout": blended()}),
        (lambda: build.sft(max_steps=2), {"teacher_model": llama(1)}),
    ):
        trainer = make()
        before = dict(vars(trainer))
        attached(trainer, **keywords)
        assert opdc.trl.detach(trainer) is trainer
        assert vars(trainer).keys() == before.keys()
        assert all(vars(trainer)[name] is before[name] for name in before)
        ours, theirs = train(trainer), train(make())
        assert ours.losses == theirs.losses and ours.norms == theirs.norms
        assert all(
            torch.equal(ours.gradients[0][name], g) for name, g in theirs.gradients[0].items()
        )


@pytest.mark.parametrize("path", ["hidden", "logits"])
def test_masked_positions_are_never_read(path):
    """What the backbone, or the head, gave where nothing was generated may be NaN."""

    def poisoned(trainer):
        if path == "hidden":
            original = trainer._get_last_hidden_state

            def states(model, input_ids, attention_mask, logits_to_keep, **others):
                hidden = original(model, input_ids, attention_mask, logits_to_keep, **others)
                unread = attention_mask[:, -logits_to_keep:] == 0
                assert unread.any()
                return hidden.masked_fill(unread[..., None], torch.nan)

            trainer._get_last_hidden_state = states
        else:
            for model in (trainer.model, trainer.teacher_model):
                model.register_forward_hook(poison, with_kwargs=True)
        return trainer

    def poison(model, arguments, keywords, output):
        if torch.is_grad_enabled() or model is not student:  # a rollout is left alone
            following = keywords["attention_mask"][:, -output.logits.shape[1] + 1 :] == 0
            unread = torch.nn.functional.pad(following, (0, 1), value=True)
            assert unread[:, :-1].any()
            output.logits = output.logits.masked_fill(unread[..., None], torch.nan)
        return output

    make = functools.partial(build.distillation, max_steps=2)
    clean = train(attached(make(), path=path))
    trainer = make()
    student = trainer.model
    spoilt = train(attached(poisoned(trainer), path=path))
    assert clean.losses == spoilt.losses
    for name, gradient in clean.gradients[0].items():
        assert torch.equal(gradient, spoilt.gradients[0][name]), name


def test_the_teacher_never_receives_a_gradient():
    for make, keywords in (
        (build.distillation, {"path": "hidden"}),
        (build.distillation, {"path": "logits"}),
        (functools.partial(build.gkd, lmbda=1.0), {}),
        (build.sft, {"teacher_model": llama(1, width=24)}),
    ):
        trainer = attached(make(max_steps=2), **keywords)
        before = {name: p.clone() for name, p in trainer.teacher_model.named_parameters()}
        train(trainer)
        for name, parameter in trainer.teacher_model.named_parameters():
            assert parameter.grad is None and torch.equal(parameter, before[name])
