"""Gated delta rule of a served step: convolution, scan, norm and gate, with the states of sequences in pages.

A page keeps one state at each layer: that after the last token written into it. A row reads the state before it, in its
own page or, if it is the first of a page, in the page before. So a full page holds the state at its end, from which any
sequence with the same beginning goes on; but a position is written once, as its state is gone afterwards.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from veneer.errors import ShapeError
from veneer.ops.dispatch import implementation
from veneer.ops.memory import discard_pages, empty_pages
from veneer.ops.paged_attention import PagedRows
from veneer.ops.state.conv import ConvKernel

UNIT_EPS = 1e-6  # added to the square of a query's or key's length, as in transformers and FLA


@dataclass(frozen=True, slots=True)
class StateShape:
    """Sizes of a layer's state: heads, values of a key and of a value, and tokens that the convolution sees.

    Consecutive value heads share a key head.
    """

    n_k_heads: int
    n_v_heads: int
    k_width: int
    v_width: int
    kernel: int

    @property
    def conv_width(self) -> int:
        """Number of channels of the convolution: queries, keys and values of all heads."""
        return 2 * self.n_k_heads * self.k_width + self.width

    @property
    def width(self) -> int:
        """Number of values of all heads."""
        return self.n_v_heads * self.v_width

    @property
    def n_numbers(self) -> int:
        """Float32 numbers of a state: a matrix (k_width, v_width) of each head, then the convolution's last inputs."""
        return self.width * self.k_width + (self.kernel - 1) * self.conv_width


@dataclass(frozen=True, slots=True, eq=False)
class StateStore:
    """States (n_pages, n_layers, numbers) in float32 for pages of ``block`` tokens, and the mapping that holds them on
    a CPU.

    The input of position p has the place ``p % (kernel - 1)`` among the convolution's inputs.
    """

    data: Float32[Tensor, "n_pages n_layers numbers"]
    block: int
    shape: StateShape
    memory: mmap.mmap | None = None

    @classmethod
    def zeros(
        cls, n_pages: int, n_layers: int, block: int, shape: StateShape, *, device: torch.device | str = "cpu"
    ) -> StateStore:
        """Return empty pages. On a CPU a page takes memory when it is first written."""
        data, memory = empty_pages(n_pages, n_layers * shape.n_numbers, torch.float32, device)
        return cls(data.view(n_pages, n_layers, shape.n_numbers), block, shape, memory)

    @property
    def n_pages(self) -> int:
        """Number of pages."""
        return self.data.shape[0]

    def discard(self, pages: Iterable[int]) -> None:
        """Give the memory of pages back to the system, if it supports this. The pages are then zeros or unchanged."""
        discard_pages(self.memory, self.data[0].nbytes, pages)


@dataclass(frozen=True, slots=True)
class DeltaInput:
    """Products of a layer's input for n tokens, by key head: query, key, values, gates z, and b and a of its value
    heads.
    """

    q: Float[Tensor, "n h_k d_k"]
    k: Float[Tensor, "n h_k d_k"]
    v: Float[Tensor, "n h_k values"]
    z: Float[Tensor, "n h_k values"]
    b: Float[Tensor, "n h_k group"]
    a: Float[Tensor, "n h_k group"]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The tensors in the order of the fields."""
        return self.q, self.k, self.v, self.z, self.b, self.a


@dataclass(frozen=True, slots=True)
class DeltaWeights:
    """Kernel of the convolution, weight and ``eps`` of the norm, and of each head the rate exp(A_log) and the bias of
    the decay.

    β is ``beta_scale`` · sigmoid(b).
    """

    kernel: ConvKernel
    norm: Float[Tensor, " v_width"]
    eps: float
    rate: Float32[Tensor, " h"]
    bias: Float32[Tensor, " h"]
    beta_scale: float = 1.0


def of_length_1(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """Return x with each vector scaled to length 1, or less if it is nearly zero."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + UNIT_EPS)


def delta_in_pages(
    store: StateStore,
    layer: int,
    given: DeltaInput,
    weights: DeltaWeights,
    rows: PagedRows,
    *,
    backend: str | None = None,
) -> Float[Tensor, "n width"]:
    """Return ``norm(Sᵀ q) · silu(z)`` for the rows of a step, and write their states into the pages of one layer.

    q, k and v are the convolution's outputs after SiLU, q and k scaled to length 1, and q by k_width^-½ too. With the
    decay ``a = exp(-rate · softplus(a + bias))``, a token changes its head's state S (k_width, v_width) to
    ``a S + k (β (v - a Sᵀ k))ᵀ`` (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464, equation 10). Tokens come one
    after the other, also in a prompt: a row's result is the same, bit for bit, whatever the batch and the chunks of a
    prompt are. Values are rounded where transformers rounds them: after the convolution, β, the heads' outputs, their
    norm, and the gate; the state is float32.

    A sequence's rows follow those that were written before, none twice. Raises ShapeError if the parts do not fit.
    """
    shape, kernel = store.shape, weights.kernel
    group, heads = shape.n_v_heads // shape.n_k_heads, (shape.n_v_heads,)
    widths = (shape.k_width, shape.k_width, *[group * shape.v_width] * 2, group, group)
    sizes = [(rows.n_rows, shape.n_k_heads, width) for width in widths]
    fits = 0 <= layer < store.data.shape[1] and shape.n_v_heads % shape.n_k_heads == 0
    fits = fits and [tuple(x.shape) for x in given.tensors] == sizes and len({x.dtype for x in given.tensors}) == 1
    held = [tuple(kernel.weight.shape), tuple(weights.norm.shape), tuple(weights.rate.shape), tuple(weights.bias.shape)]
    if not fits or held != [(shape.conv_width, shape.kernel), (shape.v_width,), heads, heads]:
        told = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in given.tensors)
        raise ShapeError(
            f"layer {layer} of states of {shape} at {store.data.shape[1]} layers takes rows {sizes} of one dtype; "
            f"given {told}, and weights {held} of the convolution, the norm, the rate and the bias"
        )
    y: Tensor = implementation("delta.delta_in_pages", given.q.device, backend)(store, layer, given, weights, rows)
    return y
