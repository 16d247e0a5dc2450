"""GraLoRA against blocks of low rank and PEFT."""

from __future__ import annotations

import pytest
import torch

from methods_in_peft import TARGETS, assert_equals_peft, base, every_base, site
from veneer import GraloraConfig, get_peft_model
from veneer.errors import ConfigError, TargetError
from veneer.records.linear import fold_linear

SETTINGS = {"r": 4, "alpha": 6.0, "hybrid_r": 3}


def test_each_block_has_factors_of_its_own():
    a, b = torch.randn(3, 5, 6, dtype=torch.float64), torch.randn(3, 6, 2, dtype=torch.float64)
    config, place = GraloraConfig(r=6, gralora_k=3, alpha=9), site("q_proj", 6, 15)
    w = torch.randn(6, 15, dtype=torch.float64)
    folded, _ = fold_linear(config.lower(place, {"gralora_A": a, "gralora_B": b}), w)
    for m in range(3):
        for n in range(3):
            block = 1.5 * b[m, 2 * n : 2 * n + 2].T @ a[n, :, 2 * m : 2 * m + 2].T
            rows, columns = slice(2 * m, 2 * m + 2), slice(5 * n, 5 * n + 5)
            torch.testing.assert_close(folded[rows, columns], w[rows, columns] + block)


@every_base
@pytest.mark.parametrize("fields", [{"r": 6}, {"r": 8, "gralora_k": 4, "hybrid_r": 3}], ids=str)
def test_it_equals_peft(fields, on, tmp_path):
    assert_equals_peft(GraloraConfig, "GraloraConfig", tmp_path, on, alpha=7, init_weights=False, **fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 0}, "r=0 must be a whole number of at least 1"),
        ({"gralora_k": 0}, "gralora_k=0 must be a whole number of at least 1"),
        ({"hybrid_r": -1}, "hybrid_r=-1 must be at least 0"),
        ({"r": 6, "gralora_k": 4}, "gralora_k=4 does not divide r=6: give a divisor of 6"),
        ({"gralora_dropout": 1.5}, "gralora_dropout=1.5 must lie in [0, 1)"),
    ],
)
def test_what_it_refuses(fields, words):
    with pytest.raises(ConfigError) as caught:
        GraloraConfig(**fields)
    assert words in str(caught.value)


def test_blocks_that_do_not_divide_are_refused():
    with pytest.raises(TargetError, match=r"gralora_k=5 does not divide the 24 inputs and 12 outputs .*divisor of 12"):
        get_peft_model(base(), GraloraConfig(r=5, gralora_k=5, target_modules=TARGETS))
