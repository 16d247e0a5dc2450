"""BOFT against matrices of permutations, and PEFT."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from peft.tuners.boft.layer import BOFTLayer
from torch import nn

from methods_in_peft import (
    TARGETS,
    assert_convolutions_equal_peft,
    assert_equals_peft,
    assert_training_equals_peft,
    assert_two_act_as_in_peft,
    base,
    every_base,
    site,
)
from veneer import BOFTConfig, get_peft_model
from veneer.errors import ConfigError, TargetError
from veneer.records.linear import fold_linear

SETTINGS = {"boft_block_size": 2}
WITHOUT_GRADIENT = ("boft_R",)  # its skew-symmetric part has no diagonal


@pytest.mark.parametrize(("width", "size", "m"), [(12, 3, 1), (24, 4, 2), (32, 4, 3), (16, 2, 4)])
def test_factors_are_those_of_pefts_matrices(width, size, m):
    """PEFT's own permutations and blocks, whose product only its CUDA code takes for several factors."""
    config, number = BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=m), width // size
    params = {"boft_R": torch.randn(m, number, size, size), "boft_s": torch.randn(7, 1)}
    whole = torch.eye(width)
    for k in range(m):
        order = BOFTLayer.block_butterfly_perm(None, width, int(number / 2**k), int(size / 2), m - 1)
        permutation = BOFTLayer.perm2mat(None, order)
        blocks = torch.block_diag(*BOFTLayer.cayley_batch(None, params["boft_R"][k]))
        whole = permutation @ blocks @ permutation.T @ whole
    w, x = torch.randn(7, width), torch.randn(3, width)
    record = config.lower(site("q_proj", 7, width), params)
    torch.testing.assert_close(record.input.apply(x), x @ whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(record.input.transposed().apply(x), x @ whole.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fold_linear(record, w)[0], params["boft_s"] * w @ whole.T, rtol=1e-4, atol=1e-5)


@every_base
@pytest.mark.parametrize("fields", [{}, {"boft_block_size": 0, "boft_block_num": 2}], ids=str)
def test_it_equals_peft(fields, on, tmp_path):
    assert_equals_peft(BOFTConfig, "BOFTConfig", tmp_path, on, init_weights=False, **fields)


def test_two_adapters_act_as_in_peft(tmp_path):
    assert_two_act_as_in_peft("BOFTConfig", tmp_path, init_weights=False)


def squares():
    torch.manual_seed(3)
    return nn.Sequential(OrderedDict(first=nn.Conv2d(5, 6, 3), second=nn.Conv2d(6, 4, (1, 1), stride=2)))


def test_convolutions_equal_peft(tmp_path):
    assert_convolutions_equal_peft(
        "BOFTConfig", tmp_path, squares, init_weights=False, boft_block_size=0, boft_block_num=3
    )


def test_training_with_dropout_equals_peft(tmp_path):
    fields = {"boft_block_size": 3, "boft_dropout": 0.7}
    assert_training_equals_peft("BOFTConfig", tmp_path, init_weights=False, **fields)


def test_dropout_takes_blocks_of_one_factor():
    config = BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=3, boft_dropout=0.4, init_weights=False)
    for seed in range(4):
        dropped = config.drawn(site("q_proj", 7, 16), torch.Generator().manual_seed(seed))["dropped"]
        assert dropped.sum(dim=1).sort().values.tolist() == [0, 0, 3]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"boft_block_num": 2}, "boft_block_size=4 and boft_block_num=2: one must be 0 and the other at least 1"),
        ({"boft_block_size": 0}, "boft_block_size=0 and boft_block_num=0: one must be 0"),
        ({"boft_n_butterfly_factor": 0}, "boft_n_butterfly_factor=0 must be a whole number of at least 1"),
        ({"boft_dropout": 1.0}, "boft_dropout=1.0 must lie in [0, 1)"),
    ],
)
def test_what_it_refuses(fields, words):
    with pytest.raises(ConfigError) as caught:
        BOFTConfig(**fields)
    assert words in str(caught.value)


def test_blocks_that_do_not_fill_the_inputs_are_refused():
    with pytest.raises(TargetError, match=r"boft_block_size=7 does not divide the 24 inputs of .*a divisor of 24"):
        get_peft_model(base(), BOFTConfig(boft_block_size=7, target_modules=TARGETS))
    with pytest.raises(TargetError, match=r"boft_n_butterfly_factor=2 needs blocks of an even size"):
        get_peft_model(base(), BOFTConfig(boft_block_size=3, boft_n_butterfly_factor=2, target_modules=["q_proj"]))
