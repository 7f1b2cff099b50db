"""opdc in the trainers of TRL: one line after a trainer is built, and it trains with any loss.

    trainer = DistillationTrainer(model, teacher_model=teacher, args=args, train_dataset=prompts)
    opdc.trl.attach(trainer, opdc.nn.TrOPDLoss(k=64))
    trainer.train()

`attach` finds the hook of the trainer, `detach` leaves it as it was, `support` says what the
installed TRL has. `generalized_jsd_loss` and `chunked_divergence_loss` are TRL's own functions of
that name, computed by opdc.
"""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("trl") is None:
    raise ImportError("opdc.trl needs TRL: pip install 'trl>=1.16,<2'")

from .attaching import attach, detach
from .functions import chunked_divergence_loss, generalized_jsd_loss
from .installed import support

__all__ = [
    "attach",
    "chunked_divergence_loss",
    "detach",
    "generalized_jsd_loss",
    "support",
]
