"""The contracts of methods that put virtual tokens in front of the sequence: prefixes and prompts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from veneer.contract.config import MethodConfig
from veneer.contract.parameters import Params, Shapes
from veneer.core.records import PrefixDelta, PromptDelta
from veneer.core.sites import AttentionSite, InputSite


@dataclass(frozen=True, kw_only=True)
class VirtualTokenMethod(MethodConfig):
    """The common base of prefix and prompt methods: n virtual tokens in front, one set of parameters for the model.

    A network may make the tokens in training; a plain save holds what it makes. ``inference_mode`` says, as in PEFT,
    that the network is gone and what it made is trained or used as it is.
    ``token_dim``, ``num_attention_heads``, ``num_layers``, ``num_transformer_submodules`` describe the base model and
    are filled in when the config is attached.
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
    def is_prompt_learning(self) -> bool:
        return True

    @property
    def has_network(self) -> bool:
        """True where a network makes the virtual tokens."""
        return False

    def plain(self) -> Self:
        """The config that trains what a plain save holds, directly."""
        return replace(self, inference_mode=True)

    @abstractmethod
    def disk_names(self) -> dict[str, str]:
        """For each parameter its key on disk; those of a network are kept only where training is to be resumed."""


@dataclass(frozen=True, kw_only=True)
class PrefixMethod(VirtualTokenMethod):
    """A method on the keys and values of all attention layers."""

    @abstractmethod
    def for_model(self, sites: Sequence[AttentionSite]) -> Self:
        """The config with the base model's numbers filled in."""

    @abstractmethod
    def shapes(self, sites: Sequence[AttentionSite]) -> Shapes:
        """Names and shapes of the parameters trained, for the whole model."""

    @abstractmethod
    def init(self, sites: Sequence[AttentionSite], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Start values in float32 on the CPU."""

    @abstractmethod
    def lower(self, sites: Sequence[AttentionSite], params: Params) -> tuple[PrefixDelta, ...]:
        """One record for each site, in the order given."""

    @abstractmethod
    def lower_one(self, sites: Sequence[AttentionSite], params: Params, index: int) -> PrefixDelta:
        """One of the records alone, for a layer that is computed again in the backward pass."""

    @abstractmethod
    def stored(self, sites: Sequence[AttentionSite], params: Params) -> dict[str, Tensor]:
        """The tensors of a plain save, by their keys on disk."""


@dataclass(frozen=True)
class StartText:
    """A text, and the tokenizer that makes ids of it: a name or folder, and arguments of its ``from_pretrained``."""

    text: str
    tokenizer: str
    options: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class PromptMethod(VirtualTokenMethod):
    """A method on the input embeddings.

    ``keep_virtual_logits``: whether logits and hidden states come back with the virtual positions in front, as from
    PEFT.
    """

    inert: ClassVar[frozenset[str]] = frozenset({"keep_virtual_logits"})

    keep_virtual_logits: bool = field(default=False, metadata={"on_disk": False})

    @property
    def n_rows(self) -> int:
        """Rows on disk: PEFT keeps a second set for the decoder of an encoder-decoder model, which nothing reads."""
        return self.num_virtual_tokens * (self.num_transformer_submodules or 1)

    @property
    def start_text(self) -> StartText | None:
        """The text whose embeddings are the start, if any."""
        return None

    def disk_names(self) -> dict[str, str]:
        """For each parameter its key on disk."""
        return {"prompt_embeddings": "prompt_embeddings"}

    @abstractmethod
    def shapes(self, site: InputSite) -> Shapes:
        """Names and shapes of the parameters trained."""

    @abstractmethod
    def init(self, site: InputSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Start values in float32 on the CPU."""

    @abstractmethod
    def lower(self, site: InputSite, params: Params) -> PromptDelta:
        """The record that these parameters mean."""

    @abstractmethod
    def stored(self, site: InputSite, params: Params) -> dict[str, Tensor]:
        """The tensors of a plain save, by their keys on disk."""
