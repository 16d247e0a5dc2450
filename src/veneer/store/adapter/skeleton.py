"""Base model without storage, made from its config: it has layers and shapes only."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel

from veneer.contract.file import WEIGHTS_FILE
from veneer.contract.keys import divided
from veneer.contract.places import Placed
from veneer.disk.safetensors import read_header
from veneer.errors import ConfigError, FormatError
from veneer.model.sites.places import placed_on
from veneer.store.adapter.config import read_config
from veneer.store.model_config import model_config
from veneer.store.named import folder_of


def without_storage(config: Any, keys: Collection[str]) -> PreTrainedModel:
    """Return a model of the config's class on the meta device, as if it were not quantized.

    If that class has no head, but ``keys`` of an adapter name a module beside the backbone, return the causal language
    model instead. Raises FormatError for an unknown class.
    """
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    named = (config.architectures or [""])[0]
    with torch.device("meta"):
        if (not named or named.endswith("Model")) and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
            headed = cast(PreTrainedModel, AutoModelForCausalLM.from_config(config)).eval()
            adapted = {divided(key)[1].partition(".")[0] for key in keys}
            if not named or adapted & dict(headed.named_children()).keys():
                return headed
        architecture = getattr(transformers, named, None) if named else None
        if not (isinstance(architecture, type) and issubclass(architecture, PreTrainedModel)):
            raise FormatError(
                f"the base's config.json names {named or 'no class'!r} under architectures, which is no model of "
                "transformers: load the base yourself, and use merge_and_unload()"
            )
        return architecture(config).eval()


def config_of_base(base: str | None, revision: str | None) -> Path | None:
    """Return the path of a base's ``config.json`` if it is on this machine: in its folder or in the hub's cache."""
    if not base:
        return None
    try:
        path = (folder_of(base) or Path(base)) / "config.json"
    except ConfigError:  # it is not here
        return None
    if path.is_file():
        return path
    try:
        cached = try_to_load_from_cache(base, "config.json", revision=revision)
    except HFValidationError:  # a folder that is no longer there
        return None
    return Path(cached) if isinstance(cached, str) else None


def places_in_base(folder: Path) -> dict[str, Placed] | None:
    """Return the modules that an adapter acts on, found in the config of the base that the adapter names.

    Return None if the base is not needed, because the adapter's own file shows the modules, or if they cannot be found.
    """
    config, file = read_config(folder), folder / WEIGHTS_FILE
    base = config_of_base(config.base_model_name_or_path, config.revision)
    if base is None or not file.is_file() or not config.changes_weights or config.reads_weight:
        return None
    tensors, problems = read_header(file)
    if problems:  # whoever reads the tensors tells them
        return None
    if config.places_in({key: stored.shape for key, stored in tensors.items()}, str(file)) is not None:
        return None
    return placed_on(without_storage(model_config(base.parent), tensors), config)
