"""Paged attention against float64 on plain tensors; rows that depend on their own sequence alone."""

from functools import partial
from itertools import count

import pytest
import torch

from veneer.errors import ConfigError, ShapeError
from veneer.model.blueprint.alibi import Alibi
from veneer.ops.attention import AttentionOptions
from veneer.ops.paged_attention import (
    UNIT,
    PagedRows,
    PagedStore,
    PageTables,
    append,
    append_turned,
    paged_attention,
)
from veneer.ops.rotary import rotate

OP = "paged_attention.attend"
LAYER, LAYERS = 1, 3
DTYPES = [torch.float32, torch.bfloat16]
OPTIONS = [
    AttentionOptions(),
    AttentionOptions(scale=0.3, window=21),
    AttentionOptions(softcap=1.7),
    AttentionOptions(scale=0.2, window=70, softcap=3.0),
]


def equality(backend):
    """Bit for bit; but torch's own products, which the reference is made of, depend on their shapes."""
    return torch.equal if backend == "cpu" else partial(torch.allclose, rtol=0.01, atol=0.01)


class Cache:
    """Sequences with K, V and queries of all their positions, and pages to put them into, in a mixed-up order."""

    def __init__(self, lengths, heads, dtype, block, backend, bias=None, sinks=None):
        (q_heads, kv_heads, d), self.bias, self.sinks = heads, bias, sinks
        generator = torch.Generator().manual_seed(sum(lengths) + d)
        draw = partial(torch.randn, generator=generator)
        self.q, self.k, self.v = ([draw(n, h, d).to(dtype) for n in lengths] for h in (q_heads, kv_heads, kv_heads))
        n_pages = sum(-(-n // block) for n in lengths) + 3
        self.store = PagedStore.zeros(n_pages, block, (LAYERS, kv_heads, d), dtype=dtype)
        self.store.data.fill_(float("nan"))  # what former holders may have left
        order = torch.randperm(n_pages, generator=generator).tolist()
        self.pages = [[order.pop() for _ in range(-(-n // block))] for n in lengths]
        self.backend = backend

    def step(self, parts, options=None):
        """Rows [start, stop) of sequences, in one batch: written, and their answers."""
        options = options or AttentionOptions()
        rows = PagedRows.of([(self.pages[s], a, b - a) for s, a, b in parts], self.store)
        q, k, v = (torch.cat([x[s][a:b] for s, a, b in parts]) for x in (self.q, self.k, self.v))
        append(self.store, LAYER, k, v, rows, backend=self.backend)
        with_backend = AttentionOptions(
            scale=options.scale, window=options.window, softcap=options.softcap, backend=self.backend
        )
        answers = paged_attention(self.store, LAYER, q, rows, with_backend, self.bias, self.sinks)
        return answers.split([b - a for _, a, b in parts])

    def exact(self, s, options):
        """All rows of a sequence in float64, and what the roundings of probabilities and results may change."""
        q, k, v = (x[s].double().transpose(0, 1) for x in (self.q, self.k, self.v))
        k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if options.scale is None else options.scale)
        if options.softcap:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        if self.bias is not None:
            own = self.bias[:, : q.shape[1]].double()
            scores = scores + (own[:, None] - own[:, :, None])
        behind = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
        seen = (behind >= 0) & (behind < (options.window or len(behind)))
        scores = scores.masked_fill(~seen, float("-inf"))
        if self.sinks is not None:
            own = self.sinks.double()[:, None, None].expand(-1, scores.shape[1], 1)
            scores = torch.cat([scores, own], dim=-1)
        p = scores.softmax(-1)[..., : q.shape[1]]
        unit = 2.0**-8 if self.store.data.dtype == torch.bfloat16 else 2.0**-18
        y = p @ v
        return y.transpose(0, 1), unit * (1.01 * p @ v.abs() + y.abs()).transpose(0, 1)


@pytest.mark.not_interpreted
@pytest.mark.looped("options", OPTIONS)
@pytest.mark.looped("dtype", DTYPES)
@pytest.mark.looped(("heads", "block"), [((6, 2, 40), 16), ((3, 3, 64), 32), ((8, 1, 17), 16)])
def test_prompts_in_chunks_and_decoding(heads, block, dtype, options, backend):
    lengths = (1, 5, 64, 131, 33)
    cache = Cache(lengths, heads, dtype, block, backend)
    answers = [[] for _ in lengths]
    at = [0] * len(lengths)
    for turn in count():
        sizes = [
            (1, 7, 17, 40, 3)[(turn + s) % 5] if a < n - 4 else 1
            for s, (a, n) in enumerate(zip(at, lengths, strict=True))
        ]
        parts = [(s, a, min(a + m, n)) for s, (a, m, n) in enumerate(zip(at, sizes, lengths, strict=True)) if a < n]
        if not parts:
            break
        for (s, _, b), answer in zip(parts, cache.step(parts, options), strict=True):
            answers[s].append(answer)
            at[s] = b
    _require_exact(cache, answers, options)


def _require_exact(cache, answers, options):
    for s in range(len(answers)):
        exact, allowed = cache.exact(s, options)
        got = torch.cat(answers[s])
        assert got.dtype == cache.store.data.dtype
        assert ((got.double() - exact).abs() <= allowed).all(), s


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "window"), [((6, 2, 40), None), ((5, 5, 16), 21)])
def test_scores_have_a_bias_by_position(heads, window, dtype, backend):
    """ALiBi; the prompt of the third in three steps, and its last token once more, alone and in a crowd, to the bit."""
    options, lengths = AttentionOptions(scale=0.3, window=window), (1, 20, 37)
    cache = Cache(lengths, heads, dtype, 16, backend, Alibi(n_heads=heads[0]).bias(41))
    steps = [[(1, 0, 18), (2, 0, 18)], [(2, 18, 34), (0, 0, 1)], [(2, 34, 36), (1, 18, 20)], [(2, 36, 37)]]
    answers = [[] for _ in lengths]
    for parts in steps:
        for (s, _, _), answer in zip(parts, cache.step(parts, options), strict=True):
            answers[s].append(answer)
    _require_exact(cache, answers, options)
    again = cache.step([(s, n - 1, n) for s, n in enumerate(lengths)], options)
    assert equality(backend)(again[2], answers[2][-1])
    with pytest.raises(AssertionError):
        _require_exact(cache, answers, AttentionOptions(scale=0.3, window=17))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 21])
def test_sinks_take_a_share_of_the_softmax(window, dtype, backend):
    """One far below the scores, one far above, and some among them; a last token alone and in a crowd, to the bit."""
    options, lengths = AttentionOptions(window=window), (1, 20, 37)
    cache = Cache(lengths, (6, 2, 40), dtype, 16, backend, sinks=torch.tensor([-40.0, 25.0, 0.3, -1.7, 2.1, 0.0]))
    steps = [[(1, 0, 18), (2, 0, 18)], [(2, 18, 34), (0, 0, 1)], [(2, 34, 36), (1, 18, 20)], [(2, 36, 37)]]
    answers = [[] for _ in lengths]
    for parts in steps:
        for (s, _, _), answer in zip(parts, cache.step(parts, options), strict=True):
            answers[s].append(answer)
    _require_exact(cache, answers, options)
    again = cache.step([(s, n - 1, n) for s, n in enumerate(lengths)], options)
    assert equality(backend)(again[2], answers[2][-1])


@pytest.mark.parametrize(
    ("heads", "dtype", "options"), [((6, 2, 40), torch.bfloat16, OPTIONS[3]), ((8, 1, 17), torch.float32, OPTIONS[1])]
)
def test_rows_in_tiles(heads, dtype, options, backend):
    """Rows of a prompt beyond a tile of queries, one of keys and a page, beside single tokens."""
    lengths = (75, 1, 19)
    cache = Cache(lengths, heads, dtype, 16, backend)
    first = cache.step([(0, 0, 70), (2, 0, 18)], options)
    second = cache.step([(0, 70, 75), (1, 0, 1), (2, 18, 19)], options)
    last = cache.step([(s, n - 1, n) for s, n in enumerate(lengths)], options)  # again, each alone
    found = torch.cat([first[0], second[0]]), second[1], torch.cat([first[1], second[2]])
    for s in range(len(lengths)):
        exact, allowed = cache.exact(s, options)
        assert ((found[s].double() - exact).abs() <= allowed).all()
        assert ((last[s].double() - exact[-1:]).abs() <= allowed[-1:]).all()


@pytest.mark.not_interpreted
@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_its_own_sequence_alone(dtype, window, backend):
    """A long context, whose keys are split: a prompt at once, in chunks and token by token, one thread or three."""
    lengths, heads, options = (1300, 70, 90), (4, 2, 32), AttentionOptions(window=window)
    same = equality(backend)
    before = torch.get_num_threads()
    whole = Cache(lengths, heads, dtype, 16, backend)
    torch.set_num_threads(1)
    at_once = whole.step([(s, 0, n) for s, n in enumerate(lengths)], options)
    exact, allowed = whole.exact(0, options)
    assert ((at_once[0].double() - exact).abs() <= allowed).all()
    torch.set_num_threads(3)
    cuts = [(1290, 1), (1, 400), (517, 8), (1000, 9)]
    try:
        for cut in cuts[:2] if backend == "reference" else cuts:  # which splits no keys
            cache = Cache(lengths, heads, dtype, 16, backend)
            a, step = cut
            answers = [cache.step([(0, 0, a)], options)[0]]
            while a < 1300:
                b, other = min(a + step, 1300), 1 + a % 2
                parts = [(other, 0, lengths[other]), (0, a, b)] if a % 3 == 0 else [(0, a, b)]
                answers.append(cache.step(parts, options)[-1])
                a = b
            assert same(torch.cat(answers), at_once[0]), cut
    finally:
        torch.set_num_threads(before)


def test_layouts_of_the_back_ends_agree(backend):
    stores = []
    for name in ("reference", backend):
        cache = Cache((21, 40), (2, 2, 24), torch.bfloat16, 16, name)
        cache.step([(0, 0, 21), (1, 0, 40)])
        stores.append(cache.store)
    assert torch.equal(*(s.data.view(torch.int16) for s in stores))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "half"), [((6, 2, 40), 20), ((18, 3, 17), 5), ((1, 1, 64), 32)])
def test_heads_are_turned_where_they_are_written(heads, half, interleaved, dtype, backend):
    """As by a rotation before, with features that do not turn, and rows of prompts beside single tokens."""
    lengths, angles = (21, 40, 3), torch.randn(1, 22, half, generator=torch.Generator().manual_seed(half))
    turned, expected = (Cache(lengths, heads, dtype, 16, backend) for _ in range(2))
    parts = [(0, 3, 21), (1, 39, 40), (2, 0, 3)]
    tables = angles.cos(), angles.sin()
    rows = PagedRows.of([(turned.pages[s], a, b - a) for s, a, b in parts], turned.store)
    q, k, v = (torch.cat([x[s][a:b] for s, a, b in parts]) for x in (turned.q, turned.k, turned.v))
    q_expected, k_expected = (
        rotate(x.transpose(0, 1)[None], *tables, interleaved=interleaved, backend=backend)[0].transpose(0, 1)
        for x in (q, k)
    )
    append(expected.store, LAYER, k_expected, v, rows, backend=backend)
    append_turned(turned.store, LAYER, (q, k, v), rows, tables, interleaved=interleaved, backend=backend)
    assert torch.equal(q, q_expected)
    assert torch.equal(*(s.data.view(torch.int16) for s in (turned.store, expected.store)))


def test_pages_behind_a_window_are_not_read(backend):
    cache, options = Cache((100,), (2, 1, 16), torch.float32, 16, backend), AttentionOptions(window=9)
    expected = cache.step([(0, 0, 100)], options)[0][99:]
    cache.pages[0][:5] = [-7] * 5
    assert equality(backend)(cache.step([(0, 99, 100)], options)[0], expected)


def test_a_page_is_copied(backend):
    cache = Cache((16,), (2, 2, 16), torch.float32, 16, backend)
    first = cache.step([(0, 0, 16)])[0]
    source, target = cache.pages[0][0], cache.pages[0][0] - 1
    cache.store.data[target].copy_(cache.store.data[source])
    cache.store.data[source] = 0
    cache.pages[0][0] = target % cache.store.n_pages
    assert equality(backend)(cache.step([(0, 15, 16)])[0][0], first[15])
    assert cache.store.page_bytes == LAYERS * 2 * 2 * 16 * 16 * 4


@pytest.mark.usefixtures("own_checks")
def test_what_does_not_fit_is_refused():
    for wrong in ((0, 16, (1, 1, 8)), (4, 12, (1, 1, 8)), (4, 16, (1, 0, 8))):
        with pytest.raises(ConfigError, match="multiple of 16"):
            PagedStore.zeros(*wrong, dtype=torch.float32)
    with pytest.raises(ConfigError, match="float16"):
        PagedStore.zeros(4, 16, (1, 1, 8), dtype=torch.float16)
    store = PagedStore.zeros(4, 16, (2, 2, 8), dtype=torch.float32)
    for sequence in (([0], 10, 7), ([0], 3, 0), ([0], -1, 1)):
        with pytest.raises(ShapeError, match=r"sequence 0.*at least one row and pages up to their end"):
            PagedRows.of([sequence], store)
    for pages in ([4], [-1]):
        with pytest.raises(ShapeError, match="among the 4"):
            PagedRows.of([(pages, 3, 2)], store)
    rows = PagedRows.of([([2], 3, 2)], store)
    k, q = torch.zeros(2, 2, 8), torch.zeros(2, 4, 8)
    with pytest.raises(ShapeError, match="layer 2 is not among the 2"):
        append(store, 2, k, k, rows)
    with pytest.raises(ShapeError, match=r"v must be \(2, 2, 8\)"):
        append(store, 0, k, k[:1], rows)
    with pytest.raises(ShapeError, match=r"q must be.*bfloat16"):
        paged_attention(store, 0, q.bfloat16(), rows)
    for table in (torch.ones(1, 2, 5), torch.ones(1, 3, 4), torch.ones(2, 4)):
        with pytest.raises(ShapeError, match=r"cos and sin must be \(1, 2, half\)"):
            append_turned(store, 0, (q, k, k), rows, (table, table))
    with pytest.raises(ShapeError, match="3 query heads do not fit"):
        paged_attention(store, 0, q[:, :3], rows)
    for bias in (torch.zeros(4, 12), torch.zeros(4, 0), torch.zeros(3, 16), torch.zeros(4, 16).double()):
        with pytest.raises(ShapeError, match=r"bias must be contiguous float32 of at least \(4, 16\)"):
            paged_attention(store, 0, q, rows, bias=bias)
    for sinks in (torch.zeros(3), torch.zeros(4, 1), torch.zeros(4).double()):
        with pytest.raises(ShapeError, match=r"sinks must be contiguous float32 of \(4,\)"):
            paged_attention(store, 0, q, rows, sinks=sinks)
    with pytest.raises(ShapeError, match="without a softcap"):
        paged_attention(store, 0, q, rows, AttentionOptions(softcap=1.5), torch.zeros(4, 16))


def test_a_table_that_is_the_same_tuple_is_read_once_and_a_list_each_time():
    store = PagedStore.zeros(9, UNIT, (1, 1, 16), dtype=torch.float32)
    tables, kept, listed = PageTables(), (3, 5, 7), [2, 4]
    first = PagedRows.of([(kept, 3, 2), (listed, 1, 1)], store, tables)
    read, _ = tables.of(kept)
    listed[1] = 8
    second = PagedRows.of([(listed, 2, 1), (kept, 5, 1)], store, tables)
    assert tables.of(kept)[0] is read
    assert list(first.sequences()) == [([3, 5, 7], 3, 0, 2), ([2, 4], 1, 2, 3)]
    assert list(second.sequences()) == [([2, 8], 2, 0, 1), ([3, 5, 7], 5, 1, 2)]
    PagedRows.of([(listed, 2, 1)], store, tables)
    PagedRows.of([(listed, 2, 1)], store, tables)
    assert tables.of(kept)[0] is not read  # of the last step alone


@pytest.mark.parametrize("pages", [(3, 9), [3, 9]])
def test_a_page_that_is_not_there_is_told_in_every_step(pages):
    store, tables = PagedStore.zeros(9, UNIT, (1, 1, 16), dtype=torch.float32), PageTables()
    for _ in range(2):
        with pytest.raises(ShapeError, match=r"pages \[3, 9\] are not all among the 9"):
            PagedRows.of([(pages, 3, 2)], store, tables)
