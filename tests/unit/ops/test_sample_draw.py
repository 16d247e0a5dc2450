"""Draws: every back end equals the specification, token by token, and that the usual softmax and filters."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.errors import ShapeError
from veneer.ops.reference.sample import logprobs_of, narrowed, random_bits, shares_of
from veneer.ops.sample import NONE_ALLOWED, NOT_FINITE, Draws, Ints, RowRule, bit_mask, draw

OP = "sample.draw"
VOCABULARIES = [1, 7, 64, 263, 4099, 49_155]
KINDS = ["plain", "ties", "equal", "peak", "holes"]
quickly = settings(max_examples=60)


def logits_of(seed: int, n: int, d: int, kind: str) -> torch.Tensor:
    """Rows as models have them, and rows of many ties or with excluded ids."""
    found = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * 4
    if kind == "ties":
        found = found.round()
    if kind == "equal":
        found = torch.full((n, d), 2.5)
    if kind == "peak":
        found[:, seed % d] += 30
    if kind == "holes":
        found[found < -1] = -math.inf
        found[:, seed % d] = 0.5
    return found


def ints(values: object) -> Ints:
    return array("i", values)


@st.composite
def settings_of(draw_from: st.DrawFn, d: int) -> dict[str, Any]:
    """Any rule, its ids as lists; each effect is absent from many."""
    some = lambda *values: draw_from(st.sampled_from(values))  # noqa: E731
    ids = st.lists(st.integers(0, d - 1), min_size=1, max_size=9, unique=True)
    maybe = st.one_of(st.none(), ids)
    return {
        "allowed": draw_from(st.lists(ids, max_size=2)),
        **{name: draw_from(maybe) for name in ("banned", "biased", "seen", "counted")},
        "repetition": some(1.0, 1.05, 0.4, 3.0),
        "frequency": some(0.0, 0.3, -0.7),
        "presence": some(0.0, 1.1, -0.2),
        "temperature": some(0.0, 0.7, 1.0, 1.9, 1e-5),
        "min_p": some(0.0, 0.0, 0.05, 0.5, 1.0),
        "top_k": some(0, -1, 1, 3, 20, 700, d, d + 5, 2**70),
        "top_p": some(1.0, 0.95, 0.8, 0.5, 0.1, 1e-9),
        "key": (draw_from(st.integers(-(2**63), 2**64)), draw_from(st.integers(-9, 2**40))),
        "place": draw_from(st.integers(0, 10**6)),
        "target": draw_from(st.one_of(st.none(), st.none(), st.integers(0, d - 1))),
        "n_likeliest": some(None, None, 0, 1, 5, d),
    }


def rule_of(given: dict[str, Any], d: int) -> RowRule:
    lists = {name: None if given[name] is None else ints(given[name]) for name in ("banned", "seen")}
    wide = [range(0, d, 2), range(d // 3, d)]
    masks = tuple(bit_mask([*own, *also], d) for own, also in zip(given["allowed"], wide, strict=False))
    biased, counted = given["biased"], given["counted"]
    lists["biased"] = None if biased is None else (ints(biased), array("f", [(i % 7) - 3.3 for i in biased]))
    lists["counted"] = None if counted is None else (ints(counted), ints([i % 3 + 1 for i in counted]))
    return RowRule(**{**given, **lists, "allowed": masks})


def require_equal(logits: torch.Tensor, asked: list[RowRule], backend: str, expected: Draws | None = None) -> None:
    expected = expected or draw(logits, asked, backend="reference")
    if backend == "reference":
        return  # the specification itself: no rule is refused
    found = draw(logits, asked, backend=backend)
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert found.ranks.tolist() == expected.ranks.tolist()
    assert found.likeliest[0].tolist() == expected.likeliest[0].tolist()
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.likeliest[1], expected.likeliest[1], rtol=0, atol=1e-12)


@pytest.mark.not_interpreted
@quickly
@given(data=st.data())
def test_every_back_end_equals_the_specification(data, every_backend):
    """All settings mixed in one call, with odd vocabularies and ties at the thresholds."""
    d, kind = data.draw(st.sampled_from(VOCABULARIES)), data.draw(st.sampled_from(KINDS))
    asked = [rule_of(given, d) for given in data.draw(st.lists(settings_of(d), min_size=1, max_size=5))]
    logits = logits_of(data.draw(st.integers(0, 999)), len(asked), d, kind)
    logits = logits.to(data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))
    expected = draw(logits, asked, backend="reference")  # no rule is refused
    for backend in every_backend():
        require_equal(logits, asked, backend, expected)


def test_rules_of_every_kind_in_one_call(backend):
    """Ids in two blocks of a row, ties at the thresholds, rows of bfloat16 beside one another."""
    d = 2051
    ids, some = ints([5, 2050, 77]), {"key": (-3, 2**63 + 9), "n_likeliest": 2}
    kinds = {
        "ties": RowRule(temperature=0.7, top_k=20, top_p=0.8, place=5, **some),
        "plain": RowRule(min_p=0.01, allowed=(bit_mask(range(0, d, 3), d), bit_mask(range(d), d)), **some),
        "equal": RowRule(top_p=0.3, banned=ids, seen=ids, repetition=1.3, key=(7, 1)),
        "peak": RowRule(biased=(ids, array("f", [30.0, -2.0, 9.0])), key=(8, 1)),
        "holes": RowRule(temperature=0, counted=(ids, ints([1, 2, 9])), frequency=0.3, presence=-40.0, **some),
    }
    logits = torch.cat([logits_of(31, 1, d, kind) for kind in (*kinds, "plain")]).bfloat16()
    require_equal(logits, [*kinds.values(), RowRule(target=2050, n_likeliest=0)], backend)


@cache
def large(kind: str, dtype: torch.dtype) -> tuple[torch.Tensor, list[RowRule], Draws]:
    """100,000 ids that a prompt has, in any order; more rows than threads; and what the specification draws."""
    d = 151_936
    ids = torch.randperm(d, generator=torch.Generator().manual_seed(1))[:100_000]
    common = {"seen": ints(ids.tolist()), "repetition": 1.05, "temperature": 0.7}
    narrow = [{"top_k": 20, "top_p": 0.8}, {"top_p": 0.8}, {}, {"min_p": 0.02, "top_k": 7}, {"n_likeliest": 5}]
    asked = [RowRule(key=(3, i), place=i, **common, **more) for i, more in enumerate(narrow)]
    logits = logits_of(5, len(asked), d, kind).to(dtype)
    return logits, asked, draw(logits, asked, backend="reference")


@pytest.mark.not_interpreted
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("plain", torch.float32), ("ties", torch.bfloat16), ("equal", torch.float32), ("peak", torch.bfloat16)],
)
def test_a_large_vocabulary_and_a_long_prompt(kind, dtype, backend):
    logits, asked, expected = large(kind, dtype)
    require_equal(logits, asked, backend, expected)


def test_rows_that_are_not_finite_and_rules_that_leave_nothing(backend):
    logits = torch.randn(6, 67, generator=torch.Generator().manual_seed(2))
    logits[0, 66], logits[1, 3], logits[2] = math.nan, math.inf, -math.inf
    nothing = RowRule(allowed=(bit_mask([3, 5], 67),), banned=ints([3, 5]))
    asked = [*(RowRule(n_likeliest=2) for _ in range(3)), nothing, RowRule(target=9), RowRule(temperature=0)]
    found = draw(logits, asked, backend=backend)
    assert found.tokens.tolist() == [NOT_FINITE] * 3 + [NONE_ALLOWED, 9, int(logits[5].argmax())]
    assert draw(logits[:0], [], backend=backend).tokens.shape == (0,)


@pytest.mark.not_interpreted
def test_strided_rows(backend):
    logits = logits_of(3, 70, 41, "plain")
    asked = [RowRule(key=(1, i), n_likeliest=3) for i in range(41)]
    require_equal(logits.T, asked, backend)
    require_equal(logits[:, 3:20], [RowRule(key=(1, i)) for i in range(70)], backend)


def test_what_does_not_fit_the_vocabulary_is_refused(backend):
    logits = logits_of(3, 2, 65, "plain")
    rule = RowRule()
    for wrong in ({"banned": ints([3, 65])}, {"seen": ints([70]), "repetition": 2.0}, {"target": 65, "n_likeliest": 0}):
        with pytest.raises(IndexError):
            draw(logits, [rule, RowRule(**wrong)], backend=backend)
    with pytest.raises(ShapeError, match="a mask holds 64 ids"):
        draw(logits, [rule, RowRule(allowed=(bit_mask([3], 64),))], backend=backend)
    with pytest.raises(ShapeError, match="1 rules are given for 2 rows"):
        draw(logits, [rule], backend=backend)


def test_a_penalty_near_zero_overflows_nowhere(backend):
    logits = logits_of(3, 2, 131, "plain")
    require_equal(logits, [RowRule(repetition=r, seen=ints(range(0, 131, 3))) for r in (1e-45, 3e38)], backend)


def test_shares_are_those_of_the_softmax():
    z = torch.cat([torch.linspace(-29, 0, 5001), torch.tensor([-math.inf, -90.0])])
    expected = torch.exp(z.double())
    assert (shares_of(z).double() / 2**40 - expected).abs().max() < 4e-7
    large = z > -10
    assert ((shares_of(z)[large].double() / 2**40) / expected[large] - 1).abs().max() < 3e-7
    assert shares_of(torch.zeros(1)).item() == 2**40


def test_logprobs_are_those_of_torch():
    logits = logits_of(4, 1, 4099, "plain")[0]
    torch.testing.assert_close(logprobs_of(logits).float(), torch.log_softmax(logits, dim=0), rtol=0, atol=3e-6)


def test_the_random_number_is_the_generators():
    for key, place in (((0, 1), 0), ((5, -3), 17), ((2**63, -(2**62)), 10**6)):
        parts = np.array([part % 2**64 for part in key], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=parts, counter=[place, 0, 0, 0]))
        assert random_bits(key, place) / 2**53 == generator.random()


def test_of_equal_ids_the_first_stay():
    """top_k keeps all that equal its last; top_p takes them in the order of the vocabulary."""
    logits = torch.tensor([1.0, 3.0, 1.0, 3.0, 3.0, 1.0])
    assert narrowed(logits, RowRule(top_k=2)).nonzero().flatten().tolist() == [1, 3, 4]
    assert narrowed(logits, RowRule(top_p=0.5)).nonzero().flatten().tolist() == [1, 3]
    assert narrowed(torch.zeros(10), RowRule(top_p=0.3)).nonzero().flatten().tolist() == [0, 1, 2]


def test_frequencies_are_the_shares():
    """Chi square of many draws, far in its tail."""
    n, logits = 4000, torch.tensor([0.3, -1.0, 1.7, -math.inf, 0.9, 0.2, -3.0])
    asked = [RowRule(key=(11, i), place=i % 5, temperature=1.6, min_p=0.02, top_p=0.97) for i in range(n)]
    found = Counter(draw(logits.expand(n, -1), asked).tokens.tolist())
    shares = narrowed(logits, asked[0]).double()
    likely = shares / shares.sum()
    assert set(found) == set(likely.nonzero().flatten().tolist())
    assert sum((found[t] - n * p) ** 2 / (n * p) for t, p in enumerate(likely.tolist()) if p) < 30
