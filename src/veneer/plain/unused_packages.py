"""Packages that transformers and TRL import where they are installed, and that this program does not use."""

from __future__ import annotations

import sys

_UNUSED = (
    "peft",
    "bitsandbytes",
    "scipy",
)  # with parts of torch that they alone import, half of all seconds before a first step


def hide_unused() -> None:
    """Make this process see the unused packages as not installed."""
    for name in _UNUSED:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # as the import system has it


def show_unused() -> None:
    """Make the hidden packages visible again, for a user's code that may import them."""
    for name in _UNUSED:
        if name in sys.modules and sys.modules[name] is None:
            del sys.modules[name]
