"""A LoRA step on bases in GPTQ and HQQ, 4 bits: veneer beside PEFT on the layers of gptqmodel and hqq.

Both sides hold the same codes, made of SmolLM2's linear layers by rounding to the nearest in groups of 64, and compute
in bfloat16. Logits, gradients and losses are compared before anything is timed; sides take turns. gptqmodel (with
optimum) and hqq are wanted only for the formats that are asked for.

    python -m bench.training.stored_peft [--formats GPTQ HQQ] [--model smollm2-135m-instruct] [--rows 4] [--tokens 256]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from bench.lora_step import adapted, base_of, optimizer_of, require_fused, step
from bench.report import quiet_libraries
from bench.same import course, require_same, stir
from bench.training.formats import GROUP, grouped
from bench.training.train_sides import same_start
from bench.turns import Goal, in_turns, show, timed
from veneer.model.quantized.quant_linear import QuantLinear
from veneer.quant.gptq import GptqSpec
from veneer.quant.hqq import HqqSpec
from veneer.store.source import resolve

BITS, DTYPE = 4, torch.bfloat16
SIDES = ("peer", "veneer")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""By name: PEFT does not count the layers of gptqmodel and hqq to all linear ones."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    quiet_libraries()
    place = str(resolve(args.model))
    ways = {}
    for name in args.formats:
        models = {side: stored(name, side, place) for side in SIDES}
        ids = torch.randint(models["veneer"].config.vocab_size, (args.rows, args.tokens))
        same_start(models["veneer"], stir(models["peer"]))
        courses = (course(side, model, ids[:1, :64]) for side, model in models.items())
        require_same(f"{name}: PEFT on {PACKAGES[name]} and veneer", *courses)
        ways |= {
            f"{name}, {side}": partial(timed, partial(step, side, model, optimizer_of(model), ids))
            for side, model in models.items()
        }
    found = in_turns(ways, args.repeats)
    for name in args.formats:
        pair = {f"{name}, {side}": found[f"{name}, {side}"] for side in SIDES}
        goals = {f"{name}, veneer": Goal(f"{name}, peer", 1.0)}
        show(f"{name}: a step of {args.rows} x {args.tokens} tokens", pair, f"{name}, peer", goals)


def stored(name: str, side: str, place: str) -> Any:
    """The model with its linear layers in a format, as a side has them, adapted."""
    base = base_of("veneer", "dense", place, DTYPE)
    for path, layer in list(base.model.named_modules()):
        if isinstance(layer, nn.Linear):
            base.model.set_submodule(path, LAYERS[name](side, layer))
    torch.manual_seed(1)
    model = adapted(side, base, target_modules=TARGETS)
    if side == "veneer":
        require_fused(model)  # as a run does
    return model


def gptq(side: str, linear: nn.Linear) -> nn.Module:
    """A layer in GPTQ: veneer's, or gptqmodel's plain torch kernel, which it takes for training."""
    weight = linear.weight.detach()
    _, parts = grouped(BITS, torch.uint8, weight)
    spec = GptqSpec(shape=linear.weight.shape, bits=BITS, group=GROUP, dtype=DTYPE, less_one=False)
    if side == "veneer":
        return filled(spec, parts)
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    o, i = weight.shape
    layer = TorchLinear(BITS, GROUP, False, False, i, o)
    for part, values in spec.to_disk(parts).items():
        getattr(layer, part).copy_(values)
    layer.qzero_format(format=2)
    layer.post_init()
    return layer


def hqq(side: str, linear: nn.Linear) -> nn.Module:
    """A layer in HQQ: veneer's, or hqq's with its torch backend."""
    _, parts = grouped(BITS, DTYPE, linear.weight.detach())
    parts["scales"] = parts["scales"].to(DTYPE)
    spec = HqqSpec(shape=linear.weight.shape, bits=BITS, group=GROUP, dtype=DTYPE, scale_dtype=DTYPE, zeros=DTYPE)
    if side == "veneer":
        return filled(spec, parts)
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    settings = BaseQuantizeConfig(nbits=BITS, group_size=GROUP, axis=1)
    layer = HQQLinear(None, settings, compute_dtype=DTYPE, device="cpu", initialize=False)
    layer.load_state_dict(spec.to_disk(parts))
    return layer


def filled(spec: Any, parts: dict[str, torch.Tensor]) -> QuantLinear:
    layer = QuantLinear(spec)
    layer.fill(spec, parts)
    return layer


LAYERS: dict[str, Callable[[str, nn.Linear], nn.Module]] = {"GPTQ": gptq, "HQQ": hqq}
PACKAGES = {"GPTQ": "gptqmodel", "HQQ": "hqq"}


if __name__ == "__main__":
    main()
