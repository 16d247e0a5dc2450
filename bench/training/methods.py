"""Training steps of other methods than plain LoRA, and LoRA with dropout, in turns with the peers' and with ours.

Three parts, each after a check that both sides compute the same:

dropout: the article's settings (r = 16, alpha = 32, the seven projections, dropout 0.05) in veneer, in PEFT, in
    veneer's SFTTrainer and in TRL's, beside the same without dropout. Logits, gradients and losses must be equal in
    evaluation mode, and the logits of training passes must vary as much on both sides. Goal: at most 1.05 of the time
    without dropout.
methods: DoRA and IA3 over a dense and an NF4 base, PEFT's beside ours. Logits, gradients and losses of three steps must
    agree. Goals: 1.15 (DoRA) and 1.0 (IA3) of our LoRA step.
mixed: eight rows of eight methods in one pass, beside eight rows of LoRA. Every member's losses and gradients must be
    those of the member alone. Goal: at most 1.15.

    python -m bench.training.methods [--parts dropout methods mixed] [--model smollm2-135m-instruct]
        [--dtype float32|bfloat16]
        [--bases dense nf4] [--rows 4] [--tokens 256] [--repeats 5] [--members lora rslora …] [--tiny]

Both sides compute in the dtype that this CPU multiplies faster, if none is given. peft, trl and bitsandbytes must be
there.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from bench.lora_step import SIDES, adapted_by, agree, base_of, optimizer_of, require_fused, step
from bench.report import add_keep, keep, quiet_libraries
from bench.same import course, require_same, stir
from bench.tiny_model import write_tiny
from bench.training.snippet9 import SEVEN
from bench.training.sweep import Make, alone, same_gradients, together
from bench.training.train_sides import BATCH, Row, same_start, side_of
from bench.turns import Goal, Timing, faster_dtype, in_turns, show, timed
from veneer.store.source import resolve

NAMES = {"peer": "PEFT", "veneer": "veneer"}
ARTICLE = {"r": 16, "lora_alpha": 32, "target_modules": list(SEVEN), "lora_dropout": 0.05}
LORA = {**ARTICLE, "lora_dropout": 0.0}
IA3 = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", LORA),
    "rslora": ("LoraConfig", {**LORA, "use_rslora": True}),
    "dora": ("LoraConfig", {**LORA, "use_dora": True}),
    "lora_bias": ("LoraConfig", {**LORA, "lora_bias": True}),
    "ia3": ("IA3Config", IA3),
    "vera": ("VeraConfig", {"r": 64, "target_modules": list(SEVEN)}),
    "adalora": ("AdaLoraConfig", {"init_r": 16, "target_r": 8, "total_step": 1000, "target_modules": list(SEVEN)}),
    "bottleneck": ("BottleneckConfig", {}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 16}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 16}),
}
MEMBERS = ("lora", "rslora", "dora", "lora_bias", "ia3", "vera", "adalora", "bottleneck")


def main() -> None:
    args = arguments()
    quiet_libraries()
    args.dtype = getattr(torch, args.dtype) if args.dtype else faster_dtype()
    with tempfile.TemporaryDirectory() as folder:
        args.place = write_tiny(Path(folder)) if args.tiny else str(resolve(args.model))
        figures: dict[str, float] = {}
        for part in args.parts:
            figures |= PARTS[part](args)
    keep(args.keep, figures)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--bases", nargs="+", choices=["dense", "nf4"], default=["dense", "nf4"], help="for methods")
    parser.add_argument("--rows", type=int, default=4, help="of a step; a mixed step has eight")
    parser.add_argument("--tokens", type=int, default=256, help="of a row")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps a side, behind one that is not counted")
    parser.add_argument("--members", nargs="+", choices=METHODS, default=list(MEMBERS), help="methods of a mixed step")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model: a run through, no measurement")
    add_keep(parser)
    return parser.parse_args()


def tokens_of(model: Any, n_rows: int, n_tokens: int) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (n_rows, n_tokens), generator=torch.Generator().manual_seed(1))


def where(args: argparse.Namespace, base: str, n_rows: int) -> str:
    return f"{base} base, {str(args.dtype).removeprefix('torch.')}, {n_rows} x {args.tokens} tokens"


# Dropout.


def dropout(args: argparse.Namespace) -> dict[str, float]:
    """The article's settings, with dropout and without."""
    models = {}
    for rate in (ARTICLE["lora_dropout"], 0.0):
        peer, ours = pair_of("dense", args, "LoraConfig", {**ARTICLE, "lora_dropout": rate})
        same_in_evaluation(f"dropout {rate}", peer, ours, tokens_of(ours, 2, min(args.tokens, 64)))
        if rate:
            same_variation(peer, ours, tokens_of(ours, 1, 8).expand(16, -1))
        for side, model in (("PEFT", peer), ("veneer", ours)):
            models[f"{side}, dropout {rate}"] = model
    ids = tokens_of(ours, args.rows, args.tokens)
    ways = {name: stepper("peer" if "PEFT" in name else "veneer", model, ids) for name, model in models.items()}
    ways |= trainers(args)
    rate = ARTICLE["lora_dropout"]
    goals = {
        f"veneer, dropout {rate}": Goal("veneer, dropout 0.0", 1.05),
        f"veneer's SFTTrainer, dropout {rate}": Goal(f"TRL's SFTTrainer, dropout {rate}", 1.0),
    }
    title = f"the article's settings: {where(args, 'dense', args.rows)} (trainers: {BATCH} rows)"
    return shown(title, in_turns(ways, args.repeats), "veneer, dropout 0.0", goals)


def shown(title: str, timings: dict[str, Timing], beside: str, goals: dict[str, Goal]) -> dict[str, float]:
    """Print a table; the time of each way with a goal, of that of the way that the goal names."""
    show(title, timings, beside, goals)
    return {name: timings[name].wall / timings[goal.name].wall for name, goal in goals.items()}


def trainers(args: argparse.Namespace) -> dict[str, Callable[[], Timing]]:
    """The second of two steps of `trainer.train()` with the article's settings."""
    row = Row(base="dense", trainer=True, peer="TRL's SFTTrainer + PEFT", dtype=args.dtype, settings=ARTICLE)
    sides = [side_of(side, row, args.place) for side in SIDES]
    ids = tokens_of(sides[0].model, 2 * BATCH, args.tokens).tolist()
    rows = Dataset.from_list([{"input_ids": row, "seq_lengths": [len(row)]} for row in ids])
    names = [f"{library}'s SFTTrainer, dropout {ARTICLE['lora_dropout']}" for library in ("TRL", "veneer")]
    return {name: lambda side=side: side.timed(rows) for name, side in zip(names, sides, strict=True)}


def same_in_evaluation(what: str, peer: Any, ours: Any, ids: Tensor) -> None:
    """SystemExit where the sides part in evaluation mode, which has no dropout."""
    theirs, own = (course(side, model.eval(), ids) for side, model in sides_of(peer, ours))
    for model in (peer, ours):
        model.train()
    require_same(what, theirs, own)


def same_variation(peer: Any, ours: Any, ids: Tensor, n_passes: int = 24) -> None:
    """SystemExit where the logits of training passes vary by another amount: the rate of dropout would be another.

    ids: one sequence in many rows, each a draw of its own. The variance is heavy-tailed: 48 draws tell it to a fifth
    only, so the bound follows from the spread over passes. Rounding in bfloat16 is about a third of it on a real model.
    """
    found = []
    for model in (peer, ours):
        with torch.no_grad():
            passes = [model(input_ids=ids, use_cache=False).logits.float().var(dim=0).mean() for _ in range(n_passes)]
        variances = torch.stack(passes)
        found.append((variances.mean().item(), (variances.std() / n_passes**0.5).item()))
    (theirs, their_error), (own, own_error) = found
    ratio = own / theirs
    error = ratio * ((their_error / theirs) ** 2 + (own_error / own) ** 2) ** 0.5
    told = f"{theirs:.4g} (PEFT), {own:.4g} (veneer), ratio {ratio:.2f} ± {error:.2f}"
    print(f"variance of logits over {n_passes * len(ids)} draws: {told}")
    if not abs(ratio - 1) <= 0.2 + 4 * error:
        raise SystemExit("the two sides do not drop at the same rate: no times are given")


# DoRA and IA3.


def methods(args: argparse.Namespace) -> dict[str, float]:
    """Time steps of LoRA, DoRA and IA3, of veneer and of PEFT."""
    figures: dict[str, float] = {}
    for base in args.bases:
        ways: dict[str, Callable[[], Timing]] = {}
        for title, name in (("LoRA", "lora"), ("DoRA", "dora"), ("IA3", "ia3")):
            peer, ours = pair_of(base, args, *METHODS[name])
            check = tokens_of(ours, 2, min(args.tokens, 64))
            same_in_evaluation(f"{title}, {base}", peer, ours, check)
            for side, model in reversed(sides_of(peer, ours)):
                ids = tokens_of(ours, args.rows, args.tokens)
                ways[f"{NAMES[side]}, {title}"] = stepper(side, model, ids)
        goals = {"veneer, DoRA": Goal("veneer, LoRA", 1.15), "veneer, IA3": Goal("veneer, LoRA", 1.0)}
        title = f"methods: {where(args, base, args.rows)}"
        taken = shown(title, in_turns(ways, args.repeats), "veneer, LoRA", goals)
        figures |= {f"{name}, {base}": ratio for name, ratio in taken.items()}
    return figures


def sides_of(peer: Any, ours: Any) -> list[tuple[str, Any]]:
    return list(zip(SIDES, (peer, ours), strict=True))


def pair_of(base: str, args: argparse.Namespace, config: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    """PEFT's model and ours, of the same start, which changes the logits."""
    peer, ours = (adapted_by(side, base_of(side, base, args.place, args.dtype), config, settings) for side in SIDES)
    same_start(ours, stir(peer))
    require_fused(ours)
    return peer, ours


def stepper(side: str, model: Any, ids: Tensor) -> Callable[[], Timing]:
    optimizer = optimizer_of(model)
    return lambda: timed(lambda: step(side, model, optimizer, ids))


# Mixed batches.


def mixed(args: argparse.Namespace) -> dict[str, float]:
    """Rows of as many methods in one pass, beside rows of LoRA."""
    base = base_of("veneer", "dense", args.place, args.dtype)
    kinds = {"one method a row": args.members, "LoRA in every row": ["lora"] * len(args.members)}
    ids = tokens_of(base, len(args.members), args.tokens)
    check = ids[:, : min(args.tokens, 64)]
    ways = {}
    for title, names in kinds.items():
        makes = [member(name) for name in names]
        one_by_one, at_once = alone(base, makes), together(base, makes)
        for number in (1, 2):
            agree(f"{title}: losses of step {number}, alone and together", one_by_one(check), at_once(check))
            if number == 1:
                same_gradients(title, one_by_one, at_once)
        ways[title] = lambda at_once=at_once: timed(lambda: at_once(ids))
    goals = {"one method a row": Goal("LoRA in every row", 1.15)}
    title = f"mixed: {where(args, 'dense', len(args.members))}: {', '.join(args.members)}"
    return shown(title, in_turns(ways, args.repeats), "LoRA in every row", goals)


def member(name: str) -> Make:
    """An adapter of a method that changes the logits."""

    def make(base: Any) -> Any:
        return stir(adapted_by("veneer", base, *METHODS[name]))

    return make


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "dropout": dropout,
    "methods": methods,
    "mixed": mixed,
}


if __name__ == "__main__":
    main()
