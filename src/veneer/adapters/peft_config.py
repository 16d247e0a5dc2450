"""PEFT's general names for configs: a class for all of them, the enum of methods, a config from a dict."""

from __future__ import annotations

import os
from abc import ABC
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, cast

from veneer.contract import MethodConfig
from veneer.contract.config import from_values
from veneer.errors import ConfigError, FormatError
from veneer.methods import all_methods

# The methods that are here, each under the name that it has on disk; equal to the strings themselves.
PeftType = cast(Any, StrEnum)("PeftType", {name: name for name in all_methods()})


class PeftConfig(ABC):  # noqa: B024 - it is a name for isinstance, and a place to load from
    """Base of every method's config: ``isinstance(config, PeftConfig)`` holds for all of them."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **hub: Any) -> MethodConfig:
        """Return the config of a saved adapter, from a folder or a hub id; ``hub`` takes the fields of `HubOptions`."""
        return MethodConfig.from_pretrained(pretrained_model_name_or_path, **hub)


PeftConfig.register(MethodConfig)  # type: ignore[type-abstract]


def get_peft_config(config_dict: Mapping[str, Any]) -> MethodConfig:
    """Return the config from a dict with the fields of an ``adapter_config.json``, ``peft_type`` among them.

    Raises ConfigError that lists every problem.
    """
    try:
        return from_values(config_dict, "the config's dict")
    except FormatError as error:
        raise ConfigError(str(error)) from error
