"""Short convolutions: torch's own conv1d of each sequence alone, in float64; errors at most twice torch's own."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional

from veneer.errors import ConfigError, ShapeError
from veneer.ops.forks import Fork
from veneer.ops.paged_attention import PagedRows
from veneer.ops.state.conv import ConvKernel, GatedInput, conv_backward, conv_forward, previous_rows
from veneer.ops.state.windows import WindowStore, windowed_conv

OP = "conv.conv_forward"
BOUNDS = torch.tensor([0, 1, 3, 3, 10, 23])
FORKS = (Fork(slice(3, 10), slice(10, 23)), Fork(slice(10, 11), slice(11, 19)))


def draw(d, width, dtype, *, gated=True, bias=True, activation="identity"):
    generator = torch.Generator().manual_seed(d)
    joined = torch.randn(23, 3 * d, generator=generator).to(dtype)
    before, after, x = joined.chunk(3, dim=1)
    weight = torch.randn(d, width, generator=generator).to(dtype)
    own_bias = torch.randn(d, generator=generator).to(dtype) if bias else None
    given = GatedInput(x, before, after) if gated else GatedInput(x)
    return given, ConvKernel(weight, own_bias, activation), torch.randn(23, d, generator=generator).to(dtype)


def plain(given, kernel, sequences):
    """The same by conv1d, where a sequence is a list of rows of which the last ``n`` are its own."""
    z = given.x if given.before is None else given.x * given.before
    y = torch.zeros_like(z)
    for rows, n in sequences:
        padded = functional.pad(z[rows].T, (kernel.weight.shape[1] - 1, 0))
        bias = None if kernel.bias is None else kernel.bias.to(z.dtype)
        own = functional.conv1d(padded[None], kernel.weight.to(z.dtype)[:, None], bias, groups=z.shape[1])[0].T[-n:]
        own = functional.silu(own) if kernel.activation == "silu" else own
        y = y.index_put((torch.tensor(rows[-n:]),), own)
    return y if given.after is None else y * given.after


def results(given, kernel, dy, sequences, dtype):
    leaves = [None if t is None else t.to(dtype).detach().requires_grad_() for t in given.tensors]
    before, x, after = leaves
    y = plain(GatedInput(x, before, after), kernel, sequences)
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy.to(dtype))]


def apart():
    bounds = BOUNDS.tolist()
    return [(list(range(a, b)), b - a) for a, b in pairwise(bounds) if b > a]


def ours(given, kernel, dy, previous, backend):
    y = conv_forward(given, kernel, previous, backend=backend)
    gradients, again = conv_backward(dy, given, kernel, previous, backend=backend)
    assert torch.equal(y, again)
    return [y, *(t for t in gradients.tensors if t is not None)]


def check(found, theirs, exact):
    for name, got, other, truth in zip(("y", "first", "second", "third"), found, theirs, exact, strict=False):
        allowed = 2 * (other.double() - truth).abs().max() + 4e-7 * truth.abs().max()
        assert got.dtype == other.dtype
        assert (got.double() - truth).abs().max() <= allowed, name


@pytest.mark.looped("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.looped("activation", ["identity", "silu"])
@pytest.mark.looped("gated", [True, False])
@pytest.mark.looped("sizes", [(1, 1), (17, 3), (131, 4), (37, 19)])
def test_values_and_gradients(sizes, gated, activation, dtype, backend):
    given, kernel, dy = draw(*sizes, dtype, gated=gated, bias=sizes[1] != 3, activation=activation)
    found = ours(given, kernel, dy, previous_rows(BOUNDS), backend)
    theirs, exact = (results(given, kernel, dy, apart(), t) for t in (dtype, torch.float64))
    check(found, theirs, exact)


def test_branches_go_on_where_their_stems_end(backend):
    bounds = torch.tensor([0, 3, 10, 11, 15, 19, 23])
    sequences = [([0, 1, 2], 3), ([*range(3, 10)], 7), ([*range(3, 11)], 1), ([*range(3, 15)], 4)]
    sequences += [([*range(3, 11), *range(15, 19)], 4), ([*range(3, 10), *range(19, 23)], 4)]
    given, kernel, dy = draw(19, 4, torch.float32, activation="silu")
    found = ours(given, kernel, dy, previous_rows(bounds, FORKS), backend)
    theirs, exact = (results(given, kernel, dy, sequences, t) for t in (torch.float32, torch.float64))
    check(found, theirs, exact)


@pytest.mark.looped("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_row_has_the_bits_of_its_sequences(dtype, backend):
    given, kernel, dy = draw(37, 3, dtype)
    found = ours(given, kernel, dy, previous_rows(BOUNDS), backend)
    for rows, n in apart():
        own = GatedInput(*(t[rows] for t in (given.x, given.before, given.after)))
        alone = ours(own, kernel, dy[rows], previous_rows(torch.tensor([0, n])), backend)
        for packed, single in zip(found, alone, strict=True):
            assert torch.equal(packed[rows], single)


def in_steps(given, kernel, steps, dtype, backend):
    """Each sequence in the pieces of its steps: rows of step i are those of its sequences' i-th pieces."""
    store = WindowStore.zeros(7, 2, 16, given.x.shape[1], dtype=dtype)
    y = torch.empty_like(given.x)
    for step in steps:
        rows = PagedRows.of([(pages, start, stop - start) for pages, _, start, stop in step], store)
        own = [first + i for _, first, start, stop in step for i in range(start, stop)]
        part = GatedInput(*(None if t is None else t[own] for t in (given.x, given.before, given.after)))
        y[own] = windowed_conv(store, 1, part, kernel, rows, backend=backend)
    return y


def test_inputs_whose_columns_lie_apart_are_held_until_they_are_read(backend):
    x = torch.ones(500, 200).T
    y = conv_forward(
        GatedInput(x), ConvKernel(torch.ones(500, 1)), previous_rows(torch.tensor([0, 200])), backend=backend
    )
    assert torch.equal(y, x)


@pytest.mark.looped("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.looped("gated", [True, False])
def test_a_served_row_has_the_bits_of_training_in_any_chunks(gated, dtype, backend):
    generator = torch.Generator().manual_seed(3)
    before, after, x = torch.randn(51, 3 * 37, generator=generator).to(dtype).chunk(3, dim=1)
    given = GatedInput(x, before, after) if gated else GatedInput(x)
    activation = "identity" if backend == "reference" else "silu"  # torch rounds the end of a tensor otherwise
    kernel = ConvKernel(torch.randn(37, 4, generator=generator).to(dtype), activation=activation)
    whole = conv_forward(given, kernel, previous_rows(torch.tensor([0, 31, 51])), backend=backend)
    one, two = ([4, 2], 0), ([6, 0], 31)  # pages, and the first row of the sequence
    at_once = [[(*one, 0, 31), (*two, 0, 20)]]
    chunked = [[(*one, 0, 15), (*two, 0, 1)], [(*two, 1, 3), (*one, 15, 18)], [(*one, 18, 31)], [(*two, 3, 20)]]
    again = [[(*one, 0, 31)], [(*one, 14, 31), (*two, 0, 20)]]  # as after a draft that was taken back
    for steps in (at_once, chunked, again):
        assert torch.equal(in_steps(given, kernel, steps, dtype, backend), whole)


@pytest.mark.looped("owns_dy", [False, True])
@pytest.mark.looped("owns_inputs", [False, True])
def test_parts_of_one_buffer_overwritten(owns_inputs, owns_dy, backend):
    given, kernel, dy = draw(37, 3, torch.float32, activation="silu")
    previous = previous_rows(BOUNDS)
    expected, y = conv_backward(dy, given, kernel, previous, backend=backend)
    held = [*given.tensors, dy]
    before = [t.clone() for t in held]
    gradients, again = conv_backward(
        dy, given, kernel, previous, owns_dy=owns_dy, owns_inputs=owns_inputs, backend=backend
    )
    owned = [owns_inputs] * 3 + [owns_dy]
    pairs = zip((*gradients.tensors, again), (*expected.tensors, y), held, before, owned, strict=True)
    for got, wanted, own, was, is_owned in pairs:
        assert torch.equal(got, wanted)
        assert (got.data_ptr() == own.data_ptr()) is is_owned
        assert is_owned or torch.equal(own, was)


@pytest.mark.usefixtures("own_checks")
def test_errors():
    given, kernel, dy = draw(5, 3, torch.float32)
    previous = previous_rows(BOUNDS)
    with pytest.raises(ConfigError, match=r"'relu' is unknown.*silu"):
        conv_forward(given, ConvKernel(kernel.weight, None, "relu"), previous)
    with pytest.raises(ShapeError, match=r"a weight \(4, 3\)"):
        conv_forward(given, ConvKernel(kernel.weight[:4]), previous)
    with pytest.raises(ShapeError, match=r"and 22 previous rows"):
        conv_forward(given, kernel, previous[1:])
    with pytest.raises(ShapeError, match=r"given \(22, 5\)"):
        conv_backward(dy[1:], given, kernel, previous)
    store = WindowStore.zeros(1, 1, 32, 5, dtype=torch.bfloat16)
    with pytest.raises(ShapeError, match=r"takes rows \(23, 5\) in torch.bfloat16; given \(23, 5\) in torch.float32"):
        windowed_conv(store, 0, given, kernel, PagedRows.of([([0], 0, 23)], store))
    store = WindowStore.zeros(1, 1, 32, 5, dtype=torch.float32)
    rows = PagedRows.of([([0], 0, 23)], store)
    for wrong in (kernel.weight[:4], kernel.weight[:, :0]):
        with pytest.raises(ShapeError, match=r"a weight \("):
            windowed_conv(store, 0, given, ConvKernel(wrong), rows)
    with pytest.raises(ConfigError, match="'relu' is unknown"):
        windowed_conv(store, 0, given, ConvKernel(kernel.weight, None, "relu"), rows)
    with pytest.raises(ShapeError, match="n whole numbers from -1 up to the row itself"):
        conv_forward(given, kernel, previous.float())
    for row in (4, 9, -2):
        wrong = previous.clone()
        wrong[4] = row
        with pytest.raises(ShapeError, match="n whole numbers from -1 up to the row itself"):
            conv_backward(dy, given, kernel, wrong)
