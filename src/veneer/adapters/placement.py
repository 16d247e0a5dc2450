"""Device of an adapter: its base's. PEFT's ``device_map`` is accepted if it names the same device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from veneer.errors import ConfigError

Device = str | int | torch.device
DeviceMap = Device | Mapping[str, Device] | None
_WHERE_THE_BASE_IS = ("auto", "balanced", "balanced_low_0", "sequential")


def require_same_place(model: nn.Module, device_map: DeviceMap) -> None:
    """Raise ConfigError if a ``device_map`` names no device, or one that does not hold the base model."""
    if device_map is None or device_map in _WHERE_THE_BASE_IS:
        return
    held = {parameter.device for parameter in model.parameters()}
    for given in device_map.values() if isinstance(device_map, Mapping) else (device_map,):
        device = _device(given)
        if device is None or not any(_same(device, own) for own in held):
            raise ConfigError(
                f"device_map={device_map!r} differs from the base model's devices {sorted(map(str, held))}: an adapter "
                "follows its base. Leave device_map out, or give it to the from_pretrained of the base."
            )


def _device(given: Device) -> torch.device | None:
    try:
        return torch.device(given)
    except RuntimeError:  # "disk", or no device
        return None


def _same(named: torch.device, own: torch.device) -> bool:
    return named.type == own.type and named.index in (None, own.index)
