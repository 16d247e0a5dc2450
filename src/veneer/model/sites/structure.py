"""Residual sub-layers of a model: from its description, or found by watching one short forward pass.

The description of a decoder contains them. For other models, encoders and image models among them, one pass is watched.

A residual add is an addition of the stream and the output of a sub-layer. The stream is the input of a block, the
result of an earlier residual add, or a norm of either. The output is traced back to the module that computed it, and to
the first module that read the stream for it. The sub-layer is attention if a module with such a name took part in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from veneer.errors import NoStorageError, TargetError
from veneer.model.blueprint.decoder import Block
from veneer.model.blueprint.decoder import Sublayer as Place
from veneer.model.blueprint.describe import listed
from veneer.model.sites.trace import Addition, trace_additions

SublayerKind = Literal["attention", "cross_attention", "mlp"]


@dataclass(frozen=True, slots=True)
class ResidualSublayer:
    """Sub-layer of a block.

    ``input_path`` is the module whose first input is the sub-layer's input (the output of the norm before the
    sub-layer, if there is one). ``output_path`` is the module whose first output is added to the residual stream (the
    norm after the sub-layer, if there is one).
    """

    block_path: str
    layer: int
    kind: SublayerKind
    input_path: str
    output_path: str
    features: int


def sublayers(model: PreTrainedModel) -> tuple[ResidualSublayer, ...]:
    """Return the attention and feed-forward sub-layers of every block, in the order in which they run.

    Raises TargetError if the model has no blocks of attention and feed-forward parts, or if a block also adds other
    parts to the residual stream.
    """
    described = described_sublayers(model)
    return watched_sublayers(model) if described is None else described


def described_sublayers(model: PreTrainedModel) -> tuple[ResidualSublayer, ...] | None:
    """Return the sub-layers of a decoder from its description, if tests verify descriptions of its model type. Return
    None for any other model.
    """
    decoder = listed(model)
    if decoder is None or any(block.strange for block in decoder.blocks):
        return None
    places: list[tuple[int, Block, SublayerKind, Place | None]] = []
    for layer, block in enumerate(decoder.blocks):
        places.append((layer, block, "attention", block.attention_sublayer))
        places.append((layer, block, "mlp", block.feed_forward_sublayer))
    return tuple(
        ResidualSublayer(block.path, layer, kind, place.input_path, place.output_path, decoder.embedding.width)
        for layer, block, kind, place in places
        if place is not None
    )


def watched_sublayers(model: PreTrainedModel) -> tuple[ResidualSublayer, ...]:
    """Return the sub-layers found by watching one short forward pass. Raises TargetError as `sublayers` does."""
    with evaluation(model):
        additions = trace_additions(model, example_inputs(model))
    blocks = _blocks(model, additions)
    found: list[ResidualSublayer] = []
    for layer, (path, events) in enumerate(blocks.items()):
        for kind, event in zip(_kinds(path, events), events, strict=True):
            found.append(
                ResidualSublayer(
                    block_path=path,
                    layer=layer,
                    kind=kind,
                    input_path=event.input_path,
                    output_path=event.output_path,
                    features=event.features,
                )
            )
    return tuple(found)


def example_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the smallest inputs on which the model runs: token ids, or an image of zeros.

    Raises TargetError for a model with another kind of input, and NoStorageError for a model on the meta device.
    """
    if model.device.type == "meta":
        raise NoStorageError(
            f"{type(model).__name__} is on the meta device, but a forward pass must find where its sub-layers add: "
            "load its weights first"
        )
    device, dtype = model.device, model.dtype
    name, config = model.main_input_name, model.config
    if name == "input_ids":
        ids = torch.ones(1, 3, dtype=torch.long, device=device)
        return {"input_ids": ids, "decoder_input_ids": ids} if config.is_encoder_decoder else {"input_ids": ids}
    if name == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {name: torch.zeros(1, getattr(config, "num_channels", 3), height, width, device=device, dtype=dtype)}
    raise TargetError(
        f"{type(model).__name__} takes {name!r}: its sub-layers can be found for models that take input_ids or "
        "pixel_values (with image_size in their config). Use a method for linear layers, such as LoraConfig, on this "
        "model"
    )


def _blocks(model: nn.Module, additions: list[Addition]) -> dict[str, list[Addition]]:
    """Group the residual additions by block. A block is the innermost list element with attention and another part."""
    elements = {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        for key, _ in module.named_children()
    }
    owners: dict[str, list[Addition]] = {}
    for event in additions:
        for path in _ancestors(event.output_path):
            if path in elements:
                owners.setdefault(path, []).append(event)
    complete = {path for path, events in owners.items() if len({event.attention for event in events}) == 2}
    blocks = {p: owners[p] for p in owners if p in complete and not any(q.startswith(f"{p}.") for q in complete)}
    homeless = [e.output_path for e in additions if not any(p in blocks for p in _ancestors(e.output_path))]
    if not blocks or homeless:
        raise TargetError(
            f"the blocks of {type(model).__name__} cannot be recognised: "
            + (f"{homeless[0]!r} adds to the residual stream outside any" if homeless else "there is no repeated")
            + " block of attention and feed-forward parts. Use a method for linear layers, such as LoraConfig, here."
        )
    return blocks


def _kinds(path: str, events: list[Addition]) -> list[SublayerKind]:
    n_attention = sum(event.attention for event in events)
    if n_attention > 2 or len(events) - n_attention != 1:
        raise TargetError(
            f"block {path!r} holds {n_attention} attention parts and {len(events) - n_attention} others "
            f"({', '.join(event.output_path for event in events)}): the feed-forward part is ambiguous. "
            "Use a method for linear layers, such as LoraConfig, on this model."
        )
    attention: Iterator[SublayerKind] = iter(("attention", "cross_attention"))  # decoders attend to themselves first
    return [next(attention) if event.attention else "mlp" for event in events]


def _ancestors(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Enter a context in which every module is in evaluation mode: no dropout, no checkpointing, no random numbers."""
    with modes_kept(model):
        model.eval()
        yield


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Enter a context after which each module has its earlier mode again, training or evaluation."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
