"""Virtual tokens before a model's input, for prefix and prompt adapters: masks, positions and caches with n more
tokens.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from veneer.contract import VirtualTokenMethod
from veneer.errors import CompositionError, ConfigError
from veneer.model.adapted.holder import Holder, tensors_of
from veneer.model.adapted.routing import Routing
from veneer.model.adapted.state import AdapterState
from veneer.model.sites.front import Front

CACHE_NAMES = ("cache", "past_key_values", "layer_past", "past_key_value")
MARK = "_virtual_tokens_of"  # on a cache: the adapter whose virtual tokens it starts with
Arguments = dict[str, Any]
KeysAndValues = dict[int, tuple[Tensor, Tensor]]


def cache_name(forward: Callable[..., object]) -> str | None:
    """Return the name of a forward function's argument for the cache, if it has one."""
    known = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in known), None)


def inner_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a model that runs its blocks, without the head."""
    found = model.base_model if model.config.is_encoder_decoder else model.get_decoder()
    if not isinstance(found, PreTrainedModel):  # ModernBERT calls its head so
        return cast(PreTrainedModel, model.base_model)
    has_head = found is model or found.get_output_embeddings() is not None  # Llama 4, Kosmos 2.5
    return cast(PreTrainedModel, getattr(found, "model", found) if has_head else found)


class VirtualTokens(Holder):
    """Adapters of one kind (prefixes or prompts) by name, and the hooks that put their virtual tokens before every
    sequence.

    ``runs_the_model``: filling a cache with the virtual tokens needs a pass through the model. Holders that need no
    pass fill the cache first, so that this pass finds their tokens there. The holder is a child of the model, so that
    it moves and is copied with the model. The hook is on the inner model, without the head, so that code that calls the
    inner model directly (a chunked loss) gets the same result.
    """

    runs_the_model: ClassVar[bool]
    site: Any

    def __init__(self, state: AdapterState, model: PreTrainedModel) -> None:
        super().__init__()
        self.adapter_state = state
        self.adapters = nn.ModuleDict()
        inner = self.stack(model)
        self.cache_name = cache_name(inner.forward)
        self.handles = [inner.register_forward_pre_hook(self.before_forward, with_kwargs=True)]
        if hasattr(model, "_prepare_cache_for_generation"):
            # an attribute of this one object, in front of its class's; `remove` uncovers that again
            model._prepare_cache_for_generation = functools.partial(prepare_generation, model)

    def stack(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return the part of the model whose input starts with the virtual tokens."""
        return inner_model(model)

    def leave(self, model: nn.Module, path: str) -> None:
        for handle in self.handles:
            handle.remove()
        if list(virtual_tokens(model).values()) == [self]:
            model.__dict__.pop("_prepare_cache_for_generation", None)
        delattr(model, path)

    def parameters_of(self, name: str) -> dict[str, Tensor]:
        """Return the parameters of one adapter by name, and its frozen tensors, which stay at their initial values."""
        return tensors_of(self.adapters[name])

    def packed(self, name: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        params = {own: values[key] for own, key in self.disk_keys(name).items()}
        return {key: value.detach() for key, value in self.method(name).stored(self.site, params).items()}

    def keys_and_values(self, name: str, run: Callable[[Tensor], KeysAndValues]) -> KeysAndValues:
        """Return, by layer, the cached keys and values of one adapter's tokens, in the base's dtype.

        ``run`` passes embeddings (n, d) through the base and returns their keys and values.
        """
        raise NotImplementedError

    def method(self, name: str) -> VirtualTokenMethod:
        """Return the config of adapter ``name``."""
        return cast(VirtualTokenMethod, self.adapter_state.configs[name])

    def acting(self) -> Front | None:
        """Return the virtual tokens before the rows, or None if no adapter is active.

        Raises CompositionError if several adapters act on one row.
        """
        routing, names = self.adapter_state.routed(), self.acting_on_rows()
        counts = {name: self.method(name).num_virtual_tokens for name in names}
        if routing is not None:
            return Front(counts, routing) if names else None
        if len(names) > 1:
            raise CompositionError(
                f"the adapters {names} all put virtual tokens in front of the sequence: activate one of them at a time"
            )
        return Front(counts) if names else None

    def before_forward(self, model: PreTrainedModel, args: Any, kwargs: Any) -> Any:
        """Return the arguments of the model's forward pass, changed so that the virtual tokens come first."""
        front = self.acting()
        if front is None:
            return None
        given = self.named(model, args, kwargs)
        cache = given.get(self.cache_name) if self.cache_name else None
        if cache is not None and cache.get_seq_length() > 0:
            return (), self.continued(model, given, cache, front)
        return (), self.started(model, with_positions(model, given, front), cache, front)

    def started(self, model: PreTrainedModel, given: Arguments, cache: Cache | None, front: Front) -> Arguments:
        """Return the arguments ``given`` of a forward pass with which a sequence starts, changed so that the virtual
        tokens come first.
        """
        raise NotImplementedError

    def fill(self, model: PreTrainedModel, cache: Cache, front: Front, n_rows: int) -> None:
        """Put the virtual tokens into an empty cache."""
        raise NotImplementedError

    def continued(self, model: PreTrainedModel, given: Arguments, cache: Cache, front: Front) -> Arguments:
        """Return the arguments for a sequence whose start is in the cache.

        Arguments that already count the virtual tokens stay unchanged.
        """
        if getattr(cache, MARK, None) != front.mark:
            raise ConfigError(
                f"the cache given was filled without the virtual tokens of {' and '.join(map(repr, front.names))}, or "
                "with others: start from an empty cache"
            )
        mask = given.get("attention_mask")
        whole = _length(given) + cache.get_seq_length()
        counted = isinstance(mask, Tensor) and (mask.ndim > 2 or mask.shape[1] >= whole)
        if counted or isinstance(mask, dict):  # as generate() prepares it
            return given
        if not front.is_even and (mask is None or (takes_positions(model) and "position_ids" not in given)):
            raise ConfigError(
                f"rows have different numbers of virtual tokens ({dict(front.counts)}): give attention_mask and "
                "position_ids to a forward pass that continues from a cache, or use generate()"
            )
        return given | shifted(given, front)

    def counted(self, front: Front, n_rows: int, model_kwargs: Arguments) -> None:
        """Add the cached virtual tokens to the mask and the positions with which `generate` starts."""
        positions = model_kwargs.get("position_ids")
        model_kwargs["attention_mask"] = _with_mask(model_kwargs["attention_mask"], front)
        if positions is not None:
            rows = positions.expand(n_rows, -1) if positions.shape[0] == 1 else positions
            model_kwargs["position_ids"] = front.shift(rows)

    def in_decoder(self, model: PreTrainedModel) -> bool:
        """Return True if the virtual tokens come before the generated ones."""
        return not model.config.is_encoder_decoder

    def named(self, model: PreTrainedModel, args: Any, kwargs: Any) -> Arguments:
        """Return positional and named arguments of a forward pass, all by name."""
        given = dict(inspect.signature(model.forward).bind_partial(*args).arguments) | kwargs
        for old in CACHE_NAMES:
            if old in given and self.cache_name and old != self.cache_name:
                given[self.cache_name] = given.pop(old)
        return {key: value for key, value in given.items() if value is not None}


def virtual_tokens(model: nn.Module) -> dict[str, VirtualTokens]:
    """Return the holders of prefixes and prompts by path."""
    return {name: child for name, child in model.named_children() if isinstance(child, VirtualTokens)}


def prepare_generation(
    model: PreTrainedModel, generation_config: Any, model_kwargs: Arguments, mode: Any, batch_size: int, length: int
) -> None:
    """Prepare the cache of `generate`, with the virtual tokens at its start, in place of transformers' own function."""
    found = sorted(virtual_tokens(model).values(), key=lambda holder: holder.runs_the_model)
    fronts = [(h, front) for h in found if h.in_decoder(model) and (front := h.acting())]
    prepare = type(model)._prepare_cache_for_generation
    width = sum(front.width for _, front in fronts)
    prepare(model, generation_config, model_kwargs, mode, batch_size, length + width)
    cache = model_kwargs.get(fronts[0][0].cache_name or "") if fronts else None
    if cache is None:
        return
    if cache.get_seq_length() > 0:
        raise ConfigError("generate() with virtual tokens starts from an empty cache: pass the whole text")
    n_rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
    if model_kwargs.get("attention_mask") is None:  # dropped by generate() because it was all ones
        ones = torch.ones(n_rows, generation_config._mask_length, dtype=torch.long, device=model.device)
        model_kwargs["attention_mask"] = ones
    for holder, front in fronts:
        holder.fill(model, cache, front, n_rows)
        setattr(cache, MARK, front.mark)
    for holder, front in reversed(fronts):  # the last to be filled in stands right in front of the text
        holder.counted(front, n_rows, model_kwargs)


def with_positions(model: PreTrainedModel, given: Arguments, front: Front) -> Arguments:
    """Return the arguments of a pass. If rows have different numbers of virtual tokens, a mask and positions of the
    given tokens are added where they are missing.
    """
    if front.is_even:
        return given
    n_rows, length = cast(Tensor, given.get("input_ids", given.get("inputs_embeds"))).shape[:2]
    written: Arguments = {"attention_mask": torch.ones(n_rows, length, dtype=torch.long, device=model.device)}
    if takes_positions(model):
        written["position_ids"] = torch.arange(length, device=model.device).expand(n_rows, -1)
    return written | given


def takes_positions(model: nn.Module) -> bool:
    """Return True if a model's forward accepts position ids and the model does not derive positions from its mask
    (OPT).
    """
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding))
    if any("attention_mask" in inspect.signature(table.forward).parameters for table in tables):
        return False
    return "position_ids" in inspect.signature(model.forward).parameters


def shifted(given: Arguments, front: Front) -> Arguments:
    """Return the given mask and position ids (only those present) for a sequence that the virtual tokens precede: the
    mask is extended by them, and positions are shifted.
    """
    changed: Arguments = {}
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if mask is not None:
        changed["attention_mask"] = _with_mask(mask, front)
    if positions is not None:
        changed["position_ids"] = front.shift(positions)
    return changed


def refuse_packing(given: Arguments, method: VirtualTokenMethod) -> None:
    """Raise ConfigError if several sequences share a row: their virtual tokens would precede only the first of them."""
    positions = given.get("position_ids")
    if positions is None or "attention_mask" in given:
        return
    if bool((positions[..., 1:] < positions[..., :-1]).any()):
        raise ConfigError(
            f"{type(method).__name__} cannot train on packed rows (position_ids start again within a row): "
            "switch packing off"
        )


def _with_mask(mask: Tensor, front: Front) -> Tensor:
    """Extend a mask over (rows, keys) or (rows, heads, queries, keys) by the virtual positions.

    Every query may attend to every virtual token of its row.
    """
    seen = front.mask(mask.shape[0], mask.device)
    if mask.ndim == 2:
        return torch.cat([seen.to(mask.dtype), mask], dim=1)
    if mask.dtype != torch.bool:  # what is added to the scores
        seen = mask.new_zeros(seen.shape).masked_fill(~seen, torch.finfo(mask.dtype).min)
    return torch.cat([seen[:, None, None].expand(*mask.shape[:-1], -1), mask], dim=-1)


def _length(given: Arguments) -> int:
    tokens = given.get("input_ids", given.get("inputs_embeds"))
    return cast(Tensor, tokens).shape[1]


def require_mixable(model: PreTrainedModel, routing: Routing) -> None:
    """Raise CompositionError if rows of this model cannot have different virtual tokens."""
    with next(iter(virtual_tokens(model).values())).adapter_state.route(routing):
        fronts = [front for holder in virtual_tokens(model).values() if (front := holder.acting())]
    uneven = [front for front in fronts if not front.is_even]
    kept = [n for f in fronts for n in f.names if getattr(_config(model, n), "keep_virtual_logits", False)]
    problems = (
        [f"{kept} set keep_virtual_logits, and rows would have different numbers of logits"] if kept and uneven else []
    )
    if uneven and not _is_causal(model):
        problems.append(f"{type(model).__name__} is no causal decoder and reads its result at the first position")
    if uneven and _counts_by_itself(model):
        problems.append(f"{type(model).__name__} counts positions itself and takes no position_ids")
    if uneven and model.config.is_encoder_decoder and any(not h.runs_the_model for h in virtual_tokens(model).values()):
        problems.append(f"the decoder of {type(model).__name__} counts positions behind a prefix itself")
    if len(fronts) > 1 and getattr(model.config.get_text_config(), "sliding_window", None):
        problems.append("a sliding window would count wrong distances to prefixes and prompts together")
    if problems:
        counts = {name: n for front in fronts for name, n in front.counts.items()}
        raise CompositionError(
            f"rows with different numbers of virtual tokens ({counts}) cannot share a batch: {'; '.join(problems)}. "
            "Run them one after another."
        )


def _config(model: nn.Module, name: str) -> object:
    return next(h.method(name) for h in virtual_tokens(model).values() if name in h.adapters)


def _is_causal(model: PreTrainedModel) -> bool:
    """Return True if no position sees later ones, so that masked positions before a row can be left out."""
    if model.config.is_encoder_decoder or model.can_generate():
        return True
    return any(getattr(module, "is_causal", False) for module in model.modules())


def _counts_by_itself(model: PreTrainedModel) -> bool:
    reading = model.get_encoder() if model.config.is_encoder_decoder else inner_model(model)
    if "position_ids" in inspect.signature(reading.forward).parameters:
        return False
    tables = [name for name, m in reading.named_modules() if isinstance(m, nn.Embedding)]
    return any("position" in name.rpartition(".")[2] for name in tables)
