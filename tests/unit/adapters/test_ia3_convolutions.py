"""IA3 on convolutions, whose channels it scales. The oracle is PEFT, which has it for Conv2d and Conv3d."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from veneer import IA3Config, PeftModel, get_peft_model
from veneer.model.attach.attach import live_parameters

SIZES = {1: (31,), 2: (13, 11), 3: (7, 5, 6)}
LAYERS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONFIG = IA3Config(target_modules=["key", "into", "grouped"], feedforward_modules=["into", "grouped"])


class Net(nn.Module):
    def __init__(self, n_dims: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        conv = LAYERS[n_dims]
        self.key = conv(3, 8, 3, padding=1, padding_mode="reflect")
        self.grouped = conv(8, 6, 2, groups=2)
        self.into = conv(6, 5, 3, stride=2, bias=False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.into(torch.tanh(self.grouped(torch.tanh(self.key(x))))).flatten(2).mean(-1)


def inputs(n_dims: int) -> Tensor:
    return torch.randn(2, 3, *SIZES[n_dims], generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def trained(n_dims: int, randomize: Any) -> PeftModel:
    model = get_peft_model(Net(n_dims), CONFIG)
    torch.testing.assert_close(model(inputs(n_dims)), Net(n_dims)(inputs(n_dims)), rtol=1e-12, atol=1e-12)
    randomize(model)
    return model


@pytest.mark.parametrize("n_dims", [2, 3])
def test_both_ways(n_dims: int, randomize: Any, tmp_path: Path) -> None:
    x, ours = inputs(n_dims), trained(n_dims, randomize)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(Net(n_dims), tmp_path / "ours", is_trainable=True)
    torch.testing.assert_close(ours(x), theirs(x))
    for model in (ours, theirs):
        model(x).square().sum().backward()
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    expected = peft.get_peft_model_state_dict(theirs, grads)
    live = live_parameters(ours, ours.adapter_state, "default")
    assert live.keys() == expected.keys()
    for key, value in live.items():
        torch.testing.assert_close(value.grad, expected[key])

    theirs.save_pretrained(tmp_path / "theirs")
    a, b = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)
    assert torch.equal(PeftModel.from_pretrained(Net(n_dims), tmp_path / "theirs")(x), ours(x))
    merged, reference = ours.merge_and_unload().state_dict(), theirs.merge_and_unload().state_dict()
    for name, value in reference.items():
        torch.testing.assert_close(merged[name], value)


def test_in_closed_form(randomize: Any) -> None:
    """Conv1d, which PEFT's IA3 refuses."""
    x, model = inputs(1), trained(1, randomize)
    scale = {name: getattr(model, name).adapters["default"]["ia3_l"] for name in ("key", "grouped", "into")}
    assert [tuple(s.shape) for s in scale.values()] == [(1, 8, 1), (1, 8, 1), (1, 6, 1)]
    plain = Net(1)
    h = torch.tanh(plain.key(x) * scale["key"])
    h = torch.tanh(plain.grouped(h * scale["grouped"]))
    expected = plain.into(h * scale["into"]).flatten(2).mean(-1)
    torch.testing.assert_close(model(x), expected)
    wanted = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), wanted)
    model.unmerge_adapter()
    assert torch.equal(model(x), wanted)


def test_beside_a_16_bit_kernel(randomize: Any) -> None:
    x = inputs(2)
    model = get_peft_model(Net(2).bfloat16(), CONFIG)
    randomize(model)
    wide = get_peft_model(Net(2).bfloat16().double(), CONFIG)
    for a, b in zip(wide.parameters(), model.parameters(), strict=True):
        a.data.copy_(b.data)
    y = model(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), wide(x.bfloat16().double()), rtol=3e-2, atol=3e-2)


def test_two_adapters_multiply_and_combine(randomize: Any) -> None:
    x, model = inputs(2), trained(2, randomize)
    model.add_adapter("other", CONFIG)
    model.set_adapter("other")
    randomize(model, seed=9)
    one, two = (model.grouped.adapters[name]["ia3_l"] for name in ("default", "other"))
    model.set_adapter(["default", "other"])
    h = inputs(2)[:, :1].expand(-1, 8, -1, -1)
    torch.testing.assert_close(model.grouped(h), Net(2).grouped(h * one * two))
    model.add_weighted_adapter(["default", "other"], [0.75, 0.5], "sum", combination_type="linear")
    expected = 1 + 0.75 * (one - 1) + 0.5 * (two - 1)
    torch.testing.assert_close(model.grouped.adapters["sum"]["ia3_l"], expected)
    mixed = model(x, adapter_names=["other", "__base__"])
    model.set_adapter("other")
    torch.testing.assert_close(mixed, torch.stack([model(x)[0], Net(2)(x)[1]]))
