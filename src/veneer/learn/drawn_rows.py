"""Draws several answers to each row of a file, with log-probabilities and rewards, and selects the best as training
rows.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from veneer.answer.engine import EngineAnswerer
from veneer.answer.files import PromptRow
from veneer.answer.prompts import PromptRows
from veneer.data.column_templates import fill_template
from veneer.evaluate.scoring import OnProgress, ignore_progress
from veneer.learn.journal import Line, packed
from veneer.learn.rewards import RewardLimits, checked_reward
from veneer.learn.rollouts import seed_of
from veneer.recipe.rewards import reward_function

_OWN = frozenset({"prompt", "completion", "messages"})
_OF_ANSWERS = frozenset({"ids", "logprobs", "kept", "finish", "functions", "rewards", "reward"})  # of `draw_rows`


@dataclass(frozen=True, slots=True)
class RowRewards:
    """Reward functions with their names and weights."""

    functions: Sequence[Any]
    names: Sequence[str]
    weights: Sequence[float]

    @classmethod
    def of(cls, entries: Sequence[Mapping[str, Any]], limits: RewardLimits) -> RowRewards:
        """Return the reward functions of a recipe's entries, with limits. Raises ConfigError if a function cannot be
        found.
        """
        named = [dict(each) for each in entries]
        weights = [float(each.pop("weight", 1.0)) for each in named]
        functions = [
            checked_reward(reward_function(each.pop("function"), each), limits, alone=len(named) == 1) for each in named
        ]
        return cls(functions, [each.__name__ for each in functions], weights)

    def lines(self, row: Mapping[str, Any], prompt: Any, completions: Sequence[Any], ids: Sequence[Any]) -> list[Line]:
        """Return one mapping for each answer to a row: ``functions`` (their names), ``rewards`` (their values) and
        ``reward`` (the weighted sum).

        The mappings are empty if there are no functions. Raises RewardError.
        """
        n = len(completions)
        columns = {key: [value] * n for key, value in row.items() if key not in _OWN}
        own = {"prompts": [prompt] * n, "completions": list(completions), "completion_ids": list(ids)}
        by_function = [_returned(function(**{**columns, **own})) for function in self.functions]
        found = []
        for values in zip(*by_function, strict=True):
            told = [weight * value for weight, value in zip(self.weights, values, strict=True) if value is not None]
            reward = sum(told) if told else None
            found.append({"functions": [*self.names], "rewards": [*values], "reward": reward})
        return found or [{} for _ in completions]


def draw_rows(
    answerer: EngineAnswerer,
    asked: Sequence[PromptRow],
    reader: PromptRows,
    n: int,
    max_new_tokens: int,
    seed: int,
    on_progress: OnProgress = ignore_progress,
) -> list[list[Line]]:
    """Return ``n`` answers to each row. An answer has the row's columns, ``prompt``, ``completion``, and the keys of a
    journal.

    If a row has columns under keys of a journal, they are dropped, because they describe an earlier answer. Answers
    depend on the model, the prompt, ``seed`` and the row's number alone. Raises ConfigError for a prompt that leaves no
    room for an answer.
    """
    seeds = [seed_of(seed, number) for number in range(len(asked))]
    drawn = answerer.drawn([(each.ids, each.adapter) for each in asked], n, max_new_tokens, seeds, on_progress)
    groups = []
    for each, outputs in zip(asked, drawn, strict=True):
        prompt = _prompt_of(each.row, reader)
        texts = [answerer.tokenizer.decode(list(own.token_ids), skip_special_tokens=True) for own in outputs]
        completions = [[{"role": "assistant", "content": text}] if isinstance(prompt, list) else text for text in texts]
        columns = {key: value for key, value in each.row.items() if key not in _OWN | _OF_ANSWERS}
        groups.append(
            [
                {**columns, "prompt": prompt, "completion": completion, **_numbers(output)}
                for completion, output in zip(completions, outputs, strict=True)
            ]
        )
    return groups


def rewarded(asked: Sequence[PromptRow], groups: Sequence[Sequence[Line]], rewards: RowRewards) -> list[list[Line]]:
    """Return the answers to each row with three more keys: ``functions``, ``rewards`` and ``reward``. Raises
    RewardError.
    """
    found = []
    for each, lines in zip(asked, groups, strict=True):
        completions, ids = [line["completion"] for line in lines], [line["ids"] for line in lines]
        told = rewards.lines(each.row, lines[0]["prompt"], completions, ids)
        found.append([{**line, **own} for line, own in zip(lines, told, strict=True)])
    return found


def kept_rows(groups: Sequence[Sequence[Line]], *, best: bool, above: float | None) -> list[Line]:
    """Return the answers whose reward is greater than ``above``, or all answers if ``above`` is None.

    If ``best``, return only the best answer to each row (the first of equal ones), with its prompt and completion
    alone. An answer without a reward is left out if ``best`` or ``above`` is given.
    """
    found: list[Line] = []
    for lines in groups:
        told = [line for line in lines if line.get("reward") is not None and (above is None or line["reward"] > above)]
        if best and told:
            chosen = max(told, key=lambda line: line["reward"])
            found.append({key: chosen[key] for key in ("prompt", "completion")})
        elif not best:
            found += told if above is not None else lines
    return found


def _returned(found: Any) -> Any:
    """Return ``found``, the result of a reward function. If it is a coroutine, run it and return its result."""
    return asyncio.run(found) if inspect.iscoroutine(found) else found


def _prompt_of(row: Mapping[str, Any], reader: PromptRows) -> Any:
    """Return a row's prompt as text or messages, without the answer that the row may hold.

    If there is a system message, the prompt is messages. They begin with the row's own system message if it has one.
    """
    turns = fill_template(reader.prompt, row) if reader.prompt is not None else row.get("messages") or row["prompt"]
    if isinstance(turns, list) and turns[-1].get("role") == "assistant":
        turns = turns[:-1]
    if reader.system is None or (isinstance(turns, list) and turns[0].get("role") == "system"):
        return turns
    asked = turns if isinstance(turns, list) else [{"role": "user", "content": turns}]
    return [{"role": "system", "content": reader.system}, *asked]


def _numbers(output: Any) -> Line:
    numbers = output.policy or []
    kept = [each for _, each in numbers]
    found = {
        "ids": list(output.token_ids), "logprobs": packed([own for own, _ in numbers]),
        "finish": None if output.finish_reason is None else str(output.finish_reason),
    }  # fmt: skip
    return found | ({"kept": packed(kept)} if any(kept) else {})
