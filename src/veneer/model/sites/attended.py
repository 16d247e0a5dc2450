"""Prompts beside attention layers (adaption prompts), added by hooks: the modules of the model keep their classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.contract import AttentionMethod
from veneer.contract.places import Placed, placed
from veneer.errors import TargetError
from veneer.model.adapted.allocation import Allocation
from veneer.model.adapted.holder import Holder
from veneer.model.adapted.linear import device_of
from veneer.model.adapted.routing import BASE
from veneer.model.adapted.state import AdapterState
from veneer.model.modules.plan import AttachPlan
from veneer.model.modules.snapshot import Snapshot
from veneer.records.attended import attended_change, turned
from veneer.records.deltas import AttendedDelta
from veneer.records.sites import AttendingSite

CHILD = "attended_prompts"


@dataclass(frozen=True, slots=True)
class _Family:
    """Names of a family's attention modules and of their projections.

    ``joined``: one projection computes queries, keys and values, in this order. ``out``: the output projection, to
    whose input the update is added. If it is None, the update is added to attention's output, as PEFT does for these
    models.
    """

    attention: str
    queries: str
    keys: str
    values: str
    out: str | None
    joined: bool = False


_LLAMA = _Family("self_attn", "q_proj", "k_proj", "v_proj", "o_proj")
_FAMILIES: Mapping[str, _Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "gpt2": _Family("attn", "c_attn", "c_attn", "c_attn", None, joined=True),
}


class AttendedPrompts(Holder):
    """Adaption prompts at one attention layer, by adapter name. The module is a child of the attention, so that it
    moves with the model.

    During a pass it keeps the queries before rotary embedding, and the angles of their positions.
    """

    attention: nn.Module

    def __init__(self, site: AttendingSite, state: AdapterState, attention: nn.Module, family: _Family) -> None:
        super().__init__()
        self.site, self.adapter_state, self.family = site, state, family
        self.adapters = nn.ModuleDict()
        vars(self)["attention"] = attention  # its parent, of which it is no part
        self._angles: tuple[Tensor, Tensor] | None = None
        self._queries: Tensor | None = None
        self.handles = [
            attention.register_forward_pre_hook(self._keep_angles, with_kwargs=True),
            attention.get_submodule(family.queries).register_forward_hook(self._keep_queries),
            attention.register_forward_hook(self._change_output)
            if family.out is None
            else attention.get_submodule(family.out).register_forward_pre_hook(self._change_input),
        ]

    def leave(self, model: nn.Module, path: str) -> None:
        for handle in self.handles:
            handle.remove()
        attention, _, child = path.rpartition(".")
        delattr(model.get_submodule(attention), child)

    def record(self, name: str) -> AttendedDelta:
        """Return the tensors by which the prompt of adapter ``name`` acts at this attention layer, computed from its
        parameters.
        """
        method = cast(AttentionMethod, self.adapter_state.configs[name])
        return method.lower(self.site, dict(self.adapters[name].named_parameters()))

    def _keep_angles(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.acting_on_rows():
            self._angles = kwargs.get("position_embeddings")

    def _keep_queries(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.acting_on_rows():
            self._queries = output

    def _change_input(self, module: nn.Module, args: Any) -> Any:
        return (args[0] + self.change(), *args[1:]) if self.acting_on_rows() else None

    def _change_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        return (output[0] + self.change(), *output[1:]) if self.acting_on_rows() else None

    def change(self) -> Tensor:
        """Return the outputs that the active prompts add to attention in this pass, (b, t, heads * k)."""
        queries, routing = self._turned_queries(), self.adapter_state.routed()
        if routing is None:
            changes = [self._change(name, queries) for name in self.acting_on_rows()]
            return sum(changes[1:], changes[0])
        change = queries.new_zeros(*queries.shape[:2], queries.shape[2] * queries.shape[3])
        for name, rows in routing.groups(queries.shape[0], self.acting_on_rows(), self.site.name, queries.device):
            if name != BASE:
                change = change.index_copy(0, rows, self._change(name, queries[rows]))
        return change

    def _turned_queries(self) -> Tensor:
        """Return the queries (b, t, heads, k) that the base computed in this pass, after rotary embedding. The stored
        copy is released.
        """
        joined, angles = cast(Tensor, self._queries), self._angles
        self._queries, self._angles = None, None
        width = joined.shape[-1] // 3 if self.family.joined else joined.shape[-1]
        queries = self._by_head(joined[..., :width])
        return queries if angles is None else turned(queries, *angles)

    def _by_head(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, cast(int, self.attention.head_dim))

    def _change(self, name: str, queries: Tensor) -> Tensor:
        record = self.record(name)
        with self.adapter_state.only((name,)):  # which changes no projection: a prompt is no row of the batch
            keys, values = self._keys_and_values(record.prompt.to(queries.dtype))
        return attended_change(queries, keys, values, record.gate)

    def _keys_and_values(self, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values that the base computes for a prompt (n, d), each (n, kv_heads, k)."""
        family, attention = self.family, self.attention
        if family.joined:
            _, keys, values = attention.get_submodule(family.keys)(prompt[None]).chunk(3, dim=-1)
        else:
            keys, values = (attention.get_submodule(each)(prompt[None]) for each in (family.keys, family.values))
        self._queries = None  # a joined projection has shown those of the prompt
        return self._by_head(keys[0]), self._by_head(values[0])


def attended_places(snapshot: Snapshot, plan: AttachPlan) -> dict[str, Placed]:
    """Return the attention layers to whose output an adapter's prompts add, by path."""
    config = cast(AttentionMethod, plan.config)
    return {site.name: placed(config, site, site.name) for site in attending_sites(snapshot, config)}


def put_attended_on(
    snapshot: Snapshot, name: str, state: AdapterState, plan: AttachPlan, allocation: Allocation
) -> None:
    """Attach the prompts of adapter ``name`` to the attention layers that its config names."""
    model, config, family = cast(PreTrainedModel, snapshot.model), cast(AttentionMethod, plan.config), _family(snapshot)
    for site in attending_sites(snapshot, config):
        attention = model.get_submodule(site.name)
        if not hasattr(attention, CHILD):
            attention.add_module(CHILD, AttendedPrompts(site, state, attention, family))
        held = allocation.parameters(config, site, device_of(attention), model.dtype)
        cast(AttendedPrompts, getattr(attention, CHILD)).hold(name, held, placed(config, site, site.name).keys)


def attending_sites(snapshot: Snapshot, config: AttentionMethod) -> list[AttendingSite]:
    """Return the last ``n_layers`` attention layers of a model, those in which a config's prompts act.

    Raises TargetError if their queries cannot be read, or if the model has fewer layers.
    """
    family = _family(snapshot)
    wanted = config.attention_name or family.attention
    paths = [path for path in snapshot.modules if path.rpartition(".")[2] == wanted]
    whole = [path for path in paths if hasattr(snapshot.modules[path], family.queries)]
    if not whole:
        raise TargetError(
            f"target_modules={wanted!r} names no attention of this {snapshot.model_type}: give {family.attention!r}, "
            "or leave it out"
        )
    if config.n_layers > len(whole):
        raise TargetError(
            f"adapter_layers={config.n_layers} is more than the model's {len(whole)} layers: give at most {len(whole)}"
        )
    width = cast(PreTrainedModel, snapshot.model).config.hidden_size
    first = len(whole) - config.n_layers
    return [
        AttendingSite(name=path, layer=layer, features=width) for layer, path in enumerate(whole[first:], start=first)
    ]


def _family(snapshot: Snapshot) -> _Family:
    if snapshot.model_type not in _FAMILIES:
        raise TargetError(
            f"a prompt beside attention needs the queries of a model of the families {sorted(_FAMILIES)}, and this is "
            f"{snapshot.model_type or type(snapshot.model).__name__}: use PrefixTuningConfig or LoraConfig on it"
        )
    return _FAMILIES[snapshot.model_type]
