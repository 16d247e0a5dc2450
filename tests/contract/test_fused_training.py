"""Every linear method trains fused, and a bottleneck beside them: no half of any block falls back, and gradients are
the general path's.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PreTrainedConfig

import veneer
from veneer import BottleneckConfig, MontecloraConfig, PeftModel
from veneer.contract import LinearMethod
from veneer.errors import ConfigError
from veneer.model.adapted.routing import BASE, Routing
from veneer.model.fused import block
from veneer.model.fused.decoder import fused

N_LAYERS = 2
LLAMA = LlamaConfig(
    hidden_size=42, intermediate_size=58, num_hidden_layers=N_LAYERS, num_attention_heads=6, num_key_value_heads=2,
    head_dim=14, vocab_size=97, attention_bias=True,
)  # fmt: skip
NEOX = GPTNeoXConfig(
    hidden_size=42, intermediate_size=58, num_hidden_layers=N_LAYERS, num_attention_heads=3, vocab_size=97,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.3},
    use_parallel_residual=True,
)  # fmt: skip
TOKENS = torch.arange(3 * 17).view(3, 17) * 31 % 97


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The halves of blocks that ran fused, in their order."""
    ran: list[str] = []
    run_half = block.run_half

    def spied(fused_block: Any, kind: Any, *args: Any) -> Any:
        ran.append(kind)
        return run_half(fused_block, kind, *args)

    monkeypatch.setattr(block, "run_half", spied)
    return ran


def make_base(config: PreTrainedConfig = LLAMA) -> Any:
    torch.manual_seed(41)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.3 if parameter.ndim == 1 else 0.15) * torch.randn_like(parameter)
    return model


def adapted(model: Any, configs: dict[str, Any]) -> PeftModel:
    """With these adapters, all of them away from their start."""
    for name, config in configs.items():
        model = veneer.get_peft_model(model, config, name)
    model.set_requires_grad(list(configs))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.train()


def everywhere(config: LinearMethod, rate: float) -> LinearMethod:
    """The method on every linear layer, with dropout if it has some that it trains with."""
    config = dataclasses.replace(config, **{"target_modules": "all-linear"})
    for field in dataclasses.fields(config):
        if field.name.endswith("dropout"):
            with contextlib.suppress(ConfigError):
                config = dataclasses.replace(config, **{field.name: rate})
    return config


def step(model: PeftModel, tokens: Tensor = TOKENS) -> dict[str, Tensor]:
    """Loss, logits and gradients of one pass."""
    model.zero_grad()
    torch.manual_seed(5)  # dropout draws the same keys on both paths
    logits = model(input_ids=tokens, use_cache=False).logits
    loss = row_losses(logits, tokens).sum()
    loss.backward()
    return {"loss": loss.detach(), "logits": logits.detach(), **gradients(model)}


def row_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none").mean(1)


def gradients(model: PeftModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_near(found: Tensor, expected: Tensor, name: str, rounded: float = 0.0) -> None:
    """``rounded``: the error of a sum whose terms cancel."""
    assert (found - expected).norm() <= 5e-5 * expected.norm() + rounded, name


def assert_trains_fused(model: PeftModel, halves: list[str]) -> None:
    halves.clear()
    expected = step(model)
    assert not halves
    with fused(model):
        halves.clear()  # of the check that fusing makes
        found = step(model)
    assert halves == ["attention", "mlp"] * N_LAYERS
    assert found.keys() == expected.keys()
    assert any(value.abs().max() > 1e-4 for name, value in found.items() if name not in ("loss", "logits"))
    for name, value in expected.items():
        assert_near(found[name], value, name)


def test_every_method(config: LinearMethod, halves: list[str]) -> None:
    plain, dropped = (everywhere(config, rate) for rate in (0.0, 0.3))
    for each in [plain] if plain == dropped else [plain, dropped]:
        assert_trains_fused(adapted(make_base(), {"default": each}), halves)


def test_a_method_dropped_into_the_folder(toy: Any, halves: list[str]) -> None:
    assert_trains_fused(adapted(make_base(), {"default": toy(strength=3.0)}), halves)


@pytest.mark.parametrize(("base", "dropped"), [(LLAMA, 0), (NEOX, 1)], ids=["serial", "parallel"])
def test_rows_of_every_method_in_one_batch(
    every_config: list[LinearMethod], base: PreTrainedConfig, dropped: int, halves: list[str]
) -> None:
    """Each row's loss and gradients are those of its adapter alone on the general path; one row is the base's.

    Every second adapter has dropout: the others have it in the other base.
    """
    rates = [0.3 * (i % 2 == dropped) for i in range(len(every_config) + 2)]
    configs: dict[str, Any] = {f"row{i}": everywhere(config, rates[i]) for i, config in enumerate(every_config)}
    configs["behind"] = BottleneckConfig.houlsby(reduction_factor=5, dropout=rates[-2])
    configs["beside"] = BottleneckConfig.parallel(reduction_factor=7, after_attention=True, dropout=rates[-1])
    model = adapted(make_base(base), configs)
    tokens = torch.arange((len(configs) + 1) * 17).view(-1, 17) * 31 % 97
    alone = {}
    for row, name in enumerate(configs):
        model.set_adapter(name)
        alone[name] = step(model, tokens[row : row + 1])
    with model.disable_adapter(), torch.no_grad():
        of_base = row_losses(model(tokens[-1:], use_cache=False).logits, tokens[-1:])
    model.set_requires_grad(list(configs))
    model.zero_grad()
    generators = {name: torch.Generator().manual_seed(5) for name in configs}
    with fused(model), model.adapter_state.route(Routing((*configs, BASE), generators)):
        halves.clear()
        losses = row_losses(model(input_ids=tokens, use_cache=False).logits, tokens)
        losses.sum().backward()
    assert halves == ["attention", "mlp"] * N_LAYERS
    found = gradients(model)
    for loss, (name, expected) in zip(losses, alone.items(), strict=False):
        assert_near(loss, expected.pop("loss"), name)
        del expected["logits"]
        largest = max(value.norm().item() for value in expected.values())
        for key, value in expected.items():
            assert_near(found.pop(key), value, key, rounded=1e-7 * largest)
    assert not found
    assert_near(losses[-1:], of_base, "base")


@pytest.mark.parametrize(
    "own",
    [{"velora_config": {"num_groups": 5}}, {"monteclora_config": {"num_samples": 3, "sample_scaler": 0.2}}],
    ids=["velora", "monteclora"],
)
def test_what_lora_does_in_training_alone(
    own: dict[str, Any], halves: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise is drawn by layer, since both paths call the layers in orders of their own."""
    drawn = MontecloraConfig.drawn
    by_layer = lambda self, config, site, _: drawn(self, config, site, torch.Generator().manual_seed(len(site.name)))  # noqa: E731
    monkeypatch.setattr(MontecloraConfig, "drawn", by_layer)
    for rate in (0.0, 0.3):
        config = veneer.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", lora_dropout=rate, **own)
        assert_trains_fused(adapted(make_base(), {"default": config}), halves)
