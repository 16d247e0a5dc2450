"""Pairs of many versions in one batch: against float64, and rows that do not depend on their companions."""

from functools import partial

import pytest
import torch

from veneer.errors import ConfigError, ShapeError
from veneer.ops.pairs import ACTIVATIONS, FactorPair, PackedPairs, PairsPacker, Segment, Segments, add_pairs
from veneer.ops.reference.pairs import activated, unpacked

OP = "pairs.add"
OUTS = (83, 5, 131)
RANKS = [(3, 8, 5), (16, 0, 1), (0, 0, 7), (33, 2, 64), (1, 1, 1)]
DTYPES = [torch.float32, torch.bfloat16]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def versions(i, dtype, outs=OUTS):
    """Factors as their owner has them, and packed."""
    plain = [
        [
            FactorPair(draw(r, i, seed=k), draw(o, r, seed=k), 0.3 + k) if r else None
            for r, o in zip(ranks, outs, strict=True)
        ]
        for k, ranks in enumerate(RANKS)
    ]
    return plain, [PackedPairs.pack(pairs, outs, dtype=dtype) for pairs in plain]


def segments_of(packed, sizes, gap=2):
    """Runs of rows of one version after the other, rows without one between them."""
    found, at = [], 1
    for k, n in enumerate(sizes):
        found.append(Segment(packed[k % len(packed)], at, at + n))
        at += n + (gap if k % 3 == 0 else 0)
    return found, at + 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("i", [64, 67])
def test_factors_are_kept_to_their_rounding(i, dtype, backend):
    plain, _ = versions(i, dtype)
    for pairs, ranks in zip(plain, RANKS, strict=True):
        packed = PackedPairs.pack(pairs, OUTS, dtype=dtype, backend=backend)
        assert (packed.ranks, packed.out_features, packed.in_features) == (ranks, OUTS, i)
        for pair, (a, b) in zip(pairs, unpacked(packed), strict=True):
            if pair is not None:
                assert torch.equal(a, pair.a.to(dtype).float())
                assert torch.equal(b, (pair.scale * pair.b).to(dtype).float())


@pytest.mark.looped("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.looped("dtype", DTYPES)
def test_many_groups_are_packed_at_once_from_any_dtype(dtype, stored, backend):
    """Factors that lie crosswise in memory too, ranks that share a block of panels, and one that spans two."""
    packer, found, exact = PairsPacker(backend), [], []
    for i, outs in ((67, OUTS), (48, (35,)), (32, (16, 64))):
        pairs = [
            FactorPair(draw(i, r).to(stored).T, draw(o + 3, r).to(stored)[3:], 0.3 + r) if r else None
            for r, o in zip((9, 0, 17), outs, strict=False)
        ]
        exact.append(pairs)
        found.append(packer.add(pairs, outs, dtype))
    packer.run()
    for packed, pairs in zip(found, exact, strict=True):
        for pair, (a, b) in zip(pairs, unpacked(packed), strict=True):
            if pair is not None:
                assert torch.equal(a, pair.a.to(dtype).float())
                assert torch.equal(b, (pair.scale * pair.b.float()).to(dtype).float())
        assert packed.factors.isfinite().all()
    assert [packed.nbytes for packed in found] == [
        packed.dtype.itemsize * n for packed, n in zip(found, sizes_of(dtype), strict=True)
    ]


def sizes_of(dtype):
    """Values of the groups above: blocks of 16 outputs, and even depths in bfloat16."""
    if dtype == torch.bfloat16:
        return 32 * 68 + 96 * 10 + 144 * 18, 16 * 48 + 48 * 10, 16 * 32 + 16 * 10
    return 32 * 67 + 96 * 9 + 144 * 17, 16 * 48 + 48 * 9, 16 * 32 + 16 * 9


def test_a_version_takes_the_bytes_of_its_own_ranks():
    narrow, wide = (PackedPairs.pack([FactorPair(draw(r, 64), draw(160, r), 1.0)], [160]) for r in (16, 64))
    assert (narrow.nbytes, wide.nbytes) == (2 * 16 * (64 + 160), 2 * 64 * (64 + 160))


@pytest.mark.not_interpreted
@pytest.mark.looped("y_dtype", DTYPES)
@pytest.mark.looped("x_dtype", DTYPES)
@pytest.mark.looped("dtype", DTYPES)
@pytest.mark.looped("sizes", [(1,), (1, 2, 1, 3, 2), (7, 33, 1, 8, 16), (130, 64)])
@pytest.mark.looped("i", [64, 67])
def test_what_is_added_is_exact_to_its_roundings(i, sizes, dtype, x_dtype, y_dtype, backend):
    _, packed = versions(i, dtype)
    segments, n = segments_of(packed, sizes)
    x, ys = draw(n, i).to(x_dtype), [draw(n, o).to(y_dtype) for o in OUTS]
    exact = [y.double() for y in ys]
    allowed = [y.abs() * 2.0**-20 for y in exact]
    for pairs, start, stop in segments:
        rows = slice(start, stop)
        for y, slack, (a, b) in zip(exact, allowed, unpacked(pairs), strict=True):
            u = x[rows].double() @ a.double().T
            y[rows] += u @ b.double().T
            rounding = 2.0**-8 if torch.bfloat16 == x_dtype == dtype else 0.0
            terms = x[rows].double().abs() @ a.double().abs().T
            slack[rows] += (rounding * u.abs() + 2.0**-20 * terms) @ b.double().abs().T
    places = [
        torch.full((n, 400), 7.0, dtype=y_dtype)[:, 100 : 100 + o].copy_(y) for o, y in zip(OUTS, ys, strict=True)
    ]
    add_pairs(x, segments, places, backend=backend)
    for got, truth, slack in zip(places, exact, allowed, strict=True):
        slack += truth.abs() * (2.0**-8 if y_dtype == torch.bfloat16 else 2.0**-22)
        assert ((got.double() - truth).abs() <= slack).all()
        whole = got._base
        assert (whole[:, :100] == 7).all()
        assert (whole[:, 100 + got.shape[1] :] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True])
def test_outputs_are_scaled_with_what_is_added(backend, shared, dtype):
    """One version scales, of one layer without a pair too; beside it are one that only adds, and rows without one."""
    a, outs = draw(16, 67), (83, 67, 131)
    ranks = (16, 16, 16) if shared else (3, 0, 16)
    pairs = [FactorPair(a[:r], draw(o, r), 0.7) if r else None for r, o in zip(ranks, outs, strict=True)]
    adds = PackedPairs.pack(pairs, outs, dtype=dtype)
    assert adds.shares_a == shared
    assert adds.scaling([None] * 3) is None
    scales = [draw(o, seed=1) for o in outs]
    scaling = adds.scaling([scales[0], scales[1], None])
    x, before = draw(9, 67), [draw(9, o) for o in outs]
    found = [y.clone() for y in before]
    add_pairs(x, [Segment(adds, 0, 2), Segment(scaling, 3, 8)], found, backend=backend)
    added = [y.clone() for y in before]
    add_pairs(x, [Segment(adds, 0, 2), Segment(adds, 3, 8)], added, backend="reference")
    for y, exact, scale in zip(found, added, [scales[0], scales[1], torch.ones(131)], strict=True):
        exact[3:8] *= scale
        assert torch.allclose(y, exact, rtol=1e-5, atol=1e-3)
    assert all(torch.equal(y[2], z[2]) and torch.equal(y[8], z[8]) for y, z in zip(found, before, strict=True))


@pytest.mark.not_interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_does_not_depend_on_its_companions(dtype, threads, backend):
    outs = (640, 192, 131)
    _, packed = versions(301, dtype, outs)
    segments, n = segments_of(packed, (1, 5, 17, 2, 50, 1, 2, 9))
    x, before = draw(n, 301).to(dtype), [draw(n, o).to(dtype) for o in outs]
    same = torch.equal if backend == "cpu" else partial(torch.allclose, rtol=0.01, atol=0.01)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = [y.clone() for y in before]
        add_pairs(x, Segments.of(segments), together, backend=backend)
    finally:
        torch.set_num_threads(threads_before)
    alone = [y.clone() for y in before]
    for pairs, start, stop in segments:
        for row in range(start, stop):
            ys = [y[row : row + 1] for y in alone]
            add_pairs(x[row : row + 1], [Segment(pairs, 0, 1)], ys, backend=backend)
    assert all(same(a, b) for a, b in zip(together, alone, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(together, before, strict=True))


def full(i, outs, dtype, activation, *, shared):
    """Pairs with everything between and behind their products, of one a where that is shared, and packed."""
    ranks = (7,) * len(outs) if shared else (7, 0, 18)[: len(outs)]
    a = draw(7, i)
    pairs = [
        FactorPair(
            a if shared else draw(r, i, seed=k), draw(o, r, seed=k), 0.3 + k,
            core=draw(r, seed=k), b_scale=draw(o, seed=k), a_bias=draw(r, seed=9 + k), b_bias=draw(o, seed=9 + k),
            activation=activation,
        )
        if r
        else None
        for k, (r, o) in enumerate(zip(ranks, outs, strict=True))
    ]  # fmt: skip
    return pairs, PackedPairs.pack(pairs, outs, dtype=dtype)


@pytest.mark.not_interpreted
@pytest.mark.looped("dtype", DTYPES)
@pytest.mark.looped("shared", [False, True])
@pytest.mark.looped("activation", ACTIVATIONS)
def test_what_is_between_the_products_and_behind_them(activation, shared, dtype, backend):
    pairs, packed = full(67, OUTS, dtype, activation, shared=shared)
    assert packed.shares_a == shared
    x, ys = draw(9, 67).to(dtype), [draw(9, o).to(dtype) for o in OUTS]
    expected = [y.double() for y in ys]
    for y, pair in zip(expected, pairs, strict=True):
        if pair is not None:
            u = pair.core * (x[2:8].double() @ pair.a.to(dtype).double().T) + pair.a_bias
            inner = activated(u, activation) @ (pair.scale * pair.b).to(dtype).double().T
            y[2:8] += pair.b_scale * inner + pair.b_bias
    got = [y.clone() for y in ys]
    add_pairs(x, [Segment(packed, 2, 8)], got, backend=backend)
    rounding = 1e-5 if dtype == torch.float32 else 2.0**-6
    for y, exact in zip(got, expected, strict=True):
        assert (y.double() - exact).abs().max() <= rounding * exact.abs().max()
    alone = [y[5:6].clone() for y in ys]
    add_pairs(x[5:6], [Segment(packed, 0, 1)], alone, backend=backend)
    same = torch.equal if backend == "cpu" else partial(torch.allclose, rtol=0.02, atol=0.02)
    assert all(same(y[5:6], one) for y, one in zip(got, alone, strict=True))


@pytest.mark.looped("activation", ACTIVATIONS)
def test_each_activation_on_few_numbers(activation, backend):
    [pair], packed = full(32, (9,), torch.float32, activation, shared=False)
    x, y = draw(3, 32), draw(3, 9)
    u = pair.core * (x.double() @ pair.a.double().T) + pair.a_bias
    inner = activated(u, activation) @ (pair.scale * pair.b).double().T
    expected = y + pair.b_scale * inner + pair.b_bias
    add_pairs(x, [Segment(packed, 0, 3)], [y], backend=backend)
    assert (y.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("dtype", "activation"), [(torch.bfloat16, "gelu_tanh"), (torch.float32, "leaky_relu")])
def test_versions_of_every_kind_in_one_call(dtype, activation, backend):
    """Depths beyond a part, ranks beyond a tile, an a that layers share, vectors, and rows of no version."""
    i, outs = 1100, (83, 5, 131)
    plain = [FactorPair(draw(r, i), draw(o, r), 0.3) if r else None for r, o in zip((33, 0, 70), outs, strict=True)]
    given = [(plain, PackedPairs.pack(plain, outs, dtype=dtype))]
    given += [full(i, outs, dtype, activation, shared=shared) for shared in (True, False)]
    x, ys = draw(47, i).to(dtype), [draw(47, o).to(dtype) for o in outs]
    expected, at = [y.double() for y in ys], ((1, 2), (3, 40), (40, 46))
    for (pairs, _), (start, stop) in zip(given, at, strict=True):
        rows = slice(start, stop)
        for y, pair in zip(expected, pairs, strict=True):
            if pair is not None:
                u = x[rows].double() @ pair.a.to(dtype).double().T
                u = u if pair.core is None else activated(pair.core * u + pair.a_bias, activation)
                inner = u @ (pair.scale * pair.b).to(dtype).double().T
                y[rows] += inner if pair.b_scale is None else pair.b_scale * inner + pair.b_bias
    add_pairs(x, [Segment(packed, *own) for (_, packed), own in zip(given, at, strict=True)], ys, backend=backend)
    rounding = 1e-5 if dtype == torch.float32 else 2.0**-6
    for y, exact in zip(ys, expected, strict=True):
        assert (y.double() - exact).abs().max() <= rounding * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("joined", [(0, 3), (0, 2), (1, 3)])
def test_outputs_that_are_columns_of_one_tensor_are_as_those_apart(joined, dtype, backend):
    """All layers of a group, or some, with vectors behind the second product, whose places follow the layers."""
    plain, packed = versions(67, dtype)
    scaled = [None if pair is None else pair._replace(b_scale=draw(len(pair.b)), b_bias=draw(len(pair.b), seed=1))
              for pair in plain[0]]  # fmt: skip
    packed[0] = PackedPairs.pack(scaled, OUTS, dtype=dtype)
    segments, n = segments_of(packed, (3, 1, 2, 18, 1))
    x, apart = draw(n, 67).to(dtype), [draw(n, o).to(dtype) for o in OUTS]
    first, end = joined
    columns = torch.split(torch.cat(apart[first:end], dim=1), OUTS[first:end], dim=1)
    together = [y.clone() for y in apart[:first]] + list(columns) + [y.clone() for y in apart[end:]]
    for ys in (apart, together):
        add_pairs(x, segments, ys, backend=backend)
    assert all(map(torch.equal, together, apart))


def test_rows_may_be_read_and_changed_at_once(backend):
    """A bottleneck that reads what it changes, in segments that several threads take."""
    _, packed = full(64, (64,), torch.float32, "relu", shared=False)
    x = draw(40, 64)
    expected, got = x.clone(), x.clone()
    add_pairs(x, [Segment(packed, 0, 40)], [expected], backend=backend)
    add_pairs(got, [Segment(packed, 0, 33), Segment(packed, 33, 40)], [got], backend=backend)
    assert torch.allclose(got, expected, rtol=1e-6, atol=1e-5)
    assert not torch.equal(got, x)


def test_factors_that_layers_share_are_there_once():
    first, packed = full(64, (80, 48), torch.bfloat16, "identity", shared=True)
    assert packed.nbytes == 2 * (16 * 64 + 8 * (80 + 48))
    other = [pair._replace(core=pair.core + 1) for pair in first]
    again = packed.with_vectors(other)
    assert again.factors is packed.factors
    assert not torch.equal(again.middle.core, packed.middle.core)


def test_no_segment_and_an_empty_one_change_nothing(backend):
    _, packed = versions(64, torch.float32)
    ys = [draw(3, o) for o in OUTS]
    expected = [y.clone() for y in ys]
    add_pairs(draw(3, 64), [], ys, backend=backend)
    add_pairs(draw(3, 64), [Segment(packed[0], 2, 2)], ys, backend=backend)
    assert all(map(torch.equal, ys, expected))


@pytest.mark.usefixtures("own_checks")
def test_what_does_not_fit_is_refused():
    a, b = draw(3, 7), draw(5, 3)
    for pairs, outs in (
        ([FactorPair(a, b, 1.0)], [6]),
        ([FactorPair(a, b, 1.0)], [5, 5]),
        ([None], [5]),
        ([FactorPair(a, b.T, 1.0)], [5]),
    ):
        with pytest.raises(ShapeError, match=r"packed pairs are a \(r, i\) and b \(o, r\)"):
            PackedPairs.pack(pairs, outs)
    with pytest.raises(ShapeError, match=r"core and a_bias have the rank's 3 values"):
        PackedPairs.pack([FactorPair(a, b, 1.0, b_scale=draw(3))], [5])
    with pytest.raises(ConfigError, match=r"one activation of .*leaky_relu.*given \['softmax'\]"):
        PackedPairs.pack([FactorPair(a, b, 1.0, activation="softmax")], [5])
    with pytest.raises(ShapeError, match="float16"):
        PackedPairs.pack([FactorPair(a, b, 1.0)], [5], dtype=torch.float16)
    packed = PackedPairs.pack([FactorPair(a, b, 1.0)], [5])
    x, y = draw(2, 7), draw(2, 5)
    with pytest.raises(ShapeError, match=r"x must be \(n, 7\).*float16"):
        add_pairs(x.half(), [Segment(packed, 0, 1)], [y])
    with pytest.raises(ShapeError, match=r"outputs must be \[\(2, 5\)\]"):
        add_pairs(x, [Segment(packed, 0, 1)], [y[:1]])
    with pytest.raises(ShapeError, match="outputs must be"):
        add_pairs(x, [Segment(packed, 0, 1)], [y, y])
    with pytest.raises(ShapeError, match=r"n at least 3; given \(2, 7\)"):
        add_pairs(x, [Segment(packed, 1, 3)], [y])
    with pytest.raises(ShapeError, match=r"x must be \(n, 7\).*given \(2, 6\)"):
        add_pairs(x[:, 1:], [Segment(packed, 0, 1)], [y])
    other = PackedPairs.pack([FactorPair(a, b, 1.0)], [5], dtype=torch.float32)
    for wrong in ([Segment(packed, 0, 1), Segment(other, 1, 2)], [Segment(packed, 2, 1)], []):
        with pytest.raises(ShapeError, match="segments must be at least one"):
            Segments.of(wrong)
