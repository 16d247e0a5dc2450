"""Interface of all that answers prompts: how it draws tokens, its action, how long an answer may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from veneer.errors import ConfigError
from veneer.evaluate.scoring import Answering, OnProgress, ignore_progress


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Choice of tokens: the likeliest at a ``temperature`` of 0, else a draw by ``top_p``, ``top_k`` (0: all) and
    ``seed`` (None: another one each time).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None


class Answerer(Protocol):
    """Model that answers prompts, which are token ids."""

    tokenizer: Any

    def stream(self, prompt: Sequence[int], max_new_tokens: int) -> str:
        """Print the answer to stdout while it is made, and return it. Raises ConfigError if it has no room."""

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        answering: Answering,
        on_progress: OnProgress = ignore_progress,
        adapters: Sequence[Path | None] = (),
    ) -> list[str]:
        """Return the answer to each prompt by the adapter of its folder (None: the base alone).

        Without ``adapters`` the first adapter answers all prompts. Raises ConfigError if an answer has no room.
        """


def tokens_behind(prompt: Sequence[int], limit: int | None, n_most: int) -> int:
    """Return ``n_most``, or the room that ``prompt`` leaves in a context of ``limit`` tokens, if that is less.

    Raises ConfigError if the prompt is empty or fills the context.
    """
    if limit is None:
        return n_most
    if not prompt:
        raise ConfigError("the prompt is empty: nothing to continue")
    if len(prompt) >= limit:
        raise ConfigError(f"the prompt has {len(prompt)} tokens and the model's context holds {limit}: shorten it")
    return min(n_most, limit - len(prompt))
