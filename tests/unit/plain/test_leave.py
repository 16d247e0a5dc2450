"""Ends of commands: what is kept of the interpreter's own end, and what is left out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = """
import atexit, os, sys, tempfile, threading, time
from unittest import mock
from veneer.cli import app

class Module:
    def __del__(self):
        os.write(1, b"torn down\\n")

sys.modules["module"] = Module()
folder = tempfile.TemporaryDirectory()
atexit.register(lambda: print(f"hook, {os.path.isdir(folder.name)}"))

def command():
    sys.stdout.write("printed\\n")
    sys.stderr.write("told\\n")
    BODY

with mock.patch.object(app, "app", command):
    app.main()
"""


def ended(body: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", COMMAND.replace("BODY", body)]
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, env=buffered)


@pytest.mark.parametrize(("given", "code"), [("", 0), ("0", 0), ("2", 2), ("143", 143)])
def test_hooks_run_and_output_is_whole_and_no_module_is_torn_down(given: str, code: int) -> None:
    done = ended(f"sys.exit({given})")
    assert (done.returncode, done.stdout, done.stderr) == (code, "printed\nhook, True\n", "told\n")


def test_a_thread_that_works_is_waited_for() -> None:
    done = ended("threading.Thread(target=lambda: (time.sleep(0.3), print('worked'))).start(); sys.exit(3)")
    assert (done.returncode, done.stdout) == (3, "printed\nworked\nhook, True\ntorn down\n")


def test_a_message_and_an_error_keep_their_end() -> None:
    done = ended("sys.exit('message')")
    assert (done.returncode, done.stderr) == (1, "told\nmessage\n")
    done = ended("raise RuntimeError('a defect')")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "RuntimeError: a defect")


def test_a_stream_that_was_closed_before_the_command_is_no_error() -> None:
    command = "from veneer.plain.leave import left_at_once\nwith left_at_once():\n    raise SystemExit(CODE)"
    for closed, code in ((">&-", 0), ("2>&-", 5), (">&- 2>&-", 7)):
        given = ["/bin/sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, command.replace("CODE", str(code))]
        done = subprocess.run(given, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the platform has no /dev/full")
def test_output_that_cannot_be_written_shows_in_the_code() -> None:
    with open("/dev/full", "w") as full:
        done = ended("sys.exit(0)", full.fileno())
    assert done.returncode == 120
