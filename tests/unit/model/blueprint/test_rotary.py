"""Rotary frequencies against transformers' own, for every way of stretching them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Ernie4_5_MoeConfig, FlexOlmoConfig, LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from veneer.model.blueprint.describe import describe_config
from veneer.model.blueprint.rotary import Rotary

from .families import DYNAMIC, LINEAR, LLAMA3, LONG, SIZES, WIDE, YARN, rope


def rotary_of(config: Any) -> Rotary:
    rotary = describe_config(config).attentions[0].rotary
    assert rotary is not None
    return rotary


@pytest.mark.parametrize("n_tokens", [5, 200])
@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, **rope(LINEAR)),
        LlamaConfig(**SIZES, **rope(DYNAMIC)),
        LlamaConfig(**SIZES, **rope(LLAMA3, 17)),
        LlamaConfig(**SIZES, **rope(YARN, 17)),
        LlamaConfig(**SIZES, **rope({**YARN, "truncate": False, "mscale": 0.7, "mscale_all_dim": 1.3}, 17)),
        LlamaConfig(**SIZES, **rope({**YARN, "attention_factor": 1.9}, 17)),
        LlamaConfig(**SIZES, **rope({"rope_type": "yarn", "factor": 0.9}, 17)),
        Phi3Config(original_max_position_embeddings=11, **WIDE, **rope(LONG)),
        Phi3Config(original_max_position_embeddings=11, **WIDE, **rope({**LONG, "attention_factor": 1.9})),
        Phi3Config(original_max_position_embeddings=64, **WIDE, **rope(LONG)),
    ],
)  # fmt: skip
def test_frequencies_equal_transformers(config: Any, n_tokens: int) -> None:
    rotary = rotary_of(config)
    kind = config.rope_parameters["rope_type"]
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=n_tokens)
    torch.testing.assert_close(rotary.frequencies(n_tokens), frequencies, rtol=1e-6, atol=0)
    assert rotary.attention_factor == pytest.approx(factor, rel=1e-12)


def test_tables_hold_the_angle_of_each_pair() -> None:
    rotary = Rotary(dim=6, theta=29.0, max_positions=64)
    cos, sin = rotary.tables(torch.tensor([[0, 7]]))
    angles = 7 * torch.tensor([1.0, 29 ** (-1 / 3), 29 ** (-2 / 3)])
    torch.testing.assert_close(cos, torch.stack([torch.ones(3), angles.cos()])[None])
    torch.testing.assert_close(sin, torch.stack([torch.zeros(3), angles.sin()])[None])


def test_a_share_of_a_head_that_is_no_whole_number_of_pairs_is_not_described() -> None:
    config = LlamaConfig(**SIZES, **rope({"partial_rotary_factor": 0.5}))
    (first, *_) = describe_config(config).strange
    assert first.reason == "its partial_rotary_factor=0.5 turns 7 of 14 numbers"


def test_neighbouring_pairs_are_seen_in_the_code_of_types_that_are_not_listed():
    mixture = Ernie4_5_MoeConfig(**WIDE, moe_num_experts=3, moe_k=2, moe_intermediate_size=20)
    assert rotary_of(mixture).interleaved
    assert not rotary_of(FlexOlmoConfig(**WIDE, num_experts=3, num_experts_per_tok=2)).interleaved
