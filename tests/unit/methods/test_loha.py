"""LoHa against its paper's formula and PEFT."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

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
from veneer import LoHaConfig, get_peft_model
from veneer.errors import ConfigError
from veneer.records.linear import fold_linear

SETTINGS = {"r": 3, "alpha": 5.0}


def test_the_update_is_a_product_entry_by_entry():
    config = LoHaConfig(r=2, alpha=3.0, alpha_pattern={"q_proj": 7.0})
    place = site("model.q_proj", 7, 5)
    params = {name: torch.randn(shape, dtype=torch.float64) for name, shape in config.shapes(place).items()}
    w = torch.randn(7, 5, dtype=torch.float64)
    product = (params["hada_w1_a"] @ params["hada_w1_b"]) * (params["hada_w2_a"] @ params["hada_w2_b"])
    torch.testing.assert_close(fold_linear(config.lower(place, params), w)[0], w + 7 / 2 * product)


@pytest.mark.parametrize("fields", [{}, {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"v_proj": 3}}], ids=str)
def test_it_equals_peft(fields, tmp_path):
    assert_equals_peft(LoHaConfig, "LoHaConfig", tmp_path, r=3, alpha=5, init_weights=False, **fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 0}, "r=0 must be a whole number of at least 1"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj']=0 must be"),
        ({"alpha_pattern": {"(": 2.0}}, "'(' is not a regular expression"),
        ({"rank_dropout": 1.0}, "rank_dropout=1.0 must lie in [0, 1)"),
        ({"module_dropout": -0.2}, "module_dropout=-0.2 must lie in [0, 1)"),
    ],
)
def test_what_it_refuses(fields, words):
    with pytest.raises(ConfigError) as caught:
        LoHaConfig(**fields)
    assert words in str(caught.value)


@pytest.mark.parametrize("rates", [(0.5, 0.3), (0.4, 0.0), (0.0, 0.4)], ids=str)
def test_training_with_dropouts_equals_peft(rates, tmp_path):
    rank, module = rates
    assert_training_equals_peft(
        "LoHaConfig", tmp_path, r=3, alpha=5, init_weights=False, rank_dropout=rank, module_dropout=module
    )


def test_an_update_whose_rows_are_all_dropped_is_zero():
    config = LoHaConfig(r=2, rank_dropout=0.999)
    assert not config.drawn(site("q_proj", 3, 5), torch.Generator().manual_seed(3))["rows"].any()


@pytest.mark.parametrize("fields", [{}, {"use_effective_conv2d": True}], ids=str)
@pytest.mark.parametrize("net", [(convolutions, (9, 8)), (lines_in_groups, (11,)), (planes_in_groups, (9, 8))])
def test_convolutions_equal_peft(fields, net, tmp_path):
    wrong = ("w1_a", "w2_a") if fields else ()  # PEFT multiplies by the other product's core
    assert_convolutions_equal_peft(
        "LoHaConfig", tmp_path, *net, wrong=wrong, r=3, alpha=5000, init_weights=False, **fields
    )


def test_gradients_of_a_core_are_those_of_the_formula():
    torch.manual_seed(4)
    config = LoHaConfig(r=3, alpha=5.0, use_effective_conv2d=True, init_weights=False)
    place = replace(site("first", 7, 5 * 6), kind="convolution", window=(3, 2))
    params = {name: value.double().requires_grad_() for name, value in config.init(place).items()}
    products = [
        torch.einsum("ijkl,jr,ip->prkl", *(params[f"hada_{name}"] for name in (f"t{n}", f"w{n}_b", f"w{n}_a")))
        for n in "12"
    ]
    expected = (5 / 3 * products[0] * products[1]).flatten(1)
    found = config.lower(place, params).added()
    torch.testing.assert_close(found, expected)
    dy = torch.randn_like(found)
    pairs = (torch.autograd.grad(y, list(params.values()), dy) for y in (found, expected))
    for own, wanted in zip(*pairs, strict=True):
        torch.testing.assert_close(own, wanted)


@pytest.mark.parametrize("net", [(convolutions, (9, 8)), (lines, (11,))])
def test_the_file_tells_the_layers_of_a_core(net, tmp_path):
    make, _ = net
    config = LoHaConfig(r=3, target_modules=["first", "second"], use_effective_conv2d=True)
    get_peft_model(make(), config).save_pretrained(tmp_path)
    shapes = {key: tuple(x.shape) for key, x in load_file(tmp_path / "adapter_model.safetensors").items()}
    places = config.places_in(shapes, "file")
    assert {path: (p.site.out_features, p.site.in_features) for path, p in places.items()} == {
        path: (len(layer.weight), layer.weight[0].numel()) for path, layer in make().named_children()
    }
    first = make().first
    assert places["first"].site.window == first.kernel_size
