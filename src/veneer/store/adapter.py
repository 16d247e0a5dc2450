"""An adapter on disk, in PEFT's format: which tensor has which key, saved and loaded strictly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from veneer.core.method import MethodConfig
from veneer.errors import FormatError
from veneer.model.attach import live_parameters, stored_tensors
from veneer.model.state import AdapterState
from veneer.store.adapter_config import CONFIG_FILE, from_json, to_json
from veneer.store.adapter_files import WEIGHTS_FILE, non_finite, read_tensors, tensors_to_bytes, write_atomically


def save_adapter(model: PreTrainedModel, state: AdapterState, name: str, folder: Path) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, the config last."""
    folder.mkdir(parents=True, exist_ok=True)
    mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    write_atomically(folder / WEIGHTS_FILE, tensors_to_bytes(stored_tensors(model, state, name)))
    write_atomically(folder / CONFIG_FILE, to_json(state.configs[name], mapping).encode())


def read_config(folder: Path) -> MethodConfig:
    """The config of an adapter folder. Raises FormatError where there is none or it is not understood."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FormatError(f"{folder} holds no {CONFIG_FILE}: it is not the folder of an adapter")
    return from_json(path.read_text(encoding="utf-8"), path)


def load_weights(model: PreTrainedModel, state: AdapterState, name: str, folder: Path) -> None:
    """Copy the tensors of an adapter folder into an adapter that is attached, strictly."""
    assign(live_parameters(model, state, name), read_tensors(folder), str(folder / WEIGHTS_FILE))


@torch.no_grad()
def assign(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into the parameters of the same keys, all or nothing.

    Raises FormatError that lists every missing, unexpected, wrong-shaped and non-finite tensor.
    """
    problems = [f"missing: {key}" for key in parameters if key not in tensors]
    problems += [f"unexpected: {key}" for key in tensors if key not in parameters]
    problems += [
        f"shape {tuple(tensors[key].shape)} where the model needs {tuple(value.shape)}: {key}"
        for key, value in parameters.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    problems += [f"holds NaN or infinity: {key}" for key in non_finite(tensors)]
    if problems:
        raise FormatError(f"{source} does not fit:\n  " + "\n  ".join(problems))
    for key, value in parameters.items():
        value.copy_(tensors[key])
