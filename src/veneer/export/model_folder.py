"""Folder of a model on this machine, and the files in it other than weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

from veneer.errors import ConfigError
from veneer.store.bars import downloads_shown
from veneer.store.source import resolve

_COMPANIONS = (".json", ".jinja", ".model", ".txt", ".py")
_NOT_COPIED = ("config.json", "model.safetensors.index.json", "veneer.json", "blocks.json", "adapter_config.json")


def local_folder(model: str | os.PathLike[str]) -> Path:
    """Return the folder of a model, downloaded if it is a hub id. Raises ConfigError if there is none."""
    place = resolve(model)
    if isinstance(place, Path):
        return place
    try:
        with downloads_shown(place):
            patterns = ["*.safetensors", *(f"*{end}" for end in _COMPANIONS)]
            return Path(snapshot_download(place, allow_patterns=patterns))
    except OSError as error:
        raise ConfigError(
            f"the base {place!r} cannot be downloaded ({error}): check its name and the network, or give a folder"
        ) from error


def copy_companions(folders: Sequence[Path], into: Path) -> None:
    """Copy tokenizer, chat template and generation settings. Files of later folders replace those of earlier ones."""
    for folder in folders:
        for file in folder.iterdir():
            if file.is_file() and file.suffix in _COMPANIONS and file.name not in _NOT_COPIED:
                shutil.copyfile(file, into / file.name)
