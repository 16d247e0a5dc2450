"""Upper bound on the length of the longest text that a grammar forces in one run, computed from the grammar's text."""

from __future__ import annotations

import json
import math
import re
from typing import Any

_OF_ONE = re.compile(r"[^)\s]\{(\d+)")
_OF_MANY = re.compile(r"\)\s*\{(\d+)")
"""Repeats of one character, and of a text."""

_FREE = {"string", "number", "integer", "boolean"}
_LEAVES_FREE = {"type", "title", "description", "default", "examples", "minLength", "maxLength"}
_REFERENCES = 8  # that are followed, one after the other


def longest_forced(grammar: str) -> int:
    """Return a bound on the characters that a grammar in llguidance's form forces in one run.

    Items of an array are repeated in one run only if all their content is constant: a free string interrupts the run.
    """
    try:
        parts = json.loads(grammar)["grammars"]
    except (ValueError, KeyError, TypeError):
        return _in_text(grammar)
    return sum(_in_schema(schema, schema) for part in parts for schema in part.values())


def _in_text(text: str) -> int:
    of_one = sum(map(int, _OF_ONE.findall(text)))
    return (len(text) + of_one) * math.prod(max(int(n), 1) for n in _OF_MANY.findall(text))


def _in_schema(schema: Any, root: Any) -> int:
    if isinstance(schema, list):
        return sum(_in_schema(each, root) for each in schema)
    if not isinstance(schema, dict):
        return _in_text(str(schema))
    once = sum(len(key) + _in_schema(value, root) for key, value in schema.items())
    n_times = max((n for n in (schema.get("minItems"), schema.get("minProperties")) if isinstance(n, int)), default=1)
    return once if _is_free(schema.get("items"), root) else once * max(n_times, 1)


def _is_free(schema: Any, root: Any, left: int = _REFERENCES) -> bool:
    """Return True if a schema's texts contain a string, number or boolean that the schema does not fix."""
    if not isinstance(schema, dict) or left == 0:
        return False
    if isinstance(target := schema.get("$ref"), str):
        return _is_free(_found(target, root), root, left - 1)
    if schema.get("type") in _FREE:
        return schema.keys() <= _LEAVES_FREE
    needed = schema.get("required", ())
    known = schema.get("properties", {})
    return any(name in needed and _is_free(each, root, left - 1) for name, each in known.items())


def _found(target: str, root: Any) -> Any:
    """Return the part of a schema that a local reference points to; None for other references."""
    head, *names = target.split("/")
    found = root if head == "#" else None
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    return found
