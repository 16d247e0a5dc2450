"""Loads the base model of a recipe, and quantizes and freezes it as the part ``model`` says."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from veneer.errors import ConfigError
from veneer.model.attach.prepare import prepare_model_for_kbit_training, widen
from veneer.model.memory.give_back import give_back
from veneer.model.sharded.sharding import BaseCutter
from veneer.plain.progress import waits_told
from veneer.recipe.parts import ModelPart
from veneer.store.quantization import BitsAndBytesConfig
from veneer.store.source import load_model


def load_base(
    part: ModelPart,
    *,
    scores: bool = False,
    frozen: bool = True,
    cutter: BaseCutter | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Return the base model of a recipe, quantized and prepared if the recipe says so.

    If ``scores``, its head gives each sequence one number. A base that is not ``frozen`` is dense. ``cutter`` shards
    its blocks over processes as they are loaded. Without one, the base is loaded on ``device``, which defaults as in
    `load_model`.
    """
    config = quantization_of(part)

    def take(model: PreTrainedModel, block: nn.Module) -> None:
        if cutter is not None:
            if getattr(model, "is_quantized", False) and _is_widened(part, model):
                widen(block)
            cutter.take(model, block)

    each_block = None if cutter is None else take
    gguf = part.gguf if frozen else "dense"
    with waits_told(f"loading {part.source}"):
        model = load_model(
            part.source,
            dtype=part.dtype,
            quantization=config,
            device=device if cutter is None else None,
            scores=scores,
            gguf=gguf,
            each_block=each_block,
        )
    if config is not None or getattr(model, "is_quantized", False):
        model = made_ready(model, part)
    if cutter is not None:
        cutter.cut(model.requires_grad_(False))  # what is not cut yet
        if model.device.type != cutter.device:
            model.to(cast(Any, cutter.device))  # what stands outside of blocks
    if part.attention is not None:
        try:
            model.set_attn_implementation(part.attention)
        except (ValueError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"model.attention: {part.attention} does not go with {part.source}: {reason}") from error
    give_back(model)  # experts are joined of what the file holds, whose pages would count beside them
    return model


def device_of(args: TrainingArguments) -> torch.device | None:
    """Return the GPU on which a run's base is loaded, or None if it is loaded in host memory and the
    trainer moves it.
    """
    return args.device if args.device.type == "cuda" and not (args.deepspeed or args.fsdp) else None


def made_ready(model: PreTrainedModel, part: ModelPart) -> PreTrainedModel:
    """Freeze a quantized model, convert its unquantized weights if necessary, and return it.

    They become float32 if the recipe says so, or if they are float16, whose range is too small for a residual stream.
    Otherwise they stay bfloat16, as in a dense base. In float32, the embeddings and head of a large vocabulary would be
    half of a 4-bit model, and the head would be copied to 16 bits in each forward pass.
    """
    if _is_widened(part, model):
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model.requires_grad_(False)


def _is_widened(part: ModelPart, model: PreTrainedModel) -> bool:
    return part.float32_rest or model.dtype != torch.bfloat16


def quantization_of(part: ModelPart) -> BitsAndBytesConfig | None:
    """Return the quantization that a recipe asks for, or None for a dense base."""
    if part.quantization == "none":
        return None
    if part.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=part.quantization,
        bnb_4bit_use_double_quant=part.double_quantization,
    )
