"""Adapter of a request. The name is vLLM's; the adapter may be of any method. No torch."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from veneer.errors import ConfigError
from veneer.serve.schedule.adapter_version import AdapterVersion


@dataclass(frozen=True)
class LoRARequest:
    """Adapter by name, number and folder (or hub id). Equality and hash are by name.

    A request gets the contents that the folder has at that time. New files under an old name are therefore another
    adapter, even without ``load_inplace``; requests in flight keep the earlier one. A mix (`LoRARequest.mix`) has no
    folder but ``parts``: adapters with their weights. An adapter with a given ``version``, loaded by `Engine.take`, has
    neither folder nor parts. Raises ConfigError.
    """

    lora_name: str
    lora_int_id: int = field(compare=False)
    lora_path: str = field(default="", compare=False)
    base_model_name: str | None = field(default=None, compare=False)
    load_inplace: bool = field(default=False, compare=False)
    parts: tuple[tuple[LoRARequest, float], ...] = field(default=(), compare=False, kw_only=True)
    version: AdapterVersion | None = field(default=None, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.lora_name, str) or not self.lora_name:
            raise ConfigError(f"LoRARequest: lora_name={self.lora_name!r} must be a text of at least one character")
        if not isinstance(self.lora_int_id, int) or isinstance(self.lora_int_id, bool) or self.lora_int_id < 1:
            raise ConfigError(f"LoRARequest {self.lora_name!r}: lora_int_id={self.lora_int_id!r} must be 1 or more")
        if self.parts:
            _require_parts(self)
        if self.parts or self.version is not None:
            return
        if not isinstance(self.lora_path, (str, os.PathLike)) or not str(self.lora_path):
            raise ConfigError(
                f"LoRARequest {self.lora_name!r}: lora_path={self.lora_path!r} must be the adapter's folder"
            )
        object.__setattr__(self, "lora_path", os.fspath(self.lora_path))

    @classmethod
    def mix(cls, name: str, number: int, parts: Sequence[tuple[LoRARequest, float]]) -> LoRARequest:
        """Return a weighted sum of adapters as one adapter, each at its own rank: PEFT's ``add_weighted_adapter(…,
        "cat")``.

        The order of the parts does not matter. Raises ConfigError for no parts, and for invalid adapters or weights.
        """
        given = tuple(parts)
        if not given:
            raise ConfigError(f"LoRARequest.mix({name!r}): there are no parts: give adapters with their weights")
        return cls(name, number, parts=given)

    @property
    def name(self) -> str:
        """Name of the adapter."""
        return self.lora_name

    @property
    def adapter_id(self) -> int:
        """Number of the adapter."""
        return self.lora_int_id

    @property
    def path(self) -> str:
        """Folder of the adapter."""
        return self.lora_path


def _require_parts(mix: LoRARequest) -> None:
    """Raise ConfigError if a mix also has a folder, or if a part is not an adapter with a weight."""
    if mix.lora_path:
        raise ConfigError(f"LoRARequest {mix.lora_name!r}: lora_path={mix.lora_path!r} beside parts: give one of them")
    for part in mix.parts:
        if not isinstance(part, tuple) or len(part) != 2 or not isinstance(part[0], LoRARequest) or part[0].parts:
            raise ConfigError(
                f"LoRARequest {mix.lora_name!r}: {part!r} must be a pair of a LoRARequest that is no mix and a weight"
            )
        weight = part[1]
        if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not math.isfinite(weight):
            raise ConfigError(
                f"LoRARequest {mix.lora_name!r}: the weight {weight!r} of {part[0].lora_name!r} must be a finite number"
            )
