"""VeLoRA and MonteCLoRA, which are LoRA outside of training, against their formulas and PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import veneer
from methods_in_peft import TARGETS, TOKENS, assert_equals_peft, biased, near, site
from veneer import LoraConfig, MontecloraConfig, PeftModel, VeloraConfig, get_peft_model
from veneer.errors import ConfigError, TargetError
from veneer.methods.variants import monteclora, velora
from veneer.quant.dense import DenseWeight
from veneer.records.linear import apply_linear

FIELDS: dict[str, Any] = {"r": 3, "lora_alpha": 7, "rank_pattern": {"v_proj": 2}, "target_modules": TARGETS}
KEPT = ["velora_embed", "std_prior", "expert_weights_prior", "gaussian_var_prior", "expert_weights"]
N_SAMPLES = 4


def settings(name: str) -> dict[str, Any]:
    noise = {"num_samples": N_SAMPLES, "sample_scaler": 0.3, "buffer_size": 3}
    return {
        "mean": {"velora_config": peft.VeloraConfig(num_groups=5, scale=0.7)},
        "random": {"velora_config": peft.VeloraConfig(num_groups=7, init_type="random")},
        "noise": {"monteclora_config": peft.MontecloraConfig(**noise, kl_loss_weight=0.0)},
        "terms": {"monteclora_config": peft.MontecloraConfig(**noise, kl_loss_weight=0.2, use_entropy=True)},
    }[name]


every_setting = pytest.mark.parametrize("name", ["mean", "random", "noise"])


@every_setting
def test_it_equals_peft(name, tmp_path):
    fields = {key: value for key, value in FIELDS.items() if key != "target_modules"}
    assert_equals_peft(
        LoraConfig, "LoraConfig", tmp_path, "biased", KEPT, init_lora_weights=False, **fields, **settings(name)
    )


def both(name: str, folder: Any) -> tuple[nn.Module, PeftModel]:
    """PEFT's model and ours with one adapter, which train."""
    torch.manual_seed(11)
    start = peft.LoraConfig(**FIELDS, init_lora_weights=False, **settings(name))
    peft.get_peft_model(biased(), start).save_pretrained(folder)
    theirs = peft.PeftModel.from_pretrained(biased(), folder, is_trainable=True)
    return theirs.train(), PeftModel.from_pretrained(biased(), folder, is_trainable=True).train()


def samples(theirs: nn.Module) -> dict[str, Iterator[dict[str, Tensor]]]:
    """The draws that PEFT's layers hold, in their order, by the path of the layer."""
    found = {}
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_monteclora_sampler"):
            buffer = module.lora_monteclora_sampler["default"].sampler.buffer
            found[name.removeprefix("base_model.model.")] = iter([each for _ in range(2) for each in buffer])
            module.lora_monteclora_sampler["default"].sampler.buffer = [each for _ in range(2) for each in buffer]
            module.lora_monteclora_sampler["default"].sampler.buffer_size *= 2
    return found


@every_setting
def test_five_steps_have_pefts_losses(name, tmp_path, monkeypatch):
    theirs, ours = both(name, tmp_path)
    held = samples(theirs)

    def drawn(self: MontecloraConfig, config: Any, place: Any, generator: Any) -> dict[str, Tensor]:
        one = next(held[place.name])
        return {
            "monteclora_z": one["z_mvn"],
            "monteclora_u": one["z_wishart"].diagonal(),
            "monteclora_y": one["z_dirichlet"],
        }

    monkeypatch.setattr(MontecloraConfig, "drawn", drawn)
    losses = []
    for model in (theirs, ours):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        found = []
        for _ in range(5):
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        losses.append(torch.stack(found))
    near(losses[1], losses[0])
    assert (losses[0][1:] - losses[0][:-1]).abs().max() > 1e-3
    written = {name: p.detach() for name, p in theirs.named_parameters() if p.requires_grad}
    kept = [p.detach() for p in ours.parameters() if p.requires_grad]
    assert len(kept) == len(written)
    near(
        torch.stack([p.norm() for p in kept]).sort().values,
        torch.stack([p.norm() for p in written.values()]).sort().values,
    )


def test_the_gradient_of_a_is_that_of_compressed_inputs():
    config = LoraConfig(r=2, lora_alpha=3, velora_config=VeloraConfig(num_groups=3, scale=0.5))
    w, x, a, b = (torch.randn(*size, dtype=torch.float64) for size in ((7, 8), (5, 8), (2, 8), (7, 2)))
    place = replace(site("q_proj", 7, 8), weight=DenseWeight(w))
    leaves = [value.requires_grad_() for value in (x, a, b)]
    params = {"lora_A": a, "lora_B": b, velora.EMBED: torch.zeros(3), **config.drawn(place)}
    record = config.lower(place, params)
    assert record.low_rank is None
    y = apply_linear(record, x, DenseWeight(w))
    torch.testing.assert_close(y, x @ w.T + 1.5 * x @ a.T @ b.T)
    dx, da, db = torch.autograd.grad(y.square().sum(), leaves)
    dy = 2 * y.detach()
    groups = torch.cat([x.detach(), torch.zeros(5, 1)], dim=1).view(5, 3, 3)
    e = groups.mean((0, 1)) / groups.mean((0, 1)).norm()
    again = 0.5 * ((groups @ e)[..., None] * e).view(5, 9)[:, :8]
    close = {"rtol": 1e-5, "atol": 1e-5}  # e is found in float32
    torch.testing.assert_close(da, 1.5 * (dy @ b).T @ again, **close)
    torch.testing.assert_close(dx, dy @ w + 1.5 * dy @ b @ a)
    torch.testing.assert_close(db, 1.5 * dy.T @ (x @ a.T))


def test_noise_is_that_of_the_samples():
    own = MontecloraConfig(num_samples=3, sample_scaler=0.5)
    config = LoraConfig(r=2, lora_alpha=2, monteclora_config=own)
    place = site("q_proj", 7, 5)
    params = {"lora_A": torch.randn(2, 5), "lora_B": torch.randn(7, 2), **own.init(config, place, {}, None)}
    drawn = config.drawn(place, torch.Generator().manual_seed(3))
    again = config.drawn(place, torch.Generator().manual_seed(3))
    assert all(torch.equal(again[key], value) for key, value in drawn.items())
    a = config.lower(place, {**params, **drawn}).low_rank.a
    z, u, y = drawn.values()
    deviation = ((2 * params["monteclora_std"]).exp() * u).clamp_min(1e-3).sqrt()
    alpha = params["monteclora_weights"].exp()
    spread = (1 / alpha / 3 + (1 / alpha).sum() / 9 + 1e-6).sqrt()
    w = (alpha.log() - alpha.log().mean() + spread * y).softmax(0)
    torch.testing.assert_close(a, params["lora_A"] + 0.5 * sum(w[k] * (z[k] * deviation).T for k in range(3)))
    assert torch.equal(config.lower(place, params).low_rank.a, params["lora_A"])


def test_noise_is_on_the_trained_factor_of_a_subtracted_start():
    noisy = MontecloraConfig(num_samples=N_SAMPLES, sample_scaler=0.3)
    config = LoraConfig(r=3, lora_alpha=6, init_lora_weights="olora", monteclora_config=noisy)
    place = replace(site("q_proj", 5, 7), weight=DenseWeight(torch.randn(5, 7)))
    params = config.init(place, torch.Generator().manual_seed(3))
    plain = config.lower(place, params).low_rank
    found = config.lower(place, {**params, **config.drawn(place)}).low_rank
    assert torch.equal(found.b, plain.b)
    assert torch.equal(found.a[3:], plain.a[3:])
    assert not torch.isclose(found.a[:3], plain.a[:3]).any()


def test_a_training_step_adds_pefts_terms_to_the_loss(tmp_path, monkeypatch):
    theirs, ours = both("terms", tmp_path)
    theirs(input_ids=TOKENS)
    config = ours.peft_config["default"]
    modules = [m for m in theirs.modules() if hasattr(m, "lora_monteclora_sampler")]
    draws, layers = [], []
    for module in modules:
        sampler = module.lora_monteclora_sampler["default"]
        one = sampler.sampler.buffer[0]
        draws.append({"monteclora_u": one["z_wishart"].diagonal(), "monteclora_y": one["z_dirichlet"]})
        values = (sampler.std_prior, sampler.expert_weights_prior)
        layers.append(dict(zip((monteclora.STD, monteclora.WEIGHTS), values, strict=True)))
    given = iter(draws)
    monkeypatch.setattr(MontecloraConfig, "_drawn_around", lambda *_: next(given))
    expected = theirs.base_model._get_monteclora_loss()
    found = config.training.penalty(layers)
    near(found.detach(), expected.detach())
    leaves = [value for layer in layers for value in layer.values()]
    wanted = torch.autograd.grad(expected, leaves)
    for one, other in zip(torch.autograd.grad(found, leaves), wanted, strict=True):
        near(one, other)
    assert config.training.penalty([]) is None


def test_a_start_draws_what_peft_draws():
    place = site("q_proj", 7, 8)
    own = VeloraConfig(num_groups=3, init_type="random")
    e = own.init(LoraConfig(velora_config=own), place, {}, torch.Generator().manual_seed(5))[velora.EMBED]
    drawn = torch.randn(3, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(e, drawn / drawn.norm())
    assert torch.equal(velora.unit(torch.zeros(4)), torch.full((4,), 0.5))


def test_what_it_refuses():
    with pytest.raises(ConfigError, match=r"num_groups=0 must be a whole number.*scale=-1.0 must be above 0"):
        VeloraConfig(num_groups=0, scale=-1.0)
    with pytest.raises(ConfigError, match=r"num_samples=0 must be .*dirichlet_prior=0.0 must be above 0"):
        MontecloraConfig(num_samples=0, dirichlet_prior=0.0)
    with pytest.raises(ConfigError, match=r"use_dora=True does not go with velora_config.*monteclora_config=Monte"):
        LoraConfig(velora_config=VeloraConfig(), monteclora_config=MontecloraConfig(), use_dora=True)
    once = {"init_type": "batch_average_once"}
    with pytest.raises(ConfigError, match=r"'batch_average_once' keeps the mean of a first batch, .*: give 'batch_av"):
        LoraConfig(velora_config=once)
    assert LoraConfig(velora_config=once, inference_mode=True).velora_config == VeloraConfig(**once)
    for fields in ({"velora_config": VeloraConfig()}, {"monteclora_config": MontecloraConfig()}):
        with pytest.raises(TargetError, match=rf"{next(iter(fields))} at 0, which is no linear layer"):
            get_peft_model(nn.Sequential(nn.Conv2d(4, 6, 3)), LoraConfig(target_modules=["0"], **fields))


@every_setting
def test_outside_of_training_it_merges_as_lora(name, tmp_path):
    _, ours = both(name, tmp_path)
    with torch.no_grad():
        expected = ours.eval()(TOKENS).logits
        near(ours.merge_and_unload()(TOKENS).logits, expected)
    assert veneer.LoraConfig.from_pretrained(tmp_path).told()
