"""The goals of each subject name tests and scripts that exist."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def goals(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "bench/goals.py", *words], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("subject", ["bases", "methods"])
def test_every_command_reads_files_that_exist(subject: str) -> None:
    lines = goals(subject, "--list", "--gguf", "F", "--model", "M", "--peft-tests", "T", "--task", "A", "B").stdout
    named = [word for word in lines.split() if word.startswith("tests/") or word.endswith(".py")]
    assert len(named) > 5
    assert not [word for word in named if not (ROOT / word).exists()]


def test_a_goal_without_its_file_is_left_out_and_named(tmp_path: Path) -> None:
    done = goals("bases", "--only", "the first opening", "--logs", str(tmp_path))
    assert done.returncode == 0
    assert "left out" in done.stdout
    assert "{gguf}" in done.stdout


def test_an_unknown_goal_is_refused_with_those_there_are() -> None:
    done = goals("methods", "--only", "speed")
    assert done.returncode == 2
    assert "peak memory" in done.stderr
