"""Prefixes and cartridges initialised from text: the keys and values that the base model computes for it.

The prefix then acts as if the text preceded the input. Source: Li & Liang 2021, arXiv:2101.00190, section 7.4.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedTokenizerBase

from veneer.adapters.peft_model import PeftModel
from veneer.contract import PrefixMethod
from veneer.errors import ConfigError
from veneer.model.sites.prefix import CHILD, PrefixAdapters
from veneer.model.sites.structure import evaluation
from veneer.model.sites.virtual_tokens import cache_name
from veneer.records.deltas import PrefixDelta
from veneer.records.prefix import flatten_prefix


@torch.no_grad()
def initialize_kv_prefix_from_text(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: str,
    adapter_name: str | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Initialise a prefix from the first tokens of a text. Return the matrix (n, width) that a save without a network
    holds.

    ``use_chat_template`` puts the text into a system message if the tokenizer has a template. Raises ConfigError if the
    adapter is not a prefix, if an MLP computes the prefix, or if the text has fewer tokens than the prefix.
    """
    name = model.active_adapter if adapter_name is None else adapter_name
    holder, config = _prefix(model, name)
    ids = torch.tensor(_tokens(tokenizer, text, use_chat_template)[:max_length])
    if len(ids) < config.num_virtual_tokens:
        raise ConfigError(
            f"the text has {len(ids)} tokens and the prefix num_virtual_tokens={config.num_virtual_tokens}: give a "
            "longer text, or a shorter prefix"
        )
    device = next(holder.adapters[name].parameters()).device
    cache = DynamicCache()  # one that keeps every token, also in a sliding window
    named = {cast(str, cache_name(model.forward)): cache}
    with evaluation(model), model.disable_adapter():
        model(input_ids=ids[None, : config.num_virtual_tokens].to(device), **named, use_cache=True)
    return initialize_kv_prefix_from_past_key_values(model, adapter_name=name, past_key_values=cache)


@torch.no_grad()
def initialize_kv_prefix_from_past_key_values(
    model: PeftModel, *, past_key_values: Cache, adapter_name: str | None = None
) -> Tensor:
    """Initialise a prefix from the first positions of a cache with one row. Return the matrix (n, width) that a save
    without a network holds.

    Raises ConfigError if the adapter is not a prefix, if an MLP computes the prefix, or if the cache holds fewer
    positions than the prefix.
    """
    name = model.active_adapter if adapter_name is None else adapter_name
    holder, config = _prefix(model, name)
    n = config.num_virtual_tokens
    records = []
    for site in holder.site:
        layer = cast(Any, past_key_values.layers[site.layer])
        if layer.keys.shape[0] != 1 or layer.keys.shape[2] < n:
            raise ConfigError(
                f"layer {site.layer} of the cache has {layer.keys.shape[0]} rows and {layer.keys.shape[2]} positions: "
                f"one row and at least num_virtual_tokens={n} positions are needed"
            )
        k, v = (part[0, :, :n].transpose(0, 1) for part in (layer.keys, layer.values))
        records.append(PrefixDelta(k=k, v=v))
    flat = flatten_prefix(records)
    values = holder.unpacked(name, config.stored(holder.site, {"prompt_embeddings": flat}))
    for key, (_, tensor) in holder.live_tensors(name, CHILD).items():
        tensor.copy_(values[key])
    return flat


def _prefix(model: nn.Module, name: str) -> tuple[PrefixAdapters, PrefixMethod]:
    holder = getattr(model, CHILD, None)
    if holder is None or not holder.holds(name):
        raise ConfigError(
            f"{name!r} is no prefix adapter of this model: attach one with PrefixTuningConfig or CartridgeConfig first"
        )
    config = cast(PrefixMethod, holder.method(name))
    if holder.site[0].cross:
        raise ConfigError(
            f"{type(model).__name__} is an encoder-decoder: its decoder has no text in front that a prefix could "
            "start from. Leave the start as it is."
        )
    if config.has_network:
        raise ConfigError(
            f"an MLP makes the prefix {name!r}: only one without prefix_projection can start from text. Attach one "
            "with prefix_projection=False"
        )
    return holder, config


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, as_chat: bool) -> list[int]:
    if not as_chat or not tokenizer.chat_template:
        return cast("list[int]", tokenizer(text)["input_ids"])
    messages = [{"role": "system", "content": text}]
    return cast("list[int]", tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))
