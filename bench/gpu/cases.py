"""The cases of a run on a rented card, in order of worth: what stands first is known if the time ends early."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from bench.gpu.runner import Case

STAGES = (
    "the machine",
    "commands: losses and answers beside the CPU's",
    "values of every kernel, against float64",
    "times of every kernel",
    "training steps",
    "serving",
    "tiles of attention",
)
TRAINED = ("dense", "nf4", "paged", "dropout", "dora", "packed", "galore", "int8", "dpo")
KERNELS = ("attention", "four_bit", "norms", "head", "int8", "pairs", "paged_attention", "draws", "fused")
STEPS = (
    ("1b", "dense"), ("1b", "nf4"), ("1b", "dropout"), ("8b", "nf4"), ("8b", "dense"), ("1b", "dora"),
    ("1b", "liger"),
)  # fmt: skip
SERVED = ((0, "lora"), (1, "lora"), (8, "lora"), (32, "lora"), (8, "dora"), (32, "dora"))  # adapters of a method


def cases(rehearsed: bool) -> Iterator[Case]:
    """Every case. Rehearsed, each runs at tiny sizes on the CPU, with kernels in Triton's interpreter."""

    def case(stage: int, name: str, module: str, *words: str, limit: float) -> Case:
        command = (sys.executable, "-m", f"bench.gpu.{module}", *words, *(["--rehearse"] if rehearsed else []))
        return Case(stage, name, command, limit * (10 if rehearsed else 1))  # the interpreter is slow

    yield case(0, "machine", "machine", limit=60)
    for what in TRAINED:
        yield case(1, f"train, {what}", "commands", "train", what, limit=90)
    for what in ("generate", "eval", "serve"):
        yield case(1, what, "commands", what, limit=90)
    for what in KERNELS:
        yield case(2, f"values, {what}", "kernels", "values", what, limit=60)
    for what in KERNELS:
        yield case(2, f"memory, {what}", "kernels", "memory", what, limit=60)
    for what in KERNELS:
        yield case(3, f"times, {what}", "kernels", "times", what, limit=90)
    for size, what in STEPS:
        yield case(4, f"step, {size}, {what}", "steps", size, what, limit=240)
    yield case(4, "optimizers", "steps", "1b", "optimizers", limit=60)
    for count, method in SERVED:
        name = f"serve, {count} of {method}" if count else "serve, base"
        yield case(5, name, "serving", str(count), method, limit=150)
    for head_dim in (64, 128, 256):
        yield case(6, f"tiles, {head_dim}", "tiles", str(head_dim), limit=150)
