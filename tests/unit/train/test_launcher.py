"""Processes of this machine: whose output is shown, whose exit status counts, and who is told of a signal."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.elastic.multiprocessing import api

from patience import PATIENCE
from veneer.errors import ConfigError
from veneer.train import launcher
from veneer.train.launcher import launched, require_devices

HEAD = "import os, sys, time, signal; rank = os.environ['RANK']; print('process', rank, flush=True); "


def run(code: str, n: int = 3) -> int:
    return launched([sys.executable, "-S", "-c", HEAD + code], n)


def test_the_first_process_alone_is_heard_and_all_know_the_group(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert run(f"open(r'{tmp_path}/' + rank, 'w').write(' '.join(os.environ[name] for name in {names}))") == 0
    assert capfd.readouterr().out == "process 0\n"
    told = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [each[:5] for each in told] == [[str(rank), str(rank), "3", "3", "127.0.0.1"] for rank in range(3)]
    assert len({each[5] for each in told}) == 1


@pytest.mark.parametrize(
    ("code", "status", "told"),
    [
        ("sys.exit({'0': 2, '1': 1, '2': 2}[rank])", 2, "process 1 has ended with the status 1"),
        ("time.sleep(0.3 * (rank == '0')); sys.exit(2 if rank == '0' else 143)", 2, ""),  # the first one says why
        ("rank == '1' and os.kill(os.getpid(), 9); sys.exit(2)", 2, "process 1 has ended with the status 137"),
        ("sys.exit('no such thing' if rank == '2' else 0)", 1, "no such thing"),
    ],
)
def test_the_status_is_that_of_the_first_process(
    code: str, status: int, told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(code) == status
    assert told in capfd.readouterr().err


def test_processes_that_do_not_notice_that_another_is_gone_are_ended(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 0.3)
    assert run("rank == '1' and sys.exit(5); time.sleep(100)") == 5
    assert "process 1 has ended with the status 5" in capfd.readouterr().err


def test_a_signal_is_passed_on_to_all(tmp_path: Path) -> None:
    def send() -> None:
        while len(list(tmp_path.iterdir())) < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    sender = threading.Thread(target=send)
    sender.start()
    heard = f"signal.signal(15, lambda *_: sys.exit(143)); open(r'{tmp_path}/' + rank, 'w'); time.sleep(100)"
    assert run(heard) == 143
    sender.join()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert run("rank == '1' and (time.sleep(0.3), os.kill(os.getppid(), 1)); time.sleep(0.6)") == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_while_processes_are_started_ends_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = api.get_subprocess_handler, []

    def interrupted(**options: Any) -> Any:
        if started:
            os.kill(os.getpid(), signal.SIGTERM)
        started.append(start(**options))
        return started[-1]

    monkeypatch.setattr(api, "get_subprocess_handler", interrupted)
    assert run("time.sleep(100)") == 143
    assert [each.proc.wait(PATIENCE) for each in started] == [-signal.SIGKILL]


def test_processes_share_the_cores_that_this_one_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(70, 77)), raising=False)
    assert {each["OMP_NUM_THREADS"] for each in launcher._environments(3).values()} == {"2"}


def test_each_process_needs_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    require_devices(64)  # on a CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    require_devices(2)
    with pytest.raises(ConfigError, match="--processes 3 is more than the 2 devices"):
        require_devices(3)
