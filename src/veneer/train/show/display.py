"""Shows the progress of a run on stderr: in a terminal one bar with the latest values, otherwise plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from veneer.plain.progress import draws_bars, waiting_anew, waiting_heard, waiting_over, waits_told
from veneer.plain.units import duration
from veneer.train.first_step import evaluates_first

# Of the many values of preferences and rewards those to go by; all are in the log.
_OF_REWARDS = {
    "reward": "reward",
    "rewards/accuracies": "accuracy",
    "accuracy": "accuracy",
    "rewards/margins": "margin",
}
PAUSE_SECONDS = 5.0  # between two plain lines, where steps are logged less often
_PAUSE_SHARE = 0.01  # of the run's whole time, where that is longer: a log of days stays short
_COUNTED_STEPS = 3  # before the time left is told: the first ones are slower
_FIRST_STEP = "computing the first step"
_NOT_SHOWN = ("_runtime", "_per_second", "_preparation_time")


class RunDisplay(TrainerCallback):  # type: ignore[misc]
    """Callback that shows the steps of a trainer. ``n_tokens`` returns the number of tokens read so far.

    In a terminal it is a bar. If stderr is a file, a pipe or a dumb terminal, or if ``bar`` is false, each log step is
    one plain line. The displayed tokens a second leave evaluations and saves out. If several runs train together, lines
    begin with the run's ``name``.

    ``loss(step)`` returns the mean loss since the last log step. If it is given, a plain line comes at least every
    `PAUSE_SECONDS`, or every hundredth of the run if that is longer. Within a long step, such a line names the current
    work. If a line's loss is the mean of several steps, the line says of how many.
    """

    def __init__(
        self,
        n_tokens: Callable[[], int],
        *,
        loss: Callable[[int], float] | None = None,
        bar: bool = True,
        console: Console | None = None,
        name: str = "",
    ) -> None:
        self._n_tokens, self._loss, self._prefix = n_tokens, loss, f"{name}: " if name else ""
        self._console = console or Console(stderr=True, highlight=False)
        self._draws = bar and draws_bars(self._console)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._trains = False
        self._step_began = self._busy = self._said = 0.0
        self._waits = ExitStack()
        self._counted: int | None = None
        self._predicted = self._logged = 0
        self._apart = PAUSE_SECONDS

    def on_train_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        """Open the bar that counts the steps."""
        self._trains, self._busy, self._counted = True, 0.0, None
        self._began, self._first_step = time.perf_counter(), int(state.global_step)
        self._said, self._logged = self._began, self._first_step
        if state.is_world_process_zero:
            self._open("training", state.max_steps, state.global_step)
        if self._says_between(state):
            measures = evaluates_first(args, state, **context)
            what = "measuring the held-out rows before the first step" if measures else _FIRST_STEP
            self._waits.enter_context(waits_told(what))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the step's clock."""
        self._step_began = time.perf_counter()
        if self._counted is None:
            self._counted = self._n_tokens()
        elif self._says_between(state):
            waiting_anew(f"computing step {state.global_step + 1}/{state.max_steps}")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the step's clock. Move the bar, or print a line if none was printed for long."""
        now = time.perf_counter()
        self._busy += now - self._step_began
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)
        elif self._says_between(state):
            self._apart = self._pause(state, now)
            if not control.should_log and now - self._said >= self._apart:
                loss = self._mean(self._loss(state.global_step), state) if self._loss is not None else ""
                self._say("  ".join([f"step {state.global_step}/{state.max_steps}", loss, *self._left(state, now)]))
                self._said = now
            waiting_anew(_next_work(control, state))

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        """Move the bar that counts the held-out batches."""
        self._predicted += 1
        total = len(eval_dataloader) if hasattr(eval_dataloader, "__len__") else None
        if self._trains and self._bar is not None:
            self._bar.update(self._task, description=f"held out {self._predicted}/{total or '?'}", refresh=True)
        elif state.is_world_process_zero:
            if self._bar is None:
                self._open("held out", total, 0)
            if self._bar is not None:
                self._bar.update(self._task, completed=self._predicted)
            elif self._loss is not None and (now := time.perf_counter()) - self._said >= PAUSE_SECONDS:
                self._said = now
                self._say(f"held out {self._predicted}/{total or '?'}")

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remove the bar that counts the held-out batches."""
        self._evaluated()
        if self._says_between(state) and self._trains:
            waiting_anew(_FIRST_STEP if state.global_step == self._first_step else _next_work(control, state))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set the name of the work that follows a checkpoint."""
        if self._says_between(state) and self._trains:
            waiting_anew(_next_work(control, state))

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """Remove the bar that counts the held-out batches."""
        self._evaluated()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Show the loss in the bar, or on a line if there is no bar. Show an evaluation's values on a line."""
        if logs is None or not state.is_world_process_zero:
            return
        if "loss" in logs:
            loss = f"loss {logs['loss']:.4f}" if self._bar is not None else self._mean(logs["loss"], state)
            self._logged = int(state.global_step)
            learned = [loss, *_rewards(logs), f"lr {logs.get('learning_rate', 0):.2e}"]
            values = "  ".join([*learned, f"{self._rate():,.0f} tokens/s"])
            if self._bar is not None:
                self._bar.update(self._task, values=values)
            else:
                self._said = time.perf_counter()
                left = self._left(state, self._said)
                self._say("  ".join([f"step {state.global_step}/{state.max_steps}", values, *left]))
        held_out = _held_out(logs)
        if held_out:
            at = f"step {state.global_step}/{state.max_steps}" if self._trains else "after training"
            self._say(f"{at}  held out: {held_out}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remove the bar."""
        self.close()

    def close(self) -> None:
        """Restore the terminal, whatever ended the run."""
        self._trains = False
        self._waits.close()
        self._evaluated()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _open(self, title: str, total: int | None, done: int) -> None:
        if not self._draws:
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}"),
            TimeRemainingColumn(compact=True),
            SpinnerColumn(finished_text=" "),  # a step of a minute moves nothing else
        )
        waiting_over()
        # Text printed to a stdout that is not this terminal must not come out here.
        self._bar = Progress(
            *columns,
            console=self._console,
            expand=True,
            transient=not self._trains,
            redirect_stdout=sys.stdout.isatty(),
        )
        self._task = self._bar.add_task(title, total=total, completed=done, values="")
        self._bar.start()

    def _evaluated(self) -> None:
        self._predicted = 0
        if self._bar is None:
            return
        if self._trains:
            self._bar.update(self._task, description="training")
        else:
            self._bar.stop()
            self._bar = None

    def _say(self, line: str) -> None:
        self._console.print(self._prefix + line, soft_wrap=True, markup=False)
        waiting_heard(self._apart)

    def _rate(self) -> float:
        """Return the tokens a second since the last line."""
        counted, self._counted = self._counted or 0, self._n_tokens()
        busy, self._busy = self._busy, 0.0
        return (self._counted - counted) / busy if busy else 0.0

    def _mean(self, loss: float, state: Any) -> str:
        """Return the mean loss since the last log step as text. The text says of how many steps, if
        there are several.
        """
        n_steps = int(state.global_step) - self._logged
        return f"loss {loss:.4f}" + (f" (mean of {n_steps} steps)" if n_steps > 1 else "")

    def _left(self, state: Any, now: float) -> list[str]:
        """Return the remaining time as text, or nothing if too few steps were timed."""
        if state.global_step - self._first_step < min(_COUNTED_STEPS, state.max_steps - self._first_step):
            return []
        return [f"{duration(self._step_seconds(state, now) * (state.max_steps - state.global_step))} left"]

    def _step_seconds(self, state: Any, now: float) -> float:
        return (now - self._began) / max(int(state.global_step) - self._first_step, 1)

    def _pause(self, state: Any, now: float) -> float:
        """Return the seconds after which the next plain line is due."""
        return max(PAUSE_SECONDS, _PAUSE_SHARE * self._step_seconds(state, now) * int(state.max_steps))

    def _says_between(self, state: Any) -> bool:
        """Return True if plain lines are printed between the log steps."""
        return self._loss is not None and self._bar is None and bool(state.is_world_process_zero)


def show_run(
    trainer: Trainer, n_tokens: Callable[[], int], loss: Callable[[int], float] | None = None
) -> RunDisplay | None:
    """Replace transformers' bars and printed dicts by a `RunDisplay`. A notebook keeps its own table, so None is
    returned.
    """
    shown = [kind for kind in (ProgressCallback, PrinterCallback) if trainer.pop_callback(kind) is not None]
    if not shown:
        return None
    bar = shown[0] is ProgressCallback  # PrinterCallback stands for disable_tqdm
    display = RunDisplay(n_tokens, loss=loss, bar=bar)
    trainer.add_callback(display)
    return display


def _next_work(control: Any, state: Any) -> str:
    """Return the name of the work between two steps, such as an evaluation, in Trainer's order."""
    if control.should_evaluate:
        return "measuring the held-out rows"
    if control.should_save:
        return "saving a checkpoint"
    return "reading the rows of the next step" if state.global_step < state.max_steps else "ending the training"


def _held_out(logs: Mapping[str, Any]) -> str:
    """Return an evaluation's values as ``loss 1.2345  mean token accuracy 72.7%``, or an empty text if
    there are none.
    """
    if any(key.startswith(("eval_reward/", "eval_rewards/")) for key in logs):
        loss = [f"loss {logs['eval_loss']:.4f}"] if "eval_loss" in logs else []
        return "  ".join([*loss, *_rewards(logs, "eval_")])
    found = []
    for key, value in logs.items():
        if key.startswith("eval_") and isinstance(value, (int, float)) and not key.endswith(_NOT_SHOWN):
            name = key.removeprefix("eval_").replace("_", " ")
            shown = f"{value:.1%}" if name.endswith("accuracy") else f"{value:.4f}"
            found.append(f"{name} {shown}")
    return "  ".join(found)


def _rewards(logs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the logged values of preferences and rewards as words, such as ``accuracy 72.7%``."""
    found = {name: logs[prefix + key] for key, name in _OF_REWARDS.items() if prefix + key in logs}
    return [f"{name} {value:.1%}" if name == "accuracy" else f"{name} {value:.4f}" for name, value in found.items()]
