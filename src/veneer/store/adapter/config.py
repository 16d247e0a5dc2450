"""Config of an adapter folder, for every method."""

from __future__ import annotations

from pathlib import Path

from veneer.contract import MethodConfig
from veneer.contract.config import config_in
from veneer.methods import all_methods


def read_config(folder: Path) -> MethodConfig:
    """Return the config of an adapter folder. Raises FormatError if it is missing or cannot be parsed."""
    all_methods()  # once they are defined, the contract knows them
    return config_in(folder)
