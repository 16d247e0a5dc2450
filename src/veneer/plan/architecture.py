"""Shape of a model by a name: a preset, a folder, a fetched model, a GGUF file, or an id of the hub."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from veneer.errors import FormatError
from veneer.plain.nearest import nearest
from veneer.plan.presets import presets, require_named
from veneer.store.gguf.model import header_config
from veneer.store.source import resolve


def config_of(name: str) -> PreTrainedConfig:
    """Return the config of a model. A preset needs no file and no network; of a GGUF file only the header is read.

    Raises ConfigError for an unknown name. Raises FormatError for a folder without a config or an id that cannot be
    reached. Both name the nearest preset.
    """
    found = presets().get(name.lower())
    if found is not None:
        fields = {key: value for key, value in found.items() if key != "hub_id"}
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        config._name_or_path = name.lower()
        return config
    require_named(name)
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return header_config(path)
    try:
        return AutoConfig.from_pretrained(resolve(name))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        close = [] if Path(name).expanduser().exists() else nearest(Path(name).name.lower(), presets())
        meant = f"; the preset {close[0]} needs neither files nor network" if close else ""
        raise FormatError(
            f"the config of {name} cannot be read: {reason}{meant}. Give a folder with config.json, a .gguf file, a "
            "preset or a hub id"
        ) from error
