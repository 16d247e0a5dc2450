"""The summary of a decoder that people are shown."""

from __future__ import annotations

import pytest
from transformers import MoshiConfig

from veneer.model.blueprint.describe import describe_config
from veneer.model.blueprint.summary import summary

from .families import FAMILIES, SIZES


@pytest.mark.parametrize(
    ("family", "lines"),
    [
        ("llama", {"layers": "4", "attention heads": "6", "key/value heads": "2", "head width": "14",
                   "rotary": "theta 523, Llama3 ×5"}),
        ("gemma3", {"window": "5 tokens in 2 of 4 layers",
                    "rotary": "theta 37 in 2 of 4 layers; theta 523, Linear ×8 in 2 of 4 layers"}),
        ("smollm3", {"rotary": "theta 2e+06 in 2 of 4 layers"}),
        ("phi3, long", {"rotary": "theta 523, LongRope"}),
        ("glm", {"rotary": "theta 10,000, 6 of 12 numbers, neighbouring pairs"}),
        ("mixtral", {"experts": "2 of 5", "window": "5 tokens"}),
    ],
)  # fmt: skip
def test_a_described_family(family: str, lines: dict[str, str]) -> None:
    found = summary(describe_config(FAMILIES[family]))
    assert {title: found[title] for title in lines} == lines
    assert "not described" not in found


def test_what_a_decoder_has_not_is_not_told() -> None:
    assert not {"rotary", "window", "experts"} & summary(describe_config(FAMILIES["gpt2"])).keys()


def test_what_is_not_described_is_told() -> None:
    found = summary(describe_config(MoshiConfig(ffn_dim=58, audio_vocab_size=89, **SIZES)))
    assert "no feed-forward part of known form" in found["not described"]
