"""Advice in errors about recipes: the part where a key belongs, other tools' terms, and values that must
be mistakes.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, TypeGuard

import yaml

MOST_RATE = 10.0  # no method trains with a larger one
_ODD_TIMES = 100  # a rate so many times the method's usual one is perhaps a slip
_METHODS = {
    "qlora": "LoRA on a base in 4 bits: say adapter.method: lora and model.quantization: nf4",
    "qdora": "DoRA on a base in 4 bits: say adapter.method: dora and model.quantization: nf4",
}
_QUANTIZATIONS = {
    "4bit": "nf4",
    "int4": "nf4",
    "bnb-4bit": "nf4",
    "load_in_4bit": "nf4",
    "qlora": "nf4",
    "8bit": "int8",
}
_GOING_ON = ("path", "folder", "resume", "checkpoint", "adapter", "name_or_path", "pretrained")
_ENUM = re.compile(r"\b[A-Z]\w*(?:Strategy|Type|Names|Mode)\.([A-Z_0-9]+)\b")
_FLAG = re.compile(r"(?<![\w-])--([a-z]\w+)")


def meant_method(name: str) -> str:
    """Return the end of the message that refuses an unknown method: ``; it is …`` and the keys to set.

    It is empty unless ``name`` is another tool's name for a method of veneer.
    """
    said = _METHODS.get(name.lower())
    return f"; it is {said}" if said else ""


def meant_quantization(value: object) -> str:
    """Return the end of the message that refuses an unknown storage format: ``; say nf4``, for example.

    It is empty unless ``value`` is another tool's name for a format of veneer.
    """
    said = _QUANTIZATIONS.get(str(value).lower())
    return f"; say {said}" if said else ""


def goes_on(key: str) -> bool:
    """Return True for a key of ``adapter`` that people use for a saved adapter to train further, such as
    ``checkpoint``.
    """
    return key in _GOING_ON


def belongs(key: str, part: str) -> str:
    """Return the end of a message about a key that belongs to another part: ``; say training.learning_rate``."""
    homes = [f"{home}.{key}" if home else key for home, keys in _usual_keys().items() if home != part and key in keys]
    return f"; it belongs elsewhere: {' or '.join(homes)}" if homes else ""


@cache
def _usual_keys() -> Mapping[str, frozenset[str]]:
    """Return the keys of each part in the commented recipe, including those that are commented out."""
    text = (resources.files("veneer.recipe") / "recipe.yaml").read_text(encoding="utf-8")
    usual = yaml.safe_load(re.sub(r"^( +)# (\w+: )", r"\1\2", text, flags=re.M))
    parts = {name: frozenset(value) for name, value in usual.items() if isinstance(value, dict)}
    return {**parts, "": frozenset(usual) - parts.keys()}


def in_recipe_words(message: str) -> str:
    """Reword another library's message about training arguments in the terms of a recipe."""
    plain = _ENUM.sub(lambda match: match.group(1).lower(), message)
    return " ".join(_FLAG.sub(r"training.\1", plain).split())


def value_problems(values: Mapping[str, Any]) -> list[str]:
    """Return the problems of values whose types are right but which must be mistakes."""
    adapter, training, model = (_part(values, name) for name in ("adapter", "training", "model"))
    found = []
    alpha = adapter.get("lora_alpha")
    if _is_number(alpha) and alpha <= 0:
        what = "would have no effect" if alpha == 0 else "would be subtracted"
        found.append(f"adapter.lora_alpha: {alpha} must be above 0: the update {what}")
    rate = training.get("learning_rate")
    if _is_number(rate) and rate > MOST_RATE:
        found.append(f"training.learning_rate: {rate:g} must be at most {MOST_RATE:g}; perhaps 2e-4 is meant")
    optim, method = str(training.get("optim", "")), str(adapter.get("method", "lora"))
    if "galore" in optim and method != "full":
        found.append(
            f"training.optim: {optim} projects the gradients of whole weights, and method {method} trains none: take "
            "adamw_torch or adamw_8bit, or method full"
        )
    if model.get("attention") == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        found.append(
            "model.attention: flash_attention_2 needs the package flash-attn, which is not installed: install it (it "
            "needs a CUDA device), or take sdpa"
        )
    return found


def odd_rate(rate: float, usual: float, method: str) -> str | None:
    """Return a warning if a learning rate is far above the usual ones of a method."""
    if rate <= _ODD_TIMES * usual:
        return None
    return (
        f"training.learning_rate {rate:g} is {rate / usual:,.0f} times the usual one of method {method} ({usual:g}): "
        "the loss may diverge"
    )


def _part(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = values.get(name)
    return part if isinstance(part, dict) else {}


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
