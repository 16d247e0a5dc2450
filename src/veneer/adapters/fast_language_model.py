"""Unsloth's entry points: `FastLanguageModel` loads a model with its tokenizer and adds LoRA on fused blocks."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.adapters.peft_model import PeftModel, get_peft_model
from veneer.errors import ConfigError
from veneer.methods.lora import LoraConfig
from veneer.model.blueprint.names import LLAMA_LAYERS
from veneer.model.fused.activation_memory import checkpoint_as_needed
from veneer.model.fused.decoder import fuse, unfuse
from veneer.model.memory.checkpointing import checkpoint_fully, checkpoint_selectively
from veneer.model.memory.default_device import default_device
from veneer.store.named import file_of
from veneer.store.quantization import BitsAndBytesConfig
from veneer.store.source import load_model, load_tokenizer

TARGETS = LLAMA_LAYERS


class FastLanguageModel:
    """Unsloth's names and defaults. The resulting models go into Trainer and TRL unchanged."""

    @staticmethod
    def from_pretrained(
        model_name: str,
        max_seq_length: int | None = None,
        dtype: torch.dtype | str | None = None,
        load_in_4bit: bool = True,
        load_in_8bit: bool = False,
        gguf: Literal["blocks", "dense"] = "blocks",
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Return a base model, on the current GPU if there is one, and its tokenizer.

        The tokenizer truncates at ``max_seq_length`` tokens, by default the model's own limit. ``model_name`` is a
        folder, a GGUF file, a fetched model, or a hub id. If dtype is None, the dtype on disk is kept. The matrices of
        a GGUF file stay in the file's blocks, whatever ``load_in_4bit`` says; with ``gguf="dense"`` they are decoded
        first. Raises ConfigError.
        """
        if load_in_4bit and load_in_8bit:
            raise ConfigError("load_in_4bit and load_in_8bit exclude each other: set one of them to False")
        quantization, in_blocks = None, gguf == "blocks" and file_of(model_name) is not None
        if load_in_4bit and not in_blocks:
            quantization = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
            )
        elif load_in_8bit:
            quantization = BitsAndBytesConfig(load_in_8bit=True)
        kept = "auto" if dtype is None else dtype
        model = load_model(model_name, dtype=kept, quantization=quantization, gguf=gguf, device=default_device())
        tokenizer = load_tokenizer(model_name)
        limit = int(model.config.get_text_config().max_position_embeddings)
        if max_seq_length is not None and not 1 <= max_seq_length <= limit:
            raise ConfigError(f"max_seq_length={max_seq_length} must lie between 1 and the model's {limit} positions")
        tokenizer.model_max_length = max_seq_length or limit
        return model, tokenizer

    @staticmethod
    def get_peft_model(
        model: PreTrainedModel,
        r: int = 16,
        target_modules: Collection[str] | str = TARGETS,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: Literal["none", "all", "lora_only"] = "none",
        layers_to_transform: Collection[int] | None = None,
        layers_pattern: str | None = None,
        use_gradient_checkpointing: bool | Literal["unsloth", "selective"] = "unsloth",
        random_state: int = 3407,
        use_rslora: bool = False,
        modules_to_save: Collection[str] | None = None,
        init_lora_weights: bool | str = True,
    ) -> PeftModel:
        """Add LoRA to a model, seeded by ``random_state``, with blocks fused if they fit. The model is ready to train.

        ``use_gradient_checkpointing``: "unsloth" keeps a pass's activations if memory suffices, and checkpoints if not
        (`model.fused.activation_memory`). True always recomputes blocks in the backward pass, "selective" recomputes
        only their cheap operations, and False keeps everything.
        """
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=r,
            target_modules=target_modules,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            bias=bias,
            layers_to_transform=layers_to_transform,
            layers_pattern=layers_pattern,
            use_rslora=use_rslora,
            modules_to_save=modules_to_save,
            init_lora_weights=init_lora_weights,
        )
        with torch.random.fork_rng():
            torch.manual_seed(random_state)
            adapted = get_peft_model(model, config)
        _checkpoint(adapted, use_gradient_checkpointing)
        return cast(PeftModel, FastLanguageModel.for_training(cast(PreTrainedModel, adapted)))

    @staticmethod
    def for_training(model: PreTrainedModel) -> PreTrainedModel:
        """Return the model in training mode, with its blocks fused if they fit."""
        fuse(model)
        model.train()
        return model

    @staticmethod
    def for_inference(model: PreTrainedModel) -> PreTrainedModel:
        """Return the model in evaluation mode, running its original code."""
        unfuse(model)
        model.eval()
        return model


def _checkpoint(model: PeftModel, how: bool | Literal["unsloth", "selective"]) -> None:
    if how == "unsloth":
        checkpoint_as_needed(model)
    elif how == "selective":
        checkpoint_selectively(model)
    elif how:
        checkpoint_fully(model)
