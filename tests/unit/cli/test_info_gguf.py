"""`veneer info` of GGUF files: models and adapters, from the header alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from typer.testing import Result

Veneer = Callable[..., Result]


def section(result: Result) -> dict[str, str]:
    assert result.exit_code == 0, result.output
    pairs = (line.strip().split("  ", 1) for line in result.stdout.splitlines() if line.strip())
    return {pair[0]: pair[-1].strip() for pair in pairs}


def test_a_model_is_told_without_being_converted(
    veneer: Veneer, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.gguf"
    assert veneer("export", "gguf", model_folder, "-o", file, "--type", "F16", "--name", "tiny").exit_code == 0
    monkeypatch.setattr("veneer.store.gguf.model.convert_gguf", lambda *_: pytest.fail("it is converted"))
    facts = section(veneer("info", file))
    assert (facts["holds"], facts["name"], facts["family"]) == ("a model", "tiny", "llama")
    assert (facts["context"], facts["width"], facts["layers"], facts["feed-forward width"]) == ("131", "48", "2", "61")
    assert (facts["attention heads"], facts["key/value heads"], facts["rotary theta"]) == ("3", "1", "10,000")
    assert facts["tied embeddings"] == "False"
    assert facts["vocabulary"] == "260"
    assert facts["tokenizer"].startswith("gpt2 (")
    assert facts["chat template"].startswith("yes, ")
    norms, n_matrices = 5 * 48, 2 * (2 * 48 * 48 + 2 * 48 * 16 + 3 * 48 * 61) + 2 * 260 * 48
    assert facts["parameters"] == f"{n_matrices + norms:,}"
    assert facts["type"] == "F16"
    assert facts["F16"].startswith(f"16 tensors, {n_matrices:,} parameters, ")
    assert facts["F32"].startswith(f"5 tensors, {norms:,} parameters, ")
    bits = (16 * n_matrices + 32 * norms) / (n_matrices + norms)
    assert facts["size"] == f"{file.stat().st_size / 1e6:.1f} MB, {bits:.2f} bits a parameter"
    told = json.loads(veneer("info", file, "--json").stdout)
    assert told["keys"]["tokenizer.ggml.tokens"] == 260
    assert told["types"]["F16"]["tensors"] == 16


def test_an_adapter(veneer: Veneer, model_folder: Path, adapter_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    assert veneer("export", "lora", adapter_folder, "-o", file, "--base", model_folder).exit_code == 0
    facts = section(veneer("info", file))
    assert (facts["holds"], facts["base"], facts["r"]) == ("an adapter (lora)", model_folder.name, "3")
    assert facts["modules"] == "4 (attn_q, ffn_up)"
    assert facts["parameters"] == f"{2 * (3 * (48 + 48) + 3 * (48 + 61)):,}"
    assert "vocabulary" not in facts


def test_an_importance_matrix(veneer: Veneer, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "")
    writer.add_type("imatrix")
    writer.add_tensor("blk.0.attn_q.weight.in_sum2", np.ones(7, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert section(veneer("info", tmp_path / "x.gguf"))["holds"] == "an importance matrix"


def test_a_part_of_several_says_so(veneer: Veneer, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_uint16("split.no", 1)
    writer.add_uint16("split.count", 3)
    writer.add_array("llama.attention.head_count_kv", [5, 7, 5])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    facts = section(veneer("info", tmp_path / "x.gguf"))
    assert (facts["part"], facts["type"], facts["tokenizer"]) == ("2 of 3", "not told", "none in the file")
    assert facts["key/value heads"] == "5 (×2), 7 (×1)"


def test_a_damaged_file_is_one_message(veneer: Veneer, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03")
    result = veneer("info", tmp_path / "x.gguf")
    assert (result.exit_code, "perhaps cut short" in result.stderr) == (2, True)
