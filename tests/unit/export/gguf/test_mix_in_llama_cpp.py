"""Whole quantized files beside those that llama.cpp makes of the F32 file. Skips without cyllama."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
from gguf import GGUFReader, LlamaFileType

from veneer.export.gguf.collect import CollectOptions, collect_importance
from veneer.export.gguf.mixes import MIXES
from veneer.export.gguf.model import GgufExport, GgufOptions, export_gguf
from veneer.store.gguf.importance import Importance, read_importance

from .llama_cpp import llama
from .tiny import tiny_folder, tokenizer

BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped": ("mistral", {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 9}),
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


@pytest.mark.parametrize("mix", ["Q4_0", "Q2_K_S", "Q3_K_M", "Q4_K_M", "IQ4_XS"])
def test_bytes_with_importance_are_llama_quantize_s(tmp_path: Path, mix: str) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 2}
    model = tiny_folder(tmp_path / "model", "qwen2_moe", **sizes)
    (tmp_path / "text.txt").write_text("the other inner one, 12 on 12; " * 20)
    file = tmp_path / "importance.gguf"
    collect_importance(model, tokenizer(), tmp_path / "text.txt", file, CollectOptions(chunk_size=16))
    export_gguf(tmp_path / "model", tmp_path / "whole.gguf", GgufOptions(type="F32"))
    export_gguf(tmp_path / "model", tmp_path / "ours.gguf", GgufOptions(type=mix, importance=file))
    theirs = quantized(tmp_path / "whole.gguf", tmp_path / "theirs.gguf", mix, read_importance(file))
    for mine, other in zip(GGUFReader(tmp_path / "ours.gguf").tensors, theirs.tensors, strict=True):
        assert mine.data.tobytes() == other.data.tobytes(), mine.name


class _Entry(ctypes.Structure):
    """llama.h's ``llama_model_imatrix_data``; a list of them ends with one without a name."""

    _fields_: ClassVar = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t)]


def quantized(whole: Path, target: Path, mix: str, importance: Importance | None = None) -> GGUFReader:
    """A file as llama.cpp quantizes it."""
    params = llama.LlamaModelQuantizeParams()
    params.ftype = int(LlamaFileType(MIXES[mix].number))
    means = {} if importance is None else {name: values.numpy() for name, values in importance.means.items()}
    entries = [_Entry(name.encode(), values.ctypes.data, values.size) for name, values in means.items()]
    ended = (_Entry * (len(entries) + 1))(*entries)
    if importance is not None:
        _set_importance(params, ctypes.addressof(ended))
    params.nthread = 2
    llama.model_quantize(str(whole), str(target), params)
    return GGUFReader(target)


def _set_importance(params: Any, address: int) -> None:
    """Into llama.h's ``llama_model_quantize_params``, 24 bytes behind nthread: cyllama 0.2.18 has no setter for it."""
    params.nthread = mark = 123_456
    here = id(params)
    start = ctypes.string_at(here, 256).index(mark.to_bytes(4, sys.byteorder))
    ctypes.c_void_p.from_address(here + start + 24).value = address
