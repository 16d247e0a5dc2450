"""Implementation of a verb, imported when the verb runs. It imports torch, which takes seconds that help
pages avoid.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import ParamSpec

from veneer.core.progress import waits_told

P = ParamSpec("P")


def carried_out_by(place: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Return a decorator that makes a verb from its page.

    The verb runs the page's own checks, then the function of the page's name in the module ``place``, with the same
    arguments.
    """

    def verb_of(page: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(page)
        def verb(*args: P.args, **options: P.kwargs) -> None:
            page(*args, **options)
            with waits_told("loading torch and transformers"):
                work = importlib.import_module(place)
            getattr(work, page.__name__)(*args, **options)

        return verb

    return verb_of
