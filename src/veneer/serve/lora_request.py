"""The adapter that a request takes. The name is vLLM's; the adapter may be of any method. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from veneer.errors import ConfigError


@dataclass(frozen=True)
class LoRARequest:
    """An adapter by name, number and folder (or hub id). Equal, and hashed, by name.

    What is served is what lies in the folder when a request is made: new files under an old name are another adapter
    (so that ``load_inplace`` need not be asked for), and requests in flight keep the one that they began with. Raises
    ConfigError.
    """

    lora_name: str
    lora_int_id: int = field(compare=False)
    lora_path: str = field(default="", compare=False)
    base_model_name: str | None = field(default=None, compare=False)
    load_inplace: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.lora_name, str) or not self.lora_name:
            raise ConfigError(f"LoRARequest: lora_name={self.lora_name!r} must be a name")
        if not isinstance(self.lora_int_id, int) or isinstance(self.lora_int_id, bool) or self.lora_int_id < 1:
            raise ConfigError(f"LoRARequest {self.lora_name!r}: lora_int_id={self.lora_int_id!r} must be 1 or more")
        if not isinstance(self.lora_path, (str, os.PathLike)) or not str(self.lora_path):
            raise ConfigError(
                f"LoRARequest {self.lora_name!r}: lora_path={self.lora_path!r} must be the adapter's folder"
            )
        object.__setattr__(self, "lora_path", os.fspath(self.lora_path))

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.lora_name

    @property
    def adapter_id(self) -> int:
        """The adapter's number."""
        return self.lora_int_id

    @property
    def path(self) -> str:
        """The adapter's folder."""
        return self.lora_path
