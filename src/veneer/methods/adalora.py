"""AdaLoRA: ``W + (alpha / r) B diag(e) A`` with a budget of ranks spent by importance (Zhang et al. 2023,
arXiv:2303.10512).

The update has the form of a singular value decomposition, P Λ Q = B diag(e) A (eq. 3). A triplet is an entry of e with
its column of B and row of A. `Budget` scores each triplet by the smoothed sensitivity of its numbers (eq. 8 to 11), and
sets the weakest entries of e to zero until the step's budget is met (eq. 6 and 12). `orthogonality` (eq. 4), added to
the loss, pulls B and A towards orthogonal columns and rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.checks import Checks, GroupChecks
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.patterns import below_one
from veneer.contract.peft_fields import OF_LORA, PeftFields
from veneer.contract.targets import FamilyTargets
from veneer.contract.training import Training, distances_from_orthonormal
from veneer.errors import ConfigError
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite

RANK_OFFSET = 1e-5  # PEFT divides by the rank plus this


@dataclass(frozen=True, kw_only=True)
class AdaLoraConfig(LinearMethod):
    """Settings of AdaLoRA, with the names that PEFT gives them.

    ``init_r`` is the rank of every layer at the start. ``target_r`` is the mean rank of the layers at the end.
    ``tinit`` is the number of steps at the start for which the budget of ranks stays at its full size. ``deltaT`` is
    the number of steps between two reductions of the budget, which falls with the cube of the time left. ``tfinal`` is
    the number of steps at the end for which the budget stays at its target. ``total_step`` is the number of steps of
    the run; if it is None, the trainer gives it. ``beta1`` and ``beta2`` smooth the sensitivity and its uncertainty.
    ``orth_reg_weight`` is the weight of the pull towards orthogonality. ``lora_alpha``: the update is multiplied by
    ``lora_alpha / init_r``. ``rank_pattern`` marks the ranks of each layer that were kept, by ``<path>.lora_E``, as in
    PEFT's files, which hold only these.
    """

    peft_type: ClassVar[str] = "ADALORA"
    headline: ClassVar[tuple[str, ...]] = ("init_r", "target_r", "lora_alpha", "target_modules")
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "convolution"})
    family_targets: ClassVar[FamilyTargets] = LOW_RANK
    outward: ClassVar[frozenset[str]] = frozenset({"lora_B"})
    inert: ClassVar[frozenset[str]] = frozenset(
        {"target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step", "rank_pattern"}
        | {"lora_dropout", "fan_in_fan_out", "bias", "init_lora_weights"}
    )
    peft_fields: ClassVar[PeftFields] = PeftFields(
        neutral={
            **OF_LORA.neutral,
            "qalora_group_size": 16,
            "use_bdlora": None,
            "kasa_config": None,
            "monteclora_config": None,
            "velora_config": None,
            "use_qalora": False,
            "alora_invocation_tokens": None,
            "alpha_pattern": {},
            "ensure_weight_tying": False,
            "eva_config": None,
            "lora_bias": False,
            "r": 8,  # written beside init_r and target_r, and read by nobody
            "target_parameters": None,
            "trainable_token_indices": None,
            "use_dora": False,
            "use_rslora": False,
        },
        unread=(*OF_LORA.unread, "qalora_group_size", "r"),
    )

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1  # noqa: N815 - PEFT's name
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: Mapping[str, Collection[bool]] | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    init_lora_weights: bool = True

    def problems(self) -> list[str]:
        counts = {name: getattr(self, name) for name in ("target_r", "init_r", "deltaT", "total_step")}
        found = super().problems() + below_one({name: n for name, n in counts.items() if n is not None})
        found += [
            f"{n}={getattr(self, n)!r} must lie in (0, 1)" for n in ("beta1", "beta2") if not 0 < getattr(self, n) < 1
        ]
        if self.orth_reg_weight < 0:
            found.append(f"orth_reg_weight={self.orth_reg_weight!r} must not be below 0")
        if self.lora_alpha <= 0:
            found.append(f"lora_alpha={self.lora_alpha!r} must be above 0")
        if not 0 <= self.lora_dropout < 1:
            found.append(f"lora_dropout={self.lora_dropout!r} must lie in [0, 1)")
        if self.total_step is not None and self.tinit >= self.total_step - self.tfinal:
            found.append(
                f"tinit={self.tinit!r} and tfinal={self.tfinal!r} leave none of total_step={self.total_step!r} for the "
                "budget to fall: make them smaller or total_step larger"
            )
        return found

    @property
    def checks(self) -> Checks:
        return GroupChecks()

    def rank(self, site: LinearSite) -> int:
        """Return the rank of a layer: the number of ranks that ``rank_pattern`` keeps there, or ``init_r`` if it has no
        entry.
        """
        kept = (self.rank_pattern or {}).get(f"{site.name}.lora_E")
        return self.init_r if kept is None else sum(kept)

    @property
    def largest_rank(self) -> int:
        kept = (self.rank_pattern or {}).values()
        return max(map(sum, kept)) if kept else self.init_r

    def shapes(self, site: LinearSite) -> Shapes:
        r = self.rank(site)
        return {"lora_A": (r, site.in_features), "lora_B": (site.out_features, r), "lora_E": (r, 1)}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        shapes = self.shapes(site)
        if not self.init_lora_weights:
            return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        factors = {name: 0.02 * torch.randn(shapes[name], generator=generator) for name in ("lora_A", "lora_B")}
        return factors | {"lora_E": torch.zeros(shapes["lora_E"])}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        scale = self.lora_alpha / (self.init_r + RANK_OFFSET)
        return LinearDelta.pair(params["lora_A"] * params["lora_E"], params["lora_B"], scale)

    def site_of(self, site: LinearSite, shapes: Mapping[str, tuple[int, ...]]) -> LinearSite:
        return replace(site, in_features=shapes["lora_A"][1], out_features=shapes["lora_B"][0])

    @property
    def training(self) -> BudgetedTraining:
        return BudgetedTraining(self)

    @property
    def dropout(self) -> float:
        return self.lora_dropout


@dataclass(frozen=True)
class BudgetedTraining(Training):
    """AdaLoRA during a training run: a penalty that pulls towards orthogonality, and a budget of ranks that falls."""

    config: AdaLoraConfig

    def fields_for(self, n_steps: int) -> Mapping[str, object]:
        return {} if self.config.total_step is not None else {"total_step": n_steps}

    def penalty(self, layers: Sequence[Params]) -> Tensor | None:
        weight = self.config.orth_reg_weight
        return orthogonality(layers) * weight if weight else None

    def schedule(self, layers: Mapping[str, Params]) -> Budget:
        return Budget(self.config, layers)


def orthogonality(layers: Sequence[Params]) -> Tensor:
    """Return the mean of ``|A Aᵀ - I|`` and ``|Bᵀ B - I|`` (Frobenius norms) over all factors, as a
    penalty for a loss.
    """
    factors = [(params["lora_A"], params["lora_B"]) for params in layers]
    return torch.stack([part for a, b in factors for part in distances_from_orthonormal(a, b)]).mean()


class Budget:
    """Budget that distributes ranks over all adapted layers. ``layers`` are each layer's parameters by its path.

    After each backward pass and optimizer step, before gradients are set to zero, call `step` with the number of the
    step. ``kept`` marks the ranks of each layer that are still in use. Raises ConfigError without a ``total_step``, and
    if the start has no more ranks than the target.
    """

    def __init__(self, config: AdaLoraConfig, layers: Mapping[str, Params]) -> None:
        if config.total_step is None:
            raise ConfigError(
                "AdaLoRA spends its budget over a run: give AdaLoraConfig the number of steps, total_step"
            )
        if config.init_r <= config.target_r:
            raise ConfigError(
                f"init_r={config.init_r} must be above target_r={config.target_r}, or AdaLoRA would remove no rank. "
                "Give a larger init_r (1.5 times target_r is usual), or use LoraConfig, whose rank is constant"
            )
        self.config, self.layers, self.total_step = config, layers, config.total_step
        self.start = sum(params["lora_E"].shape[0] for params in layers.values())
        self.target = config.target_r * len(layers)
        self.sensitivity: dict[tuple[str, str], Tensor] = {}
        self.uncertainty: dict[tuple[str, str], Tensor] = {}
        self.kept: dict[str, Tensor] = {}

    def ranks(self, step: int) -> int:
        """Return the number of ranks that all layers may have together at a step (eq. 12)."""
        first, last = self.config.tinit, self.total_step - self.config.tfinal
        if step <= first:
            return self.start
        if step > last:
            return self.target
        left = 1 - (step - first) / (last - first)
        return int((self.start - self.target) * left**3 + self.target)

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Score the ranks. If a reduction of the budget is due at this step, set the weakest ranks to zero."""
        last = self.total_step - self.config.tfinal
        if step > last:
            self._apply()
            return
        if step < last:
            self._observe()
        if step == last or (step > self.config.tinit and step % self.config.deltaT == 0):
            self._cut(self.ranks(step))

    def state(self) -> dict[str, Tensor]:
        """Return the scores, and the marks of the kept ranks, by name."""
        scores = {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty}
        found = {f"{what}/{p}/{n}": value for what, of in scores.items() for (p, n), value in of.items()}
        return found | {f"kept/{path}": value for path, value in self.kept.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state`."""
        for name, value in state.items():
            what, _, rest = name.partition("/")
            path, _, parameter = rest.partition("/")
            value = value.to(self.layers[path]["lora_E"].device)
            if what == "kept":
                self.kept[path] = value
            else:
                (self.sensitivity if what == "sensitivity" else self.uncertainty)[path, parameter] = value

    def _observe(self) -> None:
        b1, b2 = self.config.beta1, self.config.beta2
        for path, params in self.layers.items():
            for name, value in params.items():
                if value.grad is None:
                    continue
                now, key = (value * value.grad).abs(), (path, name)
                mean = b1 * self.sensitivity.get(key, torch.zeros_like(now)) + (1 - b1) * now
                spread = self.uncertainty.get(key, torch.zeros_like(now))
                self.uncertainty[key] = b2 * spread + (1 - b2) * (now - mean).abs()
                self.sensitivity[key] = mean

    def _cut(self, budget: int) -> None:
        if not self.sensitivity or budget >= self.start:
            return
        scores = {path: self._scores(path) for path in self.layers}
        threshold = torch.cat(list(scores.values())).kthvalue(self.start - budget).values
        self.kept = {path: score > threshold for path, score in scores.items()}
        self._apply()

    def _scores(self, path: str) -> Tensor:
        a, b, e = (self.sensitivity[path, n] * self.uncertainty[path, n] for n in ("lora_A", "lora_B", "lora_E"))
        return e.flatten() + a.mean(dim=1) + b.mean(dim=0)

    def _apply(self) -> None:
        for path, kept in self.kept.items():
            self.layers[path]["lora_E"].masked_fill_(~kept[:, None], 0.0)
