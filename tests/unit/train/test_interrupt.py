"""Signals that ask a run to stop."""

import os
import signal
import threading
import time
import types

import pytest
import torch

from launch import started
from patience import PATIENCE
from veneer.errors import Interrupted
from veneer.train.interrupt import Stop, StopAfterStep, listening


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_ends_what_can_be_ended_and_waits_for_what_cannot(number, code):
    before = signal.getsignal(number)
    with listening() as stop, pytest.raises(Interrupted) as caught:
        os.kill(os.getpid(), number)
    assert caught.value.exit_code == code
    assert isinstance(caught.value, KeyboardInterrupt)
    assert signal.getsignal(number) is before
    with listening() as stop:
        with stop.deferred():
            os.kill(os.getpid(), number)
            assert stop.signal == number
        with pytest.raises(Interrupted):
            stop.check()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_second_signal_ends_the_process_at_once(tmp_path, number, code):
    script = (
        "import time\nfrom veneer.train.interrupt import Stop, StopAfterStep, listening\n"
        "with listening() as stop, stop.deferred():\n"
        "    print('ready', flush=True)\n"
        "    while True: time.sleep(0.01)\n"
    )
    process = started(script, stdout=tmp_path / "log")
    assert process.pid is not None
    try:
        name = signal.Signals(number).name
        for said in ("ready", f"{name}: the run stops after this step, with a checkpoint; a second"):
            while said not in (told := (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""):
                assert process.is_alive(), told
                time.sleep(0.01)
            os.kill(process.pid, number)
        process.join(PATIENCE)
        assert process.exitcode == code
    finally:
        process.kill()


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with listening() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_nothing_is_heard():
    before, found = signal.getsignal(signal.SIGTERM), []

    def listen():
        with listening() as stop:
            found.append((stop.signal, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [(None, before)]


def test_a_signal_in_the_evaluation_before_the_first_step_stops_there():
    args = types.SimpleNamespace(eval_on_start=True, device=torch.device("cpu"))
    for call in ("on_prediction_step", "on_evaluate"):
        stop, state, control = Stop(), types.SimpleNamespace(global_step=0), types.SimpleNamespace(should_save=False)
        callback = StopAfterStep(stop)
        callback.on_train_begin(args, state, control)
        assert "before the first step" in stop.when
        stop.signal = signal.SIGINT
        with pytest.raises(Interrupted, match="SIGINT before the first step: nothing is trained yet") as caught:
            getattr(callback, call)(args, state, control)
        assert caught.value.exit_code == 130
    stop.signal, state.global_step = None, 3
    callback = StopAfterStep(stop)
    callback.on_prediction_step(args, state, control)
    assert stop.when == "after this evaluation, with a checkpoint"
    callback.on_step_begin(args, state, control)
    assert stop.when == "after this step, with a checkpoint"
