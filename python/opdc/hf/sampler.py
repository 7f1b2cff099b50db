"""Sampling from a trust-region behaviour policy inside `generate`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .decoding import Decoding, Stopping
from .generation import Behaviour, Generation, is_sharded
from .rollout import Rollout
from .transcript import Reader, config_of, evaluating, unwrapped, vocabulary_size

# What generate passes on to any model, of which the sampler uses the attention mask. Anything
# else (images, embeddings) is content that it would leave out.
_HARMLESS = (
    "attention_mask",
    "cache_params",
    "logits_to_keep",
    "past_key_values",
    "position_ids",
    "use_cache",
)


class BlendSampler:
    """Draws the responses of `generate` from `μ ∝ p^(1−β) q^β`, as far from the student `p` towards
    the teacher `q` as `KL(μ ‖ p) ≤ ε` allows (TRB, arXiv 2605.31159; see `opdc.blend`).

    An object for `model.generate(custom_generate=...)`. It runs its own loop, with a cache for each
    model, and calls nothing but their public `forward`. Batches are padded on the left; the
    positions are counted from each row's own first token, whatever `position_ids` say. What
    `generate` was told holds: the temperature is that of both models, before the blend; processors,
    such as suppressed tokens, act on the student's scores before it; top-k, top-p and the like cut
    `μ` after it, ties of top-k by the lower id; stopping criteria, several stop tokens,
    `num_return_sequences` and `return_dict_in_generate` work; `do_sample=False` takes the most
    probable token of `μ`. Mind that `generate(do_sample=True)` truncates to `top_k=50` unless told
    otherwise: a loss that corrects for the behaviour policy wants `top_k=0`.

    The student stays in the mode that it is in; in train mode, with dropout, the numbers recorded
    are those of another model than the loss will see. Gradient checkpointing, which drops the
    cache, only makes it slow.

    With ε = 0, where a budget has decayed, the teacher is not called and the student samples.

    Args:
        teacher_model: a causal language model that decodes with a `DynamicCache`; in eval mode
            during the call. Its vocabulary is the student's, or see `valid_vocab`.
        budget: ε in nats, at least 0, `math.inf` included, or a function of `step`, such as
            `opdc.BlendBudget`.
        draft_length: 0 calls both models for each token. With n > 0 the student drafts n tokens and
            one call of the teacher judges them: the responses are distributed exactly alike, with
            fewer calls of the teacher (`opdc.blend_verify`). Not with sliding windows or recurrent
            states, nor with warpers other than temperature, top-k and top-p, nor with processors
            that keep a state: each is shown the batch once for every length that a row has.
        prefix: a function of `step` and the length of a response of the teacher, such as
            `opdc.PrefixLength`: the teacher answers each prompt first, and as many of its tokens as
            the function says begin the student's response (TrOPD, arXiv 2606.01249).
        eos_map: `(student_eos, teacher_eos)`, where the two models end with different ids.
        valid_vocab: the number of ids that both models have, where their vocabularies differ in
            size by padding.
        generator: of the uniforms; None: the global one of the CPU, which trainers save and restore
            and which draws the same for models on a GPU. A token of each row takes one of
            `torch.rand(B, dtype=torch.float64)`, finished rows too; a block of n drafts
            `(B, n, 3)`; greedy decoding none.

    Attributes:
        step: of the training, for `budget` and `prefix`.
        prefix_ids: forced beginnings of the responses, a list of ids for each row (or for each
            prompt, with `num_return_sequences`); None: none. They win over `prefix`, and hold until
            they are replaced.
        last: the `Rollout` of the last call.

    Raises:
        ValueError: for a budget that is negative or NaN, vocabularies that differ, scores that hold
            NaN or leave no token, and what the loop does not do: encoder-decoders, embeddings or
            images as input, beams, assisted generation, caches that were given. (`generate` keeps
            an assistant and a streamer from a `custom_generate`; `generating` sees and refuses
            them.)

    >>> import opdc.hf, torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16,
    ...                      num_hidden_layers=1, num_attention_heads=2)
    >>> student, teacher = (LlamaForCausalLM(config).eval() for _ in range(2))
    >>> sampler = opdc.hf.BlendSampler(teacher, budget=0.02)
    >>> sequences = student.generate(
    ...     torch.tensor([[1, 5, 9], [1, 6, 7]]), do_sample=True, top_k=0, max_new_tokens=4,
    ...     eos_token_id=None, custom_generate=sampler)
    >>> sequences.shape, sampler.last.logprobs.shape
    (torch.Size([2, 7]), torch.Size([2, 4]))
    >>> bool((sampler.last.kl <= 0.02 * (1 + 1e-4)).all())
    True
    """

    def __init__(
        self,
        teacher_model: Any,
        budget: float | Callable[[int], float] = 0.02,
        *,
        draft_length: int = 0,
        prefix: Callable[[int, int], int] | None = None,
        eos_map: tuple[int, int] | None = None,
        valid_vocab: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if isinstance(draft_length, bool) or not isinstance(draft_length, int):
            raise TypeError(f"draft_length must be an integer, got {draft_length!r}")
        if draft_length < 0:
            raise ValueError(f"draft_length must be at least 0, got {draft_length}")
        self.teacher_model = teacher_model
        self.budget = budget
        self.draft_length = draft_length
        self.prefix = prefix
        self.eos_map = eos_map
        self.valid_vocab = valid_vocab
        self.generator = generator
        self.step = 0
        self.prefix_ids: Sequence[Sequence[int]] | None = None
        self.last: Rollout | None = None
        if not callable(budget):
            self.epsilon()

    def epsilon(self) -> float:
        """The budget of this step."""
        epsilon = float(self.budget(self.step) if callable(self.budget) else self.budget)
        if not epsilon >= 0:
            raise ValueError(f"the budget must be at least 0, got {epsilon} at step {self.step}")
        return epsilon

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        self.last = None
        self._check_request(model, generation_config, model_kwargs)
        epsilon = self.epsilon()
        if self.teacher_model is None and (epsilon > 0 or self.prefix is not None):
            raise ValueError("teacher_model is None: only a budget of 0 can do without a teacher")
        # None when all ones: generate drops such a mask.
        attention_mask = model_kwargs.get("attention_mask")
        self._check_vocabularies(model, input_ids, attention_mask)
        padding = generation_config._pad_token_tensor
        behaviour = Behaviour(
            decoding=Decoding.of(logits_processor, bool(generation_config.do_sample)),
            stopping=Stopping.of(stopping_criteria, generation_config.max_length, input_ids.device),
            padding_id=0 if padding is None else int(padding),
            eos_map=self.eos_map,
            valid_vocab=self.valid_vocab,
            generator=self.generator,
            sharded=is_sharded(model, self.teacher_model),
        )
        if self.draft_length and (unfit := behaviour.decoding.unfit_for_drafts):
            raise ValueError(f"{unfit} cannot serve drafts: use draft_length=0")

        with contextlib.ExitStack() as stack, torch.no_grad():
            if self.teacher_model is not None:
                stack.enter_context(evaluating(self.teacher_model))
            teacher = self._reading_teacher() if epsilon > 0 else None
            forced, spent = self._forced(model, behaviour, input_ids, attention_mask)
            self.last = Generation(
                behaviour,
                Reader(model, "student"),
                teacher,
                input_ids,
                attention_mask,
                epsilon=epsilon,
                forced=forced,
                draft_length=self.draft_length if epsilon > 0 else 0,
            ).run(spent)
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=cast(torch.LongTensor, self.last.sequences))
        return self.last.sequences

    def _reading_teacher(self) -> Reader:
        return Reader(self.teacher_model, "teacher", needs_cache=True)

    def _forced(
        self, model: Any, behaviour: Behaviour, input_ids: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor | None, Rollout | None]:
        """The tokens `(B, F)` that the responses begin with, −1 after them, and the teacher's
        rollout, if that is where they come from."""
        rows, prompt = input_ids.shape
        room = behaviour.stopping.room(prompt)
        if self.prefix_ids is not None:
            count = len(self.prefix_ids)
            if count == 0 or rows % count:
                raise ValueError(
                    f"prefix_ids has {count} rows for a batch of {rows}: one for each response, or "
                    "for each prompt"
                )
            rows_ids = [list(ids)[:room] for ids in self.prefix_ids for _ in range(rows // count)]
            tensors = [
                torch.tensor(ids, dtype=torch.long, device=input_ids.device) for ids in rows_ids
            ]
            known = self.valid_vocab or vocabulary_size(model)
            self._check_ids("prefix_ids", torch.cat(tensors), known)
            forced = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=-1)
            return behaviour.aligned(forced), None
        # A schedule that grants none of the longest response grants none of a shorter one.
        if self.prefix is None or self.prefix(self.step, room) == 0:
            return None, None
        teacher = self._reading_teacher()
        response = Generation(behaviour, teacher, None, input_ids, attention_mask).run()
        lengths = [self.prefix(self.step, length) for length in response.mask.sum(-1).tolist()]
        beyond = torch.arange(response.tokens.shape[1]) >= torch.tensor(lengths)[:, None]
        kept = response.mask & ~beyond.to(input_ids.device)
        return response.tokens.masked_fill(~kept, -1)[:, : max(lengths)], response

    def _check_request(
        self, model: Any, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> None:
        for one in (model, self.teacher_model):
            if getattr(config_of(one), "is_encoder_decoder", False):
                raise ValueError(
                    f"{type(unwrapped(one)).__name__} is an encoder-decoder: BlendSampler needs "
                    "decoder-only models"
                )
        mode = generation_config.get_generation_mode()
        if mode not in ("sample", "greedy_search"):
            raise ValueError(
                f"BlendSampler samples, or takes the most probable token; generate was asked for "
                f"{mode.value.replace('_', ' ')} (num_beams={generation_config.num_beams})"
            )
        unknown = [
            name
            for name, value in model_kwargs.items()
            if name not in _HARMLESS and value is not None and value is not False
        ]
        if unknown:
            raise ValueError(f"BlendSampler reads token ids alone; generate was given {unknown}")
        cache = model_kwargs.get("past_key_values")
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic") or not (
            cache is None
            or (type(cache) is DynamicCache and not getattr(cache, "_is_user_defined", False))
        ):
            raise ValueError(
                f"BlendSampler keeps a DynamicCache of its own for each model; generate was given "
                f"{f'cache_implementation={kind!r}' if kind else 'past_key_values'}"
            )
        for name in ("output_scores", "output_logits"):
            if getattr(generation_config, name):
                raise ValueError(f"BlendSampler keeps no rows of scores: {name} is not possible")

    def _check_vocabularies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor | None
    ) -> None:
        if self.teacher_model is None:
            return
        sizes = vocabulary_size(model), vocabulary_size(self.teacher_model)
        if None in sizes:
            return  # the samplers of the core compare the logits
        if sizes[0] != sizes[1] and self.valid_vocab is None:
            raise ValueError(
                f"the student has {sizes[0]} ids and the teacher {sizes[1]}: if the tokenizer is "
                "the same and the rest is padding, say so with valid_vocab"
            )
        seen = input_ids if attention_mask is None else input_ids[attention_mask != 0]
        self._check_ids("the prompts", seen, sizes[1])

    @staticmethod
    def _check_ids(name: str, ids: Tensor, count: int | None) -> None:
        wrong = ids[(ids < 0) | (ids >= (2**63 - 1 if count is None else count))]
        if wrong.numel():
            raise ValueError(
                f"{name} hold the ids {wrong.unique().tolist()}, of {count} that both models know"
            )


@contextlib.contextmanager
def generating(model: Any, sampler: BlendSampler) -> Iterator[Any]:
    """Within this context `model.generate(...)` draws with `sampler`, whoever calls it.

    For code that cannot be given a `custom_generate`, such as a trainer. `model` must be the very
    object whose `generate` is called; inside of a PEFT model its own `generate` passes it on.
    Afterwards, after an exception too, `generate` is what it was.

    Raises:
        TypeError: `model` has no `generate`.
        ValueError: from `generate`, for an assistant model, a streamer or another
            `custom_generate`.

    >>> import opdc.hf, torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16,
    ...                      num_hidden_layers=1, num_attention_heads=2)
    >>> student, teacher = (LlamaForCausalLM(config).eval() for _ in range(2))
    >>> sampler = opdc.hf.BlendSampler(teacher)
    >>> with opdc.hf.generating(student, sampler):
    ...     sequences = student.generate(torch.tensor([[1, 5]]), do_sample=True, max_new_tokens=3)
    >>> torch.equal(sequences, sampler.last.sequences)
    True
    """
    original = getattr(model, "generate", None)
    if not callable(original):
        raise TypeError(f"{type(model).__name__} has no generate")

    def generate(*arguments: Any, **keywords: Any) -> Any:
        for name in ("assistant_model", "streamer", "custom_generate"):
            if keywords.get(name) is not None:
                raise ValueError(f"generate draws with a BlendSampler here: no {name}")
        return original(*arguments, custom_generate=sampler, **keywords)

    replaced = vars(model).get("generate")  # of this object alone, not of its class
    model.generate = generate
    try:
        yield model
    finally:
        if replaced is None:
            del model.generate
        else:
            model.generate = replaced
