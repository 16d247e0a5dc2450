"""Facts about a model folder, from file headers and a plain config; torch is not imported."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from veneer.disk.safetensors_header import read_entries
from veneer.model.blueprint.part_names import TensorPart, part_by_name
from veneer.store.checkpoint_files import tensors_in

NF4_BITS = 4.127  # Dettmers et al. 2023 (arXiv:2305.14314): 4 + 8/64 + 32/(64·256) bits with double quantization
_SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
_TOLD = {*_SHAPE, "vocab_size", "max_position_embeddings"}
_PLAIN = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Types of model whose description follows from these fields, if no other changes their attention."""
_MOST_THETA = 1e30  # a whole number of JSON may be too large for a float
_CHANGES = ("quantization_config", "partial_rotary_factor", "auto_map", "layer_types", "rope_scaling")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Facts about a model: its config as a mapping, its architecture in words by label, and numbers of parameters by
    part.

    ``nbytes_4bit`` is the model's size with NF4 linear layers. ``described`` is empty if the architecture is not known.
    ``quantization`` is the format of a quantized model.
    """

    config: Mapping[str, Any]
    described: Mapping[str, str]
    parameters: Mapping[str, int]
    n_bytes: int
    nbytes_4bit: int | None
    dtypes: tuple[str, ...]
    quantization: str | None = None


class Counted(Protocol):
    """Tensor of known shape and type."""

    @property
    def dtype(self) -> object: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def plain_facts(folder: Path) -> ModelFacts | None:
    """Return the facts of a dense model folder with a plain config; None if transformers must read its config.

    ``config`` holds the fields of the file alone. Raises FormatError if weights are missing or damaged.
    """
    config = _config(folder)
    described = None if config is None else _described(config)
    if config is None or described is None or (folder / "blocks.json").is_file():
        return None
    tensors = tensors_in(folder, read_entries)
    parts = {name: part_by_name(name) for name in tensors}
    return ModelFacts(
        config=config,
        described=described,
        parameters=sums({name: n_values_of([tensor]) for name, tensor in tensors.items()}, parts),
        n_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        nbytes_4bit=sum(bytes_4bit(tensor, parts[name]) for name, tensor in tensors.items()),
        dtypes=dtypes_of(tensors.values()),
    )


def _config(folder: Path) -> dict[str, Any] | None:
    """Return a model config's fields; None if it cannot be read, which transformers reports later."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _described(config: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the facts that a plain decoder's config states, as texts by label ("layers", "head width"). Return None
    for a config with windows, scaled rotary embeddings or another special feature.
    """
    numbers = [config.get(name) for name in _TOLD]
    if config.get("model_type") not in list(_PLAIN) or any(config.get(name) is not None for name in _CHANGES):
        return None
    if not all(type(number) is int and number > 0 for number in numbers) or _has_windows(config):
        return None
    if type(config.get("tie_word_embeddings")) is not bool or not isinstance(config.get("architectures"), list):
        return None
    theta, width = _theta(config), _head_width(config)
    if theta is None or width is None:
        return None
    return {
        "layers": f"{config['num_hidden_layers']}",
        "attention heads": f"{config['num_attention_heads']:,}",
        "key/value heads": f"{config['num_key_value_heads']:,}",
        "head width": f"{width:,}",
        "rotary": f"theta {theta:,g}",
    }


def _has_windows(config: Mapping[str, Any]) -> bool:
    """Return True unless the config says that every layer sees all tokens."""
    if config["model_type"].startswith("qwen"):
        return config.get("use_sliding_window", False) is not False
    return config.get("sliding_window", 0 if config["model_type"] == "mistral" else None) is not None


def _theta(config: Mapping[str, Any]) -> float | None:
    """Return the base of the rotary embedding; None if the embedding is scaled."""
    rope = config.get("rope_parameters", {"rope_theta": config.get("rope_theta")})
    if not isinstance(rope, dict) or rope.keys() - {"rope_theta", "rope_type"}:
        return None
    theta = rope.get("rope_theta")
    if rope.get("rope_type", "default") != "default" or not isinstance(theta, int | float) or isinstance(theta, bool):
        return None
    return float(theta) if 0 < theta < _MOST_THETA else None


def _head_width(config: Mapping[str, Any]) -> int | None:
    """Return the width of a head: as given, or hidden size / heads if the model type computes it so."""
    given, heads = config.get("head_dim"), config["num_attention_heads"]
    if given is not None:
        return given if type(given) is int and given > 0 else None
    return None if config["model_type"] == "qwen3" or config["hidden_size"] % heads else config["hidden_size"] // heads


def sums(values: Mapping[str, int], parts: Mapping[str, TensorPart]) -> dict[str, int]:
    """Return the number of values of each part, the largest number first."""
    counts: Counter[str] = Counter()
    for name, n_values in values.items():
        counts[parts[name]] += n_values
    return dict(counts.most_common())


def bytes_4bit(tensor: Counted, part: TensorPart) -> int:
    """Return the number of bytes that a tensor takes if the linear layers are in NF4 and all else is in 16 bits."""
    in_4bit = len(tensor.shape) == 2 and part in ("attention", "feed-forward", "other")
    return round(n_values_of([tensor]) * NF4_BITS / 8) if in_4bit else 2 * n_values_of([tensor])


def n_values_of(tensors: Iterable[Counted]) -> int:
    """Return the total number of values in tensors."""
    return sum(math.prod(tensor.shape) for tensor in tensors)


def dtypes_of(tensors: Iterable[Counted]) -> tuple[str, ...]:
    """Return the names of the types of tensors, each once."""
    return tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
