"""The 4-bit codec and products beside those of bitsandbytes on the CPU; equal, or there is nothing to time."""

from __future__ import annotations

from collections.abc import Iterator

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import torch
from torch import Tensor

from bench.paired import Pair
from veneer.ops.four_bit import FourBitLayout, dequantize_4bit, matmul_4bit, quantize_4bit

ROWS = (1, 8, 512)


def four_bit_pairs(w: Tensor) -> Iterator[Pair]:
    """Quantizing and reading a weight, and its products with 1, 8 and 512 rows."""
    packed, absmax = quantize_4bit(w, "nf4")
    layout = FourBitLayout(tuple(w.shape), dtype=w.dtype)
    theirs, state = bnb_functional.quantize_4bit(w, quant_type="nf4")
    small = packed.nbytes + absmax.nbytes
    check_equal(w)
    yield Pair(
        "quantize",
        lambda: bnb_functional.quantize_4bit(w, quant_type="nf4"),
        lambda: quantize_4bit(w, "nf4"),
        small + w.nbytes,
        0,
    )
    yield Pair(
        "dequantize to bf16",
        lambda: bnb_functional.dequantize_4bit(theirs, state),
        lambda: dequantize_4bit(packed, absmax, layout),
        small + w.nbytes,
        0,
    )
    for rows in ROWS:
        x = torch.randn(rows, w.shape[1]).bfloat16()
        moved, flops = small + (w.shape[0] + w.shape[1]) * rows * 2, 2 * rows * w.numel()
        dense = dequantize_4bit(packed, absmax, layout)
        check_product(matmul_4bit(x, packed, absmax, layout), x, dense)
        for mode in ("eval()", "train()"):
            layer = bnb_layer(w, mode == "train()")
            check_product(layer(x), x, dense)
            yield Pair(
                f"multiply {rows} row{'s' * (rows > 1)}, their layer in {mode}",
                lambda layer=layer, x=x: layer(x),  # type: ignore[misc]
                lambda x=x: matmul_4bit(x, packed, absmax, layout),  # type: ignore[misc]
                moved,
                flops,
            )


def check_equal(w: Tensor) -> None:
    """Same codes, absmax and values as bitsandbytes, or stop."""
    packed, absmax = quantize_4bit(w, "nf4")
    theirs, state = bnb_functional.quantize_4bit(w, quant_type="nf4")
    values = dequantize_4bit(packed, absmax, FourBitLayout(tuple(w.shape), dtype=w.dtype))
    same = torch.equal(packed, theirs.view(-1)) and torch.equal(absmax, state.absmax)
    if not same or not torch.equal(values, bnb_functional.dequantize_4bit(theirs, state)):
        raise SystemExit("codes, absmax or values differ from bitsandbytes: nothing to time")


def bnb_layer(w: Tensor, training: bool) -> bnb.nn.Linear4bit:
    """Return their layer. In eval() without gradients it repacks its weight for a fused product."""
    layer = bnb.nn.Linear4bit(
        w.shape[1], w.shape[0], bias=False, compute_dtype=w.dtype, compress_statistics=False, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(w.clone(), requires_grad=False, compress_statistics=False, quant_type="nf4")
    return layer.to("cpu").train(training)


def check_product(y: Tensor, x: Tensor, w: Tensor) -> None:
    truth = x.double() @ w.double().T
    error = float((y.double() - truth).norm() / truth.norm())
    if error > 8e-3:  # bf16 rounds to 2e-3 on average, and bitsandbytes' fused product rounds absmax too
        raise SystemExit(f"a product is off by {error:.1e}: nothing to time")
