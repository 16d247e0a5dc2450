"""The places of residual adapters: what descriptions say, and what one watched pass of the model shows."""

from __future__ import annotations

import pytest
import torch

from veneer.model.sites.structure import described_sublayers, sublayers, watched_sublayers

from .families import FAMILIES, model_of


@pytest.mark.parametrize("family", FAMILIES)
def test_descriptions_agree_with_a_watched_pass(family: str) -> None:
    model = model_of(family, torch.float32)
    described = described_sublayers(model)
    assert described is not None
    assert sorted(described, key=str) == sorted(watched_sublayers(model), key=str)


def test_a_decoder_without_weights_has_its_sublayers_too() -> None:
    model = model_of("neox", torch.float32)
    expected = sublayers(model)
    assert sublayers(model.to("meta")) == expected
