"""LoftQ on a model: LoRA's factors are initialised from the base's quantization error."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from veneer.adapters.peft_model import PeftModel
from veneer.contract.late_start import LateStart
from veneer.errors import ConfigError
from veneer.inits.loftq import lost
from veneer.model.adapted.holder import tensors_of
from veneer.model.adapted.linear import AdaptedSite
from veneer.model.attach.attach import adapted_layers
from veneer.model.quantized.quant_linear import QuantLinear
from veneer.records.frozen import FrozenWeight
from veneer.records.sites import LinearSite
from veneer.store.checkpoint import Checkpoint

_NO_ERROR = (
    "the files hold the quantized weight itself, from which LoftQ sees no error: give as model_path the folder of the "
    "model in 16 bits, or leave LoftQ out"
)


@torch.no_grad()
def replace_lora_weights_loftq(
    model: PeftModel,
    model_path: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Initialise an adapter's factors on quantized layers from the full-precision weights, one layer at a time.

    ``model_path``: the folder or file of the base in full precision, by default the folder from which the base was
    loaded. ``callback`` is called with the model and the path after each layer. If it returns False, that layer's
    factors are restored. A layer without a quantization error starts without an update. The base is not changed, and an
    error leaves the adapter as it was.
    Raises ConfigError if no layer is quantized, the adapter is not plain LoRA, or the files hold the quantized base
    itself. Raises FormatError if the files do not hold the weights.
    """
    config = model.peft_config.get(adapter_name)
    start = None if config is None else config.late_start
    if config is None or start is None or not start.is_product or start.settings is not None:
        raise ConfigError(
            f"{adapter_name!r} is a {type(config).__name__}, and LoftQ starts the factors of plain LoRA: attach a "
            "LoraConfig without another start"
        )
    layers = {
        p: m for p, m in adapted_layers(model).items() if isinstance(m, QuantLinear) and adapter_name in m.adapters
    }
    if not layers:
        raise ConfigError(
            f"none of the layers of {adapter_name!r} is quantized, so nothing was lost: load the base with "
            "BitsAndBytesConfig, or leave LoftQ out"
        )
    loaded_from = getattr(model.config, "name_or_path", None) or config.base_model_name_or_path or ""
    weights = Checkpoint.open(Path(model_path or loaded_from))
    factors = {
        path: _factors(start, layer.site((adapter_name,)), _dense(weights, model, path, layer), path)
        for path, layer in layers.items()
    }
    if not any(factors.values()):
        raise ConfigError(f"every layer of {adapter_name!r}: {_NO_ERROR}")
    for path, layer in layers.items():
        held, before = tensors_of(layer.adapters[adapter_name]), {}
        # A stays random: if both were zero, neither would have a gradient.
        for name, value in (factors[path] or {start.b: torch.zeros_like(held[start.b])}).items():
            before[name] = held[name].clone()
            held[name].copy_(value)
        if callback is not None and not callback(model, path):
            for name, value in before.items():
                held[name].copy_(value)


def _factors(start: LateStart, site: LinearSite, weight: Tensor, path: str) -> dict[str, Tensor]:
    """Return the factors that make up for the quantization error, by name; none if the error is zero.

    Raises ConfigError if ``weight``, which should be the weight before quantization, is stored in 8-bit codes itself.
    """
    if weight.itemsize == 1:
        raise ConfigError(f"{path}: {_NO_ERROR}")
    quantized = cast(FrozenWeight, site.weight).dense(torch.float32)
    if torch.equal(weight.to(quantized), quantized):
        return {}
    a, b = lost(weight, quantized, start.rank(site), start.scale(site))
    return {start.a: a, start.b: b}


def _dense(weights: Checkpoint, model: PeftModel, path: str, layer: AdaptedSite) -> Tensor:
    """Return the weight (o, i) before quantization. The files may store it without the prefix of its
    name in the model.
    """
    name = f"{path}.weight"
    short = name.removeprefix(f"{model.get_base_model().base_model_prefix}.")
    weight = weights.read(short if short in weights.tensors else name)
    return weight.T if cast(QuantLinear, layer).is_transposed else weight
