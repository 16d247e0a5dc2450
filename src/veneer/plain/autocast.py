"""Autocast of torch for code that may run on the meta device, for which torch has none and raises."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype that autocast now uses on a device; None if it is off."""
    on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which autocast is off on a device."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)
