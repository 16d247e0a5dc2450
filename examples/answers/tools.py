"""A calculator that a model may call, and its reward."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


def calculator(expression: str) -> str:
    """Add numbers.

    Args:
        expression: Numbers with + between them, such as 58 + 247.
    """
    if not re.fullmatch(r"\s*\d{1,9}(\s*\+\s*\d{1,9}){0,9}\s*", expression):
        raise ValueError(f"{expression} is no sum: write numbers with + between them")
    return f"= {sum(map(int, expression.split('+')))}"


def sums(completions: Sequence[Any], answer: Sequence[str], **row: Any) -> list[float]:
    """Return 1 for the right number, 0.6 for a text that contains it, 0.3 if only the calculator told it.

    Each call after the first takes 0.1.
    """
    found = []
    for messages, wanted in zip(completions, answer, strict=True):
        n_calls = sum(message["role"] == "tool" for message in messages)
        told = any(message["role"] == "tool" and message["content"] == f"= {wanted}" for message in messages)
        text = messages[-1].get("content") or "" if messages[-1]["role"] == "assistant" else ""
        value = 1.0 if text.strip() == wanted else 0.6 if wanted in re.findall(r"\d+", text) else 0.3 * told
        found.append(value - 0.1 * max(0, n_calls - 1))
    return found
