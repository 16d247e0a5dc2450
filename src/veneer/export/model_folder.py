"""The folder of a model: where it is on this machine, and the files in it that are not weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from veneer.errors import ConfigError
from veneer.store.source import resolve

_COMPANIONS = (".json", ".jinja", ".model", ".txt", ".py")
_NOT_COPIED = ("config.json", "model.safetensors.index.json", "veneer.json", "adapter_config.json")


def local_folder(model: str | os.PathLike[str]) -> Path:
    """The folder of a model, downloaded if it is a hub id. Raises ConfigError where there is none."""
    place = resolve(model)
    if isinstance(place, Path):
        return place
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(place, allow_patterns=["*.safetensors", *(f"*{end}" for end in _COMPANIONS)]))
    except OSError as error:
        raise ConfigError(f"the base {place!r} cannot be downloaded: {error}") from error


def copy_companions(folders: Sequence[Path], into: Path) -> None:
    """Tokenizer, chat template, generation settings: those of a later folder replace those of an earlier one."""
    for folder in folders:
        for file in folder.iterdir():
            if file.is_file() and file.suffix in _COMPANIONS and file.name not in _NOT_COPIED:
                shutil.copyfile(file, into / file.name)
