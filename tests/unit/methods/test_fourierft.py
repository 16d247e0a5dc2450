"""FourierFT against the sum of waves and PEFT."""

from __future__ import annotations

import math

import pytest
import torch

from methods_in_peft import TARGETS, assert_equals_peft, base, site
from veneer import FourierFTConfig, get_peft_model
from veneer.errors import ConfigError, TargetError
from veneer.records.linear import fold_linear

SETTINGS = {"n_frequency": 11, "scaling": 3.0}
PEFT_ERROR = 1e-6  # it transforms in float32


def test_the_update_is_a_sum_of_waves():
    config, place = FourierFTConfig(n_frequency=3, scaling=2.0, random_loc_seed=5), site("q_proj", 7, 5)
    values = torch.randn(3, dtype=torch.float64)
    change = config.lower(place, {"fourierft_spectrum": values}).changes[0]
    p, q = (torch.arange(float(n), dtype=torch.float64) for n in (7, 5))
    waves = [
        v * torch.cos(2 * math.pi * (row * p[:, None] / 7 + column * q / 5))
        for v, row, column in zip(values, change.rows, change.columns, strict=True)
    ]
    expected = 2.0 / 35 * sum(waves)
    torch.testing.assert_close(change.dense(), expected)
    w = torch.randn(7, 5, dtype=torch.float64)
    torch.testing.assert_close(
        fold_linear(config.lower(place, {"fourierft_spectrum": values}), w)[0] - w, change.dense()
    )


def test_its_products_are_those_of_the_matrix():
    config, place = FourierFTConfig(n_frequency=9), site("q_proj", 7, 5)
    values = torch.randn(9, dtype=torch.float64)
    change = config.lower(place, {"fourierft_spectrum": values}).changes[0]
    x, dy = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    torch.testing.assert_close(change.matmul(x), x @ change.dense().T)
    torch.testing.assert_close(change.matmul_t(dy), dy @ change.dense())


@pytest.mark.parametrize("fields", [{}, {"random_loc_seed": 5, "n_frequency_pattern": {"v_proj": 31}}], ids=str)
def test_it_equals_peft(fields, tmp_path):
    assert_equals_peft(FourierFTConfig, "FourierFTConfig", tmp_path, n_frequency=70, scaling=9.0, **fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n_frequency": 0}, "n_frequency=0 must be a whole number of at least 1"),
        ({"n_frequency_pattern": {"q_proj": -1}}, "n_frequency_pattern['q_proj']=-1 must be"),
        ({"n_frequency_pattern": {"(": 2}}, "'(' is not a regular expression"),
    ],
)
def test_what_it_refuses(fields, words):
    with pytest.raises(ConfigError) as caught:
        FourierFTConfig(**fields)
    assert words in str(caught.value)


def test_a_spectrum_has_as_many_places_as_the_weight():
    with pytest.raises(TargetError, match=r"n_frequency=1000 at .*, which has 24 x 24 weights: give at most 576"):
        get_peft_model(base(), FourierFTConfig(target_modules=TARGETS))


def test_a_seed_beyond_64_bits_is_refused() -> None:
    with pytest.raises(ConfigError, match="random_loc_seed=1000000000000000000000 must be a seed of torch"):
        FourierFTConfig(random_loc_seed=10**21)
