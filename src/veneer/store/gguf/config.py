"""Config of a GGUF file's model: transformers' reading of the file, corrected from the file's keys."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import gguf
import torch
from torch import Tensor

from veneer.errors import FormatError
from veneer.store.gguf import rope as gguf_rope
from veneer.store.gguf.family import GgufFamily
from veneer.store.gguf.fields import FACTOR_TENSORS, NEUTRAL, ROTARY_WIDTH, SCALING, SILENT, WINDOW_PATTERN
from veneer.store.gguf.registry import by_architecture


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufContents:
    """Description of a model in a GGUF file.

    ``pairs`` are values by key, without the architecture's prefix. ``shapes`` are those of the tensors, in torch's
    order of axes. ``factors`` are float32 tensors of rotary frequency factors, by name.
    """

    architecture: str
    pairs: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    factors: Mapping[str, Tensor]


def mended_config(config: Any, contents: GgufContents, family: GgufFamily | None = None) -> Any:
    """Return a config that computes the file's model, made from the one that transformers reads.

    If ``family`` is None, it is the family that transformers reads for the file's architecture. Raises FormatError,
    with every key at once, if the family's code does not compute the file's model.
    """
    family = family or by_architecture().get(contents.architecture)
    if family is None:
        _raise(contents, list(_unknown_scaling(contents)))
        return config
    _raise(contents, list(_problems(family, contents)))
    values = config.to_dict()
    _fill(values, _renamed(family, type(config).attribute_map), contents)
    return type(config).from_dict(values)


def unplaced_tensors(model: Any, contents: GgufContents) -> list[str]:
    """Return the names of the file's tensors that belong to no parameter of the model; [] for architectures without a
    table.
    """
    family = by_architecture().get(contents.architecture)
    if family is None:
        return []
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == contents.architecture)
    names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    prefix = f"{model.base_model_prefix}."
    placed = {
        names.get_name(form, (".weight", ".bias")) for name in model.state_dict()
        for form in (name, name.removeprefix(prefix))
    }  # fmt: skip
    return sorted(
        name
        for name in contents.shapes
        if name not in placed and name not in FACTOR_TENSORS and _leaf(name) not in family.experts
    )


def _renamed(family: GgufFamily, names: Mapping[str, str]) -> GgufFamily:
    """Rename the family's paths to this config's names (``n_embd`` for ``hidden_size``)."""
    return replace(
        family, fields=tuple(replace(entry, path=names.get(entry.path, entry.path)) for entry in family.fields)
    )


def _raise(contents: GgufContents, problems: list[str]) -> None:
    if problems:
        raise FormatError(
            f"this {contents.architecture} file has settings that its model in transformers does not compute: "
            + "; ".join(problems)
        )


def _unknown_scaling(contents: GgufContents) -> Iterator[str]:
    """Yield a text for each rotary scaling setting of a file whose architecture has no table in ``families``. A model
    built from the file would ignore these settings.
    """
    kind = contents.pairs.get(SCALING + "type", "none")
    if kind != "none" or contents.pairs.get(SCALING + "factor", 1.0) != 1.0:
        yield f"{SCALING}type {kind!r}, factor {contents.pairs.get(SCALING + 'factor')}"
    yield from (f"the tensor {name}" for name in contents.factors)


def _problems(family: GgufFamily, contents: GgufContents) -> Iterator[str]:
    pairs = contents.pairs
    for key, value in pairs.items():
        if key in family.fixed:
            if value != family.fixed[key]:
                yield f"{key} {value} (only {family.fixed[key]} is known)"
        elif key in (ROTARY_WIDTH, "attention.key_length", "attention.value_length"):
            yield from _width_problems(key, value, family, pairs)
        elif not (_is_told(key, family) or value in NEUTRAL.get(key, ())):
            yield f"{key} {value}"
    if family.rotary is None:
        yield from (f"the tensor {name}" for name in contents.factors)


def _is_told(key: str, family: GgufFamily) -> bool:
    """Return True if the family's table translates a GGUF key into the config, or lists it as a key without effect."""
    told = SILENT | family.silent | {entry.key for entry in family.fields}
    if family.rotary is not None:
        told |= gguf_rope.KEYS
    return key in told or (key == WINDOW_PATTERN and family.windows)


def _width_problems(key: str, value: Any, family: GgufFamily, pairs: Mapping[str, Any]) -> Iterator[str]:
    head = _head_dim(pairs, family)
    partial = key == ROTARY_WIDTH and family.partial_rotary and isinstance(value, int) and value < head
    if value != head and not partial:
        yield f"{key} {value}, but a head is {head} wide"


def _head_dim(pairs: Mapping[str, Any], family: GgufFamily) -> int:
    own = "head_dim" in {entry.path for entry in family.fields}
    usual: int = pairs["embedding_length"] // pairs["attention.head_count"]
    if not own:
        return usual
    widths = (pairs.get("attention.key_length"), None if family.partial_rotary else pairs.get(ROTARY_WIDTH))
    return next((width for width in widths if width is not None), usual)


def _fill_left_out(values: dict[str, Any], family: GgufFamily, pairs: Mapping[str, Any]) -> None:
    """Set the number of key-value heads and the head width to llama.cpp's defaults, used if a file omits them.

    Without this, the config's class would derive both numbers from its own default sizes.
    """
    taken = {"num_key_value_heads": pairs["attention.head_count"], "head_dim": _head_dim(pairs, family)}
    own = {entry.path for entry in family.fields}
    values |= {name: number for name, number in taken.items() if name in own & values.keys()}


def _fill(values: dict[str, Any], family: GgufFamily, contents: GgufContents) -> None:
    pairs = contents.pairs
    _fill_left_out(values, family, pairs)
    for entry in family.fields:
        if entry.key in pairs:
            _set(values, entry.path, None if pairs[entry.key] == entry.off else pairs[entry.key])
    values["vocab_size"] = n_tokens = contents.shapes["token_embd.weight"][0]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # the class's own, where the file names none
        if isinstance(values.get(name), int) and values[name] >= n_tokens:
            values[name] = None
    leaves = {_leaf(name) for name in contents.shapes}
    values |= {switch: leaf in leaves for leaf, switch in family.biases.items()}
    if family.query_width_layers is not None:
        whole = pairs["block_count"] == family.query_width_layers
        values["query_pre_attn_scalar"] = (
            pairs["embedding_length"] // pairs["attention.head_count"] if whole else _head_dim(pairs, family)
        )
    if WINDOW_PATTERN in pairs:
        values["layer_types"] = _layer_types(pairs[WINDOW_PATTERN], pairs["block_count"])
    if family.rotary is not None:
        _fill_rotary(values, family, contents)


def _fill_rotary(values: dict[str, Any], family: GgufFamily, contents: GgufContents) -> None:
    pairs = contents.pairs
    head = _head_dim(pairs, family)
    width = pairs.get(ROTARY_WIDTH, head)
    parameters = _at(values, str(family.rotary))
    if family.partial_rotary:
        parameters["partial_rotary_factor"] = _share(width, head)
    for name in gguf_rope.OF_SCALING:
        parameters.pop(name, None)  # the class's own
    parameters["rope_type"] = "default"
    frequencies = parameters["rope_theta"] ** -(torch.arange(0, width, 2).float() / width)
    parameters |= gguf_rope.rotary_scaling(pairs, contents.factors, frequencies, values["max_position_embeddings"])


def _share(width: int, head: int) -> float:
    """Return a fraction f of the head width for which transformers' ``int(head * f)`` is exactly ``width``."""
    share = width / head
    return share if int(head * share) == width else math.nextafter(share, 2)


def _layer_types(pattern: int | list[bool], n_layers: int) -> list[str]:
    """Return each layer's attention type, "sliding_attention" or "full_attention".

    If ``pattern`` is a number n, every n-th layer has full attention. If it is a list, a layer has full attention where
    its entry is False.
    """
    slides = pattern if isinstance(pattern, list) else [(layer + 1) % pattern != 0 for layer in range(n_layers)]
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


def _at(values: dict[str, Any], path: str) -> dict[str, Any]:
    """Return the dict at a path, created if missing."""
    for part in path.split("."):
        values[part] = dict(values.get(part) or {})
        values = values[part]
    return values


def _set(values: dict[str, Any], path: str, value: Any) -> None:
    folder, _, name = path.rpartition(".")
    (_at(values, folder) if folder else values)[name] = value


def _leaf(name: str) -> str:
    """Return what follows the layer number in a tensor's name: ``attn_q.weight`` of ``blk.0.attn_q.weight``."""
    return name.split(".", 2)[-1]
