"""The worth of what is kept, by which it goes out."""

from hypothesis import given
from hypothesis import strategies as st

from veneer.serve.schedule.eviction import Eviction

AMOUNTS = st.floats(0.001, 1000)


@given(st.lists(AMOUNTS, min_size=1), AMOUNTS, st.integers(1, 1000))
def test_an_entry_used_now_outlives_all_that_went(gone, seconds, n_bytes):
    """In whatever order they went: an entry that was in use could not go when its turn came."""
    kept = Eviction()
    for worth in gone:
        kept.went(worth)
    assert kept.of(1, seconds, n_bytes) > max(gone)


def test_worth_grows_with_uses_and_seconds_and_falls_with_bytes():
    kept = Eviction()
    kept.went(3.0)
    assert [kept.of(*given) for given in ((1, 2.0, 8), (4, 2.0, 8), (1, 6.0, 8), (1, 2.0, 2))] == [
        3.25, 4.0, 3.75, 4.0
    ]  # fmt: skip
