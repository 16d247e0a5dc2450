"""The share of an update that survives a merge into a quantized base.

    python -m bench.files.requantize MODEL_FOLDER

Weights of the model are quantized to NF4 with double quantization: the base B. A random update D of rank 8 is scaled to
a share of B's Frobenius norm and merged in five ways; the table gives the cosine between D and what really changed.
PEFT merges into its own 4-bit layer in the same run. The factors are random, not a trained adapter's.

``--formats`` merges into every format that veneer quantizes to instead, as ``requantize=True`` does. The table
gives the cosine that the merge tells, and how far the merge is from the update summed in float64 and quantized afresh:
by the cosines, and by the norm of what differs, as a share of the update's. Inputs are cut to multiples of 256, which
the largest blocks need.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from torch import Tensor, nn

import veneer
from bench.same import SHARE, PartedError
from bench.training.formats import GGML, of_spec
from veneer.adapters.requantizing import merge_requantized, survival
from veneer.model.quantized.quant_linear import QuantLinear
from veneer.ops.four_bit import FourBitLayout
from veneer.quant.four_bit import FourBitSpec, FourBitWeight, quantize
from veneer.quant.fp8 import Fp8Spec
from veneer.quant.ggml import GgmlSpec
from veneer.quant.int8 import Int8Spec
from veneer.quant.mxfp4 import Mxfp4Spec
from veneer.quant.nvfp4 import Nvfp4Spec
from veneer.store.checkpoint import Checkpoint

RANK = 8
SIZES = (0.005, 0.01, 0.02, 0.05, 0.1)
DEFAULT = (
    "model.layers.2.self_attn.q_proj.weight",
    "model.layers.11.mlp.up_proj.weight",
    "model.layers.25.mlp.down_proj.weight",
)


def nf4(weight: Tensor) -> FourBitWeight:
    return quantize(weight, "nf4", double_quant=True)


def sixteen_bits(base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The result of merge_and_unload()."""
    return (base + b @ a).bfloat16().float()


def requantized(base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The result of merge_and_unload(requantize=True)."""
    return nf4(base + b @ a).dense(torch.float32)


def with_residual(base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Re-quantized, and what that lost kept beside it as factors of the same rank in 16 bits."""
    codes = requantized(base, a, b)
    u, s, v = torch.svd_lowrank(base + b @ a - codes, q=2 * RANK, niter=4)
    left, right = u[:, :RANK] * s[:RANK].sqrt(), (v[:, :RANK] * s[:RANK].sqrt()).T
    return codes + left.bfloat16().float() @ right.bfloat16().float()


def kept_beside(base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """No merge: the base stays in 4 bits and the update in two 16-bit factors."""
    return base + b.bfloat16().float() @ a.bfloat16().float()


def pefts_merge(base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """PEFT's merge_adapter() on bitsandbytes' layer, which holds the same base."""
    o, i = base.shape
    layer = bnb.nn.Linear4bit(i, o, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(base.bfloat16(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    holder = nn.Sequential(layer.to("cpu"))
    holder.is_loaded_in_4bit = True  # by which PEFT chooses its 4-bit layer
    model = peft.get_peft_model(holder, peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"]))
    adapted = model.base_model.model[0]
    adapted.lora_A["default"].weight.data, adapted.lora_B["default"].weight.data = a.clone(), b.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    merged = adapted.get_base_layer().weight
    return bnb.functional.dequantize_4bit(merged.data, merged.quant_state).float()


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "16-bit result": sixteen_bits,
    "re-quantized": requantized,
    "re-quantized, rank-8 residual kept": with_residual,
    "kept beside the codes": kept_beside,
    "PEFT": pefts_merge,
}


def share(way: str, weight: Tensor, size: float) -> float:
    """The cosine for one weight, one size and one way."""
    base = nf4(weight.bfloat16()).dense(torch.float32)
    a, b = update(base, size)
    return survival("", base, base + b @ a, WAYS[way](base, a, b)).share


WHOLE = 256  # inputs of the largest block
TOLD = 1e-3  # between the cosine that a merge tells and that of the sum quantized afresh
FORMATS: dict[str, Callable[[Tensor], tuple[Any, dict[str, Tensor]]]] = {
    "NF4": partial(of_spec, lambda w: FourBitSpec(FourBitLayout(tuple(w.shape)))),
    "FP4": partial(of_spec, lambda w: FourBitSpec(FourBitLayout(tuple(w.shape), "fp4"))),
    "int8": partial(of_spec, lambda w: Int8Spec(tuple(w.shape))),
    "FP8": partial(of_spec, lambda w: Fp8Spec(tuple(w.shape), w.dtype)),
    "MXFP4": partial(of_spec, lambda w: Mxfp4Spec(tuple(w.shape), w.dtype)),
    "NVFP4": partial(of_spec, lambda w: Nvfp4Spec(tuple(w.shape), w.dtype)),
    **{kind: partial(of_spec, lambda w, kind=kind: GgmlSpec(tuple(w.shape), kind)) for kind in GGML},
}


def merged_into_formats(weights: list[Tensor]) -> None:
    """Print what a merge tells in each format, and how far that is from quantizing the exact sum afresh.

    PartedError where it is further than rounding to other codes takes it.
    """
    cut = [weight[:, : weight.shape[1] // WHOLE * WHOLE].float().contiguous() for weight in weights]
    print("| format | " + " | ".join(f"{size:.1%}" for size in SIZES) + " | reported minus afresh | apart |")
    print("| --- |" + " ---: |" * (len(SIZES) + 2))
    for name in FORMATS:
        found = [[merged_into(name, weight, size) for weight in cut] for size in SIZES]
        shares = [f"{statistics.median(told for told, _, _ in each):.3f}" for each in found]
        every = [one for each in found for one in each]
        apart, differ = max(abs(told - afresh) for told, afresh, _ in every), max(other for _, _, other in every)
        if not (apart <= TOLD and differ <= SHARE):
            raise PartedError(f"{name}: a merge is {differ:.1%} of its update, or {apart:.1e} in cosine, from the sum")
        print(f"| {name} | {' | '.join(shares)} | {apart:.0e} | {differ:.0e} |", flush=True)


@torch.no_grad()
def merged_into(name: str, weight: Tensor, size: float) -> tuple[float, float, float]:
    """The cosine that a merge tells, that of the exact sum quantized afresh, and the norm of what differs between the
    two weights, as a share of the update's.
    """
    spec, parts = FORMATS[name](weight)
    layer = QuantLinear(spec)
    layer.fill(spec, parts)
    before = layer.frozen_format().dense(torch.float32)
    a, b = update(before, size)
    config = veneer.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    model = veneer.get_peft_model(nn.Sequential(layer), config)
    factors = model.get_submodule("0").adapters["default"]
    factors["lora_A"].copy_(a)
    factors["lora_B"].copy_(b)
    [told] = merge_requantized(model, model.adapter_state, ("default",))
    after = layer.frozen_format().dense(torch.float32)
    exact = b.double() @ a.double()
    afresh = spec.bind(spec.quantize((before.double() + exact).float())).dense(torch.float32)
    change = afresh.double() - before.double()
    cosine = float((exact * change).sum() / (exact.norm() * change.norm())) if change.norm() > 0 else 0.0
    return told.share, cosine, float((after - afresh).double().norm() / exact.norm())


def update(base: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """Factors A (rank, in) and B (out, rank) whose product is so large beside the base."""
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(RANK, base.shape[1], generator=generator)
    b = torch.randn(base.shape[0], RANK, generator=generator)
    return a, b * (size * base.norm() / (b @ a).norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder with safetensors")
    parser.add_argument("--weights", nargs="+", default=DEFAULT, help="names of matrices in it")
    parser.add_argument("--formats", action="store_true", help="merge into every format")
    options = parser.parse_args()
    tensors = Checkpoint.from_files([str(file) for file in sorted(options.model.glob("*.safetensors"))]).tensors
    weights = [tensors[name].read() for name in options.weights]
    if options.formats:
        merged_into_formats(weights)
        return
    print("| update's size | " + " | ".join(WAYS) + " |\n| --- |" + " --- |" * len(WAYS))
    for size in SIZES:
        shares = [statistics.median(share(way, weight, size) for weight in weights) for way in WAYS]
        print(f"| {size:.1%} | " + " | ".join(f"{value:.3f}" for value in shares) + " |", flush=True)


if __name__ == "__main__":
    main()
