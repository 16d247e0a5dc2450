"""The check that two sides compute the same, which fails if one ignores the adapter or has a wrong backward pass.

`stir` moves an adapter until it changes the model's output. Logits are then compared by what the adapter adds to them,
gradients tensor by tensor under the names of the saved file, and losses over three steps. Dropout is to be off.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import veneer
from bench.lora_step import agree, loss_of, optimizer_of

TELLS = 0.2  # least change of the logits by the adapter, of the norm of the base's
SHARE = 0.3  # sides may part by this share of the change, and of a gradient: 16 bits take up to half of it
EXACT_SHARE = 0.01  # in float32, where tiny models part by 0.0001 at most
RATE, STEPS = 2e-3, 3
# A gradient counts as at least FLOOR of the median of its kind; one of fewer than FEW numbers as all of it.
FLOOR, FEW = 0.1, 8


class PartedError(SystemExit):
    """The sides compute something else."""


@dataclass(frozen=True, slots=True)
class Course:
    """Centred logits with the adapter and without it, losses of some steps, and the gradients of the first.

    ``share``: how far sides may part.
    """

    logits: Tensor
    base: Tensor
    losses: list[float]
    gradients: dict[str, Tensor]
    share: float


@torch.no_grad()
def stir(model: Any, ids: Tensor | None = None) -> Any:
    """Add noise to what trains until the adapter changes the logits by `TELLS`. PartedError where none does."""
    if ids is None:
        ids = torch.randint(0, model.config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(3))
    generator, ids = torch.Generator().manual_seed(2), ids.to(model.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    starts = [p.detach().clone() for p in trained]
    noise = [torch.randn(p.shape, generator=generator).to(p) for p in trained]
    was_training, base = model.training, base_logits(model.eval(), ids)
    for power in range(12):
        for p, start, direction in zip(trained, starts, noise, strict=True):
            p.copy_(start + 0.01 * 2**power * direction)
        if (logits(model, ids) - base).norm() >= TELLS * base.norm():
            return model.train(was_training)
    raise PartedError("no move of the adapter changes the logits: there is nothing to compare")


def course(side: str, model: Any, ids: Tensor) -> Course:
    """Return logits, losses and gradients of a side for ``ids`` (rows, length), whose parameters are restored."""
    trained = [p for p in model.parameters() if p.requires_grad]
    starts = [p.detach().clone() for p in trained]
    with torch.no_grad():
        adapted, base = logits(model, ids), base_logits(model, ids)
    optimizer, losses, found = optimizer_of(model, RATE), list[float](), dict[str, Tensor]()
    for number in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(side, model, ids)
        if loss.requires_grad:  # else no adapter is in it, which the comparison says
            loss.backward()
        found = found if number else gradients(model)
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        for p, start in zip(trained, starts, strict=True):
            p.copy_(start)
    optimizer.zero_grad()
    return Course(adapted, base, losses, found, share_of(model))


def share_of(model: Any) -> float:
    """Return the relative distance that another side may have from this one."""
    return EXACT_SHARE if model.dtype == torch.float32 else SHARE


def logits(model: Any, ids: Tensor) -> Tensor:
    """Logits less their mean over the vocabulary, which changes no probability; (rows, length, vocabulary)."""
    found: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return found - found.mean(dim=-1, keepdim=True)


def base_logits(model: Any, ids: Tensor) -> Tensor:
    with model.disable_adapter():
        return logits(model, ids)


@torch.no_grad()
def gradients(model: Any) -> dict[str, Tensor]:
    """The gradients that the model holds, by the keys of the saved file; zeros where there is none."""
    trained = [p for p in model.parameters() if p.requires_grad]
    starts, before = [p.detach().clone() for p in trained], saved(model)
    for p in trained:
        p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    held = saved(model)
    for p, start in zip(trained, starts, strict=True):
        p.copy_(start)
    return {name: value for name, value in held.items() if not torch.equal(value, before[name])}


def saved(model: Any) -> dict[str, Tensor]:
    """A copy of the tensors of the saved file."""
    library: Any = veneer
    if not isinstance(model, veneer.PeftModel):
        import peft as library  # not above: scripts without a peer do without it
    return {name: value.detach().clone() for name, value in library.get_peft_model_state_dict(model).items()}


def require_same(what: str, theirs: Course, own: Course) -> None:
    """Print how far two sides are apart. PartedError where that is more than rounding, or where nothing can be told."""
    change = (theirs.logits - theirs.base).norm()
    if not change >= TELLS / 2 * theirs.base.norm():
        raise PartedError(
            f"{what}: the adapter changes the logits by {change / theirs.base.norm():.1%}: give it larger values"
        )
    apart, share = float((own.logits - theirs.logits).norm() / change), max(theirs.share, own.share)
    require_small(f"{what}: logits, of what the adapter adds", apart, share)
    require_same_gradients(what, theirs.gradients, own.gradients, share)
    agree(f"{what}: losses of {STEPS} steps", theirs.losses, own.losses)


def require_same_gradients(what: str, theirs: Mapping[str, Tensor], own: Mapping[str, Tensor], share: float) -> None:
    """PartedError where one gradient is another, or is missing."""
    if theirs.keys() != own.keys() or not theirs:
        raise PartedError(f"{what}: the sides part: gradients of {sorted(theirs.keys() ^ own.keys())[:3]} on one alone")
    medians = {kind: statistics.median(norms) for kind, norms in by_kind(theirs).items()}
    apart = {
        name: float((own[name].float() - value.float()).norm()) / counted(value, medians[kind_of(name)])
        for name, value in theirs.items()
    }
    worst = max(apart, key=lambda name: apart[name])
    require_small(f"{what}: gradients, at most ({worst})", apart[worst], share)


def counted(value: Tensor, median: float) -> float:
    """The norm that a gradient counts as: sums of both signs may leave few numbers that are rounding alone."""
    floor = FLOOR if value.numel() >= FEW else 1.0
    return max(float(value.float().norm()), floor * median) or 1.0  # none on their side: none on ours either


def by_kind(tensors: Mapping[str, Tensor]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for name, value in tensors.items():
        found.setdefault(kind_of(name), []).append(float(value.float().norm()))
    return found


def kind_of(name: str) -> str:
    """The part of a tensor's name that all layers share, as lora_A."""
    return name.removesuffix(".weight").rpartition(".")[2]


def require_small(what: str, apart: float, share: float) -> None:
    print(f"{what}: apart by {apart:.2%}", flush=True)
    if not apart <= share:
        raise PartedError(f"{what}: they part by {apart:.0%}, at most {share:.0%} is rounding: no times are given")


def require_heard(what: str, adapted: Iterable[object], base: Iterable[object]) -> None:
    """PartedError where most answers under adapters are the base's, so that adapters left out would not be noticed."""
    pairs = list(zip(adapted, base, strict=True))
    silent = sum(a == b for a, b in pairs)
    if 2 * silent > len(pairs):
        raise PartedError(f"{what}: {silent} of {len(pairs)} answers under adapters are the base's: nothing is told")
