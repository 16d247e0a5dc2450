"""The likeliest tokens of logits: torch's own argmax, and nothing where that is not finite."""

from __future__ import annotations

import pytest
import torch

from veneer.ops.sample import likeliest

OP = "sample.likeliest"
DTYPES = [torch.float32, torch.bfloat16]
ODD = [torch.nan, torch.inf, -torch.inf]


@pytest.mark.looped("dtype", DTYPES)
@pytest.mark.looped(("n", "d"), [(1, 1), (3, 17), (7, 131), (33, 4099), (5, 30011)])
def test_equals_torch_with_many_ties(n, d, dtype, backend):
    """Few distinct values: of equal ones the first counts, in whatever lanes they lie."""
    generator = torch.Generator().manual_seed(n * d)
    logits = (torch.randn(n, d, generator=generator) * 3).round().sub(11).to(dtype)
    found = likeliest(logits, backend=backend)
    assert torch.equal(found, (logits == logits.max(dim=1, keepdim=True).values).int().argmax(dim=1))


@pytest.mark.looped("dtype", DTYPES)
@pytest.mark.looped("odd", ODD)
def test_values_that_are_not_finite(odd, dtype, backend):
    """One that is no number, or infinite, is told wherever it stands; minus infinity is a logit like others."""
    generator = torch.Generator().manual_seed(5)
    for place in (0, 7, 30, 66):
        logits = torch.randn(3, 67, generator=generator).to(dtype)
        plain = likeliest(logits, backend=backend)
        logits[1, place] = odd
        found = likeliest(logits, backend=backend)
        assert (found[0], found[2]) == (plain[0], plain[2])
        assert found[1] == (logits[1].argmax() if odd == -torch.inf else -1)
    assert likeliest(torch.full((2, 5), -torch.inf, dtype=dtype), backend=backend).tolist() == [-1, -1]


def test_any_layout_and_width(backend):
    logits = torch.randn(29, 41, generator=torch.Generator().manual_seed(2))
    assert torch.equal(likeliest(logits.T, backend=backend), logits.argmax(dim=0))
    assert torch.equal(likeliest(logits[:, 3:20], backend=backend), logits[:, 3:20].argmax(dim=1))
    assert torch.equal(likeliest(logits.half(), backend=backend), logits.half().argmax(dim=1))
    assert likeliest(logits[:0], backend=backend).shape == (0,)
    assert likeliest(logits[:, :0], backend=backend).tolist() == [-1] * 29
