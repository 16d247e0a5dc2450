"""The models that `fuse` takes; it leaves the others alone and says why."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from tests.unit.model.conftest import NEOX, SIZES, base
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitNetConfig,
    GPTNeoXJapaneseConfig,
    Ministral3Config,
    MoshiConfig,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP

from veneer.model.blueprint.family import Family
from veneer.model.blueprint.names import Names
from veneer.model.fused import decoder, proof
from veneer.model.fused.block import FusedBlock
from veneer.model.fused.decoder import fuse


@pytest.mark.parametrize(("most", "n_threads"), [(10**9, 1), (0, 3)])
def test_a_small_model_is_checked_by_one_thread(most: int, n_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    calls = proof.calls_of
    monkeypatch.setattr(decoder, "FEW_PARAMETERS", most)
    monkeypatch.setattr(proof, "calls_of", lambda *given: seen.append(torch.get_num_threads()) or calls(*given))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert fuse(base(Qwen3Config(**SIZES)))
        assert (seen, torch.get_num_threads()) == ([n_threads], 3)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("known", [True, False])
def test_a_window_longer_than_the_check_is_seen(known: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = base(Qwen3Config(use_sliding_window=known, sliding_window=41, max_window_layers=1, **SIZES))
    lying = model.model.layers[1].self_attn
    lying.config, lying.sliding_window = copy.copy(lying.config), None if known else 41
    lying.config.layer_types = None
    with caplog.at_level(logging.WARNING, logger="veneer"):
        assert not fuse(model)
    assert "differs by" in caplog.text
    assert (model.config.sliding_window, lying.sliding_window) == ((41, None) if known else (None, 41))


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize(
    ("dtype", "scale", "reason"), [(torch.float32, 0.25, "differs by"), (torch.bfloat16, 0.02, "more than rotary")]
)
def test_queries_scaled_by_position_run_the_general_path(
    dtype: torch.dtype,
    scale: float,
    reason: str,
    described: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1 in the first 32 positions; small weights hide the rest in bfloat16's rounding."""
    if not described:  # values see it too
        monkeypatch.setattr("veneer.model.blueprint.read_attention.read_temperature", lambda source: None)
    model = ministral(32, dtype, scale)
    with caplog.at_level(logging.INFO, logger="veneer"):
        assert fuse(model)
    assert ("scales queries by their position" if described else reason) in caplog.text
    assert halves(model) == [False, True] * len(model.model.layers)


def test_queries_that_grow_beyond_the_context_alone_are_fused() -> None:
    assert fuse(ministral(SIZES["max_position_embeddings"], torch.float32, 0.25))


def ministral(original: int, dtype: torch.dtype, scale: float) -> Any:
    rope = {"llama_4_scaling_beta": 0.3, "original_max_position_embeddings": original, "rope_type": "default"}
    torch.manual_seed(3)
    config = Ministral3Config(
        initializer_range=scale, rope_parameters={"rope_theta": 1e4, **rope}, pad_token_id=0, **SIZES
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            GPTNeoXJapaneseConfig(intermediate_multiple_size=1, **NEOX),
            "it has no attribute with the scale of its scores",
        ),
        (BitNetConfig(pad_token_id=0, **SIZES), "it holds attn_sub_norm"),
        (MoshiConfig(ffn_dim=58, audio_vocab_size=89, pad_token_id=0, **SIZES), "feed-forward part of known form"),
        (
            Qwen3Config(layer_types=["full_attention", "chunked_attention"], **SIZES),
            "no attribute 'attention_chunk_size'",
        ),
    ],
)
def test_a_model_that_fits_no_pattern_is_left_alone(config: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    classes = [type(m) for m in model.modules()]
    with caplog.at_level(logging.WARNING, logger="veneer"):
        assert not fuse(model)
    assert [type(m) for m in model.modules()] == classes
    assert len(caplog.messages) == 1
    assert "general path" in caplog.text
    assert reason in caplog.text


@pytest.mark.parametrize(
    ("family", "spoil", "reason"),
    [
        ("llama", lambda model: setattr(model.model.layers[1].mlp, "up_proj", nn.Linear(13, 58)), "RuntimeError"),
        ("qwen3", lambda model: model.config.layer_types.pop(), "IndexError"),
    ],
)
def test_a_model_that_cannot_be_looked_at_is_left_alone(
    family: str, spoil: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = base(family)
    spoil(model)
    classes = [type(m) for m in model.modules()]
    with caplog.at_level(logging.WARNING, logger="veneer"):
        assert not fuse(model)
    assert [type(m) for m in model.modules()] == classes
    assert reason in caplog.text


class DoubledAttention(LlamaAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        change, weights = super().forward(*args, **kwargs)
        return 2 * change, weights


class DoubledMLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(2 * x)


def double_attention(model: Any) -> None:
    model.model.layers[1].self_attn.__class__ = DoubledAttention


def double_mlp(model: Any) -> None:
    model.model.layers[1].mlp.__class__ = DoubledMLP


def double_both(model: Any) -> None:
    double_attention(model)
    double_mlp(model)


def cap_below_zero(model: Any) -> None:
    model.model.layers[1].self_attn.attn_logit_softcapping = -3


@pytest.mark.parametrize(
    ("family", "spoil", "fused", "reason"),
    [
        ("llama", double_attention, [True, True, False, True], "differs by"),
        ("llama", double_mlp, [True, True, True, False], "differs by"),
        ("llama", double_both, [True, True, False, False], "differs by"),
        ("gemma2", cap_below_zero, [True, True, False, True], "softcap=-3"),
    ],
)
def test_a_half_that_differs_is_a_border(
    family: str, spoil: Any, fused: list[bool], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = base(family).eval()
    spoil(model)
    ids = torch.arange(2 * 9).view(2, 9)
    expected = model(input_ids=ids, use_cache=False).logits
    with caplog.at_level(logging.WARNING, logger="veneer"):
        assert fuse(model)
    assert halves(model)[:4] == fused
    assert all(halves(model)[4:])
    assert "run transformers' code, not fused kernels" in caplog.text
    assert reason in caplog.text
    assert torch.allclose(model(input_ids=ids, use_cache=False).logits, expected, atol=1e-4)


class WeightsOnDemand(LlamaDecoderLayer):
    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        found = super().forward(hidden_states, **kwargs)
        if not kwargs.get("output_attentions"):
            return found
        return found, None


def test_a_block_returns_what_its_own_call_returned() -> None:
    model = base("llama").eval()
    for block in model.model.layers:
        block.__class__ = WeightsOnDemand
    ids = torch.arange(2 * 9).view(2, 9)
    expected = model(input_ids=ids, use_cache=False).logits
    assert not fuse(model)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)


def halves(model: Any) -> list[bool]:
    programs = [module.fused_program for module in model.modules() if isinstance(module, FusedBlock)]
    return [half is not None for program in programs for half in (program.attention, program.mlp)]


def test_the_feed_forward_half_is_found_by_the_name_that_the_description_has(monkeypatch: pytest.MonkeyPatch) -> None:
    class Renamed(LlamaDecoderLayer):
        @property
        def mlp(self) -> nn.Module:  # for the model's own code
            feed: nn.Module = self.feed
            return feed

    model = base("llama").eval()
    for block in model.model.layers:
        block.add_module("feed", block._modules.pop("mlp"))
        block.__class__ = Renamed
    ids = torch.arange(2 * 9).view(2, 9)
    expected = model(input_ids=ids, use_cache=False).logits
    family = Family(model_types=("llama",), names=Names(feed_forward=("feed",)))
    monkeypatch.setattr("veneer.model.blueprint.source.family_of", lambda model_type: family)
    assert fuse(model)
    assert all(block.fused_program.mlp is not None for block in model.model.layers)
    assert {block.fused_program.block.feed_forward.path for block in model.model.layers} == {"feed"}
    assert torch.allclose(model(input_ids=ids, use_cache=False).logits, expected, atol=1e-4)
