"""Progress of a run: plain lines in a file, one bar in a terminal."""

from __future__ import annotations

import io
import re
import time
import types
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerControl
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from patience import wait_until
from veneer.train.show.display import RunDisplay, show_run

ARGS: Any = None


class Run:
    """A trainer of seven steps, as callbacks see it."""

    def __init__(self, display: RunDisplay, state: Any) -> None:
        self.display, self.state, self.n_tokens = display, state, 0

    def steps(self, n: int, tokens: int) -> None:
        for _ in range(n):
            self.display.on_step_begin(ARGS, self.state, ARGS)
            self.state.global_step += 1
            self.n_tokens += tokens
            self.display.on_step_end(ARGS, self.state, ARGS)

    def log(self, **logs: float) -> None:
        self.display.on_log(ARGS, self.state, ARGS, logs=logs)

    def evaluate(self, n_batches: int, **logs: float) -> None:
        for _ in range(n_batches):
            self.display.on_prediction_step(ARGS, self.state, ARGS, eval_dataloader=range(n_batches))
        self.log(**logs)
        self.display.on_evaluate(ARGS, self.state, ARGS)

    def whole(self) -> None:
        self.display.on_train_begin(ARGS, self.state, ARGS)
        self.steps(3, 11)
        self.log(loss=2.34567, learning_rate=3e-4, num_tokens=33.0)
        self.evaluate(5, eval_loss=1.98769, eval_mean_token_accuracy=0.4567, eval_runtime=3.0, eval_bleu=0.25)
        self.steps(4, 11)
        self.log(loss=1.25, learning_rate=1e-5)
        self.log(train_runtime=9.0, train_loss=1.5)
        self.display.on_train_end(ARGS, self.state, ARGS)
        self.evaluate(5, eval_loss=0.5)


def run_on(console: Console, *, bar: bool = True, step: int = 0, main: bool = True) -> Run:
    state = types.SimpleNamespace(global_step=step, max_steps=step + 7, is_world_process_zero=main)
    run = Run.__new__(Run)
    run.__init__(RunDisplay(lambda: run.n_tokens, bar=bar, console=console), state)  # type: ignore[misc]
    return run


def terminal(**options: Any) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=True, width=80, highlight=False, **options), file


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second goes by between two looks at the clock."""
    ticks = iter(range(1000))
    monkeypatch.setattr("veneer.train.show.display.time.perf_counter", lambda: next(ticks) / 2)


@pytest.mark.usefixtures("clock")
def test_a_file_gets_plain_lines() -> None:
    file = io.StringIO()
    run_on(Console(file=file, width=20)).whole()
    lines = file.getvalue().splitlines()
    assert lines == [
        "step 3/7  loss 2.3457 (mean of 3 steps)  lr 3.00e-04  22 tokens/s  5 s left",
        "step 3/7  held out: loss 1.9877  mean token accuracy 45.7%  bleu 0.2500",
        "step 7/7  loss 1.2500 (mean of 4 steps)  lr 1.00e-05  22 tokens/s  0 s left",
        "after training  held out: loss 0.5000",
    ]


@pytest.mark.usefixtures("clock")
def test_a_resumed_run_counts_from_where_it_goes_on() -> None:
    file = io.StringIO()
    run = run_on(Console(file=file, width=200), step=100)
    run.n_tokens = 1000
    run.whole()
    assert file.getvalue().startswith(
        "step 103/107  loss 2.3457 (mean of 3 steps)  lr 3.00e-04  22 tokens/s  5 s left\n"
    )


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("max_steps", "told"),
    [
        (
            13,
            [
                "step 5/13  loss 0.5000 (mean of 5 steps)  8 s left",
                "step 10/13  loss 1.0000 (mean of 10 steps)  3 s left",
            ],
        ),  # a step takes a second here
        (
            700,
            ["step 7/700  loss 0.7000 (mean of 7 steps)  11 min 33 s left"],
        ),  # lines are a hundredth of the run apart
    ],
)
def test_a_file_gets_lines_between_log_steps_far_apart(max_steps: int, told: list[str]) -> None:
    file = io.StringIO()
    display = RunDisplay(lambda: 0, loss=lambda step: step / 10, console=Console(file=file, width=20))
    state: Any = types.SimpleNamespace(global_step=0, max_steps=max_steps, is_world_process_zero=True)
    display.on_train_begin(ARGS, state, ARGS)
    for step in range(1, 14):
        display.on_step_begin(ARGS, state, ARGS)
        state.global_step = step
        display.on_step_end(ARGS, state, TrainerControl(should_log=False))
    display.close()
    assert file.getvalue().splitlines() == told


@pytest.mark.usefixtures("clock")
def test_a_step_that_is_logged_has_one_line() -> None:
    file = io.StringIO()
    display = RunDisplay(lambda: 0, loss=lambda step: 0.25, console=Console(file=file, width=20))
    state: Any = types.SimpleNamespace(global_step=0, max_steps=13, is_world_process_zero=True)
    display.on_train_begin(ARGS, state, ARGS)
    for step in range(1, 14):
        display.on_step_begin(ARGS, state, ARGS)
        state.global_step = step
        display.on_step_end(ARGS, state, TrainerControl(should_log=step == 7))
        if step == 7:
            display.on_log(ARGS, state, ARGS, logs={"loss": 1.0})
    assert [line.split()[1] for line in file.getvalue().splitlines()] == ["5/13", "7/13", "12/13"]


@pytest.mark.usefixtures("clock")
def test_a_file_gets_lines_during_a_long_evaluation() -> None:
    file = io.StringIO()
    display = RunDisplay(lambda: 0, loss=lambda step: 0.25, console=Console(file=file, width=20))
    state: Any = types.SimpleNamespace(global_step=3, max_steps=13, is_world_process_zero=True)
    display.on_train_begin(ARGS, state, ARGS)
    for _ in range(23):
        display.on_prediction_step(ARGS, state, ARGS, eval_dataloader=range(23))
    display.close()
    assert file.getvalue().splitlines() == ["held out 10/23", "held out 20/23"]


def test_a_long_first_step_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("veneer.plain.progress.QUIET_SECONDS", 0.01)
    display = RunDisplay(lambda: 0, loss=lambda step: 0.25)
    state: Any = types.SimpleNamespace(global_step=0, max_steps=7, is_world_process_zero=True)
    display.on_train_begin(ARGS, state, ARGS)
    told = ""
    while "first step" not in told:
        told += capsys.readouterr().err
        time.sleep(0.01)
    display.on_step_begin(ARGS, state, ARGS)
    display.on_step_end(ARGS, state, TrainerControl(should_log=True))
    assert "computing the first step (0 s so far)" in told


def test_an_evaluation_before_the_first_step_is_called_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("veneer.plain.progress.QUIET_SECONDS", 0.01)
    monkeypatch.setattr("veneer.plain.progress.LINE_SECONDS", 0.01)
    display = RunDisplay(lambda: 0, loss=lambda step: 0.25)
    state: Any = types.SimpleNamespace(global_step=0, max_steps=7, is_world_process_zero=True)
    told = ""

    def until(said: str) -> None:
        nonlocal told
        while said not in told:
            told += capsys.readouterr().err
            time.sleep(0.01)

    display.on_train_begin(types.SimpleNamespace(eval_on_start=True), state, ARGS)
    until("measuring the held-out rows before the first step (0 s so far)")
    assert "computing" not in told
    display.on_evaluate(ARGS, state, ARGS)
    until("computing the first step (0 s so far)")
    display.close()


def test_long_work_in_and_between_steps_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("veneer.plain.progress.QUIET_SECONDS", 0.01)
    monkeypatch.setattr("veneer.plain.progress.LINE_SECONDS", 0.01)
    display = RunDisplay(lambda: 0, loss=lambda step: 0.25)
    state: Any = types.SimpleNamespace(global_step=1, max_steps=3, is_world_process_zero=True)
    told = ""

    def until(said: str) -> None:
        nonlocal told
        while f"{said} (" not in told:
            told += capsys.readouterr().err
            time.sleep(0.01)

    display.on_train_begin(ARGS, state, ARGS)
    display.on_step_begin(ARGS, state, ARGS)
    state.global_step = 2
    display.on_step_end(ARGS, state, TrainerControl(should_evaluate=True, should_save=True))
    until("measuring the held-out rows")
    display.on_evaluate(ARGS, state, TrainerControl(should_save=True))
    until("saving a checkpoint")
    display.on_save(ARGS, state, TrainerControl())
    until("reading the rows of the next step")
    display.on_step_begin(ARGS, state, ARGS)
    until("computing step 3/3")
    state.global_step = 3
    display.on_step_end(ARGS, state, TrainerControl())
    until("ending the training")
    display.on_train_end(ARGS, state, ARGS)
    assert "first step" not in told


@pytest.mark.usefixtures("clock")
def test_the_time_left_is_told_from_the_third_step_on() -> None:
    file = io.StringIO()
    run = run_on(Console(file=file, width=20))
    run.display.on_train_begin(ARGS, run.state, ARGS)
    for _ in range(3):
        run.steps(1, 11)
        run.log(loss=2.0, learning_rate=1e-4)
    assert [line.endswith(" left") for line in file.getvalue().splitlines()] == [False, False, True]


def test_a_terminal_gets_one_bar_of_its_width() -> None:
    console, file = terminal()
    run_on(console).whole()
    text = file.getvalue()
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", plain) if line.strip()]
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if not re.match(r"training|held out \d?/?\d? ?━?|held out ", line)] == [
        "step 3/7  held out: loss 1.9877  mean token accuracy 45.7%  bleu 0.2500",
        "after training  held out: loss 0.5000",
    ]
    assert re.search(r"training ━+ +7/7 loss 1.2500  lr 1.00e-05  [\d,]+ tokens/s", plain)
    assert re.search(r"held out 5/5 [━╺╸]+ +3/7 loss 2.3457", plain)
    assert re.search(r"held out ━+ +5/5 ", plain)
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 2  # the cursor comes back after both bars


def test_the_bar_of_a_long_step_turns() -> None:
    console, file = terminal()
    run = run_on(console)
    run.display.on_train_begin(ARGS, run.state, ARGS)
    wait_until(lambda: len(set(re.findall("[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏]", file.getvalue()))) > 1)
    run.display.close()


def test_an_interrupted_run_leaves_the_cursor_visible() -> None:
    console, file = terminal()
    run = run_on(console)
    run.display.on_train_begin(ARGS, run.state, ARGS)
    run.steps(2, 5)
    run.display.close()
    run.display.close()
    assert file.getvalue().count("\x1b[?25h") == 1


def test_without_colour_the_bar_has_none() -> None:
    console, file = terminal(no_color=True)
    run_on(console).whole()
    assert not re.search(r"\x1b\[[0-9;]*3\dm", file.getvalue())
    assert "━" in file.getvalue()


@pytest.mark.parametrize(("bar", "term"), [(False, "xterm"), (True, "dumb")])
def test_a_dumb_terminal_and_disable_tqdm_get_lines(bar: bool, term: str) -> None:
    console, file = terminal(_environ={"TERM": term})
    run_on(console, bar=bar).whole()
    assert "\x1b" not in file.getvalue()
    assert len(file.getvalue().splitlines()) == 4


def test_other_processes_are_silent() -> None:
    file = io.StringIO()
    run_on(Console(file=file), main=False).whole()
    assert file.getvalue() == ""


@pytest.mark.parametrize(("theirs", "bar"), [(ProgressCallback, True), (PrinterCallback, False)])
def test_it_takes_the_place_of_transformers_display(theirs: type, bar: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []
    monkeypatch.setattr(
        "veneer.train.show.display.RunDisplay", lambda n_tokens, *, loss, bar: made.append(bar) or "display"
    )
    trainer: Any = types.SimpleNamespace(
        pop_callback=lambda kind: object() if kind is theirs else None,
        add_callback=lambda callback: made.append(callback),
    )
    assert show_run(trainer, lambda: 0) == "display"
    assert made == [bar, "display"]


def test_a_notebook_keeps_its_table() -> None:
    trainer: Any = types.SimpleNamespace(pop_callback=lambda kind: None)
    assert show_run(trainer, lambda: 0) is None


def test_of_preferences_and_rewards_the_values_to_go_by_are_shown() -> None:
    output = io.StringIO()
    run = run_on(Console(file=output, highlight=False), bar=False)
    run.display.on_train_begin(ARGS, run.state, ARGS)
    run.steps(1, 5)
    pair = {"rewards/accuracies": 0.6875, "rewards/margins": 0.0123, "rewards/chosen": 0.3, "logps/chosen": -45.0}
    run.log(loss=0.69, learning_rate=1e-5, **pair)
    run.evaluate(2, eval_loss=0.68, eval_entropy=2.3, **{f"eval_{key}": value for key, value in pair.items()})
    run.log(loss=0.03, reward=0.4375, kl=0.1, **{"rewards/regex/mean": 0.5})
    run.evaluate(2, eval_loss=0.01, eval_reward=0.5, **{"eval_rewards/regex/mean": 0.5})
    lines = [re.sub(r"  [\d,]+ tokens/s.*", "", line) for line in output.getvalue().splitlines()]
    assert lines == [
        "step 1/7  loss 0.6900  accuracy 68.8%  margin 0.0123  lr 1.00e-05",
        "step 1/7  held out: loss 0.6800  accuracy 68.8%  margin 0.0123",
        "step 1/7  loss 0.0300  reward 0.4375  lr 0.00e+00",
        "step 1/7  held out: loss 0.0100  reward 0.5000",
    ]
