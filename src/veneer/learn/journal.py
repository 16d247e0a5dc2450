"""Journal of rollouts: a file of JSON lines, one for each rollout, written to disk before a step learns from it.

A resumed run reads from it the answers, tool responses and rewards after its checkpoint, so that it continues exactly
as before. Torch is not imported here, so that a command can read the journal quickly.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from array import array
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from veneer.errors import DiskError, FormatError

FOLDER = "rollouts"
Line = dict[str, Any]
_KEYS = {
    "step", "row", "prompt", "completion", "functions", "rewards", "reward", "advantage", "ids", "finish", "calls",
    "failures",
}  # fmt: skip


def journal_path(run: Path, rank: int = 0, n_processes: int = 1) -> Path:
    """Return the path of the journal of the process ``rank``.

    The path depends on ``n_processes``, so that a run resumed with another number of processes generates its answers
    anew.
    """
    return run / FOLDER / f"{rank}_of_{n_processes}.jsonl"


class Journal:
    """Journal of one process. A draw is the answers of one batch of prompts; draws are numbered upwards.

    If ``keeps``, the lines of an existing file are kept until a new draw replaces them; otherwise the file is emptied.
    Raises DiskError if it cannot be written.
    """

    def __init__(self, path: Path, *, keeps: bool) -> None:
        self.path = path
        self._places: dict[int, tuple[int, int]] = {}  # draw: its first byte, and its lines
        if keeps and path.exists():
            self._index()
        elif path.exists():
            self._cut(0)

    def draw(self, number: int, adapter: str, n: int) -> list[Line] | None:
        """Return the lines of the draw ``number``.

        Return None if the journal lacks some of its ``n`` lines, or if another adapter than ``adapter`` generated the
        answers.
        """
        start, n_lines = self._places.get(number, (0, 0))
        if n_lines != n:
            return None
        with self.path.open("rb") as file:
            file.seek(start)
            lines = [json.loads(file.readline()) for _ in range(n)]
        return lines if all(line["adapter"] == adapter for line in lines) else None

    def write(self, number: int, lines: Sequence[Line]) -> None:
        """Write the lines of the draw ``number``, and wait until they are on disk. Lines of this draw and of all later
        ones are replaced.
        """
        later = [start for draw, (start, _) in self._places.items() if draw >= number]
        if later:
            self._cut(min(later))
            self._places = {draw: place for draw, place in self._places.items() if draw < number}
        how: dict[str, Any] = {"ensure_ascii": False, "default": str, "separators": (",", ":")}
        told = "".join(json.dumps({"draw": number, **line}, **how) + "\n" for line in lines)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                start = file.tell()
                file.write(told.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DiskError(
                f"{self.path} cannot be written: {error.strerror}. Make room, or set rollout_journal=False"
            ) from error
        self._places[number] = start, len(lines)

    def _index(self) -> None:
        """Find the offset of each draw (the answers of one step) in the file. If a crash cut a line short, remove that
        line and all after it from the file.
        """
        place = 0
        with self.path.open("rb") as file:
            for line in file:
                number = _number(line)
                if number is None:
                    break
                start, n = self._places.get(number, (place, 0))
                self._places[number] = start, n + 1
                place += len(line)
        self._cut(place)

    def _cut(self, size: int) -> None:
        try:
            os.truncate(self.path, size)
        except OSError as error:
            raise DiskError(f"{self.path} cannot be written: {error.strerror}. Give write permission") from error


def read_journal(run: Path) -> Iterator[Line]:
    """Yield the lines of all journals of a run. Raises FormatError for a run without one, or a damaged line."""
    paths = sorted((run / FOLDER).glob("*_of_*.jsonl"))
    if not paths:
        raise FormatError(
            f"{run} holds no journal of rollouts: grpo, rloo and best_of write one into {FOLDER}/ if the engine draws "
            "(rollouts.journal)"
        )
    for path in paths:
        with path.open("rb") as file:
            for n, line in enumerate(file, start=1):
                if _number(line) is None:
                    if not line.endswith(b"\n"):
                        break  # the run is writing it
                    raise FormatError(f"{path}, line {n}: it is no rollout: {line[:60]!r}. Restore the file")
                found = json.loads(line)
                if missing := sorted(_KEYS - found.keys()):
                    raise FormatError(f"{path}, line {n}: it lacks {', '.join(missing)}. Restore the file")
                yield found


def packed(values: Sequence[float]) -> str:
    """Encode numbers as little-endian float32 in base64."""
    return base64.b64encode(_little(array("f", values)).tobytes()).decode()


def unpacked(told: str) -> list[float]:
    """Decode the text made by `packed`."""
    found = array("f")
    found.frombytes(base64.b64decode(told))
    return _little(found).tolist()


def runs_of(mask: Sequence[int]) -> list[int]:
    """Return the lengths of a 0/1 mask's runs of equal values. The first run is of ones, and may be empty."""
    runs = [(value, len([*run])) for value, run in groupby(mask)]
    return ([0] if runs and not runs[0][0] else []) + [n for _, n in runs]


def mask_of(runs: Sequence[int]) -> list[int]:
    """Return the mask with these run lengths."""
    return [1 - i % 2 for i, n in enumerate(runs) for _ in range(n)]


def hash_of(ids: Sequence[int]) -> str:
    """Return a hash of token ids."""
    return hashlib.blake2b(repr(list(ids)).encode(), digest_size=8).hexdigest()


def _little(values: array[float]) -> array[float]:
    if array("H", [1]).tobytes() != b"\x01\x00":
        values.byteswap()
    return values


def _number(line: bytes) -> int | None:
    """Return the number of the draw that a line belongs to, or None if the line is damaged."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    number = found.get("draw") if isinstance(found, dict) and line.endswith(b"\n") else None
    return number if isinstance(number, int) else None
