"""Device on which models are loaded when nobody names one."""

from __future__ import annotations

import torch


def default_device() -> torch.device:
    """Return the current CUDA device if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def told_device(device: torch.device) -> str:
    """Return a device as people know it: its kind, and the name of the card."""
    return f"{device}, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)
