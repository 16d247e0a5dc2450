"""Models by name or path, looked for before torch is imported, so that a wrong name is reported at once."""

from __future__ import annotations

from pathlib import Path

from veneer.contract.file import CONFIG_FILE as ADAPTER_CONFIG
from veneer.disk.known_name import known_name
from veneer.errors import ConfigError, FormatError
from veneer.store.known import KNOWN, is_fetched, model_folder


def require_found(model: str) -> None:
    """Raise ConfigError if a model is not a path, a fetched model, or an id on the hub or in the hub's cache."""
    name = known_name(model)
    if Path(model).expanduser().exists() or "@sha256:" in name:
        return
    if name not in KNOWN:
        # Here, as it imports the hub's client: a folder needs none.
        from veneer.store.hub import on_hub

        on_hub(name)
    elif not is_fetched(name):
        raise ConfigError(f"the model {name!r} is not in the cache yet: run `veneer fetch {name}`")


def folder_here(source: str) -> Path | None:
    """Return the folder of a model, given by its path or by the name of a fetched model; None for any other."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    return model_folder(source) if source in KNOWN and is_fetched(source) else None


def require_model(path: Path) -> None:
    """Raise FormatError if a folder or file holds no model. The error says what it holds instead."""
    if path.is_file() and path.suffix != ".gguf":
        raise FormatError(f"{path} is a file; a model is a folder with config.json, or a .gguf file")
    if not path.is_dir() or (path / "config.json").is_file():
        return
    if (path / ADAPTER_CONFIG).is_file():
        raise FormatError(f"{path} is an adapter, not a model: give the base model, and this folder as the adapter")
    raise FormatError(f"{path} holds no config.json, so it is not a model: {_meant(path)}")


def _meant(path: Path) -> str:
    """Return advice about a folder that is not a model: to give instead the model's file or the run's result that is
    found in it.
    """
    files = sorted(path.glob("*.gguf"))
    if files:
        return f"give the file itself: {files[0]}"
    names = [f"{below}/{name}" for name in ("config.json", ADAPTER_CONFIG) for below in ("*", "*/*")]
    saved = {file.parent for name in names for file in path.glob(name)}
    if not saved:
        return "give the folder that save_pretrained wrote"
    best = min(saved, key=lambda folder: (folder.name.startswith("checkpoint-"), folder))
    if (best / "config.json").is_file():
        return f"give {best}, which is one"
    return f"{best} is an adapter; give it in place of a model, or, where a base is asked for, beside its base"
