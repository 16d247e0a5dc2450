"""Callbacks of a run: those of its settings, and those that write its record."""

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
    """Callback that checkpoints selectively, after Trainer has switched on the full form at the beginning
    of `train`.
    """

    def on_train_begin(self, args: RunSettings, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        """Switch to selective recomputation."""
        checkpoint_selectively(model_of(model), (args.gradient_checkpointing_kwargs or {}).get("every_n_layers", 1))


class ShortRunLog(TrainerCallback):  # type: ignore[misc]
    """Callback that logs the steps of a short run more often than its settings: a curve needs points."""

    def on_train_begin(self, args: RunSettings, state: Any, control: Any, **_: Any) -> None:
        """Log 20 times or more if there were fewer than `LEAST_POINTS`: every step of a run of up to 39."""
        if state.max_steps < LEAST_POINTS * state.logging_steps:
            state.logging_steps = max(1, state.max_steps // 20)


class BeginReport(TrainerCallback):  # type: ignore[misc]
    """Callback that reports the step at which training begins, once all checks of the checkpoint have passed."""

    def __init__(self, begin: Callable[[int], None]) -> None:
        self._begin = begin

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Pass on the step, 0 or that of the checkpoint, in Trainer's event."""
        self._begin(state.global_step)


class LastEvaluation(TrainerCallback):  # type: ignore[misc]
    """Callback that keeps the last evaluation of a run and its step.

    A recipe has one data set to evaluate on. With several, only the evaluation on the last one would be kept.
    """

    def __init__(self) -> None:
        self._step: int | None = None
        self._metrics: Mapping[str, Any] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any], **_: Any) -> None:
        """Record an evaluation, in Trainer's event."""
        self._step, self._metrics = state.global_step, metrics

    def of_trained(self, args: TrainingArguments, state: TrainerState) -> Mapping[str, Any] | None:
        """Return the metrics of the last evaluation; None if there is none, or if it saw other weights than the final
        ones.
        """
        others = args.load_best_model_at_end and state.best_global_step not in (None, state.global_step)
        return None if others or self._step != state.global_step else self._metrics


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Callback that times the optimizer steps. ``n_tokens`` returns the tokens read so far, padding left out."""

    def __init__(self, n_tokens: Callable[[], int]) -> None:
        self._n_tokens, self._device = n_tokens, ""
        self._began, self._read = 0.0, 0
        self._seconds: list[float] = []
        self._tokens: list[float] = []

    def on_step_begin(self, args: RunSettings, state: Any, control: Any, **_: Any) -> None:
        """Start the clock, in Trainer's event."""
        self._began, self._read, self._device = time.perf_counter(), self._n_tokens(), args.device.type

    def on_step_end(self, args: RunSettings, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock, in Trainer's event."""
        n = args.gradient_accumulation_steps
        self._seconds.append((time.perf_counter() - self._began) / n)
        self._tokens.append((self._n_tokens() - self._read) / n)

    def results(self) -> dict[str, Any]:
        """Return the device, quartiles of the seconds of a micro-batch and its mean tokens; nothing without a step.

        The first step, which prepares what later ones reuse, counts only if there is no other.
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
