"""A training step over a base that is cut over the GPUs of a machine, against DDP with a whole base in each.

    python -m bench.training.scale [--processes 2] [--rounds 7] [--model FOLDER] [--rehearse]

Dense (bfloat16) and NF4 bases, fused path, full checkpointing. Both sides take turns, after two steps each, and must
have the same losses to the bit before times are given. For each base: median seconds of a step on both sides, the most
memory that one held, the seconds that its gathers alone would take, and the part of those that computing hides.

--model: a checkpoint in place of a Llama of 0.7 billion random weights; two copies must fit each GPU.
--rehearse: the same at tiny sizes over gloo on the CPU: shows that the script runs, and no more.

Nothing of it has been measured yet.

Exit status: 0 done; 1 the sides differ; 3 there are fewer GPUs than processes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from bench.gpu.steps import random_llama
from bench.report import Rows, ends_as_interrupted, working
from bench.same import stir
from veneer import BitsAndBytesConfig, LoraConfig, get_peft_model, shard_base
from veneer.model.fused.decoder import fuse
from veneer.model.memory.checkpointing import checkpoint_fully
from veneer.store.source import load_model
from veneer.train.gradients import average, leave_apart
from veneer.train.launcher import launched

NO_GPUS = 3  # exit status
WARM = 2  # steps before the first that is timed
COLUMNS = ("ddp s", "fsdp s", "ratio", "ddp GB", "fsdp GB", "gathers s", "hidden")


def main() -> int:
    args = arguments()
    if args.rank_of is not None:
        return measure(args)
    if not args.rehearse and torch.cuda.device_count() < args.processes:
        there = torch.cuda.device_count()
        print(f"bench.training.scale: {there} GPUs here, {args.processes} wanted; nothing was measured.")
        return NO_GPUS
    ends_as_interrupted()
    with tempfile.TemporaryDirectory() as folder:
        place = args.model or Path(folder)
        if args.model is None:
            random_llama(place, "tiny" if args.rehearse else "0.7b")
        return launched(
            [sys.executable, "-m", "bench.training.scale", *sys.argv[1:], "--rank-of", str(place)], args.processes
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(args: argparse.Namespace) -> int:
    """Measure in one of the processes; the first prints. Return 1 if the sides differ."""
    distributed.init_process_group("gloo" if args.rehearse else "nccl")
    rank = distributed.get_rank()
    device = torch.device("cpu") if args.rehearse else torch.device("cuda", rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    rows = Rows(["dense", "nf4"], COLUMNS) if rank == 0 else None
    differing = False
    for base in ("dense", "nf4"):
        if rank == 0:
            working(base)
        sides = [Side(args, base, device, is_cut=is_cut) for is_cut in (False, True)]
        for _ in range(WARM + args.rounds):
            for side in sides:
                side.step()
        whole, cut = sides
        differing |= whole.losses != cut.losses
        ddp, fsdp = (statistics.median(side.seconds[WARM:]) for side in sides)
        gathers = statistics.median(timed(cut.gather, device) for _ in range(args.rounds))
        if rows is not None:
            hidden = 1 - (fsdp - ddp) / gathers
            rows.add(
                base, f"{ddp:.3f}", f"{fsdp:.3f}", f"{fsdp / ddp:.2f}", f"{whole.peak / 1e9:.2f}",
                f"{cut.peak / 1e9:.2f}", f"{gathers:.3f}", f"{hidden:.0%}",
            )  # fmt: skip
        del sides, whole, cut, side
    if rows is not None and differing:
        print("failed: losses of the two sides differ")
    distributed.barrier()
    distributed.destroy_process_group()
    return int(differing)


class Side:
    """A model, its optimizer, and what its steps took."""

    def __init__(self, args: argparse.Namespace, base: str, device: torch.device, *, is_cut: bool) -> None:
        self.device, self.peak = device, 0
        self.losses: list[float] = []
        self.seconds: list[float] = []
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if base == "nf4" else None
        model: Any = load_model(args.rank_of, quantization=quantization, device=device).requires_grad_(False)
        torch.manual_seed(2)
        model = stir(get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))).train()
        checkpoint_fully(model)
        if not fuse(model):
            raise SystemExit("the model does not run fused")
        self.blocks = model.base_model.layers
        self.block_bytes = sum(tensor.nbytes for tensor in _frozen(self.blocks))
        self.model = shard_base(model) if is_cut else model
        self.joined = DistributedDataParallel(self.model, broadcast_buffers=False)
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        shape = (2, 19) if args.rehearse else (4, 1024)
        generator = torch.Generator().manual_seed(distributed.get_rank())
        self.ids: Tensor = torch.randint(0, model.config.vocab_size, shape, generator=generator).to(device)

    def step(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        self.seconds.append(timed(self._step, self.device))
        if self.device.type == "cuda":
            held = sum(tensor.nbytes for tensor in _frozen(self.blocks))
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() - before + held)

    def _step(self) -> None:
        leave_apart(self.joined, share_buffers=False)
        loss = self.joined(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        average(self.model)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())

    def gather(self) -> None:
        """Gather as many bytes as a step does, block by block, and compute nothing."""
        n = distributed.get_world_size()
        part = torch.empty(self.block_bytes // len(self.blocks) // n, dtype=torch.uint8, device=self.device)
        whole = torch.empty(n * part.numel(), dtype=torch.uint8, device=self.device)
        for _ in range(2 * len(self.blocks)):
            distributed.all_gather_into_tensor(whole, part)


def timed(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of a call, begun by all processes together."""
    distributed.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _frozen(blocks: nn.Module) -> list[Tensor]:
    """Frozen tensors of blocks that this process holds: the own part of those that are cut."""
    held: list[Any] = [*(p for p in blocks.parameters() if not p.requires_grad), *blocks.buffers()]
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in held]


if __name__ == "__main__":
    sys.exit(main())
