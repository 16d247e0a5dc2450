"""LoRA on convolutions. The oracle is PEFT: what either saves the other loads, with equal outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForVideoClassification,
    ConvNextConfig,
    PreTrainedModel,
    ResNetConfig,
    VideoMAEConfig,
    ViTConfig,
    Wav2Vec2Config,
)

from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.adapters.combining import combine_folders
from veneer.combine import Combination
from veneer.errors import CompositionError, TargetError
from veneer.model.adapted.convolution import AdaptedConvolution
from veneer.model.attach.attach import live_parameters

TIGHT = {"rtol": 2e-5, "atol": 2e-6}
_WIDTHS = {"hidden_size": 24, "intermediate_size": 29, "num_hidden_layers": 2, "num_attention_heads": 3}


def _vit() -> PreTrainedModel:
    return AutoModelForImageClassification.from_config(ViTConfig(**_WIDTHS, image_size=14, patch_size=7, num_labels=5))


def _resnet() -> PreTrainedModel:
    config = ResNetConfig(
        embedding_size=11, hidden_sizes=[13, 17], depths=[1, 2], layer_type="basic", hidden_act="tanh", num_labels=5
    )
    return AutoModelForImageClassification.from_config(config)


def _convnext() -> PreTrainedModel:
    config = ConvNextConfig(hidden_sizes=[11, 13], depths=[1, 2], num_stages=2, patch_size=3, num_labels=5)
    return AutoModelForImageClassification.from_config(config)


def _wav2vec2() -> PreTrainedModel:
    config = Wav2Vec2Config(
        **_WIDTHS, conv_dim=(11, 13), conv_stride=(3, 2), conv_kernel=(5, 3), num_feat_extract_layers=2,
        conv_bias=True, num_conv_pos_embeddings=5, num_conv_pos_embedding_groups=3, classifier_proj_size=7,
        num_labels=5, apply_spec_augment=False,
    )  # fmt: skip
    return AutoModelForAudioClassification.from_config(config)


def _videomae() -> PreTrainedModel:
    config = VideoMAEConfig(**_WIDTHS, image_size=14, patch_size=7, num_frames=4, tubelet_size=2, num_labels=5)
    return AutoModelForVideoClassification.from_config(config)


class Case:
    """A model, the name of what it takes with a shape, and the modules to adapt: convolutions and a few others."""

    def __init__(self, make: Callable[[], PreTrainedModel], shape: tuple[int, ...], targets: Any) -> None:
        self._make, self._shape, self.targets = make, shape, targets

    def model(self) -> PreTrainedModel:
        torch.manual_seed(3)
        model = self._make().eval()
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model

    def inputs(self) -> Tensor:
        return torch.randn(*self._shape, generator=torch.Generator().manual_seed(7))


CASES = {
    "vit": Case(_vit, (3, 3, 14, 14), ["projection"]),
    "resnet": Case(_resnet, (3, 3, 29, 31), ["convolution"]),
    "convnext": Case(_convnext, (3, 3, 18, 18), r".*(patch_embeddings|downsampling_layer\.1|pwconv2)"),
    "wav2vec2": Case(_wav2vec2, (3, 101), ["conv_layers.0.conv", "conv_layers.1.conv", "q_proj"]),
    "videomae": Case(_videomae, (3, 4, 3, 14, 14), ["projection"]),
}


def lora(case: Case, **settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": case.targets, **settings})


def outputs(model: Any, inputs: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(inputs, **kwargs).logits


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, **TIGHT)


def convolutions(model: nn.Module) -> dict[str, AdaptedConvolution]:
    return {path: m for path, m in model.named_modules() if isinstance(m, AdaptedConvolution)}


def same_gradients(ours: PeftModel, theirs: Any, inputs: Tensor) -> None:
    """In evaluation mode, so that batch norms stay as they are and no dropout is drawn."""
    labels = torch.tensor([1, 4, 0])
    for model in (ours, theirs):
        model.zero_grad()
        model(inputs, labels=labels).loss.backward()
    live = {key: t.grad for key, t in live_parameters(ours, ours.adapter_state, "default").items()}
    grads = {n: (torch.zeros(()) if p.grad is None else p.grad) for n, p in theirs.named_parameters()}
    names = peft.get_peft_model_state_dict(theirs, grads)
    assert set(live) == set(names)
    for key, grad in live.items():
        close(grad, names[key])


def assert_same_tensors(back: PeftModel, ours: PeftModel) -> None:
    a, b = (live_parameters(model, model.adapter_state, "default") for model in (back, ours))
    assert set(a) == set(b)
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "rank_pattern": {".*conv.*|.*projection.*|.*sampling.*": 2}},
    "dora": {"use_dora": True},
    "bias-lora": {"bias": "lora_only"},
    "lora-bias": {"lora_bias": True},
}


@pytest.mark.filterwarnings("ignore:.*lora_bias=True. was passed but the targeted layer:Warning")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_convolutions_both_ways(case: Case, settings: Any, randomize: Any, tmp_path: Path) -> None:
    inputs = case.inputs()
    ours = get_peft_model(case.model(), lora(case, **settings)).eval()
    torch.testing.assert_close(outputs(ours, inputs), outputs(case.model(), inputs), rtol=1e-5, atol=1e-6)
    assert convolutions(ours)
    randomize(ours)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(case.model(), tmp_path / "ours", is_trainable=True).eval()
    assert not torch.allclose(outputs(ours, inputs), outputs(case.model(), inputs), atol=1e-4)
    close(outputs(ours, inputs), outputs(theirs, inputs))
    same_gradients(ours, theirs, inputs)

    theirs.save_pretrained(tmp_path / "theirs")
    back = PeftModel.from_pretrained(case.model(), tmp_path / "theirs").eval()
    assert_same_tensors(back, ours)
    close(outputs(back, inputs), outputs(ours, inputs))
    a, b = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert set(a) == set(b)
    assert all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_merging_equals_the_forward_pass_and_is_undone_exactly(case: Case, settings: Any, randomize: Any) -> None:
    inputs, base = case.inputs(), case.model()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = get_peft_model(base, lora(case, r=2, **settings)).eval()
    randomize(model)
    wanted = outputs(model, inputs)
    model.merge_adapter()
    close(outputs(model, inputs), wanted)
    model.unmerge_adapter()
    assert torch.equal(outputs(model, inputs), wanted)
    plain = model.unload()
    assert not convolutions(plain)
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_a_merged_model_is_pefts(case: Case, use_dora: bool, randomize: Any, tmp_path: Path) -> None:
    ours = get_peft_model(case.model(), lora(case, use_dora=use_dora))
    randomize(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(case.model(), tmp_path).merge_and_unload()
    merged, expected = ours.merge_and_unload().state_dict(), theirs.state_dict()
    assert set(merged) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, rtol=2e-5, atol=2e-6, msg=name)


def test_a_row_of_a_mixed_batch_is_the_row_alone(case: Case, randomize: Any) -> None:
    inputs = case.inputs()
    model = get_peft_model(case.model(), lora(case))
    model.add_adapter("other", lora(case, r=2, use_dora=True))
    model.set_adapter(["default"])
    randomize(model)
    model.set_adapter(["other"])
    randomize(model, seed=9)
    model.eval()
    mixed = outputs(model, inputs, adapter_names=["other", "__base__", "default"])
    for row, name in enumerate(["other", None, "default"]):
        if name is None:
            with model.disable_adapter():
                alone = outputs(model, inputs)[row]
        else:
            model.set_adapter(name)
            alone = outputs(model, inputs)[row]
        close(mixed[row], alone)


def test_two_adapters_together_and_their_sum(case: Case, randomize: Any, tmp_path: Path) -> None:
    inputs = case.inputs()
    model = get_peft_model(case.model(), lora(case))
    randomize(model)
    model.add_adapter("other", lora(case, r=2))
    model.set_adapter("other")
    randomize(model, seed=9)
    model.eval().set_adapter(["default", "other"])
    together = outputs(model, inputs)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    close(outputs(model, inputs), together)

    model.save_pretrained(tmp_path, selected_adapters=["default", "other"])
    folders = [tmp_path, tmp_path / "other"]
    combine_folders(folders, [1.0, 1.0], Combination(how="cat"), tmp_path / "sum")
    close(outputs(PeftModel.from_pretrained(case.model(), tmp_path / "sum").eval(), inputs), together)


class Layers(nn.Module):
    """A few convolutions as they come, and none that a transformers config would make."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, (3, 2), **settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def adapted_layer(dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[AdaptedConvolution, Tensor]:
    """A convolution in float64 with LoRA, and the kernel that closed form says it has."""
    from veneer.model.adapted.state import AdapterState
    from veneer.model.attach.attach import attach

    torch.manual_seed(3)
    model = Layers(**settings).to(dtype)
    state = AdapterState()
    attach(model, LoraConfig(r=2, lora_alpha=7, target_modules=["conv"], init_lora_weights=False), "default", state)
    state.active = ("default",)
    conv = model.conv
    assert isinstance(conv, AdaptedConvolution)
    factors = conv.adapters["default"]
    update = 3.5 * torch.einsum("or,richw->oichw", factors.lora_B[:, :, 0, 0], factors.lora_A[:, None])[:, 0]
    return conv, (conv.weight + update).detach()


@pytest.mark.parametrize(
    "settings",
    [
        {"stride": (2, 1), "padding": (1, 2)},
        {"dilation": 2, "padding": "same"},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": (2, 1), "padding_mode": "circular", "bias": False},
    ],
    ids=str,
)
def test_every_setting_of_the_layer_holds_for_a_too(settings: Any) -> None:
    """PEFT leaves dilation and the mode of padding out of A, so that the closed form is the oracle."""
    conv, kernel = adapted_layer(**settings)
    x = torch.randn(2, 3, 11, 13, dtype=torch.float64)
    plain = Layers(**settings).double()
    plain.conv.weight.data = kernel
    if conv.bias is not None:
        plain.conv.bias.data = conv.bias.data
    torch.testing.assert_close(conv(x), plain(x))
    torch.testing.assert_close(conv(x[0]), plain(x)[0])  # without a batch in front


def test_dropout_touches_only_what_feeds_a() -> None:
    conv, _ = adapted_layer()
    vars(conv.adapter_state.configs["default"])["lora_dropout"] = 0.5
    x = torch.randn(2, 3, 11, 13, dtype=torch.float64)
    conv.train()
    torch.manual_seed(5)
    y = conv(x)
    torch.manual_seed(5)
    dropped = conv.dropped(x, "default")
    kept = dropped != 0
    assert 0.4 < kept.double().mean() < 0.6
    torch.testing.assert_close(dropped[kept], 2 * x[kept])
    factors = conv.adapters["default"]
    inner = nn.functional.conv2d(dropped, factors.lora_A)
    expected = nn.functional.conv2d(x, conv.weight, conv.bias) + 3.5 * nn.functional.conv2d(inner, factors.lora_B)
    torch.testing.assert_close(y, expected)


def test_beside_a_16_bit_kernel_the_update_is_rounded_once() -> None:
    conv, kernel = adapted_layer(torch.bfloat16, bias=False)
    x = torch.randn(2, 3, 11, 13).bfloat16()
    y = conv(x)
    assert conv.adapters["default"].lora_A.dtype == torch.float32
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), nn.functional.conv2d(x.double(), kernel.double()), rtol=2e-2, atol=2e-2)


def test_all_linear_leaves_convolutions_out_as_peft_does() -> None:
    for name in ("vit", "wav2vec2"):
        case = CASES[name]
        ours = get_peft_model(case.model(), LoraConfig(target_modules="all-linear"))
        theirs = peft.get_peft_model(case.model(), peft.LoraConfig(target_modules="all-linear"))
        assert not convolutions(ours)
        chosen = theirs.peft_config["default"].target_modules
        assert not any(isinstance(m, nn.Conv1d | nn.Conv2d) and p in chosen for p, m in case.model().named_modules())


def test_a_kernel_that_is_computed_cannot_be_adapted() -> None:
    with pytest.raises(TargetError, match="cannot be adapted"):  # its weight is normalized in every forward pass
        get_peft_model(CASES["wav2vec2"].model(), LoraConfig(target_modules=["pos_conv_embed.conv"]))


def test_adapters_with_kernels_of_other_shapes_are_not_summed(tmp_path: Path) -> None:
    for name, patch in (("a", 7), ("b", 14)):
        config = ViTConfig(**_WIDTHS, image_size=14, patch_size=patch, num_channels=4 if patch == 7 else 1)
        model = AutoModelForImageClassification.from_config(config)
        get_peft_model(model, LoraConfig(r=2, target_modules=["projection"])).save_pretrained(tmp_path / name)
    with pytest.raises(
        CompositionError, match=r"shape \(24, 196, 7, 7\), another adapter as one of \(24, 196, 14, 14\)"
    ):
        combine_folders([tmp_path / "a", tmp_path / "b"], [1.0, 1.0], Combination(how="cat"), tmp_path / "sum")
