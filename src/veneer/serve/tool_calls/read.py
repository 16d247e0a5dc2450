"""Call format of a chat template, found by rendering known calls: the text around them is the format."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

from veneer.errors import ConfigError
from veneer.serve.sandbox.sandbox import SandboxError
from veneer.serve.tool_calls.conversation import Rendering, chat_text
from veneer.serve.tool_calls.format import CallFormat, Fields, joined
from veneer.serve.tool_calls.known import known_format
from veneer.serve.tool_calls.match import Part, Parts, Slot

_SAID = "zqtext"
_NAMES = ("zqfirst", "zqsecond")
_IDS = ("zqident01", "zqident02")  # Mistral's templates take ids of nine letters and digits alone
_ARGUMENTS: tuple[dict[str, Any], ...] = ({"zqa": "zqu", "zqb": 70707}, {"zqc": 60606, "zqd": "zqx"})
_SEPARATORS = ((", ", ": "), (",", ":"))
_IN_WORD = re.compile(r"[\w-]")
_HALF_MARK = re.compile(r"[<\[][^<>\[\]\s]*$")
_Mark = tuple[int, int, Slot | None]
"""Place of a slot in a rendered turn; None for the arguments."""


def format_of(tokenizer: Any, template: str | None = None, rendering: Rendering | None = None) -> CallFormat | None:
    """Return the call format of a tokenizer's chat template, or of ``template``; None if it cannot be found.

    Renders the template several times, which is slow. If that shows no format, the table of known formats is used.
    """
    how: dict[str, Any] = {} if template is None else {"chat_template": template}
    rendered_by = (tokenizer, rendering or Rendering(tokenizer))
    for as_text, content in product((False, True), ("", None)):
        plain = _rendered(rendered_by, how, _SAID, ())
        turns = {n: _turn(plain, _rendered(rendered_by, how, content, _calls(n, as_text))) for n in (2, 1)}
        for n, turn in turns.items():
            found = None if turn is None else _parts(turn, n)
            if found is not None:
                return with_tokens(replace(found, content=content, as_text=as_text), tokenizer)
        if not as_text and any(turn is not None and _is_written_otherwise(turn) for turn in turns.values()):
            return None
    asked = _rendered(rendered_by, how, None, None)
    found = None if asked is None else known_format(asked)
    return None if found is None else with_tokens(found, tokenizer)


def with_tokens(found: CallFormat, tokenizer: Any) -> CallFormat:
    """Return a format with the ids of those added tokens of the tokenizer that occur in the format's literals."""
    texts = found.literals
    added = {text: int(id) for text, id in tokenizer.get_added_vocab().items() if any(text in each for each in texts)}
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(tokenizer.all_special_tokens)
    own = tuple(sorted(special & added.keys()))
    return replace(found, added=added, special=own, hidden=tuple(sorted(special - added.keys())) if own else ())


def _calls(n: int, as_text: bool) -> list[dict[str, Any]]:
    return [
        {"id": id, "type": "function", "function": {"name": name, "arguments": json.dumps(a) if as_text else a}}
        for id, name, a in list(zip(_IDS, _NAMES, _ARGUMENTS, strict=True))[:n]
    ]


def _rendered(
    by: tuple[Any, Rendering], how: Mapping[str, Any], content: str | None, calls: Sequence[Mapping[str, Any]] | None
) -> str | None:
    """Render a question, and its answer unless ``calls`` is None; None if the template refuses them."""
    answer: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        answer["tool_calls"] = calls
    messages = [{"role": "user", "content": "zqask"}, *([] if calls is None else [answer])]
    properties = {key: {"type": "string"} for key in _ARGUMENTS[0]}
    function = {"name": _NAMES[0], "description": "", "parameters": {"type": "object", "properties": properties}}
    tools = [{"type": "function", "function": function}]
    tokenizer, rendering = by
    how = {**how, "tools": tools, "add_generation_prompt": calls is None}
    try:
        return chat_text(tokenizer, messages, how, rendering)
    except SandboxError:  # of a program that would be ended again and again
        raise
    except ConfigError:
        return None


def _turn(plain: str | None, called: str | None) -> str | None:
    """Return the text that a template adds for calls: the turn ``called`` without the start and end that every turn
    has.

    ``plain`` is a turn with text and no calls. Return None if either could not be rendered.
    """
    if plain is None or called is None or _SAID not in plain:
        return None
    front, _, ending = plain.rpartition(_SAID)
    start = _common_start([front, called])
    if start != front:
        start = _HALF_MARK.sub("", start)
    return called[len(start) :].strip().removesuffix(ending.strip()).rstrip()


def _is_written_otherwise(turn: str) -> bool:
    """Return True if a template writes a call's arguments in a form other than JSON, so that JSON would differ from the
    model's call.
    """
    key, value = next(iter(_ARGUMENTS[0].items()))
    return key in turn and value in turn and str(_ARGUMENTS[0]) not in turn


def _parts(turn: str, n: int) -> CallFormat | None:
    """Return the call format of a turn that was rendered with the first ``n`` known calls. Return None if it is
    unclear.
    """
    if any(turn.count(name) != 1 for name in _NAMES[:n]):
        return None
    slots: list[_Mark] = [(m.start(), m.end(), Slot.NAME) for name in _NAMES[:n] for m in re.finditer(name, turn)]
    slots += [(m.start(), m.end(), Slot.ID) for id in _IDS[:n] for m in re.finditer(id, turn)]
    objects = [_object(turn, arguments) for arguments in _ARGUMENTS[:n]]
    if None not in objects:
        found = _split(turn, sorted([*slots, *(mark for mark in objects if mark is not None)], key=lambda m: m[:2]))
        style = [s for s in _SEPARATORS if _dumps(_ARGUMENTS[0], s) in turn]
        return None if found is None else replace(found, separators=style[0] if style else None)
    return _with_fields(turn, sorted(slots, key=lambda m: m[:2]), n)


def _dumps(value: Any, separators: tuple[str, str]) -> str:
    return json.dumps(value, separators=separators)


def _object(turn: str, arguments: Mapping[str, Any]) -> _Mark | None:
    start = turn.rfind("{", 0, max(0, turn.find(f'"{next(iter(arguments))}"')))
    try:
        value, end = json.JSONDecoder().raw_decode(turn, max(start, 0))
    except ValueError:
        return None
    return (start, end, None) if start >= 0 and value == arguments else None


def _split(turn: str, marks: Sequence[_Mark]) -> CallFormat | None:
    """Build a call format from a rendered turn. ``marks`` are the positions of its slots, with None for arguments.

    Return None if marks overlap, if no name precedes the arguments, or if the end of a slot is unclear.
    """
    pieces: list[list[Part]] = [[]]
    at = 0
    for start, end, slot in marks:
        if start < at:
            return None
        pieces[-1].append(turn[at:start])
        pieces.append([]) if slot is None else pieces[-1].append(slot)
        at = end
    pieces[-1].append(turn[at:])
    before, *rest = (joined(*piece) for piece in pieces)
    between, after = (rest[0] if len(rest) == 2 else None), rest[-1]
    fronts = [before] if between is None else [before, between]
    if not all(Slot.NAME in parts for parts in fronts) or any(_is_unclear(parts) for parts in (*fronts, after)):
        return None
    return CallFormat(before=before, between=between, after=after)


def _is_unclear(parts: Parts) -> bool:
    """Return True if the end of a slot could not be recognized."""
    behind = pairwise(parts)
    return any(not isinstance(a, str) and (not isinstance(b, str) or _IN_WORD.match(b)) for a, b in behind)


def _with_fields(turn: str, slots: Sequence[_Mark], n: int) -> CallFormat | None:
    """Build a call format from a turn whose arguments are written field by field. Return None if the fields cannot be
    separated.
    """
    places = [[_places(turn, key, value) for key, value in a.items()] for a in _ARGUMENTS[:n]]
    if any(place is None for each in places for place in each):
        return None
    calls = [[place for place in each if place is not None] for each in places]
    heads, middles, nexts, tails, marks = [], [], [], [], list(slots)
    for (key, end_key, value, end), (key2, end_key2, value2, end2) in calls:
        front = max((mark[1] for mark in slots if mark[1] <= key), default=0)
        rest = min((mark[0] for mark in slots if mark[0] >= end2), default=len(turn))
        heads.append(turn[front:key])
        middles += [turn[end_key:value], turn[end_key2:value2]]
        nexts.append(turn[end:key2])
        tails.append(turn[end2:rest])
        marks.append((front, end2, None))
    if any(len(set(found)) != 1 for found in (heads, middles, nexts)):
        return None
    opening = _common_end([heads[0], nexts[0]])
    last = _common_start([nexts[0][: len(nexts[0]) - len(opening)], *tails])
    if not last.strip() or not middles[0].strip() or _IN_WORD.match(heads[0]):
        return None
    marks = [(start, end + len(last) * (slot is None), slot) for start, end, slot in marks]
    found = _split(turn, sorted(marks, key=lambda mark: mark[:2]))
    if found is None:
        return None
    none = heads[0][: len(heads[0]) - len(opening)]
    fields = Fields(first=heads[0], middle=middles[0], next=nexts[0], last=last, none=none)
    return replace(found, fields=fields, separators=None)


def _places(turn: str, key: str, value: Any) -> tuple[int, int, int, int] | None:
    """Return the bounds of a key and of its value; None unless each occurs once."""
    at, value_at = turn.find(key), turn.find(str(value))
    if turn.count(key) != 1 or turn.count(str(value)) != 1 or value_at < at:
        return None
    return at, at + len(key), value_at, value_at + len(str(value))


def _common_start(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)
    n = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:n]


def _common_end(texts: Sequence[str]) -> str:
    return _common_start([text[::-1] for text in texts])[::-1]
