"""The article's snippet 9 as it stands, against PEFT with the same settings: a training step of each, in turns.

The snippet is ``FastLanguageModel.from_pretrained(name, max_seq_length, load_in_4bit=True)`` and ``.get_peft_model``
with rank 16, alpha 32, no dropout and the seven projections; everything else stands at its default. PEFT's side loads
the base in the same 4-bit form (bitsandbytes, or not at all with --base dense) and does not recompute. Both start from
the same factors, which change the logits: logits, gradients and losses are compared before anything is timed. Beside
the snippet stand its model without recomputation and with recomputation of whole blocks (True), which says what the
default chose.

    python -m bench.training.snippet9 [--model smollm2-135m-instruct] [--base nf4|dense] [--dtype float32|bfloat16]
        [--rows 4] [--tokens 256] [--repeats 5] [--tiny]
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.lora_step import adapted_by, base_of, optimizer_of
from bench.report import quiet_libraries
from bench.same import course, require_same, stir
from bench.tiny_model import write_tiny
from bench.training.train_sides import same_start
from bench.turns import Goal, Timing, faster_dtype, in_turns, show, timed
from veneer import FastLanguageModel
from veneer.store.source import resolve

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SETTINGS = {"r": 16, "lora_alpha": 32, "target_modules": list(SEVEN), "lora_dropout": 0}
AS_IT_STANDS = "veneer, as it stands"


def main() -> None:
    args = arguments()
    quiet_libraries()
    logging.getLogger("veneer.model.fused.activation_memory").setLevel(logging.INFO)
    logging.basicConfig(format="%(message)s")
    with tempfile.TemporaryDirectory() as folder:
        place = write_tiny(Path(folder)) if args.tiny else str(resolve(args.model))
        measure(place, args)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--base", choices=["nf4", "dense"], default="nf4")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of both sides; the faster one of this CPU")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model: a run through, no measurement")
    return parser.parse_args()


def measure(place: str, args: argparse.Namespace) -> None:
    dtype = getattr(torch, args.dtype) if args.dtype else faster_dtype()
    peer = adapted_by("peer", base_of("peer", args.base, place, dtype, **double(args.base)), "LoraConfig", SETTINGS)
    stir(peer)
    models = {"PEFT": peer} | {
        name: snippet(place, args.base, dtype, options)
        for name, options in (
            (AS_IT_STANDS, {}),
            ("veneer, nothing recomputed", {"use_gradient_checkpointing": False}),
            ("veneer, blocks recomputed", {"use_gradient_checkpointing": True}),
        )
    }
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, peer.config.vocab_size, (args.rows, args.tokens), generator=generator)
    theirs = course("peer", peer, ids)
    for name, model in models.items():
        if model is not peer:
            same_start(model, peer)
            require_same(f"PEFT and {name}", theirs, course("peer", model, ids))  # by the model's own loss, as timed
    steps = {name: stepper(model, ids) for name, model in models.items()}
    ways: dict[str, Callable[[], Timing]] = {name: lambda step=step: timed(step) for name, step in steps.items()}
    taken = in_turns(ways, args.repeats)
    title = f"snippet 9: {args.rows} x {args.tokens} tokens, {args.base} base, {str(dtype).removeprefix('torch.')}"
    show(title, taken, "PEFT", {AS_IT_STANDS: Goal("PEFT", 1.0)})
    print(f"PEFT takes {taken['PEFT'].wall / taken[AS_IT_STANDS].wall:.2f}x the time of the snippet as it stands")


def double(base: str) -> dict[str, Any]:
    """The options of `base_of` that match the snippet's 4-bit loading: the scales quantized too."""
    return {"double_quant": True} if base == "nf4" else {}


def snippet(place: str, base: str, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """The article's model."""
    model, _ = FastLanguageModel.from_pretrained(
        model_name=place, max_seq_length=512, load_in_4bit=base == "nf4", dtype=dtype
    )
    return FastLanguageModel.get_peft_model(model, **{**SETTINGS, **options})


def stepper(model: Any, ids: Tensor) -> Callable[[], float]:
    """A step as a trainer takes it: the model's own loss, backward, AdamW."""
    optimizer = optimizer_of(model)

    def step() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        found: float = loss.item()
        return found

    return step


if __name__ == "__main__":
    main()
