"""Interface of models that answer prompts, with the settings of sampling and the length of an answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError
from veneer.evaluate.scoring import Answering, OnProgress, ignore_progress


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Sampling settings. If ``temperature`` is 0, the likeliest token is chosen.

    Otherwise tokens are sampled with ``top_p`` and ``top_k``; a ``top_k`` of 0 is no limit. If ``seed`` is None, a
    random seed is chosen.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None


Asked = tuple[Sequence[int], Path | None]
"""Prompt, and the folder of the adapter that answers it; None: the base alone."""


class Answerer(ABC):
    """Model that answers prompts, given as token ids. ``default``: the folder of the first adapter, if there is one."""

    tokenizer: Any
    default: Path | None

    @abstractmethod
    def stream(self, prompt: Sequence[int], max_new_tokens: int) -> str:
        """Print the answer to stdout while it is generated, and return it.

        Raises ConfigError if the context has no room for it.
        """

    @abstractmethod
    def answers_to(self, asked: Sequence[Asked], answering: Answering, on_progress: OnProgress) -> list[str]:
        """Return the answer to each prompt. Raises ConfigError if the context has no room for an answer."""

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        answering: Answering,
        on_progress: OnProgress = ignore_progress,
        adapters: Sequence[Path | None] = (),
    ) -> list[str]:
        """Return the answer to each prompt.

        ``adapters``: the folder of each prompt's adapter; None means the base alone. Without ``adapters`` the first
        adapter answers all prompts. Raises ConfigError if the context has no room for an answer.
        """
        folders = adapters or [self.default] * len(prompts)
        return self.answers_to(list(zip(prompts, folders, strict=True)), answering, on_progress)


def tokens_behind(prompt: Sequence[int], limit: int | None, n_most: int) -> int:
    """Return how many tokens, at most ``n_most``, fit after ``prompt`` in a context of ``limit`` tokens.

    Raises ConfigError if the prompt is empty or fills the context.
    """
    if limit is None:
        return n_most
    if not prompt:
        raise ConfigError("the prompt is empty: give at least one token")
    if len(prompt) >= limit:
        raise ConfigError(f"the prompt has {len(prompt)} tokens and the model's context holds {limit}: shorten it")
    return min(n_most, limit - len(prompt))
