"""What the loss costs in a step of TRL's trainers: TRL's own, and opdc's after `opdc.trl.attach`.

    python benchmarks/trainer_steps.py [--sizes 64,512] [--update-readme PATH]

A trainer of TRL is built and takes its steps as it does in training: forward, loss, backward,
clipping, AdamW. Two Qwen2 models with a small body and a head of 151,936 ids, 2 responses of 128
tokens. Nothing is generated: the responses are fixed, so that the step is what is left of it.
The same trainer takes the steps of all contenders, in turns.

* DistillationTrainer: the loss's time is that of a step less that of a step whose loss reads the
  student's hidden states alone and has a gradient of zeros. So it has in it all that a loss needs:
  the products with both heads, the divergence, the gradients of hidden states and head.
* GKDTrainer, which hands logits to its loss: from the call of the loss to its return, and from the
  beginning of the backward pass until the gradient of the logits is there. The heads are the
  models' affair.
* Memory: the peak of the resident memory in a step, beyond what is there before it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# trainers.py of the tests builds small trainers.
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import torch
import transformers
from datasets import Dataset
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

import opdc.trl
import trainers as small
from opdc.bench.contenders import DTYPES, Contender
from opdc.bench.device import CPU
from opdc.bench.measure import machine, spread
from opdc.bench.report import machine as machine_in_words
from opdc.bench.report import markdown_table, number, plural, replace_sections, times
from opdc.demo.command import progress
from opdc.info import version

RESULTS = Path(__file__).resolve().parent / "results"
VOCABULARY, RESPONSES, TOKENS, PROMPT = 151_936, 2, 128, 32
LOGIT_SPREAD = 3.0  # standard deviation of the logits of the random models
LOSSES = {
    "JSD": (0.5, lambda: opdc.nn.JSDLoss(beta=0.5)),
    "reverse KL": (1.0, opdc.nn.ReverseKLLoss),  # with what TRL calls the divergence
}
TRL = "trl"  # the contender that is TRL's own loss
PATHS = ("hidden", "logits")  # of opdc in the DistillationTrainer
NOTHING = "nothing"  # a loss that costs nothing
REHEARSED = 5.0  # seconds: shorter steps are taken twice, and the second is timed


# ---- the trainers ----------------------------------------------------------------------------


def qwen2(seed: int, size: int, logits: torch.dtype = torch.float32) -> Qwen2ForCausalLM:
    """Two layers; the head is tied to the embedding, as in Qwen2's own small models.

    In float32, and its logits are rounded to another type. A whole model in bfloat16 would measure
    the products of its head: processors without instructions for them take seconds.
    """
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=size,
        intermediate_size=2 * size,
        num_hidden_layers=2,
        num_attention_heads=size // 32,
        num_key_value_heads=size // 32,
        max_position_embeddings=1024,
        initializer_range=LOGIT_SPREAD / size**0.5,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config)
    if logits != torch.float32:
        model.lm_head.register_forward_hook(lambda _, __, output: output.to(logits))
    return model


def words(count: int) -> str:
    return " ".join(f"w{5 + index % 150}" for index in range(count))


STEPS = {
    "learning_rate": 1e-7,  # so low that the models stay what they are
    "optim": "adamw_torch",
    "max_steps": 1,
    "logging_strategy": "no",
}
BATCH = {"per_device_train_batch_size": RESPONSES}


def distillation(student: Any, teacher: Any) -> Any:
    prompt = [small.said("user", words(PROMPT))]
    trainer = small.distillation(
        student,
        teacher,
        train_dataset=Dataset.from_dict({"prompt": [prompt] * RESPONSES}),
        max_completion_length=TOKENS,
        **STEPS,
        **BATCH,
    )
    responses = torch.randint(VOCABULARY, (RESPONSES, TOKENS)).tolist()
    trainer._generate_single_turn = lambda *_, **__: responses
    return trainer


def gkd(student: Any, teacher: Any) -> Any:
    """On the responses of its data set."""
    conversation = [
        small.said("user", words(PROMPT)),
        small.said("assistant", words(TOKENS - 1)),  # and an end token
    ]
    return small.gkd(
        student,
        teacher,
        train_dataset=Dataset.from_dict({"messages": [conversation] * RESPONSES}),
        lmbda=0.0,
        max_length=4 * (PROMPT + TOKENS),
        **STEPS,
        **BATCH,
    )


class Steps:
    """A trainer in the middle of its training, and steps that are taken one by one."""

    def __init__(self, trainer: Any) -> None:
        trainer.train()  # one step, after which everything is in its place
        self.trainer = trainer
        batches = iter(trainer.get_train_dataloader())
        (self.batch,), self.items = trainer.get_batch_samples(batches, 1, torch.device("cpu"))

    def __call__(self) -> None:
        """What `Trainer` does in a step."""
        trainer = self.trainer
        batch = dict(self.batch) if isinstance(self.batch, dict) else self.batch
        trainer.training_step(trainer.model_wrapped, batch, self.items)
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.model.zero_grad()

    def use(self, beta: float, loss: Callable[..., Any] | None, **options: Any) -> None:
        """From now on the steps are with this loss, or with TRL's own."""
        if "_opdc_attachment" in vars(self.trainer):
            opdc.trl.detach(self.trainer)
        self.trainer.beta = beta
        if loss is not None:
            opdc.trl.attach(self.trainer, loss, **options)


# ---- the measurements ------------------------------------------------------------------------


def nothing(student: opdc.Projection, *_: Any, **__: Any) -> Tensor:
    return 0.0 * student.hidden.sum()


def measure_distillation(
    size: int, _: torch.dtype, repeats: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    steps = Steps(distillation(qwen2(0, size), qwen2(1, size)))
    contenders = {NOTHING: Contender(steps, lambda: steps.use(1.0, nothing, path="hidden"))}
    for name, (beta, make) in LOSSES.items():
        contenders[f"{name}, {TRL}"] = Contender(steps, functools.partial(steps.use, beta, None))
        for path in PATHS:
            prepare = functools.partial(steps.use, beta, make(), path=path)
            contenders[f"{name}, {path}"] = Contender(steps, prepare)
    found = yield from in_turns(contenders, repeats, lambda _, seconds: {"step": seconds})
    base = statistics.median(found[NOTHING]["step"])
    for name in LOSSES:
        case = {"loss": name, "step_without": 1e3 * base, "contenders": {}}
        for key in (TRL, *PATHS):
            samples = found[f"{name}, {key}"]
            case["contenders"][key] = {
                "step": in_milliseconds(samples["step"]),
                "loss": in_milliseconds([step - base for step in samples["step"]]),
                "memory": samples["memory"],
            }
        yield "", case


def measure_gkd(
    size: int, dtype: torch.dtype, repeats: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    steps = Steps(gkd(qwen2(0, size, dtype), qwen2(1, size, dtype)))
    clock = LossClock()

    def prepare(beta: float, loss: Any) -> None:
        clock.take_off(steps.trainer)
        steps.use(beta, loss)
        clock.put_on(steps.trainer)

    contenders = {
        f"{name}, {key}": Contender(steps, functools.partial(prepare, beta, loss))
        for name, (beta, make) in LOSSES.items()
        for key, loss in ((TRL, None), ("logits", make()))
    }
    found = yield from in_turns(
        contenders, repeats, lambda _, seconds: {"step": seconds, "loss": clock.seconds}
    )
    for name in LOSSES:
        case = {"loss": name, "contenders": {}}
        for key in (TRL, "logits"):
            samples = found[f"{name}, {key}"]
            case["contenders"][key] = {
                "step": in_milliseconds(samples["step"]),
                "loss": in_milliseconds(samples["loss"]),
                "memory": samples["memory"],
            }
        yield "", case


class LossClock:
    """Times the loss of a `GKDTrainer` from the outside, whoever computes it."""

    NAME = "generalized_jsd_loss"

    def __init__(self) -> None:
        self.seconds = 0.0  # of the last loss
        self._found: list[Any] | None = None  # what stood on the trainer itself, if anything

    def put_on(self, trainer: Any) -> None:
        self._found = [vars(trainer)[self.NAME]] if self.NAME in vars(trainer) else []
        loss_function = getattr(trainer, self.NAME)

        def clocked(student_logits: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
            start = time.perf_counter()
            loss = loss_function(student_logits, *arguments, **keywords)
            self.seconds = time.perf_counter() - start
            begun = [0.0]

            def begin(_: Tensor) -> None:
                begun[0] = time.perf_counter()

            def end(_: Tensor) -> None:
                self.seconds += time.perf_counter() - begun[0]

            loss.register_hook(begin)
            student_logits.register_hook(end)
            return loss

        setattr(trainer, self.NAME, clocked)

    def take_off(self, trainer: Any) -> None:
        """Leaves what `put_on` has found."""
        if self._found is None:
            return
        delattr(trainer, self.NAME)
        for original in self._found:
            setattr(trainer, self.NAME, original)
        self._found = None


def in_turns(
    contenders: dict[str, Contender],
    repeats: int,
    read: Callable[[str, float], dict[str, float]],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A first step of each for its memory, then rounds. Before a short step there is an untimed
    one: what another contender has freed would have to be got from the system again."""
    found: dict[str, Any] = {}
    first: dict[str, float] = {}
    for name, contender in contenders.items():
        yield f"{name}: memory", {}
        start = time.perf_counter()
        found[name] = {"memory": CPU.extra_memory(contender)}
        first[name] = time.perf_counter() - start
    for turn in range(repeats):
        for name, contender in contenders.items():
            yield f"{name}: {turn + 1} of {repeats}", {}
            contender.prepare()
            if first[name] < REHEARSED:
                contender.run()
            gc.collect()
            seconds, _ = CPU.timed(Contender(contender.run))
            for key, value in read(name, seconds).items():
                found[name].setdefault(key, []).append(value)
    return found


def in_milliseconds(seconds: list[float]) -> dict[str, float]:
    return {key: round(value, 4) for key, value in spread([1e3 * s for s in seconds]).items()}


TRAINERS = {"DistillationTrainer": measure_distillation, "GKDTrainer": measure_gkd}


def measure(
    trainers: list[str], sizes: list[int], dtypes: list[str], repeats: int
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "machine": machine(),
        "packages": {name: version(name) for name in ("trl", "transformers")},
        "threads": torch.get_num_threads(),
        "vocabulary": VOCABULARY,
        "responses": RESPONSES,
        "tokens": TOKENS,
        "prompt": PROMPT,
        "cases": [],
    }
    # Only the GKDTrainer has logits, which may have another type than the models.
    cases = [
        (t, size, dtype)
        for t in trainers
        for size in sizes
        for dtype in (dtypes if t == "GKDTrainer" else ["float32"])
    ]
    rounds = repeats + 1
    total = sum(rounds * (7 if t == "DistillationTrainer" else 4) for t, *_ in cases)
    bar = progress("steps of trainers")
    with bar:
        task = bar.add_task("", total=total)
        for trainer, size, dtype in cases:
            for said, case in TRAINERS[trainer](size, DTYPES[dtype], repeats):
                if case:
                    result["cases"].append(
                        {"trainer": trainer, "size": size, "dtype": dtype, **case}
                    )
                else:
                    text = f"{trainer}, H = {size}, {dtype}: {said}"
                    bar.update(task, advance=1, description=text)
            gc.collect()
    return result


# ---- the tables ------------------------------------------------------------------------------


def loss_of(case: dict[str, Any], key: str) -> float:
    return float(case["contenders"][key]["loss"]["median"])


def share_of(case: dict[str, Any], key: str) -> float:
    """The loss's part of the step."""
    return loss_of(case, key) / float(case["contenders"][key]["step"]["median"])


def report(result: dict[str, Any]) -> str:
    parts = []
    for trainer, paths in (("DistillationTrainer", PATHS), ("GKDTrainer", ("logits",))):
        cases = [case for case in result["cases"] if case["trainer"] == trainer]
        if not cases:
            continue
        headings = [f"`{trainer}`", "H", "logits", "TRL's loss"]
        for path in paths:
            name = f'opdc, `path="{path}"`' if len(paths) > 1 else "opdc"
            headings += [name, "of TRL's"]
        headings += ["step", "memory, MiB"]
        rows = []
        for case in cases:
            row = [case["loss"], str(case["size"]), case["dtype"], with_share(case, TRL)]
            for path in paths:
                ratio = loss_of(case, path) / loss_of(case, TRL)
                row += [with_share(case, path), times(ratio)]
            of_all = [case["contenders"][key] for key in (TRL, *paths)]
            row.append(" → ".join(number(found["step"]["median"]) for found in of_all))
            row.append(" → ".join(mebibytes(found["memory"]) for found in of_all))
            rows.append(row)
        parts += [*markdown_table(headings, rows, 3), ""]
    return "\n".join([*parts, remarks(result)])


def with_share(case: dict[str, Any], key: str) -> str:
    return f"{number(loss_of(case, key))} ({share_of(case, key):.0%})"


def mebibytes(size: float | None) -> str:
    return number(None if size is None else size / 2**20)


def remarks(result: dict[str, Any]) -> str:
    repeats = min(
        found["step"]["repeats"]
        for case in result["cases"]
        for found in case["contenders"].values()
    )
    return (
        f"Milliseconds of the loss, with its part of the step in brackets, and of the whole step; "
        f"medians of {repeats} steps that take turns. Qwen2 with 2 layers of H and a tied head of "
        f"{result['vocabulary']:,} ids, {result['responses']} responses of {result['tokens']} "
        f"tokens after prompts of {result['prompt']} words; {plural(result['threads'], 'thread')}, "
        f"{machine_in_words(result)}, TRL {result['packages']['trl']}. A step is forward, loss, "
        "backward and optimizer; nothing is generated, and the models are far smaller than their "
        "heads, so that the part of the loss is larger than in practice. Of the "
        "`DistillationTrainer` the loss's time is what the step takes longer than one without a "
        "loss, with the products of both heads; of the `GKDTrainer`, which makes the logits "
        "itself, that of the loss and of the gradient of the logits; float32 models, whose "
        "logits are rounded where they are bfloat16. Short steps are taken twice, and the second "
        "is timed; a long one has to get from the system what another has freed. Memory: the peak "
        "in a step, beyond what is there before it; TRL's → opdc's."
    )


# ---- the command -----------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--trainers",
        default=",".join(TRAINERS),
        help="which are measured; those of the others stay in the output file (default: all)",
    )
    parser.add_argument("--sizes", default="64,512", help="of hidden states (default: 64,512)")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="of the logits of GKD")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "trainer_steps.json")
    parser.add_argument("--report", action="store_true", help="measure nothing: show what is there")
    parser.add_argument("--update-readme", type=Path, metavar="PATH")
    arguments = parser.parse_args()
    if arguments.report:
        result = json.loads(arguments.output.read_text())
    else:
        torch.set_num_threads(arguments.threads)
        transformers.logging.set_verbosity_error()
        sizes = [int(size) for size in arguments.sizes.split(",")]
        with contextlib.redirect_stdout(sys.stderr):  # for what trainers print of their log
            chosen = arguments.trainers.split(",")
            result = measure(chosen, sizes, arguments.dtypes.split(","), arguments.repeats)
        if others := set(TRAINERS) - set(chosen):
            earlier = json.loads(arguments.output.read_text())["cases"]
            kept = [case for case in earlier if case["trainer"] in others]
            result["cases"] = kept + result["cases"]
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    text = report(result)
    print(text)
    if arguments.update_readme:
        page = arguments.update_readme
        page.write_text(replace_sections(page.read_text(), {"trainers": text}))


if __name__ == "__main__":
    main()
