"""Compile every Triton kernel for one compute capability, by the Triton that this process imports.

`scripts/compile_triton.py` runs this file in a process for each Triton and capability: Triton keys what it compiled by
the number of the device, so that a second capability in a process would get the code of the first.

    python scripts/triton_forms.py CAPABILITY [--quick]

Prints registers, stack (where spilled registers go) and shared memory of each kernel. Ends with 1, and names what is
wrong, if Triton refuses a form, a form needs more shared memory than the smallest cards since Ampere have, or no form
compiles a kernel.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.errors import TritonError
from triton.runtime.jit import JITFunction

import veneer.ops.triton as package
from veneer.ops.adamw import AdamWStep, Moment8bit
from veneer.ops.dropout import Mask
from veneer.ops.four_bit import FourBitLayout
from veneer.ops.grouped_low_rank import AdapterRuns, LowRankGroup, Run
from veneer.ops.paged_attention import PagedRows, PagedStore
from veneer.ops.pairs import FactorPair, PackedPairs, Segment, Segments
from veneer.ops.sample import RowRule, bit_mask
from veneer.ops.triton import (
    adamw,
    attention,
    blockwise,
    cross_entropy,
    dropout,
    four_bit,
    glu,
    grouped_low_rank,
    int8,
    norm,
    paged_attention,
    rotary,
    row_norms,
    sample,
    scale,
)
from veneer.ops.triton import pairs as pairs_of_versions

SHARED_BYTES = 99 * 1024  # of one program on compute capability 8.6 and 8.9
Case = tuple[str, Callable[[], Any]]


class NoDevice:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def cases(dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    yield from _norm_cases(dtype, quick)
    yield from _elementwise_cases(dtype, quick)
    yield from _attention_cases(dtype, quick)
    yield from _weight_cases(dtype, quick)
    yield from _optimizer_cases(dtype, quick)
    yield from _grouped_cases(dtype, quick)
    if dtype != torch.float16:
        yield from _paged_cases(dtype, quick)
        yield from _pair_cases(dtype, quick)
    yield from _sample_cases(dtype)


def _norm_cases(dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    x, weight, rstd = torch.empty(64, 576, dtype=dtype), torch.empty(576, dtype=dtype), torch.empty(64)
    yield "rms_norm", lambda: norm.rms_norm_forward(x, weight, 1e-5, 0.0)
    yield "rms_norm backward", lambda: norm.rms_norm_backward(x, x, weight, rstd, 0.0, False, x)
    yield "layer_norm", lambda: norm.layer_norm_forward(x, weight, weight, 1e-5)
    yield "layer_norm backward", lambda: norm.layer_norm_backward(x, x, weight, rstd, rstd, True)
    if not quick:
        wide, weight_wide = torch.empty(4, 16384, dtype=dtype), torch.empty(16384, dtype=dtype)
        yield "rms_norm, wide", lambda: norm.rms_norm_backward(wide, wide, weight_wide, rstd, 0.0, True)


def _elementwise_cases(dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    x = torch.empty(64, 1536, dtype=dtype)
    for activation in ("gelu_tanh",) if quick else ("silu", "gelu", "gelu_tanh"):
        yield f"glu {activation}", lambda a=activation: glu.glu_forward(x, x, a)
        yield f"glu {activation} backward", lambda a=activation: glu.glu_backward(x, x, x, a, (False, False))
    yield "glu clamped", lambda: glu.clamped_forward(x)
    yield "glu clamped backward", lambda: glu.clamped_backward(x[:, :768], x)
    first_row: tuple[int | torch.Tensor, ...] = (2**40,) if quick else (0, 2**40, torch.zeros(64, dtype=torch.int64))
    for rows in first_row:
        yield f"dropout {type(rows).__name__}", lambda r=rows: dropout.drop(x, 3277, 2**63 + 5, r)
        yield f"dropout {type(rows).__name__}, added", lambda r=rows: dropout.add_dropped(x, x, 3277, 5, r)
    for masks in ([Mask(0.1, 2**63 + 5 + k, torch.zeros(64, dtype=torch.int64)) for k in range(n)] for n in (1, 3, 6)):
        yield f"dropout of {len(masks)} layers", lambda m=masks: dropout.drop_each(x, m)
        yield f"dropout of {len(masks)} layers, summed", lambda m=masks: dropout.kept_sum(x.expand(len(m), *x.shape), m)
    vector = torch.empty(1536)
    for rank in (16,) if quick else (3, 16, 256):
        factors = (
            torch.empty(1536),
            torch.empty(rank, 1536, dtype=dtype),
            torch.empty(rank, 64),
            torch.empty(1536, rank),
        )
        yield f"row norms {rank}", lambda f=factors: row_norms.row_norms(*f, 0.5, 1e-38)
    yield "scale", lambda: scale.forward(x, vector, vector, x)
    yield "scale backward", lambda: scale.backward(x, x, vector, x, True)
    heads, tables = torch.empty(2, 9, 32, 80, dtype=dtype), torch.empty(1, 32, 16)
    for interleaved in (False,) if quick else (False, True):
        for inverse in (False, True):
            yield (
                f"rotary {interleaved=} {inverse=}",
                lambda i=interleaved, back=inverse: rotary.rotate(heads, tables, tables, i, False, back),
            )
        yield (
            f"rotary {interleaved=} of queries and keys",
            lambda i=interleaved: rotary.rotate_both(heads, heads[:, :3], tables, tables, i, True),
        )
    logits, labels = torch.empty(8, 49152, dtype=dtype), torch.empty(8, dtype=torch.int64)
    for softcap in (30.0,) if quick else (None, 30.0):
        yield (
            f"cross_entropy {softcap=}",
            lambda c=softcap: cross_entropy.softmax_cross_entropy(logits, labels, c, True),
        )


def _attention_cases(dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    bounds = torch.tensor([0, 100, 256])
    for features in (64,) if quick else (16, 64, 80, 128, 256):
        q, kv = torch.empty(256, 9, features, dtype=dtype), torch.empty(256, 3, features, dtype=dtype)
        lse = torch.empty(9, 256)
        for window, softcap in ((128, 30.0),) if quick else ((0, 0.0), (128, 30.0)):
            numbers = bounds, 0.125, window, softcap
            yield f"attention {features} {numbers[2:]}", lambda a=(q, kv, kv, *numbers): attention.attention_forward(*a)
            back = q, q, kv, kv, q, lse, *numbers
            yield f"attention {features} {numbers[2:]} backward", lambda a=back: attention.attention_backward(*a)


def _weight_cases(dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    w, x, dy = torch.empty(96, 576, dtype=dtype), torch.empty(3, 576, dtype=dtype), torch.empty(3, 96, dtype=dtype)
    for block_size in (64,) if quick else (32, 64, 4096):
        layout = FourBitLayout((96, 576), "nf4", block_size, dtype)
        codes = torch.empty(layout.n_bytes, dtype=torch.uint8), torch.empty(layout.n_blocks), layout
        yield f"4-bit quantize {block_size}", lambda lay=layout: four_bit.quantize_4bit(w.flatten(), lay)
        yield f"4-bit dequantize {block_size}", lambda c=codes: four_bit.dequantize_4bit(*c, dtype)
        nested = (
            codes[0],
            (torch.empty(layout.n_blocks, dtype=torch.uint8), torch.empty(4), torch.empty(())),
            torch.empty(256),
        )
        yield (
            f"4-bit dequantize {block_size}, nested",
            lambda n=nested, lay=layout: four_bit.dequantize_nested_4bit(*n, lay, dtype),
        )
        yield f"4-bit product {block_size}", lambda c=codes: four_bit.matmul_4bit(x, *c)
        yield f"4-bit transposed product {block_size}", lambda c=codes: four_bit.matmul_t_4bit(dy, *c)
    rows = torch.empty(96, 576, dtype=torch.int8), torch.empty(96)
    yield "int8 quantize", lambda: int8.quantize_int8(w)
    yield "int8 dequantize", lambda: int8.dequantize_int8(*rows, dtype)
    yield "int8 product", lambda: int8.matmul_int8(x, *rows)
    yield "int8 transposed product", lambda: int8.matmul_t_int8(dy, *rows)


def _optimizer_cases(dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    x, codes, table = torch.zeros(4096, dtype=dtype), torch.zeros(4096, dtype=torch.uint8), torch.empty(256)
    for block_size in (256,) if quick else (61, 256, 10000):
        absmax = torch.zeros(-(-4096 // block_size))
        yield f"blockwise quantize {block_size}", lambda b=block_size: blockwise.quantize_blockwise(x, table, b)
        yield (
            f"blockwise dequantize {block_size}",
            lambda b=block_size, m=absmax: blockwise.dequantize_blockwise(codes, m, table, b, dtype, m),
        )
    moments = Moment8bit(codes, torch.zeros(16)), Moment8bit(codes, torch.zeros(16))
    yield "8-bit AdamW", lambda: adamw.adamw_8bit_(x, x, moments, AdamWStep(1e-3, (0.9, 0.99), 1e-8, 0.01, 3))


def _grouped_cases(dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    x, y, rows = (
        torch.empty(512, 576, dtype=dtype),
        torch.empty(512, 1536, dtype=dtype),
        AdapterRuns((Run(0, 0, 512),), 512),
    )
    for ranks in ((8, 16),) if quick else ((8, 16), (4, 200)):
        a, b = (tuple(torch.empty(r, i) for r in ranks) for i in (576, 1536))
        group = LowRankGroup(a, tuple(f.T for f in b), (1.5, 2.0))
        yield f"grouped {ranks}", lambda g=group: grouped_low_rank.forward(x, [g], rows, [y])
        yield f"grouped {ranks} backward", lambda g=group: grouped_low_rank.backward([y], x, x, [g], rows, True)


def _paged_cases(dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    """A prompt beside a token, and tokens alone; query heads that share a key head."""
    for features in (64,) if quick else (16, 64, 80, 128, 256):
        store = PagedStore.zeros(40, 16, (2, 3, features), dtype=dtype)
        for n in (1,) if quick else (1, 200):
            rows = PagedRows.of([(range(20), 100, n), (range(20, 30), 0, 1)], store)
            q, kv = torch.empty(n + 1, 9, features, dtype=dtype), torch.empty(n + 1, 3, features, dtype=dtype)
            for numbers in ((0.125, 128, 30.0),) if quick else ((0.125, 0, 0.0), (0.125, 128, 30.0)):
                args = store, 1, q, rows, *numbers, None, None
                yield f"paged attention {features} {n} rows {numbers[1:]}", lambda a=args: paged_attention.attend(*a)
            args = store, 1, q, rows, 0.125, 0, 0.0, torch.empty(9, 304), None
            yield f"paged attention {features} {n} rows biased", lambda a=args: paged_attention.attend(*a)
            args = store, 1, q, rows, 0.125, 128, 0.0, None, torch.empty(9)
            yield f"paged attention {features} {n} rows with sinks", lambda a=args: paged_attention.attend(*a)
        yield f"pages written {features}", lambda a=(store, 1, kv, kv, rows): paged_attention.append(*a)
        angles = torch.empty(1, len(q), features // 2)
        turned = store, 1, (q, kv, kv), rows, (angles, angles), False
        yield f"pages written {features}, turned", lambda a=turned: paged_attention.append_turned(*a)


def _pair_cases(dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    """Layers that share x, at ranks within and beyond a tile; from values of the factors' dtype and of the other."""
    outs = (1536, 192, 192)
    for rank, n, x_dtype in ((16, 4, dtype),) if quick else ((16, 4, dtype), (64, 500, dtype), (8, 4, torch.float32)):
        pairs = [FactorPair(torch.zeros(rank, 576), torch.zeros(o, rank), 1.0, activation="gelu_tanh") for o in outs]
        segments = Segments.of([Segment(PackedPairs.pack(pairs, outs, dtype=dtype), 0, n)])
        x, ys = torch.empty(n, 576, dtype=x_dtype), [torch.empty(n, o, dtype=dtype) for o in outs]
        columns = torch.split(torch.empty(n, sum(outs), dtype=dtype), outs, dim=1)
        yield f"pairs {rank} {n} rows", lambda a=(x, segments, ys): pairs_of_versions.add(*a)
        yield f"pairs {rank} {n} rows, joined", lambda a=(x, segments, columns): pairs_of_versions.add(*a)


def _sample_cases(dtype: torch.dtype) -> Iterator[Case]:
    logits, ids = torch.empty(2, 49152, dtype=dtype), array("i", [5])
    rule = RowRule(
        allowed=(bit_mask([1], 49152),), banned=ids, biased=(ids, array("f", [1.0])), seen=ids, repetition=1.1,
        counted=(ids, ids), top_k=20, top_p=0.8, n_likeliest=2,
    )  # fmt: skip
    yield "likeliest", lambda: sample.likeliest(logits)
    yield "draw", lambda: sample.draw(logits, [rule, rule])


def compile_all(capability: int, dtypes: list[torch.dtype], quick: bool) -> list[str]:
    """Compile all cases; returns what is wrong."""
    triton.runtime.driver.set_active(NoDevice(capability))
    kernels, met, problems = set[JITFunction](), set[str](), list[str]()
    for dtype in dtypes:
        for name, call in cases(dtype, quick):
            form = f"{str(dtype).removeprefix('torch.')} {name}"
            try:
                compiled = _compiled(call)
            except (TritonError, RuntimeError) as error:  # the latter from passes of its compiler
                problems.append(f"{form} is refused: {type(error).__name__}: {error}")
                continue
            kernels.update(kernel for kernel, _ in compiled)
            for title, made in {f"{form}: {made.metadata.name}": made for _, made in compiled}.items():
                met.add(title)
                print(f"{title}: {_resources(made)}", flush=True)
                if made.metadata.shared > SHARED_BYTES:
                    problems.append(f"{title} needs {made.metadata.shared} bytes of shared memory")
    left = sorted(f"{kernel.module}.{kernel.__name__}" for kernel in all_kernels() - kernels)
    print(f"{len(kernels)} kernels in {len(met)} forms")
    return problems + [f"no form of {kernel} compiles" for kernel in left]


def _compiled(call: Callable[[], Any]) -> list[tuple[JITFunction, Any]]:
    """Compile what a call would launch; returns the kernels with their machine code."""
    run, compiled = JITFunction.run, list[tuple[JITFunction, Any]]()

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append((self, run(self, *args, grid=grid, warmup=True, **options)))

    JITFunction.run = compile_only
    try:
        call()
    finally:
        JITFunction.run = run
    return compiled


def all_kernels() -> set[JITFunction]:
    """Return the functions that are launched, by their names; the others are called by them."""
    names = [found.name for found in pkgutil.iter_modules(package.__path__)]
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    held = [x for module in modules for x in vars(module).values() if isinstance(x, JITFunction)]
    return {x for x in held if x.__name__.endswith("_kernel")}


def _resources(kernel: Any) -> str:
    """Registers, stack and shared memory of a compiled kernel, as NVIDIA's tool reads them from it."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+)", said), re.search(r"STACK:(\d+)", said)
    if registers is None or stack is None:
        raise RuntimeError(f"{tool} said nothing of registers: {said}")
    return f"{registers[1]} registers, {stack[1]} bytes of stack, {kernel.metadata.shared} bytes shared"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capability", type=int, help="80 for 8.0")
    parser.add_argument("--quick", action="store_true", help="few forms of each kernel, in bfloat16")
    args = parser.parse_args()
    dtypes = [torch.bfloat16] if args.quick else [torch.bfloat16, torch.float32, torch.float16]
    sys.exit("\n".join(compile_all(args.capability, dtypes, args.quick)) or 0)


if __name__ == "__main__":
    main()
