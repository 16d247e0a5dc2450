"""Callbacks of a run: those that its settings ask for, and those that record its progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState, TrainingArguments

from veneer.adapters.token_scores import model_of
from veneer.model.memory.checkpointing import checkpoint_selectively
from veneer.train.config import RunSettings
from veneer.train.guards import FiniteGradients

LEAST_POINTS = 2
"""Of the curve of a run: `ShortRunLog` logs more often if its settings give fewer."""


def callbacks_of(args: RunSettings) -> Iterator[TrainerCallback | type[TrainerCallback]]:
    """Return the callbacks that the settings ask for."""
    if (args.gradient_checkpointing_kwargs or {}).get("selective"):
        yield SelectiveCheckpointing
    if not args.fp16:
        yield FiniteGradients
    if args.early_stopping_patience is not None:
        yield EarlyStoppingCallback(args.early_stopping_patience)


class SelectiveCheckpointing(TrainerCallback):  # type: ignore[misc]
    """Callback that replaces the full gradient checkpointing that Trainer enables at the start of `train` by the
    selective one.
    """

    def on_train_begin(self, args: RunSettings, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        """Switch to selective recomputation."""
        checkpoint_selectively(model_of(model), (args.gradient_checkpointing_kwargs or {}).get("every_n_layers", 1))


class ShortRunLog(TrainerCallback):  # type: ignore[misc]
    """Callback that logs a short run more often than its settings say, so that its loss curve has enough points."""

    def on_train_begin(self, args: RunSettings, state: Any, control: Any, **_: Any) -> None:
        """If the run would log fewer than `LEAST_POINTS` lines, log about every twentieth part of the run, but at most
        once a step.
        """
        if state.max_steps < LEAST_POINTS * state.logging_steps:
            state.logging_steps = max(1, state.max_steps // 20)


class BeginReport(TrainerCallback):  # type: ignore[misc]
    """Callback that reports the step after which training begins, once all checks of the checkpoint have passed."""

    def __init__(self, begin: Callable[[int], None]) -> None:
        self._begin = begin

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report the step: 0, or that of the checkpoint."""
        self._begin(state.global_step)


class LastEvaluation(TrainerCallback):  # type: ignore[misc]
    """Callback that keeps the last evaluation of a run and its step.

    If there are several evaluation sets, it keeps only the evaluation on the last one; a recipe has one set.
    """

    def __init__(self) -> None:
        self._step: int | None = None
        self._metrics: Mapping[str, Any] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any], **_: Any) -> None:
        """Keep an evaluation's metrics and step."""
        self._step, self._metrics = state.global_step, metrics

    def of_trained(self, args: TrainingArguments, state: TrainerState) -> Mapping[str, Any] | None:
        """Return the metrics of the last evaluation, or None if there is none or if training went on after it."""
        others = args.load_best_model_at_end and state.best_global_step not in (None, state.global_step)
        return None if others or self._step != state.global_step else self._metrics


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Callback that times the optimizer steps. ``n_tokens`` returns the number of tokens read so far,
    without padding.
    """

    def __init__(self, n_tokens: Callable[[], int]) -> None:
        self._n_tokens, self._device = n_tokens, ""
        self._began, self._read = 0.0, 0
        self._seconds: list[float] = []
        self._tokens: list[float] = []

    def on_step_begin(self, args: RunSettings, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self._began, self._read, self._device = time.perf_counter(), self._n_tokens(), args.device.type

    def on_step_end(self, args: RunSettings, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock."""
        n = args.gradient_accumulation_steps
        self._seconds.append((time.perf_counter() - self._began) / n)
        self._tokens.append((self._n_tokens() - self._read) / n)

    def results(self) -> dict[str, Any]:
        """Return the device, quartiles of a micro-batch's seconds, and its mean number of tokens; empty if no step was
        taken.

        The first step is left out unless it is the only one: it prepares data that later steps reuse.
        """
        if not self._seconds:
            return {}
        late = slice(1 if len(self._seconds) > 1 else 0, None)
        seconds, tokens = sorted(self._seconds[late]), self._tokens[late]
        quartiles = [seconds[round(share * (len(seconds) - 1))] for share in (0.25, 0.5, 0.75)]
        return {
            "device": self._device,
            "micro_batch": {"seconds": quartiles, "tokens": sum(tokens) / len(tokens)},
        }
