"""Training steps of mixtures with LoRA, beside a dense model of equal active size, and beside transformers and PEFT.

A step is the forward and the backward pass of a Qwen3-MoE: with LoRA on attention alone, and on attention and experts
(PEFT's `target_parameters`). Both sides have the same weights and adapter. Before they are timed, the logits of most
tokens agree: of nearly equal scores rounding in 16 bits may choose another expert, so that a few differ. Times are CPU
milliseconds of one thread, in turns, medians; weights are random.

    python -m bench.training.mixtures [--dtype bfloat16] [--tokens 4x256] [--rounds 3] [--sizes 512,2048]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bench.report import Rows, quiet_libraries
from bench.serving.mixtures import Size, config_of, require_alike
from veneer import LoraConfig, get_peft_model
from veneer.model.fused.decoder import fuse
from veneer.ops.cpu.module import description

SIZES = (Size(512, 256, 32, 4, 4), Size(512, 128, 128, 8, 4), Size(2048, 512, 32, 4, 1), Size(2048, 256, 128, 8, 1))
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
RANK = 16
COLUMNS = ("PEFT", "veneer", "PEFT / veneer", "dense", "veneer / dense")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--tokens", default="4x256")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", default="512,2048")
    args = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    dtype, (n, t) = getattr(torch, args.dtype), map(int, args.tokens.split("x"))
    sizes = [size for size in SIZES if str(size.hidden) in args.sizes.split(",")]
    print(f"kernels: {description()}; torch {torch.__version__}; {args.dtype}; CPU milliseconds of one thread a step")
    table = Rows([f"{size}, {what}" for size in sizes for what in ("attention", "and experts")], COLUMNS)
    ids = torch.randint(0, 512, (n, t), generator=torch.Generator().manual_seed(1))
    for size in sizes:
        dense = ours(size, dtype, experts=False, dense=True)
        for experts in (False, True):
            table.add(
                f"{size}, {'and experts' if experts else 'attention'}",
                *row(size, dtype, experts, dense, ids, args.rounds),
            )


def base(size: Size, dtype: torch.dtype, *, dense: bool = False) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(size, dense=dense)).to(dtype)
    model.requires_grad_(False)
    return model


def ours(size: Size, dtype: torch.dtype, *, experts: bool, dense: bool = False) -> Any:
    """A fused model with an adapter, whose B is not zero; a dense one has it on all layers."""
    targets = "all-linear" if dense else ATTENTION
    config = LoraConfig(r=RANK, target_modules=targets, target_parameters=EXPERTS if experts else None)
    model = get_peft_model(base(size, dtype, dense=dense), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
    if not fuse(model):
        raise SystemExit("the model does not fuse, and is not timed")
    return model.train()


def row(size: Size, dtype: torch.dtype, experts: bool, dense: Any, ids: Tensor, rounds: int) -> list[str]:
    model = ours(size, dtype, experts=experts)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        theirs = peft.PeftModel.from_pretrained(base(size, dtype), folder, is_trainable=True).train()
    with torch.no_grad():
        found, right = (side(input_ids=ids, use_cache=False).logits.flatten(0, 1) for side in (model, theirs))
        require_alike(found + 0, right, dtype)
    own, mine, like = cpu_ms([lambda: step(theirs, ids), lambda: step(model, ids), lambda: step(dense, ids)], rounds)
    return [f"{own:.0f}", f"{mine:.0f}", f"{own / mine:.1f}", f"{like:.0f}", f"{mine / like:.2f}"]


def step(model: Any, ids: Tensor) -> None:
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def cpu_ms(runs: list[Callable[[], None]], rounds: int) -> list[float]:
    """CPU milliseconds of each run, in turns, after one that is not timed."""
    for run in runs:
        run()
    found = [list[float]() for _ in runs]
    for _ in range(rounds):
        for run, own in zip(runs, found, strict=True):
            start = time.process_time()
            run()
            own.append(1e3 * (time.process_time() - start))
    return [median(own) for own in found]


if __name__ == "__main__":
    main()
