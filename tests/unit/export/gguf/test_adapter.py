"""Adapters as files: on the base's tensors they make what a merge makes, or are refused with the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from typer.testing import CliRunner

from veneer.adapters.peft_model import get_peft_model
from veneer.cli.app import app
from veneer.errors import CompositionError, ConfigError, FormatError
from veneer.export.gguf.adapter import export_lora
from veneer.export.gguf.check import check_file
from veneer.export.gguf.model import GgufOptions, export_gguf
from veneer.methods.bottleneck import BottleneckConfig
from veneer.methods.hra import HRAConfig
from veneer.methods.ia3 import IA3Config
from veneer.methods.loha import LoHaConfig
from veneer.methods.lora import LoraConfig
from veneer.methods.prompt import PromptTuningConfig
from veneer.methods.vera import VeraConfig

from .tiny import image_model, tiny_folder, tokenizer


def trained(folder: Path, family: str, config: Any, **changes: Any) -> Path:
    """An adapter with values on a tiny base, both in folders."""
    return trained_on(folder, tiny_folder(folder / "base", family, **changes), config)


def trained_on(folder: Path, model: Any, config: Any) -> Path:
    model.config._name_or_path = str(folder / "base")
    adapted = get_peft_model(model, config)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    adapted.save_pretrained(folder / "adapter")
    return folder / "adapter"


def matrices(path: Path) -> dict[str, torch.Tensor]:
    return {tensor.name: torch.tensor(tensor.data) for tensor in GGUFReader(path).tensors}


PATTERNS = {"rank_pattern": {"layers.1.self_attn.q_proj": 5}, "alpha_pattern": {"down_proj": 13}}
LORAS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "rslora, patterns": (
        "llama",
        LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=["q_proj", "k_proj", "down_proj"], **PATTERNS),
        {},
    ),
    "pissa": ("qwen2", LoraConfig(r=3, lora_alpha=7, init_lora_weights="pissa", target_modules=["o_proj"]), {}),
    "conv1d, square too": ("gpt2", LoraConfig(r=3, lora_alpha=7, target_modules=["c_attn", "c_proj"]), {}),
    "fused": ("gptneox", LoraConfig(r=3, lora_alpha=7, target_modules=["query_key_value"]), {}),
    "hra": ("llama", HRAConfig(r=3, target_modules=["q_proj", "down_proj"]), {}),
    "hra, conv1d": ("gpt2", HRAConfig(r=4, apply_GS=True, target_modules=["c_attn"]), {}),
    "loha": ("qwen2", LoHaConfig(r=2, alpha=5, target_modules=["o_proj"]), {}),
    "vera": ("mistral", VeraConfig(r=5, target_modules=["v_proj"]), {}),
    "embeddings": (
        "mistral", LoraConfig(r=3, lora_alpha=7, target_modules=["embed_tokens", "lm_head"]), {},
    ),
    "experts": (
        "qwen3_moe",
        LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"], target_parameters=["all-experts", "mlp.gate.weight"]),
        {},
    ),
    "experts beside a shared one": (
        "qwen2_moe", LoraConfig(r=2, lora_alpha=5, target_modules="all-linear", target_parameters=["all-experts"]), {},
    ),
    "experts of gpt-oss": (
        "gpt_oss",
        LoraConfig(r=3, lora_alpha=7, target_modules=["v_proj"], target_parameters=["all-experts", "router.weight"]),
        {},
    ),
    "experts of a layer, down alone": (
        "mixtral", LoraConfig(r=3, lora_alpha=7, target_modules=[], target_parameters=["1.mlp.experts.down_proj"]), {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LORAS)
def test_factors_on_the_base_s_tensors_are_the_merge(tmp_path: Path, case: str) -> None:
    family, config, changes = LORAS[case]
    assert_factors_are_the_merge(tmp_path, trained(tmp_path, family, config, **changes))


def test_the_text_half_of_a_model_of_images_takes_its_adapter(tmp_path: Path) -> None:
    model = image_model()
    model.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    layers = r".*language_model.*\.(q_proj|down_proj)"
    adapter = trained_on(tmp_path, model, LoraConfig(r=3, lora_alpha=7, target_modules=layers))
    assert_factors_are_the_merge(tmp_path, adapter)


def test_an_adapter_of_the_towers_of_images_is_refused(tmp_path: Path) -> None:
    model = image_model()
    model.save_pretrained(tmp_path / "base")
    adapter = trained_on(tmp_path, model, LoraConfig(r=3, target_modules=["q_proj"]))
    with pytest.raises(CompositionError, match=r"vision_tower\S*q_proj has no name in the format"):
        export_lora(adapter, tmp_path / "x.gguf")


def assert_factors_are_the_merge(tmp_path: Path, adapter: Path) -> None:
    report = export_lora(adapter, tmp_path / "lora.gguf")
    for name, folder in {"base": None, "merged": adapter}.items():
        export_gguf(tmp_path / "base", tmp_path / f"{name}.gguf", GgufOptions(type="F32"), adapter=folder)
    base, merged, lora = (matrices(tmp_path / f"{name}.gguf") for name in ("base", "merged", "lora"))
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert {name.removesuffix(".lora_a").removesuffix(".lora_b") for name in lora} == changed
    assert report.n_modules == len(changed) > 0
    for name in changed:
        a, b = lora[f"{name}.lora_a"], lora[f"{name}.lora_b"]
        update = a @ b.T if name == "token_embd.weight" else b @ a
        torch.testing.assert_close(base[name] + update, merged[name], rtol=1e-5, atol=1e-5)


def test_the_file_says_what_it_is_and_no_alpha(tmp_path: Path) -> None:
    adapter = trained(tmp_path, "llama", LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"]))
    export_lora(adapter, tmp_path / "x.gguf", type="f16")
    reader = GGUFReader(tmp_path / "x.gguf")
    found = {name: field.contents() for name, field in reader.fields.items()}
    assert found["general.type"] == "adapter"
    assert found["adapter.type"] == "lora"
    assert found["general.architecture"] == "llama"
    assert found["adapter.lora.alpha"] == 0
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F16"}


@pytest.mark.parametrize(
    ("family", "config", "reason"),
    [
        ("llama", LoraConfig(r=3, target_modules=["q_proj"], use_dora=True), r"depends on the weights.*Merge it inst"),
        (
            "llama", IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
            r"0\S+k_proj \(and 2 more\) is scaled or shifted .*; \S+0\S+k_proj \(and 2 more\) scales .*Merge it",
        ),
        ("mistral", LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"]), r"whole modules.*Merge"),
        ("mistral", LoraConfig(r=3, target_modules=["q_proj"], lora_bias=True), r"trains a bias.*Merge it"),
        ("llama", LoraConfig(r=3, target_modules=["embed_tokens"]), r"embed_tokens is tied.*aborts.*Merge it"),
        ("llama", PromptTuningConfig(num_virtual_tokens=3), r"does not change weights.*veneer serve"),
        ("llama", BottleneckConfig(), r"does not change weights.*veneer serve"),
    ],
)  # fmt: skip
def test_what_the_format_cannot_hold_is_refused_with_the_way_out(
    tmp_path: Path, family: str, config: Any, reason: str
) -> None:
    adapter = trained(tmp_path, family, config)
    with pytest.raises(CompositionError, match=reason):
        export_lora(adapter, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_a_base_that_is_not_known_and_a_type_that_is_none_are_refused(tmp_path: Path) -> None:
    adapter = trained(tmp_path, "llama", LoraConfig(r=3, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="type 'Q8_0' is not for adapters: give F32 or F16"):
        export_lora(adapter, tmp_path / "x.gguf", type="Q8_0")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match=r"does not name its base: give it \(--base MODEL\)"):
        export_lora(adapter, tmp_path / "x.gguf")
    export_lora(adapter, tmp_path / "x.gguf", base=str(tmp_path / "base"))
    with pytest.raises(FormatError, match="--force"):
        export_lora(adapter, tmp_path / "x.gguf", base=str(tmp_path / "base"))


def test_the_command(tmp_path: Path) -> None:
    adapter = trained(tmp_path, "llama", LoraConfig(r=3, target_modules=["q_proj"]))
    done = CliRunner().invoke(app, ["export", "lora", str(adapter), "-o", str(tmp_path / "x.gguf")])
    assert done.exit_code == 0
    assert "3 modules" in done.stdout
    assert "Ollama takes no adapters" in done.stderr


def test_the_file_of_an_adapter_is_no_model(tmp_path: Path) -> None:
    adapter = trained(tmp_path, "llama", LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"]))
    export_lora(adapter, tmp_path / "a.gguf")
    with pytest.raises(FormatError, match=r"a\.gguf holds an adapter: .*--lora a\.gguf"):
        check_file(tmp_path / "a.gguf")
