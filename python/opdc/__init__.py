"""Losses and samplers of on-policy distillation of language models: from student and teacher logits
to a loss and its gradient, or to a token, exact and in few passes over memory, on the CPU and on
CUDA GPUs, for PyTorch.

>>> import opdc, torch
>>> student = torch.randn(2, 5, 100, requires_grad=True)  # (batch, sequence, vocabulary)
>>> teacher = torch.randn(2, 5, 100)
>>> loss = opdc.reverse_kl(student, teacher, temperature=0.7)
>>> loss.backward()
>>> student.grad.shape
torch.Size([2, 5, 100])

Where to find what:

* `opdc.guide`: which loss, how exact, and how it gets into a training that exists already
* `opdc.functional`: the losses, and what holds for all of them: shapes, types, reductions, errors
* `opdc.nn`: the same as modules with one `forward`
* `opdc.sampling`: the behaviour policies, which draw the tokens of a rollout
* `opdc.teachers`: what an inference server sends, as a `TopK`
* `opdc.metrics`: what a loss reports beside its value
* `opdc.hf`: transformers: `generate` with two models, a loss for `Trainer`
* `opdc.trl`: TRL's distillation trainers
* `opdc.verl`: verl's trainers

The names below are those of `opdc.functional` and `opdc.sampling`, and what goes into them.
"""

import torch as _torch  # noqa: F401 - first, so that the C core joins its OpenMP runtime

from . import metrics, nn
from ._ops import __version__
from .functional import (
    aopd,
    entropy,
    eopd,
    forward_kl,
    jsd,
    k1,
    k2,
    k3,
    lsm,
    reopold,
    reverse_kl,
    skew_kl,
    token_logprobs,
    topk,
    tropd,
)
from .projection import Projection
from .sampling import (
    Blend,
    BlendSample,
    BlendVerify,
    Sample,
    blend,
    blend_sample,
    blend_verify,
    sample,
)
from .schedules import BlendBudget, PrefixLength
from .support import TopK
from .weighting import drift_gate, special_token_mask

__all__ = [
    "Blend",
    "BlendBudget",
    "BlendSample",
    "BlendVerify",
    "PrefixLength",
    "Projection",
    "Sample",
    "TopK",
    "__version__",
    "aopd",
    "blend",
    "blend_sample",
    "blend_verify",
    "drift_gate",
    "entropy",
    "eopd",
    "forward_kl",
    "jsd",
    "k1",
    "k2",
    "k3",
    "lsm",
    "metrics",
    "nn",
    "reopold",
    "reverse_kl",
    "sample",
    "skew_kl",
    "special_token_mask",
    "token_logprobs",
    "topk",
    "tropd",
]
