"""Signals that ask a run to stop: the step in progress ends, a checkpoint is written, and the run reports it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from veneer.errors import Interrupted
from veneer.train.first_step import evaluates_first
from veneer.train.processes import is_main, largest, n_processes

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PASSED_ON_SECONDS = 5.0  # within these a launcher of processes passes on what they have heard themselves
_SHOW_CURSOR = b"\x1b[?25h"
_AFTER_STEP, _AFTER_EVALUATION = "after this step, with a checkpoint", "after this evaluation, with a checkpoint"
_BEFORE_STEPS = "before the first step: nothing is trained yet, and no checkpoint is written"


class Stop:
    """Signals that ask a run to stop. The first stops it where it can be resumed later; the second ends it at once.

    ``signal``: the first signal received, if any. Outside `deferred` blocks a signal raises Interrupted immediately.
    ``when`` is the end of the message inside such a block: where the run will stop.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.when = _AFTER_STEP
        self._waits = 0
        self._heard_at = 0.0
        self._process = os.getpid()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Enter a context in which signals are only recorded. Code inside calls `check` wherever it can stop."""
        self._waits += 1
        try:
            yield
        finally:
            self._waits -= 1

    def hear(self, number: int, frame: FrameType | None = None) -> None:
        """Handle a signal: record it or raise Interrupted. A second one ends the process."""
        if os.getpid() != self._process:  # a worker that was forked from the run
            os._exit(128 + number)
        if self.signal is not None:
            if n_processes() == 1 or time.monotonic() - self._heard_at > PASSED_ON_SECONDS:
                _leave_terminal()
                os._exit(128 + number)
            return
        self.signal, self._heard_at = number, time.monotonic()
        if not self._waits:
            raise Interrupted(number)
        if is_main():  # not through a stream, which the signal may have come in the middle of
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: the run stops {self.when}; a second signal ends it now\n".encode())

    def check(self) -> None:
        """Raise Interrupted if a signal was received."""
        if self.signal is not None:
            raise Interrupted(self.signal)


@contextmanager
def listening() -> Iterator[Stop]:
    """Enter a context with a `Stop` as the handler of SIGTERM and SIGINT.

    Ignored signals stay ignored. Nothing is installed in a thread other than the main one, since Python handles no
    signals there.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop.hear) for number in heard}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopAfterStep(TrainerCallback):  # type: ignore[misc]
    """Callback that ends training, with a checkpoint, after the step in which a signal arrived.

    All processes stop together.
    """

    def __init__(self, stop: Stop) -> None:
        self._stop, self._number = stop, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Set where a signal would stop the run: within the first evaluation if the run begins with one, otherwise
        after a step.
        """
        self._stop.when = _BEFORE_STEPS if evaluates_first(args, state, **context) else _AFTER_STEP

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Set where a signal would stop the run: after this step."""
        self._stop.when = _AFTER_STEP

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Set where a signal would stop the run: after this evaluation. If nothing is trained yet, a run of one process
        stops at once.
        """
        self._stop.when = _AFTER_EVALUATION if state.global_step else _BEFORE_STEPS
        if self._stop.signal and not state.global_step and n_processes() == 1:
            raise _before_steps(self._stop.signal)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop training if any process has received a signal."""
        self._ask(args.device, control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Check for a signal again: an evaluation is long, and the checkpoint of its step comes after it.

        Raises Interrupted if no step has been taken yet.
        """
        self._ask(args.device, control)
        if self._number and not state.global_step:
            raise _before_steps(self._number)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Raise Interrupted once the checkpoint is written, before the logging and evaluation at the end of
        an epoch.
        """
        if self._number:
            raise Interrupted(self._number)

    def _ask(self, device: torch.device, control: TrainerControl) -> None:
        self._number = self._number or largest(self._stop.signal or 0, device)
        control.should_save = control.should_save or bool(self._number)


def _before_steps(number: int) -> Interrupted:
    return Interrupted(number, f"{signal.Signals(number).name} {_BEFORE_STEPS}")


def _leave_terminal() -> None:
    if os.isatty(2):
        os.write(2, _SHOW_CURSOR)
