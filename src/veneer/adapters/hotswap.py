"""Exchange of a loaded adapter for a saved one, under PEFT's name."""

from __future__ import annotations

import os
from typing import Any

from veneer.adapters.merging import require_known
from veneer.adapters.peft_model import PeftModel
from veneer.errors import CompositionError, ConfigError, FormatError

_NEW = "the exchanged one"


def hotswap_adapter(
    model: PeftModel, model_name_or_path: str | os.PathLike[str], adapter_name: str, **hub: Any
) -> None:
    """Replace a loaded adapter by a saved one. The name stays, and whether the adapter is active and trained.

    If settings and shapes are the same, values are written into the parameters, and a compiled model stays compiled.
    Otherwise the loaded adapter is removed, and the saved one is attached under its name. ``hub``: see
    `PeftModel.from_pretrained`.

    Raises AdapterNameError if no adapter has that name or it is merged. Raises FormatError or TargetError if the saved
    adapter cannot be attached, and CompositionError if it cannot act together with the other active adapters. On an
    error the loaded adapter stays.
    """
    state = model.adapter_state
    require_known(state, (adapter_name,))
    order, in_training = list(state.configs), [module for module in model.modules() if module.training]
    try:
        model.load_adapter(model_name_or_path, adapter_name, **hub)
        return
    except (ConfigError, FormatError):  # other settings or shapes; a damaged file is refused below too
        model.load_adapter(model_name_or_path, _NEW, adapter_name in state.trainable, **hub)
    for module in in_training:
        module.training = True  # loading an adapter that is frozen ends it
    if adapter_name in state.active:
        try:
            model.set_adapter([_NEW if name == adapter_name else name for name in state.active])
        except CompositionError:
            model.delete_adapter(_NEW)
            raise
    model.delete_adapter(adapter_name)
    model.rename_adapter(_NEW, adapter_name)
    state.configs = {name: state.configs[name] for name in order}
