"""The share of an update that survives a merge into a 4-bit base: ``python bench/requantize.py MODEL_FOLDER``.

Weights of the model are quantized to NF4 with double quantization: the base B. A random update D of rank 8 is scaled to
a share of B's Frobenius norm and merged in five ways; the table gives the cosine between D and what really changed.
PEFT merges into its own 4-bit layer in the same run. The factors are random, not a trained adapter's.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import peft
import torch
from torch import Tensor, nn

from veneer.adapters.requantizing import survival
from veneer.quant.four_bit import FourBitWeight, quantize
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
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(RANK, base.shape[1], generator=generator)
    b = torch.randn(base.shape[0], RANK, generator=generator)
    b *= size * base.norm() / (b @ a).norm()
    return survival("", base, base + b @ a, WAYS[way](base, a, b)).share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a folder with safetensors")
    parser.add_argument("--weights", nargs="+", default=DEFAULT, help="names of matrices in it")
    options = parser.parse_args()
    tensors = Checkpoint.from_files([str(file) for file in sorted(options.model.glob("*.safetensors"))]).tensors
    weights = [tensors[name].read() for name in options.weights]
    print("| update's size | " + " | ".join(WAYS) + " |\n| --- |" + " --- |" * len(WAYS))
    for size in SIZES:
        shares = [statistics.median(share(way, weight, size) for weight in weights) for way in WAYS]
        print(f"| {size:.1%} | " + " | ".join(f"{value:.3f}" for value in shares) + " |", flush=True)


if __name__ == "__main__":
    main()
