"""Main program of a process of `veneer.serve.sandbox.sandbox`. It answers messages in turn until its limits end it."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from veneer.serve.sandbox.sandbox import read, write

_LONGEST_ERROR = 2000  # characters
_BY_THE_CLOCK = 4  # times as long: others compute too
Answer = Callable[[dict[str, Any]], dict[str, Any]]


def main() -> None:
    """Answer messages of the standard input on the standard output until there are none."""
    kind, seconds, most_bytes, stack = sys.argv[2], float(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    answer = _templates() if kind == "templates" else _grammars()
    _limit(most_bytes, stack)
    while (asked := read(sys.stdin.buffer)) is not None:
        _set_timers(seconds)
        try:
            found = answer(asked)
        except MemoryError:
            return
        _set_timers(0)
        write(answers, found)


def _set_timers(seconds: float) -> None:
    """Set timers, of CPU time and of the clock, whose signals end this process even within a call of C."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, _BY_THE_CLOCK * seconds)


def _limit(most_bytes: int, stack: int) -> None:
    """Limit memory, stack and files from now on, as far as the system supports it."""
    pages = Path("/proc/self/statm")
    there = int(pages.read_text().split()[0]) * resource.getpagesize() if pages.exists() else 0
    for name, most in (("AS", there + most_bytes), ("STACK", stack), ("CORE", 0), ("FSIZE", 0), ("NPROC", 0)):
        kind = getattr(resource, f"RLIMIT_{name}", None)
        with contextlib.suppress(ValueError, OSError):
            if kind is not None:
                resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))


def _templates() -> Answer:
    # Here, as a process of the sandbox makes templates or grammars, and imports what these need alone.
    from jinja2.exceptions import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    # Whatever a template does wrong is its error, and no other.
    wrong = (TemplateError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RecursionError)

    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        try:
            [text], _ = render_jinja_template([asked["messages"]], chat_template=asked["program"], **asked["how"])
        except wrong as error:
            return {"refused": str(error)[:_LONGEST_ERROR]}
        if len(text) > asked["most"]:
            return {"refused": f"its text has {len(text)} characters, and at most {asked['most']} are taken"}
        return {"text": text}

    return answer


def _grammars() -> Answer:
    from llguidance import LLMatcher, LLTokenizer  # see `_templates`

    tables = LLTokenizer("byte")

    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        matcher = LLMatcher(tables, asked["program"], log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()
        return {"refused": matcher.get_error()[:_LONGEST_ERROR]} if matcher.is_error() else {}

    return answer
