"""Ranges of training settings. Outside of them a setting would have no effect, or an unintended one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_Range = tuple[Callable[[Any], bool], str]
_NOT_NEGATIVE: _Range = (lambda value: value >= 0, "at least 0")
_POSITIVE: _Range = (lambda value: value >= 1, "at least 1")
_SHARE: _Range = (lambda value: 0 <= value < 1, "at least 0 and below 1")
RANGES: Mapping[str, _Range] = {
    "learning_rate": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "label_smoothing_factor": _SHARE,
    "num_train_epochs": _NOT_NEGATIVE,
    "max_steps": (lambda value: value == -1 or value >= 1, "at least 1, or -1 to train num_train_epochs"),
    "per_device_train_batch_size": _POSITIVE,
    "per_device_eval_batch_size": _POSITIVE,
    "gradient_accumulation_steps": _POSITIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "warmup_steps": _NOT_NEGATIVE,
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": _NOT_NEGATIVE,
}

OF_LORA: Mapping[str, _Range] = {"r": _POSITIVE, "lora_dropout": _SHARE}
"""Ranges of fields that LoRA's config checks too, but only after torch is imported."""


def out_of_range(given: Mapping[str, Any], ranges: Mapping[str, _Range] = RANGES) -> dict[str, str]:
    """Return the allowed range, by name, of each setting that is outside of it. None is always allowed."""
    found = {}
    for name, value in given.items():
        fits, allowed = ranges.get(name, (lambda value: True, ""))
        if value is not None and not fits(value):
            found[name] = allowed
    return found
