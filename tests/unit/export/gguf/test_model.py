"""Export of whole models: the adapter is in the file, and what the format cannot say is one clear error."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from veneer.adapters.peft_model import get_peft_model
from veneer.cli.app import app
from veneer.cli.export import print_plan
from veneer.errors import ConfigError, FormatError, NonFiniteError
from veneer.export.gguf.metadata import name_of, sampling_settings
from veneer.export.gguf.mix import MixOptions
from veneer.export.gguf.model import GgufExport, GgufOptions, export_gguf
from veneer.export.merged import merge_checkpoint
from veneer.methods.lora import LoraConfig
from veneer.store.gguf.writer import parts_of
from veneer.store.quantization import BitsAndBytesConfig

from .tiny import VOCAB, tiny_folder, tokenizer

F16 = GgufOptions(type="F16")


def tensors(path: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(path).tensors}


def value(path: Path, key: str) -> Any:
    return GGUFReader(path).fields[key].contents()


def adapter_folder(path: Path, model: Any, **settings: Any) -> None:
    torch.manual_seed(5)
    adapted = get_peft_model(model, LoraConfig(r=3, lora_alpha=7, **settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    adapted.save_pretrained(path)


def test_the_file_holds_what_a_merge_would(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "base", "llama")
    adapter_folder(tmp_path / "adapter", model, target_modules=["q_proj", "down_proj"], use_rslora=True, use_dora=True)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    export_gguf(tmp_path / "merged", tmp_path / "merged.gguf", F16)
    report = export_gguf(tmp_path / "base", tmp_path / "one.gguf", F16, adapter=tmp_path / "adapter")
    assert tensors(tmp_path / "one.gguf") == tensors(tmp_path / "merged.gguf")
    export_gguf(tmp_path / "base", tmp_path / "base.gguf", F16)
    assert tensors(tmp_path / "one.gguf") != tensors(tmp_path / "base.gguf")
    assert report.n_modules == 6
    assert report.n_bytes == (tmp_path / "one.gguf").stat().st_size == report.plan.nbytes


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@torch.no_grad()
def test_experts_that_lie_apart_in_the_files_are_merged_and_written(tmp_path: Path, family: str) -> None:
    model = tiny_folder(tmp_path / "base", family)
    names = list(load_file(tmp_path / "base" / "model.safetensors"))
    assert any(".experts.0." in name for name in names)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter_folder(tmp_path / "adapter", model, target_modules=["q_proj"], target_parameters=experts)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    ids = torch.arange(40)[None]
    torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    export_gguf(tmp_path / "base", tmp_path / "one.gguf", F16, adapter=tmp_path / "adapter")
    export_gguf(tmp_path / "merged", tmp_path / "merged.gguf", F16)
    assert tensors(tmp_path / "one.gguf") == tensors(tmp_path / "merged.gguf")


def test_a_base_in_4_bits_is_written_dense(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model", "llama")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=config)
    small.save_pretrained(tmp_path / "small")
    tokenizer().save_pretrained(tmp_path / "small")
    export_gguf(tmp_path / "small", tmp_path / "x.gguf", GgufOptions(type="F32", dtype="float32"))
    found = next(t for t in GGUFReader(tmp_path / "x.gguf").tensors if t.name == "blk.1.ffn_up.weight")
    expected = small.model.layers[1].mlp.up_proj.frozen_format().dense(torch.float32)
    torch.testing.assert_close(torch.tensor(found.data), expected)


def test_values_are_rounded_to_the_dtype_before_they_are_quantized(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model", "qwen2")
    for dtype in (None, "float16"):
        export_gguf(tmp_path / "model", tmp_path / f"{dtype}.gguf", GgufOptions(type="Q8_0", dtype=dtype))
    assert tensors(tmp_path / "None.gguf") != tensors(tmp_path / "float16.gguf")


@pytest.mark.parametrize(("dtype", "exact"), [(None, True), ("float32", True), ("bfloat16", False)])
@torch.no_grad()
def test_in_float32_what_an_adapter_adds_is_never_rounded(tmp_path: Path, dtype: str | None, exact: bool) -> None:
    model = tiny_folder(tmp_path / "base", "mistral")
    adapter_folder(tmp_path / "adapter", model, target_modules=["up_proj"])
    base = tiny_folder(tmp_path / "base", "mistral").bfloat16()
    base.save_pretrained(tmp_path / "base")
    options = GgufOptions(type="F32", dtype=dtype)
    export_gguf(tmp_path / "base", tmp_path / "x.gguf", options, adapter=tmp_path / "adapter")
    found = next(t for t in GGUFReader(tmp_path / "x.gguf").tensors if t.name == "blk.1.ffn_up.weight")
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.model.layers.1.mlp.up_proj.lora_{x}.weight"] for x in "AB")
    expected = base.model.layers[1].mlp.up_proj.weight.float() + b @ a * 7 / 3
    expected = expected if exact else expected.bfloat16().float()
    torch.testing.assert_close(torch.tensor(found.data), expected, rtol=1e-6 if exact else 1e-2, atol=1e-6)
    assert bool((torch.tensor(found.data).bfloat16().float() == torch.tensor(found.data)).all()) is not exact


def test_options_choose_types_of_single_tensors(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model", "mistral")
    mix = MixOptions(output="f16", embedding="Q4_1", by_name=[("ffn_down", "Q5_0"), ("down", "Q4_0")])
    plan = GgufExport(tmp_path / "model", None, GgufOptions(type="Q8_0", mix=mix)).plan
    kinds = {spec.name: spec.kind for spec in plan.specs}
    assert kinds["output.weight"] == "F16"
    assert kinds["token_embd.weight"] == "Q4_1"
    assert kinds["blk.1.ffn_down.weight"] == "Q5_0"
    assert kinds["blk.1.ffn_up.weight"] == "Q8_0"
    assert kinds["blk.1.ffn_norm.weight"] == "F32"
    wrong = MixOptions(output="Q9", by_name=[("(", "Q8_0")])
    with pytest.raises(ConfigError, match=r"type 'Q9' of a tensor is unknown.*'\(' is no regular expression"):
        GgufExport(tmp_path / "model", None, GgufOptions(type="Q8_0", mix=wrong))
    lost = MixOptions(by_name=[("ffn_down", "Q5_0"), ("ffn_norm", "Q8_0"), ("blk.9", "F16")])
    with pytest.raises(ConfigError, match=r"'ffn_norm' and 'blk.9': found in no name .* blk.*attn_q.*ffn_up"):
        GgufExport(tmp_path / "model", None, GgufOptions(type="Q8_0", mix=lost))
    with pytest.raises(ConfigError, match=r"type 'Q4' is unknown \(the nearest is Q4_1\); allowed: F32, F16"):
        GgufExport(tmp_path / "model", None, GgufOptions(type="Q4"))


def test_the_vocabulary_its_special_tokens_and_the_template_are_in_the_file(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model", "llama")
    file = tmp_path / "x.gguf"
    export_gguf(tmp_path / "model", file, F16)
    tokens = value(file, "tokenizer.ggml.tokens")
    assert len(tokens) == VOCAB
    assert tokens[:4] == ["<|end|>", "<|user|>", "<|assistant|>", "<|stop|>"]
    assert tokens[-3:] == ["[PAD268]", "[PAD269]", "[PAD270]"]
    assert value(file, "tokenizer.ggml.token_type") == [3] * 4 + [1] * 264 + [5] * 3
    assert value(file, "tokenizer.ggml.merges")[:3] == ["h e", "Ġ t", "Ġt he"]
    assert value(file, "tokenizer.ggml.pre") == "gpt-2"
    assert value(file, "tokenizer.ggml.eos_token_id") == 3
    assert value(file, "tokenizer.ggml.eot_token_id") == 0  # the template ends answers otherwise than texts
    assert value(file, "tokenizer.ggml.add_bos_token") is False
    assert value(file, "tokenizer.chat_template") == tokenizer().chat_template


def test_a_model_is_called_by_its_folder_its_file_or_what_the_user_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    tiny_folder(tmp_path / "seven", "llama")
    made = tmp_path / "eight.gguf"
    export_gguf(tmp_path / "seven", made, F16)
    assert value(made, "general.name") == "seven"
    digest = hashlib.sha256(made.read_bytes()).hexdigest()
    for base in (made, f"eight.gguf@sha256:{digest}"):  # the cache knows the second from the first
        export_gguf(base, tmp_path / "x.gguf", replace(F16, overwrite=True))
        assert value(tmp_path / "x.gguf", "general.name") == "eight"
    export_gguf(made, tmp_path / "y.gguf", replace(F16, name="nine"))
    assert value(tmp_path / "y.gguf", "general.name") == "nine"
    assert name_of(tmp_path / "runs" / "ten" / "adapter") == "ten"


def test_the_adapter_s_own_tokenizer_and_template_win(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "base", "llama")
    adapter_folder(tmp_path / "adapter", model, target_modules=["v_proj"])
    trained = tokenizer()
    trained.chat_template = "{% for m in messages %}[{{ m['content'] }}]<|stop|>{% endfor %}"
    trained.save_pretrained(tmp_path / "adapter")
    export_gguf(tmp_path / "base", tmp_path / "x.gguf", F16, adapter=tmp_path / "adapter")
    assert value(tmp_path / "x.gguf", "tokenizer.chat_template") == trained.chat_template


def spoiled(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refused(folder: Path, reason: str, error: type[Exception] = FormatError) -> None:
    with pytest.raises(error, match=reason):
        export_gguf(folder, folder.parent / "x.gguf", F16)
    assert not (folder.parent / "x.gguf").exists()
    assert not list(folder.parent.glob(".x.gguf*"))


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model", "llama")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    refused(tmp_path / "model", r"model\.layers\.1\.mlp\.up_proj\.weight.* not finite")


def test_a_value_that_float16_cannot_hold_is_named(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model", "llama")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e6
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    refused(tmp_path / "model", r"tensor blk\.1\.ffn_up\.weight", NonFiniteError)


def test_an_unknown_architecture_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model", "qwen2", architectures=["Starcoder2ForCausalLM"])
    from transformers import Starcoder2Config, Starcoder2ForCausalLM

    Starcoder2ForCausalLM(Starcoder2Config(hidden_size=24, num_hidden_layers=1, vocab_size=VOCAB)).save_pretrained(
        tmp_path / "model"
    )
    refused(tmp_path / "model", r"type 'starcoder2' are not written as GGUF; known types: gemma2, ")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            '{"model_type": "later-invention"}',
            r"config\.json describes no model that transformers knows.*later-invention",
        ),
        ("{", r"config\.json is not valid JSON"),
        ('{"model_type": "llama", "hidden_size": "wide"}', r"config\.json describes no model.*hidden_size"),
    ],
)
def test_a_config_of_no_known_model_is_one_error(tmp_path: Path, text: str, reason: str) -> None:
    tiny_folder(tmp_path / "model", "llama")
    (tmp_path / "model" / "config.json").write_text(text)
    refused(tmp_path / "model", reason)


def test_all_that_cannot_be_said_is_told_at_once(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model", "llama")
    spoiled(
        tmp_path / "model", hidden_act="gelu", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2}
    )
    refused(tmp_path / "model", r"cannot describe .*hidden_act 'gelu'.*; .*'dynamic'|'dynamic'.*; .*hidden_act 'gelu'")


def test_a_head_that_the_runtime_never_reads_is_refused(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model", "gemma2", tie_word_embeddings=False)
    refused(tmp_path / "model", "head apart from its embeddings, which the runtime never reads")


def test_a_vocabulary_longer_than_the_table_is_refused(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model", "llama")
    longer = tokenizer()
    longer.add_tokens([f"<extra{i}>" for i in range(5)])
    longer.save_pretrained(tmp_path / "model")
    refused(tmp_path / "model", r"has 273 tokens \(the last is '<extra4>'\), the embeddings have 271 rows")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no assistants') }}", "does not render a question and an answer: no assistants"),
        ("{% for m in messages %}", "does not render"),
        ("{{ messages[0]['content'] }}", "leaves answers out"),
    ],
)
def test_a_template_that_does_not_render_a_chat_is_refused(tmp_path: Path, template: str, reason: str) -> None:
    tiny_folder(tmp_path / "model", "llama")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    refused(tmp_path / "model", reason)


@pytest.mark.parametrize("text", ['[{"temperature": 0.7}]', "{", '{"temperature": "warm"}'])
def test_sampling_settings_that_are_none_are_left_out(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    assert sampling_settings(tmp_path) == {}


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model", "llama")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "model" / name).unlink()
    refused(tmp_path / "model", "holds a tokenizer")


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "80"})


def test_a_plan_tells_the_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_folder(tmp_path / "model", "llama")
    plan = GgufExport(tmp_path / "model", None, GgufOptions(type="Q8_0")).plan
    n_parts = len(parts_of(plan.specs, plan.nbytes // 2))
    print_plan(plan, n_parts)
    assert f" in {n_parts} parts; nothing was written" in capsys.readouterr().out
    assert n_parts > 1


def test_the_command_writes_splits_and_tells(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "base", "llama")
    adapter_folder(tmp_path / "adapter", model, target_modules=["v_proj"])
    order = ("export", "gguf", tmp_path / "base", "-a", tmp_path / "adapter", "-o", tmp_path / "x.gguf", "-t", "q8_0")
    shown = run(*order, "--dry-run")
    assert shown.exit_code == 0
    first, rows = shown.stdout.splitlines()[0], [line.split() for line in shown.stdout.splitlines()]
    assert first.startswith("30 tensors (")
    assert first.endswith("; nothing was written")
    assert [row[-1] for row in rows if row[:1] == ["ffn_down.weight"]] == ["0-2"]
    assert not (tmp_path / "x.gguf").exists()
    done = run(*order)
    assert done.exit_code == 0
    assert "3 modules changed by the adapter" in done.stdout
    again = run(*order)
    assert again.exit_code == 2
    assert "--force" in again.stderr
    assert run(*order, "--force").exit_code == 0
    wrong = run(*order, "--force", "--split-size", "many")
    assert "--split-size 'many' must be a whole number of M or G" in wrong.stderr
    assert "must be REGEX=TYPE" in run(*order, "--force", "--tensor-type", "ffn_down").stderr
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "x.gguf"]
