"""Training steps with LoRA beside PEFT's with the same weights and adapter, and beside those of a dense model.

A step is the forward and the backward pass. Before a step is timed, the logits of most tokens agree, and so do the
losses. The adapter alone changes logits by several times what is allowed. Times are CPU milliseconds of one thread, and
milliseconds of the clock in brackets, in turns, medians.
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
from transformers import AutoModelForCausalLM, PretrainedConfig

from bench.report import quiet_libraries
from bench.serving.mixtures import require_alike
from veneer import LoraConfig, get_peft_model
from veneer.model.fused.decoder import fuse
from veneer.ops.cpu.module import description

COLUMNS = ("losses differ by", "PEFT", "veneer", "PEFT / veneer", "dense", "veneer / dense")
VOCABULARY = 512
_ALIKE = {torch.float32: 1e-6, torch.bfloat16: 2e-3}


def arguments(doc: str | None, sizes: str) -> argparse.Namespace:
    """Return the options of a benchmark, with the dtype and the ``ids`` that they name, and print what computes.

    ``sizes`` are the hidden sizes that are measured by default.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--tokens", default="4x256")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", default=sizes)
    args = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    print(f"kernels: {description()}; torch {torch.__version__}; {args.dtype}; CPU milliseconds of one thread a step")
    n, t = map(int, args.tokens.split("x"))
    args.ids = torch.randint(0, VOCABULARY, (n, t), generator=torch.Generator().manual_seed(1))
    args.dtype, args.sizes = getattr(torch, args.dtype), [int(size) for size in args.sizes.split(",")]
    return args


def base(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    """Return a frozen model with random weights, the same in each call."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.requires_grad_(False)
    return model


def ours(config: PretrainedConfig, dtype: torch.dtype, lora: LoraConfig) -> Any:
    """Return a fused model with an adapter, whose B is not zero."""
    model = get_peft_model(base(config, dtype), lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
    if not fuse(model):
        raise SystemExit("the model does not fuse, and is not timed")
    return model.train()


def by_peft(model: Any, config: PretrainedConfig, dtype: torch.dtype) -> Any:
    """Return PEFT's model with the weights and the adapter of ``model``."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return peft.PeftModel.from_pretrained(base(config, dtype), folder, is_trainable=True)


def compared(theirs: Any, model: Any, dense: Any, ids: Tensor, rounds: int) -> list[str]:
    """Return the cells of `COLUMNS`. End the benchmark if the two sides do not agree."""
    model.eval(), theirs.eval()
    with torch.no_grad():
        found, right = (side(input_ids=ids, use_cache=False).logits.flatten(0, 1) + 0 for side in (model, theirs))
        require_alike(found, right, found.dtype)
        losses = [float(side(input_ids=ids, labels=ids, use_cache=False).loss) for side in (model, theirs)]
    apart = abs(losses[0] - losses[1]) / losses[1]
    if not apart <= _ALIKE[found.dtype]:
        raise SystemExit(f"the losses are {losses[0]:.6f} and {losses[1]:.6f}, and the sides are not timed")
    model.train(), theirs.train()
    gc.collect()
    gc.freeze()  # as `veneer train` does: collections do not walk through the libraries
    own, mine, like = _times([lambda: _step(theirs, ids), lambda: _step(model, ids), lambda: _step(dense, ids)], rounds)
    cells = [f"{cpu:.0f} ({wall:.0f})" for cpu, wall in (own, mine, like)]
    return [f"{apart:.0e}", cells[0], cells[1], f"{own[0] / mine[0]:.2f}", cells[2], f"{mine[0] / like[0]:.2f}"]


def _step(model: Any, ids: Tensor) -> None:
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def _times(runs: list[Callable[[], None]], rounds: int) -> list[tuple[float, float]]:
    """Return CPU milliseconds of each run and those of the clock, in turns, after one that is not timed."""
    for run in runs:
        run()
    found = [list[tuple[float, float]]() for _ in runs]
    for _ in range(rounds):
        for run, own in zip(runs, found, strict=True):
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            own.append((1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)))
    return [(median(cpu for cpu, _ in own), median(wall for _, wall in own)) for own in found]
