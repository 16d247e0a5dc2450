"""Work goes on if nobody reads its output any longer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from veneer.plain.outlasting import outlasting_readers

WORK = """
import sys
from pathlib import Path
from rich.console import Console
from veneer.plain.outlasting import outlasting_readers

with outlasting_readers():
    told, noted = Console(), Console(stderr=True)
    told.print("first")
    sys.stdin.readline()
    for number in range(20_000):
        told.print(number)
        noted.print(number)
Path(sys.argv[1]).write_text("done")
"""


@pytest.mark.parametrize("joined", [True, False])
def test_a_reader_that_leaves_ends_no_work(joined: bool, tmp_path: Path) -> None:
    errors = subprocess.STDOUT if joined else subprocess.PIPE
    command = [sys.executable, "-c", WORK, str(tmp_path / "end")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors) as work:
        assert work.stdin is not None
        assert work.stdout is not None
        assert work.stdout.readline() == b"first\n"
        for stream in (work.stdout, work.stderr):
            if stream is not None:
                stream.close()
        work.stdin.write(b"go on\n")
        work.stdin.close()
        assert work.wait() == 0
    assert (tmp_path / "end").read_text() == "done"


def test_streams_of_others_stay(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with outlasting_readers():
        assert (sys.stdout, sys.stderr) == before
        print("told")
    assert capsys.readouterr().out == "told\n"
