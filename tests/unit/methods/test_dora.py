"""DoRA against the paper's equations, with the norm held constant in the gradient (section 4.3)."""

import dataclasses
import math
from collections import OrderedDict

import pytest
import torch
from torch import nn

from veneer import get_peft_model
from veneer.errors import ConfigError
from veneer.methods.lora import LoraConfig
from veneer.quant.dense import DenseWeight
from veneer.records.linear import apply_linear, fold_linear
from veneer.records.sites import LinearSite

OUT, IN, R, ALPHA = 7, 5, 3, 4.0
generator = torch.Generator().manual_seed(23)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


W, C, X, GRAD = normal(OUT, IN), normal(OUT), normal(3, IN), normal(3, OUT)
A, B, M = normal(R, IN), normal(OUT, R), normal(OUT).abs() + 0.5


def site(weight: torch.Tensor = W) -> LinearSite:
    return LinearSite(
        name="q_proj",
        in_features=IN,
        out_features=OUT,
        weight=DenseWeight(weight),
        row_sq=lambda: weight.square().sum(dim=1),
    )


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_weight_and_gradients_are_the_papers(use_rslora):
    config = LoraConfig(r=R, lora_alpha=ALPHA, use_dora=True, use_rslora=use_rslora)
    s = ALPHA / math.sqrt(R) if use_rslora else ALPHA / R
    a, b, m = (p.clone().requires_grad_() for p in (A, B, M))
    record = config.lower(site(), {"lora_A": a, "lora_B": b, "lora_magnitude_vector": m})
    direction = W + s * B @ A
    norm = direction.norm(dim=1, keepdim=True)
    folded, bias = fold_linear(record, W, C)
    close(folded, M[:, None] * direction / norm)
    assert bias is C  # the bias stays outside of the magnitude

    apply_linear(record, X, DenseWeight(W), C).backward(GRAD)
    weight_grad = (M[:, None] / norm) * (GRAD.T @ X)  # of W + s B A, the norm held constant
    close(a.grad, s * B.T @ weight_grad)
    close(b.grad, s * weight_grad @ A.T)
    close(m.grad, (GRAD * (X @ (direction / norm).T)).sum(dim=0))


def test_the_magnitude_starts_as_the_norms_of_the_rows():
    start = LoraConfig(r=R, use_dora=True).init(site(), torch.Generator().manual_seed(3))
    torch.testing.assert_close(start["lora_magnitude_vector"], W.norm(dim=1).float())
    both_random = LoraConfig(r=R, lora_alpha=ALPHA, use_dora=True, init_lora_weights=False)
    start = both_random.init(site(), torch.Generator().manual_seed(3))
    direction = W + ALPHA / R * (start["lora_B"] @ start["lora_A"]).double()
    torch.testing.assert_close(start["lora_magnitude_vector"], direction.norm(dim=1).float())


def test_a_row_of_zeros_stays_zero():
    """Padding rows of a vocabulary are zero: 0 / 0 would make every output NaN."""
    padded = W.clone()
    padded[2] = 0
    config = LoraConfig(r=R, use_dora=True)
    params = config.init(site(padded), torch.Generator().manual_seed(3))
    y = apply_linear(config.lower(site(padded), params), X.float(), DenseWeight(padded.float()))
    assert y.isfinite().all()
    assert not y[:, 2].any()


def test_norms_are_exact_under_autocast():
    """At the start, which an adapter may be given under autocast, and in a record after it."""

    def adapted() -> nn.Module:
        torch.manual_seed(31)
        net = nn.Sequential(OrderedDict(q_proj=nn.Linear(IN, OUT, bias=False)))
        config = LoraConfig(r=R, lora_alpha=ALPHA, use_dora=True, target_modules=["q_proj"], init_lora_weights=False)
        return get_peft_model(net, config).q_proj

    plain = adapted()
    with torch.autocast("cpu", torch.bfloat16):
        layer = adapted()
    start, wanted = (each.adapters["default"]["lora_magnitude_vector"] for each in (layer, plain))
    assert torch.equal(start, wanted)
    with torch.no_grad():
        layer.adapters["default"]["lora_A"] += 0.3
    record = layer.record("default")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.record("default").output_scale, record.output_scale)


def test_without_a_weight_it_says_what_to_do():
    bare = dataclasses.replace(site(), weight=None)
    with pytest.raises(ConfigError, match="DoRA at q_proj needs the frozen weight: load the base model"):
        LoraConfig(use_dora=True).init(bare)
