"""Types of fields: many values of one type are looked at together."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import pytest

from veneer.plain import field_types
from veneer.plain.field_types import fits, kept


@pytest.mark.parametrize("hint", [Collection[int], Collection[int] | None])
@pytest.mark.parametrize("make", [list, tuple, set])
def test_many_whole_numbers_are_not_looked_at_one_by_one(hint: Any, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr(field_types, "fits", lambda value, hint: calls.append(value) or fits(value, hint))
    monkeypatch.setattr(field_types, "kept", lambda value, hint: calls.append(value) or kept(value, hint))
    ids = make(range(10_007))
    assert field_types.fits(ids, hint)
    assert field_types.kept(ids, hint) == tuple(range(10_007))
    assert len(calls) < 11


def test_a_value_of_another_type_among_many_is_found_or_kept_as_pythons_own() -> None:
    for other in (True, 3.0, "3", None):
        assert not fits([3, 5, other], Collection[int])
    found = kept([3, np.int64(5)], Collection[int])
    assert found == (3, 5)
    assert {type(each) for each in found} == {int}
    assert kept([], Collection[int]) == ()
    assert not fits("35", Collection[str])
