"""Memory of a bounded number of values: those used last stay."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from veneer.plain.lru import LruCache


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=60))
def test_those_used_last_are_kept(uses):
    """As a list of keys has them, in the order of their last use."""
    latest, order = LruCache[int, str](3), list[int]()
    for puts, key in uses:
        if puts:
            latest.put(key, f"value {key}")
        else:
            assert latest.get(key) == (f"value {key}" if key in order else None)
        if puts or key in order:
            order = [*(other for other in order if other != key), key][-3:]
        assert (list(latest), len(latest)) == (order, len(order))
    latest.drop_first()
    assert list(latest) == order[1:]
