"""Describes a layer's rotary embedding, from transformers' ``rope_parameters``."""

from __future__ import annotations

import ast
import functools
import inspect
import math
import sys
import textwrap
from collections.abc import Hashable, Mapping
from types import CodeType
from typing import Any, cast

import torch
from torch import nn

from veneer.model.blueprint.parts import Temperature
from veneer.model.blueprint.rotary import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rotary,
    Scaling,
    YarnScaling,
)
from veneer.model.blueprint.source import BlockSource
from veneer.model.inplace import plain_class

KNOWN = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate", "attention_factor",
        "mscale", "mscale_all_dim",
    ),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings", "attention_factor", "factor"),
}  # fmt: skip
EVERYWHERE = (
    "rope_theta", "rope_type", "type", "partial_rotary_factor", "max_position_embeddings",
    "mrope_section", "mrope_interleaved",  # axes of images: on text all have the same position
)  # fmt: skip
ALPHA = "alpha"
ROTATE = "apply_rotary_pos_emb"  # the function of every family
TEMPERATURE = "llama_4_scaling_beta"


def read_rotary(source: BlockSource, layer_type: str | None, head_dim: int) -> Rotary | str | None:
    """Return the rotary embedding of a layer of this type, or None if the layer has none.

    Return the reason (str) if the rotation cannot be described.
    """
    config = source.config
    given = getattr(config, "rope_parameters", None)
    if given is None:
        return _from_rotary_dim(source, head_dim)
    if layer_type is not None and layer_type in given:
        given = given[layer_type]
        if given is None:
            return None
    if not isinstance(given, Mapping) or not given.get("rope_theta"):
        return f"its rope_parameters are {given!r}, with no rope_theta"
    kind = str(given.get("rope_type") or "default")
    if kind not in KNOWN:
        return f"its rotation is of type {kind}, where {', '.join(KNOWN)} are known"
    known = {*EVERYWHERE, *(_ANY if kind == "default" else KNOWN[kind])}
    alpha = given.get(ALPHA) if kind == "dynamic" and source.family.stretches_theta else None
    known |= {ALPHA, *_ANY} if alpha else set()
    known |= {TEMPERATURE} if source.family.scales_queries else set()
    stray = [key for key, value in given.items() if key not in known and value is not None]
    if stray:
        return f"its rope_parameters hold {', '.join(stray)}, which rotation of type {kind} does not know"
    turning = int(head_dim * float(given.get("partial_rotary_factor") or 1.0))
    if turning % 2:
        return f"its partial_rotary_factor={given.get('partial_rotary_factor')} turns {turning} of {head_dim} numbers"
    dim = _dim(source, layer_type) or turning
    return Rotary(
        dim=dim,
        theta=float(given["rope_theta"]) * (float(alpha) ** (dim / (dim - 2)) if alpha else 1.0),
        max_positions=int(config.max_position_embeddings),
        interleaved=source.family.interleaved,
        scaling=None if alpha else _scaling(kind, given, int(config.max_position_embeddings)),
    )


_ANY = {key for keys in KNOWN.values() for key in keys}  # what the type default leaves unused


def _from_rotary_dim(source: BlockSource, head_dim: int) -> Rotary | None:
    """Return GPT-J's rotary embedding, whose only setting is the number of rotated dimensions. If that is None, all
    rotate.
    """
    if not hasattr(source.config, "rotary_dim"):
        return None
    return Rotary(
        dim=source.config.rotary_dim or head_dim,
        theta=10000.0,
        max_positions=int(source.config.max_position_embeddings),
        interleaved=source.family.interleaved,
    )


def _dim(source: BlockSource, layer_type: str | None) -> int | None:
    """Return the number of rotated dimensions, looked up once for each layer type."""
    if layer_type not in source.rotary_dims:
        source.rotary_dims[layer_type] = _dim_of_table(source, layer_type)
    return source.rotary_dims[layer_type]


def _dim_of_table(source: BlockSource, layer_type: str | None) -> int | None:
    """Return the number of rotated dimensions, inferred from the shape of the model's own frequencies."""
    for module in source.model.get_decoder().modules():  # a tower of images has frequencies of its own
        if "rotary" in type(module).__name__.lower():
            names = ("inv_freq", f"{layer_type}_inv_freq")
            found = next((getattr(module, name) for name in names if hasattr(module, name)), None)
            if found is not None:
                return 2 * int(found.shape[0])
    return None


def _scaling(kind: str, given: Mapping[str, Any], max_positions: int) -> Scaling | None:
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(factor=float(given["factor"]))
    if kind == "dynamic":
        return DynamicScaling(factor=float(given["factor"]))
    original = int(given["original_max_position_embeddings"])
    factor = float(given.get("factor") or max_positions / original)
    if kind == "llama3":
        return Llama3Scaling(
            factor=factor,
            low_freq_factor=float(given["low_freq_factor"]),
            high_freq_factor=float(given["high_freq_factor"]),
            original_max_positions=original,
        )
    if kind == "yarn":
        return YarnScaling(
            factor=factor,
            original_max_positions=original,
            beta_fast=float(given.get("beta_fast") or 32),
            beta_slow=float(given.get("beta_slow") or 1),
            truncate=bool(given.get("truncate", True)),
            attention_factor=_yarn_factor(given, factor),
        )
    long_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return LongRopeScaling(
        short=tuple(map(float, given["short_factor"])),
        long=tuple(map(float, given["long_factor"])),
        original_max_positions=original,
        attention_factor=float(long_factor if given.get("attention_factor") is None else given["attention_factor"]),
    )


def _yarn_factor(given: Mapping[str, Any], factor: float) -> float:
    """Return the factor of cos and sin: the given one, or one computed from the logarithm of the scaling factor."""
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    own, all_dim = given.get("mscale"), given.get("mscale_all_dim")
    return _mscale(factor, own) / _mscale(factor, all_dim) if own and all_dim else _mscale(factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def read_temperature(source: BlockSource) -> Temperature | None:
    """Return how queries are scaled up with their position, or None in families that do not do so."""
    given = getattr(source.config, "rope_parameters", None) or {}
    if not source.family.scales_queries or not given.get(TEMPERATURE):
        return None
    return Temperature(
        beta=float(given[TEMPERATURE]), original_max_positions=int(given["original_max_position_embeddings"])
    )


def turns_of(attention: nn.Module) -> dict[str, Any]:
    """Return the fields of `Rotary` that an attention's ``rotate_half`` shows by its outputs: neighbouring numbers are
    pairs, or pairs turn backwards.
    """
    beside = vars(sys.modules.get(type(attention).__module__, object))
    code = getattr(beside.get(ROTATE), "__code__", None)
    called = () if code is None else code.co_names
    name = next((name for name in called if name.startswith("rotate_half")), "rotate_half")
    rotate_half = beside.get(name)
    if rotate_half is None:
        return {}
    turned = rotate_half(torch.arange(1.0, 5.0)).tolist()
    return {name: True for name, form in _TURNED.items() if turned == form}


_TURNED = {"interleaved": [-2.0, 1.0, -4.0, 3.0], "backwards": [3.0, 4.0, -1.0, -2.0]}  # of the numbers 1 to 4


def rotates(source: BlockSource, attention: nn.Module, layer: int) -> bool:
    """Return True if a layer applies rotary embedding. Some models omit it in every fourth layer (SmolLM3)."""
    named = bool(getattr(attention, "use_rope", True)) and source.family.rotates(source.config, layer)
    condition = _condition(cast(Hashable, plain_class(type(attention))))
    return named and (condition is None or bool(eval(condition, {"self": attention})))  # of its own fields alone


@functools.cache
def _condition(kind: Hashable) -> CodeType | None:
    """Return the condition on a module's fields under which its forward rotates, or None if it has no
    such condition.
    """
    try:
        code = ast.parse(textwrap.dedent(inspect.getsource(cast(Any, kind).forward)))
    except (OSError, TypeError, SyntaxError):
        return None
    for node in ast.walk(code):
        if isinstance(node, ast.If) and any(_names(part) & {ROTATE} for part in node.body):
            plain = _names(node.test) == {"self"} and not any(isinstance(n, ast.Call) for n in ast.walk(node.test))
            return compile(ast.Expression(node.test), "<rotation>", "eval") if plain else None
    return None


def _names(code: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(code) if isinstance(node, ast.Name)}
