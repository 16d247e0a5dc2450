"""LoKr against Kronecker's product and PEFT."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from peft.tuners.lokr.layer import factorization

from methods_in_peft import (
    assert_convolutions_equal_peft,
    assert_equals_peft,
    assert_training_equals_peft,
    convolutions,
    lines,
    lines_in_groups,
    planes_in_groups,
    site,
)
from veneer import LoKrConfig
from veneer.errors import ConfigError
from veneer.methods.lokr import Kronecker, factors_of
from veneer.records.linear import fold_linear

SETTINGS = {"r": 2, "alpha": 5.0}


def test_the_update_is_a_kronecker_product():
    config, place = LoKrConfig(r=5, alpha=3.0, decompose_factor=2), site("q_proj", 8, 6)
    params = {"lokr_w1": torch.randn(2, 2), "lokr_w2": torch.randn(4, 3)}
    assert config.shapes(place) == {name: tuple(value.shape) for name, value in params.items()}
    w = torch.randn(8, 6)
    expected = w + 3 / 5 * torch.kron(params["lokr_w1"], params["lokr_w2"])
    torch.testing.assert_close(fold_linear(config.lower(place, params), w)[0], expected)


def test_its_products_are_those_of_the_matrix():
    change = Kronecker(w1=torch.randn(2, 3, dtype=torch.float64), w2=torch.randn(7, 5, dtype=torch.float64))
    x, dy = torch.randn(4, 15, dtype=torch.float64), torch.randn(4, 14, dtype=torch.float64)
    torch.testing.assert_close(change.matmul(x), x @ change.dense().T)
    torch.testing.assert_close(change.matmul_t(dy), dy @ change.dense())
    turned = change.transposed()
    assert turned.shape == (15, 14)
    torch.testing.assert_close(turned.matmul(dy), dy @ change.dense())
    torch.testing.assert_close(turned.weighed(0.3).dense(), 0.3 * change.dense().T)


@pytest.mark.parametrize("factor", [-1, 1, 2, 4, 7, 16, 100])
def test_widths_are_divided_as_in_peft(factor):
    for n in (1, 7, 12, 16, 18, 28, 96, 97, 576, 1536):
        assert factors_of(n, factor) == factorization(n, factor), n


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 2, "alpha": 5},
        {"r": 30, "alpha": 7},
        {"r": 1, "alpha": 3, "decompose_both": True, "decompose_factor": 4},
        {"r": 3, "alpha": 2, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"down_proj": 5}},
    ],
    ids=str,
)
def test_it_equals_peft(fields, tmp_path):
    assert_equals_peft(LoKrConfig, "LoKrConfig", tmp_path, init_weights=False, **fields)


@pytest.mark.parametrize(
    "fields", [{"r": 1}, {"r": 1, "decompose_both": True, "decompose_factor": 5}, {"r": 9}], ids=str
)
def test_convolutions_equal_peft(fields, tmp_path):
    assert_convolutions_equal_peft("LoKrConfig", tmp_path, alpha=5, init_weights=False, **fields)


@pytest.mark.parametrize("r", [1, 9])
def test_convolutions_of_one_dimension_equal_peft(r, tmp_path):
    assert_convolutions_equal_peft("LoKrConfig", tmp_path, lines, (11,), r=r, alpha=5, init_weights=False)


def test_the_file_tells_a_convolution_where_it_holds_its_window():
    def told(config, window):
        place = replace(site("first", 8, 6 * math.prod(window)), kind="convolution", window=window)
        return config.site_of(site("first", 1, 1), config.shapes(place)), place

    whole, place = told(LoKrConfig(r=9), (3, 2))
    assert whole == place
    assert told(LoKrConfig(r=1), (3, 2))[0] is None
    assert told(LoKrConfig(r=1), ())[0] is not None


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 1},
        {"r": 9},
        {"r": 1, "use_effective_conv2d": True},
        {"r": 1, "use_effective_conv2d": True, "decompose_both": True, "decompose_factor": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "net", [(convolutions, (9, 8)), (lines, (11,)), (lines_in_groups, (11,)), (planes_in_groups, (9, 8))]
)
def test_groups_and_cores_equal_peft(fields, net, tmp_path):
    assert_convolutions_equal_peft("LoKrConfig", tmp_path, *net, alpha=5, init_weights=False, **fields)


@pytest.mark.parametrize("window", [(3,), (3, 2), (2, 3, 2)])
@pytest.mark.parametrize("fields", [{}, {"decompose_both": True, "decompose_factor": 5}], ids=str)
def test_the_file_tells_a_convolution_with_a_core(fields, window):
    config = LoKrConfig(r=1, use_effective_conv2d=True, **fields)
    place = replace(site("first", 30, 35 * math.prod(window)), kind="convolution", window=window)
    sample = replace(site("first", 1, 1), kind="convolution")
    shapes = config.shapes(place)
    assert "lokr_t2" in shapes
    assert config.site_of(sample, shapes) == place


@pytest.mark.parametrize("scaled", [False, True])
def test_training_with_dropouts_equals_peft(scaled, tmp_path):
    fields = {"rank_dropout": 0.5, "module_dropout": 0.3, "rank_dropout_scale": scaled}
    assert_training_equals_peft("LoKrConfig", tmp_path, r=1, alpha=5, init_weights=False, **fields)


def test_where_it_starts():
    place = site("q_proj", 24, 36)
    for init, zero in ((True, "lokr_w1"), ("lycoris", "lokr_w2_b"), (False, None)):
        start = LoKrConfig(r=1, init_weights=init).init(place)
        assert [name for name, value in start.items() if not value.any()] == ([] if zero is None else [zero])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 0}, "r=0 must be a whole number of at least 1"),
        ({"decompose_factor": 0}, "decompose_factor=0 must be at least 1, or -1"),
        ({"rank_pattern": {"(": 2}}, "'(' is not a regular expression"),
        ({"rank_dropout": 1.0}, "rank_dropout=1.0 must lie in [0, 1)"),
        ({"module_dropout": -0.2}, "module_dropout=-0.2 must lie in [0, 1)"),
        ({"init_weights": "other"}, "init_weights"),
    ],
)
def test_what_it_refuses(fields, words):
    with pytest.raises(ConfigError) as caught:
        LoKrConfig(**fields)
    assert words in str(caught.value)
