"""Gated delta rule with states in pages: the training scan of each sequence alone; bits are the same in any chunks."""

import pytest
import torch
from torch.nn.functional import silu, softplus

from veneer.errors import ShapeError
from veneer.ops.paged_attention import PagedRows
from veneer.ops.state.conv import ConvKernel, GatedInput, conv_forward, previous_rows
from veneer.ops.state.delta import UNIT_EPS, DeltaInput, DeltaWeights, StateShape, StateStore, delta_in_pages
from veneer.ops.state.scan import ScanInput, scan

OP = "delta.delta_in_pages"
N, BOUNDS = 51, (0, 31, 51)  # two sequences
SHAPES = [StateShape(3, 6, 20, 12, 4), StateShape(2, 2, 33, 70, 3), StateShape(1, 1, 5, 3, 1)]


def draw(shape, dtype, *, bias=True):
    generator = torch.Generator().manual_seed(shape.k_width)
    heads = shape.n_v_heads
    widths = (shape.k_width, shape.k_width, *[shape.width // shape.n_k_heads] * 2, *[heads // shape.n_k_heads] * 2)
    joined = torch.randn(N, shape.n_k_heads, sum(widths), generator=generator).to(dtype)  # as one product may give them
    given = DeltaInput(*joined.split(widths, dim=2))
    weight = torch.randn(shape.conv_width, shape.kernel, generator=generator).to(dtype)
    own_bias = torch.randn(shape.conv_width, generator=generator).to(dtype) if bias else None
    norm = (1 + 0.2 * torch.randn(shape.v_width, generator=generator)).to(dtype)
    rate, decay_bias = torch.rand(heads, generator=generator), torch.randn(heads, generator=generator)
    return given, DeltaWeights(ConvKernel(weight, own_bias, "silu"), norm, 3e-6, rate, decay_bias, 1.7)


def plain(given, weights, shape):
    """The same in float64 by the scan that training runs."""
    *inner, z, b, a = (x.double().flatten(1) for x in given.tensors)
    qkv = torch.cat(inner, dim=1)
    bounds, keys = torch.tensor(BOUNDS), shape.n_k_heads * shape.k_width
    kernel = ConvKernel(
        weights.kernel.weight.double(), None if weights.kernel.bias is None else weights.kernel.bias.double(), "silu"
    )
    seen = conv_forward(GatedInput(qkv), kernel, previous_rows(bounds), backend="reference")
    q, k, v = torch.split(seen, [keys, keys, shape.width], dim=1)
    q, k = (x.view(N, shape.n_k_heads, -1) for x in (q, k))
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + UNIT_EPS) for x in (q, k))
    decay, beta = -weights.rate.double() * softplus(a + weights.bias.double()), b.sigmoid() * weights.beta_scale
    heads = ScanInput(q * shape.k_width**-0.5, k, v.view(N, shape.n_v_heads, -1), decay, beta)
    y = scan(heads, bounds, delta=True, backend="reference")
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + weights.eps) * weights.norm.double()
    return y.flatten(1) * silu(z)


def in_steps(given, weights, shape, steps, backend, block=7):
    """Each sequence in the pieces of its steps: pages, first row of the sequence, and the piece's rows."""
    store = StateStore.zeros(9, 2, block, shape)
    store.data.fill_(float("nan"))  # pages of others
    y = torch.empty(N, shape.width, dtype=given.z.dtype)
    for step in steps:
        rows = PagedRows.of([(pages, start, stop - start) for pages, _, start, stop in step], store)
        own = [first + i for _, first, start, stop in step for i in range(start, stop)]
        part = DeltaInput(*(x[own] for x in given.tensors))
        y[own] = delta_in_pages(store, 1, part, weights, rows, backend=backend)
    return y


ONE, TWO = ([4, 2, 8, 1, 5], 0), ([6, 0, 3], 31)
AT_ONCE = [[(*ONE, 0, 31), (*TWO, 0, 20)]]
CHUNKED = [[(*ONE, 0, 15), (*TWO, 0, 1)], [(*TWO, 1, 3), (*ONE, 15, 18)], [(*ONE, 18, 31)], [(*TWO, 3, 20)]]
ONE_BY_ONE = [[(*ONE, i, i + 1)] + ([(*TWO, i, i + 1)] if i < 20 else []) for i in range(31)]


@pytest.mark.looped("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.looped("shape", SHAPES)
def test_values(shape, dtype, backend):
    given, weights = draw(shape, dtype, bias=shape.kernel != 3)
    found, exact = in_steps(given, weights, shape, CHUNKED, backend), plain(given, weights, shape)
    assert found.dtype == dtype
    allowed = 2e-5 if dtype == torch.float32 else 0.03
    assert (found.double() - exact).abs().max() <= allowed * exact.abs().max()


@pytest.mark.looped("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.looped("shape", SHAPES)
def test_bits_are_the_same_in_any_chunks(shape, dtype, backend):
    given, weights = draw(shape, dtype)
    whole = in_steps(given, weights, shape, AT_ONCE, backend)
    for steps in (CHUNKED, ONE_BY_ONE, [[(*TWO, 0, 20)], [(*ONE, 0, 31)]]):
        assert torch.equal(in_steps(given, weights, shape, steps, backend), whole)


def test_a_sequence_goes_on_from_a_full_page_of_another(backend):
    shape = SHAPES[0]
    given, weights = draw(shape, torch.float32)
    whole = in_steps(given, weights, shape, AT_ONCE, backend)
    shared = [
        [(*ONE, 0, 16)],
        [(*ONE, 16, 31), ([4, 2, 7], 0, 14, 20)],
    ]  # the second shares 14 tokens, then the same come
    again = in_steps(given, weights, shape, shared, backend)
    assert torch.equal(again[:31], whole[:31])


def test_a_sequence_that_is_not_finite_changes_no_other(backend):
    shape = SHAPES[0]
    given, weights = draw(shape, torch.float32)
    whole = in_steps(given, weights, shape, AT_ONCE, backend)
    given.q[40] = float("nan")
    found = in_steps(given, weights, shape, AT_ONCE, backend)
    assert torch.equal(found[:40], whole[:40])
    assert found[40].isnan().all()


def test_an_element_keeps_its_page(backend):
    shape = SHAPES[1]
    given, weights = draw(shape, torch.float32)
    store = StateStore.zeros(3, 2, 64, shape)
    part = DeltaInput(*(x[:5] for x in given.tensors))
    delta_in_pages(store, 0, part, weights, PagedRows.of([([1], 0, 5)], store), backend=backend)
    assert store.data[1, 0].any()
    assert not store.data[1, 1].any()
    assert not store.data[[0, 2]].any()


@pytest.mark.parametrize("wrong", ["layer", "rows", "heads", "dtype", "kernel"])
def test_parts_that_do_not_fit(wrong):
    shape = SHAPES[0]
    given, weights = draw(shape, torch.float32)
    store = StateStore.zeros(8, 2, 7, shape)
    rows = PagedRows.of([([0, 1, 2, 3, 4, 5, 6, 7], 0, N if wrong != "rows" else N - 1)], store)
    if wrong == "heads":
        given = DeltaInput(*given.tensors[:4], given.b[:, :, :1], given.a[:, :, :1])
    if wrong == "dtype":
        given = DeltaInput(*given.tensors[:5], given.a.bfloat16())
    if wrong == "kernel":
        weights = DeltaWeights(ConvKernel(weights.kernel.weight[:, 1:]), weights.norm, 1e-6, weights.rate, weights.bias)
    with pytest.raises(ShapeError, match="states of"):
        delta_in_pages(store, 2 if wrong == "layer" else 1, given, weights, rows)
