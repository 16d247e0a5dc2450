"""Folders in other libraries' formats: loaded, trained on, merged, planned and described as their dense twins are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantized_folders import FORMATS, SELDOM, change, make_folder
from trained_folder import close, trained
from veneer import LLM, SamplingParams
from veneer.adapters.auto import AutoPeftModelForCausalLM
from veneer.errors import ConfigError, FormatError
from veneer.export.merged import merge_checkpoint
from veneer.model.attach.attach import adapted_layers
from veneer.model.quantized.packed_linear import PackedQuantLinear, unpack
from veneer.model.quantized.quant_linear import QuantLinear
from veneer.plan.architecture import config_of
from veneer.plan.model import meta_base
from veneer.recipe.parts import ModelPart
from veneer.store.facts import model_facts
from veneer.store.source import load_model
from veneer.store.stored_quantization import quantization_in
from veneer.train.base_model import load_base

IDS = torch.arange(22).view(2, 11) * 3
formats = pytest.mark.parametrize("name", FORMATS)
Made = dict[str, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folders = {name: tmp_path_factory.mktemp("stored") for name in FORMATS}
    for name, folder in folders.items():
        make_folder(FORMATS[name], folder)
    return folders


def quantized(model: Any) -> dict[str, QuantLinear]:
    return {path: m for path, m in model.named_modules() if isinstance(m, QuantLinear)}


@formats
def test_weights_are_what_the_codes_stand_for(made: Made, name: str) -> None:
    layers = quantized(load_model(made[name] / "coded"))
    dense = load_file(made[name] / "dense" / "model.safetensors")
    wanted = [key.removesuffix(".weight") for key in dense if key.endswith("_proj.weight")]
    assert set(layers) == {path for path in wanted if not path.endswith(FORMATS[name].left_out)}
    for path, layer in layers.items():
        assert torch.equal(layer.frozen_format().dense(torch.float32), dense[f"{path}.weight"])


@pytest.mark.product
@formats
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_logits_and_gradients_are_those_of_the_dense_twin(made: Made, name: str, fields: dict[str, Any]) -> None:
    _, logits, gradients = trained(made[name] / "coded", IDS, target_modules="all-linear", **fields)
    _, expected, wanted = trained(made[name] / "dense", IDS, target_modules="all-linear", **fields)
    close(logits, expected)
    assert gradients.keys() == wanted.keys()
    for key, gradient in wanted.items():
        close(gradients[key], gradient)


@formats
def test_merged_in_memory_and_on_disk(made: Made, name: str, tmp_path: Path) -> None:
    """Both are dense and in 16 bits; on disk no tensor of the codes is left."""
    model, logits, _ = trained(made[name] / "coded", IDS, target_modules="all-linear")
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(made[name] / "coded", tmp_path / "adapter", tmp_path / "merged", None)
    merged = load_model(tmp_path / "merged", dtype="float32")
    assert not quantized(merged)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    held = load_file(tmp_path / "merged" / "model.safetensors")
    assert held.keys() == load_file(made[name] / "dense" / "model.safetensors").keys()
    assert (merged(IDS).logits - logits).norm() <= 1e-2 * logits.norm()
    close(model.merge_and_unload()(IDS).logits, logits)


@formats
def test_a_saved_model_is_the_same_checkpoint(made: Made, name: str, tmp_path: Path) -> None:
    model = load_model(made[name] / "coded")
    model.save_pretrained(tmp_path)
    before, after = (load_file(each / "model.safetensors") for each in (made[name] / "coded", tmp_path))
    assert after.keys() == before.keys()
    for key, tensor in after.items():
        assert tensor.dtype == before[key].dtype
        held, own = (each.reshape(-1).view(torch.uint8) for each in (before[key], tensor))
        assert torch.equal(own, held), key
    again = load_model(tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    beside = {f"model.layers.1.mlp.down_proj.{each}": torch.tensor([7.0]) for each in FORMATS[name].beside}
    again.load_state_dict(after | beside)
    assert {key: again.state_dict()[key] for key in beside} == beside


@pytest.mark.parametrize("name", SELDOM)
def test_variants_of_formats(name: str, tmp_path: Path) -> None:
    """Values, the number of parameters, and the same tensors again when the model is saved."""
    make_folder(SELDOM[name], tmp_path)
    model = load_model(tmp_path / "coded")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    layers = quantized(model)
    assert len(layers) >= 12
    for path, layer in layers.items():
        assert torch.equal(layer.frozen_format().dense(torch.float32), dense[f"{path}.weight"])
    assert model_facts(tmp_path / "coded").parameters == model_facts(tmp_path / "dense").parameters
    model.save_pretrained(tmp_path / "saved")
    before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("coded", "saved"))
    assert after.keys() == before.keys()
    assert all(torch.equal(*(each[key].view(-1).view(torch.uint8) for each in (before, after))) for key in before)


@formats
def test_planned_and_described(made: Made, name: str) -> None:
    """The plan's codes are the model's, byte for byte; parameters count as values."""
    folder = made[name] / "coded"
    planned = meta_base(config_of(str(folder)), ModelPart(source=str(folder)))
    real = load_model(folder)
    assert quantized(planned).keys() == quantized(real).keys()
    for path, layer in quantized(real).items():
        parts = quantized(planned)[path].parts()
        assert {key: (t.dtype, t.shape) for key, t in parts.items()} == {
            key: (t.dtype, t.shape) for key, t in layer.parts().items()
        }
    facts, twin = model_facts(folder), model_facts(made[name] / "dense")
    assert facts.parameters == twin.parameters
    assert facts.quantization
    assert facts.nbytes_4bit is None


def test_an_adapter_finds_its_quantized_base(made: Made, tmp_path: Path) -> None:
    folder = made["fp8 blocks"] / "coded"
    model, logits, _ = trained(folder, IDS, target_modules="all-linear")
    model.save_pretrained(tmp_path)
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert quantized(again)
    close(again(IDS).logits, logits)


@pytest.mark.parametrize("name", ["fp8 blocks", "float-quantized", "mxfp4", "nvfp4"])
def test_merged_into_the_format(made: Made, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The weights are those of quantizing the exact sum afresh, and the report tells what is left of the update."""
    model, _, _ = trained(made[name] / "coded", IDS, target_modules="all-linear")
    wanted = {}
    for path, layer in adapted_layers(model).items():
        if isinstance(layer, QuantLinear):
            exact, _ = layer.folded_weight(("default",), torch.float32)
            wanted[path] = layer.spec.bind(layer.spec.quantize(exact)).dense(torch.float32)
    merged = model.merge_and_unload(requantize=True)
    assert merged.state_dict().keys() == load_file(made[name] / "coded" / "model.safetensors").keys()
    found = quantized(merged)
    assert f"re-quantized {len(wanted)} layers" in capsys.readouterr().out
    for path, weight in wanted.items():
        assert torch.equal(found[path].frozen_format().dense(torch.float32), weight)


def test_gptq_is_not_quantized_again(made: Made) -> None:
    model, logits, _ = trained(made["gptq 4"] / "coded", IDS, target_modules="all-linear")
    with pytest.raises(ConfigError, match="merge into 16 bits"):
        model.merge_and_unload(requantize=True)
    assert torch.equal(model(IDS).logits, logits)


def test_a_base_of_a_recipe_is_frozen_and_planned_as_it_is_stored(made: Made) -> None:
    folder = str(made["awq"] / "coded")
    part = ModelPart(source=folder, dtype="float16")
    model = load_base(part)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}  # the range of float16 is small
    asked = ModelPart(source=folder, quantization="nf4")
    for run in (lambda: load_base(asked), lambda: meta_base(config_of(folder), asked)):
        with pytest.raises(ConfigError, match=r"quantized with 'awq'.*read as it is"):
            run()


STAY = ("fp8 blocks", "gptq 4", "pack-quantized")  # groups of 36 inputs, or of inputs that are not neighbours


@formats
def test_served_by_a_program(made: Made, name: str) -> None:
    """Same tokens as of the dense twin, by weights that stay in codes, packed or as they are stored."""
    prompt, greedy = [list(b"the cat sat")], SamplingParams(temperature=0, max_tokens=7)
    coded, dense = (LLM(made[name] / each) for each in ("coded", "dense"))
    answers = [llm.generate(prompt, greedy, use_tqdm=False)[0].outputs[0].token_ids for llm in (coded, dense)]
    assert answers[0] == answers[1]
    assert not coded.engine.settings.why_general
    model = coded.engine.runner.model
    kind = QuantLinear if name in STAY else PackedQuantLinear
    assert len([m for m in model.modules() if isinstance(m, kind)]) == len(quantized(load_model(made[name] / "coded")))
    unpack(model)
    own = load_model(made[name] / "coded").state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(-1).view(torch.uint8), own[key].view(-1).view(torch.uint8)), key


@pytest.fixture
def broken(made: Made, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    shutil.copytree(made[request.param] / "coded", tmp_path / "model")
    return tmp_path / "model"


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("broken", ["fp8 blocks"], indirect=True)
@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        ({f"{UP}.weight_scale_inv": torch.full((8, 3), float("nan"))}, {}, r"up_proj.*holds NaN"),
        ({f"{UP}.weight_scale_inv": torch.zeros(8, 3)}, {}, r"up_proj.*24 scales that are zero or negative"),
        ({f"{UP}.weight_scale_inv": -torch.ones(8, 3)}, {}, r"zero or negative"),
        ({f"{UP}.weight_scale_inv": torch.ones(8, 4)}, {}, r"shape \(8, 4\), allowed: \(8, 3\)"),
        ({f"{UP}.weight_scale_inv": torch.ones(8, 3, dtype=torch.int32)}, {}, r"torch.int32, allowed"),
        ({f"{UP}.weight": torch.full((160, 96), float("nan")).to(torch.float8_e4m3fn)}, {}, "weight holds NaN"),
        ({f"{UP}.weight": torch.ones(160, 95).to(torch.float8_e4m3fn)}, {}, r"\(160, 95\)"),
        ({f"{UP}.weight_scale_inv": None}, {}, "no quantized tensors.*weight_scale or weight_scale_inv"),
        ({}, {"weight_block_size": [32, 32]}, r"correct weight_block_size"),
        ({}, {"modules_to_not_convert": ["lm_head", "gate_proj", "up_proj"]}, "leaves it dense"),
    ],
)
def test_damaged_fp8(broken: Path, tensors: dict[str, Tensor | None], settings: dict[str, Any], message: str) -> None:
    """One error names the file, the tensor and the remedy."""
    change(broken, tensors, **settings)
    with pytest.raises(FormatError, match=message) as caught:
        load_model(broken)
    assert "proj" in str(caught.value)


@pytest.mark.parametrize("broken", ["fp8 blocks"], indirect=True)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_block_size": [128]}, "two whole numbers"),
        ({"weight_block_size": [128, 0]}, "two whole numbers"),
        ({"scale_fmt": "float4"}, "scale_fmt='float4' must be one of"),
        ({"modules_to_not_convert": "lm_head"}, "list of module names"),
        ({"modules_to_convert": ["embed_tokens"]}, "only linear layers"),
        ({"rotation": "hadamard"}, "rotation='hadamard' is unknown"),
    ],
)
def test_settings_that_cannot_be_honoured(broken: Path, settings: dict[str, Any], message: str) -> None:
    change(broken, **settings)
    with pytest.raises(ConfigError, match=message):
        load_model(broken)


@pytest.mark.parametrize("broken", ["gptq 4"], indirect=True)
@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        ({f"{UP}.g_idx": torch.arange(96, dtype=torch.int32) // 16}, {}, r"up_proj.*groups 0 to 5, allowed: 0 to 2"),
        ({f"{UP}.g_idx": torch.arange(96, dtype=torch.int32) // 32 - 1}, {}, "groups -1 to 1"),
        ({f"{UP}.g_idx": torch.zeros(96, dtype=torch.int32)}, {}, "puts 96 inputs into group 0, and a group has 32"),
        ({f"{UP}.qzeros": torch.full((3, 20), -1, dtype=torch.int32)}, {}, "480 zeros above the largest.*gptq_v2"),
        ({f"{UP}.qzeros": torch.full((3, 20), -0x77777778, dtype=torch.int32)}, {"sym": True}, "may be gptq_v2"),
        (
            {f"{UP}.qzeros": torch.full((3, 20), 0x77777777, dtype=torch.int32)},
            {"sym": True, "checkpoint_format": "gptq_v2"},
            "it may be gptq",
        ),
        ({f"{UP}.qzeros": None}, {}, "qzeros is missing"),
        ({f"{UP}.scales": torch.zeros(3, 160, dtype=torch.float16)}, {}, "zero or negative"),
        ({f"{UP}.scales": torch.ones(2, 160, dtype=torch.float16)}, {}, r"scales is \(2, 160\)"),
        ({f"{UP}.qweight": torch.zeros(12, 161, dtype=torch.int32)}, {}, r"qweight is .*\(12, 161\)"),
        ({}, {"group_size": 64}, "96 inputs are not a multiple of group_size 64"),
        ({}, {"bits": 8}, r"qweight is .*should be torch.int32 \(24, "),
        ({}, {"dynamic": {}}, r"1\.self_attn\.k_proj.*no quantized tensors"),
    ],
)
def test_damaged_gptq(broken: Path, tensors: dict[str, Tensor | None], settings: dict[str, Any], message: str) -> None:
    change(broken, tensors, **settings)
    with pytest.raises(FormatError, match=message) as caught:
        load_model(broken)
    assert "model.safetensors" in str(caught.value) or "no quantized" in message


@pytest.mark.parametrize("broken", ["awq"], indirect=True)
@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        ({f"{UP}.scales": -torch.ones(6, 160, dtype=torch.float16)}, {}, "zero or negative"),
        ({f"{UP}.qweight": torch.zeros(96, 19, dtype=torch.int32)}, {}, r"\(96, 19\)"),
        ({}, {"group_size": 40}, "96 inputs are not a multiple of group_size 40"),
    ],
)
def test_damaged_awq(broken: Path, tensors: dict[str, Tensor | None], settings: dict[str, Any], message: str) -> None:
    change(broken, tensors, **settings)
    with pytest.raises(FormatError, match=message):
        load_model(broken)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "gptq", "bits": 5}, "bits=5 must be one of"),
        ({"quant_method": "gptq"}, "bits is missing"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size=0"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": ["x"]}, "must map patterns"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:(": {}}}, r"'\(' must be a regular expression"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"x": {"bits": 1}}}, "bits=1"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"x": {"rank": 1}}}, "rank is unknown"),
        ({"quant_method": "gptq", "bits": 4, "lm_head": True}, "lm_head=True"),
        ({"quant_method": "awq", "bits": 3}, "bits=3"),
        ({"quant_method": "awq", "version": "gemv_fast"}, "version='gemv_fast'"),
        ({"quant_method": "awq", "zero_point": False}, "zero_point=False"),
    ],
)
def test_settings_of_other_formats(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quantization_in({"quantization_config": settings})


WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def compressed(weights: dict[str, Any], layout: str = "pack-quantized", **settings: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": WEIGHTS | weights}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups} | settings


def compressed_to(target: str) -> dict[str, Any]:
    return compressed({}, config_groups={"group_0": {"targets": [target], "weights": WEIGHTS}})


def hqq(**weights: Any) -> dict[str, Any]:
    params = {"weight_quant_params": {"nbits": 4, "group_size": 64, "axis": 1} | weights}
    return {"quant_method": "hqq", "quant_config": params}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (compressed({"num_bits": 3}), "num_bits=3 must be one of"),
        (compressed({"type": "float"}), "type='float' must be one of"),
        (compressed({"group_size": 0}), "group_size=0"),
        (compressed({"rounding": "floor"}), "weights.rounding is unknown"),
        (compressed({}, "marlin-24"), "format='marlin-24' must be one of"),
        (compressed({"type": "float", "num_bits": 8}, "float-quantized"), "tensor, channel or block for FP8"),
        (compressed({"type": "float", "num_bits": 8, "strategy": "block"}, "float-quantized"), "block_structure=None"),
        (compressed({"type": "float", "group_size": 32}, "nvfp4-pack-quantized"), "group_size=32 must be 16"),
        (compressed({}, config_groups={}), "at least one group"),
        (compressed({}, config_groups={"a": {"targets": ["Linear"]}}), "no settings for weights"),
        (compressed({}, sparsity_config={"format": "sparse-24"}), "only dense weights"),
        (compressed({}, ignore="lm_head"), "list of module names"),
        (compressed({}, ignore=["re:*proj"]), r"ignore: '\*proj' must be a regular expression"),
        (compressed_to("re:("), r"group_0: targets: '\(' must be a regular expression"),
        (hqq(axis=0), "along the inputs"),
        (hqq(nbits=7), "nbits=7"),
        (hqq(group_size=-3), "group_size=-3"),
        (hqq() | {"quant_config": {}}, "quant_config is missing"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo='W4A8_AWQ'"),
    ],
)
def test_settings_of_compressed_tensors_and_hqq(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quantization_in({"quantization_config": settings})


@pytest.mark.parametrize(
    ("broken", "tensors", "settings", "message"),
    [
        ("pack-quantized", {f"{UP}.weight_shape": torch.tensor([160, 95])}, {}, r"weight_shape says \(160, 95\)"),
        ("pack-quantized", {f"{UP}.weight_g_idx": torch.full((96,), 9, dtype=torch.int32)}, {}, "groups 9 to 9"),
        ("pack-quantized", {f"{UP}.weight_scale": torch.zeros(160, 6)}, {}, "zero or negative"),
        ("pack-quantized", {f"{UP}.weight_zero_point": None}, {}, "weight_zero_point is missing"),
        ("pack-quantized", {}, {"ignore": ["lm_head"]}, "no quantized tensors"),
        ("mxfp4", {f"{UP}.weight_scale": torch.full((160, 3), 255, dtype=torch.uint8)}, {}, "holds NaN"),
        ("hqq 3", {f"{UP}.W_q": torch.zeros(7, 16, dtype=torch.int32)}, {}, r"W_q is torch.int32 \(7, 16\)"),
        ("hqq 3", {f"{UP}.zero": torch.full((960, 1), float("nan"))}, {}, "not finite"),
        ("hqq 3", {f"{UP}.nbits": torch.tensor(4, dtype=torch.int32)}, {}, "nbits is 4, it should be 3"),
    ],
    indirect=["broken"],
)
def test_damaged_compressed_tensors_and_hqq(
    broken: Path, tensors: dict[str, Tensor | None], settings: dict[str, Any], message: str
) -> None:
    change(broken, tensors, **settings)
    with pytest.raises(FormatError, match=message):
        load_model(broken)


def test_groups_of_settings() -> None:
    """A pattern is more than the class of all layers, and ``ignore`` more than both."""
    fp8 = {"targets": ["re:.*down_proj"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
    groups = {"all": {"targets": ["Linear"], "weights": WEIGHTS}, "one": fp8 | {"format": "float-quantized"}}
    settings = compressed({}, config_groups=groups, ignore=["re:.*q_proj"])
    config = quantization_in({"quantization_config": settings})
    kinds = {
        name: type(config.spec_of(f"model.layers.0.mlp.{name}", (64, 64), torch.bfloat16)).__name__
        for name in ("down_proj", "up_proj", "q_proj")
    }
    assert kinds == {"down_proj": "Fp8Spec", "up_proj": "PackQuantizedSpec", "q_proj": "NoneType"}


def test_settings_for_single_layers() -> None:
    """``dynamic`` changes bits and groups of the modules that match."""
    dynamic = {"+:.*up_proj": {"bits": 8, "group_size": -1}}
    config = quantization_in({"quantization_config": {"quant_method": "gptq", "bits": 4, "dynamic": dynamic}})
    up, down = (
        config.spec_of(f"model.layers.3.mlp.{name}", (64, 256), torch.float16) for name in ("up_proj", "down_proj")
    )
    assert (up.bits, up.group, down.bits, down.group) == (8, None, 4, 128)
    assert config.spec_of("lm_head", (64, 256), torch.float16) is None


def test_the_shape_of_a_layer_is_told_by_its_own_settings() -> None:
    """A layer of other settings than the first ones, or all, has its own codes a word: 8 bits here, not 4."""
    folders = {"gptq 4": {"qweight": (24, 64)}, "pack-quantized": {"weight_packed": (64, 24)}}
    eight = {"targets": ["re:.*up_proj"], "weights": WEIGHTS | {"num_bits": 8}}
    groups = {"all": {"targets": ["Linear"], "weights": WEIGHTS}, "one": eight}
    settings = {
        "gptq 4": {"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*up_proj": {"bits": 8}}},
        "pack-quantized": compressed({}, config_groups=groups),
    }
    for name, parts in folders.items():
        layers = quantization_in({"quantization_config": settings[name]}).layers
        stored = {part: SimpleNamespace(shape=shape) for part, shape in parts.items()}
        assert layers.shape(UP, stored) == (64, 96)
        assert layers.shape("model.layers.1.mlp.down_proj", stored) == (64, 192)


def test_names_within_a_block_are_whole() -> None:
    settings = {"quant_method": "gptq", "bits": 4, "modules_in_block_to_quantize": [["attn.q_proj"]]}
    layers = quantization_in({"quantization_config": settings}).layers
    found = [layers.spec(f"model.layers.1.{name}.q_proj", (64, 96), torch.float16) for name in ("attn", "cross_attn")]
    assert [spec is None for spec in found] == [False, True]


def test_a_group_of_hqq_that_is_a_row() -> None:
    layers = quantization_in({"quantization_config": hqq(group_size=-1)}).layers
    assert layers.spec("model.layers.0.mlp.up_proj", (64, 96), torch.float32).n_groups == 1
