"""The places of residual adapters: what descriptions say, and what one watched pass of the model shows."""

from __future__ import annotations

import pytest
import torch

from veneer.model.sites.structure import described_sublayers, sublayers, watched_sublayers

from .families import FAMILIES, model_of

UNSEEN = (
    *("lfm2", "lfm2 experts"),  # a watched pass knows attention by its name, and a short convolution has none
    "hyperclovax, without post-norms",  # it sees an identity, whose output is the half's
)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in UNSEEN])
def test_descriptions_agree_with_a_watched_pass(family: str) -> None:
    model = model_of(family, torch.float32)
    described = described_sublayers(model)
    assert described is not None
    assert sorted(described, key=str) == sorted(watched_sublayers(model), key=str)


def test_a_short_convolution_has_the_place_of_attention() -> None:
    found = described_sublayers(model_of("lfm2", torch.float32))
    assert found is not None
    assert [(place.kind, place.input_path) for place in found[:4]] == [
        ("attention", "model.layers.0.conv"),
        ("mlp", "model.layers.0.feed_forward"),
        ("attention", "model.layers.1.self_attn"),
        ("mlp", "model.layers.1.feed_forward"),
    ]


def test_a_decoder_without_weights_has_its_sublayers_too() -> None:
    model = model_of("neox", torch.float32)
    expected = sublayers(model)
    assert sublayers(model.to("meta")) == expected
