"""GGUF files converted into folders: the same logits, tokens and settings; damaged files refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from veneer.errors import FormatError
from veneer.plan.architecture import config_of
from veneer.store import source
from veneer.store.gguf import model as gguf_model
from veneer.store.gguf.model import convert_gguf, converted_folder, read_facts

Make = Callable[..., tuple[Path, Any]]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
def test_the_converted_folder_computes_the_logits_of_the_model(make_gguf: Make, tmp_path: Path, family: str) -> None:
    path, model = make_gguf(family)
    convert_gguf(path, tmp_path / "folder")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype="auto")
    ids = torch.tensor([[3, 17, 41, 5, 29, 11, 7]])
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert loaded.dtype == torch.float32
    assert (loaded.config.eos_token_id, loaded.generation_config.eos_token_id) == (0, 0)
    assert (loaded.config.bos_token_id, loaded.config.max_position_embeddings) == (1, 37)


@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_half_precision_files_keep_their_dtype_bit_for_bit(
    make_gguf: Make, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    path, model = make_gguf("qwen2", kind=kind)
    convert_gguf(path, tmp_path / "folder")
    saved = load_file(tmp_path / "folder" / "model.safetensors")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.k_proj.bias"):
        assert torch.equal(saved[name], model.get_parameter(name).to(dtype))


def test_quantized_values_are_those_of_the_gguf_package(make_gguf: Make, tmp_path: Path) -> None:
    path, model = make_gguf("qwen2", kind="Q8_0")
    convert_gguf(path, tmp_path / "folder")
    saved = load_file(tmp_path / "folder" / "model.safetensors")
    name = "model.layers.1.mlp.gate_proj.weight"
    stored = gguf.quants.quantize(model.get_parameter(name).detach().numpy(), gguf.GGMLQuantizationType.Q8_0)
    expected = torch.from_numpy(gguf.quants.dequantize(stored, gguf.GGMLQuantizationType.Q8_0))
    assert torch.equal(saved[name], expected.to(torch.bfloat16))


def test_tied_embeddings_are_stored_once_and_tied_again(make_gguf: Make, tmp_path: Path) -> None:
    path, _ = make_gguf("qwen2")
    convert_gguf(path, tmp_path / "folder")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert loaded.config.tie_word_embeddings
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "folder" / "model.safetensors")


@pytest.mark.parametrize(("pre", "digits"), [("smollm", ["1", "2"]), ("default", ["12"])])
def test_the_tokenizer_splits_digits_where_the_vocabulary_was_learned_so(
    make_gguf: Make, tmp_path: Path, pre: str, digits: list[str]
) -> None:
    path, _ = make_gguf("llama", pre=pre)
    convert_gguf(path, tmp_path / "folder")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert tokenizer.tokenize("he12") == ["he", *digits]
    text = "<|start|>he 12 é\n\n 日<|end|>"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert (tokenizer.eos_token, tokenizer.model_max_length) == ("<|end|>", 37)
    message = [{"role": "user", "content": "he"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "<|start|>he<|end|>"


def test_a_file_without_a_tokenizer_gives_a_model_without_one(make_gguf: Make, tmp_path: Path) -> None:
    path, _ = make_gguf("llama", pre=None)
    convert_gguf(path, tmp_path / "folder")
    assert not (tmp_path / "folder" / "tokenizer.json").exists()


def test_the_config_holds_nothing_of_the_file(make_gguf: Make, tmp_path: Path) -> None:
    path, _ = make_gguf("llama")
    convert_gguf(path, tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert not {"quantization_config", "_model_name_or_path"} & set(config)


def test_converting_happens_once_and_again_for_a_changed_file(
    make_gguf: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    path, _ = make_gguf("llama")
    first = converted_folder(path)
    stamp = (first / "config.json").stat().st_mtime_ns
    assert converted_folder(path) == first
    assert (first / "config.json").stat().st_mtime_ns == stamp
    monkeypatch.setattr(gguf_model, "CONVERSION", gguf_model.CONVERSION + 1)
    later = converted_folder(path)
    assert later != first
    make_gguf("qwen2")
    assert converted_folder(path) not in (first, later)


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04 not a model")
    with pytest.raises(FormatError, match="not a GGUF file"):
        read_facts(tmp_path / "x.gguf")


@pytest.mark.parametrize("kept", [0.9, 0.5, 0.05, 0.001])
def test_a_file_cut_short_is_refused(make_gguf: Make, kept: float) -> None:
    path, _ = make_gguf("llama")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(FormatError, match="damaged GGUF file"):
        read_facts(path)


def test_a_file_that_names_no_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    del writer.kv_data[0]["general.architecture"]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match="names no architecture"):
        read_facts(tmp_path / "x.gguf")


def test_a_family_that_transformers_cannot_read_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "nosuchfamily")
    writer.add_tensor("token_embd.weight", torch.ones(3, 5).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match="nosuchfamily"):
        convert_gguf(tmp_path / "x.gguf", tmp_path / "folder")


def test_a_file_that_lacks_a_tensor_is_refused(
    make_gguf: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = gguf.GGUFWriter.add_tensor
    monkeypatch.setattr(
        gguf.GGUFWriter, "add_tensor", lambda s, name, *a, **k: None if "1.ffn_up" in name else write(s, name, *a, **k)
    )
    path, _ = make_gguf("llama")
    with pytest.raises(FormatError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        convert_gguf(path, tmp_path / "folder")


def test_a_plan_reads_the_header_alone(make_gguf: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = make_gguf("qwen2", kind="Q8_0")
    monkeypatch.setattr(source, "converted_folder", lambda path: pytest.fail(f"{path} is converted"))
    with path.open("r+b") as file:  # no value is read: those of all tensors are cut to one page of nothing
        size = path.stat().st_size
        file.truncate(size - 4096)
        file.truncate(size)
    config = config_of(str(path))
    assert (config.hidden_size, config.num_hidden_layers) == (model.config.hidden_size, model.config.num_hidden_layers)
    assert config.dtype == torch.bfloat16
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(FormatError, match="cut short"):
        config_of(str(path))
