"""PSOFT against its matrices in closed form and PEFT."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from methods_in_peft import TARGETS, assert_equals_peft, base, site
from veneer import PsoftConfig, get_peft_model
from veneer.errors import ConfigError, TargetError
from veneer.quant.dense import DenseWeight
from veneer.records.linear import fold_linear

SETTINGS = {"psoft_alpha": 3.0, "r": 4}
PEFT_ERROR = 1e-5  # its A and B are in float32


def placed(o: int = 7, i: int = 5):
    return replace(site("q_proj", o, i), weight=DenseWeight(torch.randn(o, i)))


@pytest.mark.parametrize("start", ["psoft_init", "pissa_init"])
def test_the_principal_part_of_the_weight_is_rotated(start):
    config, place = PsoftConfig(r=3, psoft_alpha=2, ab_svd_init=start, psoft_mag_a=False, psoft_mag_b=False), placed()
    w = place.weight.dense()
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    upper = torch.tensor([0.3, -0.2, 0.5])
    skew = torch.tensor([[0, 0.3, -0.2], [-0.3, 0, 0.5], [0.2, -0.5, 0]])
    rotation = torch.linalg.inv(torch.eye(3) - skew)
    rotation = (torch.eye(3) + skew) @ rotation
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(3))
    left = u[:, :3] * (s[:3] if start == "psoft_init" else s[:3].sqrt())
    right = v[:3] if start == "psoft_init" else s[:3].sqrt()[:, None] * v[:3]
    folded, _ = fold_linear(config.lower(place, {"psoft_R": upper}), w)
    torch.testing.assert_close(folded, w + left @ (rotation - torch.eye(3)) @ right)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"ab_svd_init": "pissa_init", "psoft_orth": False},
        {"psoft_svd": "lowrank", "random_seed": 3, "psoft_mag_a": False},
        {"use_cayley_neumann": True, "num_cayley_neumann_terms": 4, "cayley_neumann_eps": 0.2, "psoft_mag_b": False},
    ],
    ids=lambda fields: "-".join(fields) or "plain",
)
def test_it_equals_peft(fields, tmp_path):
    fields = {"r": 5, "psoft_alpha": 3, "init_weights": False, **fields}
    assert_equals_peft(PsoftConfig, "PsoftConfig", tmp_path, **fields)


def test_factors_are_made_once_and_are_in_no_file(tmp_path, monkeypatch):
    model = get_peft_model(base(), PsoftConfig(r=3, target_modules=["q_proj"]))
    held = model.model.layers[0].self_attn.q_proj.adapters["default"]
    assert {name for name, _ in held.named_buffers()} == {"A", "B"}
    assert not any(name.endswith(("default.A", "default.B")) for name in model.state_dict())
    monkeypatch.setattr(torch.linalg, "svd", None)
    model(torch.tensor([[1, 2]]))


def test_what_it_refuses():
    with pytest.raises(TargetError, match=r"r=13 at .*v_proj, a weight of 12 x 24: give at most 12"):
        get_peft_model(base(), PsoftConfig(r=13, target_modules=TARGETS))
    with pytest.raises(ConfigError, match="PSOFT at q_proj needs the frozen weight"):
        PsoftConfig(r=3).derived(site("q_proj", 7, 5), {})
    with pytest.raises(ConfigError) as caught:
        PsoftConfig(r=0, psoft_dropout=1.0, psoft_alpha=0, psoft_svd_lowrank_niter=-1, random_seed=10**21,
                    cayley_neumann_eps=1.0)  # fmt: skip
    for words in ("r=0 must be", "psoft_dropout=1.0 must lie", "psoft_alpha=0 must be above 0", "niter=-1 must be",
                  "random_seed=1000000000000000000000 must be a seed", "cayley_neumann_eps=1.0 must lie"):  # fmt: skip
        assert words in str(caught.value)
