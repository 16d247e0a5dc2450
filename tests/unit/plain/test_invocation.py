"""First token of a sequence that its adapter acts on."""

from __future__ import annotations

from veneer.plain.invocation import NEVER, acts_from

TOKENS = (7, 3)


def test_the_last_occurrence_counts():
    assert acts_from((1, 7, 3, 2, 7, 3, 4), TOKENS) == 4
    assert acts_from((7, 3), TOKENS) == 0
    assert acts_from((3, 7), TOKENS) == acts_from((7,), TOKENS) == NEVER
    assert acts_from((3, 7), ()) == 0
