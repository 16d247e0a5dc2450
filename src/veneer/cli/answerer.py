"""The interface of all that answers prompts: how it draws tokens, what it does, how long an answer may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from veneer.errors import ConfigError

if TYPE_CHECKING:
    from veneer.evaluate.scoring import Answering, OnProgress


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """The choice of tokens: the likeliest at a ``temperature`` of 0, else a draw by ``top_p``, ``top_k`` (0: all) and
    ``seed`` (None: another one each time).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None


class Answerer(Protocol):
    """A model that answers prompts, which are token ids."""

    tokenizer: Any

    def stream(self, prompt: Sequence[int], max_new_tokens: int) -> str:
        """Print the answer to stdout while it is made, and give it back. Raises ConfigError where it has no room."""

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        answering: Answering,
        on_progress: OnProgress,
        adapters: Sequence[Path | None] = (),
    ) -> list[str]:
        """The answer to each, by the adapter of its folder (None: the base alone), or by the first for all of them.

        Raises ConfigError where one has no room.
        """


def tokens_behind(prompt: Sequence[int], limit: int | None, n_most: int) -> int:
    """``n_most``, or what a context of ``limit`` tokens has room for. Raises ConfigError where there is none."""
    if limit is None:
        return n_most
    if not prompt:
        raise ConfigError("the prompt is empty: nothing to continue")
    if len(prompt) >= limit:
        raise ConfigError(f"the prompt has {len(prompt)} tokens and the model's context holds {limit}: shorten it")
    return min(n_most, limit - len(prompt))
