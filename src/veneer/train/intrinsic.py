"""Intrinsic dimension: the count of numbers needed to learn a task (Aghajanyan et al. 2021, arXiv:2012.13255)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call

from veneer.analyze.subspace import Subspace
from veneer.data.collating import Collator
from veneer.data.encoding import Encoder, kind_of
from veneer.data.reader import RowReader
from veneer.data.rows import load_rows, split_off
from veneer.errors import ConfigError, TrainingError
from veneer.evaluate.metric import LabelChoice
from veneer.evaluate.questions import QuestionReader
from veneer.evaluate.scoring import log_probabilities
from veneer.model.sites.structure import modes_kept
from veneer.plain.ticks import ticks_at
from veneer.train.loss import token_loss

Batch = Mapping[str, Tensor]
SHARE = 0.9  # the paper's d90: nine tenths of what training all weights reaches


@dataclass(frozen=True, kw_only=True)
class PointTraining:
    """Training of each point of the curve: ``steps`` batches with Adam, and a learning rate that falls linearly to
    zero.
    """

    steps: int = 100
    learning_rate: float = 1e-3
    structure_aware: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"steps={self.steps} and learning_rate={self.learning_rate} must be above zero")


def task_of(
    tokenizer: Any, data: Path, batch_size: int, held_out: float, seed: int
) -> tuple[list[Batch], Callable[[Any], float]]:
    """Return training batches of a file's rows, and a function that returns a model's accuracy on the held-out share.

    Accuracy is the share of rows whose right label is the likeliest. Raises DataError and ConfigError for rows that are
    not a choice among a few labels.
    """
    rows, held = split_off(load_rows(data, RowReader()).shuffle(seed=seed), held_out, seed)
    encoder = Encoder(tokenizer=tokenizer, kind=kind_of(rows.column_names, "text"), completion_only=True)
    encoded = [encoder(row, number) for number, row in enumerate(rows)]
    collate = Collator(pad_token_id=tokenizer.pad_token_id or 0)
    batches: list[Batch] = [collate(encoded[i : i + batch_size]) for i in range(0, len(encoded), batch_size)]
    asked = LabelChoice().ask(QuestionReader(tokenizer=tokenizer), list(held), [*rows, *held])
    return batches, lambda model: asked.judged(log_probabilities(model, asked.items)).value


@dataclass(frozen=True, slots=True)
class Curve:
    """Scores of training in subspaces, by the dimension d of the subspace.

    ``before`` is the untrained model's score, ``full`` the score after training all of its ``n_weights`` weights.
    """

    scores: dict[int, float]
    before: float
    full: float
    n_weights: int

    @property
    def d90(self) -> int | None:
        """The smallest d whose score is at least nine tenths of ``full``, or None if no d reaches it."""
        return min((d for d, score in self.scores.items() if score >= SHARE * self.full), default=None)


class _Whole(nn.Module):
    """Parameters for training all weights directly, without a projection: a copy of each weight is a parameter."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = list(weights)
        self.values = nn.ParameterList(nn.Parameter(w.detach().clone()) for w in weights.values())

    def weights(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.values, strict=True))


class _Loss(nn.Module):
    """Module that computes the mean loss of a batch. As a module, it can be called with other weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        found = token_loss(self.model, dict(batch))
        return found.total / found.n_tokens.clamp_min(1)


def dimension_curve(
    model: nn.Module,
    batches: Sequence[Batch],
    score: Callable[[Any], float],
    dimensions: Sequence[int],
    training: PointTraining,
    *,
    on_point: Callable[[int | None, float], None] = lambda d, score: None,
) -> Curve:
    """Train in random subspaces of several dimensions, and with all weights. Return the scores; the model is unchanged.

    ``score`` is called on the model with the trained weights in place. Raises ConfigError for dimensions that do not
    fit the model, TrainingError if a loss is not finite.
    """
    start = {name: p.detach() for name, p in model.named_parameters()}
    device = _device_of(start)
    batches = [{name: each.to(device) for name, each in batch.items()} for batch in batches]
    wanted = sorted(set(dimensions))
    for d in wanted:
        _space(start, d, training)  # what does not fit is told before anything is trained
    before = score(model)
    scores: dict[int, float] = {}
    for d in wanted:
        scores[d] = _scored(model, _space(start, d, training), batches, score, training)
        on_point(d, scores[d])
    full = _scored(model, _Whole(start), batches, score, training)
    on_point(None, full)
    return Curve(scores, before, full, sum(w.numel() for w in start.values()))


def _scored(
    model: nn.Module,
    space: Subspace | _Whole,
    batches: Sequence[Batch],
    score: Callable[[Any], float],
    training: PointTraining,
) -> float:
    _train(model, space, batches, training)
    with torch.no_grad(), _weights_in(model, space.weights()):
        return score(model)


def _space(start: Mapping[str, Tensor], d: int, training: PointTraining) -> Subspace:
    made = Subspace(start, d, structure_aware=training.structure_aware, seed=training.seed)
    return made.to(_device_of(start))


def _device_of(weights: Mapping[str, Tensor]) -> torch.device:
    return next(iter(weights.values())).device


def _train(model: nn.Module, space: Subspace | _Whole, batches: Sequence[Batch], training: PointTraining) -> None:
    with modes_kept(model):
        model.train()
        _train_steps(_Loss(model), space, batches, training)


def _train_steps(loss_of: _Loss, space: Subspace | _Whole, batches: Sequence[Batch], training: PointTraining) -> None:
    optimizer = torch.optim.Adam([p for p in space.parameters() if p.requires_grad], lr=training.learning_rate)
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * (1 - step / training.steps)
        weights = {f"model.{name}": value for name, value in space.weights().items()}
        loss = functional_call(loss_of, weights, (batches[step % len(batches)],))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(f"the loss is {value} in step {step + 1}: choose a lower learning rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@contextmanager
def _weights_in(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Enter a context in which the model has the given weights instead of its own."""
    own = {name: (p, p.data) for name, p in model.named_parameters()}
    for name, (parameter, _) in own.items():
        parameter.data = weights[name].detach()
    try:
        yield
    finally:
        for parameter, data in own.values():
            parameter.data = data


def draw_curve(curve: Curve, path: Path) -> None:
    """Draw the scores over d as a PNG, with a line at the score that defines d90."""
    curve_figure(curve).savefig(path)


def curve_figure(curve: Curve) -> Figure:
    """Return the picture of `draw_curve`."""
    figure = Figure(figsize=(7, 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(list(curve.scores), list(curve.scores.values()), "o-", label="in a random subspace")
    axes.axhline(curve.full, color="black", linewidth=1, label=f"all {curve.n_weights:,} weights")
    axes.axhline(SHARE * curve.full, color="black", linewidth=1, linestyle="--", label="nine tenths of that")
    axes.axhline(curve.before, color="gray", linewidth=1, linestyle=":", label="untrained")
    ticks_at(axes, list(curve.scores))
    reached = "no d reaches it" if curve.d90 is None else f"d90 = {curve.d90:,}"
    axes.set_title(f"Intrinsic dimension: {reached}")
    axes.set_xlabel("dimension d of the subspace")
    axes.set_ylabel("held-out accuracy")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)  # covers no point
    return figure
