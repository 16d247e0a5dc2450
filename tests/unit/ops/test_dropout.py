"""Dropout: Random123's known answers, one mask on every back end, and the statistics that a mask must have."""

import math

import pytest
import torch

from veneer.errors import ConfigError, ShapeError
from veneer.ops.dropout import Mask, drop, dropout, keep_scale
from veneer.ops.reference.dropout import draws, philox

OP = "dropout.drop"
KEY = 0x9D3A_5C17_E2B4_F681
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
# Counter, key, rounds and answer: tests/kat_vectors of Random123, by the authors of the paper.
ANSWERS = [
    ((0,) * 4, (0,) * 2, 7, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, 7, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (*PI, 7, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    ((0,) * 4, (0,) * 2, 10, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, 10, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (*PI, 10, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


def draw(*shape, dtype=torch.float32, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) + 2).to(dtype)


def kept(n, d, p, key=KEY, rows=0, backend="reference"):
    return drop(torch.ones(n, d), p, key, rows, backend=backend).bool()


@pytest.mark.parametrize(("counter", "key", "rounds", "answer"), ANSWERS)
def test_known_answers_of_philox(counter, key, rounds, answer):
    words = philox(tuple(torch.tensor(word) for word in counter), key[0] | key[1] << 32, rounds)
    assert tuple(int(word) for word in words) == answer


def test_known_answers_of_a_mask(backend):
    """Row 0 and key 0: the first counter is all zeros, so its draws are halves of the answer above."""
    first, last = [0x3F64, 0x0D89, 0xB709, 0x5F6F], [0x0A48, 0x4F73, 0x1F81, 0x4F12]
    found = draws(37, 0, torch.tensor([0]))[0]
    assert found[:4].tolist() == first
    assert found[32:36].tolist() == last
    for p in (0.0001, 0.2, 0.31, 0.5, 0.72):
        wanted = [value >= round(p * 65536) for value in first + last]
        mask = kept(1, 36, p, 0, backend=backend)[0]
        assert mask[:4].tolist() + mask[32:].tolist() == wanted


@pytest.mark.looped("shape", [(1, 1), (3, 13), (2, 3, 64), (5, 577), (3, 1087), (2, 2113), (0, 5), (4, 0)])
@pytest.mark.looped("dtype", DTYPES)
def test_every_back_end_draws_the_reference(shape, dtype, backend):
    x = draw(*shape, dtype=dtype)
    many = torch.randint(-(2**63), 2**63 - 1, shape[:-1], generator=torch.Generator().manual_seed(1))
    for rows in (0, 2**35 - 2, many):
        wanted = drop(x, 0.37, KEY, rows, backend="reference")
        got = drop(x, 0.37, KEY, rows, backend=backend)
        assert got.dtype == dtype
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_layout_is_read_where_it_is(dtype, backend):
    x = draw(7, 131, dtype=dtype)
    wanted = drop(x, 0.2, KEY)
    wide = torch.zeros(7, 400, dtype=dtype)
    wide[:, 17:148] = x
    assert torch.equal(drop(wide[:, 17:148], 0.2, KEY, backend=backend), wanted)
    assert torch.equal(drop(x.T.contiguous().T, 0.2, KEY, backend=backend), wanted)


def test_a_row_draws_the_same_alone_and_in_any_batch(backend):
    together = kept(23, 577, 0.3, rows=2**32 - 11, backend=backend)
    for r in (0, 10, 11, 22):
        assert torch.equal(kept(1, 577, 0.3, rows=2**32 - 11 + r, backend=backend)[0], together[r])
    order = torch.randperm(23, generator=torch.Generator().manual_seed(2))
    assert torch.equal(kept(23, 577, 0.3, rows=order + 2**32 - 11, backend=backend), together[order])
    narrow = kept(23, 64, 0.3, rows=2**32 - 11, backend=backend)
    assert torch.equal(narrow, together[:, :64])


def test_the_number_of_threads_changes_no_bit():
    x, before, found = draw(331, 577), torch.get_num_threads(), []
    try:
        for n_threads in (1, 3):
            torch.set_num_threads(n_threads)
            found.append(drop(x, 0.3, KEY))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_frequencies(p):
    """Of all, of each column and of each row, within 5 standard deviations of their binomials (some 1300 of them)."""
    n, d = 719, 577
    mask, drawn = kept(n, d, p), round(p * 65536) / 65536
    for counts, trials in ((mask.sum(), n * d), (mask.sum(0), n), (mask.sum(1), d)):
        deviation = math.sqrt(trials * drawn * (1 - drawn))
        assert ((counts - trials * (1 - drawn)).abs() <= 5 * deviation).all()


def test_draws_are_uniform_to_the_last_bit():
    """Chi squared of each of the four hexadecimal digits: 15 degrees of freedom, 44.3 at one in ten thousand."""
    values = draws(577, KEY, torch.arange(719)).flatten()
    for shift in (0, 4, 8, 12):
        counts = torch.bincount(values >> shift & 15, minlength=16).double()
        expected = values.numel() / 16
        assert ((counts - expected) ** 2 / expected).sum() < 44.3


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((KEY, 0, 0), (KEY, 1, 0)),  # the next row
        ((KEY, 0, 0), (KEY, 2**32, 0)),
        ((KEY, 0, 0), (KEY + 1, 0, 0)),  # the next key
        ((KEY, 0, 0), (KEY ^ 1 << 63, 0, 0)),
        ((KEY, 0, 0), (KEY, 0, 1)),  # the next column, and those that share a word, a counter, a lane
        ((KEY, 0, 0), (KEY, 0, 2)),
        ((KEY, 0, 0), (KEY, 0, 4)),
        ((KEY, 0, 0), (KEY, 0, 32)),
        ((KEY, 0, 0), (KEY, 0, 64)),
    ],
)
def test_masks_are_independent(one, other):
    """Agreement of two masks with p 1/2 is binomial of 1/2: within 4 standard deviations."""
    n, d = 719, 1024
    masks = [kept(n, d + 64, 0.5, key, rows)[:, column : column + d] for key, rows, column in (one, other)]
    agreeing = (masks[0] == masks[1]).sum()
    assert abs(agreeing - n * d / 2) <= 4 * math.sqrt(n * d) / 2


def test_scale_keeps_the_mean():
    x = torch.full((719, 577), 3.0)
    y = drop(x, 0.37, KEY) * keep_scale(0.37)
    assert abs(y.mean() - 3) <= 4 * 3 * math.sqrt(0.37 / 0.63 / x.numel())
    assert keep_scale(0.37) == 65536 / (65536 - 24248)
    assert (keep_scale(0), keep_scale(0.25), keep_scale(0.5), keep_scale(1)) == (1, 4 / 3, 2, 0)


def test_under_autograd():
    """Forward and backward are one linear map, ``diag(mask) / (1 - p)``: so is its derivative's derivative."""
    ids = torch.arange(719) * 3 + 1
    mask = Mask(0.37, KEY, ids)
    x = draw(719, 577, dtype=torch.float64).requires_grad_()
    y = dropout(x, mask)
    assert torch.equal(y, drop(x.detach(), 0.37, KEY, ids) * keep_scale(0.37))
    g = draw(719, 577, dtype=torch.float64, seed=5).requires_grad_()
    (dx,) = torch.autograd.grad(y, x, g, create_graph=True)
    assert torch.equal(dx, torch.where(y != 0, g * keep_scale(0.37), 0.0))
    assert torch.equal(torch.autograd.grad(dx, g, x.detach())[0], y)


def test_nothing_and_all(backend):
    x = draw(3, 131)
    for none in (0.0, 1 / 131073):
        y = drop(x, none, KEY, backend=backend)
        assert torch.equal(y, x)
        assert y.data_ptr() != x.data_ptr()
    assert not drop(x, 1.0, KEY, backend=backend).any()
    assert not kept(61, 577, 65535 / 65536, backend=backend).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_dropped_reaches_nothing(dtype, backend):
    """Not even an infinity."""
    mask = kept(5, 131, 0.4)
    g = torch.where(mask, 1.0, math.inf).to(dtype)
    assert torch.equal(drop(g, 0.4, KEY, backend=backend), mask.to(dtype))


@pytest.mark.usefixtures("own_checks")
def test_errors():
    x, rows = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match=rf"between 0 and 1; given {p}"):
            drop(x, p, KEY)
    for key in (-1, 2**64):
        with pytest.raises(ConfigError, match=rf"from 0 to 2\^64 - 1; given {key}"):
            drop(x, 0.1, key)
    for first in (-1, 2**63 - 3):
        with pytest.raises(ConfigError, match=rf"from 0 to 2\^63 - 1; given 3 from {first} on"):
            drop(x, 0.1, KEY, first)
    for wrong in (rows[:2], rows.int(), rows.to("meta")):
        with pytest.raises(ShapeError, match=r"rows must be \(3,\) of int64 there; given"):
            drop(x, 0.1, KEY, wrong)
