"""Each op of serving beside torch, at the sizes of SmolLM2-135M in bfloat16: all layers of one step in turn.

Results are compared before they are timed, A B A B, medians. The bound of an op is the larger of what its bytes take at
the rate of a copy and its products at the rate of torch's matrix product, both measured in the same run.

    python -m bench.kernels.serving_ops [--threads 2] [--repeats 5] [--only products|attention|pairs]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from bench.kernels.op_tables import OpTables, parser_of
from bench.kernels.training_ops import require_equal
from bench.paired import Pair
from veneer.ops.packed import PackedWeight
from veneer.ops.paged_attention import PagedRows, PagedStore, append, paged_attention
from veneer.ops.pairs import FactorPair as Factors
from veneer.ops.pairs import PackedPairs, Segment, Segments, add_pairs

LAYERS, D, INNER, VOCAB, HEADS, KV_HEADS, HEAD_DIM, RANK, BLOCK = 30, 576, 1536, 49152, 9, 3, 64, 16, 16
# Inputs and outputs of the layers that share an input: q, k, v; o; gate, up; down.
GROUPS = ((D, (D, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)), (D, (D,)), (D, (INNER, INNER)), (INNER, (D,)))


def main() -> None:
    parts: dict[str, Callable[[], Iterator[Pair]]] = {
        "products": product_pairs,
        "attention": attention_pairs,
        "pairs": adapter_pairs,
    }
    args = parser_of(__doc__, tuple(parts), repeats=5).parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    tables = OpTables.start(args.repeats, _weights((VOCAB, D))[0])
    for name, pairs in parts.items():
        if args.only in (None, name):
            with torch.no_grad():
                tables.show(name, "torch", pairs(), calls=2)


def product_pairs() -> Iterator[Pair]:
    """One pass over all weights; of a prompt, without the head."""
    shapes = [(sum(outs), i) for i, outs in GROUPS] * LAYERS + [(VOCAB, D)]
    weights = _weights(*shapes)
    packed = [PackedWeight.pack(w) for w in weights]
    for rows in (1, 4, 8, 32, 512):
        used = slice(None) if rows < 512 else slice(0, -1)
        xs = {i: torch.randn(rows, i).bfloat16() for i in (D, INNER)}

        def theirs(xs: dict[int, Tensor] = xs, used: slice = used) -> list[Tensor]:
            return [functional.linear(xs[w.shape[1]], w) for w in weights[used]]

        def ours(xs: dict[int, Tensor] = xs, used: slice = used) -> list[Tensor]:
            return [w.matmul(xs[w.shape[1]]) for w in packed[used]]

        require_equal(f"{rows} rows", tuple(ours()), tuple(theirs()))
        values = sum(w.numel() for w in weights[used])
        yield Pair(f"{rows} rows, {values / 1e6:.1f}M weights", theirs, ours, 2 * values, 2 * rows * values)


def attention_pairs() -> Iterator[Pair]:
    """Decoding at several contexts, and prompts; torch has K and V of each sequence in one piece, heads repeated."""
    for n, context, rows in ((32, 64, 1), (32, 256, 1), (32, 1024, 1), (1, 8192, 1), (1, 256, 256), (1, 1024, 1024)):
        q = torch.randn(n, HEADS, rows, HEAD_DIM).bfloat16()
        k, v = torch.randn(2, n, KV_HEADS, context, HEAD_DIM).bfloat16()
        store, step = _filled_store(k, v, rows)
        keys, values = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
        queries = q.transpose(1, 2).reshape(n * rows, HEADS, HEAD_DIM)

        def theirs(q: Tensor = q, k: Tensor = keys, v: Tensor = values, causal: bool = rows > 1) -> list[Tensor]:
            return [functional.scaled_dot_product_attention(q, k, v, is_causal=causal) for _ in range(LAYERS)]

        def ours(store: PagedStore = store, q: Tensor = queries, step: PagedRows = step) -> list[Tensor]:
            return [paged_attention(store, layer, q, step) for layer in range(LAYERS)]

        name = f"{n} x {context} keys, {rows} queries each"
        alike = [y.view(n, rows, HEADS, HEAD_DIM).transpose(1, 2) for y in ours()]
        require_equal(name, tuple(alike), tuple(theirs()))
        flops = 4 * LAYERS * n * HEADS * HEAD_DIM * rows * (context if rows == 1 else context // 2)
        yield Pair(name, theirs, ours, LAYERS * (k.nbytes + v.nbytes), flops)


def adapter_pairs() -> Iterator[Pair]:
    """Adapters of rank 16 on all linear layers; torch multiplies each adapter's rows with its factors, one by one."""
    for n_adapters, rows in ((1, 1), (1, 32), (4, 8), (16, 2), (32, 1), (1, 512)):
        groups = [_Group(i, outs, n_adapters, rows) for _ in range(LAYERS) for i, outs in GROUPS]
        name = f"{n_adapters} adapters, {rows} rows each"
        for group in groups[: len(GROUPS)]:
            before = [y.clone() for y in group.ys]
            group.by_torch()
            theirs = tuple(y.clone() for y in group.ys)
            for y, start in zip(group.ys, before, strict=True):
                y.copy_(start)
            group.by_veneer()
            require_equal(name, tuple(group.ys), theirs)
        moved = sum(segment.pairs.nbytes for group in groups for segment in group.segments.parts)
        yield Pair(
            name,
            lambda groups=groups: [group.by_torch() for group in groups],
            lambda groups=groups: [group.by_veneer() for group in groups],
            moved,
            moved * rows,
        )


class _Group:
    """Adapters at layers that share an input, and the rows that take them."""

    def __init__(self, i: int, outs: tuple[int, ...], n_adapters: int, rows: int) -> None:
        self.factors = [[Factors(*_weights((RANK, i), (o, RANK)), 1.0) for o in outs] for _ in range(n_adapters)]
        self.segments = Segments.of(
            Segment(PackedPairs.pack(pairs, outs), k * rows, (k + 1) * rows) for k, pairs in enumerate(self.factors)
        )
        self.x = torch.randn(n_adapters * rows, i).bfloat16()
        self.ys = [torch.randn(n_adapters * rows, o).bfloat16() for o in outs]

    def by_torch(self) -> None:
        for (_, start, stop), pairs in zip(self.segments.parts, self.factors, strict=True):
            for y, pair in zip(self.ys, pairs, strict=True):
                y[start:stop] += functional.linear(functional.linear(self.x[start:stop], pair.a), pair.b)

    def by_veneer(self) -> None:
        add_pairs(self.x, self.segments, self.ys)


def _weights(*shapes: tuple[int, int]) -> list[Tensor]:
    return [(torch.randn(shape) * 0.05).bfloat16() for shape in shapes]


def _filled_store(k: Tensor, v: Tensor, rows: int) -> tuple[PagedStore, PagedRows]:
    """The same keys and values in all layers, on pages in no order; and the step of the last rows of each sequence."""
    n, heads, context, d = k.shape
    per = -(-context // BLOCK)
    store = PagedStore.zeros(n * per, BLOCK, (LAYERS, heads, d), dtype=k.dtype)
    tables = torch.randperm(n * per).view(n, per).tolist()
    everything = PagedRows.of([(pages, 0, context) for pages in tables], store)
    for layer in range(LAYERS):
        append(store, layer, *(x.transpose(1, 2).reshape(n * context, heads, d) for x in (k, v)), everything)
    return store, PagedRows.of([(pages, context - rows, rows) for pages in tables], store)


if __name__ == "__main__":
    main()
