"""Commented recipe that ``veneer train --print-recipe`` shows: ``recipe.yaml`` with the methods filled in."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from importlib import resources

_COLUMN = " " * 34 + "# "


def commented_recipe(methods: Sequence[str]) -> str:
    """Return a valid recipe in YAML, with a comment for every key. ``methods`` are the values of ``adapter.method``."""
    text = (resources.files("veneer.recipe") / "recipe.yaml").read_text(encoding="utf-8")
    names = textwrap.fill(" | ".join(methods), 118, initial_indent=_COLUMN, subsequent_indent=_COLUMN)
    return text.replace(f"{_COLUMN}METHODS", names)
