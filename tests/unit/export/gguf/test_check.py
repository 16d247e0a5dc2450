"""Files are looked at whole: what would go wrong in a runtime is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from typer.testing import CliRunner

from veneer.cli.app import app
from veneer.errors import FormatError
from veneer.export.gguf.check import check_file
from veneer.export.gguf.model import GgufOptions, export_gguf

from .test_read_back import rewritten
from .tiny import tiny_folder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tiny_folder(tmp_path / "model", "llama")
    export_gguf(tmp_path / "model", tmp_path / "x.gguf", GgufOptions(type="Q8_0"))
    return tmp_path / "x.gguf"


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["export", "check", *map(str, arguments)])


def test_a_good_file_has_no_problem(file: Path) -> None:
    report = check_file(file)
    assert report.problems == ()
    assert report.facts["architecture"] == "llama"
    assert report.facts["end of a turn"] == "<|end|>"
    assert report.facts["tensors"].startswith("22 Q8_0, 8 F32")


def test_values_that_are_not_finite_are_named(file: Path) -> None:
    tensor = next(t for t in GGUFReader(file).tensors if t.name == "blk.1.ffn_up.weight")
    data = bytearray(file.read_bytes())
    data[tensor.data_offset : tensor.data_offset + 2] = np.float16("nan").tobytes()
    file.write_bytes(data)
    assert check_file(file).problems == ("blk.1.ffn_up.weight holds values that are not finite",)


@pytest.mark.parametrize(
    ("pairs", "problem"),
    [
        ({"tokenizer.ggml.tokens": [f"t{i}" for i in range(270)]}, "270 tokens and 271 rows"),
        ({"tokenizer.ggml.tokens": ["<|end|>", *["t"] * 270]}, "the tokens ['t'] occur several times"),
        ({"tokenizer.ggml.pre": None}, "names no pre-tokenizer"),
        ({"tokenizer.ggml.tokens": None}, "no vocabulary"),
        ({"tokenizer.ggml.eot_token_id": None, "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}<x>"
          "{% endfor %}"}, "followed by '<x>', at which the runtime does not stop"),
        ({"tokenizer.chat_template": "{{ raise_exception('no') }}"}, "does not render: no"),
        ({"tokenizer.ggml.bos_token_id": 1, "tokenizer.chat_template":
          "<|user|><|user|>{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"}, "two BOS"),
    ],
)  # fmt: skip
def test_what_a_runtime_would_do_wrong_is_told(file: Path, pairs: dict[str, Any], problem: str) -> None:
    rewritten(file, file.with_name("y.gguf"), pairs=pairs)
    problems = check_file(file.with_name("y.gguf")).problems
    assert any(problem in each for each in problems)


@pytest.mark.parametrize(
    ("front", "flag", "told"),
    [
        ("<|user|>", True, "in the template, and by the flag: llama.cpp takes one"),
        ("<|user|>", False, "in the template"),
        ("", True, "by the flag"),
        ("", False, "none"),
    ],
)
def test_it_is_told_where_a_chat_has_its_bos_from(file: Path, front: str, flag: bool, told: str) -> None:
    template = front + "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    pairs = {
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.add_bos_token": flag,
        "tokenizer.chat_template": template,
    }
    rewritten(file, file.with_name("y.gguf"), pairs=pairs)
    report = check_file(file.with_name("y.gguf"))
    assert (report.facts["BOS of a chat"], report.problems) == (told, ())


def test_parts_are_read_together_and_a_missing_one_is_told(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model", "llama")
    options = GgufOptions(type="F32", max_part_bytes=500_000)
    report = export_gguf(tmp_path / "model", tmp_path / "x.gguf", options)
    assert len(report.paths) > 1
    assert check_file(report.paths[0]).problems == ()
    whole = report.paths[1].read_bytes()
    for n_bytes in (10, 5000):
        report.paths[1].write_bytes(whole[:n_bytes])
        with pytest.raises(FormatError, match=r"x-00002-of.* is a damaged GGUF file, perhaps cut short"):
            check_file(report.paths[0])
    report.paths[1].unlink()
    with pytest.raises(FormatError, match=r"is one part of \d; missing: x-00002-of"):
        check_file(report.paths[0])


def test_the_command_compares_with_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    tiny_folder(tmp_path / "model", "llama")
    file = tmp_path / "x.gguf"
    export_gguf(tmp_path / "model", file, GgufOptions(type="F32"))  # in eight bits, nearly tied tokens change places
    done = run(file, "--model", tmp_path / "model")
    assert done.exit_code == 0, done.stderr
    assert "16 of 16 are the model's" in done.stdout
    assert done.stdout.endswith(
        f"{file} is as it should be: half or more of its greedy tokens are those of {tmp_path / 'model'}\n"
    )
    assert run(file).stdout.endswith(f"{file} is as it should be\n")
    tiny_folder(tmp_path / "other", "llama", rms_norm_eps=0.9)
    wrong = run(file, "--model", tmp_path / "other")
    assert wrong.exit_code == 2
    assert "greedy tokens are the model's" in " ".join(wrong.stderr.split())
    assert "--adapter is given without --model: add --model" in run(file, "--adapter", tmp_path).stderr
    assert "no file" in run(tmp_path / "none.gguf").stderr
