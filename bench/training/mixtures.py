"""Training steps of mixtures with LoRA, beside a dense model of equal active size, and beside transformers and PEFT.

A step is the forward and the backward pass of a Qwen3-MoE: with LoRA on attention alone, on experts alone (PEFT's
`target_parameters`), and on both. Both sides have the same weights and adapter. Before they are timed, the logits of
most tokens agree, and so do the losses: of nearly equal scores rounding in 16 bits may choose another expert, so that a
few tokens differ. Times are CPU milliseconds of one thread, and milliseconds of the clock in brackets, in turns,
medians; weights are random.

    python -m bench.training.mixtures [--dtype bfloat16] [--tokens 4x256] [--rounds 5] [--sizes 512,2048]
"""

from __future__ import annotations

import argparse
import gc
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
TARGETS = {"attention": (ATTENTION, None), "experts": (None, EXPERTS), "both": (ATTENTION, EXPERTS)}
COLUMNS = ("losses differ by", "PEFT", "veneer", "PEFT / veneer", "dense", "veneer / dense")
ALIKE = {torch.float32: 1e-6, torch.bfloat16: 2e-3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--tokens", default="4x256")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", default="512,2048")
    args = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    dtype, (n, t) = getattr(torch, args.dtype), map(int, args.tokens.split("x"))
    sizes = [size for size in SIZES if str(size.hidden) in args.sizes.split(",")]
    print(f"kernels: {description()}; torch {torch.__version__}; {args.dtype}; CPU milliseconds of one thread a step")
    table = Rows([f"{size}, {what}" for size in sizes for what in TARGETS], COLUMNS)
    ids = torch.randint(0, 512, (n, t), generator=torch.Generator().manual_seed(1))
    for size in sizes:
        dense = ours(size, dtype, LoraConfig(r=RANK, target_modules="all-linear"), dense=True)
        for what in TARGETS:
            table.add(f"{size}, {what}", *row(size, dtype, what, dense, ids, args.rounds))


def base(size: Size, dtype: torch.dtype, *, dense: bool = False) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(size, dense=dense)).to(dtype)
    model.requires_grad_(False)
    return model


def ours(size: Size, dtype: torch.dtype, config: LoraConfig, *, dense: bool = False) -> Any:
    """A fused model with an adapter, whose B is not zero."""
    model = get_peft_model(base(size, dtype, dense=dense), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
    if not fuse(model):
        raise SystemExit("the model does not fuse, and is not timed")
    return model.train()


def row(size: Size, dtype: torch.dtype, what: str, dense: Any, ids: Tensor, rounds: int) -> list[str]:
    modules, parameters = TARGETS[what]
    model = ours(size, dtype, LoraConfig(r=RANK, target_modules=modules, target_parameters=parameters))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        theirs = peft.PeftModel.from_pretrained(base(size, dtype), folder, is_trainable=True).train()
    with torch.no_grad():
        found, right = (side(input_ids=ids, use_cache=False).logits.flatten(0, 1) for side in (model, theirs))
        require_alike(found + 0, right, dtype)
        losses = [float(side(input_ids=ids, labels=ids, use_cache=False).loss) for side in (model, theirs)]
    apart = abs(losses[0] - losses[1]) / losses[1]
    if not apart <= ALIKE[dtype]:
        raise SystemExit(f"the losses are {losses[0]:.6f} and {losses[1]:.6f}, and the sides are not timed")
    gc.collect()
    gc.freeze()  # as `veneer train` does: collections do not walk through the libraries
    own, mine, like = times([lambda: step(theirs, ids), lambda: step(model, ids), lambda: step(dense, ids)], rounds)
    cells = [f"{cpu:.0f} ({wall:.0f})" for cpu, wall in (own, mine, like)]
    return [f"{apart:.0e}", cells[0], cells[1], f"{own[0] / mine[0]:.2f}", cells[2], f"{mine[0] / like[0]:.2f}"]


def step(model: Any, ids: Tensor) -> None:
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def times(runs: list[Callable[[], None]], rounds: int) -> list[tuple[float, float]]:
    """CPU milliseconds of each run and those of the clock, in turns, after one that is not timed."""
    for run in runs:
        run()
    found = [list[tuple[float, float]]() for _ in runs]
    for _ in range(rounds):
        for run, own in zip(runs, found, strict=True):
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            own.append((1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)))
    return [(median(cpu for cpu, _ in own), median(wall for _, wall in own)) for own in found]


if __name__ == "__main__":
    main()
