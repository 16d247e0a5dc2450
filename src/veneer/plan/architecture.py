"""The shape of a model by a name: a preset, a folder, a fetched model, a GGUF file, or an id of the hub."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, cast

from transformers import AutoConfig, PreTrainedConfig

from veneer.core.nearest import nearest
from veneer.errors import ConfigError, FormatError
from veneer.store.fetch import KNOWN, is_fetched
from veneer.store.source import resolve


@cache
def presets() -> dict[str, dict[str, Any]]:
    """The usual models by name: their id on the hub (``hub_id``) and the fields of their configs.

    Shapes: pytorch/torchtune's model builders, huggingface/transformers' conversion scripts, and config.json files
    that are quoted in public repositories.
    """
    text = (resources.files("veneer.plan") / "presets.json").read_text(encoding="utf-8")
    return cast("dict[str, dict[str, Any]]", json.loads(text))


def hub_id_of(name: str) -> str | None:
    """The id on the hub of the model that a preset describes; None for any other name, and where a file goes by it."""
    found = None if Path(name).expanduser().exists() else presets().get(name.lower())
    return None if found is None else str(found["hub_id"])


def require_weights(source: str) -> None:
    """Raise ConfigError for a recipe's model that is a preset, which can be planned and not loaded."""
    hub_id = hub_id_of(source)
    if hub_id is not None:
        raise ConfigError(
            f"model.source: {source} is a preset of `veneer plan`, a shape without weights. Give the model's id on the "
            f"hub, {hub_id}, or a folder that holds it"
        )


def config_of(name: str) -> PreTrainedConfig:
    """The config of a model. A preset needs no file and no network.

    Raises ConfigError for a name that is none of all these, FormatError for a folder without a config or an id that
    cannot be reached; both name the nearest preset.
    """
    found = presets().get(name.lower())
    if found is not None:
        fields = {key: value for key, value in found.items() if key != "hub_id"}
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        config._name_or_path = name.lower()
        return config
    if not Path(name).expanduser().exists() and "/" not in name and not (name in KNOWN and is_fetched(name)):
        close = nearest(name.lower(), [*presets(), *KNOWN])
        meant = f"; did you mean {' or '.join(close)}?" if close else "."
        raise ConfigError(
            f"no model {name!r}: it is no preset, no folder and no fetched model{meant} Presets: "
            f"{', '.join(sorted(presets()))}"
        )
    try:
        return AutoConfig.from_pretrained(resolve(name))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        close = [] if Path(name).expanduser().exists() else nearest(Path(name).name.lower(), presets())
        meant = f"; the preset {close[0]} needs neither files nor network" if close else ""
        raise FormatError(f"the config of {name} cannot be read: {reason}{meant}") from error
