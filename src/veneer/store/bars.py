"""Progress bars and advice of transformers and of the hub, switched off or on temporarily."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging

from veneer.plain.progress import waiting_over


@contextmanager
def without_bars() -> Iterator[None]:
    """Disable transformers' progress bars inside the ``with`` block."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def quiet() -> Iterator[None]:
    """Disable transformers' progress bars and advice inside the ``with`` block."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with without_bars():
            yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def downloads_shown(name: str) -> Iterator[None]:
    """Show the hub's progress bars for the download of ``name``, even if transformers' own are disabled.

    If stderr is a file or a pipe, print one line instead.
    """
    if isinstance(try_to_load_from_cache(name, "config.json"), str):  # no more than a missing file or two
        yield
        return
    waiting_over()
    if not sys.stderr.isatty():
        print(f"downloading {name} from the hub", file=sys.stderr)
        yield
        return
    hidden = are_progress_bars_disabled()
    enable_progress_bars()
    try:
        yield
    finally:
        if hidden:
            disable_progress_bars()


@contextmanager
def bars_in_terminals_alone() -> Iterator[None]:
    """Disable progress bars in the ``with`` block if stderr is a file or a pipe, which would record every update."""
    with nullcontext() if sys.stderr.isatty() else without_bars():
        yield
