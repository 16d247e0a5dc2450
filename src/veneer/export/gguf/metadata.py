"""``general.`` keys of a GGUF file: the model's name, its size, and recommended sampling settings."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from gguf import GGUFValueType, size_label

from veneer.store.gguf.keys import KeyValue

_SAMPLING = {
    "top_k": ("top_k", GGUFValueType.INT32),
    "top_p": ("top_p", GGUFValueType.FLOAT32),
    "min_p": ("min_p", GGUFValueType.FLOAT32),
    "temperature": ("temp", GGUFValueType.FLOAT32),
    "repetition_penalty": ("penalty_repeat", GGUFValueType.FLOAT32),
}
_CARD_LISTS = {"tags": "tags", "language": "languages"}


def name_of(model: str | os.PathLike[str]) -> str:
    """Return the name of a model or adapter without its path: a folder's, a file's, or a hub repository's.

    For the folder ``adapter`` of a run, return the run's name.
    """
    path = Path(model).resolve()
    name, _, _ = (path.parent if path.name == "adapter" else path).name.partition("@sha256:")
    return name.removesuffix(".gguf")


def general_pairs(folder: Path, name: str, architecture: str, shapes: Mapping[str, tuple[int, ...]]) -> list[KeyValue]:
    """Return architecture, sampling (``generation_config.json``), name, size, and the model card's facts as pairs."""
    return [
        KeyValue("general.architecture", architecture, GGUFValueType.STRING),
        KeyValue("general.type", "model", GGUFValueType.STRING),
        *_sampling(folder),
        KeyValue("general.name", name, GGUFValueType.STRING),
        KeyValue("general.size_label", _size(shapes), GGUFValueType.STRING),
        *_card(folder),
    ]


def file_pairs(number: int) -> list[KeyValue]:
    """Return the file's last pairs, which describe its quantization."""
    return [
        KeyValue("general.quantization_version", 2, GGUFValueType.UINT32),
        KeyValue("general.file_type", number, GGUFValueType.UINT32),
    ]


def sampling_settings(folder: Path) -> dict[str, Any]:
    """Return the sampling settings of ``generation_config.json``, by transformers' names."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    if not isinstance(content, dict):
        return {}
    return {name: content[name] for name in _SAMPLING if isinstance(content.get(name), int | float)}


def _sampling(folder: Path) -> Iterator[KeyValue]:
    for name, value in sampling_settings(folder).items():
        key, kind = _SAMPLING[name]
        yield KeyValue(f"general.sampling.{key}", int(value) if kind == GGUFValueType.INT32 else float(value), kind)


def _size(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the model's size in words: ``135M``, or ``8x7B`` for experts."""
    total = shared = experts = n_experts = 0
    for name, shape in shapes.items():
        n = 1
        for width in shape:
            n *= width
        total += n
        if "_exps." in name and len(shape) == 3:
            n_experts = shape[0]
            experts += n // shape[0]
        else:
            shared += n
    return size_label(total, shared, experts, n_experts)


def _card(folder: Path) -> Iterator[KeyValue]:
    """Yield the model card's licence, tags and languages."""
    found = _front_matter(folder / "README.md")
    if isinstance(found.get("license"), str):
        yield KeyValue("general.license", found["license"], GGUFValueType.STRING)
    for name, key in _CARD_LISTS.items():
        values = [found[name]] if isinstance(found.get(name), str) else found.get(name) or []
        if isinstance(values, list) and values and all(isinstance(value, str) for value in values):
            yield KeyValue(f"general.{key}", values, GGUFValueType.ARRAY, GGUFValueType.STRING)


def _front_matter(card: Path) -> dict[str, Any]:
    if not card.is_file():
        return {}
    start, *rest = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if start.strip() or len(rest) < 2:
        return {}
    try:
        found = yaml.safe_load(rest[0])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}
