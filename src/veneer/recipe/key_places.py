"""Places of a recipe's keys: lines of its file and options ``--set``, for messages about their values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import yaml

_KEY = re.compile(r"[A-Za-z_][\w.]*(?=: )")


@dataclass(frozen=True, slots=True)
class KeyPlaces:
    """Lines of keys such as ``training.max_steps`` in a file, counted from 1, and the ``overrides`` that set a key."""

    lines: dict[str, int] = field(default_factory=dict)
    overrides: dict[str, str] = field(default_factory=dict)

    def told(self, problem: str) -> str:
        """Return a problem that begins with a key, with the place of that key, or else of the part that holds it."""
        begin = _KEY.match(problem)
        keys = [] if begin is None else list(accumulate(begin[0].split("."), "{}.{}".format))[::-1]
        for key in (key for key in keys if key in self.overrides):  # also of a whole part, whatever the file says
            return f"--set {self.overrides[key]}: {problem}"
        for key in (key for key in keys if key in self.lines):
            return f"line {self.lines[key]}: {problem}"
        return problem


def key_places(path: Path, overrides: Sequence[str] = ()) -> KeyPlaces:
    """Return the places of a recipe's keys. A file that cannot be read, or is not YAML, has none."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        root = None
    lines: dict[str, int] = {}
    _put_lines(lines, root, "", set())
    return KeyPlaces(lines, {each.partition("=")[0]: each for each in overrides})


def _put_lines(lines: dict[str, int], node: yaml.Node | None, before: str, seen: set[int]) -> None:
    """Put the lines of a part's keys into ``lines``. A part that aliases repeat is read once: it may hold itself."""
    if isinstance(node, yaml.MappingNode) and id(node) not in seen:
        seen.add(id(node))
        for key, value in node.value:
            name = f"{before}{key.value}"
            lines[name] = key.start_mark.line + 1
            _put_lines(lines, value, f"{name}.", seen)
