"""Describes a decoder, from a model without reading its values, or from a config without any weights in memory."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from veneer.errors import DescriptionError
from veneer.model.blueprint.decoder import Decoder, Embedding, Head, Positions
from veneer.model.blueprint.linears import is_linear, read_linear
from veneer.model.blueprint.norms import read_norm
from veneer.model.blueprint.parts import Strange
from veneer.model.blueprint.read_block import read_block
from veneer.model.blueprint.source import BlockSource, first, undescribed
from veneer.model.blueprint.tables import own_multiplier
from veneer.model.inplace import plain_class
from veneer.model.quantized.embedding import CodedEmbedding, table_shape
from veneer.model.quantized.module import CodedModule

UNMADE = (  # errors of transformers and torch for a config of which no model can be made
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def describe_config(config: PreTrainedConfig) -> Decoder:
    """Return the description of a config's decoder, which is built on the meta device.

    Raises DescriptionError as `describe` does, and if transformers cannot build a decoder from the config.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except UNMADE as error:
        raise DescriptionError(f"transformers builds no decoder from a {type(config).__name__}: {error}") from error
    return describe(model)


def listed(model: PreTrainedModel) -> Decoder | None:
    """Return the description of a decoder if tests compare its model type's outputs with the model's own. Return None
    for any other model.
    """
    try:
        decoder = describe(model)
    except DescriptionError:
        return None
    return decoder if decoder.listed else None


def describe(model: PreTrainedModel) -> Decoder:
    """Return the description of a decoder, adapted or not, on any device.

    `Decoder.strange` lists the parts that it cannot express. Raises DescriptionError if the model is not a decoder with
    one list of blocks between embeddings and a head.
    """
    holder, layers = blocks_of(model)
    source = BlockSource.of(model)
    embeddings = model.get_input_embeddings()
    if not isinstance(embeddings, nn.Embedding | CodedEmbedding):
        raise DescriptionError(f"{type(model).__name__} has no table of input embeddings")
    head = model.get_output_embeddings()
    final = first(holder, source.names.final_norm)
    norm_module = None if final is None else cast(nn.Module, getattr(holder, final))
    norm = read_norm(source, norm_module)
    positions, embedding_norm = _beside_embeddings(source, holder)
    computed = None if isinstance(positions, nn.Embedding) else positions  # sinusoids (XGLM), no table
    embedding = _embedding(source, embeddings, positions if computed is None else None, embedding_norm)
    known = [layers, embeddings, head, positions, embedding_norm, norm_module]
    return Decoder(
        model_type=source.config.model_type,
        listed=source.listed,
        embedding=embedding,
        blocks=tuple(read_block(source, block, layer) for layer, block in enumerate(layers)),
        norm=norm,
        head=_head(source, head, embeddings),
        other=(*_no_table(source, computed), *_strange(source, holder, known, norm, norm_module)),
    )


def blocks_of(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """Return the module that holds a decoder's blocks, and the list of blocks. Raises DescriptionError if the model has
    no such list, or several.
    """
    holders = dict.fromkeys((model.base_model, model.get_decoder()))  # the text half, in a model with images
    lists = [(h, part) for h in holders for part in h.children() if isinstance(part, nn.ModuleList) and len(part)]
    if len(lists) != 1 or model.config.is_encoder_decoder:
        told = "an encoder and a decoder, two" if model.config.is_encoder_decoder else f"{len(lists)}"
        raise DescriptionError(f"its main module holds {told} lists of layers: exactly one is supported")
    return lists[0]


def _beside_embeddings(source: BlockSource, holder: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """Return the table of learned positions and the norm after the embeddings. Each is None if the model has none."""
    found = (first(holder, names) for names in (source.names.positions, source.names.embedding_norm))
    positions, norm = (None if name is None else cast(nn.Module, getattr(holder, name)) for name in found)
    return positions, norm


def _embedding(source: BlockSource, table: Any, positions: Any, norm: nn.Module | None) -> Embedding:
    n_tokens, width = table_shape(table)
    own = own_multiplier(table)
    multiplier = own * float(getattr(source.config, "embedding_multiplier", 1.0))
    return Embedding(
        path=source.path(table),
        n_tokens=n_tokens,
        width=width,
        multiplier=multiplier,
        own_multiplier=own,
        positions=None
        if positions is None
        else Positions(
            path=source.path(positions), rows=positions.weight.shape[0], offset=int(getattr(positions, "offset", 0))
        ),
        norm=read_norm(source, norm),
    )


def _head(source: BlockSource, head: nn.Module | None, table: nn.Module) -> Head | None:
    if head is None or not is_linear(head):
        return None
    config: Any = source.config
    cap, scaling = getattr(config, "final_logit_softcapping", None), _named(source, "logits_scaling")
    own, embedded = (
        module.weight if isinstance(module, CodedModule) else module._parameters.get("weight")
        for module in (head, table)
    )
    return Head(
        linear=read_linear(source, head, "head"),
        tied=own is embedded,
        scale=_named(source, "logit_scale") * (scaling if source.family.multiplies_logits else 1 / scaling),
        softcap=None if cap is None else float(cap),
    )


def _named(source: BlockSource, name: str) -> float:
    """Return the config's value ``name``, a factor of the logits. Return 1 if the config has no such value, or if the
    model's forward does not read it.
    """
    forward: Any = inspect.unwrap(plain_class(type(source.model)).forward)
    is_read = source.config is source.model.config or name in forward.__code__.co_names
    return float(getattr(source.config, name, None) or 1.0) if is_read else 1.0


def _no_table(source: BlockSource, positions: nn.Module | None) -> Iterator[Strange]:
    if positions is not None:
        yield Strange(path=source.path(positions), reason="its positions are computed, not looked up in a table")


def _strange(
    source: BlockSource, holder: nn.Module, known: list[nn.Module | None], norm: Any, norm_module: nn.Module | None
) -> Iterator[Strange]:
    """Yield the modules outside the blocks that the description cannot express, except those for images."""
    reason = source.family.strange(source.config)
    if reason is not None:
        yield Strange(path=source.path(holder), reason=reason)
    if norm_module is not None and norm is None:
        yield Strange(path=source.path(norm_module), reason="it is no RMSNorm or LayerNorm")
    head = source.model.get_output_embeddings()
    if head is not None and not is_linear(head):
        yield Strange(path=source.path(head), reason="the head is not a linear layer")
    has_images = source.config is not source.model.config
    yield from undescribed(source, holder if has_images else source.model, known)
