"""What prefix and prompt adapters share on a model: masks, positions and caches with n virtual tokens in front."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from veneer.core.method import VirtualTokenMethod
from veneer.core.prompt import with_leading
from veneer.errors import CompositionError, ConfigError
from veneer.model.state import AdapterState

CACHE_NAMES = ("cache", "past_key_values", "layer_past", "past_key_value")
MARK = "_virtual_tokens_of"  # on a cache: the adapter whose virtual tokens it starts with
Arguments = dict[str, Any]


def cache_name(forward: Callable[..., object]) -> str | None:
    """What a forward function calls its cache, if it takes one."""
    known = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in known), None)


def inner_model(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that runs its blocks, without the head."""
    return cast(PreTrainedModel, model.base_model if model.config.is_encoder_decoder else model.get_decoder())


class VirtualTokens(nn.Module):
    """The adapters of one kind by name, and the hooks that put them in front of every sequence.

    A child of the model, so that it moves and copies with it. The hook is on the inner model, without the head, so that
    those who call that directly (a chunked loss) get the same.
    """

    def __init__(self, state: AdapterState, model: PreTrainedModel) -> None:
        super().__init__()
        self.adapter_state = state
        self.adapters = nn.ModuleDict()
        inner = inner_model(model)
        self.cache_name = cache_name(inner.forward)
        self.handles = [inner.register_forward_pre_hook(self.before_forward, with_kwargs=True)]
        if hasattr(model, "_prepare_cache_for_generation"):
            # an attribute of this one object, in front of its class's; `remove` uncovers that again
            model._prepare_cache_for_generation = functools.partial(self.prepare_generation, model)

    def remove(self, model: PreTrainedModel) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        model.__dict__.pop("_prepare_cache_for_generation", None)

    def parameters_of(self, name: str) -> dict[str, Tensor]:
        """The trained parameters of one adapter."""
        return dict(self.adapters[name].named_parameters())

    def disk_keys(self, name: str, path: str) -> dict[str, str]:
        """For each parameter of adapter ``name``, its key on disk."""
        return self.method(name).disk_names()

    def packed(self, name: str, path: str, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a plain save holds of adapter ``name``, from its parameters by their keys on disk."""
        keys = self.disk_keys(name, path)
        return {k: v.detach() for k, v in self.stored(name, {key: found[keys[key]] for key in keys}).items()}

    def stored(self, name: str, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a plain save holds, from parameters by their names."""
        raise NotImplementedError

    def method(self, name: str) -> VirtualTokenMethod:
        """The config of adapter ``name``."""
        return cast(VirtualTokenMethod, self.adapter_state.configs[name])

    def acting(self) -> str | None:
        """The adapter that acts now. Raises CompositionError where there are several."""
        names = [name for name in self.adapter_state.acting() if name in self.adapters]
        if len(names) > 1:
            raise CompositionError(
                f"the adapters {names} all put virtual tokens in front of the sequence: activate one of them at a time"
            )
        return names[0] if names else None

    def before_forward(self, model: PreTrainedModel, args: Any, kwargs: Any) -> Any:
        """The arguments of the model's forward pass, changed so that the virtual tokens are in front."""
        name = self.acting()
        if name is None:
            return None
        given = self.named(model, args, kwargs)
        cache = given.get(self.cache_name) if self.cache_name else None
        if cache is not None and cache.get_seq_length() > 0:
            return (), self.continued(given, cache, name)
        return (), self.started(model, given, cache, name)

    def started(self, model: PreTrainedModel, given: Arguments, cache: Cache | None, name: str) -> Arguments:
        """The arguments for a sequence that starts here."""
        raise NotImplementedError

    def fill(self, model: PreTrainedModel, cache: Cache, name: str, n_rows: int) -> None:
        """Put the virtual tokens into an empty cache."""
        raise NotImplementedError

    def continued(self, given: Arguments, cache: Cache, name: str) -> Arguments:
        """The arguments for a sequence whose start is in the cache. What already counts the virtual tokens is kept."""
        if getattr(cache, MARK, None) != name:
            raise ConfigError(
                f"the cache given was filled without the virtual tokens of adapter {name!r}: start from an empty cache"
            )
        mask = given.get("attention_mask")
        whole = _length(given) + cache.get_seq_length()
        counted = isinstance(mask, Tensor) and (mask.ndim > 2 or mask.shape[1] >= whole)
        if counted or isinstance(mask, dict):  # as generate() prepares it
            return given
        return given | shifted(given, self.method(name).num_virtual_tokens)

    def prepare_generation(
        self, model: PreTrainedModel, generation_config: Any, model_kwargs: Arguments, *rest: Any
    ) -> None:
        """In place of transformers' own, before `generate` runs: its cache starts with the virtual tokens."""
        mode, batch_size, max_cache_length = rest
        name = self.acting()
        n = self.method(name).num_virtual_tokens if name else 0
        prepare = type(model)._prepare_cache_for_generation
        in_cache = n if name and self.in_decoder(model) else 0
        prepare(model, generation_config, model_kwargs, mode, batch_size, max_cache_length + in_cache)
        cache = model_kwargs.get(self.cache_name or "")
        if not in_cache or cache is None or name is None:
            return
        if cache.get_seq_length() > 0:
            raise ConfigError(
                "generate() starts from an empty cache where virtual tokens are active: pass the whole text"
            )
        n_rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
        self.fill(model, cache, name, n_rows)
        setattr(cache, MARK, name)
        mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        if mask is None:  # dropped by generate() because it was all ones
            length = generation_config._mask_length
            mask = torch.ones(n_rows, length, dtype=torch.long, device=model.device)
        model_kwargs["attention_mask"] = with_leading(mask, n, 1)
        if positions is not None:
            model_kwargs["position_ids"] = positions + n

    def in_decoder(self, model: PreTrainedModel) -> bool:
        """Whether the virtual tokens are in front of what is generated."""
        return not model.config.is_encoder_decoder

    def named(self, model: PreTrainedModel, args: Any, kwargs: Any) -> Arguments:
        """Positional and named arguments of a forward pass, all by name."""
        given = dict(inspect.signature(model.forward).bind_partial(*args).arguments) | kwargs
        for old in CACHE_NAMES:
            if old in given and self.cache_name and old != self.cache_name:
                given[self.cache_name] = given.pop(old)
        return {key: value for key, value in given.items() if value is not None}


def virtual_tokens(model: nn.Module) -> dict[str, VirtualTokens]:
    """The holders of prefixes and prompts by path."""
    return {name: child for name, child in model.named_children() if isinstance(child, VirtualTokens)}


def detach_virtual_tokens(model: PreTrainedModel, name: str) -> None:
    """Take one adapter's virtual tokens off; a holder without any goes, with its hooks."""
    for child, holder in virtual_tokens(model).items():
        if name in holder.adapters:
            del holder.adapters[name]
        if not holder.adapters:
            holder.remove(model)
            delattr(model, child)


def shifted(given: Arguments, n: int) -> Arguments:
    """Mask and positions with n virtual tokens counted in front of those given."""
    changed: Arguments = {}
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if mask is not None:
        changed["attention_mask"] = with_leading(mask, n, 1) if mask.ndim == 2 else _wider(mask, n)
    if positions is not None:
        changed["position_ids"] = positions + n
    return changed


def refuse_packing(given: Arguments, method: VirtualTokenMethod) -> None:
    """Raise where several sequences share a row: their virtual tokens would stand before the first of them only."""
    positions = given.get("position_ids")
    if positions is None or "attention_mask" in given:
        return
    if bool((positions[..., 1:] < positions[..., :-1]).any()):
        raise ConfigError(
            f"{type(method).__name__} cannot train on packed rows (position_ids start again within a row): "
            "switch packing off"
        )


def _wider(mask: Tensor, n: int) -> Tensor:
    """A mask over (queries, keys) in which every query sees n more keys in front."""
    seen = mask.new_ones((*mask.shape[:-1], n)) if mask.dtype == torch.bool else mask.new_zeros((*mask.shape[:-1], n))
    return torch.cat([seen, mask], dim=-1)


def _length(given: Arguments) -> int:
    tokens = given.get("input_ids", given.get("inputs_embeds"))
    return cast(Tensor, tokens).shape[1]
