"""Grammar of an answer that consists of calls, so that it always parses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from veneer.errors import ConfigError
from veneer.serve.tool_calls.arguments import kinds_of
from veneer.serve.tool_calls.format import CallFormat, Fields
from veneer.serve.tool_calls.functions import Function, Tools
from veneer.serve.tool_calls.match import Parts, Slot, pattern_of

MOST_CALLS = 16
"""Largest number of calls in an answer whose form is forced by a grammar."""
_OPENS = frozenset(
    ("additionalProperties", "patternProperties", "unevaluatedProperties", "allOf", "anyOf", "oneOf", "$ref")
)
_COMBINED = ("allOf", "anyOf", "oneOf", "not", "if", "$ref")
_NOT_IN_FIELDS = (*_COMBINED, "patternProperties", "minProperties", "propertyNames", "dependentRequired")
_NOT_IN_STRINGS = (*_COMBINED, "pattern", "format", "minLength", "maxLength")
"""Parts of a schema that arguments written one by one, and their strings, cannot be held to."""
_NOTHING = '""'
_ID_IN_TEXT, _BLANK, _SLASH = "[a-zA-Z0-9_-]*", r"\s+", r"\/"
_ID = "/[a-zA-Z0-9]{9}/"


def grammar_of(tools: Tools, format: CallFormat, otherwise: str | Mapping[str, Any] | None = None) -> str:
    """Return the Lark grammar of an answer of 1 to 16 calls, or of exactly one if calls are not parallel.

    Arguments fit the function's schema; additional properties occur only if the schema explicitly allows them. With
    ``otherwise``, an answer may instead be JSON of that schema. Raises ConfigError for a schema whose values the format
    cannot express.
    """
    grammar = _Grammar(format)
    calls = _calls(grammar, tools, format, grammar.front)
    return _with_otherwise(grammar, f"start: {calls}", otherwise)


def grammar_in_text(tools: Tools, format: CallFormat) -> str:
    """Return the Lark grammar of a text in which the arguments of every call fit the function's schema.

    The text may have no calls. Calls are recognized as by `Parser`. Raises as `grammar_of` does.
    """
    grammar = _Grammar(format)
    calls = _calls(grammar, tools, format, grammar.front_in_text)
    grammar.rules += ["text: TEXT", "TEXT: /(?s:.*)/"]
    return "\n".join([f"start: ({calls}){'*' if tools.parallel else '?'} text", *grammar.rules, ""])


def _calls(grammar: _Grammar, tools: Tools, format: CallFormat, front: Callable[[Parts, str, str], str]) -> str:
    """Return the grammar of one or more calls.

    ``front`` makes the grammar of one call from its format, name and rule.
    """
    rules = [(f"a{i}", function) for i, function in enumerate(tools.callable)]
    for rule, function in rules:
        grammar.add_arguments(rule, function)
    made = _either([front(format.before, function.name, rule) for rule, function in rules])
    if tools.parallel and format.between is not None:
        later = _either([grammar.front(format.between, function.name, rule) for rule, function in rules])
        made += f" {later}{{0,{MOST_CALLS - 1}}}"
    return f"{made} {grammar.line(*format.after)}"


def _with_otherwise(grammar: _Grammar, start: str, otherwise: str | Mapping[str, Any] | None) -> str:
    if otherwise is not None:
        start += " | answer"
        grammar.rules.append(f"answer: %json {otherwise if isinstance(otherwise, str) else json.dumps(otherwise)}")
    return "\n".join([start, *grammar.rules, ""])


class _Grammar:
    """Rules of a grammar under construction."""

    def __init__(self, format: CallFormat) -> None:
        self.rules: list[str] = []
        self._format = format
        tokens = sorted(format.added, key=len, reverse=True)
        self._tokens = re.compile(f"({'|'.join(map(re.escape, tokens))})") if tokens else None

    def front(self, parts: Parts, name: str, rule: str) -> str:
        """Return the grammar of a call: the literals and the name in front of its arguments, then the rule of the
        arguments.
        """
        return f"{self.line(*(name if part is Slot.NAME else part for part in parts))} {rule}"

    def front_in_text(self, parts: Parts, name: str, rule: str) -> str:
        """Return the grammar of free text, then a call: what precedes its arguments, and the rule of the arguments.

        If a call begins with a special token, the token cannot be part of the text. Other beginnings of calls are found
        in the text, with any white space around them.
        """
        first = parts[0].lstrip() if isinstance(parts[0], str) else parts[0]
        if isinstance(first, str) and first.startswith(tuple(self._format.special)):
            return f"TEXT {self.front((first, *parts[1:]), name, rule)}"
        pattern, blank = "", ""
        for part in (first, *parts[1:]):
            slot = _ID_IN_TEXT if part is Slot.ID else re.escape(name)
            pattern += blank + (pattern_of(part) if isinstance(part, str) else slot)
            blank = _BLANK if isinstance(part, str) and part[-1:].isspace() else ""
        self.rules.append(f"{rule}_front[lazy]: /(?s:.*){pattern.replace('/', _SLASH)}/")
        return f"{rule}_front {f'(/{_BLANK}/)? ' if self._format.fields is None else ''}{rule}"

    def line(self, *parts: str | Slot) -> str:
        """Return the grammar of literals and slots in sequence."""
        text, made = "", list[str]()
        for part in parts:
            if isinstance(part, str):
                text += part
            else:
                made += [*self._literal(text), _ID]
                text = ""
        return " ".join([*made, *self._literal(text)])

    def _literal(self, text: str) -> list[str]:
        """Return the grammar of a text, in pieces. A special token in the text is matched as a token, not by its
        characters.
        """
        pieces = [text] if self._tokens is None else self._tokens.split(text)
        added = self._format.added
        return [f"<[{added[each]}]>" if each in added else json.dumps(each) for each in pieces if each]

    def add_arguments(self, rule: str, function: Function) -> None:
        """Add the rule of a function's arguments."""
        fields, schema = self._format.fields, function.schema
        if fields is not None:
            self._add_fields(rule, fields, schema, function.name)
            return
        named = schema.get("properties")
        if named is not None and _OPENS.isdisjoint(schema) and set(schema.get("required", ())) <= set(named):
            schema["additionalProperties"] = False
        self.rules.append(f"{rule}: %json {json.dumps(schema | self._style())}")

    def _style(self) -> dict[str, Any]:
        """Return llguidance's options for JSON with the template's separators and no other white space."""
        item, key = self._format.separators or (", ", ": ")
        return {"x-guidance": {"whitespace_flexible": False, "item_separator": item, "key_separator": key}}

    def _add_fields(self, rule: str, fields: Fields, schema: Mapping[str, Any], name: str) -> None:
        """Add the rules of the fields of a call's arguments, in the order of the schema.

        Each field has a rule for being the first that is written, and a rule for following another field.
        """
        properties, required = schema.get("properties", {}), set(schema.get("required", ()))
        _require_held(name, [key for key in _NOT_IN_FIELDS if key in schema])
        _require_held(name, [f"the required {key!r} without a schema" for key in required - set(properties)])
        behind = fields.next[len(fields.last) :]
        for i, (key, each) in enumerate(properties.items()):
            if not key.strip() or {fields.middle.strip()[0], "\n"} & set(key) or key != key.strip():
                _require_held(name, [f"the name {key!r}"])
            value = self._value(f"{rule}_{i}", fields, self._with_definitions(each, schema), f"{name}.{key}")
            first = f"{self.line(fields.first + key + fields.middle)} {value} {rule}_r{i + 1}"
            more = f"{self.line(behind + key + fields.middle)} {value}"
            optional = key not in required
            front = rule if i == 0 else f"{rule}_f{i}"
            self.rules.append(f"{front}: {first}" + (f" | {rule}_f{i + 1}" if optional else ""))
            self.rules.append(f"{rule}_r{i}: " + (f"({more})?" if optional else more) + f" {rule}_r{i + 1}")
        n = len(properties)
        front = rule if n == 0 else f"{rule}_f{n}"
        self.rules += [f"{front}: {self.line(fields.none) or _NOTHING}", f"{rule}_r{n}: {_NOTHING}"]

    def _with_definitions(self, each: Any, schema: Mapping[str, Any]) -> dict[str, Any]:
        kept = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        return {**kept, **(each if isinstance(each, Mapping) else {})}

    def _value(self, rule: str, fields: Fields, schema: dict[str, Any], where: str) -> str:
        """Add the rule of a field's value, if it needs one. Return the grammar of the value and of the text that ends
        it.
        """
        end = self.line(fields.last)
        if kinds_of(schema) != {"string"}:
            self.rules.append(f"{rule}: %json {json.dumps(schema | self._style())}")
            return f"{rule} {end}"
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(values, list):
            values = [value for value in values if isinstance(value, str)]
            _require_held(where, [repr(value) for value in values if fields.end in value])
            return f"{_either([self.line(value) or _NOTHING for value in values])} {end}"
        _require_held(where, [key for key in _NOT_IN_STRINGS if key in schema])
        if self._tokens is not None and self._tokens.match(fields.end):
            self.rules.append(f"{rule}: /(?s:.*)/")
            return f"{rule} {self.line(fields.last.lstrip())}"
        self.rules.append(f"{rule}[suffix={json.dumps(fields.last)}]: /(?s:.*)/")
        return rule


def _require_held(where: str, wrong: list[str]) -> None:
    if wrong:
        raise ConfigError(
            f"the schema of {where} has {', '.join(wrong)}, which this model's format cannot force: change it, or "
            'send tool_choice="auto"'
        )


def _either(ways: list[str]) -> str:
    return f"({' | '.join(ways)})"
