"""Context-aware prompt tuning: the embeddings of a context's tokens, each trained within a ball around its start (Blau
et al. 2024, arXiv:2410.17222, section 3.3).

The model is also trained to predict the labels within the context, with less weight on earlier ones (section 3.4).
Tokens have types: 1 and 3 modulo 4 belong to templates, 2 modulo 4 to an input, and 4, 8, 12 … are labels, one group
after another. Labels are not trained. After each step, a token that has left its ball is moved back onto it.
Difference from PEFT: the labels of a row are those of the batch, as one last group. PEFT uses those that
``input_type_mask`` marks, and none of them if the greatest type of the context is not a multiple of 4.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from veneer.contract import Params, PromptMethod, Shapes
from veneer.contract.packing import Packing
from veneer.contract.training import Schedule, Training
from veneer.errors import ConfigError
from veneer.plain.field_types import fits, plain
from veneer.records.deltas import PromptDelta
from veneer.records.prompt import UNTRAINED
from veneer.records.sites import InputSite

STORED = "prompt_embeddings"
NETWORK = {"embedding": "prompt_encoder.embedding.weight", "delta": "prompt_encoder.delta_embedding.weight"}
_LEAST_RADIUS = 1e-10  # of a token that does not move, as PEFT has it
_WIDTH = 2048  # of the model that the radii are for


@dataclass(frozen=True, kw_only=True)
class CPTConfig(PromptMethod):
    """Settings of context-aware prompt tuning, with the names that PEFT gives them.

    ``cpt_token_ids`` are the tokens of the context, and ``cpt_tokens_type_mask`` their types, by default all 1.
    ``opt_projection_epsilon`` is the radius for tokens of inputs, and ``opt_projection_format_epsilon`` the radius for
    tokens of templates. Both radii are multiplied by ``√(d / 2048)``. ``opt_weighted_loss_type="decay"`` weighs each
    group of labels by ``opt_loss_decay_factor`` times the next group's weight. ``cpt_mask`` and
    ``tokenizer_name_or_path`` are kept for PEFT and change nothing.
    """

    peft_type: ClassVar[str] = "CPT"
    identity_at_start: ClassVar[bool] = False
    inert: ClassVar[frozenset[str]] = frozenset(
        {"cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask", "opt_weighted_loss_type", "opt_loss_decay_factor"}
        | {"opt_projection_epsilon", "opt_projection_format_epsilon", "tokenizer_name_or_path"}
    )

    task_type: str | None = "CAUSAL_LM"
    num_virtual_tokens: int = 0
    cpt_token_ids: Collection[int] | None = None
    cpt_mask: Collection[int] | None = None
    cpt_tokens_type_mask: Collection[int] | None = None
    opt_weighted_loss_type: Literal["none", "decay"] = "none"
    opt_loss_decay_factor: float = 1.0
    opt_projection_epsilon: float = 0.1
    opt_projection_format_epsilon: float = 0.1
    tokenizer_name_or_path: str | None = None

    def __post_init__(self) -> None:
        ids = (0,) if self.cpt_token_ids is None else plain(self.cpt_token_ids)
        if fits(ids, Collection[int]):
            of_each = {"cpt_mask": (1,) * len(ids), "cpt_tokens_type_mask": (1,) * len(ids), "cpt_token_ids": ids}
            left = {name: value for name, value in of_each.items() if getattr(self, name) is None}
            left |= {"num_virtual_tokens": len(ids)} if self.num_virtual_tokens == 0 else {}
            for name, value in left.items():
                object.__setattr__(self, name, value)
        super().__post_init__()

    def problems(self) -> list[str]:
        found, n = super().problems(), len(self.cpt_token_ids or ())
        if self.task_type != "CAUSAL_LM":
            found.append(f"task_type={self.task_type!r} must be 'CAUSAL_LM': a context has labels within it")
        if self.num_transformer_submodules == 2:
            found.append(
                "num_transformer_submodules=2 is for an encoder-decoder, but CPT is for a decoder: leave it out"
            )
        if not n or min(self.cpt_token_ids or ()) < 0:
            found.append(f"cpt_token_ids={self.cpt_token_ids!r} must hold token ids, at least one")
        if self.num_virtual_tokens != n:
            found.append(
                f"num_virtual_tokens={self.num_virtual_tokens!r} is not the {n} of cpt_token_ids: leave it out"
            )
        for name in ("cpt_mask", "cpt_tokens_type_mask"):
            if len(getattr(self, name) or ()) != n:
                found.append(f"{name}={getattr(self, name)!r} must hold {n} numbers, one for each of cpt_token_ids")
        if min(self.cpt_tokens_type_mask or (0,)) < 0:
            found.append(f"cpt_tokens_type_mask={self.cpt_tokens_type_mask!r} must hold types of at least 0")
        for name in ("opt_loss_decay_factor", "opt_projection_epsilon", "opt_projection_format_epsilon"):
            if getattr(self, name) <= 0:
                found.append(f"{name}={getattr(self, name)!r} must be above 0")
        return found

    @property
    def types(self) -> tuple[int, ...]:
        """Type of each token of the context."""
        return tuple(self.cpt_tokens_type_mask or ())

    @property
    def targets(self) -> tuple[int, ...]:
        if not any(map(_is_label, self.types)):
            return ()
        of_each = zip(self.cpt_token_ids or (), self.types, strict=True)
        return tuple(token if _is_label(kind) else UNTRAINED for token, kind in of_each)

    @property
    def target_weights(self) -> tuple[float, ...]:
        if self.opt_weighted_loss_type == "none":
            return super().target_weights
        groups = sorted(
            {kind for kind in self.types[1:] if _is_label(kind)}, reverse=True
        )  # nothing predicts the first
        weights = {kind: self.opt_loss_decay_factor**place for place, kind in enumerate(groups, start=1)}
        return tuple(weights.get(kind, 1.0) for kind in self.types)

    @property
    def has_network(self) -> bool:
        return not self.inference_mode

    @property
    def packing(self) -> Packing:
        return Packing(fixed=("embedding",) if self.has_network else ())

    def shapes(self, site: InputSite) -> Shapes:
        return dict.fromkeys(NETWORK if self.has_network else (STORED,), (self.n_rows, site.features))

    def init(self, site: InputSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        if site.embed is None:
            raise ConfigError("a context starts from the model's embeddings: load the base model before attaching")
        ids = tuple(self.cpt_token_ids or ())
        if max(ids) >= site.vocabulary:
            raise ConfigError(
                f"cpt_token_ids holds {max(ids)}, and the model's ids end at {site.vocabulary - 1}: take ids of the "
                "model's tokenizer"
            )
        context = site.embed(torch.tensor(ids)).float()
        return {"embedding": context, "delta": torch.zeros_like(context)} if self.has_network else {STORED: context}

    def lower(self, site: InputSite, params: Params) -> PromptDelta:
        return PromptDelta(embeddings=self.stored(site, params)[STORED])

    def stored(self, site: InputSite, params: Params) -> dict[str, Tensor]:
        if not self.has_network:
            return {STORED: params[STORED]}
        delta = params["delta"]
        moves = torch.tensor([[kind % 4 != 0] for kind in self.types], device=delta.device)
        return {STORED: params["embedding"] + delta * moves}

    def disk_names(self, site: InputSite) -> dict[str, str]:
        return NETWORK if self.has_network else {STORED: STORED}

    @property
    def training(self) -> Training | None:
        return _CPTTraining(self) if self.has_network else None

    def radii(self, width: int) -> Tensor:
        """Return the radius of each token's ball, (n, 1), in a model of this width."""
        scale = math.sqrt(width / _WIDTH)
        of_kind = {1: self.opt_projection_format_epsilon, 2: self.opt_projection_epsilon}
        of_kind[3] = of_kind[1]
        return torch.tensor([[scale * of_kind[k % 4] if k % 4 else _LEAST_RADIUS] for k in self.types])


def _is_label(kind: int) -> bool:
    return kind > 0 and kind % 4 == 0


def within(delta: Tensor, radii: Tensor) -> Tensor:
    """Return ``delta`` (n, d), in which each row longer than its radius (n, 1) is shortened to the radius."""
    length: Tensor = torch.linalg.vector_norm(delta, dim=1, keepdim=True)
    return delta * (radii / length.clamp(min=radii))


@dataclass(frozen=True)
class _CPTTraining(Training):
    """Training with a projection of the tokens onto their balls after each step."""

    config: CPTConfig

    def schedule(self, layers: Mapping[str, Params]) -> Schedule | None:
        found = [params["delta"] for params in layers.values() if "delta" in params]
        return _Projection(found[0], self.config.radii(found[0].shape[1]).to(found[0].device)) if found else None


class _Projection(Schedule):
    """Schedule that moves tokens that have left their balls back onto them."""

    def __init__(self, delta: Tensor, radii: Tensor) -> None:
        self.delta, self.radii = delta, radii

    @torch.no_grad()
    def step(self, step: int) -> None:
        self.delta.copy_(within(self.delta, self.radii.to(self.delta)))

    def state(self) -> dict[str, Tensor]:
        return {"radii": self.radii}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.radii = state["radii"].to(self.delta.device)
