"""LoRA, rsLoRA and the bias on B against their papers' formulas, and what a config refuses."""

import math

import pytest
import torch

from veneer.errors import ConfigError
from veneer.methods.lora import LoraConfig
from veneer.records.linear import fold_linear
from veneer.records.sites import LinearSite

A, B = torch.arange(15.0).reshape(3, 5) / 7, torch.arange(21.0).reshape(7, 3) / 11 - 1
W, C = torch.linspace(-1, 1, 35).reshape(7, 5), torch.linspace(0.5, 2, 7)


def site(name: str = "model.layers.1.self_attn.q_proj", bias: torch.Tensor | None = None) -> LinearSite:
    return LinearSite(name=name, in_features=5, out_features=7, bias=bias)


def test_lora_adds_alpha_over_r_times_b_a():
    record = LoraConfig(r=3, lora_alpha=5).lower(site(), {"lora_A": A, "lora_B": B})
    torch.testing.assert_close(fold_linear(record, W)[0], W + 5 / 3 * B @ A)


def test_rslora_adds_alpha_over_root_r_times_b_a():
    record = LoraConfig(r=3, lora_alpha=5, use_rslora=True).lower(site(), {"lora_A": A, "lora_B": B})
    torch.testing.assert_close(fold_linear(record, W)[0], W + 5 / math.sqrt(3) * B @ A)


@pytest.mark.parametrize("own", [None, C])
def test_the_bias_on_b_is_scaled_and_added(own):
    params = {"lora_A": A, "lora_B": B, "lora_B_bias": torch.full((7,), 0.6)}
    record = LoraConfig(r=3, lora_alpha=5, lora_bias=True).lower(site(bias=own), params)
    expected = torch.full((7,), 0.6 * 5 / 3) + (0 if own is None else own)
    torch.testing.assert_close(fold_linear(record, W, own)[1], expected)


PATTERNS = {
    "rank_pattern": {"q_proj": 2, r".*\.1\.mlp\..*": 4},
    "alpha_pattern": {r"layers\.\d\.self_attn\.q_proj": 9.0, "v_proj": 3.0},
}


@pytest.mark.parametrize(
    ("name", "r", "alpha"),
    [
        ("model.layers.0.self_attn.q_proj", 2, 9.0),
        ("model.layers.0.self_attn.v_proj", 3, 3.0),
        ("model.layers.1.mlp.up_proj", 4, 5.0),
        ("model.layers.0.mlp.xq_proj", 3, 5.0),
    ],
)
def test_patterns_override_rank_and_alpha(name, r, alpha):
    config = LoraConfig(r=3, lora_alpha=5, **PATTERNS)
    assert config.shapes(site(name)) == {"lora_A": (r, 5), "lora_B": (7, r)}
    assert config.scale(site(name)) == alpha / r


def test_an_embedding_starts_with_a_zero_and_has_names_of_its_own():
    place = LinearSite(name="embed_tokens", in_features=5, out_features=7, kind="embedding")
    for start in (True, "gaussian"):
        params = LoraConfig(r=3, init_lora_weights=start).init(place, torch.Generator().manual_seed(1))
        assert not params["lora_A"].any()
        assert params["lora_B"].std() > 0.5
    assert LoraConfig().disk_names(place) == {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}


def test_a_config_keeps_its_own_copy_of_a_pattern():
    pattern = {"q_proj": 2}
    config = LoraConfig(rank_pattern=pattern)
    pattern["q_proj"] = 99
    assert config.rank(site()) == 2


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"r": 0}, "r=0 must be a whole number of at least 1"),
        ({"modules_to_save": "mlp"}, "modules_to_save='mlp' must be a list of strings or None"),
        ({"r": 8.0}, "r=8.0 must be"),
        ({"r": True}, "r=True must be"),
        ({"rank_pattern": {"q": -1}}, "rank_pattern['q']=-1 must be"),
        ({"lora_alpha": 0}, "lora_alpha=0 must be a finite number other than 0"),
        ({"lora_alpha": "16"}, "lora_alpha='16' must be a finite number"),
        ({"alpha_pattern": {"q": math.inf}}, "alpha_pattern['q']=inf must be"),
        ({"rank_pattern": {"q(": 2}}, "the pattern 'q(' is not a regular expression"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0 must lie in [0, 1)"),
        ({"bias": "some"}, "bias='some' must be 'none', 'all' or 'lora_only'"),
        ({"init_lora_weights": "pisa"}, "init_lora_weights='pisa' must be one of"),
        ({"init_lora_weights": 1}, "init_lora_weights=1 must be True, False or a string"),
        ({"use_dora": "yes"}, "use_dora='yes' must be True or False"),
        ({"use_dora": True, "lora_bias": True}, "lora_bias=True does not go with use_dora: leave it out"),
    ],
)
def test_a_config_says_what_is_wrong(values, words):
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**values)
    assert words in str(caught.value)


def test_a_config_says_everything_that_is_wrong_at_once():
    with pytest.raises(ConfigError) as caught:
        LoraConfig(r=0, lora_alpha=0, lora_dropout=2, bias="some", target_modules="q(")
    assert str(caught.value).count(";") == 4
