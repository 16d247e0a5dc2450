"""Adapters on experts and routers in fused halves, beside the model's own code and beside PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
from tests.unit.model.blueprint.families import WIDE
from tests.unit.model.conftest import base
from tests.unit.model.steps import BATCHES, adapted, error, step, stir
from transformers import GptOssConfig, MixtralConfig, OlmoeConfig, PreTrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig

from veneer import BitsAndBytesConfig, LoraConfig, get_peft_model
from veneer.model.adapted.experts import put_in_codes
from veneer.model.attach.attach import live_parameters
from veneer.model.fused.decoder import fused
from veneer.model.quantized.stack import CodedStack
from veneer.quant.stack import StackSpec

PLAIN = {"rope_type": "default", "rope_theta": 1e4}
MIXTURES: dict[str, PreTrainedConfig] = {
    "mixtral": MixtralConfig(num_local_experts=5, num_experts_per_tok=2, **WIDE),
    "qwen2": Qwen2MoeConfig(
        num_experts=7, num_experts_per_tok=3, moe_intermediate_size=28, shared_expert_intermediate_size=20, **WIDE
    ),
    "qwen3": Qwen3MoeConfig(num_experts=6, num_experts_per_tok=4, moe_intermediate_size=26, **WIDE),
    "gpt_oss": GptOssConfig(
        num_local_experts=5,
        num_experts_per_tok=3,
        sliding_window=5,
        initializer_range=0.3,
        rope_parameters=PLAIN,
        **WIDE,
    ),
    "olmoe": OlmoeConfig(num_experts=5, num_experts_per_tok=3, **WIDE),
}
METHODS: dict[str, dict[str, Any]] = {
    "experts alone": {},
    "all and rsLoRA": {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 2},
    "down, and router": {"target_parameters": ["experts.down_proj", "mlp.gate.weight"]},
    "first layers, ranks apart": {"target_parameters": ["gate_up_proj"], "rank_pattern": {r".*\.1\..*": 2}},
}


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 7, "target_parameters": ["all-experts"], **settings})


def eager(family: str) -> Any:
    model = base(MIXTURES[family])
    model.set_experts_implementation("eager")  # grouped products ask for sizes that are multiples of four
    return model


def in_codes(model: Any) -> Any:
    for path, experts in list(model.named_modules()):
        for name in ("gate_up_proj", "down_proj") if path.endswith(".experts") else ():
            weight = getattr(experts, name).detach()
            config: Any = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
            spec = StackSpec(len(weight), (config.spec_of(name, tuple(weight.shape[1:]), weight.dtype),), (name,))
            stack = CodedStack(spec)
            stack.fill(cast(Any, spec), spec.quantize(weight))
            put_in_codes(experts, name, stack)
    return model


def assert_near(model: Any, halves: list[str]) -> None:
    """Both halves of both blocks ran fused, and logits and gradients err at most twice as much as the model's own."""
    batch = BATCHES["padded" if model.config.model_type == "gpt_oss" else "packed"]  # its own masks take no positions
    own = step(model, batch)
    with fused(model) as takes:
        assert takes
        halves.clear()
        found = step(model, batch)
    assert halves.count("attention") == halves.count("mlp") == model.config.num_hidden_layers
    logits, _, exact = step(copy.deepcopy(model).double(), batch)
    assert error(found[2], exact) <= max(2 * error(own[2], exact), 2e-5)
    assert (found[0] - logits).norm() <= max(2 * (own[0] - logits).norm(), 1e-5 * logits.norm())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", MIXTURES)
def test_pairs_are_trained_in_fused_halves(family: str, method: str, halves: list[str]) -> None:
    settings = copy.deepcopy(METHODS[method])
    if family == "gpt_oss" and "router" in method:
        settings["target_parameters"][1] = "mlp.router.weight"
    assert_near(adapted(eager(family), lora(**settings)), halves)


def test_pairs_beside_experts_in_codes(halves: list[str]) -> None:
    assert_near(adapted(in_codes(eager("qwen3")), lora(lora_alpha=2)), halves)


def test_several_adapters_act_together(halves: list[str]) -> None:
    model = adapted(eager("qwen3"), lora())
    model.add_adapter("other", lora(r=2, target_parameters=["experts.down_proj"]))
    stir(model)
    model.set_adapter(["default", "other"])
    assert_near(model, halves)


def test_under_gradient_checkpointing_pairs_have_the_same_gradients(halves: list[str]) -> None:
    model = adapted(eager("mixtral"), lora())
    with fused(model):
        expected = step(model, BATCHES["packed"])
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        halves.clear()
        found = step(model, BATCHES["packed"])
    assert all(torch.equal(found[2][name], expected[2][name]) for name in expected[2])
    assert halves.count("mlp") == 2 * model.config.num_hidden_layers


def test_peft_has_the_same_gradients(tmp_path: Path, halves: list[str]) -> None:
    """PEFT adds B A to copies of the stacks."""
    config = lora(target_modules=["q_proj"], lora_alpha=2, use_rslora=True)
    ours = get_peft_model(eager("qwen3"), config)
    stir(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(eager("qwen3"), tmp_path, is_trainable=True)
    expected = step(theirs, BATCHES["whole"])
    with fused(ours):
        halves.clear()
        found = step(ours, BATCHES["whole"])
    assert halves.count("mlp") == ours.config.num_hidden_layers
    assert (found[0] - expected[0]).norm() <= 1e-5 * expected[0].norm()
    live = live_parameters(ours, ours.adapter_state, "default")
    grads = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    wanted = peft.get_peft_model_state_dict(theirs, grads)
    assert error({k: p.grad.double() for k, p in live.items()}, {k: g.double() for k, g in wanted.items()}) <= 2e-5


def test_experts_with_copies_of_their_own_run_the_models_code(halves: list[str]) -> None:
    model = adapted(eager("mixtral"), LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["experts"]))
    with fused(model):
        halves.clear()
        step(model, BATCHES["packed"])
    assert set(halves) == {"attention"}
