"""Device on which models are loaded when nobody names one."""

from __future__ import annotations

import logging

import torch

from veneer.model.memory.gpu_failure import unusable_gpu

log = logging.getLogger(__name__)


def default_device() -> torch.device:
    """Return the current CUDA device if there is one, otherwise the CPU.

    If a GPU exists but cannot be used, a warning gives the reason.
    """
    if reason := unusable_gpu():
        log.warning("the CPU computes, not the GPU: %s", reason)
        return torch.device("cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def told_device(device: torch.device) -> str:
    """Return a device as text for people: its kind, or the name of its card, with its number if there are several."""
    if device.type != "cuda":
        return str(device)
    count = torch.cuda.device_count()
    return f"{device}, {torch.cuda.get_device_name(device)}" + (f", one of {count}" if count > 1 else "")
