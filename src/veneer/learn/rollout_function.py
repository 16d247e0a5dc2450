"""Checks the output of TRL's ``rollout_func``, and gives it the engine under the name where it expects vLLM."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from veneer.errors import TrainingError

_LISTS = ("prompt_ids", "completion_ids", "logprobs")


def checked_rollouts(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a rollout function with a check of its output: lists of one length, with an entry for each token.

    An answer without tokens becomes a masked end token, because TRL reads each answer's last token. The wrapper raises
    TrainingError if the output is anything else.
    """

    @functools.wraps(function)
    def checked(prompts: Sequence[Any], trainer: Any) -> Any:
        found = function(prompts, trainer)
        problem = _problem(found, len(prompts))
        if problem is not None:
            raise TrainingError(f"rollout_func {getattr(function, '__name__', function)!s}: {problem}")
        return _with_ends(found, trainer.eos_token_ids[0]) if not all(map(len, found["completion_ids"])) else found

    return checked


def _problem(found: Any, n: int) -> str | None:
    if not isinstance(found, Mapping):
        return f"it returned {found!r:.60}; return a dict with {', '.join(_LISTS)}"
    missing = [name for name in _LISTS if name not in found]
    if missing:
        return f"its output lacks {', '.join(missing)}; return a dict with {', '.join(_LISTS)}"
    for name, values in found.items():
        if values is None and name == "logprobs":
            continue
        if not hasattr(values, "__len__") or len(values) != n:
            return f"{name} must be a list with an entry for each of the {n} prompts"
    for row, ids in enumerate(found["completion_ids"]):
        for name in ("logprobs", "env_mask"):
            if (values := found.get(name)) is not None and len(values[row]) != len(ids):
                return f"{name}, row {row}, has {len(values[row])} entries for {len(ids)} tokens"
    return None


def _with_ends(found: Mapping[str, Any], end: int) -> dict[str, Any]:
    """Return the output in which each answer without tokens is replaced by the masked token ``end``."""
    answers, logprobs = found["completion_ids"], found["logprobs"]
    masks = found.get("env_mask") or [[1] * len(ids) for ids in answers]
    filled = {"completion_ids": (answers, [end]), "logprobs": (logprobs, [0.0]), "env_mask": (masks, [0])}
    own = {
        name: [value if len(ids) else instead for value, ids in zip(values, answers, strict=True)]
        for name, (values, instead) in filled.items()
        if values is not None
    }
    return {**found, **own}


class Generation:
    """Engine of a trainer, with the methods of TRL's ``trainer.vllm_generation`` that rollout functions call."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def sync_weights(self) -> None:
        """Do nothing: the engine always generates with the adapter's current state."""

    def generate(
        self, prompts: Sequence[Sequence[int]], images: None = None, num_generations: int = 1, profiler: Any = None
    ) -> tuple[list[list[int]], list[list[int]], list[list[list[float]]], list[list[list[int]]]]:
        """Generate an answer to each prompt. Return the prompts, the answers, and each token's log-probability and id.

        Log-probabilities and ids are in lists of one element, as vLLM's are.
        """
        drawn = self._trainer.drawn(prompts)
        return (
            [[*ids] for ids in prompts],
            [[*each.token_ids] for each in drawn],
            [[[value] for value in each.logprobs] for each in drawn],
            [[[token] for token in each.token_ids] for each in drawn],
        )
