"""Choices and tokens in flight of each key, within the limits of the key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from veneer.serve.http.errors import RefusedError, TooManyRequestsError
from veneer.serve.http.key import Key
from veneer.serve.schedule.in_flight import InFlight

_SHORTER = "send max_tokens (max_completion_tokens, max_output_tokens) in the request, or a shorter prompt"


class Quotas:
    """Choices and tokens in flight, by the key's name. Call it from one thread."""

    def __init__(self) -> None:
        self._choices: dict[str, InFlight] = {}
        self._tokens: dict[str, InFlight] = {}

    @contextmanager
    def choices(self, key: Key, n: int) -> Iterator[None]:
        """Count ``n`` choices of a key as in flight while the context is open.

        Raises RefusedError if ``n`` exceeds the key's limit, and TooManyRequestsError if it exceeds the part of the
        limit that is unused.
        """
        with _counted(
            self._choices, key.name, n, key.max_requests, "choices (prompts × n)", "max_requests", "ask for fewer"
        ):
            yield

    @contextmanager
    def tokens(self, key: Key, n: int) -> Iterator[None]:
        """Count ``n`` tokens (of prompts, and of answers at their largest length) as `choices` counts choices."""
        what = "tokens (prompts and longest answers)"
        with _counted(self._tokens, key.name, n, key.max_tokens, what, "max_tokens", _SHORTER):
            yield


@contextmanager
def _counted(
    uses: dict[str, InFlight], name: str | None, n: int, most: int | None, what: str, field: str, advice: str
) -> Iterator[None]:
    if name is None or most is None:
        yield
        return
    if n > most:
        raise RefusedError(f"{n} {what} are asked for, and this key may have {most} in flight (its {field}): {advice}")
    use = uses.setdefault(name, InFlight())
    if use.n + n > most:
        seconds = use.refused(n, most)
        raise TooManyRequestsError(
            f"{use.n} {what} of this key are in flight, and it may have {most} (its {field}): ask again in "
            f"{seconds:.0f} s",
            retry_seconds=seconds,
        )
    with use.counted(n):
        yield
