"""A decoder run from its description alone, in plain torch: ids to logits, without a line of the model's own code."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear as matmul

from veneer.model.blueprint.alibi import Alibi
from veneer.model.blueprint.decoder import Block, Decoder
from veneer.model.blueprint.parts import Attention, Experts, FeedForward, Linear, Norm, ShortConv, Stack, Strange
from veneer.ops.activation import activation_forward

Weights = Mapping[str, Tensor]


def logits(decoder: Decoder, weights: Weights, ids: Tensor) -> Tensor:
    """(b, t) token ids at positions 0 … t-1 to (b, t, n_tokens); ``weights`` by their names in the model."""
    assert not decoder.strange
    h = embedded(decoder, weights, ids)
    for block in decoder.blocks:
        h = through(block, weights, h)
    head = decoder.head
    assert head is not None
    y = head.scale * project(head.linear, weights, normed(decoder.norm, weights, h))
    return y if head.softcap is None else head.softcap * torch.tanh(y / head.softcap)


def embedded(decoder: Decoder, weights: Weights, ids: Tensor) -> Tensor:
    part = decoder.embedding
    h = part.multiplier * weights[f"{part.path}.weight"][ids]
    if part.positions is not None:
        start = part.positions.offset
        h = h + weights[f"{part.positions.path}.weight"][start : start + ids.shape[1]]
    return normed(part.norm, weights, h)


def through(block: Block, weights: Weights, h: Tensor) -> Tensor:
    assert not isinstance(block.attention, Strange)
    assert not isinstance(block.feed_forward, Strange)
    norms, multiplier = block.norms, block.residual_multiplier
    attended = attend(block.attention, weights, normed(norms.attention, weights, h))
    after = h + multiplier * normed(norms.attention_post, weights, attended)
    x = normed(norms.feed_forward, weights, h if block.parallel else after)
    fed = feed(block.feed_forward, weights, x)
    return after + multiplier * normed(norms.feed_forward_post, weights, fed)


def attend(part: Attention | ShortConv, weights: Weights, x: Tensor) -> Tensor:
    if isinstance(part, ShortConv):
        return convolve(part, weights, x)
    n_rows, n_tokens, _ = x.shape
    outputs = [project(layer, weights, x).flatten(0, 1) for layer in part.qkv]
    if part.clip is not None:
        outputs = [y.clamp(-part.clip, part.clip) for y in outputs]
    shape = (n_rows, n_tokens, -1, part.heads.head_dim)
    q, k, v = (t.reshape(shape) for t in part.heads.split(outputs))
    if not part.norms_after_rotary:
        q, k = normed_heads(part.q_norm, weights, q), normed_heads(part.k_norm, weights, k)
    positions = torch.arange(n_tokens)
    if part.rotary is not None:
        cos, sin = (table[:, None] for table in part.rotary.tables(positions))
        q, k = (rotated(t, cos, sin, part.rotary.interleaved) for t in (q, k))
    if part.norms_after_rotary:
        q, k = normed_heads(part.q_norm, weights, q), normed_heads(part.k_norm, weights, k)
    if part.temperature is not None:
        turns = torch.floor(positions / part.temperature.original_max_positions)
        q = q * (1 + part.temperature.beta * torch.log1p(turns))[:, None, None]
    group = part.heads.n_heads // part.heads.n_kv_heads
    k, v = (t.repeat_interleave(group, dim=2) for t in (k, v))
    scores = part.scale * torch.einsum("bqhd,bkhd->bhqk", q, k)
    if part.softcap is not None:
        scores = part.softcap * torch.tanh(scores / part.softcap)
    distance = positions[:, None] - positions
    if part.alibi is not None:
        scores = scores + alibi(part.alibi, positions)
    hidden = (distance < 0) | (distance >= (part.window or n_tokens))
    scores = scores.masked_fill(hidden, -torch.inf)
    if part.sinks:
        sinks = weights[part.sinks][:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1)[..., :n_tokens], v)
    return project(part.out, weights, mixed.flatten(2))


def convolve(part: ShortConv, weights: Weights, x: Tensor) -> Tensor:
    before, after, inner = project(part.inner, weights, x).chunk(3, -1)
    padded = torch.nn.functional.pad((before * inner).mT, (part.kernel - 1, 0))
    bias = weights[f"{part.conv}.bias"] if part.bias else None
    mixed = torch.nn.functional.conv1d(padded, weights[f"{part.conv}.weight"], bias, groups=part.width).mT
    return project(part.out, weights, after * mixed)


def alibi(part: Alibi, positions: Tensor) -> Tensor:
    """Biases (heads, queries, keys): each slope times the distance, or Falcon's own rounding of it."""
    slopes = alibi_slopes(part.n_heads)[:, None]
    if part.rounded:
        biases = (slopes.bfloat16() * positions.bfloat16()).float() * part.scale
        return biases[:, None, :] - biases[:, :, None]
    return -part.scale * slopes[..., None] * (positions[:, None] - positions)


def alibi_slopes(n_heads: int) -> Tensor:
    """One slope a head: 2^(-8 i / n) for n a power of two, and between them for further heads (arXiv 2108.12409)."""
    n = 2 ** math.floor(math.log2(n_heads))
    first = [2.0 ** (-8 * i / n) for i in range(1, n + 1)]
    between = [2.0 ** (-4 * i / n) for i in range(1, 2 * (n_heads - n), 2)]
    return torch.tensor(first + between)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    turning, rest = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    pairs = turning.unflatten(-1, (-1, 2) if interleaved else (2, -1))
    a, b = pairs.unbind(-1 if interleaved else -2)
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1 if interleaved else -2)
    return torch.cat([turned.flatten(-2), rest], -1)


def feed(part: FeedForward | Experts, weights: Weights, x: Tensor) -> Tensor:
    if isinstance(part, Experts):
        return mixture(part, weights, x)
    inner = torch.cat([project(layer, weights, x) for layer in part.inner], -1)
    return project(part.down, weights, acted(inner, part.activation, part.gated))


def acted(inner: Tensor, activation: str, gated: bool) -> Tensor:
    if not gated:
        return activation_forward(inner, activation)
    if activation == "swiglu_oai":
        gate, up = inner[..., ::2].clamp(max=7), inner[..., 1::2].clamp(-7, 7)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = inner.chunk(2, -1)
    return activation_forward(gate, activation) * up


def through_stack(part: Stack, weights: Weights, sum_of: str, x: Tensor) -> Tensor:
    weight = weights[part.path].mT if part.transposed else weights[part.path]
    y = torch.einsum(sum_of, x, weight)
    return y + weights[f"{part.path}_bias"] if part.bias else y


def mixture(part: Experts, weights: Weights, x: Tensor) -> Tensor:
    scores = project(part.router, weights, x)
    values = scores.softmax(-1) if part.values == "softmax" else scores.sigmoid()
    choice = values + weights[part.correction] if part.correction else values
    groups = choice.unflatten(-1, (part.n_groups, -1))
    kept = groups.topk(min(2, groups.shape[-1]), -1).values.sum(-1).topk(part.kept_groups, -1).indices
    outside = torch.ones(groups.shape[:-1], dtype=torch.bool).scatter(-1, kept, False)
    chosen = groups.masked_fill(outside[..., None], -torch.inf).flatten(-2).topk(part.top_k, -1).indices
    ratings = values.gather(-1, chosen)
    if part.normalized:
        ratings = ratings / ratings.sum(-1, keepdim=True)
    ratings = ratings * part.scale
    inner = through_stack(part.gate_up, weights, "btd,eid->btei", x)
    outputs = through_stack(part.down, weights, "btei,edi->bted", acted(inner, part.activation, True))
    y = (ratings[..., None] * outputs.gather(2, chosen[..., None].expand(*chosen.shape, x.shape[-1]))).sum(2)
    if part.shared is not None:
        shared = feed(part.shared, weights, x)
        gate = 1 if part.shared_gate is None else project(part.shared_gate, weights, x).sigmoid()
        y = y + gate * shared
    return y


def project(layer: Linear, weights: Weights, x: Tensor) -> Tensor:
    weight = weights[f"{layer.path}.weight"]
    return matmul(x, weight.T if layer.transposed else weight, weights[f"{layer.path}.bias"] if layer.bias else None)


def normed_heads(norm: Norm | None, weights: Weights, heads: Tensor) -> Tensor:
    """(b, t, heads, d): over each head, or over all of them at once."""
    over_all = norm is not None and len(norm.shape) == 1 and norm.shape[0] != heads.shape[-1]
    return normed(norm, weights, heads.flatten(2)).view(heads.shape) if over_all else normed(norm, weights, heads)


def normed(norm: Norm | None, weights: Weights, x: Tensor) -> Tensor:
    if norm is None:
        return x
    x = x - x.mean(-1, keepdim=True) if norm.kind == "layer" else x
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
    y = y * (weights[f"{norm.path}.weight"] + norm.offset) if norm.weight else y
    return y + weights[f"{norm.path}.bias"] if norm.bias else y
