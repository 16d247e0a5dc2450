"""Whole quantized files beside those that llama.cpp makes of the F32 file. Skips without cyllama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, LlamaFileType

from veneer.export.gguf.mix import MIXES
from veneer.export.gguf.model import GgufExport, GgufOptions, export_gguf

from .llama_cpp import llama
from .tiny import tiny_folder

BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped": ("mistral", {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 9}),
    "tied, odd width": ("qwen2", {"num_hidden_layers": 17, "hidden_size": 32, "intermediate_size": 256}),
    "eight experts": ("mixtral", {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}),
    "fused": ("gpt2", {"n_embd": 256, "n_inner": 96, "n_layer": 9}),
}
QUANTIZED = [name for name in MIXES if name not in ("F32", "BF16", "Q2_K_S")]


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and its F32 file."""
    path = tmp_path_factory.mktemp("base")
    family, changes = BASES[request.param]
    tiny_folder(path / "model", family, **changes)
    export_gguf(path / "model", path / "whole.gguf", GgufOptions(type="F32"))
    return path


@pytest.mark.parametrize("mix", QUANTIZED)
def test_types_order_and_keys_are_llama_quantize_s(base: Path, tmp_path: Path, mix: str) -> None:
    plan = GgufExport(base / "model", None, GgufOptions(type=mix)).plan
    theirs = quantized(base / "whole.gguf", tmp_path / "theirs.gguf", mix)
    assert [pair.key for pair in plan.pairs] == list(theirs.fields)[3:]
    assert [(spec.name, spec.kind) for spec in plan.specs] == [(t.name, t.tensor_type.name) for t in theirs.tensors]


def test_bytes_are_llama_quantize_s(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64}
    tiny_folder(tmp_path / "model", "mistral", **sizes)
    export_gguf(tmp_path / "model", tmp_path / "whole.gguf", GgufOptions(type="F32"))
    export_gguf(tmp_path / "model", tmp_path / "ours.gguf", GgufOptions(type="Q4_K_M"))
    theirs = quantized(tmp_path / "whole.gguf", tmp_path / "theirs.gguf", "Q4_K_M")
    for mine, other in zip(GGUFReader(tmp_path / "ours.gguf").tensors, theirs.tensors, strict=True):
        assert mine.data.tobytes() == other.data.tobytes(), mine.name


def quantized(whole: Path, target: Path, mix: str) -> GGUFReader:
    """A file as llama.cpp quantizes it."""
    params = llama.LlamaModelQuantizeParams()
    params.ftype = int(LlamaFileType(MIXES[mix].number))
    params.nthread = 2
    llama.model_quantize(str(whole), str(target), params)
    return GGUFReader(target)
