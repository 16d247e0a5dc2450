"""Rank, alpha, targets, learning rate and batch for a task, each with its source and confidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from veneer.errors import ConfigError, listed

ADVISED = {"method": "lora", "r": 1, "target_modules": "all-linear"}  # the part ``adapter``, before its rank
TASKS = ("instruction", "code", "math", "classification", "pretraining", "rl")
BITS_A_PARAMETER, BITS_A_TOKEN = 2.0, 1.0
_REGRET = "Schulman et al., Thinking Machines, LoRA Without Regret (2025)"
_BIDERMAN = "Biderman et al. 2024, arXiv:2405.09673"
_QLORA = "Dettmers et al. 2023, arXiv:2305.14314"
_VARIANTS = "nine variants compared, arXiv:2602.04998"
_NOBODY = "common practice, no controlled source"
_ALL_LINEAR = "attention alone is behind at equal parameters; the feed-forward half matters most"
MOST_ROWS, LEAST_STEPS = 32, 20
"""Rows of a step at most, and steps of an epoch at least."""
_TWICE, _ONCE = 5_000, 50_000
"""Rows above which they are read twice, and once."""


@dataclass(frozen=True, slots=True)
class Advice:
    """Advice for one setting of a recipe: its ``key`` and ``value``, the reason, the ``source``, and the
    ``confidence``: high, medium or low.
    """

    key: str
    value: Any
    reason: str
    source: str
    confidence: str


def advise(
    task: str, n_rows: int, tokens_a_row: int, parameters_a_rank: int, left_out: str | None = None
) -> list[Advice]:
    """Return settings for LoRA on ``n_rows`` rows, each of ``tokens_a_row`` trained tokens.

    ``parameters_a_rank``: parameters of LoRA with rank 1 on all linear layers. ``left_out`` is a text about stacks of
    experts that LoRA on linear layers does not adapt. If it is given, the confidence in the targets is low. Raises
    ConfigError for an unknown task and for counts below one.
    """
    problems = [] if task in TASKS else [f"--task {task!r} must be one of {', '.join(TASKS)}"]
    problems += [
        f"{name}={n} must be at least 1" for name, n in (("--rows", n_rows), ("--tokens", tokens_a_row)) if n < 1
    ]
    if problems:
        raise ConfigError(listed(problems))
    rank, reason, source, sure = _rank(task, n_rows * tokens_a_row, parameters_a_rank)
    return [
        Advice("adapter.method", "lora", "variants differ by 1 to 2% at the best rate of each", _VARIANTS, "medium"),
        Advice("adapter.r", rank, f"{reason}; {rank * parameters_a_rank:,} parameters", source, sure),
        Advice(
            "adapter.lora_alpha", 32, "as in the source: with alpha / r the best rate hardly varies with rank", _REGRET,
            "medium",
        ),
        _targets(left_out),
        Advice("adapter.lora_dropout", 0.0, "none at first: 0.05 to 0.1 helped a little on small data", _QLORA, "low"),
        _rate(task),
        _epochs(task, n_rows),
        _batch(n_rows),
    ]  # fmt: skip


def _targets(left_out: str | None) -> Advice:
    source = f"{_REGRET}; {_BIDERMAN}"
    if left_out is None:
        return Advice("adapter.target_modules", "all-linear", _ALL_LINEAR, source, "high")
    reason = f"{_ALL_LINEAR}, and here {left_out}; nobody has compared the two at equal parameters"
    return Advice("adapter.target_modules", "all-linear", reason, source, "low")


def _rank(task: str, n_tokens: int, parameters_a_rank: int) -> tuple[int, str, str, str]:
    if task == "rl":
        return 8, "an episode teaches about one bit: rank 1 is enough, 8 is safe", _REGRET, "medium"
    least = n_tokens * BITS_A_TOKEN / BITS_A_PARAMETER / max(1, parameters_a_rank)
    usual = {"instruction": 16, "classification": 8, "math": 64, "code": 256, "pretraining": 256}[task]
    holds = 1 << max(2, (max(1, round(least + 0.5)) - 1).bit_length())
    if task == "pretraining" and holds > 256:
        return 256, (
            f"{n_tokens:,} tokens would fill rank {holds}: full fine-tuning wins at every rank here"
        ), _BIDERMAN, "high"  # fmt: skip
    rank = min(256, max(usual if n_tokens > 1_000_000 or task == "classification" else min(usual, 16), holds))
    reason = (
        f"rank {holds} has capacity for {n_tokens:,} tokens (2 bits a parameter, 1 bit a token, pessimistic); "
        f"{usual} is usual for {task}"
    )
    return rank, reason, f"Allen-Zhu, Li 2024, arXiv:2404.05405; {_BIDERMAN}", "medium" if holds <= usual else "low"


def _rate(task: str) -> Advice:
    rate = {"pretraining": 1e-4, "rl": 1e-4, "classification": 3e-4}.get(task, 2e-4)
    reason = f"ten times the usual rate of full fine-tuning in {task}, {rate / 10:g}"
    return Advice("training.learning_rate", rate, reason, f"{_REGRET}; the rate itself: {_NOBODY}", "medium")


def _epochs(task: str, n_rows: int) -> Advice:
    once = task == "pretraining"
    epochs = 1.0 if once or n_rows > _ONCE else 2.0 if n_rows > _TWICE else 3.0
    reason = (
        "pretraining text is read once"
        if once
        else f"{n_rows:,} rows: 3 epochs up to {_TWICE:,}, 2 up to {_ONCE:,}, 1 above; more than 3 memorize the rows"
    )
    return Advice("training.num_train_epochs", epochs, reason, _NOBODY, "low")


def _batch(n_rows: int) -> Advice:
    key, rows = "training.per_device_train_batch_size", min(MOST_ROWS, max(1, n_rows // LEAST_STEPS))
    if rows == MOST_ROWS:
        reason = f"a large batch hurts LoRA more than full fine-tuning, at any rank: {rows} rows or fewer a step"
        return Advice(key, rows, reason, _REGRET, "medium")
    reason = (
        f"at most 1/{LEAST_STEPS} of the {n_rows:,} rows, so that an epoch has at least {LEAST_STEPS} steps; at least "
        "one row"
    )
    return Advice(key, rows, reason, _NOBODY, "low")
