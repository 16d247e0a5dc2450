"""A training step of the methods of linear layers, beside PEFT's and beside LoRA with as many trained numbers.

    python -m bench.training.every_method [--only miss oft …] [--base dense|nf4] [--model smollm2-135m-instruct]
        [--rows 4] [--tokens 256] [--repeats 3] [--tiny]

PEFT makes an adapter on the seven projections and moves its parameters until they change the logits; veneer opens its
folder. Logits, gradients and losses of 64 tokens must agree before anything is timed, in evaluation mode. Then PEFT's
step, ours and that of our LoRA of the rank that trains about as many numbers take turns. Prints a line a method when it
is measured. A method whose two sides part, or that PEFT does not train on an NF4 base, has a line that says so.

Exit status: 0 done, 1 one has parted or a goal is missed.

PEFT's gradient of C3A in the inputs is that of another function; it is mended here. Left out: AdaLoRA, whose masks move
between steps; Poly, which needs tasks; Arrow, which needs saved adapters.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import veneer
from bench.lora_step import adapted_by, base_of, optimizer_of, require_fused, step
from bench.report import add_keep, ends_as_interrupted, keep, quiet_libraries, working
from bench.same import PartedError, course, require_same, stir
from bench.tiny_model import write_tiny
from bench.training.methods import tokens_of
from bench.training.snippet9 import SEVEN
from bench.turns import Timing, faster_dtype, in_turns, timed
from veneer.errors import VeneerError
from veneer.model.fused.decoder import fuse
from veneer.ops.cpu.module import description
from veneer.store.source import resolve


@dataclass(frozen=True)
class Method:
    """A method's config, its fields, and how much longer than LoRA's its step may take; None: told alone."""

    config: str
    fields: dict[str, Any]
    goal: float | None


METHODS = {
    "lora": Method("LoraConfig", {"r": 16}, 1.15),
    "dora": Method("LoraConfig", {"r": 16, "use_dora": True}, 1.15),
    "ia3": Method("IA3Config", {"feedforward_modules": ["down_proj"]}, 1.15),
    "vera": Method("VeraConfig", {"r": 64}, 1.15),
    "pvera": Method("PveraConfig", {"r": 64}, 1.15),
    "loha": Method("LoHaConfig", {"r": 4}, 1.15),
    "hra": Method("HRAConfig", {"r": 8}, 1.15),
    "oft": Method("OFTConfig", {"oft_block_size": 32}, 1.15),
    "boft": Method("BOFTConfig", {"boft_block_size": 8, "boft_n_butterfly_factor": 1}, 1.15),
    "road": Method("RoadConfig", {"group_size": 64}, 1.15),
    "miss": Method("MissConfig", {"r": 16}, 1.15),
    "beft": Method("BeftConfig", {}, 1.15),
    "delora": Method("DeloraConfig", {"r": 16}, 1.15),
    "gralora": Method("GraloraConfig", {"r": 16, "gralora_k": 2}, 1.15),
    "deft": Method("DeftConfig", {"r": 16}, 1.15),
    "psoft": Method("PsoftConfig", {"r": 16}, 1.15),
    "adamss": Method("AdamssConfig", {"subspace_rank": 4}, 1.15),
    "randlora": Method("RandLoraConfig", {"r": 32}, 1.15),
    "frod": Method("FrodConfig", {"progressbar": False}, 1.15),
    "osf": Method("OSFConfig", {}, 1.15),
    "vblora": Method("VBLoRAConfig", {"r": 4, "num_vectors": 256, "vector_length": 64}, 1.15),
    "unilora": Method("UniLoraConfig", {"r": 4}, 1.15),
    "tinylora": Method("TinyLoraConfig", {"u": 16}, 1.15),
    "lokr": Method("LoKrConfig", {"r": 8}, 1.3),
    "c3a": Method("C3AConfig", {"block_size": 64}, 1.3),
    "shira": Method("ShiraConfig", {"r": 16}, 1.3),
    "supertuning": Method("SupertuningConfig", {"sparsity": 0.96, "r": 4}, 1.3),
    "fourierft": Method("FourierFTConfig", {"n_frequency": 1000}, None),
    "waveft": Method("WaveFTConfig", {"n_frequency": 1000}, None),
    "hira": Method("HiraConfig", {"r": 16}, None),
    "peanut": Method("PeanutConfig", {"r": 16}, None),
    "velora": Method("LoraConfig", {"r": 16, "velora_config": {}}, None),
    "monteclora": Method("LoraConfig", {"r": 16, "monteclora_config": {"buffer_size": 2}}, None),
    "glora": Method("GloraConfig", {"r": 8}, None),
    "lily": Method("LilyConfig", {"r": 16}, None),
}


def main() -> None:
    args = arguments()
    ends_as_interrupted()
    quiet_libraries()
    missed = []
    with tempfile.TemporaryDirectory() as name, c3a_mended():
        args.place = write_tiny(Path(name) / "model") if args.tiny else str(resolve(args.model))
        args.dtype = faster_dtype()
        where = f"{args.base} base, {args.dtype}, {args.rows} x {args.tokens} tokens"
        print(f"kernels: {description()}; torch {torch.__version__}; {where}")
        print(f"{'':10}  {'trained':>10} {'PEFT, s':>8} {'veneer, s':>9}  of PEFT  of LoRA (rank)", flush=True)
        figures: dict[str, float] = {}
        for method in args.only:
            working(method)
            try:
                found = measured(args, METHODS[method], Path(name) / method)
            except (VeneerError, ValueError, RuntimeError, PartedError) as error:  # a line, not the end of the others
                print(f"{method:10}  {type(error).__name__}: {str(error)[:900]}", flush=True)
                missed.append(method)
                continue
            figures |= show(method, *found)
            goal = METHODS[method].goal
            if figures[f"{method} / PEFT"] > 1 or (goal is not None and figures[f"{method} / LoRA"] > goal):
                missed.append(method)
    keep(args.keep, figures | summary(figures))
    if missed:
        sys.exit(f"slower than a goal, or parted: {', '.join(missed)}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--base", choices=["dense", "nf4"], default="dense")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model: a run through, no measurement")
    add_keep(parser)
    return parser.parse_args()


def measured(args: argparse.Namespace, method: Method, folder: Path) -> tuple[int, int, bool, dict[str, Timing]]:
    """Trained numbers, LoRA's rank, whether our blocks are fused, and the timings.

    Raises PartedError where the sides do not compute the same.
    """
    peer, ours = pair_of(args, method, folder)
    check = tokens_of(ours, 1, 64)
    theirs, own = (course(side, model.eval(), check) for side, model in (("peer", peer), ("veneer", ours)))
    require_same(folder.name, theirs, own)
    trained = sum(p.numel() for p in ours.parameters() if p.requires_grad)
    lora, rank = lora_like(args, trained)
    ids = tokens_of(ours, args.rows, args.tokens)
    ways = {}
    for title, side, model in (
        ("PEFT", "peer", peer.train()),
        ("veneer", "veneer", ours.train()),
        ("LoRA", "veneer", lora),
    ):
        optimizer = optimizer_of(model)
        ways[title] = lambda side=side, model=model, optimizer=optimizer: timed(
            lambda: step(side, model, optimizer, ids)
        )
    return trained, rank, fuse(ours), in_turns(ways, args.repeats)


@contextmanager
def c3a_mended() -> Iterator[None]:
    """Give PEFT's C3A the gradient of its forward pass in the inputs for a while; PEFT's own is another function's."""
    from peft.tuners.c3a.utils import BlockCircularConvolution

    right = BlockCircularConvolution.backward

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, w = ctx.saved_tensors
        blocks = torch.fft.fft(grad.reshape(*grad.shape[:-1], len(w), w.shape[-1]).to(w.dtype))
        dx = torch.fft.ifft(torch.einsum("...mb,mnb->...nb", blocks, torch.fft.fft(w))).real
        return dx.flatten(-2).to(x.dtype), right(ctx, grad)[1]

    BlockCircularConvolution.backward = staticmethod(backward)
    try:
        yield
    finally:
        BlockCircularConvolution.backward = staticmethod(right)


def pair_of(args: argparse.Namespace, method: Method, folder: Path) -> tuple[Any, Any]:
    """PEFT's model with an adapter that tells, and ours with the same one."""
    fields = {"target_modules": list(SEVEN), **method.fields}
    peer = adapted_by("peer", base_of("peer", args.base, args.place, args.dtype), method.config, fields)
    stir(peer).save_pretrained(folder)
    base = base_of("veneer", args.base, args.place, args.dtype)
    return peer, veneer.PeftModel.from_pretrained(base, folder, is_trainable=True)


def lora_like(args: argparse.Namespace, trained: int) -> tuple[Any, int]:
    """Our LoRA, on fused blocks, of the rank from 1 to 64 that trains about as many numbers."""
    base = base_of("veneer", args.base, args.place, args.dtype)
    adapted = (module for name, module in base.named_modules() if name.rpartition(".")[2] in SEVEN)
    a_rank = sum(module.in_features + module.out_features for module in adapted)
    rank = min(max(round(trained / a_rank), 1), 64)
    lora = adapted_by("veneer", base, "LoraConfig", {"r": rank, "target_modules": list(SEVEN)})
    require_fused(lora)
    return lora, rank


def summary(figures: dict[str, float]) -> dict[str, float]:
    """The least and the most of PEFT's time, and how many methods were timed."""
    ratios = [ratio for name, ratio in figures.items() if name.endswith(" / PEFT")]
    return {"least": min(ratios), "most": max(ratios), "methods": len(ratios)} if ratios else {}


def show(name: str, trained: int, rank: int, fused: bool, timings: dict[str, Timing]) -> dict[str, float]:
    theirs, own, lora = (timings[side].wall for side in ("PEFT", "veneer", "LoRA"))
    told = "" if fused else ", general path"
    print(
        f"{name:10}  {trained:10,} {theirs:8.3f} {own:9.3f}  {own / theirs:6.2f}x  {own / lora:6.2f}x ({rank}){told}",
        flush=True,
    )
    return {f"{name} / PEFT": own / theirs, f"{name} / LoRA": own / lora}


if __name__ == "__main__":
    main()
