"""The compiled module as a whole."""

from __future__ import annotations

import pytest

from veneer.errors import OutdatedKernelsError
from veneer.ops.cpu.module import kernels


def test_kernels_that_lack_what_the_code_calls_are_told() -> None:
    with pytest.raises(OutdatedKernelsError, match=r"lack multiply_by_magic: they are older .*make setup"):
        kernels().multiply_by_magic(3)
    assert not hasattr(kernels(), "multiply_by_magic")
