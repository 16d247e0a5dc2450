"""Overhead of a step besides products and attention, measured on real steps of small models.

An op of the fused path has one cost, and an op of the general path another: Python around it, the dispatcher, autograd.
Ops that selective checkpointing intercepts cost more. Elementwise work has a cost for each byte.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from veneer.adapters.peft_model import get_peft_model
from veneer.contract import MethodConfig
from veneer.model.memory.heap import freed_memory_kept
from veneer.plan.memory_trace import make_optimizer, prepare, trace
from veneer.plan.step import Batch, Step, as_accelerate
from veneer.plan.work import Work
from veneer.recipe.recipe import Recipe, parse_recipe

Clock = Callable[[], float]
WARM, TIMED = 2, 21
"""Steps: enough that some of them have the machine for themselves."""
LONGEST = 5.0
"""Seconds after which there are no more of them, where others use the cores."""
_SHORT, _LONG = Batch(n_rows=1, length=8), Batch(n_rows=4, length=128)
_TINY = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=2,
    num_key_value_heads=1, dtype=torch.bfloat16,
)  # fmt: skip
_WIDE = LlamaConfig(  # many tokens and short dot products: mostly elementwise work
    vocab_size=4096, hidden_size=192, intermediate_size=512, num_hidden_layers=2, num_attention_heads=3,
    num_key_value_heads=1, dtype=torch.bfloat16,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Timed:
    """Step that was both traced and run."""

    work: Work
    seconds: float


def op_seconds(general: bool) -> float:
    """Return the overhead of one op in seconds: in the model's own code if ``general``, otherwise in fused blocks.

    It is the time of a step with almost no arithmetic, divided by the number of ops in its trace.
    """
    with _one_thread():
        step = _timed(_TINY, _recipe(general, _SHORT), _SHORT, time.thread_time)
    return step.seconds / step.work.n_ops


def watched_seconds(op: float) -> float:
    """Return the seconds that selective checkpointing adds to one op that it intercepts, in the model's own code.

    ``op`` is the overhead of an op that is not intercepted. A step with selective checkpointing is timed, ``op`` is
    subtracted for each of its ops, and the rest is divided by the intercepted ops.
    """
    with _one_thread():
        step = _timed(_TINY, _recipe(True, _SHORT, "selective"), _SHORT, time.thread_time)
    return max(0.0, step.seconds - op * step.work.n_ops) / step.work.n_watched


def byte_seconds(known: Callable[[Work], float], least: float) -> float:
    """Return the seconds for one byte that elementwise work reads or writes, at least ``least``.

    Steps of many tokens are timed, fused and not, and the seconds of their ``known`` work are subtracted.

    In a step such work is slower than a copy of large tensors (``least``). Its tensors are small, change their dtype,
    and use freshly allocated memory.
    """
    steps = [_timed(_WIDE, _recipe(general, _LONG), _LONG) for general in (False, True)]
    rest = sum(step.seconds - known(step.work) for step in steps)
    return max(least, rest / sum(step.work.moved for step in steps))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Enter a context in which torch computes on one thread. In such small steps several threads would wait for one
    another on busy cores.

    The CPU seconds of one thread are the same as on an idle machine.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _timed(config: LlamaConfig, recipe: Recipe, batch: Batch, clock: Clock = time.perf_counter) -> Timed:
    with torch.random.fork_rng(devices=[]):  # a run that plans first draws as one that does not
        args, adapter = recipe.training_config(), cast(MethodConfig, recipe.adapter_config())
        return Timed(trace(config, recipe, batch).work, _step_seconds(config, args, adapter, batch, clock))


def _recipe(general: bool, batch: Batch, checkpointing: bool | str = False) -> Recipe:
    return parse_recipe({
        "model": {"source": "none"}, "data": {"train": "none.jsonl"}, "output": "none",
        "adapter": {"method": "lora", "r": 4, "target_modules": "all-linear"},
        "training": {
            "fused": "off" if general else "auto", "gradient_checkpointing": checkpointing,
            "max_length": batch.length, "per_device_train_batch_size": batch.n_rows,
        },
    })  # fmt: skip


def _step_seconds(config: LlamaConfig, args: Any, adapter: MethodConfig, batch: Batch, clock: Clock) -> float:
    """Return the least seconds of a step by the clock, after the first few."""
    model = get_peft_model(LlamaForCausalLM(config).to(torch.bfloat16), adapter).train()
    prepare(model, args, with_values=True)
    inputs = batch.inputs(config.vocab_size)
    step = Step(model, make_optimizer(model, args), inputs, lambda mark: None, max_grad_norm=args.max_grad_norm or 0.0)
    found: list[float] = []
    with freed_memory_kept(), as_accelerate(model, torch.bfloat16):
        deadline = time.perf_counter() + LONGEST
        while len(found) < WARM + TIMED and (len(found) <= WARM or time.perf_counter() < deadline):
            began = clock()
            step.run()
            found.append(clock() - began)
    return min(found[WARM:])
