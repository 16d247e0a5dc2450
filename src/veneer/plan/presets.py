"""Presets: the shapes of the usual models by name. They can be planned, and not loaded.

They are read without torch and transformers, so that a wrong name is reported before seconds of imports.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, cast

from veneer.errors import ConfigError
from veneer.plain.nearest import nearest
from veneer.store.known import KNOWN, is_fetched


@cache
def presets() -> dict[str, dict[str, Any]]:
    """Return the usual models by name: their id on the hub (``hub_id``) and the fields of their configs.

    Shapes: pytorch/torchtune's model builders, huggingface/transformers' conversion scripts, and config.json files that
    are quoted in public repositories.
    """
    text = (resources.files("veneer.plan") / "presets.json").read_text(encoding="utf-8")
    return cast("dict[str, dict[str, Any]]", json.loads(text))


def hub_id_of(name: str) -> str | None:
    """Return the id on the hub of the model that a preset describes.

    Return None for any other name, and for the name of an existing file.
    """
    found = None if Path(name).expanduser().exists() else presets().get(name.lower())
    return None if found is None else str(found["hub_id"])


def require_weights(source: str, key: str = "MODEL") -> None:
    """Raise ConfigError if a model that is to be loaded is a preset, because presets have no weights. ``key`` is the
    setting that named it.
    """
    hub_id = hub_id_of(source)
    if hub_id is not None:
        raise ConfigError(
            f"{key}: {source} is a preset of `veneer plan`, a shape without weights. Give the model's id on the "
            f"hub, {hub_id}, or a folder that holds it"
        )


def require_named(name: str) -> None:
    """Raise ConfigError for a name that cannot be a model's, with the nearest valid one."""
    if (
        name.lower() in presets()
        or Path(name).expanduser().exists()
        or "/" in name
        or (name in KNOWN and is_fetched(name))
    ):
        return
    close = nearest(name.lower(), [*presets(), *KNOWN])
    meant = f"; did you mean {' or '.join(close)}?" if close else "."
    raise ConfigError(
        f"no model {name!r}: it is no preset, no folder and no fetched model{meant} Presets: "
        f"{', '.join(sorted(presets()))}"
    )
