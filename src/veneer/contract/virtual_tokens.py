"""Contracts of methods that put virtual tokens in front of the sequence: prefixes and prompts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from veneer.contract.config import MethodConfig
from veneer.contract.known import Known
from veneer.contract.parameters import Params, Shapes
from veneer.contract.places import INPUT, Placed, ShapesByKey, damaged, placed, require_sizes
from veneer.plain.tasks import TaskType
from veneer.records.deltas import PrefixDelta, PromptDelta
from veneer.records.sites import AttentionSite, InputSite


@dataclass(frozen=True, kw_only=True)
class VirtualTokenMethod(MethodConfig):
    """Common base of prefix and prompt methods: n virtual tokens in front, one set of parameters for the model.

    A network may compute the tokens in training; the adapter's file holds only the network's output. ``inference_mode``
    means, as in PEFT, that the network is gone and its output is trained or used directly. ``token_dim``,
    ``num_attention_heads``, ``num_layers``, ``num_transformer_submodules`` describe the base model and are filled in
    when the adapter is attached.
    """

    usual_learning_rate: ClassVar[float] = 1e-2
    inert: ClassVar[frozenset[str]] = frozenset(
        {"num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules"}
    )
    headline: ClassVar[tuple[str, ...]] = ("num_virtual_tokens",)

    num_virtual_tokens: int
    token_dim: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    num_transformer_submodules: int | None = None

    def problems(self) -> list[str]:
        found = super().problems()
        of_base = ("token_dim", "num_attention_heads", "num_layers")
        for name in ("num_virtual_tokens", "encoder_hidden_size", "encoder_num_layers", *of_base):
            value = getattr(self, name, None)
            if value is not None and value < 1:
                found.append(f"{name}={value!r} must be a whole number of at least 1")
        if self.num_transformer_submodules not in (None, 1, 2):
            found.append(f"num_transformer_submodules={self.num_transformer_submodules!r} must be None, 1 or 2")
        return found

    @property
    def virtual_tokens(self) -> int:
        return self.num_virtual_tokens

    def stored(self, site: Any, params: Params) -> dict[str, Tensor]:
        """Return the tensors of a save without a network, by their keys on disk: the parameters, or what a network
        computes from them.
        """
        return {key: params[own] for own, key in self.disk_names(site).items()}


@dataclass(frozen=True, kw_only=True)
class PrefixMethod(VirtualTokenMethod):
    """Method on the keys and values of all attention layers. All layers together are one site."""

    @abstractmethod
    def shapes(self, site: Sequence[AttentionSite]) -> Shapes: ...

    @abstractmethod
    def init(self, site: Sequence[AttentionSite], generator: torch.Generator | None = None) -> dict[str, Tensor]: ...

    @abstractmethod
    def lower(self, site: Sequence[AttentionSite], params: Params) -> tuple[PrefixDelta, ...]:
        """Return one record for each layer, in the order given."""

    @abstractmethod
    def lower_one(self, site: Sequence[AttentionSite], params: Params, index: int) -> PrefixDelta:
        """Return the record of the layer ``index`` alone, for a layer that is computed again in the backward pass."""

    def for_sites(self, sites: Sequence[Sequence[AttentionSite]], known: Known) -> Self:
        first = sites[0][0]
        return replace(
            self,
            token_dim=first.kv_heads * first.head_dim,
            num_attention_heads=first.kv_heads,
            num_layers=len(sites[0]),
            num_transformer_submodules=2 if first.cross else 1,
        )

    def places_in(self, shapes: ShapesByKey, source: str) -> dict[str, Placed] | None:
        """Return the one site, which holds every attention layer of the base, sized by the config's fields. Return None
        if these are not filled in.
        """
        heads, width, layers = self.num_attention_heads, self.token_dim, self.num_layers
        if heads is None or width is None or layers is None or width % heads:
            return None
        columns = max((shape[-1] for shape in shapes.values() if shape), default=0)
        if layers > columns:  # each has columns of its own; told before so many sites are made
            raise damaged(source, f"num_layers={layers}, but no tensor has more than {columns} columns")
        cross = self.num_transformer_submodules == 2
        site = tuple(
            AttentionSite(name=f"layer {i}", layer=i, kv_heads=heads, head_dim=width // heads, cross=cross)
            for i in range(layers)
        )
        return {INPUT: placed(self, site)}


@dataclass(frozen=True)
class StartText:
    """Text, and the tokenizer that turns it into ids: a name or folder, and arguments of its ``from_pretrained``."""

    text: str
    tokenizer: str
    options: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class PromptMethod(VirtualTokenMethod):
    """Method on the input embeddings.

    ``keep_virtual_logits``: logits and hidden states include the virtual positions at the front, as in PEFT.
    """

    inert: ClassVar[frozenset[str]] = frozenset({"keep_virtual_logits"})

    keep_virtual_logits: bool = field(default=False, metadata={"on_disk": False})

    @property
    def n_rows(self) -> int:
        """Rows on disk. PEFT keeps a second set for the decoder of an encoder-decoder model, which is never read."""
        return self.num_virtual_tokens * (self.num_transformer_submodules or 1)

    @property
    def targets(self) -> tuple[int, ...]:
        """Ids that a pass with labels is to predict at the virtual tokens, -100 for none; empty if there are none."""
        return ()

    @property
    def target_weights(self) -> tuple[float, ...]:
        """Weight of each of the ``targets`` in the model's loss, in which a row's own labels have 1."""
        return (1.0,) * len(self.targets)

    @property
    def has_own_loss(self) -> bool:
        return bool(self.targets)

    @property
    def start_text(self) -> StartText | None:
        """Text whose embeddings are the initial values, if any."""
        return None

    @abstractmethod
    def shapes(self, site: InputSite) -> Shapes: ...

    @abstractmethod
    def init(self, site: InputSite, generator: torch.Generator | None = None) -> dict[str, Tensor]: ...

    @abstractmethod
    def lower(self, site: InputSite, params: Params) -> PromptDelta: ...

    def for_sites(self, sites: Sequence[InputSite], known: Known) -> Self:
        """Return the config with the base model's sizes filled in, as PEFT fills them in."""
        (site,) = sites
        return replace(
            self,
            token_dim=site.features,
            num_layers=self.num_layers or site.layers,
            num_attention_heads=self.num_attention_heads or site.heads,
            num_transformer_submodules=self.num_transformer_submodules
            or (2 if self.task_type == TaskType.SEQ_2_SEQ_LM else 1),
        )

    def places_in(self, shapes: ShapesByKey, source: str) -> dict[str, Placed] | None:
        sample = InputSite(name=INPUT, features=1)
        found = {name: shapes[key] for name, key in self.disk_names(sample).items() if key in shapes}
        if not found:
            return None
        require_sizes(found, self.shapes(sample), INPUT, source)
        return {INPUT: placed(self, replace(sample, features=next(iter(found.values()))[-1]))}
