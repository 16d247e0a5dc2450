"""Virtual tokens at the start of a model's input: placeholder ids, whose embeddings are replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Cache, PreTrainedModel
from transformers.utils import ModelOutput

from veneer.contract import PromptMethod
from veneer.contract.known import Known
from veneer.contract.places import INPUT, Placed, placed
from veneer.errors import ConfigError, TargetError
from veneer.model.adapted.allocation import Allocation
from veneer.model.adapted.state import AdapterState
from veneer.model.modules.plan import AttachPlan
from veneer.model.modules.snapshot import Snapshot
from veneer.model.quantized.embedding import table_shape
from veneer.model.sites.front import Front
from veneer.model.sites.virtual_tokens import (
    MARK,
    Arguments,
    KeysAndValues,
    VirtualTokens,
    inner_model,
    refuse_packing,
    shifted,
    takes_positions,
    with_positions,
)
from veneer.records.deltas import PromptDelta
from veneer.records.prompt import UNTRAINED, replace_leading, weighed_loss, with_leading
from veneer.records.sites import InputSite

CHILD = "prompt_adapter"
PER_TOKEN = ("logits", "start_logits", "end_logits", "last_hidden_state", "hidden_states")


class PromptAdapters(VirtualTokens):
    """Prompts of a model by adapter name. A prompt is virtual tokens at the start of the model's input.

    The whole model, head included, sees the virtual positions; the last of them predicts the first token. The output
    omits them. During a pass, ``outermost`` is the module with which it began, ``front`` the virtual tokens, ``length``
    the length of the rows, and ``labels`` their labels if some have weights. ``to_embed`` is True until the embeddings
    are replaced.
    """

    runs_the_model = True

    def __init__(self, state: AdapterState, model: PreTrainedModel) -> None:
        super().__init__(state, model)
        self.site = input_site(model)
        self.outermost: nn.Module | None = None
        self.front: Front | None = None
        self.length, self.to_embed, self.filling = 0, False, False
        self.labels: Tensor | None = None
        inner = inner_model(model)
        if inner is not model:
            self.handles.append(model.register_forward_pre_hook(self.before_forward, with_kwargs=True))
        for module in {model, inner}:
            self.handles.append(module.register_forward_hook(self.after_forward, always_call=True))
        embedding = reader(model).get_input_embeddings()
        self.handles.append(embedding.register_forward_hook(self.after_embedding))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "outermost": None}

    def tokens(self, front: Front, n_rows: int) -> Tensor:
        """Return the virtual tokens of every row, (rows, n, d)."""
        return front.rows([self.record(*choice).embeddings for choice in front.choices], n_rows)

    def keys_and_values(self, name: str, run: Callable[[Tensor], KeysAndValues]) -> KeysAndValues:
        return run(self.record(name).embeddings)

    def record(self, name: str, task: int | None = None) -> PromptDelta:
        """Return the virtual tokens of adapter ``name``, computed from its parameters, for one of its tasks if it has
        several.
        """
        method, params = cast(PromptMethod, self.method(name)), self.parameters_of(name)
        task = self.adapter_state.tasks.get(name) if task is None else task
        return method.lower(self.site, params if task is None else method.of_task(params, task))

    def before_forward(self, model: PreTrainedModel, args: Any, kwargs: Any) -> Any:
        if self.outermost is not None or self.filling:
            return None
        changed = super().before_forward(model, args, kwargs)
        if changed is not None:
            self.outermost, self.front = model, self.acting()
        return changed

    def started(self, model: PreTrainedModel, given: Arguments, cache: Cache | None, front: Front) -> Arguments:
        refuse_packing(given, self.method(front.names[0]))
        n, changed = front.width, dict(given)
        if "input_ids" in given:
            changed["input_ids"] = with_leading(given["input_ids"], n, _filler(model))
            self.to_embed, self.length = True, changed["input_ids"].shape[1]
        else:
            embedded = given["inputs_embeds"]
            room = embedded.new_zeros(embedded.shape[0], n, embedded.shape[2])
            changed["inputs_embeds"] = replace_leading(
                self.tokens(front, embedded.shape[0]), torch.cat([room, embedded], dim=1)
            )
            self.length = changed["inputs_embeds"].shape[1]
        if "attention_mask" in given:
            changed["attention_mask"] = shifted({"attention_mask": given["attention_mask"]}, front)["attention_mask"]
        for key, value in (("token_type_ids", 0), ("labels", UNTRAINED)):
            if key in given and given[key].ndim == 2 and given[key].shape[1] == self.length - n:
                changed[key] = with_leading(given[key], n, value)
                if key == "labels":
                    self._put_targets(changed[key], front)
        if "position_ids" in given:
            rest = front.shift(given["position_ids"])
            first = front.positions(rest.shape[-2], rest.device)
            changed["position_ids"] = torch.cat([first.expand(*rest.shape[:-1], n), rest], dim=-1)
        for key in ("start_positions", "end_positions"):
            if key in given:
                changed[key] = given[key] + n
        if "logits_to_keep" in given and not self._keeps_virtual(front):
            changed["logits_to_keep"] = _behind(given["logits_to_keep"], n, self.length - n)
        if cache is not None:
            setattr(cache, MARK, front.mark)
        return changed

    def _keeps_virtual(self, front: Front) -> bool:
        return any(cast(PromptMethod, self.method(name)).keep_virtual_logits for name in front.names)

    def _put_targets(self, labels: Tensor, front: Front) -> None:
        """Write the methods' targets for the virtual tokens into labels (rows, n + length), in place. If a target has a
        weight other than 1, also store the labels, from which the loss is then computed.
        """
        each = self._methods(front)
        if any(method.targets for method in each):
            targets = [method.targets or (UNTRAINED,) * method.num_virtual_tokens for method in each]
            labels[:, : front.width] = _in_front(front, targets, UNTRAINED, labels)
        self.labels = labels if any(weight != 1 for method in each for weight in method.target_weights) else None

    def _weighed_loss(self, logits: Tensor, labels: Tensor, front: Front) -> Tensor:
        """Return the loss of the labels, with each virtual token's loss times the weight that its adapter's method
        gives it.
        """
        weights = torch.ones(labels.shape, device=logits.device)
        each = [method.target_weights or (1.0,) * method.num_virtual_tokens for method in self._methods(front)]
        weights[:, : front.width] = _in_front(front, each, 1.0, weights)
        return weighed_loss(logits, labels, weights)

    def _methods(self, front: Front) -> list[PromptMethod]:
        return [cast(PromptMethod, self.method(name)) for name, _ in front.choices]

    def after_embedding(self, module: nn.Module, args: Any, embedded: Tensor) -> Tensor | None:
        """Return the embedded input with the virtual tokens inserted. Return None, which leaves it unchanged, if this
        pass has inserted them already or does not start a sequence.
        """
        if not self.to_embed or self.front is None or embedded.shape[1] != self.length:
            return None
        self.to_embed = False
        return replace_leading(self.tokens(self.front, embedded.shape[0]), embedded)

    def after_forward(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Return the output without the virtual positions. This is also called if the pass fails, to forget the state
        of the pass.
        """
        if module is not self.outermost:
            return None
        front, length, unread, labels = self.front, self.length, self.to_embed, self.labels
        self.outermost, self.front, self.length, self.to_embed, self.labels = None, None, 0, False, None
        if output is None or front is None:  # the pass has failed
            return None
        if unread:
            raise TargetError(
                f"{type(module).__name__} did not look its ids up in its embeddings: a prompt has no place in it. Use "
                "LoraConfig on this model"
            )
        n = 0 if self._keeps_virtual(front) or not length else front.width
        if not isinstance(output, ModelOutput):
            if labels is not None:
                raise ConfigError(
                    f"the adapter {front.names[0]!r} replaces the model's loss, which needs outputs with names: leave "
                    "return_dict at True"
                )
            return _without_leading(output, n, length, n_axes=3)
        cache = output.get(self.cache_name) if self.cache_name else None
        if cache is not None:
            setattr(cache, MARK, front.mark)
        if labels is not None and output.get("loss") is not None:
            output["loss"] = self._weighed_loss(output["logits"], labels, front)
        for key in (key for key in PER_TOKEN if key in output):
            output[key] = _without_leading(output[key], n, length)
        return output

    @torch.no_grad()
    def fill(self, model: PreTrainedModel, cache: Cache, front: Front, n_rows: int) -> None:
        """Run the virtual tokens alone through the model, to fill a cache. Their keys and values do not depend on later
        tokens.
        """
        inner, places = inner_model(model), {}
        if not front.is_even:
            places["attention_mask"] = front.mask(n_rows, model.device).long()
            if takes_positions(inner):
                places["position_ids"] = front.positions(n_rows, model.device)
        tokens = self.tokens(front, n_rows).to(model.dtype)
        self.filling = True
        try:
            inner(inputs_embeds=tokens, **places, **{cast(str, self.cache_name): cache}, use_cache=True)
        finally:
            self.filling = False


class EncoderPromptAdapters(PromptAdapters):
    """Prompts in front of the input of an encoder-decoder's encoder; the decoder attends to the virtual tokens too."""

    def __init__(self, state: AdapterState, model: PreTrainedModel) -> None:
        super().__init__(state, model)
        self.handles.append(reader(model).register_forward_pre_hook(self.before_encoder, with_kwargs=True))

    def before_forward(self, model: PreTrainedModel, args: Any, kwargs: Any) -> Any:
        front = self.acting()
        if front is None or self.outermost is not None:
            return None
        self.outermost, self.front, self.length = model, front, 0
        given = self.named(model, args, kwargs)
        if not front.is_even and "attention_mask" not in given and "input_ids" in given:
            given["attention_mask"] = torch.ones_like(given["input_ids"])
        if "attention_mask" in given:
            given |= shifted({"attention_mask": given["attention_mask"]}, front)
        return (), given

    def before_encoder(self, encoder: nn.Module, args: Any, kwargs: Any) -> Any:
        """Return the encoder's arguments with the virtual tokens added at the start. A mask that covers the virtual
        tokens already is not extended again.
        """
        front = self.acting()
        if front is None:
            return None
        given = self.named(cast(PreTrainedModel, encoder), args, kwargs)
        tokens = cast(Tensor, given.get("input_ids", given.get("inputs_embeds")))
        mask = given.pop("attention_mask", None)
        given = with_positions(cast(PreTrainedModel, encoder), given, front)
        mask = given.pop("attention_mask", None) if mask is None else mask
        if mask is not None and mask.shape[1] == tokens.shape[1]:
            mask = shifted({"attention_mask": mask}, front)["attention_mask"]
        self.front = front
        changed = self.started(cast(PreTrainedModel, encoder), given, None, front)
        return (), changed if mask is None else changed | {"attention_mask": mask}

    def after_forward(self, module: nn.Module, args: Any, output: Any) -> Any:
        self.length = 0 if module is self.outermost else self.length  # the decoder has no virtual positions
        return super().after_forward(module, args, output)


def prompt_places(snapshot: Snapshot, plan: AttachPlan) -> dict[str, Placed]:
    """Return the only place of a prompt: the input embeddings."""
    return {INPUT: placed(plan.config, input_site(cast(PreTrainedModel, snapshot.model)))}


def put_prompt_on(snapshot: Snapshot, name: str, state: AdapterState, plan: AttachPlan, allocation: Allocation) -> None:
    """Put the virtual tokens of adapter ``name`` on the model."""
    model = cast(PreTrainedModel, snapshot.model)
    config = cast(PromptMethod, plan.config).for_sites((input_site(model),), Known())
    state.configs[name] = config
    site = _site_to_start_from(model, config) if allocation.values else input_site(model)
    if not hasattr(model, CHILD):
        kind = EncoderPromptAdapters if model.config.is_encoder_decoder else PromptAdapters
        model.add_module(CHILD, kind(state, model))
    holder = cast(PromptAdapters, getattr(model, CHILD))
    held = allocation.parameters(config, site, model.device, model.dtype)
    for key in config.packing.fixed:  # a buffer, as in a layer
        held.register_buffer(key, held.pop(key).detach())
    holder.hold(name, held, placed(config, site).keys)


def reader(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a model that embeds the text after the virtual tokens."""
    return cast(PreTrainedModel, model.get_encoder() if model.config.is_encoder_decoder else inner_model(model))


def input_site(model: PreTrainedModel) -> InputSite:
    """Describe the input embeddings by their shapes."""
    (n_tokens, width), text = table_shape(model.get_input_embeddings()), model.config.get_text_config()
    return InputSite(
        name=INPUT,
        features=width,
        vocabulary=n_tokens,
        layers=getattr(text, "num_hidden_layers", None),
        heads=getattr(text, "num_attention_heads", None),
    )


def _site_to_start_from(model: PreTrainedModel, config: PromptMethod) -> InputSite:
    embedding = model.get_input_embeddings()

    @torch.no_grad()
    def embed(ids: Tensor) -> Tensor:
        return cast(Tensor, embedding(ids.to(embedding.weight.device))).float().cpu()

    text_ids: tuple[int, ...] = ()
    start = config.start_text
    if start is not None:
        tokenizer = AutoTokenizer.from_pretrained(start.tokenizer, **start.options)
        text_ids = tuple(tokenizer(start.text)["input_ids"])
    return replace(input_site(model), embed=embed, text_ids=text_ids)


def _in_front(front: Front, values: Sequence[Sequence[float]], otherwise: float, like: Tensor) -> Tensor:
    """Return, for each row, the values of its adapter at the virtual positions, (rows, width), and ``otherwise``
    elsewhere.
    """
    return front.rows([like.new_tensor(own) - otherwise for own in values], like.shape[0]) + otherwise


def _filler(model: PreTrainedModel) -> int:
    """Return a token id for the virtual positions: 0, or 1 if 0 is padding. Some models search the ids for padding."""
    return 1 if getattr(model.config, "pad_token_id", None) == 0 else 0


def _behind(kept: Tensor | int, n: int, length: int) -> Tensor | int:
    """Return ``logits_to_keep`` for rows that begin with n virtual tokens, so that the same tokens of the text are
    kept. Indices from the start move by n; a count is at most ``length``.
    """
    if isinstance(kept, Tensor):
        return torch.where(kept < 0, kept, kept + n)
    return min(kept, length)


def _without_leading(value: Any, n: int, length: int, n_axes: int | None = None) -> Any:
    """Drop the first n positions (axis 1) of each tensor that has ``length`` positions.

    If ``n_axes`` is given, only tensors with that many axes are cut. Tensors in a tuple or list are cut in the same
    way. Any other value is returned unchanged.
    """
    if isinstance(value, (tuple, list)):
        return tuple(_without_leading(item, n, length, n_axes) for item in value)
    per_token = isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == length
    return value[:, n:] if per_token and n_axes in (None, value.ndim) else value
