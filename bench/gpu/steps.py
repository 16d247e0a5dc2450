"""Stage 4: LoRA training steps on a GPU, veneer's against PEFT's, over bases of random weights; optimizers.

    python -m bench.gpu.steps 1b|8b dense|nf4|dropout|dora|liger|optimizers [--rehearse]

Both sides must compute the same before times are given, but where dropout draws masks. liger: PEFT's model with the
kernels of Liger. Without PEFT, or bitsandbytes for NF4, veneer's side is measured alone, as NF4 is on the CPU.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import veneer
from bench.gpu.runner import figure, skip
from bench.gpu.timing import peak_bytes, seconds_of
from bench.lora_step import SIDES, adapted, base_of, optimizer_of, require_fused, step
from bench.same import course, require_same, saved, stir
from veneer.optim import AdamW8bit

TOLERANCE = 0.02  # between the losses of both sides, in any step
SHAPES = {  # width, inner width, layers, heads, classes
    "tiny": (256, 384, 2, 4, 211),
    "0.7b": (2048, 5632, 12, 32, 32000),
    "1b": (2048, 8192, 16, 32, 128256),
    "8b": (4096, 14336, 32, 32, 128256),
}
SETTINGS: dict[str, dict[str, Any]] = {"dropout": {"lora_dropout": 0.1}, "dora": {"use_dora": True}}
ROWS, LENGTH, N_STEPS = 4, 1024, 20


@dataclass(frozen=True, slots=True)
class Result:
    """Result of one side: its losses, the median seconds of a step, and the most memory that a step held, in bytes."""

    losses: list[float]
    seconds: float
    peak: int
    tokens: int  # of a step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SHAPES)
    parser.add_argument("what", choices=("dense", "nf4", "dropout", "dora", "liger", "optimizers"))
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    device = torch.device("cpu" if args.rehearse else "cuda")
    if args.what == "optimizers":
        for name, run, count in optimizers(device, args.rehearse):
            figure(name, parameters=count, ms=seconds_of(run, device) * 1e3)
        return 0
    if args.what == "liger" and find_spec("liger_kernel") is None:
        skip("liger_kernel is not installed")
    try:
        return _compared("tiny" if args.rehearse else args.size, args.what, device)
    except torch.OutOfMemoryError as error:
        skip(f"the card is too small: {error}")


def _compared(size: str, what: str, device: torch.device) -> int:
    """Print the figures of each side; return 1 if the losses part."""
    tiny = size == "tiny"
    with tempfile.TemporaryDirectory() as name:
        width, inner, layers, _, classes = SHAPES[size]
        n_bytes = 2 * (layers * width * (3 * inner + 3 * width) + 2 * classes * width)
        if shutil.disk_usage(name).free < 1.2 * n_bytes:
            skip(f"the folder {name} has no room for a model of {n_bytes / 1e9:.0f} GB")
        place = Path(name)
        random_llama(place, size, device)
        found = compare(what, place, device, tiny)
    for side, result in found.items():
        tokens = result.tokens / result.seconds
        figure(
            side, ms=result.seconds * 1e3, tokens_per_s=tokens, peak_mb=result.peak / 1e6,
            first_loss=result.losses[0], last_loss=result.losses[-1],
        )  # fmt: skip
    losses = [result.losses for result in found.values()]
    apart = max(abs(a - b) for a, b in zip(losses[0], losses[-1], strict=True))
    if len(found) == 2:
        ours, peer = found["veneer"], found["peer"]
        figure("veneer beside the peer", ratio=peer.seconds / ours.seconds, losses_apart=apart)
    return int(what != "dropout" and not apart <= TOLERANCE)


def random_llama(folder: Path, size: str, device: torch.device | None = None) -> None:
    """Save a Llama with random weights, made on a device: what a step costs does not depend on them."""
    width, inner, layers, heads, classes = SHAPES[size]
    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads // 4, vocab_size=classes, tie_word_embeddings=False, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    with device or torch.device("cpu"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def batches(place: Path, device: torch.device, tiny: bool) -> list[Tensor]:
    """One batch again and again: a loss that falls shows that the step trains."""
    classes = transformers.AutoConfig.from_pretrained(place).vocab_size
    shape = (2, 19) if tiny else (ROWS, LENGTH)
    ids = torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(1))
    return [ids.to(device)] * (4 if tiny else N_STEPS)


def compare(what: str, place: Path, device: torch.device, tiny: bool) -> dict[str, Result]:
    """The sides that are here, from the same factors. SystemExit where they do not compute the same from factors that
    change the logits, or where veneer does not run fused.
    """
    base = "nf4" if what == "nf4" else "dense"
    rows = batches(place, device, tiny)
    start: dict[str, Tensor] = {}
    moved: dict[str, Tensor] = {}
    results, courses = {}, []
    needed = ("peft", "bitsandbytes") if base == "nf4" else ("peft",)
    repacks = base == "nf4" and device.type == "cpu"  # bitsandbytes does after eval(), to other values at tiny sizes
    sides = SIDES if all(map(find_spec, needed)) and not repacks else SIDES[-1:]
    for side in sides:
        if side == "peer" and what == "liger":
            from liger_kernel.transformers import apply_liger_kernel_to_llama  # a peer, if it is there

            apply_liger_kernel_to_llama()
        loaded = base_of(side, base, str(place), device_map={"": device})
        torch.manual_seed(2)
        model = adapted(side, loaded, **SETTINGS.get(what, {}))
        if side == "veneer":
            require_fused(model)
        if len(sides) == 2 and what != "dropout":
            put = _put(side)
            if side == "peer":
                start = saved(model)
                moved = saved(stir(model))
            else:
                put(model, moved)
            courses.append(course(side, model, rows[0][:1, :64]))
            put(model, start)
            if side == SIDES[-1]:
                require_same(f"{what}", *courses)
        results[side] = _train(side, model, rows)
        del model, loaded
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return results


def _put(side: str) -> Callable[[Any, dict[str, Tensor]], Any]:
    if side == "veneer":
        return veneer.set_peft_model_state_dict
    import peft  # not above: a rented machine may lack it

    return peft.set_peft_model_state_dict  # type: ignore[no-any-return]


def _train(side: str, model: Any, rows: list[Tensor]) -> Result:
    optimizer = optimizer_of(model)
    losses, times = [], []
    with peak_bytes(rows[0].device) as peak:
        for ids in rows:
            start = time.perf_counter()
            losses.append(step(side, model, optimizer, ids))
            times.append(time.perf_counter() - start)
    return Result(losses, statistics.median(times[len(times) // 4 :]), peak(), rows[0].numel())


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


if __name__ == "__main__":
    sys.exit(main())
