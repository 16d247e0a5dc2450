"""The output of a benchmark: rows printed as they are measured, progress on stderr, and results that are kept.

``--keep CLAIM`` writes the figures of a run into ``bench/results/CLAIM.json``, with its command, commit and machine.
`scripts/benchmark_table.py` makes the table of docs/benchmarks.md from these files.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


def quiet_libraries() -> None:
    """Silence warnings and transformers' advice and bars: a benchmark's output is its rows."""
    from transformers.utils import logging  # not above: a script that prints no more than its help does without it

    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


class Rows:
    """A table whose rows are printed as they are added. ``names`` of all rows give the width of the first column."""

    def __init__(self, names: Iterable[str], columns: Sequence[str]) -> None:
        self.first = max((len(name) for name in names), default=0)
        self.widths = [max(len(column), 8) for column in columns]
        self.add("", *columns)

    def add(self, name: str, *cells: str) -> None:
        """Print a row."""
        told = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, self.widths, strict=True))
        done()
        print(f"{name:{self.first}}  {told}", flush=True)


def working(text: str) -> None:
    """Show the work in progress on stderr, over the line before if it is a terminal."""
    start, end = ("\r\x1b[K", "") if sys.stderr.isatty() else ("", "\n")
    print(f"{start}… {text}", end=end, file=sys.stderr, flush=True)


def done() -> None:
    """Clear the line of `working` from a terminal."""
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def last_printed(command: Sequence[str], name: str = "a side") -> dict[str, Any]:
    """Return the JSON object on a command's last line. SystemExit with the end of its errors if it fails."""
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"{name}: {run.stderr.strip()[-500:]}")
    return dict(json.loads(run.stdout.splitlines()[-1]))


def ends_as_interrupted() -> None:
    """Let SIGTERM and SIGHUP unwind the program as Ctrl-C does, so that it ends the processes that it started."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def add_keep(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--keep``, which is refused at once where no commit has the code that is measured."""
    told = "write the figures into bench/results/CLAIM.json; the code must be committed"
    parser.add_argument("--keep", metavar="CLAIM", type=_committed, help=told)


def _committed(claim: str) -> str:
    changed = _git("status", "--porcelain", "--", "src", "csrc", "bench", ":!bench/results")
    if changed:
        raise argparse.ArgumentTypeError(f"files differ from the commit: {changed.splitlines()[0]}. Commit them first.")
    return claim


def _git(*words: str) -> str:
    """Return the output of git in this repository. SystemExit outside of one: a kept result names its commit."""
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"--keep needs the repository with its history: {done.stderr.strip()}")
    return done.stdout.strip()


def keep(claim: str | None, figures: Mapping[str, float], folder: Path = RESULTS) -> None:
    """Put the figures of a run into a claim's file, with machine, command and commit; nothing if ``claim`` is None.

    SystemExit if there is no such claim, or if its sentence needs a figure that is not given.
    """
    if claim is None:
        return
    file = folder / f"{claim}.json"
    if not file.exists():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.json")))
        raise SystemExit(f"--keep {claim}: there is no such claim. Give one of {known}.")
    written = json.loads(file.read_text(encoding="utf-8"))
    try:
        sentence(written["figure"], figures)
    except KeyError as error:
        raise SystemExit(f"--keep {claim}: the run has no figure {error}. It has {', '.join(figures)}.") from error
    written |= {"figures": dict(figures), "machine": machine(), "command": command(sys.argv)}
    written["commit"] = _git("rev-parse", "--short=10", "HEAD")
    file.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def command(words: Sequence[str]) -> str:
    """Return the command of a run, from its script and arguments. Paths elsewhere are cut to folder and name."""
    module = ".".join(Path(words[0]).relative_to(ROOT).with_suffix("").parts)
    told = ["/".join(Path(word).parts[-2:]) if word.startswith("/") else word for word in words[1:]]
    return f"python -m {shlex.join([module, *told])}"


def sentence(template: str, figures: Mapping[str, float]) -> str:
    """Replace each ``{NAME|FORMAT}`` of a template, as ``{base|.1f}``, by that figure. KeyError if one is missing."""
    return re.sub(r"\{([^|}]+)\|([^}]+)\}", lambda match: format(figures[match[1]], match[2]), template)


def machine() -> str:
    """The CPU, its widest instructions for products, and the number of its threads in use."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    told = dict(line.split(":", 1) for line in lines if ":" in line)
    told = {key.strip(): value.strip() for key, value in told.items()}
    flags = set(told.get("flags", "").split())
    best = next((name for flag, name in _WIDEST if flag in flags), "no AVX2")
    return f"{told.get('model name', platform.processor() or 'unknown')}, {best}, {torch.get_num_threads()} threads"


_WIDEST = (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512-BF16"), ("avx512f", "AVX-512"), ("avx2", "AVX2"))
