"""The LoRA training step that other scripts time: a model of PEFT's or of veneer's, its loss, and AdamW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

import veneer
from veneer.model.fused.decoder import fuse
from veneer.train.loss import token_loss

RATE = 2e-4
TOLERANCE = 0.005
SIDES = ("peer", "veneer")


def base_of(
    side: str, base: str, place: str, dtype: torch.dtype = torch.bfloat16, double_quant: bool = False, **options: Any
) -> Any:
    """A "dense" or an "nf4" base, the latter loaded by bitsandbytes for the peer and by veneer for itself."""
    if base == "nf4":
        loader: Any = veneer if side == "veneer" else transformers
        options["quantization_config"] = loader.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=double_quant,
        )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(place, dtype=dtype, attn_implementation="sdpa", **options)


def adapted(side: str, base: Any, **settings: Any) -> Any:
    """The base with LoRA of rank 16 on all linear layers, or with what ``settings`` say, ready to train."""
    return adapted_by(side, base, "LoraConfig", {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"} | settings)


def adapted_by(side: str, base: Any, config: str, settings: Mapping[str, Any]) -> Any:
    """The base with a method, given by the name of its config and the config's fields, ready to train."""
    if side == "veneer":
        library: Any = veneer
    else:
        import peft as library  # not above: scripts without a peer do without it
    return library.get_peft_model(base, getattr(library, config)(task_type="CAUSAL_LM", **settings)).train()


def require_fused(model: Any) -> None:
    """SystemExit where veneer's kernels do not take the model."""
    if not fuse(model):
        raise SystemExit("the model runs the general path, see the log: there is nothing to compare")


def optimizer_of(model: Any, rate: float = RATE) -> torch.optim.Optimizer:
    """torch's fused AdamW over what trains, which is what a Trainer takes by itself."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=rate, fused=True)


def loss_of(side: str, model: Any, ids: Tensor) -> Tensor:
    """The mean cross-entropy of every token of ``ids`` (rows, length) but the first of each row."""
    if side == "peer":
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss
    counted = token_loss(model, {"input_ids": ids, "labels": ids})
    return counted.total / counted.n_tokens


def step(side: str, model: Any, optimizer: torch.optim.Optimizer, ids: Tensor) -> float:
    """Forward, backward, AdamW; returns the loss, and so waits for the device."""
    optimizer.zero_grad()
    loss = loss_of(side, model, ids)
    loss.backward()
    optimizer.step()
    return loss.item()


def agree(what: str, theirs: Sequence[float], own: Sequence[float]) -> None:
    """Print losses of both sides. SystemExit where they part by more than bfloat16 rounds them."""
    apart = max(abs(a - b) / abs(b) for a, b in zip(own, theirs, strict=True))
    shown = (" ".join(f"{loss:.4f}" for loss in losses) for losses in (theirs, own))
    print("{}: {} and {}; apart by {:.3%}".format(what, *shown, apart), flush=True)
    if not apart <= TOLERANCE:
        raise SystemExit(f"they part by more than {TOLERANCE:.1%}: no times are given")
