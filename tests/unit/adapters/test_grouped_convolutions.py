"""LoRA on convolutions whose channels are in groups. The oracle is PEFT, where it computes what the formula says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.adapters.combining import combine_folders
from veneer.combine import Combination
from veneer.errors import CompositionError, TargetError
from veneer.model.attach.attach import live_parameters
from veneer.store.adapter.records import read_records

SIZES = {1: (31,), 2: (13, 11), 3: (7, 5, 6)}
LAYERS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Net(nn.Module):
    """A convolution in three groups, a depthwise one and a plain one, then a head."""

    def __init__(self, n_dims: int, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        conv = LAYERS[n_dims]
        self.grouped = conv(6, 9, 3, groups=3, **settings)
        self.depthwise = conv(9, 9, 2, groups=9, bias=False)
        self.plain = conv(9, 5, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(torch.tanh(self.depthwise(torch.tanh(self.grouped(x))))).flatten(2).mean(-1)


CONFIG = LoraConfig(
    r=9, lora_alpha=7, rank_pattern={"grouped": 6, "plain": 2}, target_modules=["grouped", "depthwise", "plain"]
)
GROUPED = LoraConfig(r=6, lora_alpha=7, target_modules=["grouped"])


def inputs(n_dims: int) -> Tensor:
    return torch.randn(2, 6, *SIZES[n_dims], generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(ours: PeftModel, theirs: nn.Module, x: Tensor) -> None:
    gradients(ours, x)
    expected = peft.get_peft_model_state_dict(theirs, gradients(theirs, x))
    live = live_parameters(ours, ours.adapter_state, "default")
    assert live.keys() == expected.keys()
    for key, value in live.items():
        torch.testing.assert_close(value.grad, expected[key], rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.filterwarnings("ignore:.*lora_bias=True. was passed but the targeted layer:Warning")
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("n_dims", [1, 2, 3])
def test_groups_both_ways(n_dims: int, settings: Any, randomize: Any, tmp_path: Path) -> None:
    x = inputs(n_dims)
    ours = get_peft_model(Net(n_dims), replace(CONFIG, **settings))
    torch.testing.assert_close(ours(x), Net(n_dims)(x), rtol=1e-12, atol=1e-12)
    randomize(ours)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(Net(n_dims), tmp_path / "ours", is_trainable=True)
    assert not torch.allclose(ours(x), Net(n_dims)(x), atol=1e-3)
    torch.testing.assert_close(ours(x), theirs(x))
    same_gradients(ours, theirs, x)
    theirs.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(PeftModel.from_pretrained(Net(n_dims), tmp_path / "theirs")(x), theirs(x))
    a, b = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert a["base_model.model.grouped.lora_B.weight"].shape == (9, 2, *[1] * n_dims)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.parametrize("n_dims", [1, 2, 3])
def test_dora_in_groups_is_pefts(n_dims: int, randomize: Any, tmp_path: Path) -> None:
    x = inputs(n_dims)
    ours = get_peft_model(Net(n_dims), replace(CONFIG, use_dora=True))
    torch.testing.assert_close(ours(x), Net(n_dims)(x), rtol=1e-6, atol=1e-6)
    randomize(ours)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(Net(n_dims), tmp_path / "ours", is_trainable=True)
    assert not torch.allclose(ours(x), Net(n_dims)(x), atol=1e-3)
    torch.testing.assert_close(ours(x), theirs(x))
    same_gradients(ours, theirs, x)
    with pytest.raises(
        CompositionError, match=r"mixes channels of different groups of grouped: .* a convolution in 3 groups"
    ):
        ours.merge_adapter()


@pytest.mark.parametrize(
    "settings",
    [{"dilation": 2, "padding": 2, "stride": 2}, {"padding": 1, "padding_mode": "circular"}],
    ids=["dilation", "circular"],
)
def test_every_setting_of_the_layer_holds_for_a_too(settings: Any, randomize: Any) -> None:
    """PEFT leaves dilation and the mode of padding out of A, so that a dense kernel is the oracle."""
    x, layer = inputs(2), get_peft_model(Net(2, **settings), GROUPED).grouped
    randomize(layer)
    factors = layer.adapters["default"]
    dense = nn.Conv2d(6, 9, 3, **settings).double()
    with torch.no_grad():
        dense.weight.zero_()
        for group in range(3):
            rows, columns = slice(3 * group, 3 * group + 3), slice(2 * group, 2 * group + 2)
            dense.weight[rows, columns] = layer.weight[rows]
            b, a = factors["lora_B"][rows, :, 0, 0], factors["lora_A"][columns]
            dense.weight[rows] += 7 / 6 * torch.einsum("or,richw->oichw", b, a[:, None])[:, 0]
        dense.bias.copy_(layer.bias)
    torch.testing.assert_close(layer(x), dense(x))
    torch.testing.assert_close(layer(x[0]), dense(x)[0])  # without a batch in front


def test_a_rank_that_the_groups_do_not_divide_is_refused_as_in_peft() -> None:
    with pytest.raises(TargetError, match=r"r=5 at grouped, a convolution in 3 groups: a rank that 3 divides"):
        get_peft_model(Net(2), LoraConfig(r=5, target_modules=["grouped"]))
    with pytest.raises(ValueError, match="rank is divisible by groups"):
        peft.get_peft_model(Net(2), peft.LoraConfig(r=5, target_modules=["grouped"]))


def test_what_blocks_cannot_be_is_refused() -> None:
    start = {"init_lora_weights": "pissa"}
    with pytest.raises(TargetError, match=r"init_lora_weights='pissa' does not go with grouped, a convolution in 3 gr"):
        get_peft_model(Net(2), LoraConfig(r=3, target_modules=["grouped", "plain"], **start))
    get_peft_model(Net(2), LoraConfig(r=3, target_modules=["plain"], **start))


def test_merging_is_refused_and_leaves_the_model_as_it_was(randomize: Any) -> None:
    x, model = inputs(2), get_peft_model(Net(2), CONFIG)
    randomize(model)
    before, weights = model(x), {name: p.clone() for name, p in model.named_parameters()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            CompositionError, match=r"mixes channels of different groups of grouped: .* a convolution in 3 groups"
        ):
            merge()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert torch.equal(model(x), before)


def test_two_adapters_act_together_and_have_no_sum(randomize: Any, tmp_path: Path) -> None:
    x, model = inputs(2), get_peft_model(Net(2), GROUPED)
    randomize(model)
    model.add_adapter("other", LoraConfig(r=3, target_modules=["grouped"]))
    model.set_adapter("other")
    randomize(model, seed=9)
    apart = []
    for name in ("default", "other"):
        model.set_adapter(name)
        apart.append(model.grouped(x))
    model.set_adapter(["default", "other"])
    torch.testing.assert_close(model.grouped(x), apart[0] + apart[1] - Net(2).grouped(x))

    with pytest.raises(CompositionError, match="grouped is a convolution in 3 groups of channels: updates"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="cat")
    model.save_pretrained(tmp_path)
    folders = [tmp_path, tmp_path / "other"]
    with pytest.raises(CompositionError, match="grouped is a convolution in 3 groups of channels: updates"):
        combine_folders(folders, [1.0, 1.0], Combination(how="cat"), tmp_path / "sum")
    record = read_records(tmp_path).records["grouped"]
    torch.testing.assert_close(record.low_rank.b, model.grouped.record("default").low_rank.b)


def test_a_row_of_a_mixed_batch_is_the_row_alone(randomize: Any) -> None:
    x, model = inputs(2), get_peft_model(Net(2), CONFIG)
    randomize(model)
    mixed = model(x, adapter_names=["__base__", "default"])
    torch.testing.assert_close(mixed, torch.stack([Net(2)(x)[0], model(x)[1]]))
