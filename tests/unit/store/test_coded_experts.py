"""Mixtures whose experts stay in codes: stacked in the files (gpt-oss), or listed there and stacked by the model."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from quantized_folders import (
    FORMATS,
    Stored,
    change,
    deepseek_config,
    deepseek_fp8,
    make_folder,
    make_gpt_oss,
    qwen3_moe_config,
)
from trained_folder import close, trained
from veneer import LLM, SamplingParams
from veneer.adapters.peft_model import get_peft_model
from veneer.errors import CompositionError, ConfigError, FormatError, TargetError
from veneer.export.merged import merge_checkpoint
from veneer.methods.lora import LoraConfig
from veneer.model.quantized.packed_stack import PackedCodedStack
from veneer.model.quantized.stack import CodedStack
from veneer.ops.four_bit import FourBitLayout
from veneer.plan.architecture import config_of
from veneer.plan.model import meta_base
from veneer.quant.four_bit import FourBitSpec
from veneer.recipe.parts import ModelPart
from veneer.store.facts import model_facts
from veneer.store.quantization import BitsAndBytesConfig
from veneer.store.source import load_model
from veneer.train.base_model import load_base

IDS = torch.arange(22).view(2, 11) * 3
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
LORA = {"target_modules": ["o_proj"], "target_parameters": BOTH}  # on attention and experts


def whole(stored: Stored) -> Stored:
    """The same format, in every layer but the head and one of attention."""
    left_out = {
        key: ["lm_head"] for key in ("modules_to_not_convert", "ignore", "skip_modules") if key in stored.config
    }
    return replace(stored, config=stored.config | left_out, left_out=("lm_head", ".1.self_attn.k_proj"))


MADE: dict[str, Callable[[Path], None]] = {
    "gpt-oss": make_gpt_oss,
    "deepseek fp8": lambda folder: make_folder(deepseek_fp8(), folder, config=deepseek_config()),
    **{
        name: lambda folder, stored=stored: make_folder(whole(stored), folder, config=qwen3_moe_config())
        for name, stored in FORMATS.items()
        if name not in ("fp8 blocks", "fp8 e5m2", "hqq 3")
    },
}
mixtures = pytest.mark.parametrize("name", MADE)
Made = dict[str, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folders = {name: tmp_path_factory.mktemp("mixture") for name in MADE}
    for name, folder in folders.items():
        MADE[name](folder)
    return folders


def stacks(model: Any) -> dict[str, CodedStack]:
    return {path: m for path, m in model.named_modules() if isinstance(m, CodedStack)}


def as_maps(model: Any, path: str, value: Tensor) -> Tensor:
    return value.mT if model.get_submodule(path.rpartition(".")[0]).is_transposed else value


@mixtures
def test_experts_stay_in_codes_and_are_what_those_stand_for(made: Made, name: str) -> None:
    coded, dense = (load_model(made[name] / each) for each in ("coded", "dense"))
    found, parameters = stacks(coded), dict(dense.named_parameters())
    layers = {path.partition(".experts")[0] for path in parameters if ".experts" in path}
    assert set(found) == {f"{layer}.experts.{kind}" for layer in layers for kind in ("gate_up_proj", "down_proj")}
    for path, stack in found.items():
        wanted = as_maps(coded, path, parameters[path])
        assert stack.stack().shape == wanted.shape
        assert torch.equal(stack.stack().dense(torch.float32), wanted)
        assert torch.equal(stack.stack().expert(2).dense(torch.float32), wanted[2])
        assert stack.stack().nbytes == sum(part.nbytes for part in stack.parts().values())
    close(coded(IDS).logits, dense(IDS).logits)
    assert not any(p.requires_grad for path, p in coded.named_parameters() if ".experts." in path)


@mixtures
def test_logits_and_gradients_are_those_of_the_dense_twin(made: Made, name: str) -> None:
    _, logits, gradients = trained(made[name] / "coded", IDS, **LORA)
    _, expected, wanted = trained(made[name] / "dense", IDS, **LORA)
    close(logits, expected)
    assert gradients.keys() == wanted.keys()
    assert any("experts" in key for key in wanted)
    for key, gradient in wanted.items():
        close(gradients[key], gradient)


@mixtures
def test_merged_in_memory_and_on_disk(made: Made, name: str, tmp_path: Path) -> None:
    model, logits, _ = trained(made[name] / "coded", IDS, **LORA)
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(made[name] / "coded", tmp_path / "adapter", tmp_path / "merged")
    merged = load_model(tmp_path / "merged", dtype="float32")
    assert not stacks(merged)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    held = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(tensor.dtype in (torch.float32, torch.bfloat16) for tensor in held.values())
    assert (merged(IDS).logits - logits).norm() <= 1e-2 * logits.norm()
    model.merge_adapter()
    close(model(IDS).logits, logits)
    model.unmerge_adapter()
    close(model(IDS).logits, logits)
    plain = model.merge_and_unload()
    assert not stacks(plain)
    close(plain(IDS).logits, logits)


@mixtures
def test_a_saved_model_is_the_same_checkpoint(made: Made, name: str, tmp_path: Path) -> None:
    model = load_model(made[name] / "coded")
    model.save_pretrained(tmp_path)
    before, after = (load_file(each / "model.safetensors") for each in (made[name] / "coded", tmp_path))
    assert after.keys() == before.keys()
    for key, tensor in after.items():
        assert tensor.dtype == before[key].dtype
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), before[key].reshape(-1).view(torch.uint8)), key
    again, wanted = load_model(tmp_path), model(IDS).logits
    assert torch.equal(again(IDS).logits, wanted)
    for stack in stacks(again).values():
        stack.weight.zero_()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(IDS).logits, wanted)
    assert torch.equal(copy.deepcopy(again)(IDS).logits, wanted)


@mixtures
def test_planned_and_described(made: Made, name: str) -> None:
    folder = made[name] / "coded"
    planned, real = meta_base(config_of(str(folder)), ModelPart(source=str(folder))), load_model(folder)
    wanted = stacks(planned)
    assert wanted.keys() == stacks(real).keys()
    for path, stack in stacks(real).items():
        parts = wanted[path].parts()
        assert {key: (t.dtype, t.shape) for key, t in parts.items()} == {
            key: (t.dtype, t.shape) for key, t in stack.parts().items()
        }
    facts, twin = model_facts(folder), model_facts(made[name] / "dense")
    assert sum(facts.parameters.values()) == sum(twin.parameters.values())
    assert facts.quantization


def test_a_base_of_a_recipe(made: Made) -> None:
    part = ModelPart(source=str(made["gpt-oss"] / "coded"))
    model = load_base(part)
    assert len(stacks(model)) == 4
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_merged_into_the_format(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    """The experts are those of quantizing the exact sum afresh, and they are told among the layers."""
    model, _, _ = trained(made["gpt-oss"] / "coded", IDS, **LORA)
    wanted = {}
    for path, stack in stacks(model).items():
        experts, _, key = path.rpartition(".")
        exact = model.get_submodule(experts).folded_stack(key, ("default",), torch.float32)
        wanted[path] = stack.stack_spec.bind(stack.stack_spec.quantize(exact)).dense(torch.float32)
    merged = model.merge_and_unload(requantize=True)
    assert f"re-quantized {len(wanted)} layers" in capsys.readouterr().out
    assert merged.state_dict().keys() == load_file(made["gpt-oss"] / "coded" / "model.safetensors").keys()
    for path, weight in wanted.items():
        assert torch.equal(stacks(merged)[path].stack().dense(torch.float32), weight)


def test_one_expert_alone_and_none(made: Made) -> None:
    """Rows of a batch see the experts that they choose, whatever the other rows choose."""
    model = load_model(made["gpt-oss"] / "coded")
    whole = model(IDS).logits
    for row in range(2):
        close(model(IDS[row : row + 1]).logits, whole[row : row + 1])
    experts = model.model.layers[0].mlp.experts
    assert experts(torch.zeros(0, 64), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)).shape == (0, 64)


@pytest.mark.parametrize("name", ["gpt-oss", "mxfp4", "awq"])
def test_served_from_codes(made: Made, name: str) -> None:
    """Same tokens as of the dense twin; the program packs the codes, where it can."""
    prompt, greedy = [[5, 61, 2, 33]], SamplingParams(temperature=0, max_tokens=7)
    coded, dense = (LLM(made[name] / each) for each in ("coded", "dense"))
    answers = [llm.generate(prompt, greedy, use_tqdm=False)[0].outputs[0].token_ids for llm in (coded, dense)]
    assert answers[0] == answers[1]
    held = [m for m in coded.engine.runner.model.modules() if isinstance(m, CodedStack | PackedCodedStack)]
    assert len(held) >= 2


def test_what_experts_in_codes_cannot_be(made: Made) -> None:
    model = load_model(made["gpt-oss"] / "coded")
    with pytest.raises(TargetError, match=r"experts.*quantized and cannot be trained whole.*target_parameters"):
        get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["experts"]))
    with pytest.raises(TargetError, match="no parameter of the model"):
        get_peft_model(model, LoraConfig(r=3, target_parameters=["experts.gate_proj"]))
    adapted = get_peft_model(model, LoraConfig(r=3, target_parameters=BOTH))
    with pytest.raises(CompositionError, match="merge_and_unload"):
        adapted.dequantize()
    assert not stacks(adapted.unload().dequantize())


@pytest.fixture
def broken(made: Made, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    shutil.copytree(made[request.param] / "coded", tmp_path / "model")
    return tmp_path / "model"


UP = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize("broken", ["gpt-oss"], indirect=True)
@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        ({f"{UP}_blocks": torch.zeros(4, 192, 2, 16, dtype=torch.uint8)}, {}, r"_blocks is .*\(4, 192, 2, 16\).*\(5,"),
        ({f"{UP}_blocks": torch.zeros(5, 192, 2, 15, dtype=torch.uint8)}, {}, r"_blocks is .*should be.*16\)"),
        ({f"{UP}_blocks": torch.zeros(5, 192, 2, 16)}, {}, r"_blocks is torch.float32"),
        ({f"{UP}_scales": None}, {}, "_scales is missing"),
        ({f"{UP}_scales": torch.full((5, 192, 2), 255, dtype=torch.uint8)}, {}, "_scales holds NaN"),
        ({f"{UP}_scales": torch.zeros(5, 191, 2, dtype=torch.uint8)}, {}, r"_scales is .*\(5, 191, 2\)"),
        ({f"{UP}_blocks": None, f"{UP}_scales": None}, {}, "gate_up_proj is not in the checkpoint"),
        ({f"{UP}_bias": None}, {}, "gate_up_proj_bias is not in the checkpoint"),
        ({}, {"modules_to_not_convert": ["model.layers.1.mlp.experts"]}, "leaves it dense"),
        (
            {f"{UP}_scales": None},
            {"modules_to_not_convert": ["model.layers.1.mlp.experts"]},
            r"gate_up_proj_scales is missing, it should be \(experts, o, blocks\)",
        ),
        (
            {f"{UP}_scales": torch.zeros(5, 192, dtype=torch.uint8)},
            {"modules_to_not_convert": ["model.layers.1.mlp.experts"]},
            r"gate_up_proj_scales is \(5, 192\), it should be",
        ),
    ],
)
def test_damaged_stacks(broken: Path, tensors: dict[str, Tensor | None], settings: Any, message: str) -> None:
    change(broken, tensors, **settings)
    with pytest.raises(FormatError, match=message):
        load_model(broken)


def test_experts_that_are_cut_over_processes(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config quantizes them, but each process has some of them."""
    make = GptOssExperts.__init__

    def cut(experts: Any, config: Any) -> None:
        make(experts, config)
        experts._is_expert_parallel = True

    monkeypatch.setattr(GptOssExperts, "__init__", cut)
    with pytest.raises(FormatError, match="gate_up_proj: these experts cannot stay quantized: they are split") as error:
        load_model(made["gpt-oss"] / "coded")
    assert "leaves it dense" not in str(error.value)


@pytest.mark.parametrize("broken", ["gpt-oss"], indirect=True)
def test_a_config_that_disagrees(broken: Path) -> None:
    path = broken / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_local_experts": 6}))
    with pytest.raises(FormatError, match=r"_blocks is .*\(5, 192.*correct the number of experts"):
        load_model(broken)
    change(broken, swizzled=True)
    with pytest.raises(ConfigError, match="swizzled=True is unknown"):
        load_model(broken)


@pytest.mark.parametrize("broken", ["gpt-oss"], indirect=True)
def test_a_truncated_file(broken: Path) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        load_model(broken)


DOWN = "model.layers.1.mlp.experts"


@pytest.mark.parametrize("broken", ["deepseek fp8"], indirect=True)
@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{DOWN}.4.down_proj.weight": torch.zeros(52, 29).to(torch.float8_e4m3fn)}, r"4\.down_proj.*\(52, 29\)"),
        ({f"{DOWN}.4.down_proj.weight_scale_inv": -torch.ones(3, 1)}, r"4\.down_proj.*zero or negative"),
        ({f"{DOWN}.4.down_proj.weight_scale_inv": torch.ones(3, 1).bfloat16()}, "experts 0 and 4 .*different formats"),
        ({f"{DOWN}.5.down_proj.weight_scale_inv": None, f"{DOWN}.5.down_proj.weight": None}, "lacks|not in|shape"),
    ],
)
def test_damaged_listed_experts(broken: Path, tensors: dict[str, Tensor | None], message: str) -> None:
    change(broken, tensors)
    with pytest.raises(FormatError, match=message):
        load_model(broken)


def test_experts_of_which_a_part_is_dense(tmp_path: Path) -> None:
    """Gate is stored dense, so that gate and up are; both are merged on disk."""
    make_folder(FORMATS["fp8 blocks"], tmp_path, config=qwen3_moe_config())
    coded, dense = (load_model(tmp_path / each) for each in ("coded", "dense"))
    assert [path.rpartition(".")[2] for path in stacks(coded)] == ["down_proj"]
    close(coded(IDS).logits, dense(IDS).logits)
    adapted = get_peft_model(dense, LoraConfig(r=3, target_parameters=BOTH))
    adapted.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "coded", tmp_path / "adapter", tmp_path / "merged")
    merged, wanted = load_model(tmp_path / "merged", dtype="float32")(IDS).logits, adapted(IDS).logits
    assert (merged - wanted).norm() <= 1e-2 * wanted.norm()


def test_scales_of_activations_are_kept(made: Made, tmp_path: Path) -> None:
    """Tensors beside the weight of an expert, which no value depends on, are saved as they were read."""
    shutil.copytree(made["deepseek fp8"] / "coded", tmp_path / "model")
    key = f"{DOWN}.3.up_proj.activation_scale"
    change(tmp_path / "model", {key: torch.tensor([0.7])})
    load_model(tmp_path / "model").save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors")[key] == torch.tensor([0.7])


@pytest.mark.parametrize(
    "settings", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}], ids=["nf4", "int8"]
)
@pytest.mark.parametrize("name", ["gpt-oss", "awq"])
def test_experts_quantized_while_they_are_loaded(
    made: Made, name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """The codes of every expert are those of its matrix alone, also when they are saved and read again."""
    config = BitsAndBytesConfig(**settings)
    model, dense = load_model(made[name] / "dense", quantization=config), load_model(made[name] / "dense")
    parameters = dict(dense.named_parameters())
    found = stacks(model)
    assert set(found) == {path for path in parameters if path.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    for path, stack in found.items():
        wanted = as_maps(dense, path, parameters[path])
        for number, expert in enumerate(wanted):
            spec = stack.stack_spec.pieces[0]
            alone = spec.bind(spec.quantize(expert.contiguous())).dense(torch.float32)
            assert torch.equal(stack.stack().expert(number).dense(torch.float32), alone)
    planned = meta_base(
        config_of(str(made[name] / "dense")),
        ModelPart(source=str(made[name] / "dense"), quantization="nf4" if config.load_in_4bit else "int8"),
    )
    assert stacks(planned).keys() == found.keys()
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert stacks(again).keys() == found.keys()
    left = BitsAndBytesConfig(**settings, llm_int8_skip_modules=["mlp.experts"])
    assert not stacks(load_model(made[name] / "dense", quantization=left))


def test_experts_that_bitsandbytes_stored_one_by_one(made: Made, tmp_path: Path) -> None:
    """A folder in NF4 of a transformers that had no stacks: gate and up keep blocks of their own."""
    shutil.copytree(made["awq"] / "dense", tmp_path / "model")
    held, wanted = load_file(tmp_path / "model" / "model.safetensors"), dict[str, Tensor]()
    coded: dict[str, Tensor] = {}
    for name, tensor in held.items():
        if not name.endswith("_proj.weight"):
            coded[name] = tensor
            continue
        spec = FourBitSpec(FourBitLayout((tensor.shape[0], tensor.shape[1]), "nf4"), double_quant=True)
        parts = spec.quantize(tensor)
        wanted[name] = spec.bind(parts).dense()
        layer = name.removesuffix("weight")
        coded |= {layer + key: part for key, part in spec.to_disk(parts).items()}
    save_file(coded, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    path = tmp_path / "model" / "config.json"
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config.to_dict()}))
    model = load_model(tmp_path / "model")
    experts = "model.layers.0.mlp.experts"
    both = [torch.cat([wanted[f"{experts}.{n}.{half}_proj.weight"] for half in ("gate", "up")]) for n in range(3)]
    found = stacks(model)
    assert torch.equal(found[f"{experts}.gate_up_proj"].stack().dense(), torch.stack(both))
    down = [wanted[f"{experts}.{n}.down_proj.weight"] for n in range(3)]
    assert torch.equal(found[f"{experts}.down_proj"].stack().dense(), torch.stack(down))
