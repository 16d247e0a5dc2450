"""Rewards of the recipes labels, json and calculator: a part for the form, and 1 for the right answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

LABELS = ("positive", "negative")


def text_of(completion: Any) -> str:
    """Return the text of a completion, or of its last message."""
    return completion if isinstance(completion, str) else str(completion[-1].get("content") or "")


def right(completions: Sequence[Any], answer: Sequence[str], **row: Any) -> list[float]:
    """Return 1 for the right answer and nothing besides it, else 0."""
    return [float(text_of(own).strip() == wanted) for own, wanted in zip(completions, answer, strict=True)]


def label(completions: Sequence[Any], answer: Sequence[str], **row: Any) -> list[float]:
    """Return 1 for the right label, 0.1 for another label, 0 for any other text."""
    texts = [text_of(own).strip() for own in completions]
    return [1.0 if own == wanted else 0.1 * (own in LABELS) for own, wanted in zip(texts, answer, strict=True)]


def _entry(text: str) -> Mapping[str, Any] | None:
    """Return the object that a text is in JSON, or None."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def fields(completions: Sequence[Any], answer: Sequence[str], **row: Any) -> list[float]:
    """Return 0 for a text that is no JSON object, else 0.2 and the F1 of its fields times 0.8."""
    found = []
    for own, wanted in zip(completions, answer, strict=True):
        entry, right_one = _entry(text_of(own)), json.loads(wanted)
        if entry is None:
            found.append(0.0)
            continue
        n_right = sum(key in entry and entry[key] == value for key, value in right_one.items())
        found.append(0.2 + 0.8 * 2 * n_right / (len(entry) + len(right_one)))
    return found


def whole(completions: Sequence[Any], answer: Sequence[str], **row: Any) -> list[float]:
    """Return 1 for JSON with all fields right and no other, else 0."""
    return [float(_entry(text_of(own)) == json.loads(wanted)) for own, wanted in zip(completions, answer, strict=True)]
