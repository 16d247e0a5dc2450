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
    """The usual models by name, as fields of their configs.

    Shapes: pytorch/torchtune's model builders, huggingface/transformers' conversion scripts, and config.json files
    that are quoted in public repositories.
    """
    text = (resources.files("veneer.plan") / "presets.json").read_text(encoding="utf-8")
    return cast("dict[str, dict[str, Any]]", json.loads(text))


def config_of(name: str) -> PreTrainedConfig:
    """The config of a model. A preset needs no file and no network.

    Raises ConfigError for a name that is none of all these, FormatError for a folder without a config or an id that
    cannot be reached; both name the nearest preset.
    """
    found = presets().get(name.lower())
    if found is not None:
        fields = dict(found)
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
