"""Quantized layers of a checkpoint, as its ``quantization_config`` describes them."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar

import torch

from veneer.errors import ConfigError, FormatError
from veneer.quant.spec import StorageSpec
from veneer.quant.stack import StackSpec
from veneer.store.checkpoint import Stored

Settings = Mapping[str, Any]
StoredParts = Mapping[str, Stored]
_SAID = frozenset({"quant_method", "dequantize", "run_compressed"})


class StoredLayers(ABC):
    """Description of a checkpoint's quantized layers.

    ``parts`` are the last parts of the names of a layer's tensors. Every quantized layer has a tensor that ends in one
    of ``marks``.
    """

    parts: ClassVar[frozenset[str]]
    marks: ClassVar[frozenset[str]]
    skips_head: ClassVar[bool] = True

    @property
    @abstractmethod
    def label(self) -> str:
        """Format in a few words."""

    @property
    def left_out(self) -> list[str] | None:
        """Modules that stay dense, as names and patterns of transformers; None if the settings name none."""
        return None

    @property
    def quantizes_activations(self) -> bool:
        """Return True if the checkpoint is meant for quantized activations, which veneer does not quantize."""
        return False

    @abstractmethod
    def spec(self, path: str, shape: tuple[int, int], dtype: torch.dtype) -> StorageSpec | None:
        """Return the storage format of the layer at a path; None if the settings leave it dense."""

    def stack(self, name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> StackSpec | None:
        """Return the storage format of experts (experts, o, i) stacked in the files under a name; None if there is
        none.
        """
        return None

    def is_stack(self, layer: str) -> bool:
        """Return True if ``layer``, a key of `grouped`, is a stack of experts."""
        return False

    @abstractmethod
    def shape(self, path: str, parts: StoredParts) -> tuple[int, ...]:
        """Return the shape of the weight of a layer (o, i) or a stack (experts, o, i), inferred from its tensors."""

    def grouped(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """Group tensor names by quantized layer: ``{layer: {part: name}}``."""
        found: dict[str, dict[str, str]] = {}
        for name in names:
            layer, _, part = name.rpartition(".")
            if part in self.parts:
                found.setdefault(layer, {})[part] = name
        return {layer: parts for layer, parts in found.items() if self.marks & parts.keys()}


def require_known(method: str, settings: Settings, known: Collection[str], problems: Collection[str] = ()) -> None:
    """Raise one ConfigError for settings outside ``known`` and for the ``problems`` of known ones.

    Unknown settings that are null, false or empty are ignored.
    """
    unknown = sorted(name for name in settings.keys() - set(known) - _SAID if settings[name])
    said = [f"{name}={settings[name]!r:.80} is unknown" for name in unknown] + list(problems)
    if said:
        raise ConfigError(
            f"quantization_config of config.json ({method}) is not supported: {'; '.join(said)}. Correct it, or load "
            "a 16-bit copy of the model"
        )


def matrix(tensor: Stored) -> tuple[int, int]:
    """Return the shape of a stored matrix. Raises FormatError for another number of dimensions."""
    if len(tensor.shape) != 2:
        raise FormatError(
            f"{tensor.path}: tensor {tensor.name!r} has the shape {tensor.shape}: it should be a matrix. Fetch it again"
        )
    return tensor.shape[0], tensor.shape[1]


def is_count(value: object) -> bool:
    """Return True for a whole number above zero."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def choice_problems(settings: Settings, **allowed: Collection[object]) -> list[str]:
    """Return the problems of settings that are given and not among the allowed values."""
    return [
        f"{key}={settings[key]!r:.80} must be one of {list(values)}"
        for key, values in allowed.items()
        if settings.get(key) is not None and settings[key] not in values
    ]


def group_problems(settings: Settings, key: str = "group_size") -> list[str]:
    """Return a problem if a group size is neither a whole number above zero nor -1 (a row)."""
    size = settings.get(key)
    if size is None or size == -1 or is_count(size):
        return []
    return [f"{key}={size!r} must be a whole number above zero, or -1 for a group a row"]


def pattern_problems(pattern: str) -> list[str]:
    """Return a problem if a text is not a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        return [f"{pattern!r:.80} must be a regular expression ({error})"]
    return []


def names_problem(settings: Settings, *keys: str) -> list[str]:
    """Return the problems of settings that must be lists of module names, or None."""
    return [
        f"{key}={settings[key]!r:.80} must be a list of module names"
        for key in keys
        if settings.get(key) is not None
        and not (isinstance(settings[key], list) and all(isinstance(name, str) for name in settings[key]))
    ]
