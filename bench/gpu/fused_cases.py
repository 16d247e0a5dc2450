"""Ops of one launch where torch's own take several: ours, torch's way to the same values, and inputs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from bench.gpu.kernel_cases import Case, Maker, filled_pages, rows_on, segments_of, turned
from veneer.ops.attention import AttentionOptions
from veneer.ops.four_bit import FourBitLayout, dequantize_nested_4bit, quantize_4bit
from veneer.ops.linear.row_norms import row_norms
from veneer.ops.paged_attention import append_turned, paged_attention
from veneer.ops.pairs import FactorPair, PackedPairs, add_pairs
from veneer.ops.rotary import rotate_both
from veneer.quant.double_quant import absmax_table, compress_absmax

RANK, SCALE = 16, 0.5


def rotation_of_both(make: Maker) -> Case:
    """Queries and keys rotated in place: each call copies them first, and the peer's new tensors cost as much."""
    s = make.sizes
    angles = torch.rand(1, s.length, s.head_dim // 2, device=make.device) * 6
    cos, sin = angles.cos().to(make.dtype), angles.sin().to(make.dtype)

    def ours(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = q.clone(), k.clone()
        rotate_both(q, k, cos, sin, backend=make.backend)
        return q, k

    return Case(
        name="rotary, q and k by one launch",
        inputs=[make.frozen(s.rows, heads, s.length, s.head_dim) for heads in (s.heads, s.kv_heads)],
        ours=ours,
        peer=lambda q, k: (turned(q, cos, sin), turned(k, cos, sin)),
    )


def norms_of_rows(make: Maker) -> Case:
    """DoRA's norms from the products that are kept of a weight; the peer forms the weight with its update."""
    s, how = make.sizes, {"backend": make.backend}
    w, a = make.frozen(s.inner, s.width), make.frozen(RANK, s.width, scale=s.width**-0.5)
    wide_w, wide_a = w.float(), a.float()
    row_sq, wa = wide_w.square().sum(1), wide_a @ wide_w.T

    def peer(b: Tensor) -> Tensor:
        return (w.to(b.dtype) + SCALE * b @ a.to(b.dtype)).norm(dim=1)

    ours = lambda b: row_norms(row_sq, wa, a, b, SCALE, **how)  # noqa: E731
    return Case(name="row norms of an updated weight", inputs=[make.frozen(s.inner, RANK)], ours=ours, peer=peer)


def nested_decode(make: Maker) -> Case:
    """NF4 whose block maxima are in 8 bits themselves; the peer is the reference."""
    w = make.frozen(make.sizes.inner, make.sizes.width)
    packed, absmax = quantize_4bit(w, "nf4", backend=make.backend)
    small, layout = compress_absmax(absmax.cpu()), FourBitLayout(tuple(w.shape), "nf4", 64, make.dtype)
    nested = small.codes, small.scale, small.offset
    held = tuple(part.to(make.device) for part in nested)
    code = absmax_table(make.device)
    on_host = absmax_table(torch.device("cpu"))
    return Case(
        name="NF4 dequantize, double quantization",
        inputs=[packed],
        ours=lambda p: dequantize_nested_4bit(p, held, code, layout, backend=make.backend),
        peer=lambda p: dequantize_nested_4bit(p, held, code, layout, backend="reference"),
        peer_name="the reference",
        exact=lambda: (dequantize_nested_4bit(packed.cpu(), nested, on_host, layout, backend="reference"),),
    )


def scaled_pairs(make: Maker) -> Case:
    """DoRA of many versions, two tokens of each: the sum of base and pair is scaled, each output by its own number."""
    s, n_versions = make.sizes, make.sizes.sequences
    factors = [(make.frozen(RANK, s.width), make.frozen(s.inner, RANK)) for _ in range(n_versions)]
    scales = [torch.rand(s.inner, device=make.device) + 0.5 for _ in range(n_versions)]
    packed = []
    for (a, b), scale in zip(factors, scales, strict=True):
        plain = PackedPairs.pack([FactorPair(a, b, SCALE)], [s.inner], dtype=make.dtype, backend="reference")
        scaling = plain.scaling([scale])
        assert scaling is not None
        packed.append(scaling)
    segments = segments_of(packed, make.device)

    def ours(x: Tensor, y: Tensor) -> Tensor:
        y = y.clone()
        add_pairs(x, segments, [y], backend=make.backend)
        return y

    def peer(x: Tensor, y: Tensor) -> Tensor:
        parts = zip(x.split(2), y.split(2), factors, scales, strict=True)
        return torch.cat(
            [
                (own + SCALE * (rows @ a.to(x.dtype).T @ b.to(x.dtype).T)) * by.to(x.dtype)
                for rows, own, (a, b), by in parts
            ]
        )

    inputs = [make.frozen(2 * n_versions, s.width), make.frozen(2 * n_versions, s.inner)]
    return Case(name="scaled pairs of many versions", inputs=inputs, ours=ours, peer=peer)


def appended_turned(make: Maker) -> Case:
    """A token of each of many sequences, rotated and written behind the sequence's keys, then attended to."""
    s, n = make.sizes, make.sizes.sequences
    store, (keys, values), tables = filled_pages(make)
    rows = rows_on(make.device, [(t, s.length - 1, 1) for t in tables], store)
    angles = torch.rand(1, n, s.head_dim // 2, device=make.device) * 6
    cos, sin = angles.cos().to(make.dtype), angles.sin().to(make.dtype)
    options = AttentionOptions(backend=make.backend)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = q.clone(), k.clone()
        append_turned(store, 0, (q, k, v), rows, (cos, sin), backend=make.backend)
        return paged_attention(store, 0, q, rows, options)

    def peer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (turned(x.transpose(0, 1)[None], cos, sin)[0].transpose(0, 1) for x in (q, k))
        held = [
            torch.cat([x.to(q.dtype).unflatten(0, (n, s.length))[:, :-1], new[:, None]], dim=1).transpose(1, 2)
            for x, new in ((keys, k), (values, v))
        ]
        return functional.scaled_dot_product_attention(q[:, :, None], *held, enable_gqa=True)[:, :, 0]

    heads = [make.frozen(n, count, s.head_dim) for count in (s.heads, s.kv_heads, s.kv_heads)]
    return Case(name="rotation, pages and attention", inputs=heads, ours=ours, peer=peer)


def biased_attention(make: Maker) -> Case:
    """Attention to pages with ALiBi's bias of positions; the peer adds it as a mask."""
    s, n = make.sizes, make.sizes.sequences
    store, (keys, values), tables = filled_pages(make)
    rows = rows_on(make.device, [(t, s.length - 1, 1) for t in tables], store)
    slopes = 2.0 ** (-8.0 * torch.arange(1, s.heads + 1, device=make.device) / s.heads)
    place = torch.arange(-(-s.length // 16) * 16, device=make.device)
    bias = (slopes[:, None] * place).float().contiguous()
    options = AttentionOptions(backend=make.backend)

    def peer(q: Tensor) -> Tensor:
        k, v = (x.to(q.dtype).unflatten(0, (n, s.length)).transpose(1, 2) for x in (keys, values))
        mask = (bias[:, : s.length] - bias[:, s.length - 1 : s.length]).to(q.dtype)[None, :, None]
        out = functional.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask, enable_gqa=True)
        return out[:, :, 0]

    ours = lambda q: paged_attention(store, 0, q, rows, options, bias)  # noqa: E731
    return Case(name="attention to pages, ALiBi", inputs=[make.frozen(n, s.heads, s.head_dim)], ours=ours, peer=peer)
