"""transformers' progress bars, switched off for a while."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from transformers.utils import logging


@contextmanager
def without_bars() -> Iterator[None]:
    """Without transformers' progress bars; afterwards they are as they were."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def bars_in_terminals_alone() -> Iterator[None]:
    """Without the bars where stderr is a file or a pipe, which would keep every state of them."""
    with nullcontext() if sys.stderr.isatty() else without_bars():
        yield
