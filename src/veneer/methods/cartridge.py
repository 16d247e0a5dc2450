"""Cartridge: the keys and values of a long text, trained as a prefix of every attention layer (Eyuboglu et al. 2025,
arXiv:2506.06266, section 3).

The first tokens are not trained: attention collects there, and moving them harms training (section 3.2). A file holds
all tokens in one matrix, as that of prefix tuning does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from veneer.contract import Params, PrefixMethod, Shapes
from veneer.contract.packing import Packing
from veneer.records.deltas import PrefixDelta
from veneer.records.prefix import prefix_width, unflatten_prefix
from veneer.records.sites import AttentionSite

STORED = "prompt_embeddings"
_FROZEN, _TRAINED = "frozen", "trained"
_NAMES = {_FROZEN: "prompt_encoder.frozen_embedding", _TRAINED: "prompt_encoder.trainable_embedding"}


@dataclass(frozen=True, kw_only=True)
class CartridgeConfig(PrefixMethod):
    """Settings of a cartridge, with the names that PEFT gives them.

    The first ``num_frozen_tokens`` of the ``num_virtual_tokens`` are not trained. A new adapter is random:
    `initialize_kv_prefix_from_text` starts it from a text.
    """

    peft_type: ClassVar[str] = "CARTRIDGE"
    identity_at_start: ClassVar[bool] = False
    headline: ClassVar[tuple[str, ...]] = ("num_virtual_tokens", "num_frozen_tokens")
    inert: ClassVar[frozenset[str]] = frozenset({"num_frozen_tokens"})

    num_frozen_tokens: int = 1

    def problems(self) -> list[str]:
        found = super().problems()
        if not 0 <= self.num_frozen_tokens < (self.num_virtual_tokens or 1):
            found.append(
                f"num_frozen_tokens={self.num_frozen_tokens!r} must be at least 0 and below "
                f"num_virtual_tokens={self.num_virtual_tokens!r}: some token must be trained"
            )
        if self.num_transformer_submodules == 2:
            found.append(
                "num_transformer_submodules=2 is for an encoder-decoder, but a cartridge is for a decoder: leave it out"
            )
        return found

    @property
    def packing(self) -> Packing:
        return _Joined(fixed=(_FROZEN,) if self._is_split and self.num_frozen_tokens else (), config=self)

    def shapes(self, sites: Sequence[AttentionSite]) -> Shapes:
        width, n = prefix_width(sites), self.num_virtual_tokens
        if not self._is_split:
            return {STORED: (n, width)}
        first = {_FROZEN: (self.num_frozen_tokens, width)} if self.num_frozen_tokens else {}
        return {**first, _TRAINED: (n - self.num_frozen_tokens, width)}

    def disk_names(self, site: Sequence[AttentionSite]) -> dict[str, str]:
        """Return the names of the parameters on disk. An adapter's file has one matrix; a checkpoint of training has
        frozen and trained tokens apart.
        """
        return {name: _NAMES.get(name, name) for name in self.shapes(site)}

    def init(self, sites: Sequence[AttentionSite], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {name: torch.randn(shape, generator=generator) for name, shape in self.shapes(sites).items()}

    def lower(self, sites: Sequence[AttentionSite], params: Params) -> tuple[PrefixDelta, ...]:
        return unflatten_prefix(self._joined(params), sites)

    def lower_one(self, sites: Sequence[AttentionSite], params: Params, index: int) -> PrefixDelta:
        start, width = prefix_width(sites[:index]), prefix_width(sites[index : index + 1])
        columns = {name: value[:, start : start + width] for name, value in params.items()}
        return unflatten_prefix(self._joined(columns), sites[index : index + 1])[0]

    def stored(self, sites: Sequence[AttentionSite], params: Params) -> dict[str, Tensor]:
        return self.packing.pack(params)

    @property
    def _is_split(self) -> bool:
        """Return True if frozen and trained tokens are separate parameters, as in an adapter in training."""
        return not self.inference_mode

    def _joined(self, params: Params) -> Tensor:
        parts = [params[name] for name in (STORED, _FROZEN, _TRAINED) if name in params]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class _Joined(Packing):
    """Form on disk that has frozen and trained tokens in one matrix."""

    config: CartridgeConfig | None = None

    def pack(self, params: Params) -> dict[str, Tensor]:
        return {STORED: torch.cat([params[name] for name in (STORED, _FROZEN, _TRAINED) if name in params])}

    def unpack(self, packed: Params) -> dict[str, Tensor]:
        if self.config is None or self.config.inference_mode:
            return dict(packed)
        n = self.config.num_frozen_tokens
        first = {_FROZEN: packed[STORED][:n]} if n else {}
        return {**first, _TRAINED: packed[STORED][n:]}
