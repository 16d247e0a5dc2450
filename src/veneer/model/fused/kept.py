"""Tensors that the fused halves of a described block keep for their backward passes, without a weight.

Everything here follows from the description of a decoder, from what acts on its linear layers, and from what
`model.fused.attention`, `model.fused.mlp` and `ops.linear.op` save; how the base is stored changes nothing, for codes
are the model's own. A half that runs as the model wrote it is a `Strange` in place of a number.

Not counted is what does not grow with the tokens of a pass (a few vectors a layer that DoRA's scale is made of), and
what is one for all blocks: tables of the rotation, bounds of sequences, ids of dropout's masks.

`model.activation_memory` asks for what blocks keep whole. A plan of a run before it starts, which is still to come,
will ask for the rest: ``selective`` and ``reaches`` of a pass, `kept_by_recomputed`, `kept_by_loss`, and `total` of the
tensors that are ``at_least`` so large.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from veneer.core.records import LinearDelta
from veneer.model.blueprint.decoder import Block, Decoder
from veneer.model.blueprint.parts import Attention, Experts, FeedForward, Linear, Norm, Strange
from veneer.model.fused.head import is_plain_head
from veneer.model.fused.shape import BlockShape, block_shape
from veneer.ops.grouped_low_rank import kept_bytes

_ROLES = {"q": "queries", "k": "keys", "v": "values", "qkv": "queries, keys, values", "gate_up": "gate, up"}


@dataclass(frozen=True, slots=True)
class KeptTensor:
    """One tensor that waits for the backward pass, and its bytes."""

    name: str
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Acting:
    """An adapter's part at a linear layer in training, as far as it decides what is kept.

    ``rank`` is that of the record's low-rank part, which may be more than a config's (PiSSA: twice). ``drops``: dropout
    in front of it; its mask is drawn again, but the products lie in another form.
    """

    rank: int = 0
    scales_input: bool = False
    trains_output_scale: bool = False
    drops: bool = False

    @classmethod
    def of(cls, record: LinearDelta, *, drops: bool = False) -> Acting:
        """By a record, whose tensors may be on the meta device."""
        return cls(
            rank=record.rank,
            scales_input=record.in_scale is not None,
            trains_output_scale=record.out_scale is not None and record.out_scale.requires_grad,
            drops=drops,
        )


NOTHING = Acting()
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One forward pass in training, over ``n_tokens``, padding among them.

    ``stream`` is the dtype of the residual stream, ``dtype`` that of linear layers (bfloat16 beside a float32 stream
    under autocast). ``selective``: blocks are checkpointed in the selective form. ``reaches``: a gradient is asked for
    in the stream itself, as behind the first adapter; where not, a half without an adapter keeps nothing. ``acting``:
    what acts on the layers by their paths. ``device`` is the one that the pass is for.
    """

    n_tokens: int
    stream: torch.dtype
    dtype: torch.dtype
    acting: Mapping[str, Acting]
    selective: bool = False
    reaches: bool = True
    device: torch.device = CPU

    def rows(self, name: str, features: int, dtype: torch.dtype) -> KeptTensor:
        """A tensor with so many numbers a token."""
        return KeptTensor(name, self.n_tokens * features * dtype.itemsize)

    def on(self, linear: Linear) -> Acting:
        """The adapter's part at a layer."""
        return self.acting.get(linear.path, NOTHING)


Kept = tuple[KeptTensor, ...]


def kept_by_attention(block: Block, step: Pass) -> Kept | Strange:
    """Tensors that the attention half of a block keeps."""
    shape = block_shape(block)
    if isinstance(shape, str) or shape.attention is None:
        return _unfused(block.attention, shape)
    attention, heads = cast(Attention, block.attention), cast(Attention, block.attention).heads
    if not step.reaches and not _adapted(attention.linears, step):
        return ()
    width = heads.n_heads * heads.head_dim
    return (
        step.rows("input", attention.qkv[0].in_features, step.stream),
        *_statistics("the norm", block.norms.attention, 1, step.stream, step),
        *_low_rank(attention.qkv, step),
        *(() if step.selective else _products(attention.qkv, step)),
        *(() if step.selective else _heads(attention, step)),
        step.rows("attention output", width, step.dtype),
        step.rows("log-sum-exp", heads.n_heads, _wide(step.dtype)),
        *_low_rank((attention.out,), step),
        *_products((attention.out,), step),
        *_norm_behind(block.norms.attention_post, attention.out, step),
    )


def kept_by_feed_forward(block: Block, step: Pass) -> Kept | Strange:
    """Tensors that the feed-forward half of a block keeps; in a parallel block the input is the attention half's."""
    shape = block_shape(block)
    if isinstance(shape, str) or shape.mlp is None:
        return _unfused(block.feed_forward, shape)
    part = cast(FeedForward, block.feed_forward)
    if not step.reaches and not _adapted(part.linears, step):
        return ()
    again = [linear for linear in part.inner if not step.on(linear).trains_output_scale]  # the others by their products
    return (
        step.rows("input", part.inner[0].in_features, step.stream),
        *_statistics("the norm", block.norms.feed_forward, 1, step.stream, step),
        *_low_rank(part.inner, step),
        *(() if step.selective else _products(part.inner, step)),
        *(() if step.selective else (step.rows(_named(x), x.out_features, step.dtype) for x in again)),
        *_low_rank((part.down,), step),
        *_products((part.down,), step),
        *_norm_behind(block.norms.feed_forward_post, part.down, step),
    )


def kept_by_block(block: Block, step: Pass) -> Kept | Strange:
    """Tensors that both halves keep, each once; a `Strange` where one of them runs as the model wrote it."""
    attention, feed_forward = kept_by_attention(block, step), kept_by_feed_forward(block, step)
    if isinstance(attention, Strange):
        return attention
    if isinstance(feed_forward, Strange):
        return feed_forward
    shared = 1 if block.parallel and attention and feed_forward else 0
    return (*attention, *feed_forward[shared:])


def kept_by_recomputed(block: Block, step: Pass) -> Kept:
    """The input of a block, which it keeps where it is computed again as a whole, of any kind."""
    halves = (block.attention, block.feed_forward)
    width = next(half.linears[0].in_features for half in halves if not isinstance(half, Strange))
    return (step.rows("input", width, step.stream),)


def kept_by_loss(decoder: Decoder, n_rows: int, dtype: torch.dtype) -> Kept | Strange:
    """Tensors that a frozen head and the loss keep where they are one op, over ``n_rows`` hidden states.

    ``dtype`` is what the head computes in. The final norm in front of it is the model's own code and not counted.
    """
    head = decoder.head
    if head is None or not is_plain_head(head):
        reason = "there is no head" if head is None else "its head caps or scales, and the loss is not computed in it"
        return Strange(path="" if head is None else head.linear.path, reason=reason)
    return (KeptTensor("gradient of hidden states", n_rows * head.linear.in_features * dtype.itemsize),)


def total(kept: Kept, at_least: int = 0) -> int:
    """Bytes of them; with ``at_least`` of those alone that are as large, which is what `ActivationOffload` takes."""
    return sum(tensor.nbytes for tensor in kept if tensor.nbytes >= at_least)


def _unfused(half: Attention | FeedForward | Experts | Strange, shape: BlockShape | str) -> Strange:
    reason = (
        half.reason if isinstance(half, Strange) else shape if isinstance(shape, str) else "no kernel is of its kind"
    )
    return Strange(path=half.path, reason=f"this half runs as the model wrote it: {reason}")


def _adapted(linears: Sequence[Linear], step: Pass) -> bool:
    return any(linear.path in step.acting for linear in linears)


def _heads(attention: Attention, step: Pass) -> Iterator[KeptTensor]:
    heads = attention.heads
    for name, norm, n in (
        ("queries", attention.q_norm, heads.n_heads),
        ("keys", attention.k_norm, heads.n_kv_heads),
        ("values", None, heads.n_kv_heads),
    ):
        yield step.rows(name, n * heads.head_dim, step.dtype)
        if norm is not None:
            yield step.rows(f"{name} before their norm", n * heads.head_dim, step.dtype)
            yield from _statistics(f"the norm of {name}", norm, n, step.dtype, step)


def _norm_behind(norm: Norm | None, out: Linear, step: Pass) -> Iterator[KeptTensor]:
    if norm is not None:
        yield step.rows("output before its norm", out.out_features, step.dtype)
        yield from _statistics("the norm behind", norm, 1, step.dtype, step)


def _statistics(of: str, norm: Norm | None, n: int, dtype: torch.dtype, step: Pass) -> Iterator[KeptTensor]:
    """Of n norms a token: the reciprocal deviation, and in a LayerNorm the mean."""
    if norm is not None:
        yield step.rows(f"statistics of {of}", n * (2 if norm.kind == "layer" else 1), _wide(dtype))


def _products(linears: Sequence[Linear], step: Pass) -> Iterator[KeptTensor]:
    """The products in front of scales of outputs that are trained."""
    for linear in linears:
        if step.on(linear).trains_output_scale:
            yield step.rows(f"{_named(linear)} before their scale", linear.out_features, step.dtype)


def _low_rank(linears: Sequence[Linear], step: Pass) -> Iterator[KeptTensor]:
    """The A-products of layers that share their input; of one whose input is scaled they are a tensor of their own."""
    adapted = [linear for linear in linears if step.on(linear).rank]
    sharing = [linear for linear in adapted if not step.on(linear).scales_input]
    groups = [[linear for linear in sharing if step.on(linear).drops == drops] for drops in (False, True)]
    for group in (*groups, *([linear] for linear in adapted if step.on(linear).scales_input)):
        if group:
            yield _a_products(group, step)


def _a_products(group: Sequence[Linear], step: Pass) -> KeptTensor:
    name = f"low rank of {', '.join(_named(linear) for linear in group)}"
    ranks = [step.on(linear).rank for linear in group]
    if not step.on(group[0]).drops:
        return step.rows(name, sum(ranks), step.dtype)
    widths = [linear.out_features for linear in group]
    return KeptTensor(name, kept_bytes(ranks, widths, step.n_tokens, step.dtype, step.device))


def _named(linear: Linear) -> str:
    return _ROLES.get(linear.role, linear.role)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
