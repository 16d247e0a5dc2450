"""GGUF keys for a config: a family's table, applied forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gguf import GGUFValueType
from torch import Tensor

from veneer.store.gguf.family import GgufFamily
from veneer.store.gguf.fields import LENGTH, ROTARY_WIDTH, WINDOW_PATTERN, Field
from veneer.store.gguf.rope import Scaling, said_scaling

_CUT = (
    "every layer sees only the last {length} tokens (sliding_window), but the runtime has no such window: the file "
    "says context_length {length} instead of {longest}. Up to {length} tokens answers equal the model's; beyond, they "
    "differ"
)
_KINDS = {int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32, bool: GGUFValueType.BOOL}


@dataclass(frozen=True, slots=True)
class KeyValue:
    """Key and value; ``item`` is the type of an array's values."""

    key: str
    value: Any
    kind: GGUFValueType
    item: GGUFValueType | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """Config in GGUF form: pairs, tensors of rotary factors by name, problems, and notes for the file's user."""

    pairs: tuple[KeyValue, ...]
    factors: Mapping[str, Tensor]
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()


def said_of(family: GgufFamily, config: Any) -> Said:
    """Return the GGUF form of a transformers config, without writing anything."""
    scaling = _scaling(family, config)
    problems = (*_unsaid(family, config), *family.refuses(config), *_query_problems(family, config), *scaling.problems)
    prefix = f"{family.architecture}."
    found = [*_field_pairs(family, config), *_rotary_pairs(family, config, scaling), *_window_pairs(family, config)]
    length = _window_of_all(family, config)
    if length is not None:
        found = [replace(pair, value=length) if pair.key == LENGTH.key else pair for pair in found]
    pairs = tuple(replace(pair, key=prefix + pair.key) for pair in found)
    cut = () if length is None else (_CUT.format(length=length, longest=config.max_position_embeddings),)
    return Said(pairs=pairs, factors=scaling.factors, problems=problems, notes=(*cut, *scaling.notes))


def value_of(entry: Field, config: Any) -> Any:
    """Return the value that the file gets for a field. If the config's number is None, it is the field's ``implied``
    number, or ``off`` without one.
    """
    value: Any = config
    for part in entry.path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
        if value is None:
            return entry.off if entry.implied is None else entry.implied(config)
    return value


def head_width(config: Any) -> int:
    """Return the width of a head."""
    given: int | None = getattr(config, "head_dim", None)
    return given or config.hidden_size // config.num_attention_heads


def rotary_width(family: GgufFamily, config: Any) -> int:
    """Return the number of values in a head that rotate."""
    parameters = value_of(Field("", family.rotary or ""), config) or {}
    return int(head_width(config) * (parameters.get("partial_rotary_factor") or 1.0))


def _field_pairs(family: GgufFamily, config: Any) -> Iterator[KeyValue]:
    once = {entry.key: entry for entry in reversed(family.fields)}  # a key may fill two fields
    for entry in reversed(once.values()):
        value = value_of(entry, config)
        if value is not None:
            yield KeyValue(entry.key, entry.kind(value), _KINDS[entry.kind])


def _rotary_pairs(family: GgufFamily, config: Any, scaling: Scaling) -> Iterator[KeyValue]:
    for key, value in scaling.pairs.items():
        kind = GGUFValueType.STRING if isinstance(value, str) else _KINDS[type(value)]
        yield KeyValue(key, value, kind)
    if family.rotary_width:
        yield KeyValue(ROTARY_WIDTH, rotary_width(family, config), GGUFValueType.UINT32)


def _window_pairs(family: GgufFamily, config: Any) -> Iterator[KeyValue]:
    """Yield the key that lists the layers with sliding windows, unless llama.cpp assumes the same layers without the
    key.
    """
    if family.window_step is None:
        return
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    step = family.window_step
    if not step or slides != [(layer + 1) % step != 0 for layer in range(len(slides))]:
        yield KeyValue(WINDOW_PATTERN, slides, GGUFValueType.ARRAY, GGUFValueType.BOOL)


def _window_of_all(family: GgufFamily, config: Any) -> int | None:
    """Return the sliding window of all layers, in tokens, if llama.cpp would ignore it and texts can be longer than it.
    Otherwise return None.
    """
    window: int | None = getattr(config, "sliding_window", None) if family.cut_to_window else None
    return window if window and window < config.max_position_embeddings else None


def _scaling(family: GgufFamily, config: Any) -> Scaling:
    if family.rotary is None:
        return Scaling()
    parameters = value_of(Field("", family.rotary), config) or {}
    mscale = any(entry.path.endswith(".mscale_all_dim") for entry in family.fields)
    found = said_scaling(parameters, rotary_width(family, config), config, family.scalings, mscale)
    problems = list(found.problems)
    if family.sliding_rotary is not None:
        sliding = value_of(Field("", family.sliding_rotary), config) or {}
        if sliding.get("rope_type", "default") != "default":
            problems.append(f"rotary scaling {sliding['rope_type']!r} of the layers with windows has no key")
    if not family.partial_rotary and rotary_width(family, config) != head_width(config):
        problems.append(f"partial_rotary_factor {parameters['partial_rotary_factor']} has no key in this family")
    return Scaling(found.pairs, found.factors, tuple(problems), found.notes)


def _unsaid(family: GgufFamily, config: Any) -> Iterator[str]:
    for name, allowed in family.only.items():
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            wanted = " or ".join(repr(each) for each in allowed)
            yield f"{name} {value!r} has no key: the runtime computes {wanted}"


def _query_problems(family: GgufFamily, config: Any) -> Iterator[str]:
    """Yield a problem if queries are scaled by a number that no key can hold."""
    if family.query_width_layers is None:
        return
    whole = config.num_hidden_layers == family.query_width_layers
    width = config.hidden_size // config.num_attention_heads if whole else head_width(config)
    if config.query_pre_attn_scalar != width:
        yield f"query_pre_attn_scalar {config.query_pre_attn_scalar} has no key: the runtime computes {width}"
