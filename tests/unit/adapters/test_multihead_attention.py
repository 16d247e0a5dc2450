"""LoRA on `nn.MultiheadAttention`. The oracle is PEFT: what either saves the other loads, with equal outputs."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from veneer import IA3Config, LoraConfig, PeftModel, get_peft_model
from veneer.adapters.combining import combine_folders
from veneer.combine import Combination
from veneer.errors import CompositionError, TargetError
from veneer.model.attach.attach import live_parameters


class Net(nn.Module):
    """Self-attention, then cross-attention, then a head."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.mha = nn.MultiheadAttention(12, 3, bias=bias, batch_first=True)
        self.cross = nn.MultiheadAttention(12, 2, bias=bias, add_bias_kv=bias)
        self.score = nn.Linear(12, 5)
        self.double()
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "bias" in name:
                    parameter.normal_(std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mha(x, x, x, need_weights=False)[0].transpose(0, 1)
        return self.score(self.cross(h.flip(0), h, h)[0].mean(0))


def siglip() -> SiglipVisionModel:
    torch.manual_seed(3)
    config = SiglipVisionConfig(
        hidden_size=24, intermediate_size=29, num_hidden_layers=2, num_attention_heads=3, image_size=14, patch_size=7
    )
    return SiglipVisionModel(config).double().eval()


def config(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": ["mha", "score"], **settings})


X = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "both": {"target_modules": ["mha", "cross"], "rank_pattern": {"cross": 2}, "alpha_pattern": {"mha": 5}},
    "rslora": {"use_rslora": True},
    "head": {"target_modules": ["cross"], "modules_to_save": ["score"]},
    "bias-all": {"bias": "all", "target_modules": ["mha", "cross"]},
    "bias-lora": {"bias": "lora_only"},
    "dropout": {"lora_dropout": 0.5, "target_modules": ["mha"]},
}


def times(key: str) -> int:
    """PEFT adds the update of the output projection twice and takes the gradient of adding it once."""
    return 2 if "base_layer.out_proj.lora" in key else 1


def same_gradients(ours: PeftModel, theirs: Any, x: Tensor) -> None:
    for model in (ours, theirs):
        model.train()
        model(x).square().sum().backward()
    grads = {n: (torch.zeros(()) if p.grad is None else p.grad) for n, p in theirs.named_parameters()}
    expected = peft.get_peft_model_state_dict(theirs, grads)
    live = live_parameters(ours, ours.adapter_state, "default")
    assert live.keys() == expected.keys()
    for key, value in live.items():
        torch.testing.assert_close(value.grad, times(key) * expected[key], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_both_ways(settings: Any, bias: bool, randomize: Any, tmp_path: Path) -> None:
    ours = get_peft_model(Net(bias), config(**settings))
    torch.testing.assert_close(ours(X), Net(bias)(X), rtol=1e-12, atol=1e-12)
    randomize(ours)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(Net(bias), tmp_path / "ours", is_trainable=True)
    assert not torch.allclose(ours(X), Net(bias)(X), atol=1e-3)
    torch.testing.assert_close(ours(X), theirs(X))
    same_gradients(ours, theirs, X)

    theirs.save_pretrained(tmp_path / "theirs")
    back = PeftModel.from_pretrained(Net(bias), tmp_path / "theirs")
    torch.testing.assert_close(back(X), ours.eval()(X), rtol=1e-12, atol=1e-12)  # frozen, it takes torch's fast path
    a, b = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_an_attention_of_transformers_both_ways(randomize: Any, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 14, 14, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    ours = get_peft_model(siglip(), config(target_modules=["head.attention", "q_proj", "fc1"]))
    randomize(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(siglip(), tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(ours(x).pooler_output, theirs(x).pooler_output)
    ours(x).pooler_output.square().sum().backward()
    theirs(x).pooler_output.square().sum().backward()
    grads = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    expected = peft.get_peft_model_state_dict(theirs, grads)
    for key, value in live_parameters(ours, ours.adapter_state, "default").items():
        torch.testing.assert_close(value.grad, times(key) * expected[key])
    with torch.no_grad():  # the fast path of torch
        torch.testing.assert_close(ours(x).pooler_output, theirs(x).pooler_output)


@pytest.mark.parametrize(
    "settings", [{}, {"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}], ids=str
)
def test_merging_equals_the_forward_pass_and_is_undone_exactly(settings: Any, randomize: Any, tmp_path: Path) -> None:
    """DoRA and a bias on B too: PEFT refuses the one and leaves the other without effect."""
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    model = get_peft_model(net, config(**settings))
    torch.testing.assert_close(model(X), Net()(X), rtol=1e-6, atol=1e-6)
    randomize(model)
    wanted = model(X)
    wanted.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    model.merge_adapter()
    torch.testing.assert_close(model(X), wanted)
    model.unmerge_adapter()
    assert torch.equal(model(X), wanted)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(Net(), tmp_path)(X), wanted)
    plain = model.unload()
    assert type(plain.mha) is nn.MultiheadAttention
    assert not any("adapter_state" in vars(m) or "attention" in vars(m) for m in plain.modules())
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())


def test_a_merged_model_is_pefts(randomize: Any, tmp_path: Path) -> None:
    ours = get_peft_model(Net(), config())
    randomize(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(Net(), tmp_path).merge_and_unload().state_dict()
    merged = ours.merge_and_unload().state_dict()
    assert merged.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(merged[name], value)


def test_several_adapters(randomize: Any, tmp_path: Path) -> None:
    model = get_peft_model(Net(), config(target_modules=["mha"]))
    randomize(model)
    model.add_adapter("other", config(r=2, target_modules=["mha", "cross"]))
    model.set_adapter("other")
    randomize(model, seed=9)
    model.set_adapter(["default", "other"])
    together = model(X)
    with model.disable_adapter():
        torch.testing.assert_close(model(X), Net()(X))
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    torch.testing.assert_close(model(X), together)

    model.save_pretrained(tmp_path, selected_adapters=["default", "other"])
    combine_folders([tmp_path, tmp_path / "other"], [1.0, 1.0], Combination(how="cat"), tmp_path / "sum")
    torch.testing.assert_close(PeftModel.from_pretrained(Net(), tmp_path / "sum")(X), together)
    theirs = peft.PeftModel.from_pretrained(Net(), tmp_path / "sum")
    torch.testing.assert_close(theirs(X), together)

    for name in ("default", "other", "sum"):
        model.delete_adapter(name)
    torch.testing.assert_close(model(X), Net()(X))
    assert type(model.mha.out_proj) is type(Net().mha.out_proj)


def test_rows_of_one_batch_cannot_differ(randomize: Any) -> None:
    model = get_peft_model(Net(), config())
    with pytest.raises(CompositionError, match="mha is read as one weight for all rows"):
        model(X, adapter_names=["default", "__base__"])
    layer = nn.TransformerEncoderLayer(12, 3, dim_feedforward=17, batch_first=True, dropout=0.0).double().eval()
    model = get_peft_model(layer, LoraConfig(r=2, target_modules=["self_attn"]))
    with torch.no_grad(), pytest.raises(CompositionError, match="self_attn is read as one weight"):  # its fast path
        model(X, adapter_names=["default", "__base__"])


def test_who_reads_the_weights_past_the_forward_pass_sees_the_adapter(randomize: Any) -> None:
    """The fast path of torch's encoder layer does; PEFT's adapter is without effect there."""
    layer = nn.TransformerEncoderLayer(12, 3, dim_feedforward=17, batch_first=True, dropout=0.0).double().eval()
    base = copy.deepcopy(layer)
    model = get_peft_model(layer, LoraConfig(r=2, target_modules=["self_attn"])).eval()
    randomize(model)
    with torch.no_grad():
        fast = model(X)
    torch.testing.assert_close(fast, model(X).detach())
    assert not torch.allclose(fast, base(X), atol=1e-3)


def test_its_output_projection_alone(randomize: Any, tmp_path: Path) -> None:
    """ "all-linear" names it; in PEFT an adapter there is without effect."""
    model = get_peft_model(Net(), config(target_modules="all-linear"))
    torch.manual_seed(1)
    randomize(model)
    torch.testing.assert_close(model(X), copy.deepcopy(model).merge_and_unload()(X))
    model.save_pretrained(tmp_path)
    assert "base_model.model.mha.out_proj.lora_A.weight" in load_file(tmp_path / "adapter_model.safetensors")
    torch.testing.assert_close(PeftModel.from_pretrained(Net(), tmp_path)(X), model(X))
    theirs = peft.get_peft_model(Net(), peft.LoraConfig(r=3, target_modules="all-linear"))
    theirs.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(PeftModel.from_pretrained(Net(), tmp_path / "theirs")(X), theirs(X))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_are_independent(duplicate: Any, randomize: Any) -> None:
    model = get_peft_model(Net(), config())
    randomize(model)
    before, other = model(X), duplicate(model)
    assert torch.equal(other(X), before)
    randomize(other, seed=5)
    assert torch.equal(model(X), before)
    assert not torch.equal(other(X), before)
    other.save_pretrained  # noqa: B018 - there
    assert other.mha.out_proj.kept.attention is other.mha


def test_what_cannot_be_adapted() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(12, 3, kdim=5)

    with pytest.raises(TargetError, match="'mha' matches only modules that cannot be adapted"):
        get_peft_model(Apart(), config(target_modules=["mha"]))
    with pytest.raises(TargetError, match="'mha' matches only modules that cannot be adapted"):
        get_peft_model(Net(), IA3Config(target_modules=["mha"], feedforward_modules=[]))
