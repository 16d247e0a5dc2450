"""Memory of a process besides its tensors: interpreter and libraries, tokenizer and rows, kernels and the allocator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from veneer.data.named_files import names_a_file
from veneer.plan.live_bytes import Peak
from veneer.plan.memory_trace import ACTIVATIONS, GRADIENTS, LOGITS, STATE
from veneer.plan.plan import Plan
from veneer.plan.start import start_bytes
from veneer.recipe.parts import DataPart

ALLOCATOR_BYTES = 20_000_000
"""Scratch of kernels and heap that is kept but not used, beside live tensors (bench/training/plan.py; glibc)."""
MOVING_SHARE, TRAINED_SHARE = 0.02, 0.2
"""Of what comes and goes; and of gradients and optimizer state, between which freed memory does not fit again."""
FORKED_SHARE = 0.16
"""Of activations and logits, if rows share prompts: attention of answers to their prompt leaves gaps (16% measured on
DPO, 25% on GRPO)."""
WORD_BYTES, ROWS_SHARE = 500, 5.5
"""Of each entry of a vocabulary; and times the files of rows (16 MB of conversations in lines of JSON): as they are
read, encoded, and read again in another order."""


@dataclass(frozen=True, slots=True)
class Process:
    """Peak memory of a process that trains."""

    start: int
    tensors: int
    allocator: int
    tokenizer: int
    rows: int

    @property
    def n_bytes(self) -> int:
        """Sum of its parts."""
        return self.start + self.tensors + self.allocator + self.tokenizer + self.rows


def process_of(plan: Plan, start: int | None = None) -> Process:
    """Return the memory of the process that runs a plan on this machine, in the phase that needs most.

    ``start``: the bytes of the process before it trains; by default they are measured, once for an installation.
    """
    lost = {phase: _lost(plan, peak) for phase, peak in plan.phases.items()}
    phase = max(lost, key=lambda name: plan.phases[name].n_bytes + lost[name])
    return Process(
        start=start_bytes() if start is None else start,
        tensors=plan.phases[phase].n_bytes,
        allocator=ALLOCATOR_BYTES + lost[phase],
        tokenizer=WORD_BYTES * plan.config.get_text_config().vocab_size,
        rows=round(ROWS_SHARE * sum(_bytes_of_rows(plan.recipe.data))),
    )


def _lost(plan: Plan, peak: Peak) -> int:
    """Return the bytes of gaps between a phase's tensors, which are too small for any other tensor."""
    moving = peak.n_bytes - plan.held.n_bytes
    trained = sum(peak.kinds.get(kind, 0) for kind in (GRADIENTS, STATE))
    forked = sum(peak.kinds.get(kind, 0) for kind in (ACTIVATIONS, LOGITS)) if plan.batch.n_prompts else 0
    return round(MOVING_SHARE * moving + _share_between(plan) * trained + FORKED_SHARE * forked)


def _bytes_of_rows(part: DataPart) -> Iterator[float]:
    """Yield the bytes of each local file that is read whole, times the weight with which its rows are mixed in.

    Files of which only a fixed number of rows is read (``limit``, ``count``) are left out, and so are data sets on the
    hub.
    """
    if part.eval_limit is None:
        yield _file_bytes(part.eval)
    if not part.streaming and part.limit is None:
        yield _file_bytes(part.train)
        yield from (each.weight * _file_bytes(each.source) for each in part.more if each.count is None)


def _file_bytes(source: str | None) -> int:
    if source is None or not names_a_file(source) or not Path(source).is_file():
        return 0
    return Path(source).stat().st_size


def _share_between(plan: Plan) -> float:
    """Return the bytes that are lost to gaps, as a share of the bytes of gradients and optimizer state.

    The share is zero if blocks keep only their inputs. It is half as large with accumulation, because gradients are
    then allocated only in the first micro-batch of a step.
    """
    args = plan.recipe.training_config()
    if args.gradient_checkpointing and not (args.gradient_checkpointing_kwargs or {}).get("selective"):
        return 0.0
    return TRAINED_SHARE if args.gradient_accumulation_steps == 1 else TRAINED_SHARE / 2
