"""veneer: parameter-efficient fine-tuning, from planning to serving."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "IA3Config": "veneer.methods.ia3",
    "LoraConfig": "veneer.methods.lora",
    "PeftModel": "veneer.adapters.peft_model",
    "SFTConfig": "veneer.train.config",
    "SFTTrainer": "veneer.train.trainer",
    "get_peft_model": "veneer.adapters.peft_model",
}

__all__ = ["IA3Config", "LoraConfig", "PeftModel", "SFTConfig", "SFTTrainer", "get_peft_model"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: ``import veneer`` stays fast."""
    if name not in _HOMES:
        raise AttributeError(f"module 'veneer' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
