"""PEFT's functions on models that keep their own class: injecting adapters, reading and setting their tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from veneer.adapters import lifecycle
from veneer.adapters.peft_model import PeftModel
from veneer.contract import MethodConfig
from veneer.contract.source import adapter_folder, hub_options
from veneer.errors import AdapterNameError, ConfigError
from veneer.model.adapted.allocation import Allocation
from veneer.model.adapted.state import AdapterState
from veneer.store.adapter.files import read_tensors
from veneer.store.adapter.tensors import SaveEmbeddings, adapter_tensors, assign, renamed


def inject_adapter_in_model(
    peft_config: MethodConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    *,
    autocast_adapter_dtype: bool = True,
) -> nn.Module:
    """Attach a new adapter to any module, in place, without the methods of `PeftModel`. The base is frozen.

    ``low_cpu_mem_usage`` has no effect: parameters are made only once.
    """
    if isinstance(model, PeftModel):
        raise ConfigError("this model is a PeftModel already: call its add_adapter instead")
    state = vars(model).get("adapter_state")
    if not isinstance(state, AdapterState):
        state = AdapterState()
        model.requires_grad_(False)
        bare = cast(Any, model)
        bare.adapter_state, bare.peft_config, bare._hf_peft_config_loaded = state, state.configs, True
    lifecycle.add(model, state, adapter_name, peft_config, Allocation(widen=autocast_adapter_dtype))
    lifecycle.activate(model, state, (adapter_name,))
    return model


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    save_embedding_layers: SaveEmbeddings = "auto",
    unwrap_compiled: bool = False,
) -> dict[str, Tensor]:
    """Return the tensors of an adapter by their keys on disk. ``state_dict`` gives values to use instead of the
    model's.

    Raises AdapterNameError for a compiled model (``torch.compile``), unless ``unwrap_compiled`` is set.
    """
    if unwrap_compiled:
        model = cast(nn.Module, getattr(model, "_orig_mod", model))
    state = _state(model, adapter_name)
    return adapter_tensors(model, state, adapter_name, save_embedding_layers, state_dict)


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> _IncompatibleKeys:
    """Set the values of an attached adapter, all or nothing.

    With ``ignore_mismatched_sizes``, a parameter whose tensor in the state dict has another shape keeps its values, and
    its key is returned as missing. ``low_cpu_mem_usage`` has no effect.

    Difference from PEFT: loading is strict; PEFT only reports missing keys, which callers seldom check. Raises
    FormatError.
    """
    state = _state(model, adapter_name)
    left = assign(
        model,
        state,
        adapter_name,
        peft_model_state_dict,
        source="the state dict",
        mismatched=ignore_mismatched_sizes,
    )
    return _IncompatibleKeys(left, [])


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hub: Any,
) -> dict[str, Tensor]:
    """Return the tensors of a saved adapter by their keys on disk, from a folder or a hub id, without a model.

    ``device``: the device to load onto, by default the CPU. ``key_mapping``: see `renamed`. ``hub`` takes the fields of
    `HubOptions`. Raises FormatError.
    """
    tensors = renamed(read_tensors(adapter_folder(model_id, hub_options(hub))), key_mapping)
    return {key: value.to(device or "cpu") for key, value in tensors.items()}


def _state(model: nn.Module, name: str) -> AdapterState:
    state = vars(model).get("adapter_state")
    if not isinstance(state, AdapterState) or name not in state.configs:
        loaded = sorted(state.configs) if isinstance(state, AdapterState) else []
        inside = " (it is compiled: pass unwrap_compiled=True, or its _orig_mod)" if hasattr(model, "_orig_mod") else ""
        raise AdapterNameError(f"this {type(model).__name__} has no adapter named {name!r}; loaded: {loaded}{inside}")
    return state
