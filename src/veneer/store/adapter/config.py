"""Config of an adapter folder, of any method that there is."""

from __future__ import annotations

from pathlib import Path

from veneer.contract import MethodConfig
from veneer.contract.config import config_in
from veneer.methods import all_methods


def read_config(folder: Path) -> MethodConfig:
    """Return the config of an adapter folder. Raises FormatError if there is none or it is not understood."""
    all_methods()  # once they are defined, the contract knows them
    return config_in(folder)
