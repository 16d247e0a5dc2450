"""C3A against circulant blocks and PEFT."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft.tuners.c3a import layer

from methods_in_peft import TARGETS, assert_equals_peft, base, every_base, site
from veneer import C3AConfig, get_peft_model
from veneer.errors import ConfigError, TargetError
from veneer.records.linear import fold_linear

SETTINGS = {"block_size": 2}
PEFT_ERROR = 1e-6  # it transforms in float32


def test_rows_of_a_block_are_shifted():
    kernel = torch.randn(2, 3, 5, dtype=torch.float64)
    record = C3AConfig(block_size=5).lower(site("q_proj", 10, 15), {"c3a_kernel": kernel})
    expected = torch.cat(
        [torch.cat([torch.stack([w.roll(p) for p in range(5)]) for w in row], dim=1) for row in kernel]
    )
    w = torch.randn(10, 15, dtype=torch.float64)
    torch.testing.assert_close(fold_linear(record, w)[0], w + expected / 15)


@pytest.mark.parametrize("b", [4, 5])
def test_its_products_are_those_of_the_matrix(b):
    kernel = torch.randn(2, 3, b, dtype=torch.float64)
    change = C3AConfig(block_size=b).lower(site("q_proj", 2 * b, 3 * b), {"c3a_kernel": kernel}).changes[0]
    x, dy = torch.randn(7, 3 * b, dtype=torch.float64), torch.randn(7, 2 * b, dtype=torch.float64)
    torch.testing.assert_close(change.matmul(x), x @ change.dense().T)
    torch.testing.assert_close(change.matmul_t(dy), dy @ change.dense())


def differentiated(x, kernel, forward=layer.BlockCircularConvolution.forward):
    """PEFT's forward pass under autograd. Its own backward pass has another gradient in the inputs."""
    return forward(SimpleNamespace(save_for_backward=lambda *_: None), x, kernel)


@every_base
def test_it_equals_peft(on, tmp_path, monkeypatch):
    monkeypatch.setattr(layer, "BlockCircularConvolution", SimpleNamespace(apply=differentiated))
    name = {"llama": "v_proj", "neox": "dense_4h_to_h"}[on]
    fields = {"block_size": 4, "block_size_pattern": {name: 2}, "init_weights": "gaussian"}
    assert_equals_peft(C3AConfig, "C3AConfig", tmp_path, on, **fields)


@pytest.mark.parametrize(
    ("start", "deviation"),
    [("xavier_uniform", (2 / 150) ** 0.5), (False, (2 / 150) ** 0.5), ("kaiming_uniform", 375**-0.5), ("gaussian", 1)],
)
def test_starts_have_their_spread(start, deviation):
    config, place = C3AConfig(block_size=5, init_weights=start), site("q_proj", 25, 125)
    drawn = config.init(place, torch.Generator().manual_seed(2))["c3a_kernel"]
    assert float(drawn.std()) == pytest.approx(deviation, rel=0.1)


def test_a_start_may_be_the_base():
    assert C3AConfig(init_weights=True, block_size=5).init(site("q_proj", 5, 5))["c3a_kernel"].count_nonzero() == 0


def test_what_it_refuses():
    with pytest.raises(ConfigError, match="block_size=0 must be a whole number of at least 1"):
        C3AConfig(block_size=0)
    with pytest.raises(TargetError, match=r"block_size=256 at .*v_proj does not divide its 24 inputs and 12 outputs: "):
        get_peft_model(base(), C3AConfig(target_modules=TARGETS))
