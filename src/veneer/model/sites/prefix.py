"""Prefixes on a model: keys and values at the start of every attention layer's cache, before the sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.utils import ModelOutput

from veneer.contract import PrefixMethod
from veneer.contract.known import Known
from veneer.contract.places import INPUT, Placed, placed
from veneer.errors import ConfigError, TargetError
from veneer.model.adapted.allocation import Allocation
from veneer.model.adapted.state import AdapterState
from veneer.model.blueprint.describe import listed
from veneer.model.modules.plan import AttachPlan
from veneer.model.modules.snapshot import Snapshot
from veneer.model.sites.front import Front
from veneer.model.sites.structure import evaluation, example_inputs
from veneer.model.sites.virtual_tokens import (
    MARK,
    Arguments,
    KeysAndValues,
    VirtualTokens,
    cache_name,
    inner_model,
    refuse_packing,
    shifted,
)
from veneer.records.deltas import PrefixDelta
from veneer.records.sites import AttentionSite

CHILD = "prefix_adapter"


class PrefixAdapters(VirtualTokens):
    """Prefixes of a model by adapter name. A prefix is keys and values at the start of every attention
    layer's cache.
    """

    runs_the_model = False

    def __init__(self, state: AdapterState, model: PreTrainedModel, site: tuple[AttentionSite, ...]) -> None:
        super().__init__(state, model)
        self.site = site
        self.layers, self.dtype = [each.layer for each in site], model.dtype
        stack = self.stack(model)
        self.text_config = stack.config.get_text_config(decoder=True)
        self.handles.append(stack.register_forward_hook(self.after_forward, with_kwargs=True))
        for module in stack.modules():
            index, argument = getattr(module, "layer_idx", None), cache_name(module.forward)
            if index is not None and argument is not None and "attention" in type(module).__name__.lower():
                hook = module.register_forward_pre_hook(_Recomputed(self, index, argument), with_kwargs=True)
                self.handles.append(hook)

    def stack(self, model: PreTrainedModel) -> PreTrainedModel:
        return _stack(model)

    def keys_and_values(self, name: str, run: Callable[[Tensor], KeysAndValues]) -> KeysAndValues:
        dtype, records = self.dtype, zip(self.layers, self.records(name), strict=True)
        return {layer: (record.k.to(dtype), record.v.to(dtype)) for layer, record in records}

    def unpacked(self, name: str, written: Mapping[str, Tensor]) -> dict[str, Tensor]:
        keys, params = self.disk_keys(name), self.method(name).packing.unpack(written)
        return {keys[own]: value for own, value in params.items() if own in keys}

    def records(self, name: str) -> tuple[PrefixDelta, ...]:
        """Return the keys and values of the prefix of adapter ``name``, computed from its parameters: one record for
        each layer.
        """
        return cast(PrefixMethod, self.method(name)).lower(self.site, self.parameters_of(name))

    def started(self, model: PreTrainedModel, given: Arguments, cache: Cache | None, front: Front) -> Arguments:
        refuse_packing(given, self.method(front.names[0]))
        tokens = given.get("input_ids", given.get("inputs_embeds"))
        filled = self.empty_cache() if cache is None else cache
        self.fill(model, filled, front, cast(Tensor, tokens).shape[0])
        return given | {cast(str, self.cache_name): filled} | shifted(given, front)

    def fill(self, model: PreTrainedModel, cache: Cache, front: Front, n_rows: int) -> None:
        _require_room(cache)
        dtype = _compute_dtype(model.device.type, model.dtype)
        each = [self.records(name) for name, _ in front.choices]
        for layer, records in zip(self.layers, zip(*each, strict=True), strict=True):
            put_prefix(cache, layer, rows_of(front, records, n_rows), dtype)
        for layer in getattr(cache, "layers", ()):  # states count tokens too, since transformers 5.25
            counter = getattr(layer, "cumulative_length_linear", None)
            if counter is not None:
                counter.add_(front.width)
        setattr(cache, MARK, front.mark)

    def after_forward(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Return the model's output. If the caller set ``use_cache=False``, the output's cache, which carried the
        prefix, is removed.
        """
        if self.acting() and kwargs.get("use_cache") is False and isinstance(output, ModelOutput):
            output[cast(str, self.cache_name)] = None
        return output

    def empty_cache(self) -> Cache:
        """Return an empty cache, with the kind of cache layer (full or sliding) that each layer of the model needs.

        A sliding window keeps as many tokens as the model's mask expects.
        """
        own = DynamicCache(config=self.text_config)
        return EncoderDecoderCache(own, DynamicCache(config=self.text_config)) if self.site[0].cross else own


class _Recomputed:
    """Hook that gives an attention layer its prefix when gradient checkpointing has removed the cache.

    transformers runs a checkpointed layer without a cache, because a recomputation would write to it twice. The prefix
    is computed inside the layer, so that it is recomputed with the layer and gets its gradient.
    """

    def __init__(self, holder: PrefixAdapters, index: int, argument: str) -> None:
        self.holder, self.index, self.argument = holder, index, argument

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        front = self.holder.acting()
        if front is None or kwargs.get(self.argument) is not None or self.index not in self.holder.layers:
            return None
        if kwargs.get("key_value_states") is not None:  # cross-attention, whose keys are the encoder's
            return None
        hidden = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        records = [self.record(name) for name, _ in front.choices]
        cache = self.holder.empty_cache()
        rows = rows_of(front, records, hidden.shape[0])
        put_prefix(cache, self.index, rows, _compute_dtype(hidden.device.type, hidden.dtype))
        return args, {**kwargs, self.argument: cache}

    def record(self, name: str) -> PrefixDelta:
        """Return an adapter's keys and values for this attention layer, without computing those of the other layers."""
        method, place = cast(PrefixMethod, self.holder.method(name)), self.holder.layers.index(self.index)
        return method.lower_one(self.holder.site, self.holder.parameters_of(name), place)


def prefix_places(snapshot: Snapshot, plan: AttachPlan) -> dict[str, Placed]:
    """Return the only place of a prefix: all attention layers."""
    return {INPUT: placed(plan.config, attention_sites(cast(PreTrainedModel, snapshot.model)))}


def put_prefix_on(snapshot: Snapshot, name: str, state: AdapterState, plan: AttachPlan, allocation: Allocation) -> None:
    """Put the prefix of adapter ``name`` on the model."""
    model = cast(PreTrainedModel, snapshot.model)
    if not hasattr(model, CHILD):
        with state.base_alone():
            sites = attention_sites(model)
        model.add_module(CHILD, PrefixAdapters(state, model, sites))
    holder = cast(PrefixAdapters, getattr(model, CHILD))
    config = plan.config.for_sites((holder.site,), Known())
    state.configs[name] = config
    held = allocation.parameters(config, holder.site, model.device, model.dtype)
    for key in config.packing.fixed:  # a buffer, as in a layer
        held.register_buffer(key, held.pop(key).detach())
    holder.hold(name, held, placed(config, holder.site).keys)


def attention_sites(model: PreTrainedModel) -> tuple[AttentionSite, ...]:
    """Return the attention layers that keep keys and values, found in the cache of one short forward pass.

    For an encoder-decoder they are those of the decoder's self-attention. On the meta device a description replaces the
    pass. Raises TargetError if the model keeps no keys and values, or keeps them in another form. Raises NoStorageError
    if a pass is needed and the model has no storage.
    """
    described = _described_sites(model) if model.device.type == "meta" else None
    if described is not None:
        return described
    stack, cross = _stack(model), bool(model.config.is_encoder_decoder)
    argument = None if stack is None else cache_name(stack.forward)
    if argument is None:
        raise TargetError(
            f"{type(model).__name__} is not a decoder with a cache of keys and values, which a prefix goes into. "
            "Use PromptTuningConfig or LoraConfig on this model."
        )
    config = stack.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config)
    both = EncoderDecoderCache(cache, DynamicCache(config=config)) if cross else cache
    with evaluation(model), torch.no_grad():
        model.base_model(**example_inputs(model), **{argument: both}, use_cache=True)
    found = []
    for index, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is not None and values is not None and keys.numel() and keys.ndim == 4 and keys.shape == values.shape:
            found.append(
                AttentionSite(
                    name=f"layer {index}", layer=index, kv_heads=keys.shape[1], head_dim=keys.shape[3], cross=cross
                )
            )
    if not found or len({(site.kv_heads, site.head_dim) for site in found}) > 1:
        raise TargetError(
            f"the layers of {type(model).__name__} do not all keep keys and values of one shape, which a prefix needs: "
            f"{[(site.kv_heads, site.head_dim) for site in found]}. Use PromptTuningConfig or LoraConfig on this model."
        )
    return tuple(found)


def _described_sites(model: PreTrainedModel) -> tuple[AttentionSite, ...] | None:
    """Return the attention layers of a decoder from its description, for model types whose descriptions tests verify.
    Return None for any other model, or if layers differ in their heads.
    """
    decoder = listed(model)
    heads = [] if decoder is None else [attention.heads for attention in decoder.attentions]
    if decoder is None or len(heads) < len(decoder.blocks) or len({(h.n_kv_heads, h.head_dim) for h in heads}) > 1:
        return None
    return tuple(
        AttentionSite(name=f"layer {index}", layer=index, kv_heads=each.n_kv_heads, head_dim=each.head_dim)
        for index, each in enumerate(heads)
    )


def _stack(model: PreTrainedModel) -> Any:
    """Return the part of a model whose attention takes a prefix: the decoder of an encoder-decoder, or the model
    without its head.
    """
    return model.get_decoder() if model.config.is_encoder_decoder else inner_model(model)


def rows_of(front: Front, records: Sequence[PrefixDelta], n_rows: int) -> tuple[Tensor, Tensor]:
    """Return one layer's keys and values for every row, (rows, n, kv_heads, head_dim).

    ``records`` has one record for each pair of adapter and task in ``front``.
    """
    return front.rows([r.k for r in records], n_rows), front.rows([r.v for r in records], n_rows)


def put_prefix(cache: Cache, layer: int, rows: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    """Write one layer's prefix into a cache, whose axes are heads, then positions."""
    keys, values = (x.transpose(1, 2).to(dtype) for x in rows)
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    own.update(keys, values, layer)


def _require_room(cache: Cache) -> None:
    """Raise ConfigError for a cache that does not work with a prefix: a static cache of an encoder-decoder, which has
    no room for it, or a cache in fp8, whose scale would fit only the prefix.
    """
    if isinstance(cache, EncoderDecoderCache) and cache.self_attention_cache.is_compileable:
        raise ConfigError(
            "a static cache has no room for the prefix of an encoder-decoder's decoder, since its size does not count "
            "the prefix: leave cache_implementation out, or use another cache"
        )
    if any(type(layer).__name__ == "Fp8QuantizedLayer" for layer in getattr(cache, "layers", ())):
        raise ConfigError(
            "a QuantizedCache of backend 'fp8' derives its scale from the first values, those of the prefix: larger "
            "keys and values of the text would be clipped. Use backend 'quanto' or 'hqq', or another cache."
        )


def _compute_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which attention computes: autocast's if autocast is on for the device, or else ``dtype``."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
