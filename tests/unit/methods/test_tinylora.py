"""TinyLoRA against its matrices in closed form and PEFT."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from methods_in_peft import TARGETS, assert_equals_peft, base, site
from veneer import TinyLoraConfig, get_peft_model
from veneer.errors import ConfigError
from veneer.quant.dense import DenseWeight
from veneer.records.linear import fold_linear

SETTINGS = {"u": 211}  # that logits show
PEFT_ERROR = 1e-5  # its A and B are made in float32


def test_a_sum_of_random_matrices_lies_between_the_principal_parts():
    w, v = torch.randn(7, 5), torch.randn(4)
    place, config = replace(site("q_proj", 7, 5), weight=DenseWeight(w)), TinyLoraConfig(r=3, u=4)
    params = config.init(place)
    u, s, right = torch.linalg.svd(w, full_matrices=False)
    torch.testing.assert_close(params["tinylora_B"] @ params["tinylora_A"], u[:, :3] * s[:3] @ right[:3])
    p = torch.normal(0.0, 3**-0.5, (4, 3, 3), generator=torch.Generator().manual_seed(42))
    inner = sum(x * each for x, each in zip(v, p, strict=True))
    expected = w + u[:, :3] * s[:3].sqrt() @ inner @ (s[:3].sqrt()[:, None] * right[:3])
    torch.testing.assert_close(fold_linear(config.lower(place, params | {"tinylora_v": v}), w)[0], expected)


@pytest.mark.parametrize(
    ("on", "fields"),
    [
        ("llama", {}),
        ("table", {"weight_tying": 0.5, "r": 3}),
        ("neox", {"weight_tying": 1.0, "save_projection": False, "projection_seed": 3}),
    ],
    ids=str,
)
def test_it_equals_peft(on, fields, tmp_path):
    fixed = ["tinylora_A", "tinylora_B", "tinylora_P", "base_layer.weight"]
    assert_equals_peft(
        TinyLoraConfig, "TinyLoraConfig", tmp_path, on, fixed, moved=True, u=5, init_weights="uniform", **fields
    )


def test_layers_of_a_group_have_one_vector():
    model = get_peft_model(base(), TinyLoraConfig(u=5, weight_tying=0.5, target_modules=TARGETS))
    held = [m.adapters["default"]["tinylora_v"] for m in model.modules() if hasattr(m, "adapters")]
    assert [id(v) == id(other) for v, other in itertools.pairwise(held)] == [True, False, True, False, True]
    assert model.get_nb_trainable_parameters()[0] == 3 * 5


def test_what_it_refuses():
    with pytest.raises(ConfigError) as caught:
        TinyLoraConfig(r=0, u=0, weight_tying=1.5, projection_seed=10**21, tinylora_dropout=1.0, init_v_bound=-1.0)
    for words in ("r=0 must be", "u=0 must be", "weight_tying=1.5 must lie", "projection_seed=1000000000000000000000",
                  "tinylora_dropout=1.0 must lie", "init_v_bound=-1.0 must be"):  # fmt: skip
        assert words in str(caught.value)
