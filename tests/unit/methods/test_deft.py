"""DEFT against its projector in closed form and PEFT."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from methods_in_peft import assert_equals_peft, every_base, site
from veneer import DeftConfig
from veneer.errors import ConfigError
from veneer.quant.dense import DenseWeight
from veneer.records.linear import fold_linear

SETTINGS = {"alpha": 5.0}
PEFT_ERROR = 1e-5  # it computes in float32


@pytest.mark.parametrize("way", ["relu", "qr"])
def test_a_subspace_is_taken_off_and_another_put_in(way):
    w, p, r = (torch.randn(*size, dtype=torch.float64) for size in ((7, 5), (7, 2), (2, 5)))
    place, config = (
        replace(site("q_proj", 7, 5), weight=DenseWeight(w)),
        DeftConfig(r=2, decomposition_method=way, alpha=3),
    )
    q = p if way == "relu" else torch.linalg.qr(p).Q
    projector = q @ (p.clamp(min=0) if way == "relu" else q).T
    params = {"deft_P": p, "deft_R": r}
    torch.testing.assert_close(fold_linear(config.lower(place, params), w)[0], w - projector @ w + 1.5 * q @ r)
    off = replace(config, para=True).lower(place, {"deft_P": p})
    torch.testing.assert_close(fold_linear(off, w)[0], w - projector @ w)


@every_base
@pytest.mark.parametrize(
    "fields", [{"alpha": 7}, {"decomposition_method": "qr", "init_scale": 3.0}, {"para": True}], ids=str
)
def test_it_equals_peft(fields, on, tmp_path):
    assert_equals_peft(DeftConfig, "DeftConfig", tmp_path, on, moved=True, r=3, init_weights=False, **fields)


def test_what_it_refuses():
    with pytest.raises(ConfigError, match=r"r=0 must be .*alpha=0 must be above 0.*deft_dropout=0.1 drops inputs"):
        DeftConfig(r=0, alpha=0, deft_dropout=0.1)
    with pytest.raises(ConfigError, match="DEFT at q_proj needs the frozen weight"):
        DeftConfig(r=2).lower(site("q_proj", 7, 5), {"deft_P": torch.zeros(7, 2)})
