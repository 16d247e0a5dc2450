"""A LoRA training step on a GPU: veneer against PEFT, and against PEFT with bitsandbytes over an NF4 base."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import veneer
from bench.lora_step import SIDES, adapted, base_of, optimizer_of, require_fused, step
from bench.same import course, require_same, saved, stir
from veneer.optim import AdamW8bit

TOLERANCE = 0.02  # between the losses of both sides, in any step


@dataclass(frozen=True, slots=True)
class Result:
    """Result of one side: its losses, the median seconds of a step, and the most memory that a step held, in bytes."""

    losses: list[float]
    seconds: float
    peak: int


def random_llama(folder: Path, tiny: bool) -> None:
    """Save a Llama with random weights: what a step costs does not depend on them."""
    sizes = (64, 96, 2, 4, 211) if tiny else (2048, 5632, 12, 32, 32000)
    width, inner, layers, heads, classes = sizes
    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads // 4, vocab_size=classes, tie_word_embeddings=False, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def batches(place: Path, device: torch.device, tiny: bool) -> list[Tensor]:
    """One batch again and again: a loss that falls shows that the step trains."""
    classes = transformers.AutoConfig.from_pretrained(place).vocab_size
    ids = torch.randint(0, classes, (2, 19) if tiny else (4, 1024), generator=torch.Generator().manual_seed(1))
    return [ids.to(device)] * (4 if tiny else 20)


def compare(base: str, place: Path, device: torch.device, tiny: bool) -> dict[str, Result]:
    """Both sides over a "dense" or an "nf4" base, from the same factors. SystemExit where they do not compute the same
    from factors that change the logits, or where veneer does not run fused.
    """
    import peft  # not above: a rented machine may lack it

    rows = batches(place, device, tiny)
    start: dict[str, Tensor] = {}
    moved: dict[str, Tensor] = {}
    results, courses = {}, []
    for side in SIDES:
        loaded = base_of(side, base, str(place), device_map={"": device})
        torch.manual_seed(2)
        model = adapted(side, loaded)
        put = peft.set_peft_model_state_dict if side == "peer" else veneer.set_peft_model_state_dict
        if side == "peer":
            start = saved(model)
            moved = saved(stir(model))
        else:
            require_fused(model)
            put(model, moved)
        courses.append(course(side, model, rows[0][:1, :64]))
        put(model, start)
        if side == SIDES[-1]:
            require_same(f"{base} base", *courses)
        results[side] = _train(side, model, rows)
        del model, loaded
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return results


def _train(side: str, model: Any, rows: list[Tensor]) -> Result:
    optimizer = optimizer_of(model)
    losses, times = [], []
    with peak_bytes(rows[0].device) as peak:
        for ids in rows:
            start = time.perf_counter()
            losses.append(step(side, model, optimizer, ids))
            times.append(time.perf_counter() - start)
    return Result(losses, statistics.median(times[len(times) // 4 :]), peak())


@contextmanager
def peak_bytes(device: torch.device) -> Iterator[Callable[[], int]]:
    """The number of bytes held at most above those at the start; 0 where the device does not count them."""
    if device.type != "cuda":
        yield lambda: 0
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield lambda: torch.cuda.max_memory_allocated() - before


def optimizers(device: torch.device, tiny: bool) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """Yield each AdamW: its name, a step over a matrix and many factors, and its parameters' count."""
    shapes = [(67, 71)] * 2 if tiny else [(4096, 4096)] + [(16, 2048)] * 200
    kinds: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
        "torch AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
        "veneer AdamW8bit": lambda parameters: AdamW8bit(parameters, lr=1e-3),
    }
    if find_spec("bitsandbytes") is not None:
        import bitsandbytes as bnb

        kinds["bitsandbytes AdamW8bit"] = lambda parameters: bnb.optim.AdamW8bit(parameters, lr=1e-3)
    for name, build in kinds.items():
        parameters = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter) * 1e-3
        yield name, build(parameters).step, sum(p.numel() for p in parameters)
