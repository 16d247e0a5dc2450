"""Matching of a format's literals and slots against a text that may still grow."""

from __future__ import annotations

import enum
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache


class Slot(enum.Enum):
    """Part of a format whose text differs from call to call."""

    NAME = "name"
    ID = "id"
    KEY = "key"


Part = str | Slot
Parts = tuple[Part, ...]

_BLANKS = 64  # characters, at most, where a format allows white space
_MOST_KEY = 256
_WORD = re.compile(r"[A-Za-z0-9_-]*")
_JOINTS = frozenset("{}[],:")  # white space beside them means nothing


class Growing:
    """Match that is incomplete: it depends on the text that follows."""


GROWING = Growing()


@dataclass(frozen=True, slots=True)
class Found:
    """End of a match, and the texts of its slots."""

    end: int
    values: Mapping[Slot, str] = field(default_factory=dict)


Match = Found | Growing | None


def match(parts: Parts, text: str, at: int, names: Collection[str], *, final: bool) -> Match:
    """Match a format's parts at offset ``at`` of a text. ``names`` are the functions that may be called. ``final``: no
    more text follows.

    White space in the format matches any amount of white space in the text, and so do places beside brackets, commas
    and colons.
    """
    values = dict[Slot, str]()
    loose = False
    for number, part in enumerate(parts):
        if isinstance(part, str):
            end = _literal(part, text, at, loose)
            loose = part[-1:].isspace()
        else:
            end = _slot(part, _bare(parts[number + 1 :]), text, _skip(text, at) if loose else at, names, final)
            if isinstance(end, Found):
                values |= end.values
            loose = False
        if not isinstance(end, Found):
            return None if final else end
        at = end.end
    return Found(at, values)


class Beginnings:
    """Fast search of a text for the next offset at which a call (in one of the formats ``ways``) or a text of
    ``others`` may begin.
    """

    def __init__(self, ways: Collection[Parts], names: Collection[str], others: Collection[str]) -> None:
        firsts = [parts[0] for parts in ways]
        texts = {*others, *(name for name in names if Slot.NAME in firsts)}
        literals = [first for first in firsts if isinstance(first, str)]
        patterns = [*map(re.escape, texts), *map(pattern_of, literals)]
        begins = "".join(sorted({text.lstrip()[0] for text in (*texts, *literals)}))
        self._whole, self._first = re.compile("|".join(patterns)), re.compile(f"[{re.escape(begins)}]")
        self._longest = max(len(text) * (_BLANKS + 1) for text in (*texts, *literals))

    def next(self, text: str, at: int) -> int | None:
        """Return the first offset from ``at`` on at which a match may begin; None if there is none."""
        found = self._whole.search(text, at)
        end = max(at, len(text) - self._longest)  # from where on a first part may grow
        if found is None or found.start() >= end:
            found = self._first.search(text, end)
        return None if found is None else found.start()


def skip_blanks(text: str, at: int) -> int:
    """Return the offset of the first character from ``at`` on that is no white space."""
    return _skip(text, at)


def _skip(text: str, at: int) -> int:
    end = at
    while end < len(text) and end - at <= _BLANKS and text[end].isspace():
        end += 1
    return end


@lru_cache(maxsize=1024)
def _steps(literal: str) -> tuple[tuple[str, bool], ...]:
    """Return a literal's characters except white space, each with True if white space may precede it."""
    steps, before, blank = list[tuple[str, bool]](), "", False
    for character in literal:
        if character.isspace():
            blank = True
            continue
        joint = bool(steps) and (character in _JOINTS or before in _JOINTS)
        steps.append((character, blank or joint))
        before, blank = character, False
    return tuple(steps)


def pattern_of(literal: str) -> str:
    """Return the regular expression of a literal, with flexible white space."""
    blanks = rf"\s{{0,{_BLANKS}}}"
    return "".join(blanks * blank_before + re.escape(each) for each, blank_before in _steps(literal))


def _literal(literal: str, text: str, at: int, loose: bool) -> Match:
    for character, blank_before in _steps(literal):
        if (blank_before or loose) and at < len(text) and text[at].isspace():
            end = _skip(text, at)
            if end - at > _BLANKS:
                return None
            at = end
        if at >= len(text):
            return GROWING
        if text[at] != character:
            return None
        at, loose = at + 1, False
    return Found(at)


def _slot(slot: Slot, behind: str, text: str, at: int, names: Collection[str], final: bool) -> Match:
    if slot is Slot.KEY:
        end = text.find(behind[0], at, at + _MOST_KEY)
        key = text[at : at + _MOST_KEY if end < 0 else end].strip()
        if "\n" in key or (end < 0 and len(text) - at >= _MOST_KEY):
            return None
        return Found(end, {slot: key}) if end >= 0 else GROWING
    found = _WORD.match(text, at)
    word = found[0] if found else ""
    end = at + len(word)
    if slot is Slot.ID:
        return GROWING if end == len(text) and not final else Found(end, {slot: word})
    if end == len(text) and not final:
        return GROWING if any(name.startswith(word) for name in names) else None
    return Found(end, {slot: word}) if word in names else None


def _bare(parts: Sequence[Part]) -> str:
    """Return the next literal that is not white space, stripped. If there is none, return a newline."""
    return next((part.strip() for part in parts if isinstance(part, str) and part.strip()), "\n")
