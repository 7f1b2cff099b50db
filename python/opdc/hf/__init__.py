"""Losses in `transformers.Trainer`, and behaviour policies inside `generate`.

`DistillLoss` is a `compute_loss_func` for `Trainer`; `projection` gives a model's own head to a
loss that starts from hidden states; `shared_vocabulary` compares two tokenizers.

`BlendSampler` goes into `model.generate(custom_generate=...)` and draws from the trust-region
behaviour policy of `opdc.blend`; what a loss needs of the rollouts is in its `last`, a `Rollout`.
`generating` does the same to code that calls `generate` itself. `BlendLogitsProcessor` is for code
that takes nothing but a logits processor.
"""

from __future__ import annotations

try:
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError("opdc.hf needs transformers: pip install '.[hf]'") from error

from .distill import DistillLoss
from .head import projection, shared_vocabulary
from .processor import BlendLogitsProcessor
from .rollout import Rollout, RolloutStatistics
from .sampler import BlendSampler, generating

__all__ = [
    "BlendLogitsProcessor",
    "BlendSampler",
    "DistillLoss",
    "Rollout",
    "RolloutStatistics",
    "generating",
    "projection",
    "shared_vocabulary",
]
