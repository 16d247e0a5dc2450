"""Starts of low-rank factors: their statistics, the decompositions they come from, and plain LoRA out of them."""

import dataclasses
import math

import pytest
import torch

from veneer.errors import ConfigError
from veneer.methods.lora import LoraConfig
from veneer.quant.dense import DenseWeight
from veneer.records.linear import apply_linear, fold_linear
from veneer.records.sites import LinearSite

OUT, IN, R = 13, 11, 3
W = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(29), dtype=torch.float64)
SITE = LinearSite(name="q_proj", in_features=IN, out_features=OUT, weight=DenseWeight(W))


def start_of(name: bool | str, **values: float) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    config = LoraConfig(r=R, lora_alpha=5, init_lora_weights=name, **values)
    return config, config.init(SITE, torch.Generator().manual_seed(31))


def test_kaiming_fills_its_bounds():
    wide = LinearSite(name="q_proj", in_features=1009, out_features=OUT)
    a = LoraConfig(r=R).init(wide, torch.Generator().manual_seed(1))["lora_A"]
    assert a.abs().max() <= 1 / math.sqrt(1009)
    assert a.std().item() == pytest.approx(1 / math.sqrt(3 * 1009), rel=0.05)


def test_gaussian_has_the_deviation_of_peft():
    wide = LinearSite(name="q_proj", in_features=1009, out_features=OUT)
    config = LoraConfig(r=R, init_lora_weights="gaussian")
    assert config.init(wide, torch.Generator().manual_seed(1))["lora_A"].std().item() == pytest.approx(1 / R, rel=0.05)


def test_both_random_is_not_the_base():
    config, params = start_of(False)
    assert params["lora_B"].abs().max() <= 1 / math.sqrt(R)
    assert (fold_linear(config.lower(SITE, params), W)[0] - W).abs().max() > 0.01


@pytest.mark.parametrize("alpha", [5.0, -2.0])
def test_pissa_starts_from_the_best_approximation(alpha):
    config, params = start_of("pissa")
    config = dataclasses.replace(config, lora_alpha=alpha)
    params = config.init(SITE)
    u, s, vt = torch.linalg.svd(W)
    expected = (u[:, :R] * s[:R]) @ vt[:R]
    product = alpha / R * params["lora_B"] @ params["lora_A"]
    torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-5)
    # both factors carry the root of the singular values
    torch.testing.assert_close(params["lora_A"].norm(dim=1), params["lora_B"].norm(dim=0))


def test_randomized_pissa_comes_near_the_exact_one():
    (_, exact), (_, near) = start_of("pissa"), start_of("pissa_niter_16")
    torch.testing.assert_close(near["lora_B"] @ near["lora_A"], exact["lora_B"] @ exact["lora_A"], rtol=1e-3, atol=1e-3)


def test_olora_starts_from_qr():
    _, params = start_of("olora")
    q, r = torch.linalg.qr(W.float())
    torch.testing.assert_close(params["lora_B"], q[:, :R])
    torch.testing.assert_close(params["lora_A"], r[:R])


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_trained_from_a_weight_it_is_plain_lora_on_the_plain_base(start, use_rslora):
    """The trained A and B beside the rest of the weight, as in the papers, equal what is written for others."""
    config, params = start_of(start, use_rslora=use_rslora, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 7.0})
    params = {name: value.double() for name, value in params.items()}
    scale = config.scale(SITE)
    rest = W - scale * params["lora_B_start"] @ params["lora_A_start"]
    params["lora_A"] += 0.3
    params["lora_B"] -= 0.2
    written = config.packed()
    assert (written.init_lora_weights, written.r, written.rank(SITE)) == (True, 2 * R, 4)
    x = torch.ones(2, IN, dtype=torch.float64)
    expected = x @ (rest + scale * params["lora_B"] @ params["lora_A"]).T
    got = apply_linear(written.lower(SITE, config.packing.pack(params)), x, DenseWeight(W))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_a_start_from_the_weight_needs_one_that_is_large_enough(start):
    config = LoraConfig(r=12, init_lora_weights=start)
    with pytest.raises(ConfigError, match=r"q_proj: r=12 must be at most 11, the smaller side of the weight"):
        config.init(SITE)
    with pytest.raises(ConfigError, match="at q_proj needs the frozen weight: load the base model"):
        config.init(dataclasses.replace(SITE, weight=None))
