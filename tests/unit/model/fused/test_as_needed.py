"""Activations kept or not as memory is: the choice, and that nothing else depends on it."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.unit.model.allocations import allocations_of
from transformers import AutoModelForCausalLM, LlamaConfig

from veneer import IA3Config, LoraConfig, get_peft_model
from veneer.model.fused import activation_memory
from veneer.model.fused.activation_memory import ActivationPlan, checkpoint_as_needed
from veneer.model.fused.decoder import fuse

N_LAYERS, WIDTH, VOCABULARY = 5, 24, 61
IDS = torch.arange(2 * 19).view(2, 19) * 7 % VOCABULARY
PLENTY = 1 << 40


LORA = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)


def make(fused: bool, config: Any = LORA) -> Any:
    torch.manual_seed(3)
    shape = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=N_LAYERS, num_attention_heads=3,
        num_key_value_heads=1, vocab_size=VOCABULARY,
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_config(shape), config).train()
    if fused:
        assert fuse(model)
    return model


def gradients(model: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    loss.backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def loss_of(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS).loss


def plan_of(model: Any) -> ActivationPlan:
    plan: ActivationPlan = model.model.layers[0]._gradient_checkpointing_func.plan
    return plan


def free_for(plan: ActivationPlan, way: str) -> int:
    """Bytes free at which a pass over IDS is to be kept in a way."""
    blocks, logits = IDS.numel() * plan.block_bytes * N_LAYERS, IDS.numel() * VOCABULARY * 8
    return {"kept": PLENTY, "selective": int(2 * (0.6 * blocks + logits)), "recomputed": 0}[way]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The bytes that are free, to be changed."""
    now = {"bytes": PLENTY}
    monkeypatch.setattr(activation_memory, "available_bytes", lambda device: now["bytes"])
    return now


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("way", ["kept", "selective", "recomputed"])
def test_gradients_do_not_depend_on_what_is_kept(free: dict[str, int], fused: bool, way: str) -> None:
    model = make(fused)
    expected = gradients(model, loss_of(model))
    checkpoint_as_needed(model)
    first = gradients(model, loss_of(model))  # measures
    plan = plan_of(model)
    free["bytes"], plan._most_kept = free_for(plan, way), 0
    second = gradients(model, loss_of(model))
    assert plan.way == way
    for found in (first, second):
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("fused", [True, False])
def test_less_memory_keeps_less(free: dict[str, int], fused: bool) -> None:
    model = make(fused)
    checkpoint_as_needed(model)
    gradients(model, loss_of(model))
    plan, held = plan_of(model), {}
    for way in ("kept", "selective", "recomputed"):
        free["bytes"], plan._most_kept = free_for(plan, way), 0
        loss, allocations = allocations_of(lambda: loss_of(model))
        held[way] = sum(allocations)
        gradients(model, loss)
    assert held["recomputed"] < 0.85 * held["selective"] < 0.5 * held["kept"], held
    measured = IDS.numel() * plan.block_bytes * N_LAYERS
    assert measured == pytest.approx(held["kept"], rel=0.15)  # logits and losses are held too


@pytest.mark.parametrize("config", [LORA, IA3Config(), replace(LORA, lora_dropout=0.3)])
def test_what_fused_blocks_keep_is_known_before_they_run(free: dict[str, int], config: Any) -> None:
    model = make(fused=True, config=config)
    model.enable_input_require_grads()
    checkpoint_as_needed(model)
    plan_of(model)._traced = lambda hidden: None
    gradients(model, loss_of(model))
    measured = plan_of(model).block_bytes
    checkpoint_as_needed(model)
    free["bytes"] = 0
    gradients(model, loss_of(model))
    assert plan_of(model).way == "recomputed"  # in the first pass
    assert plan_of(model).block_bytes == pytest.approx(measured, rel=1e-12)


def test_a_pass_is_computed_again_as_it_ran_whatever_was_chosen_since(free: dict[str, int]) -> None:
    model = make(fused=True)
    expected = [g + h for g, h in zip(gradients(model, loss_of(model)), gradients(model, loss_of(model)), strict=True)]
    checkpoint_as_needed(model)
    gradients(model, loss_of(model))
    plan, losses = plan_of(model), []
    for way in ("recomputed", "selective"):
        free["bytes"], plan._most_kept = free_for(plan, way), 0
        losses.append(loss_of(model))
    assert all(map(torch.equal, gradients(model, sum(losses)), expected))


def test_the_choice_follows_the_memory_that_is_free_and_is_logged(
    free: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, activation_memory.__name__)
    plan = ActivationPlan(n_blocks=7, n_logits=11)
    hidden = torch.empty(3, 5, 2)  # 15 tokens
    plan.begin(hidden)
    assert plan.way == "kept"
    assert caplog.text == ""  # nothing is known yet
    plan.block_bytes = 100.0
    needed, logits = 15 * (7 * 100 + 11 * 8), 15 * 11 * 8
    chosen = []
    for n_free in (2 * needed, needed, needed - 1, 2 * needed - 1, 2 * (15 * 350 + logits) - 2, 2 * needed):
        free["bytes"] = n_free
        plan.begin(hidden)
        chosen.append(plan.way)
    # what was kept once may be kept with less free, until it could not be
    assert chosen == ["kept", "kept", "selective", "selective", "recomputed", "kept"]
    assert [record.args[0] for record in caplog.records] == [
        "are kept", "are checkpointed selectively", "are computed again, block by block", "are kept",
    ]  # fmt: skip
    assert "15 tokens would keep about 0.00 GB" in caplog.text


def test_deferred_logits_count_by_their_chunk(free: dict[str, int]) -> None:
    """A head that is frozen makes few rows of logits at a time, in its own dtype; one that trains makes all."""
    rows = 16
    free["bytes"], way = 0, {}
    for deferred in (True, False):
        plan = ActivationPlan(n_blocks=7, n_logits=(32 << 20) // (4 * rows), defers=lambda deferred=deferred: deferred)
        plan.block_bytes = 100.0
        for n_tokens in (rows - 5, 10 * rows):
            logits = min(n_tokens, rows) * plan.n_logits * 4 if deferred else n_tokens * plan.n_logits * 8
            for spare in (0, -2):
                free["bytes"] = 2 * (n_tokens * 7 * 100 + logits) + spare
                plan._most_kept = 0
                plan.begin(torch.empty(n_tokens, 2))
                way[deferred, n_tokens, spare] = plan.way
    assert {spare: {way[key] for key in way if key[2] == spare} for spare in (0, -2)} == {
        0: {"kept"},
        -2: {"selective"},
    }


def test_a_pass_with_a_frozen_head_counts_no_more_than_a_chunk(free: dict[str, int]) -> None:
    for trained in (False, True):
        model = make(fused=True)
        model.get_output_embeddings().weight.requires_grad_(trained)
        checkpoint_as_needed(model)
        plan, asked = plan_of(model), []
        counted = plan._defers
        plan._defers = lambda counted=counted, asked=asked: asked.append(counted()) or asked[-1]
        gradients(model, loss_of(model))
        assert asked == [not trained]


def test_on_a_gpu_there_is_no_way_between(free: dict[str, int]) -> None:
    plan = ActivationPlan(n_blocks=7, n_logits=11)
    plan.block_bytes = 100.0
    free["bytes"] = 15 * (7 * 100 + 2 * 11 * 8)
    ways = []
    for device in ("cpu", "meta"):
        plan.begin(torch.empty(3, 5, 2, device=device))
        ways.append(plan.way)
    assert ways == ["selective", "recomputed"]


def test_transformers_switch_ends_it(free: dict[str, int]) -> None:
    model = make(fused=False)
    checkpoint_as_needed(model)
    assert model.is_gradient_checkpointing
    plan = plan_of(model)
    model.gradient_checkpointing_disable()
    loss_of(model)
    assert plan.block_bytes is None  # nothing was measured
