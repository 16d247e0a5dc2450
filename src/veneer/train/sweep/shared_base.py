"""Computes the batches of several members in one pass over a base. Each member has its own adapter."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.adapters.peft_model import PeftModel, become_peft_model
from veneer.data.encoding import IGNORED
from veneer.errors import ConfigError
from veneer.model.adapted.allocation import Allocation
from veneer.model.attach.attach import adapted_places, attach, detach
from veneer.model.batch.mixed import checked, routed
from veneer.ops.experts import PackedStack
from veneer.quant.packed import PackedCoded, PackedDense
from veneer.train.loss import Scoring, Share, TokenLoss, token_losses

Batch = dict[str, Tensor]
_PACKED = (PackedDense, PackedCoded, PackedStack)


@dataclass(frozen=True, slots=True)
class Part:
    """Micro-batch of one member, its loss settings, and the generator of its dropout."""

    inputs: Batch
    scoring: Scoring
    generator: torch.Generator


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of the modules of ``model`` that shares its parameters, buffers and packed weights.

    Each member's model can thus have its own adapter on the same weights.
    """
    held = [value for module in model.modules() for value in vars(module).values()]
    packed: list[object] = [value for value in held if isinstance(value, _PACKED)]
    # Modules that packed ones stand for lie in tuples, each of which is shared whole.
    packed += [value for value in held if isinstance(value, tuple) and any(isinstance(x, nn.Module) for x in value)]
    shared: dict[int, Any] = {id(each): each for each in (*model.parameters(), *model.buffers(), *packed)}
    return copy.deepcopy(model, shared)


class SharedBase:
    """Base model that has the adapters of all members, each under its member's name."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: PeftModel = become_peft_model(model)
        self.state = self.model.adapter_state

    def add(self, name: str, member: PeftModel, title: str) -> None:
        """Add the adapter of a member's model. It shares the member's parameters, so that gradients reach them.

        ``title`` names the member in messages. Raises ConfigError for an adapter with a loss of its own.
        """
        (own,) = member.adapter_state.configs
        if member.adapter_state.configs[own].has_own_loss:
            raise ConfigError(
                f"{title}: {member.adapter_state.configs[own].peft_type} has a loss of its own: train it alone"
            )
        model = cast(PreTrainedModel, self.model)
        attach(model, member.adapter_state.configs[own], name, self.state, allocation=Allocation(values=False))
        places = adapted_places(self.model)
        for path, place in adapted_places(member).items():
            for theirs, ours in zip(place.holdings, places[path].holdings, strict=True):
                if own in theirs:
                    ours[name] = theirs[own]

    def remove(self, name: str) -> None:
        """Drop the adapter of a member."""
        detach(self.model, self.state, name)

    def checkpoint(self, options: dict[str, Any]) -> None:
        """Switch on gradient checkpointing, which computes activations again in the backward pass."""
        model = cast(PreTrainedModel, self.model)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.enable_input_require_grads()

    def losses(self, parts: Mapping[str, Part]) -> dict[str, TokenLoss]:
        """Return the loss of each member's micro-batch, from one pass in training mode."""
        self.model.train()
        inputs, shares = joined(parts)
        names = tuple(name for name, share in shares.items() for _ in range(share.rows.stop - share.rows.start))
        generators = {name: part.generator for name, part in parts.items()}
        routing = replace(checked(self.model, self.state, names, ((), inputs)), generators=generators)
        with routed(self.model, self.state, routing):
            found = token_losses(self.model, inputs, list(shares.values()))
        return dict(zip(parts, found, strict=True))


def joined(parts: Mapping[str, Part]) -> tuple[Batch, dict[str, Share]]:
    """Join the members' micro-batches into one batch, padded to the widest, and return it with each member's share of
    it.

    Positions that mark the starts of packed sequences are kept. If some rows have them, the other rows get positions
    too. Raises ConfigError for inputs that cannot be together in one batch.
    """
    batches = {name: part.inputs for name, part in parts.items()}
    unknown = {key for batch in batches.values() for key in batch} - {
        "input_ids", "labels", "attention_mask", "position_ids",
    }  # fmt: skip
    if unknown:
        raise ConfigError(
            f"members of a sweep share batches of tokens, but one has the inputs {sorted(unknown)} too: train it alone"
        )
    width = max(batch["input_ids"].shape[1] for batch in batches.values())
    by_position = any("position_ids" in batch for batch in batches.values())
    shares, start = {}, 0
    for name, batch in batches.items():
        n_rows, own_width = batch["input_ids"].shape
        shares[name] = Share(slice(start, start + n_rows), own_width, parts[name].scoring)
        start += n_rows
    rows = [_widened(_positioned(batch) if by_position else batch, width) for batch in batches.values()]
    return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}, shares


def _positioned(batch: Batch) -> Batch:
    """Return a batch with position ids in place of its attention mask. Positions restart at 0 where a row's padding
    begins, so padding counts as a separate sequence, as in packed rows.
    """
    if "position_ids" in batch:
        return batch
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    n_real = torch.full_like(ids[:, :1], ids.shape[1]) if mask is None else mask.sum(dim=1, keepdim=True)
    columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    rest = {key: value for key, value in batch.items() if key != "attention_mask"}
    return {**rest, "position_ids": torch.where(columns < n_real, columns, columns - n_real)}


def _widened(batch: Batch, width: int) -> Batch:
    """Pad the rows of a batch at their ends to ``width`` columns."""
    more = width - batch["input_ids"].shape[1]
    if not more:
        return batch
    fill = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}
    found = {key: _filled(value, more, fill[key]) for key, value in batch.items() if key in fill}
    if "position_ids" in batch:
        positions = batch["position_ids"]
        new = torch.arange(more, device=positions.device).expand(positions.shape[0], more)
        found["position_ids"] = torch.cat([positions, new], dim=1)
    return found


def _filled(rows: Tensor, more: int, value: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, more), value=value)
