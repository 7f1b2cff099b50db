"""What of the installed TRL opdc has a hook in."""

from __future__ import annotations

import importlib
from typing import Any

from . import trainers

_MODULES = {
    "DistillationTrainer": "trl.trainer.distillation_trainer",
    "ServerDistillationTrainer": "trl.experimental.server_distillation",
    "AsyncDistillationTrainer": "trl.experimental.async_distillation.async_distillation_trainer",
    "GKDTrainer": "trl.experimental.gkd",
    "GOLDTrainer": "trl.experimental.gold",
    "IWOPDTrainer": "trl.experimental.iw_opd",
    "SDFTTrainer": "trl.experimental.sdft",
    "SDPOTrainer": "trl.experimental.sdpo",
    "SFTTrainer": "trl.trainer.sft_trainer",
}


def support() -> dict[str, str]:
    """For each trainer the paths that the installed TRL has, or why there is none.

    It imports TRL's trainers, which takes a few seconds.

    >>> import opdc.trl
    >>> opdc.trl.support()["DistillationTrainer"]
    'hidden, logits'
    """
    return {name: _paths(name) for name in trainers.ADAPTERS}


def _paths(name: str) -> str:
    try:
        module = importlib.import_module(_MODULES[name])
        kind: Any = getattr(module, name)
    except Exception as error:  # whatever a trainer of another version needs and lacks
        return f"none: {type(error).__name__}: {error}".splitlines()[0]
    if name == "DistillationTrainer":
        lacking = trainers.DistillationHidden.lacks(kind, module)
        return "hidden, logits" if lacking is None else f"logits ({lacking})"
    if name == "AsyncDistillationTrainer":
        lacking = trainers.Async.lacks(kind, module)
        return "hidden" if lacking is None else f"none: {lacking}"
    adapter = trainers.ADAPTERS[name]
    method = adapter.SOURCE if issubclass(adapter, trainers.Server) else adapter.method
    return "logits" if hasattr(kind, method) else f"none: no {name}.{method}"
