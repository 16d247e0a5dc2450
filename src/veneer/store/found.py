"""Models by name or path, looked for before torch is imported, so that a wrong name is reported at once."""

from __future__ import annotations

from pathlib import Path

from veneer.disk.known_name import known_name
from veneer.errors import ConfigError
from veneer.store.known import KNOWN, is_fetched, model_folder


def require_found(model: str) -> None:
    """Raise ConfigError for a model that is no folder, no file, no fetched model, and neither on the hub nor cached."""
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
    """Return the folder of a model that is named by its path, or fetched; None for any other."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    return model_folder(source) if source in KNOWN and is_fetched(source) else None
