"""Folders of adapters as a user names them, looked for, and their files looked at, before torch is imported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from veneer.contract.file import CONFIG_FILE, WEIGHTS_FILE, read_fields
from veneer.disk.near import near_paths
from veneer.disk.safetensors_header import read_entries
from veneer.errors import ConfigError, FormatError

T = TypeVar("T")
PICKLE_FILE = "adapter_model.bin"

NEEDS_BASE = frozenset(
    {"ADAMSS", "BOFT", "DEFT", "FROD", "HIRA", "HRA", "IA3", "OFT", "OSF", "PEANUT", "PSOFT", "ROAD"}
)
"""Names (``peft_type``) of the methods whose updates always depend on the weights of the base."""


def require_adapter(adapter: Path | None) -> None:
    """Raise ConfigError if the folder of an adapter does not exist. None is allowed: it means no adapter."""
    if adapter is not None and not adapter.is_dir():
        near = near_paths(adapter, folders=True)
        meant = (
            f"; did you mean {' or '.join(map(repr, near))}?" if near else ". Give one that holds adapter_config.json"
        )
        raise ConfigError(f"no adapter {str(adapter)!r}: there is no such folder{meant}")


def needs_base(adapter: Path) -> str:
    """Return the message that an adapter has no update without its base."""
    return f"the adapter {adapter} scales or reads the weights of its base: give the base too (--base MODEL)"


def require_whole(*adapters: Path | None) -> None:
    """Raise an error for adapters whose folder does not exist (ConfigError) or whose files are missing or damaged
    (FormatError).

    None is allowed: it means no adapter.
    """
    for adapter in adapters:
        require_adapter(adapter)
        if adapter is not None:
            read_fields(adapter)
            entries_in(adapter, WEIGHTS_FILE, read_entries)


def is_alone(folder: Path) -> bool:
    """Return True if a folder holds an adapter and no model."""
    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()


def entries_in(folder: Path, file: str, read: Callable[[Path], tuple[dict[str, T], list[str]]]) -> dict[str, T]:
    """Return the tensors that ``read`` finds in the header of an adapter's file, by name.

    Raises FormatError if the file is missing, a pickle, truncated or damaged, or if its header is wrong.
    """
    path = folder / file
    if not path.is_file():
        if (folder / PICKLE_FILE).is_file():
            raise FormatError(
                f"{folder} holds {PICKLE_FILE}, a pickle, which can run any code when it is opened. Only "
                f"{WEIGHTS_FILE} is read. If you trust the pickle, load it with PEFT and save it again."
            )
        raise FormatError(
            f"{folder} holds no {file}: it is not an adapter, or it was not saved to the end. Save it again, or give "
            "the folder of an adapter"
        )
    tensors, problems = read(path)
    if problems:
        raise FormatError(f"{path} is damaged or was cut off ({'; '.join(problems)}); save or download it again")
    return tensors
