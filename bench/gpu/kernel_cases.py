"""The ops that `kernels.py` checks and times: ours, the peer's way to the same values, and inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.kernels.differentiable import attention, glu, grouped_low_rank, layer_norm, rms_norm, rotary
from veneer.ops.attention import AttentionOptions
from veneer.ops.blockwise import dequantize_blockwise, dynamic_map, quantize_blockwise
from veneer.ops.cross_entropy import HeadOptions, linear_cross_entropy
from veneer.ops.dropout import drop
from veneer.ops.four_bit import FourBitLayout, dequantize_4bit, matmul_4bit, quantize_4bit
from veneer.ops.int8 import dequantize_int8, matmul_int8, quantize_int8
from veneer.ops.paged_attention import PagedRows, PagedStore, append, paged_attention
from veneer.ops.pairs import FactorPair, PackedPairs, Segment, Segments, add_pairs
from veneer.ops.sample import RowRule, draw

try:
    import bitsandbytes as bnb
except ImportError:  # a rented machine may lack it: the peer of codecs is the reference then
    bnb = None

Function = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of the cases: tokens in rows of `length`, a model's widths, and the sequences of a step of serving."""

    length: int
    rows: int
    width: int = 4096
    inner: int = 14336
    classes: int = 128256
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    sequences: int = 32

    @property
    def tokens(self) -> int:
        return self.rows * self.length


CHECKED, TIMED = Sizes(length=512, rows=2), Sizes(length=2048, rows=4)  # widths of a Llama of 8 billion
TINY = Sizes(length=37, rows=2, width=64, inner=96, classes=211, heads=4, kv_heads=2, head_dim=16, sequences=3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """``ours`` and ``peer`` compute the same from ``inputs``, forward and, where those require it, backward.

    truth: the same on float64 inputs; where None, the peer's function computes it there. exact: what ours must equal
    bit by bit, in place of a tolerance.
    """

    name: str
    inputs: list[Tensor]
    ours: Function
    peer: Function
    peer_name: str = "torch"
    truth: Function | None = None
    exact: Callable[[], tuple[Tensor, ...]] | None = field(default=None)


@dataclass(frozen=True, slots=True)
class Maker:
    """Draws inputs on a device in a dtype; ``backend`` goes to every op (None: by the device)."""

    device: torch.device
    dtype: torch.dtype
    backend: str | None
    sizes: Sizes

    def frozen(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=self.device) * scale).to(self.dtype)

    def trained(self, *shape: int) -> Tensor:
        return self.frozen(*shape).requires_grad_()


def norms(make: Maker) -> Iterator[Case]:
    d, how = make.sizes.width, {"backend": make.backend}
    inputs = [make.trained(make.sizes.tokens, d), make.trained(d), make.trained(d)]
    yield Case(
        name="RMSNorm",
        inputs=inputs[:2],
        ours=lambda x, w: rms_norm(x, w, 1e-5, **how),
        peer=lambda x, w: functional.rms_norm(x, (d,), w, 1e-5),
    )
    yield Case(
        name="LayerNorm",
        inputs=inputs,
        ours=lambda x, w, b: layer_norm(x, w, b, 1e-5, **how),
        peer=lambda x, w, b: functional.layer_norm(x, (d,), w, b, 1e-5),
    )


def elementwise(make: Maker) -> Iterator[Case]:
    s, how = make.sizes, {"backend": make.backend}
    pair = [make.trained(s.tokens, s.inner), make.trained(s.tokens, s.inner)]
    yield Case(
        name="SwiGLU",
        inputs=pair,
        ours=lambda g, u: glu(g, u, "silu", **how),
        peer=lambda g, u: functional.silu(g) * u,
    )
    yield Case(
        name="GeGLU (tanh)",
        inputs=pair,
        ours=lambda g, u: glu(g, u, "gelu_tanh", **how),
        peer=lambda g, u: functional.gelu(g, approximate="tanh") * u,
    )
    angles = torch.rand(1, s.length, s.head_dim // 2, device=make.device) * 6
    cos, sin = angles.cos().to(make.dtype), angles.sin().to(make.dtype)
    qk = [make.trained(s.rows, heads, s.length, s.head_dim) for heads in (s.heads, s.kv_heads)]
    yield Case(
        name="rotary, q and k",
        inputs=qk,
        ours=lambda q, k: rotary(q, k, cos, sin, **how),
        peer=lambda q, k: (turned(q, cos, sin), turned(k, cos, sin)),
    )


def dropout(make: Maker) -> Case:
    """torch draws other masks, so that its values say nothing."""
    x, mask = make.frozen(make.sizes.tokens, make.sizes.width), (0.05, 2**63 + 29, 2**40)
    return Case(
        name="dropout",
        inputs=[x],
        ours=lambda x: drop(x, *mask, backend=make.backend),
        peer=lambda x: functional.dropout(x, 0.05),
        exact=lambda: (drop(x.cpu(), *mask, backend="reference"),),
    )


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers turns them: whole tables, halves swapped by a copy."""
    c, s = (torch.cat([t, t], dim=-1).unsqueeze(1).to(x.dtype) for t in (cos, sin))
    first, second = x.chunk(2, dim=-1)
    return x * c + torch.cat([-second, first], dim=-1) * s


def head(make: Maker) -> Case:
    s = make.sizes
    weight = make.frozen(s.classes, s.width, scale=s.width**-0.5)
    labels = torch.randint(0, s.classes, (s.tokens,), device=make.device)
    return Case(
        name="head and loss, frozen head",
        inputs=[make.trained(s.tokens, s.width)],
        ours=lambda h: linear_cross_entropy(h, weight, labels, options=HeadOptions(backend=make.backend)),
        peer=lambda h: functional.cross_entropy(_wide(h @ weight.to(h.dtype).T), labels),
    )


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _qkv(make: Maker) -> list[Tensor]:
    s = make.sizes
    return [make.trained(s.tokens, heads, s.head_dim) for heads in (s.heads, s.kv_heads, s.kv_heads)]


def attention_of_a_batch(make: Maker) -> Case:
    s = make.sizes
    bounds = torch.arange(0, s.tokens + 1, s.length, device=make.device)

    def peer(*qkv: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, (s.rows, s.length)).transpose(1, 2) for x in qkv)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    options = AttentionOptions(backend=make.backend)
    ours = lambda q, k, v: attention(q, k, v, bounds, options)  # noqa: E731
    return Case(name="attention, causal", inputs=_qkv(make), ours=ours, peer=peer)


def packed_attention(make: Maker) -> Case:
    """Sequences of uneven lengths, each token seeing a quarter of a row back; torch needs a dense mask for it."""
    s = make.sizes
    ends = [0, s.length // 3, s.length, s.length + 5, 2 * s.length, s.tokens]
    window = max(2, s.length // 4)
    place = torch.arange(s.tokens, device=make.device)
    sequence = torch.cat([torch.full((b - a,), i) for i, (a, b) in enumerate(pairwise(ends))]).to(make.device)
    ahead = place[:, None] - place[None]
    seen = (ahead >= 0) & (ahead < window) & (sequence[:, None] == sequence[None])
    bounds, options = torch.tensor(ends, device=make.device), AttentionOptions(window=window, backend=make.backend)

    def peer(*qkv: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in qkv)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)[0].transpose(0, 1)

    ours = lambda q, k, v: attention(q, k, v, bounds, options)  # noqa: E731
    return Case(name="attention, packed, window", inputs=_qkv(make), ours=ours, peer=peer)


def _peer(theirs: Function, reference: Function) -> dict[str, Any]:
    """The peer of a codec, by the fields of `Case`: bitsandbytes, or the reference where it is not installed."""
    if bnb is None:
        return {"peer": reference, "peer_name": "the reference"}
    return {"peer": theirs, "peer_name": "bitsandbytes"}


def _their_state(absmax: Tensor, w: Tensor) -> Any:
    if bnb is None:
        return None
    state = bnb.functional.QuantState(absmax, w.shape, bnb.functional.get_4bit_type("nf4", device=w.device), 64, "nf4")
    state.dtype = w.dtype
    return state


def four_bit(make: Maker) -> Iterator[Case]:
    s, how = make.sizes, {"backend": make.backend}
    w = make.frozen(s.inner, s.width)
    packed, absmax = quantize_4bit(w, "nf4", **how)
    layout = FourBitLayout(tuple(w.shape), "nf4", 64, make.dtype)
    state, theirs = _their_state(absmax, w), packed.view(-1, 1)
    yield Case(
        name="NF4 quantize",
        inputs=[w],
        ours=lambda w: quantize_4bit(w, "nf4", **how),
        **_peer(
            lambda w: bnb.functional.quantize_4bit(w, quant_type="nf4")[0],
            lambda w: quantize_4bit(w, "nf4", backend="reference")[0],
        ),
        exact=lambda: quantize_4bit(w.cpu(), "nf4", backend="reference"),
    )
    yield Case(
        name="NF4 dequantize",
        inputs=[packed],
        ours=lambda p: dequantize_4bit(p, absmax, layout, **how),
        **_peer(
            lambda p: bnb.functional.dequantize_4bit(p.view(-1, 1), state),
            lambda p: dequantize_4bit(p, absmax, layout, backend="reference"),
        ),
        exact=lambda: (dequantize_4bit(packed.cpu(), absmax.cpu(), layout, backend="reference"),),
    )
    values = dequantize_4bit(packed, absmax, layout, dtype=torch.float32, **how).double()
    for rows in (1, 8, s.tokens):
        x = make.frozen(rows, s.width) if rows <= 8 else make.trained(rows, s.width)
        yield Case(
            name=f"NF4 product, {rows} rows" + (", with its gradient" if x.requires_grad else ""),
            inputs=[x],
            ours=lambda x: matmul_4bit(x, packed, absmax, layout, **how),
            **_peer(
                lambda x: bnb.matmul_4bit(x, theirs.t(), state),
                lambda x: matmul_4bit(x, packed, absmax, layout, backend="reference"),
            ),
            truth=lambda x: x @ values.T,
        )


def int8(make: Maker) -> Iterator[Case]:
    s, how = make.sizes, {"backend": make.backend}
    w = make.frozen(s.inner, s.width)
    codes, absmax = quantize_int8(w, **how)
    values = dequantize_int8(codes, absmax, dtype=make.dtype, **how)
    yield Case(
        name="int8 quantize",
        inputs=[w],
        ours=lambda w: quantize_int8(w, **how),
        **_peer(
            lambda w: bnb.functional.int8_vectorwise_quant(w.half())[:2],
            lambda w: quantize_int8(w, backend="reference"),
        ),
        exact=lambda: quantize_int8(w.cpu(), backend="reference"),
    )
    exact = codes.double() * absmax.double()[:, None] / 127
    for rows in (1, s.tokens):
        x = make.frozen(rows, s.width)
        yield Case(
            name=f"int8 product, {rows} rows",
            inputs=[x],
            ours=lambda x: matmul_int8(x, codes, absmax, **how),
            peer=lambda x: x @ values.T,
            peer_name="torch, dense",
            truth=lambda x: x @ exact.T,
        )


def blockwise(make: Maker) -> Case:
    x, code = make.frozen(make.sizes.inner, make.sizes.width), dynamic_map().to(make.device)

    def ours(x: Tensor) -> tuple[Tensor, ...]:
        codes, absmax = quantize_blockwise(x, code, backend=make.backend)
        return codes, absmax, dequantize_blockwise(codes, absmax, code, backend=make.backend)

    def exact() -> tuple[Tensor, ...]:
        codes, absmax = quantize_blockwise(x.cpu(), code.cpu(), backend="reference")
        return codes, absmax, dequantize_blockwise(codes, absmax, code.cpu(), backend="reference")

    def theirs(x: Tensor) -> Tensor:
        codes, state = bnb.functional.quantize_blockwise(x, code=code, blocksize=256)
        return bnb.functional.dequantize_blockwise(codes, state)

    def reference(x: Tensor) -> Tensor:
        codes, absmax = quantize_blockwise(x, code, backend="reference")
        return dequantize_blockwise(codes, absmax, code, backend="reference")

    return Case(name="8-bit blocks, both ways", inputs=[x], ours=ours, exact=exact, **_peer(theirs, reference))


def grouped(make: Maker) -> Case:
    """Eight adapters of two ranks over the rows of a batch; the peer picks each adapter's rows and multiplies."""
    s = make.sizes
    ranks = [8, 16] * 4
    owner = torch.arange(8, device=make.device).repeat_interleave(-(-s.tokens // 8))[: s.tokens]
    factors = [make.trained(r, s.width) for r in ranks] + [make.trained(s.inner, r) for r in ranks]
    scales = [0.5 + k for k in range(8)]

    def ours(x: Tensor, *pairs: Tensor) -> Tensor:
        return grouped_low_rank(x, pairs[:8], pairs[8:], scales, owner, backend=make.backend)

    def peer(x: Tensor, *pairs: Tensor) -> Tensor:
        y = x.new_zeros(len(x), s.inner)
        for k, scale in enumerate(scales):
            rows = (owner == k).nonzero()[:, 0]
            y = y.index_add(0, rows, scale * (x[rows] @ pairs[k].T @ pairs[8 + k].T))
        return y

    return Case(name="8 adapters in one pass", inputs=[make.trained(s.tokens, s.width), *factors], ours=ours, peer=peer)


def pairs_of_versions(make: Maker) -> Case:
    """Two tokens of each version, at layers that share their input; the peer multiplies version by version."""
    s, n_versions = make.sizes, make.sizes.sequences
    outs = (s.width, s.kv_heads * s.head_dim, s.kv_heads * s.head_dim)
    factors = [[(make.frozen(16, s.width), make.frozen(o, 16)) for o in outs] for _ in range(n_versions)]
    packed = [
        PackedPairs.pack([FactorPair(a, b, 0.5) for a, b in each], outs, dtype=make.dtype, backend="reference")
        for each in factors
    ]
    segments = segments_of(packed, make.device)

    def ours(x: Tensor) -> tuple[Tensor, ...]:
        ys = [x.new_zeros(len(x), o) for o in outs]
        add_pairs(x, segments, ys, backend=make.backend)
        return tuple(ys)

    def peer(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            torch.cat(
                [0.5 * (own @ each[layer][0].to(x.dtype).T @ each[layer][1].to(x.dtype).T) for own, each in zip(
                    x.split(2), factors, strict=True)]
            )
            for layer in range(3)
        )  # fmt: skip

    return Case(name="pairs of many versions", inputs=[make.frozen(2 * n_versions, s.width)], ours=ours, peer=peer)


def segments_of(packed: list[PackedPairs], device: torch.device) -> Segments:
    """Two rows of each version; their table is on the device, as serving sends it with the other numbers of a step."""
    segments = Segments.of([Segment(pairs, 2 * k, 2 * k + 2) for k, pairs in enumerate(packed)])
    return segments if device.type == "cpu" else replace(segments, table=segments.table.to(device))


def filled_pages(make: Maker) -> tuple[PagedStore, tuple[Tensor, Tensor], list[range]]:
    """Pages of keys and values of whole sequences, these keys and values in one piece, and each sequence's pages."""
    s, n = make.sizes, make.sizes.sequences
    heads = (1, s.kv_heads, s.head_dim)
    store = PagedStore.zeros(n * -(-s.length // 16), 16, heads, dtype=make.dtype, device=make.device)
    n_pages = store.n_pages // n
    tables = [range(k * n_pages, (k + 1) * n_pages) for k in range(n)]
    k, v = (make.frozen(n * s.length, s.kv_heads, s.head_dim) for _ in range(2))
    append(store, 0, k, v, rows_on(make.device, [(t, 0, s.length) for t in tables], store), backend=make.backend)
    return store, (k, v), tables


def of_pages(make: Maker) -> Case:
    """A token of each of many sequences, whose keys are in pages; the peer has them in one piece."""
    s, n = make.sizes, make.sizes.sequences
    store, (k, v), tables = filled_pages(make)
    rows = rows_on(make.device, [(t, s.length - 1, 1) for t in tables], store)

    def peer(q: Tensor) -> Tensor:
        keys, values = (x.to(q.dtype).unflatten(0, (n, s.length)).transpose(1, 2) for x in (k, v))
        return functional.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)[:, :, 0]

    options = AttentionOptions(backend=make.backend)
    ours = lambda q: paged_attention(store, 0, q, rows, options)  # noqa: E731
    return Case(name="attention to pages", inputs=[make.frozen(n, s.heads, s.head_dim)], ours=ours, peer=peer)


def rows_on(device: torch.device, sequences: list[tuple[range, int, int]], store: PagedStore) -> PagedRows:
    rows = PagedRows.of(sequences, store)
    sent = (x.to(device) for x in (rows.pages, rows.first_page, rows.first_row, rows.position))
    return PagedRows(*sent, rows.n_rows)


def draws(make: Maker) -> Case:
    """Tokens by temperature, top_k and top_p: the peer draws others, so the reference is what must be equalled."""
    logits = make.frozen(make.sizes.sequences, make.sizes.classes, scale=4.0)
    rules = [RowRule(temperature=0.7, top_k=20, top_p=0.8, key=(3, i)) for i in range(len(logits))]

    def peer(x: Tensor) -> Tensor:
        values, ids = (x.float() / 0.7).sort(descending=True)
        p = values.softmax(-1)
        p = p.masked_fill(p.cumsum(-1) - p >= 0.8, 0.0)
        p[:, 20:] = 0
        return ids.gather(1, p.multinomial(1))

    ours = lambda x: draw(x, rules, backend=make.backend).tokens  # noqa: E731
    exact = lambda: (draw(logits.cpu(), rules, backend="reference").tokens,)  # noqa: E731
    return Case(name="draws", inputs=[logits], ours=ours, peer=peer, exact=exact)
