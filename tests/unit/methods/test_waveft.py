"""WaveFT against sums of wavelets and PEFT."""

from __future__ import annotations

import pytest
import torch

from methods_in_peft import TARGETS, assert_equals_peft, base, site
from veneer import WaveFTConfig, get_peft_model
from veneer.errors import ConfigError, TargetError
from veneer.records.wavelets import LOW, filters

SETTINGS = {"n_frequency": 11, "scaling": 3.0, "wavelet_family": "db2"}


@pytest.mark.parametrize("name", LOW)
def test_filters_are_orthonormal(name):
    low, high = (torch.tensor(band, dtype=torch.float64) for band in filters(name))
    for shift in range(0, len(low), 2):
        for one, other, expected in ((low, low, not shift), (high, high, not shift), (low, high, 0), (high, low, 0)):
            product = (one[shift:] * other[: len(other) - shift]).sum()
            torch.testing.assert_close(product, torch.tensor(float(expected)).double(), rtol=0, atol=1e-11)


def test_the_update_is_a_sum_of_haar_wavelets():
    config, place = WaveFTConfig(n_frequency=4, scaling=2.0, random_loc_seed=5), site("q_proj", 4, 6)
    values = torch.randn(4, dtype=torch.float64)
    change = config.lower(place, {"waveft_spectrum": values}).changes[0]
    expected = torch.zeros(4, 6, dtype=torch.float64)
    for value, row, column in zip(values, change.rows.tolist(), change.columns.tolist(), strict=True):
        (high_down, y), (high_across, x) = divmod(row, 2), divmod(column, 3)
        down, across = (torch.tensor([1.0, -1.0 if high else 1.0]) for high in (high_down, high_across))
        expected[2 * y : 2 * y + 2, 2 * x : 2 * x + 2] += value * torch.outer(down, across)  # (1 / √2)² · 2
    torch.testing.assert_close(change.dense(), expected)


@pytest.mark.parametrize("fields", [{"wavelet_family": "sym3"}, {"use_idwt": False}], ids=str)
def test_its_products_are_those_of_the_matrix(fields):
    config, place = WaveFTConfig(n_frequency=9, **fields), site("q_proj", 7, 5)
    values = torch.randn(9, dtype=torch.float64)
    change = config.lower(place, {"waveft_spectrum": values}).changes[0]
    x, dy = torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    torch.testing.assert_close(change.matmul(x), x @ change.dense().T)
    torch.testing.assert_close(change.matmul_t(dy), dy @ change.dense())


@pytest.mark.parametrize(
    "fields",
    [
        {"wavelet_family": "coif1", "n_frequency_pattern": {"v_proj": 31}},
        {"use_idwt": False, "proportional_parameters": True, "random_loc_seed": 5},
    ],
    ids=str,
)
def test_it_equals_peft(fields, tmp_path):
    assert_equals_peft(WaveFTConfig, "WaveFTConfig", tmp_path, moved=True, n_frequency=70, scaling=9.0, **fields)


def test_what_it_refuses():
    with pytest.raises(ConfigError, match=r"random_loc_seed=.* must be a seed.*wavelet_family='coif5' must be one of"):
        WaveFTConfig(random_loc_seed=10**21, wavelet_family="coif5")
    with pytest.raises(ConfigError, match=r"n_frequency=0 must be .*n_frequency_pattern\['q_proj'\]=-1 must be"):
        WaveFTConfig(n_frequency=0, n_frequency_pattern={"q_proj": -1})
    with pytest.raises(TargetError, match=r"n_frequency=600 at .*, which has 24 x 24 weights: give at most 576 \(n_f"):
        get_peft_model(base(), WaveFTConfig(n_frequency=600, target_modules=TARGETS))
