"""Decoders of other libraries' formats, held bit for bit to the values that each library decodes itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from veneer.ops.ggml import dequantize_ggml
from veneer.ops.ggml_types import GGML_TYPES
from veneer.quant.ggml import GgmlSpec
from veneer.store.gguf.header import read_header
from veneer.store.quantized.readers import READERS

HERE = Path(__file__).parent / "quantized"
FILES = sorted(path.stem for path in HERE.glob("*.safetensors") if path.stem != "gguf")


def cases_of(library: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with safe_open(HERE / f"{library}.safetensors", "pt") as file:
        yield from json.loads(file.metadata()["cases"]).items()


CASES = [(library, name, case) for library in FILES for name, case in cases_of(library)]


@pytest.mark.parametrize(("library", "name", "case"), CASES, ids=[f"{library}: {name}" for library, name, _ in CASES])
def test_values_are_those_of_the_library(library: str, name: str, case: dict[str, Any]) -> None:
    """Read as a folder is: the settings tell the format, and the tensors the rest. Products see the same values."""
    held = load_file(HERE / f"{library}.safetensors")
    parts: dict[str, Tensor] = {
        key.removeprefix(f"{name}/"): value for key, value in held.items() if key.startswith(f"{name}/")
    }
    layers, shape = READERS[case["config"]["quant_method"]](case["config"]), tuple(case["shape"])
    path = "model.layers.0.mlp.down_proj"
    spec = layers.spec(path, shape, torch.float32) if len(shape) == 2 else layers.stack(path, shape, torch.float32)
    assert spec is not None
    bound, tensors = spec.from_disk(parts)
    weight = bound.bind(tensors)
    assert weight.shape == shape
    assert torch.equal(weight.dense(torch.float32).to(held[name].dtype), held[name])
    disk = bound.to_disk(tensors)
    matrices = {key: value for key, value in disk.items() if value.ndim}
    assert all(torch.equal(*(t.view(torch.uint8) for t in (value, parts[key]))) for key, value in matrices.items())
    one = weight if len(shape) == 2 else weight.expert(1)
    x = torch.randn(3, shape[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    expected = x @ one.dense(torch.float64).T
    assert (one.matmul(x.float()) - expected).norm() <= 1e-6 * expected.norm()


def test_values_are_those_of_gguf() -> None:
    expected = load_file(HERE / "gguf.safetensors")
    tensors = {tensor.name: tensor for tensor in read_header(HERE / "gguf.gguf").tensors}
    assert {f"{name}.weight" for name in expected} == tensors.keys()
    assert expected.keys() == {name for name, kind in GGML_TYPES.items() if kind.block > 1}
    data = (HERE / "gguf.gguf").read_bytes()
    for name, value in expected.items():
        tensor = tensors[f"{name}.weight"]
        assert (tensor.type, tensor.shape) == (name, tuple(value.shape))
        packed = torch.frombuffer(bytearray(data[tensor.start : tensor.start + tensor.n_bytes]), dtype=torch.uint8)
        rows = packed.view(len(value), -1)
        assert torch.equal(dequantize_ggml(rows, name), value), name
        spec = GgmlSpec((value.shape[0], value.shape[1]), name)
        assert torch.equal(spec.bind({"weight": rows}).dense(torch.float32), value), name
