"""Call formats of templates that describe a format to the model but do not render past calls."""

from __future__ import annotations

from veneer.serve.tool_calls.format import CallFormat
from veneer.serve.tool_calls.match import Slot

_NAMED = ('{"name": "', Slot.NAME, '", "arguments": ')

PLAIN = CallFormat(before=_NAMED, between=("}\n" + _NAMED[0], *_NAMED[1:]), after=("}",))
"""Calls as JSON objects, one a line: the format for a model whose chat template has none."""

_HERMES = CallFormat(
    before=('<tool_call>\n{"name": "', Slot.NAME, '", "arguments": '),
    between=('}\n</tool_call>\n<tool_call>\n{"name": "', Slot.NAME, '", "arguments": '),
    after=("}\n</tool_call>",),
)
_LLAMA = CallFormat(before=('{"name": "', Slot.NAME, '", "parameters": '), between=None, after=("}",))


def _list(front: str, back: str) -> CallFormat:
    """Return the format of a list of JSON objects between two marks."""
    return CallFormat(
        before=(f'{front}[{{"name": "', Slot.NAME, '", "arguments": '),
        between=('}, {"name": "', Slot.NAME, '", "arguments": '),
        after=("}]" + back,),
    )


_BY_MARK = (
    ("<tool_call>", _HERMES),
    ("[AVAILABLE_TOOLS]", _list("[TOOL_CALLS]", "")),
    ("<|tool|>", _list("<|tool_call|>", "<|/tool_call|>")),
    ('{"name": function name, "parameters":', _LLAMA),
)
"""Formats by a text that the prompt contains if tools are offered."""


def known_format(prompt: str) -> CallFormat | None:
    """Return the format whose known marker a rendered prompt with tools contains; None if it contains no marker."""
    return next((known for mark, known in _BY_MARK if mark in prompt), None)
