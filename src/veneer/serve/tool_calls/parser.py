"""Streaming parser of text and calls in a model's text."""

from __future__ import annotations

import enum
import re
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from veneer.serve.tool_calls.arguments import FieldArguments, ObjectArguments
from veneer.serve.tool_calls.format import CallFormat, joined
from veneer.serve.tool_calls.match import (
    GROWING,
    Beginnings,
    Found,
    Growing,
    Match,
    Part,
    Parts,
    Slot,
    match,
    skip_blanks,
)  # fmt: skip

_ID_LETTERS = string.ascii_letters + string.digits
_ID_LENGTH = 9  # which Mistral's templates insist on


@dataclass(frozen=True, slots=True)
class Text:
    """Text that is no part of a call."""

    text: str


@dataclass(frozen=True, slots=True)
class Begun:
    """Start of call number ``index``, with the name of its function."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """Next piece of a call's arguments, which are the text of a JSON object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """End of a call: its arguments are complete."""

    index: int


Event = Text | Begun | Arguments | Ended


class _Place(enum.Enum):
    """State of a parser within a text: outside calls, in the arguments of a call, or after them."""

    TEXT = "text"
    ARGUMENTS = "arguments"
    BEHIND = "behind"


class Parser:
    """Parser of one answer in a format. ``functions``: schema of the arguments by name of the function.

    The chunking of the input affects only how texts and arguments are divided into events. Text that may begin a call
    is held back; if it begins none, it is returned as `Text`. Text counts as a call once it has the name of a known
    function and the start of the arguments. The format's literals, white space beside calls and special tokens are
    dropped. After ``most`` calls, further calls are text.
    """

    def __init__(
        self, format: CallFormat, functions: Mapping[str, Mapping[str, Any]], *, most: int | None = None
    ) -> None:
        self._format, self._functions = format, functions
        self._most = 1 if format.between is None else most
        self._n_calls = 0
        self._place, self._rest = _Place.TEXT, ""
        self._blank = ""  # white space that was not shown
        self._has_text = False  # some was shown
        self._gap = ""  # white space behind the last call, if there was none in front of the first
        self._is_behind_call = False  # nothing but white space came since
        self._arguments: ObjectArguments | FieldArguments = ObjectArguments()
        self._before = _with_and_without_id(format.before)
        self._between = [] if format.between is None else _with_and_without_id(format.between)
        self._after = _with_and_without_id(format.after)
        self._beginnings = Beginnings(self._before, functions, format.hidden)

    @property
    def is_called(self) -> bool:
        """Return True if there are calls, and the last one has ended."""
        return self._n_calls > 0 and self._place is not _Place.ARGUMENTS

    def feed(self, text: str) -> list[Event]:
        """Read more text; return the events that it completes."""
        self._rest += text
        return self._read(final=False)

    def finish(self) -> list[Event]:
        """Return the events of the text held back. Call it at the end of the answer."""
        events = self._read(final=True)
        if self._blank and not self._is_behind_call:
            events.append(Text(self._blank))
        return events

    def _read(self, *, final: bool) -> list[Event]:
        steps = {_Place.TEXT: self._text, _Place.ARGUMENTS: self._in_arguments, _Place.BEHIND: self._behind}
        events: list[Event] = []
        while steps[self._place](events, final):
            pass
        return events

    # Each step reads on, and returns True if there may be more to read at another place.

    def _text(self, events: list[Event], final: bool) -> bool:
        at = self._beginnings.next(self._rest, 0)
        while at is not None:
            hidden = self._hidden(at, final)
            call = hidden or (None if self._n_calls == self._most else self._call(self._before, at, final))
            if call is None:
                at = self._beginnings.next(self._rest, at + 1)
                continue
            self._show(events, at)
            if isinstance(hidden, Found):
                self._rest = self._rest[hidden.end - at :]
            elif isinstance(call, Found):
                self._begin(events, call, at)
            return isinstance(call, Found)
        self._show(events, len(self._rest))
        return False

    def _show(self, events: list[Event], end: int) -> None:
        """Emit the held text before offset ``end``, without white space at its end and beside calls."""
        text, self._rest = self._rest[:end], self._rest[end:]
        if self._is_behind_call:
            behind = text.lstrip()
            self._gap, text = self._gap + text[: len(text) - len(behind)], behind
        shown = text.rstrip()
        if shown:
            between = (self._blank or self._gap) if self._has_text or not self._n_calls else ""
            events.append(Text(between + shown))
            self._blank, self._gap, self._is_behind_call, self._has_text = "", "", False, True
        self._blank += text[len(shown) :]

    def _hidden(self, at: int, final: bool) -> Match:
        """Match, at position ``at``, a special token that is not part of the call format."""
        texts = self._format.hidden
        whole = max((len(text) for text in texts if self._rest.startswith(text, at)), default=0)
        grows = not final and any(len(t) > len(self._rest) - at and t.startswith(self._rest[at:]) for t in texts)
        return GROWING if grows else Found(at + whole) if whole else None

    def _call(self, ways: Sequence[Parts], at: int, final: bool) -> Match:
        """Match the beginning of a call, up to its arguments or, if they are written as fields, up to the first
        value."""
        found = [match for parts in ways for match in self._calls(parts, at, final)]
        return next((each for each in found if each is not None), None)

    def _calls(self, parts: Parts, at: int, final: bool) -> list[Match]:
        fields = self._format.fields
        if fields is None:
            return [_less_one(self._match(joined(*parts, "{"), at, final))]
        found = [self._match(joined(*parts, fields.first, Slot.KEY, fields.middle), at, final)]
        front = self._match(joined(*parts, fields.none), at, final)
        for tail in (*self._between, *self._after):  # a call without arguments
            whole = self._match(joined(*parts, fields.none, *tail[:1]), at, final)
            found.append(front if isinstance(whole, Found) else whole)
        return found

    def _match(self, parts: Parts, at: int, final: bool) -> Match:
        return match(parts, self._rest, at, self._functions, final=final)

    def _begin(self, events: list[Event], call: Found, at: int) -> None:
        """Begin a call: remove its matched beginning from the text that is not parsed yet, and emit its first events.

        ``call.end`` counts from ``at`` characters before that text.
        """
        self._rest = self._rest[call.end - at :]
        self._gap = ""
        name, index = call.values[Slot.NAME], self._n_calls
        self._n_calls += 1
        events.append(Begun(index, "".join(secrets.choice(_ID_LETTERS) for _ in range(_ID_LENGTH)), name))
        self._place = _Place.ARGUMENTS
        if self._format.fields is None:
            self._arguments = ObjectArguments()
        elif Slot.KEY in call.values:
            schema = self._functions[name]
            self._arguments = FieldArguments(self._format.fields, schema, call.values[Slot.KEY])
        else:
            events += [Arguments(index, "{}"), Ended(index)]
            self._place = _Place.BEHIND

    def _in_arguments(self, events: list[Event], final: bool) -> bool:
        read = self._arguments.read(self._rest, final=final)
        self._rest = self._rest[read.n :]
        if read.json:
            events.append(Arguments(self._n_calls - 1, read.json))
        if read.ended:
            events.append(Ended(self._n_calls - 1))
            self._place = _Place.BEHIND
        self._is_behind_call = True
        return read.ended

    def _behind(self, events: list[Event], final: bool) -> bool:
        self._is_behind_call, self._place = True, _Place.TEXT
        at = skip_blanks(self._rest, 0)
        call = None if self._n_calls == self._most else self._call(self._between, at, final)
        if isinstance(call, Found):
            self._begin(events, call, 0)
            return True
        ends = [self._match(parts, at, final) for parts in self._after]
        end = next((each for each in ends if each is not None), None)
        if isinstance(call, Growing) or isinstance(end, Growing):
            self._place = _Place.BEHIND
            return False
        if isinstance(end, Found):
            self._rest = self._rest[end.end :]
        elif final and any(self._match(parts, at, final=False) for parts in self._after):
            self._rest = ""  # the answer ended within the format's own text
        return True


def _less_one(found: Match) -> Match:
    return Found(found.end - 1, found.values) if isinstance(found, Found) else found


def _with_and_without_id(parts: Parts) -> list[Parts]:
    """Return a format's parts with the slot of a call's id, and without it, since some models leave the id out."""
    if Slot.ID not in parts:
        return [parts]
    place = parts.index(Slot.ID)
    left, right = (_literal(parts, place - 1), _literal(parts, place + 1))
    entry = re.search(r',?\s*"[^"]*":\s*"$', left)
    if entry is None or not right.startswith('"'):
        return [parts]
    right = right[1:] if entry[0].startswith(",") else re.sub(r'^"\s*,\s*', "", right)
    return [parts, joined(*parts[: max(place - 1, 0)], left[: entry.start()], right, *parts[place + 2 :])]


def _literal(parts: Parts, place: int) -> str:
    part: Part = parts[place] if 0 <= place < len(parts) else ""
    return part if isinstance(part, str) else ""
