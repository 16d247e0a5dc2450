"""Each training op beside torch in bfloat16 at the sizes of a LoRA step of SmolLM2-135M (4 x 512 tokens)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from bench.kernels.differentiable import attention, glu, rms_norm, rotary
from bench.paired import Pair
from veneer.ops.attention import AttentionOptions
from veneer.ops.cross_entropy import linear_cross_entropy
from veneer.ops.dropout import drop, keep_scale
from veneer.ops.linear.layer import LinearLayer
from veneer.ops.linear.op import linears
from veneer.records.deltas import LinearDelta

BATCH, T, D, INNER, VOCAB, HEADS, KV_HEADS, HEAD_DIM, RANK = 4, 512, 576, 1536, 49152, 9, 3, 64, 16
# Products alone: half of attention's scores, which are causal (forward two products, backward four at the least); the
# head and two frozen weights, which get no gradient; the factors, which do.
FLOPS = {
    "attention": 6 * BATCH * HEADS * T * T * HEAD_DIM,
    "head and loss": 2 * 2 * BATCH * T * D * VOCAB,
    "lora gate, up": 2 * BATCH * T * (2 * 2 * D * INNER + 3 * 2 * RANK * (D + INNER)),
}
Outputs = tuple[Tensor, ...]
Step = Callable[[], Outputs]


def training_pairs() -> Iterator[Pair]:
    """Forward and backward of each op; stops where a result differs from torch's."""
    for name, ours, peer, inputs in _ops():
        seed = torch.get_rng_state()
        a = both_ways(ours, inputs)
        torch.set_rng_state(seed)  # the same output gradients on both sides
        b = both_ways(peer, inputs)
        require_equal(name, a(), b())
        yield Pair(name, b, a, _moved(a(), inputs), FLOPS.get(name, 0))
    yield _dropout_pair()


def _dropout_pair() -> Pair:
    """Values dropped, and a gradient dropped alike. torch draws other masks: shares are compared."""
    x, dy = leaves((BATCH * T, D))[0], torch.randn(BATCH * T, D).bfloat16()
    p = 0.05

    def ours() -> Outputs:
        return drop(x.detach(), p, 7), drop(dy, p, 7)

    def peer() -> Outputs:
        y = functional.dropout(x, p)
        return y.detach(), torch.autograd.grad(y, x, dy)[0]

    for y, scale in ((ours()[0], 1.0), (peer()[0], keep_scale(p))):
        share = (y == 0).float().mean().item()
        kept = torch.where(y == 0, y, (x * scale).to(y.dtype))
        if abs(share - p) > 0.002 or not torch.allclose(y, kept, rtol=0.01):
            raise SystemExit(f"dropout: a share of {share:.4f} is dropped, or other values than x's are kept")
    return Pair(f"dropout, {x.numel() / 1e6:.2f} million values", peer, ours, 4 * x.nbytes, 0)


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [torch.randn(s).to(dtype).requires_grad_() for s in shapes]


def both_ways(function: Callable[..., Tensor | Outputs], inputs: list[Tensor]) -> Step:
    """One forward and one backward; returns outputs and gradients."""
    first = function(*inputs)
    outs = first if isinstance(first, tuple) else (first,)
    dys = [torch.randn_like(o) for o in outs]

    def step() -> Outputs:
        result = function(*inputs)
        ys = result if isinstance(result, tuple) else (result,)
        return *(y.detach() for y in ys), *torch.autograd.grad(ys, inputs, dys)

    return step


def _ops() -> Iterator[tuple[str, Callable[..., Tensor | Outputs], Callable[..., Tensor | Outputs], list[Tensor]]]:
    weight = torch.randn(D).bfloat16()
    x = leaves((BATCH * T, D))
    yield "rms_norm", lambda x: rms_norm(x, weight, 1e-5), lambda x: _llama_norm(x, weight), x
    yield (
        "swiglu",
        lambda g, u: glu(g, u, "silu"),
        lambda g, u: functional.silu(g) * u,
        leaves(*[(BATCH * T, INNER)] * 2),
    )
    angles = torch.rand(1, T, HEAD_DIM // 2) * 6
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    qk = leaves((BATCH, HEADS, T, HEAD_DIM), (BATCH, KV_HEADS, T, HEAD_DIM))
    yield "rotary", lambda q, k: rotary(q, k, cos, sin), lambda q, k: _llama_rotary(q, k, cos, sin), qk
    cu = torch.arange(0, BATCH * T + 1, T)
    qkv = leaves(*[(BATCH * T, h, HEAD_DIM) for h in (HEADS, KV_HEADS, KV_HEADS)])
    yield "attention", lambda q, k, v: attention(q, k, v, cu, AttentionOptions()), _sdpa, qkv
    head, labels = (torch.randn(VOCAB, D) * 0.05).bfloat16(), torch.randint(0, VOCAB, (BATCH * T,))
    plain_loss = lambda h: functional.cross_entropy((h @ head.T).float(), labels)  # noqa: E731
    yield (
        "head and loss",
        lambda h: linear_cross_entropy(h, head, labels),
        plain_loss,
        leaves((BATCH * T, D)),
    )
    yield "lora gate, up", *_lora_pair()


def _lora_pair() -> tuple[Callable[..., Outputs], Callable[..., Outputs], list[Tensor]]:
    """Frozen bfloat16 weights and float32 factors on both sides; the peer's adapter path is float32, as PEFT's is."""
    frozen = [(torch.randn(INNER, D) * 0.05).bfloat16() for _ in range(2)]
    factors = [f for _ in range(2) for f in leaves((RANK, D), (INNER, RANK), dtype=torch.float32)]

    def ours(x: Tensor, *f: Tensor) -> Outputs:
        records = [LinearDelta.pair(f[2 * i], f[2 * i + 1], 2.0) for i in range(len(frozen))]
        return linears(x, [LinearLayer(weight=w, records=(r,)) for w, r in zip(frozen, records, strict=True)])

    def peer(x: Tensor, *f: Tensor) -> Outputs:
        return tuple(
            functional.linear(x, w) + ((x.float() @ f[2 * i].T @ f[2 * i + 1].T) * 2.0).to(x.dtype)
            for i, w in enumerate(frozen)
        )

    return ours, peer, [*leaves((BATCH * T, D)), *factors]


def _moved(results: Outputs, inputs: list[Tensor]) -> int:
    """Bytes of inputs and results, each once, and of the output gradients."""
    n_grads = len(inputs)
    outs = results[:-n_grads]
    return sum(t.nbytes for t in (*inputs, *results, *outs))


def _llama_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def _llama_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Outputs:
    c, s = (torch.cat([t, t], dim=-1).unsqueeze(1) for t in (cos, sin))
    half = HEAD_DIM // 2
    return tuple(x * c + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * s for x in (q, k))


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = [x.view(BATCH, T, -1, HEAD_DIM).transpose(1, 2) for x in (q, k, v)]
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in rows[1:])
    out = functional.scaled_dot_product_attention(rows[0], k, v, is_causal=True)
    return out.transpose(1, 2).reshape(BATCH * T, HEADS, HEAD_DIM)


def require_equal(name: str, ours: Outputs, peers: Outputs) -> None:
    for index, (a, b) in enumerate(zip(ours, peers, strict=True)):
        error = (a.float() - b.float()).norm() / b.float().norm()
        if not error < 0.02:
            raise SystemExit(f"{name}: result {index} differs from torch's by {error:.3g} of its norm")
