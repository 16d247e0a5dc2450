"""Model of a recipe as in its run, made of traced tensors: quantized, prepared, adapted, fused."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from veneer.adapters.lifecycle import attached_as
from veneer.adapters.peft_model import get_peft_model
from veneer.contract import MethodConfig
from veneer.contract.source import adapter_folder
from veneer.errors import ConfigError
from veneer.model.quantized.module import CodedModule
from veneer.ops.traced import Traced
from veneer.recipe.adapter import FROM
from veneer.recipe.methods import adapter_config
from veneer.recipe.parts import ModelPart
from veneer.store.gguf.blocks import parameters_of
from veneer.store.gguf.in_place import why_not_in_blocks
from veneer.store.in_blocks import put_in_blocks
from veneer.store.kinds import auto_class
from veneer.store.named import file_of
from veneer.store.quantization_config import QuantizationConfig
from veneer.store.quantizer import VeneerQuantizer
from veneer.store.stored_quantization import quantization_in
from veneer.train.base_model import made_ready, quantization_of

CPU = torch.device("cpu")


def shortened(config: PreTrainedConfig, n_blocks: int) -> PreTrainedConfig:
    """Return the config of the same model with only its first ``n_blocks`` blocks.

    Raises NotImplementedError if the config's class counts its blocks by other fields (ProphetNet).
    """
    short = copy.deepcopy(config)
    text: Any = short.get_text_config()
    if text.num_hidden_layers == n_blocks:
        return short
    lists = blockwise(text)
    text.num_hidden_layers = n_blocks
    for name, values in lists:
        setattr(text, name, values[:n_blocks])
    return short


def blockwise(text: PreTrainedConfig) -> list[tuple[str, Sequence[Any]]]:
    """Return the fields of a config that have an entry for each block, such as ``layer_types``."""
    n_blocks: Any = getattr(text, "num_hidden_layers", None)
    return [(name, v) for name, v in vars(text).items() if isinstance(v, list | tuple) and len(v) == n_blocks]


def meta_base(
    config: PreTrainedConfig, part: ModelPart, *, prepared: bool = True, frozen: bool = True, encodes: bool = False
) -> PreTrainedModel:
    """Return the base of a recipe on the meta device, in its storage format; ``prepared`` for training.

    A base that is not ``frozen`` is dense. ``encodes``: an encoder with a decoder is allowed too.

    Raises ConfigError if transformers makes no model of the config that predicts the next token.
    """
    kind = auto_class(part.source, config.to_dict(), encodes=encodes)
    dtype = getattr(torch, part.dtype) if part.dtype != "auto" else config.dtype or torch.float32
    try:
        with torch.device("meta"):
            model = kind.from_config(config, dtype=dtype)
    except (ImportError, KeyError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0][:150]
        raise ConfigError(
            f"transformers makes no causal language model of {part.source} (model_type {config.model_type})"
            f"{'' if reason.startswith('Unrecognized configuration class') else f': {reason}'}. Give a model that "
            "AutoModelForCausalLM builds: a decoder that predicts the next token"
        ) from error
    model = cast(PreTrainedModel, model.eval())
    quantization = base_quantization(config, part)
    if quantization is not None:
        _quantize(model, quantization)
    elif frozen and part.gguf == "blocks":
        _put_in_blocks(model, part.source)
    if quantization is not None and prepared:
        model = made_ready(model, part)
    if part.attention is not None:
        model.set_attn_implementation(part.attention)
    return model


def traced_model(
    config: PreTrainedConfig, part: ModelPart, adapter: MethodConfig | None, *, encodes: bool = False
) -> PreTrainedModel:
    """Return the base with its adapter, ready to train. Call it while tracing.

    Without an adapter, the whole model is trained, in float32. ``encodes``: an encoder with a decoder is allowed too.
    """
    return ready_to_train(traced_base(config, part, frozen=adapter is not None, encodes=encodes), adapter)


def traced_base(config: PreTrainedConfig, part: ModelPart, *, frozen: bool, encodes: bool = False) -> PreTrainedModel:
    """Return the base, with float32 weights if it is not ``frozen``. Call it while tracing."""
    model = meta_base(config, part, frozen=frozen, encodes=encodes)
    if not frozen:
        model = model.float().requires_grad_(True)
    make_traced(model)  # casts go before it: a traced tensor cannot be given other data
    return model


def ready_to_train(base: PreTrainedModel, adapter: MethodConfig | None) -> PreTrainedModel:
    """Return a traced base with its adapter, if there is one, ready to train."""
    model = base if adapter is None else with_adapter(base, adapter)
    return cast(PreTrainedModel, model.train())


def adapter_of(part: Mapping[str, Any]) -> MethodConfig | None:
    """Return the config of a recipe's adapter, new or saved; None if the whole model is trained."""
    config = adapter_config(part)
    if config is None or FROM not in part:
        return config
    return attached_as(config, adapter_folder(part[FROM]), is_trainable=True)


def with_adapter(model: PreTrainedModel, adapter: MethodConfig) -> PreTrainedModel:
    """Return the base with a trainable adapter."""
    adapted = get_peft_model(model, adapter)
    adapted.set_requires_grad(list(adapted.peft_config))  # a config that has no network any more says inference_mode
    return cast(PreTrainedModel, adapted)


def base_quantization(config: PreTrainedConfig, part: ModelPart) -> QuantizationConfig | None:
    """Return the quantization that a recipe asks for, or that the files hold.

    Raises ConfigError if the recipe and the files name different ones.
    """
    stored, asked = getattr(config, "quantization_config", None), quantization_of(part)
    if asked is None:
        return quantization_in({"quantization_config": stored})
    return asked if stored is None else asked.merged_with(stored)


def _quantize(model: PreTrainedModel, config: QuantizationConfig) -> None:
    """Quantize the model as the loader does, without a checkpoint."""
    quantizer = VeneerQuantizer(config, pre_quantized=config.is_stored)
    quantizer._process_model_before_weight_loading(model)
    quantizer.plan_stacks(model)
    _fill(model, {})


def _put_in_blocks(model: PreTrainedModel, source: str) -> None:
    """Keep the weights in a GGUF file's blocks, as the loader does. A tied head shares the embeddings' tensors."""
    path = file_of(source)
    if path is not None and why_not_in_blocks(path) is None:
        coded = put_in_blocks(model, parameters_of(model, path, model.dtype), None)
        _fill(model, {name: parameter.tensors[0].name for name, parameter in coded.items()})


def _fill(model: PreTrainedModel, shared: Mapping[str, str]) -> None:
    """Give every coded module tensors on the meta device. Names with the same entry in ``shared`` share one weight."""
    made: dict[str, Tensor] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, CodedModule):
            layout, name = layer.spec.part_layout(), f"{path}.weight"
            parts = {part: torch.empty(shape, dtype=dtype, device="meta") for part, (dtype, shape) in layout.items()}
            parts["weight"] = made.setdefault(shared.get(name, name), parts["weight"])
            layer.fill(layer.spec, parts)
            layer.requires_grad_(False)


def make_traced(model: nn.Module) -> None:
    """Replace every parameter and buffer on the meta device by a traced one; shared tensors stay shared."""
    made: dict[Tensor, Tensor] = {}  # by identity; the keys keep the tensors that were there alive
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in made:
                made[parameter] = nn.Parameter(Traced(parameter.data, CPU), parameter.requires_grad)
            if parameter is not None:
                module._parameters[name] = cast(nn.Parameter, made[parameter])
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = made.setdefault(buffer, Traced(buffer, CPU))
