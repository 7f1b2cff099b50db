"""Where tensors have to be for the processes of a group to exchange them."""

from __future__ import annotations

import torch
import torch.distributed as dist

CPU = torch.device("cpu")


def exchangeable(group: dist.ProcessGroup | None, *wanted: torch.device) -> torch.device:
    """The first of the devices whose tensors the backend of the group takes, NCCL those of GPUs
    alone; the current device of the first kind that it takes if that is none of them."""
    kinds = [entry.partition(":")[0] for entry in dist.get_backend_config(group).split(",")]
    for device in wanted:
        if device.type in kinds:
            return device
    if "cpu" in kinds:
        return CPU
    return torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())
