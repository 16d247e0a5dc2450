"""The goals of each subject name tests and scripts that exist."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def goals(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench.goals", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("subject", ["bases", "methods"])
def test_every_command_reads_files_that_exist(subject: str) -> None:
    lines = goals(subject, "--list", "--gguf", "F", "--model", "M", "--peft-tests", "T", "--task", "A", "B").stdout
    named = [word for word in lines.split() if word.startswith(("tests/", "bench."))]
    paths = [Path(*word.split(".")).with_suffix(".py") if word.startswith("bench.") else word for word in named]
    assert len(paths) > 5
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_a_goal_without_its_file_is_left_out_and_named(tmp_path: Path) -> None:
    done = goals("bases", "--only", "the first opening", "--logs", str(tmp_path))
    assert done.returncode == 0
    assert "left out" in done.stdout
    assert "{gguf}" in done.stdout


def test_an_unknown_goal_is_refused_with_those_there_are() -> None:
    done = goals("methods", "--only", "speed")
    assert done.returncode == 2
    assert "peak memory" in done.stderr
