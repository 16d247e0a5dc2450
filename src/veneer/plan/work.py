"""Arithmetic and memory traffic of a step, op by op: products by shape, attention, bytes that are only moved."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from veneer.ops.cpu.module import DTYPES
from veneer.ops.traced import REPEATED, SilentMode, tensors_in
from veneer.plan.products import MatrixProduct, kernel_products

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default: 0, _aten.bmm.default: 0, _aten.addmm.default: 1, _aten.baddbmm.default: 1}
_PRODUCTS |= {_aten.mm.out: 0, _aten.addmm_.default: 1, _aten.addmm.out: 1, _aten._grouped_mm.default: 0}
_SILENT = {
    "view",
    "_unsafe_view",
    "_reshape_alias",
    "detach",
    "slice",
    "select",
    "expand",
    "transpose",
    "permute",
    "t",
    "alias",
    "split",
    "split_with_sizes",
    "unsqueeze",
    "squeeze",
    "unbind",
    "as_strided",
}
BEGIN = "forward.embeddings"
"""The mark of a micro-batch that begins."""
KERNEL_TOUCHES = 3
"""Bytes that a kernel which only moves data touches for each that it writes: two inputs and the output."""


@dataclass(frozen=True, slots=True)
class Codec:
    """Kernel that decodes a tile of a weight in blocks, and the numbers that choose the kernel's variant.

    For ``ggml_decode``: the type's number. For ``scaled_decode``, in order: bits, coding, storage of scales, storage of
    zeros (-1 without zeros), whether a number divides all scales, outputs of a group, inputs of a group, rounding.
    """

    kernel: str
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, name: str, arguments: tuple[Any, ...]) -> tuple[Codec, int]:
        """Return the codec of a call, and how many values it decodes."""
        if name == "ggml_decode":
            _, _, _, n_rows, columns, number, _ = arguments
            return cls(name, (number,)), n_rows * columns
        _, n_rows, columns, _, _, _, _, bits, coding, _, scales, _, zeros, _, _, divides, *groups, rounding = arguments
        return cls(name, (bits, coding, scales, zeros, int(divides), *groups, rounding)), n_rows * columns

    def __str__(self) -> str:
        return " ".join(map(str, (self.kernel, *self.numbers)))


@dataclass(slots=True)
class Work:
    """Amount of work in a step, or in a part of one, by kind.

    ``attention`` is FLOPs of the kernel, ``torch_attention`` FLOPs of torch by length of a row. ``moved`` is bytes of
    elementwise ops. ``updated`` is bytes of the optimizer, which pass at the rate of memory. ``updated_8bit`` is values
    of an optimizer with 8-bit moments. ``decoded`` is values of 4 bits that a kernel decodes for a product,
    ``decoded_tiles`` values decoded in tiles, by codec. ``on_disk`` is bytes that wait in a file from the forward pass
    to the backward pass. ``n_ops`` counts the ops of torch's dispatcher, and ``n_watched`` those that selective
    checkpointing intercepts. ``n_general`` counts those of the model's own code, outside of fused blocks.
    """

    products: Counter[MatrixProduct] = field(default_factory=Counter)
    attention: float = 0.0
    torch_attention: Counter[int] = field(default_factory=Counter)
    decoded: float = 0.0
    decoded_tiles: Counter[Codec] = field(default_factory=Counter)
    moved: float = 0.0
    updated: float = 0.0
    updated_8bit: float = 0.0
    on_disk: float = 0.0
    n_ops: float = 0
    n_watched: float = 0
    n_general: float = 0

    def plus(self, other: Work, times: float) -> Work:
        """Return this work plus ``times`` times the work ``other``."""
        return Work(
            _plus(self.products, other.products, times),
            self.attention + times * other.attention,
            _plus(self.torch_attention, other.torch_attention, times),
            self.decoded + times * other.decoded,
            _plus(self.decoded_tiles, other.decoded_tiles, times),
            self.moved + times * other.moved,
            self.updated + times * other.updated,
            self.updated_8bit + times * other.updated_8bit,
            self.on_disk + times * other.on_disk,
            self.n_ops + times * other.n_ops,
            self.n_watched + times * other.n_watched,
            self.n_general + times * other.n_general,
        )

    @property
    def flops(self) -> float:
        """FLOPs of all products and attention."""
        return (
            self.attention
            + self.torch_attention.total()
            + sum(product.flops * n for product, n in self.products.items())
        )


class CountWork(SilentMode):  # type: ignore[no-untyped-call]
    """Context that counts the work of a step while ``on``: ``passes`` for each micro-batch, and ``update``.

    Kernels that a traced step does not run are reported to `kernel`. ``watched`` is True while selective checkpointing
    intercepts ops, in the forward pass and again in the recomputation. ``updating`` is True while the optimizer runs.
    ``general`` is True while the model's own code runs, not a fused block. `mark` sets ``general``: to
    ``general_blocks`` within a numbered block, and to ``general_outside`` elsewhere.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.passes, self.update, self.on = [Work()], Work(), False
        self._now = self.passes[0]
        self._tile = 0
        self._before_repeated = list[Work]()
        self.watched, self.updating, self.general = False, False, False
        self.general_outside, self.general_blocks = False, dict[str, bool]()
        self._apart: Work | None = None

    def mark(self, name: str) -> None:
        """Note that the part of the step with this name begins."""
        self.updating = name == "optimizer"
        if self.on and name == BEGIN and self.passes[-1].n_ops:
            self.passes.append(Work())
        self._now = self._apart or (self.update if self.updating else self.passes[-1])
        self.general = self.general_blocks.get(name.rpartition(".")[2], self.general_outside)

    def of_one(self, n_a_step: int) -> Work:
        """Return the mean work of one micro-batch of a step with ``n_a_step`` micro-batches, with its share of the
        update.

        The first micro-batch has its own work. All others have the work of the last one, which adds its gradients to
        existing ones.
        """
        first, last = self.passes[0], self.passes[-1]
        return first.plus(last.plus(first, -1.0), 1 - 1 / n_a_step).plus(self.update, 1 / n_a_step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing while the context is open."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before

    @contextmanager
    def apart(self) -> Iterator[Work]:
        """Enter a context that yields a `Work`. Ops within the context are counted in it, not in the micro-batch's
        work.
        """
        before, self._now = self._now, Work()
        self._apart = self._now
        try:
            yield self._apart
        finally:
            self._now, self._apart = before, None

    def kernel(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Count a call that a traced step would have made: a kernel, or the writing of a page to a file. It also counts
        as an op.
        """
        if not self.on:
            return
        if name == REPEATED:
            self._repeat(*arguments)
            return
        self._calls()
        if name == "page_file_write":
            self._now.on_disk += arguments[0]
        elif name == "four_bit_multiply":
            _, _, _, _, o, i, _, rows, transposed, _ = arguments
            m, k, n = (rows, o, i) if transposed else (rows, i, o)
            self._now.products[MatrixProduct(m, k, n, "bfloat16")] += 1
            self._now.decoded += o * i
        elif name in ("four_bit_dequantize", "int8_dequantize"):
            four = name.startswith("four")
            n, dtype = (arguments[2], arguments[5]) if four else (arguments[2] * arguments[3], arguments[4])
            self._now.decoded += n
            # The rate of decoding has the writing of its output in it, which was counted where that was made.
            itemsize = 4 if dtype == DTYPES[torch.float32] else 2
            self._moves(-KERNEL_TOUCHES * n * itemsize)
        elif name in ("ggml_decode", "scaled_decode"):
            codec, n = Codec.of(name, arguments)
            self._now.decoded_tiles[codec] += n
            self._tile = n  # of the cast that follows it directly: the rate of tiles has it and the writing in it
            self._moves(-KERNEL_TOUCHES * 4 * n)
        elif name == "adamw_8bit":
            self._now.updated_8bit += arguments[4]
        elif name in ("attention_forward", "attention_backward"):
            bounds, heads, _, head_dim = arguments[:4]
            seen = sum((end - start) ** 2 for start, end in itertools.pairwise(bounds)) / 2
            self._now.attention += (4 if name.endswith("forward") else 10) * seen * heads * head_dim
        else:
            self._now.products.update(kernel_products(name, arguments))

    def _repeat(self, times: int) -> None:
        """If ``times`` is 0, begin a part that is repeated. Otherwise end this part, and count its work ``times``
        times.
        """
        if not times:
            self._before_repeated.append(self._now.plus(Work(), 0))
            return
        part = self._now.plus(self._before_repeated.pop(), -1)
        repeated = self._now.plus(part, times - 1)
        for each in fields(Work):
            setattr(self._now, each.name, getattr(repeated, each.name))

    def see(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        """Count an op."""
        if self.on:
            self._count(func, args, out)

    def _count(self, func: Any, args: Any, out: Any) -> None:
        name = _name_of(func)
        tile, self._tile = self._tile, self._tile if name in _SILENT else 0
        self._calls()
        self._now.n_watched += 2 * self.watched
        if func in _PRODUCTS:
            a, b = args[_PRODUCTS[func]], args[_PRODUCTS[func] + 1]
            batch = a.shape[0] if a.ndim == 3 else 1
            dtype = str(a.dtype).removeprefix("torch.")
            self._now.products[MatrixProduct(a.shape[-2], a.shape[-1], b.shape[-1], dtype, batch)] += 1
        elif name.startswith("veneer::"):  # of a base, where checkpointing watches the dispatcher
            x, n = args[0], out.shape[-1]
            is_coded = name != "veneer::multiply_dense"
            dtype = "bfloat16" if is_coded else "float32"  # a dense weight is multiplied there if it is widened
            self._now.products[MatrixProduct(x.numel() // x.shape[-1], x.shape[-1], n, dtype)] += 1
            self._now.decoded += is_coded * x.shape[-1] * n
        elif name.startswith("_scaled_dot_product"):
            q = args[1] if "backward" in name else args[0]
            b, h, t, d = q.shape
            self._now.torch_attention[t] += (10 if "backward" in name else 4) * b * h * t * t * d / 2
        elif name.startswith(("empty", "new_empty")):
            self._moves(KERNEL_TOUCHES * _bytes(out))
        elif name == "embedding":
            self._moves(2 * _bytes(out))  # of the table it reads the rows that it writes
        elif name not in _SILENT and (name != "_to_copy" or args[0].numel() != tile):
            given = _bytes(args)
            self._moves(given + (given if out is None else _bytes(out)))

    def _calls(self) -> None:
        self._now.n_ops += 1
        self._now.n_general += self.general

    def _moves(self, n_bytes: int) -> None:
        if self.updating:
            self._now.updated += n_bytes
        else:
            self._now.moved += n_bytes


@functools.cache
def _name_of(func: Any) -> str:
    return str(func.name().removeprefix("aten::").split(".")[0])


def _plus(counts: Counter[Any], others: Counter[Any], times: float) -> Counter[Any]:
    return Counter({key: counts[key] + times * others[key] for key in counts.keys() | others.keys()})


def _bytes(tensors: Any) -> int:
    found: Mapping[int, Tensor] = {id(t): t for t in tensors_in(tensors)}
    return sum(t.nbytes for t in found.values())
