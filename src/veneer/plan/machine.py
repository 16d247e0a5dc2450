"""Machine on which a plan is made: its rates, measured and kept in the cache, and its memory.

The memory is the amount still available to the process (`model.memory.available`: control groups too).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.disk.atomic import write_atomically
from veneer.disk.cache import cache_dir
from veneer.model.memory.available import available_bytes
from veneer.model.memory.offload import PageFile
from veneer.ops.adamw import BLOCK_SIZE, AdamWStep, Moment8bit, adamw_8bit_
from veneer.ops.attention import AttentionOptions, attention_backward, attention_forward
from veneer.ops.bits import n_bytes
from veneer.ops.cpu.module import DTYPES
from veneer.ops.cpu.scaled import STORED
from veneer.ops.dispatch import kernel_isa
from veneer.ops.four_bit import FourBitLayout, dequantize_4bit, quantize_4bit
from veneer.ops.ggml import dequantize_ggml, quantize_ggml
from veneer.ops.ggml_types import GGML_TYPES
from veneer.ops.scaled import CODINGS, ScaledCodes, decode_scaled
from veneer.plain.progress import waiting_for
from veneer.plan.budget import MeasuringTime
from veneer.plan.others import Others
from veneer.plan.overhead import byte_seconds, op_seconds, watched_seconds
from veneer.plan.products import MatrixProduct
from veneer.plan.work import Codec, Work
from veneer.quant.blocks import TILE_VALUES

LARGEST = 4096
"""Products are measured with sides up to this; larger ones run at the same rate."""
ROWS = 1024
COLD_BYTES, COOL_BYTES, MOST_COPIES = 128 << 20, 32 << 20, 256
"""Sizes of copies: one too large for any cache, and one too large for a core's own; and the most copies measured."""
STRETCH, MEASURED, LONGEST_MEASURED = 5e-4, 0.1, 1.0
"""Seconds: of a stretch of runs at least, of five stretches or more, and of fewer, which is what there is where others
use the cores: threads spin where they wait for each other, and a product may take a hundred times as long.
"""
ROUGH_SHARE = 0.75
"""Of the cores: a rate is rough if others left less while it was measured."""
EXACT_SIDE = 16
"""Largest side of a product that is measured as it is; larger ones are measured at the nearest 2ⁿ or 3·2ⁿ, so that rows
of other lengths seldom need further measurements.
"""
SHORTEST_ROW, LONGEST_ROW = 32, 1024
"""Of the lengths at which torch's attention is measured, powers of two."""


def processor() -> str:
    """Return the CPU, its instruction set and the threads in use, on which measured rates depend."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {kernel_isa() or 'no kernels'}, {torch.get_num_threads()} threads, torch {torch.__version__}"


@dataclass(slots=True)
class Rates:
    """Measured seconds of operations on this machine, each measured at its first use, while ``budget`` has time left.

    ``known`` holds the values in the file. ``rough`` holds, for measurements that other processes disturbed, the share
    of the cores that these left free. Such measurements are repeated once the cores are free.
    """

    path: Path
    known: dict[str, float] = field(default_factory=dict)
    rough: dict[str, float] = field(default_factory=dict)
    budget: MeasuringTime = field(default_factory=MeasuringTime)

    @classmethod
    def here(cls, budget: MeasuringTime | None = None) -> Rates:
        """Return the rates of this processor, from the cache folder."""
        path, budget = kept_file("rates-4"), budget or MeasuringTime()  # 4: older ones were measured otherwise
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return cls(path, budget=budget)
        rough = {key: float(share) for key, share in stored.get("rough", {}).items()}
        keeps = is_busy() or not budget.is_open
        known = {key: float(value) for key, value in stored["seconds"].items() if keeps or key not in rough}
        return cls(path, known, rough if keeps else {}, budget)

    @property
    def is_new(self) -> bool:
        """Return True if nothing has been measured on this machine yet."""
        return not self.known

    def at_best(self) -> Rates:
        """Return the rates that would hold if no other process used the cores.

        For each disturbed measurement, the seconds are multiplied by the share of the cores that other processes left
        free.
        """
        return Rates(self.path, {key: value * self.rough.get(key, 1.0) for key, value in self.known.items()})

    def save(self) -> None:
        """Write the measured rates to their file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        stored = {"processor": processor(), "seconds": self.known, "rough": self.rough}
        write_atomically(self.path, json.dumps(stored, indent=1).encode())

    def product(self, product: MatrixProduct) -> float:
        """Return the seconds of a matrix product.

        The rate is measured on a product of a similar shape, of which no side is longer than `LARGEST`.
        """
        m, k, n = (_side(side, most) for side, most in ((product.m, ROWS), (product.k, LARGEST), (product.n, LARGEST)))
        seconds = self._once(f"product {m} {k} {n} {product.dtype}", lambda: _product_seconds(m, k, n, product.dtype))
        return seconds * product.flops / (2.0 * m * k * n)

    def moved(self) -> float:
        """Return the seconds for one byte that elementwise work reads or writes, as in a step."""
        least = self.large_op_byte()
        return self._once("byte of elementwise work", lambda: byte_seconds(self.computed, least))

    def large_op_byte(self) -> float:
        """Return the seconds for one byte that an elementwise op on large tensors reads or writes."""
        return self._once("byte of a large op", _large_op_seconds)

    def computed(self, work: Work) -> float:
        """Return the seconds of a step without its elementwise work."""
        return sum(self.parts(work).values())

    def parts(self, work: Work) -> dict[str, float]:
        """Return the seconds of all work except elementwise work, by kind."""
        torch_attention = sum(n * self.torch_attention(length) for length, n in work.torch_attention.items())
        n_fused = work.n_ops - work.n_general
        fused = n_fused * self.op(general=False) if n_fused else 0.0
        general = work.n_general * self.op(general=True) if work.n_general else 0.0
        watched = work.n_watched * self.watched() if work.n_watched else 0.0
        updated_8bit = work.updated_8bit * self.updated_8bit() if work.updated_8bit else 0.0
        tiles = sum(n * self.decoded_tiles(codec) for codec, n in work.decoded_tiles.items())
        on_disk = {"waiting on disk": work.on_disk * self.on_disk()} if work.on_disk else {}
        return on_disk | {
            "products": sum(self.product(product) * n for product, n in work.products.items()),
            "attention": work.attention * self.attention() + torch_attention,
            "decoding": work.decoded * self.decoded() + tiles,
            "calls": fused + general + watched,
            "updates": work.updated * self.large_op_byte() + updated_8bit,
        }

    def attention(self) -> float:
        """Return the seconds for one FLOP of attention by the kernel."""
        return self._once("attention", _attention_seconds)

    def torch_attention(self, length: int) -> float:
        """Return the seconds for one FLOP of attention by torch (without fused blocks), in rows of about ``length``
        tokens.
        """
        near = min(LONGEST_ROW, max(SHORTEST_ROW, 1 << round(math.log2(max(length, 1)))))
        return self._once(f"attention of torch, {near} tokens", lambda: _torch_attention_seconds(near))

    def decoded(self) -> float:
        """Return the seconds to decode one 4-bit value."""
        return self._once("decoded", _decoded_seconds)

    def decoded_tiles(self, codec: Codec) -> float:
        """Return the seconds to decode one value of a tile of blocks, and to cast it to 16 bits."""
        return self._once(f"decoded in tiles, {codec}", lambda: _decoded_tiles_seconds(codec))

    def updated_8bit(self) -> float:
        """Return the seconds in which AdamW with 8-bit moments updates one value."""
        return self._once("updated in 8 bits", _updated_8bit_seconds)

    def on_disk(self) -> float:
        """Return the seconds for one byte that is written to a temporary file and read back from a mapping of it.

        The system holds the file in memory meanwhile.
        """
        return self._once("byte that waits on disk", _on_disk_seconds)

    def op(self, general: bool) -> float:
        """Return the overhead of one op in seconds: in the model's own code if ``general``, else in fused blocks."""
        return self._once(f"op of a step, {_path(general)}", lambda: op_seconds(general))

    def watched(self) -> float:
        """Return the seconds that selective checkpointing adds to an op that it intercepts, in the model's own code."""
        return self._once("op watched in a step", lambda: watched_seconds(self.op(general=True)))

    def _once(self, key: str, measure: Callable[[], float]) -> float:
        if key not in self.known:
            self.budget.begin()
            waiting_for(f"measuring this machine, once: {key}")
            others = Others()
            try:
                self.known[key] = measure()
            except KeyboardInterrupt as error:
                raise self.budget.interrupted() from error
            share = others.free_share()
            if is_busy() or share < ROUGH_SHARE:
                self.rough[key] = share
            self.save()  # at once: a plan that is broken off leaves the next one less to measure
        return self.known[key]


def kept_file(name: str) -> Path:
    """Return the path of the cache file for the measurements ``name`` on this processor."""
    return cache_dir() / "plan" / f"{name}-{hashlib.sha256(processor().encode()).hexdigest()[:12]}.json"


def is_busy() -> bool:
    """Return True if other processes use the cores, by the load of the last minute.

    A measurement itself adds a load of one for each core.
    """
    cores = os.cpu_count() or 1
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > 1.25 * cores + 0.5


def free_here() -> int:
    """Return the bytes still available to a process on this machine."""
    return available_bytes(torch.device("cpu"))


def _side(n: int, most: int) -> int:
    """Return the size at which a matrix product is measured in place of a product with a dimension of size ``n``.

    Small sizes are kept. Others become the nearest of a few sizes, at most about ``most``.
    """
    if n <= EXACT_SIDE:
        return n
    power = 1 << (min(n, most).bit_length() - 1)
    return min((power, power * 3 // 2, power * 2), key=lambda side: abs(math.log(side / min(n, most))))


def _path(general: bool) -> str:
    return "general path" if general else "fused path"


def _timed(run: Callable[[], Any]) -> float:
    """Return the seconds of one call of ``run``: the lower quartile over many short series of calls.

    On busy cores a thread may wait milliseconds for its turn. Most series are so short that they fall between two
    waits.
    """
    run()
    found: list[float] = []
    start = now = time.perf_counter()
    while not found or now - start < (MEASURED if len(found) >= 5 else LONGEST_MEASURED):
        began, n = now, 0
        while now - began < STRETCH:
            run()
            n, now = n + 1, time.perf_counter()
        found.append((now - began) / n)
    return sorted(found)[len(found) // 4]


def _product_seconds(m: int, k: int, n: int, dtype: str) -> float:
    """Return the seconds of the matrix product (m, k) · (k, n), as in a step: weights come from memory, and input and
    output change each time.
    """
    kind = getattr(torch, dtype)
    weights = _in_turns(torch.ones(n, k, dtype=kind), COLD_BYTES)
    inputs, outputs = (_in_turns(torch.ones(*shape, dtype=kind), COOL_BYTES) for shape in ((m, k), (m, n)))
    return _timed(lambda: torch.mm(next(inputs), next(weights).T, out=next(outputs)))


def _in_turns(x: Tensor, n_bytes: int) -> Iterator[Tensor]:
    """Cycle through copies of x without end.

    Together the copies have more than ``n_bytes``, unless this needs more than ``MOST_COPIES + 1`` copies.
    """
    return itertools.cycle([x.clone() for _ in range(1 + min(MOST_COPIES, n_bytes // x.nbytes))])


def _large_op_seconds() -> float:
    """Return the seconds for one byte that an operation in place reads or writes, on a tensor that no cache holds.

    It stands for an optimizer's work on weights and moments.
    """
    x = torch.ones(COLD_BYTES // 4)
    return _timed(lambda: x.mul_(1.0)) / (2 * x.nbytes)


def _attention_seconds() -> float:
    t, heads, d = 512, 8, 64
    q, k, v = (torch.ones(t, heads, d, dtype=torch.bfloat16) for _ in range(3))
    bounds, options = torch.tensor([0, t]), AttentionOptions()

    def run() -> None:
        out, lse = attention_forward(q, k, v, bounds, options)
        attention_backward(out, (q, k, v), (out, lse), bounds, options)

    return _timed(run) / (14 * t * t / 2 * heads * d)


def _torch_attention_seconds(t: int) -> float:
    b, heads, d = 2 * max(1, 128 // t) ** 2, 8, 64  # so much work that calls, which are counted apart, are little of it
    q, k, v = (torch.ones(b, heads, t, d, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    mask = torch.ones(b, 1, t, t, dtype=torch.bool).tril()

    def run() -> None:
        torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()  # type: ignore[no-untyped-call]

    return _timed(run) / (14 * b * heads * t * t / 2 * d)


def _decoded_seconds() -> float:
    w = torch.linspace(-1, 1, 1 << 20).view(1024, 1024)
    packed, absmax = quantize_4bit(w, "nf4")
    layout = FourBitLayout((1024, 1024), "nf4", 64, torch.bfloat16)
    return _timed(lambda: dequantize_4bit(packed, absmax, layout)) / w.numel()


def _decoded_tiles_seconds(codec: Codec) -> float:
    o, i = TILE_VALUES // 1024, 1024
    decode = _ggml_tile(o, i, *codec.numbers) if codec.kernel == "ggml_decode" else _scaled_tile(o, i, *codec.numbers)
    return _timed(lambda: decode().to(torch.bfloat16)) / (o * i)


def _ggml_tile(o: int, i: int, number: int) -> Callable[[], Tensor]:
    kind = next(kind.name for kind in GGML_TYPES.values() if kind.number == number)
    packed = quantize_ggml(torch.linspace(-1, 1, o * i).view(o, i), kind)
    return lambda: dequantize_ggml(packed, kind)


def _scaled_tile(
    o: int,
    i: int,
    bits: int,
    coding: int,
    scales: int,
    zeros: int,
    divides: int,
    height: int,
    group: int,
    rounding: int,
) -> Callable[[], Tensor]:
    """Return a function that decodes a tile of scaled codes. The numbers are those of the kernel's binding.

    E4M3 scales mean NVFP4, whose weights have one more scale for the whole weight.
    """
    stored, rounded = ({number: dtype for dtype, number in kinds.items()} for kinds in (STORED, DTYPES))
    codes = torch.arange(o * n_bytes(i, bits), dtype=torch.int32).to(torch.uint8).view(o, -1)
    shape = (-(-o // height), -(-i // group))
    weight = ScaledCodes(
        codes,
        torch.full(shape, 0.5).to(stored[scales]),
        i,
        group,
        CODINGS[coding],
        bits,
        height,
        zeros=torch.full(shape, 1.0).to(stored[zeros]) if zeros in stored else None,
        overall=torch.tensor(1.0) if divides or stored[scales] == torch.float8_e4m3fn else None,
        divides=bool(divides),
        rounding=rounded[rounding],
    )
    return lambda: decode_scaled(weight, slice(0, o))


def _updated_8bit_seconds() -> float:
    param = torch.linspace(-1, 1, 1 << 22)
    grad = param * 0.5
    moments = [
        Moment8bit(torch.zeros(param.numel(), dtype=torch.uint8), torch.ones(param.numel() // BLOCK_SIZE))
        for _ in range(2)
    ]
    step = AdamWStep(lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, step=7)
    return _timed(lambda: adamw_8bit_(param, grad, (moments[0], moments[1]), step)) / param.numel()


def _on_disk_seconds() -> float:
    file, x = PageFile(Path(tempfile.gettempdir())), torch.ones(COOL_BYTES // 4)

    def run() -> None:
        x.add_(0.0)  # as it was it would not be written again
        file.read(file.write(x)).sum()

    try:
        return _timed(run) / x.nbytes
    finally:
        file.close()
