"""Three chat templates with formats of calls that no table has, and forty answers with calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from veneer.serve.tool_calls.parser import Arguments, Begun, Ended, Event, Text

from .conftest import byte_tokenizer

MARKS = ("<|calls|>", "<|/calls|>")  # special tokens

_HEAD = (
    "{% if tools %}{{ 'tools: ' + tools | tojson + '\n' }}{% endif %}"
    "{% for m in messages %}{{ m.role + ': ' }}{% if m.content %}{{ m.content }}{% endif %}"
)
_TAIL = "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
TEMPLATES = {
    "brackets": _HEAD
    + "{% for c in m.tool_calls or [] %}{{ '[[' + c.function.name + ' <- ' }}"
    + "{{ c.function.arguments | tojson(separators=(',', ':')) + ']]' }}"
    + "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    + _TAIL,
    "list": _HEAD
    + "{% if m.tool_calls %}{{ '<|calls|>[' }}{% for c in m.tool_calls %}"
    + "{{ '{\"id\": \"' + c.id + '\", \"tool\": \"' + c.function.name }}"
    + "{{ '\", \"input\": ' + c.function.arguments | tojson + '}' }}"
    + "{% if not loop.last %}{{ ', ' }}{% endif %}{% endfor %}{{ ']<|/calls|>' }}{% endif %}"
    + _TAIL,
    "fields": _HEAD
    + "{% for c in m.tool_calls or [] %}{{ '\n<invoke fn=\"' + c.function.name + '\">' }}"
    + "{% for k, v in c.function.arguments.items() %}{{ '\n  <arg k=\"' + k + '\">' }}"
    + "{{ v if v is string else v | tojson }}{{ '</arg>' }}{% endfor %}{{ '\n</invoke>' }}{% endfor %}"
    + _TAIL,
}  # fmt: skip

SCHEMAS: dict[str, dict[str, Any]] = {
    "weather": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "metric": {"type": "boolean"}},
        "required": ["city"],
    },
    "weather_now": {"type": "object", "properties": {}},
    "file": {
        "type": "object",
        "properties": {
            "path": {"type": "string"},
            "lines": {"type": "array", "items": {"type": "string"}},
            "more": {"type": "object"},
            "mode": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "share": {"type": "number"},
        },
    },
}
_ONE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("weather", {"city": "Oslo"}),
    ("weather", {"city": "São Paulo – 北京 🌧", "days": 3, "metric": True}),
    ("weather", {"city": '"quoted" \\ {braces} [brackets]', "days": -7}),
    ("weather", {"city": "", "metric": False}),
    ("weather_now", {}),
    ("file", {"path": "/tmp/x", "lines": ["a", "", "}]"], "more": {"deep": [{"er": None}]}}),
    ("file", {"path": "two\nlines\n", "share": 0.125}),
    ("file", {"mode": None, "path": "7"}),
    ("file", {"path": "[[weather <- {", "lines": []}),
    ("file", {"more": {}, "share": 1e-7}),
)
_SEVERAL = ((0, 4), (4, 4, 4), (2, 8), (1, 5, 3), (9, 7))
_AROUND = (("", ""), ("Let me look.\n", ""), ("[[ a < b {", " Done: <|ca"))
CASES: list[tuple[str, list[tuple[str, dict[str, Any]]], str]] = [
    *((front, [call], back) for front, back in _AROUND for call in _ONE),
    *((front, [_ONE[i] for i in picked], back) for front, back in _AROUND[:2] for picked in _SEVERAL),
]
"""Text in front, calls, and text behind them."""


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    """The tests' tokenizer of bytes with special marks and a template."""
    made = byte_tokenizer()
    made.add_special_tokens({"additional_special_tokens": list(MARKS)})
    made.chat_template = template
    return made


def written(tokenizer: Any, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Calls as a template writes them."""
    made = [
        {"id": f"id{i:07}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(calls)
    ]
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": made}]
    return tokenizer.apply_chat_template(messages, tokenize=False).partition("assistant: ")[2].strip()


def read(events: Sequence[Event]) -> tuple[str, list[list[Any]]]:
    """Content and calls: name, arguments, and whether they have ended."""
    calls: list[list[Any]] = []
    for event in events:
        if isinstance(event, Begun):
            assert event.index == len(calls)
            calls.append([event.name, "", False])
        elif isinstance(event, Arguments):
            assert not calls[event.index][2]
            calls[event.index][1] += event.text
        elif isinstance(event, Ended):
            calls[event.index][2] = True
    return "".join(event.text for event in events if isinstance(event, Text)), calls


def as_calls(calls: Sequence[Sequence[Any]]) -> list[tuple[str, Any]]:
    """Names and arguments of calls that have ended."""
    assert all(ended for *_, ended in calls)
    return [(name, json.loads(arguments)) for name, arguments, _ in calls]
