"""Importance of columns: collected as plain sums of squares, and used in quantizing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from typer.testing import CliRunner

from veneer.adapters.peft_model import get_peft_model
from veneer.cli.app import app
from veneer.errors import ConfigError, DataError, FormatError
from veneer.export.gguf.collect import CollectOptions, collect_importance
from veneer.export.gguf.model import GgufExport, GgufOptions, export_gguf
from veneer.methods.lora import LoraConfig
from veneer.ops.ggml import quantize_ggml
from veneer.store.gguf.importance import read_importance

from .tiny import image_model, tiny_folder, tiny_model, tokenizer

TEXT = "the other inner one, 12 on 12; " * 9
OPTIONS = CollectOptions(chunk_size=17, n_chunks=3)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3-plain"])
@torch.no_grad()
def test_means_are_those_of_the_inputs(tmp_path: Path, text: Path, family: str) -> None:
    model = tiny_model(family)
    assert collect_importance(model, tokenizer(), text, tmp_path / "i.gguf", OPTIONS) == 3
    found = read_importance(tmp_path / "i.gguf")
    inputs: dict[str, list[torch.Tensor]] = {}
    layer = model.get_submodule({"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_proj"}.get(
        family, "model.layers.1.mlp.down_proj"))  # fmt: skip
    layer.register_forward_pre_hook(lambda module, given: inputs.setdefault("down", []).append(given[0]))
    ids = torch.tensor(tokenizer()(TEXT)["input_ids"])
    for window in ids[: 3 * 17].view(3, 17):
        model(window[None])
    expected = torch.cat(inputs["down"]).double().square().mean((0, 1)).float()
    torch.testing.assert_close(found.means["blk.1.ffn_down.weight"], expected, rtol=1e-5, atol=0)
    assert not {"output.weight", "token_embd.weight"} & found.means.keys()
    matrices = 3 * {"llama": 7, "gpt2": 4, "phi3-plain": 4}[family]
    assert len(found.means) == matrices


def test_the_text_half_of_a_model_of_images_is_watched(tmp_path: Path, text: Path) -> None:
    collect_importance(image_model(), tokenizer(), text, tmp_path / "i.gguf", OPTIONS)
    found = read_importance(tmp_path / "i.gguf").means
    assert len(found) == 7 * 7
    assert all(name.startswith("blk.") for name in found)


def test_a_matrix_weighs_the_bytes_and_stands_in_the_keys(tmp_path: Path, text: Path) -> None:
    model = tiny_folder(tmp_path / "model", "mistral")
    collect_importance(model, tokenizer(), text, tmp_path / "i.gguf", OPTIONS)
    options = {"plain": None, "weighed": tmp_path / "i.gguf"}
    for name, file in options.items():
        export_gguf(tmp_path / "model", tmp_path / f"{name}.gguf", GgufOptions(type="Q4_0", importance=file))
    plain, weighed = ({t.name: t for t in GGUFReader(tmp_path / f"{name}.gguf").tensors} for name in options)
    name = "blk.1.ffn_up.weight"
    assert plain[name].data.tobytes() != weighed[name].data.tobytes()
    means = read_importance(tmp_path / "i.gguf").means[name]
    expected = quantize_ggml(model.model.layers[1].mlp.up_proj.weight, "Q4_0", means)
    assert weighed[name].data.tobytes() == expected.numpy().tobytes()
    assert plain["token_embd.weight"].data.tobytes() == weighed["token_embd.weight"].data.tobytes()
    keys = GGUFReader(tmp_path / "weighed.gguf").fields
    assert keys["quantize.imatrix.entries_count"].contents() == 21
    assert "quantize.imatrix.file" not in GGUFReader(tmp_path / "plain.gguf").fields


def test_a_matrix_of_another_model_is_refused_and_nothing_written(tmp_path: Path, text: Path) -> None:
    collect_importance(tiny_model("mistral", intermediate_size=96), tokenizer(), text, tmp_path / "i.gguf", OPTIONS)
    tiny_folder(tmp_path / "model", "mistral")
    options = GgufOptions(type="Q4_0", importance=tmp_path / "i.gguf")
    with pytest.raises(FormatError, match="collected on another model"):
        export_gguf(tmp_path / "model", tmp_path / "x.gguf", options)
    assert not (tmp_path / "x.gguf").exists()


def test_the_smallest_mix_needs_one(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model", "mistral", hidden_size=256, num_hidden_layers=1)
    with pytest.raises(ConfigError, match="Q2_K_S needs an importance matrix"):
        GgufExport(tmp_path / "model", None, GgufOptions(type="Q2_K_S"))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
@torch.no_grad()
def test_each_expert_has_the_means_of_what_was_sent_to_it(tmp_path: Path, text: Path, family: str) -> None:
    model = tiny_folder(tmp_path / "model", family)
    collect_importance(model, tokenizer(), text, tmp_path / "i.gguf", OPTIONS)
    found = read_importance(tmp_path / "i.gguf").means
    experts = model.model.layers[1].mlp.experts
    calls: list[tuple[torch.Tensor, ...]] = []
    experts.register_forward_pre_hook(lambda module, given: calls.append(given))
    for window in torch.tensor(tokenizer()(TEXT)["input_ids"])[: 3 * 17].view(3, 17):
        model(window[None])
    sent, chosen = (torch.cat([call[place] for call in calls]) for place in (0, 1))
    n_experts, _, width = experts.gate_up_proj.shape
    for expert in range(n_experts):
        inputs = sent[(chosen == expert).any(-1)].double()
        gate, up = (inputs @ experts.gate_up_proj[expert].double().T).chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up
        for name, values in (("ffn_gate_exps", inputs), ("ffn_up_exps", inputs), ("ffn_down_exps", inner)):
            expected = values.square().mean(0) if len(values) else torch.ones(values.shape[-1])
            means = found[f"blk.1.{name}.weight"].view(n_experts, -1)[expert]
            torch.testing.assert_close(means, expected.float(), rtol=1e-4, atol=0)
    assert found["blk.1.ffn_up_exps.weight"].numel() == n_experts * width

    export_gguf(tmp_path / "model", tmp_path / "x.gguf", GgufOptions(type="Q4_0", importance=tmp_path / "i.gguf"))
    written = {t.name: t for t in GGUFReader(tmp_path / "x.gguf").tensors}["blk.1.ffn_down_exps.weight"]
    means = found["blk.1.ffn_down_exps.weight"].view(n_experts, -1)
    for expert, packed in enumerate(written.data):
        expected = quantize_ggml(experts.down_proj[expert], written.tensor_type.name, means[expert].contiguous())
        assert packed.tobytes() == expected.numpy().tobytes()


@torch.no_grad()
def test_an_adapter_on_the_experts_changes_what_reaches_the_matrix_behind(tmp_path: Path, text: Path) -> None:
    model = tiny_model("mixtral")
    collect_importance(model, tokenizer(), text, tmp_path / "base.gguf", OPTIONS)
    names = ["mlp.experts.gate_up_proj"]
    torch.manual_seed(3)
    adapted = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, target_parameters=names))
    collect_importance(adapted, tokenizer(), text, tmp_path / "i.gguf", OPTIONS)
    collect_importance(adapted.merge_and_unload(), tokenizer(), text, tmp_path / "merged.gguf", OPTIONS)
    base, ours, merged = (read_importance(tmp_path / f"{name}.gguf").means for name in ("base", "i", "merged"))
    name = "blk.0.ffn_down_exps.weight"
    torch.testing.assert_close(ours[name], merged[name], rtol=1e-3, atol=0)
    assert (ours[name] - base[name]).abs().max() > 1e-2 * base[name].abs().max()


def test_short_texts_are_refused(tmp_path: Path, text: Path) -> None:
    with pytest.raises(DataError, match="less than a window of 512"):
        collect_importance(tiny_model("llama"), tokenizer(), text, tmp_path / "i.gguf", CollectOptions(chunk_size=512))


def test_the_commands(tmp_path: Path, text: Path) -> None:
    tiny_folder(tmp_path / "model", "llama")

    def run(*arguments: Any) -> Any:
        return CliRunner().invoke(app, ["export", *map(str, arguments)])

    order = ("importance", tmp_path / "model", "-d", text, "-o", tmp_path / "i.gguf", "--chunk-size", "17")
    assert "windows of 17 tokens" in run(*order, "--chunks", "2").stdout
    assert "--force" in run(*order).stderr
    done = run("gguf", tmp_path / "model", "-o", tmp_path / "x.gguf", "-t", "Q4_0", "--importance", tmp_path / "i.gguf")
    assert done.exit_code == 0
