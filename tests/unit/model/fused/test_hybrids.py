"""Decoders of which some blocks keep a state: the rest of them runs fused, as transformers' own code computes it."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from tests.tiny_configs import VOCABULARY, tiny_config
from tests.tiny_types import fused_halves
from transformers import AutoModelForCausalLM

from veneer import LoraConfig, get_peft_model
from veneer.model.fused.block import FusedBlock
from veneer.model.fused.decoder import fuse, fuse_as_described, unfuse
from veneer.ops.traced import tracing
from veneer.plan.model import make_traced
from veneer.train.packing_layout import packing_layout

IDS = torch.arange(2 * 13).view(2, 13) * 7 % (VOCABULARY - 2) + 1
# Of each type: its config, and the halves of two blocks that run fused: attention, MLP, of a block with a state first.
DENSE: dict[str, tuple[dict[str, Any], list[bool]]] = {
    "lfm2": ({}, [True, True, True, True]),
    "lfm2_moe": ({"num_dense_layers": 2}, [True, True, True, True]),
    "jamba": ({}, [False, True, True, False]),
    "granitemoehybrid": ({"num_local_experts": 0, "residual_multiplier": 0.7}, [False, True, True, True]),
    "qwen3_next": (
        {"layer_types": ["linear_attention", "full_attention"], "mlp_only_layers": [0, 1]},
        [True, True, True, True],
    ),
    "qwen3_next_experts": ({"layer_types": ["linear_attention", "full_attention"]}, [True, True, True, True]),
    "qwen3_5_moe_text": ({"layer_types": ["linear_attention", "full_attention"]}, [True, True, True, True]),
    "qwen3_5_text": ({"layer_types": ["linear_attention", "full_attention"]}, [True, True, True, True]),
    "bamba": ({"attn_layer_indices": [1]}, [False, True, True, True]),
    "bailing_hybrid": (
        {"layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["dense", "dense"]},
        [False, True, False, True],
    ),
    "kimi_linear": (
        {"layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["dense", "sparse"]},
        [False, True, False, False],
    ),
    "lfm3": ({"layer_types": ["conv", "full_attention"]}, [True, True, False, True]),
    "falcon_h1": ({}, [False, True, False, True]),
    "nemotron_h": (
        {"layers_block_type": ["linear_attention", "mlp", "full_attention", "moe"], "num_hidden_layers": 4},
        [False, False, False, True, True, False, False, False],
    ),
    "granitemoe": ({"residual_multiplier": 0.7}, [True, True, True, True]),
    "granitemoeshared": ({"residual_multiplier": 0.7}, [True, False, True, False]),
    "granitemoehybrid_experts": ({"residual_multiplier": 0.7}, [False, False, True, False]),
    "olmo_hybrid": ({"layer_types": ["linear_attention", "full_attention"]}, [True, True, True, True]),
}


PACKED = torch.tensor([[*range(5), *range(8)], [*range(7), *range(6)]])
AS_A_WHOLE = ("granitemoe", "granitemoeshared")
CARRIED_OVER = ("falcon_h1",)  # its state goes on through a packed row
APART = [name for name in DENSE if name not in (*AS_A_WHOLE, *CARRIED_OVER)]


def make(model_type: str) -> tuple[Any, Any]:
    """Return a tiny model with an adapter, and one without values."""
    torch.manual_seed(3)
    config = tiny_config(model_type.removesuffix("_experts"))
    for name, value in DENSE[model_type][0].items():
        setattr(config, name, value)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    lora = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(base, lora), empty


def halves(model: Any) -> list[bool]:
    programs = [module.fused_program for module in model.modules() if isinstance(module, FusedBlock)]
    return [half is not None for program in programs for half in (program.attention, program.mlp)]


def result(model: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    mask = kwargs.get("attention_mask", torch.ones_like(IDS)).bool()
    told = mask.clone()
    told[:, 1:] &= mask[:, :-1]  # logits of padding have no meaning
    out = model(input_ids=IDS, labels=IDS.masked_fill(~told, -100), use_cache=False, **kwargs)
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return out.loss.detach(), out.logits.detach()[mask], gradients


def given(rows: str) -> dict[str, torch.Tensor]:
    """Return a mask of padding in front or behind, or positions that restart."""
    mask = torch.ones_like(IDS)
    if rows == "left":
        mask[1, :4] = 0
    if rows == "right":
        mask[0, 8:] = 0
    if rows == "packed":
        return {"position_ids": PACKED}
    return {} if rows == "whole" else {"attention_mask": mask}


@pytest.mark.looped("rows", ["whole", "left", "right", "packed"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("model_type", DENSE)
def test_logits_loss_and_gradients_are_those_of_transformers(model_type: str, checkpointed: bool, rows: str) -> None:
    if rows == "packed" and model_type in APART:
        return  # its own code does not keep them apart
    fused, _ = make(model_type)
    plain = deepcopy(fused)
    assert fuse(fused)
    assert halves(fused) == DENSE[model_type][1]
    for model in (fused, plain):
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
    (loss, logits, gradients), (own_loss, own_logits, own) = (
        result(m, **deepcopy(given(rows))) for m in (fused, plain)
    )
    torch.testing.assert_close(loss, own_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, own_logits, rtol=1e-4, atol=1e-4)
    for name, gradient in own.items():
        if gradient is None:  # Mamba's own code reads the weight of its last projection
            assert gradients[name] is None
        else:
            assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("model_type", DENSE)
def test_a_plan_fuses_what_runs_fused(model_type: str) -> None:
    model, empty = make(model_type)
    assert fuse(model)
    with tracing():
        make_traced(empty)
        assert fuse_as_described(empty) is None
    assert halves(empty) == halves(model)
    unfuse(model)
    assert fused_halves(model) == "no"


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("model_type", APART)
def test_a_packed_row_gives_what_its_sequences_give_alone(model_type: str, checkpointed: bool) -> None:
    fused, _ = make(model_type)
    plain = deepcopy(fused)
    assert fuse(fused)
    assert packing_layout(fused) == "positions"
    for model in (fused, plain):
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
    packed = fused(input_ids=IDS, position_ids=PACKED, use_cache=False).logits
    asked = torch.randn(packed.shape, generator=torch.Generator().manual_seed(5))
    packed.backward(asked)
    for row, ids in enumerate(IDS):
        for places in PACKED[row].eq(0).cumsum(0).unique().tolist():
            own = PACKED[row].eq(0).cumsum(0) == places
            alone = plain(input_ids=ids[own][None], use_cache=False).logits[0]
            torch.testing.assert_close(packed[row, own], alone, rtol=1e-4, atol=1e-4)
            alone.backward(asked[row, own])
    for (name, found), (_, own) in zip(fused.named_parameters(), plain.named_parameters(), strict=True):
        if own.requires_grad:
            assert (found.grad - own.grad).norm() <= 1e-4 * own.grad.norm() + 1e-7, name


@pytest.mark.parametrize("model_type", APART)
def test_convolutions_that_run_their_own_code_keep_sequences_apart(model_type: str) -> None:
    """As under autocast on a base in float32, where no half is fused, though the layout was found without."""
    model, _ = make(model_type)
    assert fuse(model)
    other = IDS.clone()
    other[0, PACKED[0].eq(0).cumsum(0) == 1] += 1
    own = PACKED[0].eq(0).cumsum(0) == 2
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        packed, moved = (model(input_ids=ids, position_ids=PACKED, use_cache=False).logits for ids in (IDS, other))
        alone = model(input_ids=IDS[:1, own], use_cache=False).logits[0]
    assert not torch.equal(packed[0, ~own], moved[0, ~own])
    assert torch.equal(packed[0, own], moved[0, own])
    assert (packed[0, own] - alone).norm() <= 2e-2 * alone.norm()


@pytest.mark.parametrize("model_type", CARRIED_OVER)
def test_packed_rows_are_unpacked_where_a_state_would_carry_over(model_type: str) -> None:
    model, _ = make(model_type)
    assert fuse(model)
    assert packing_layout(model) == "padded"
