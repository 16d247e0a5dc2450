"""The tensors of an adapter's file: read at once into one piece of memory, and looked at for values that are none."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from veneer.disk.safetensors import read_all
from veneer.errors import FormatError
from veneer.store.adapter.files import read_headers, read_tensors, unusable


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_file({"a": torch.randn(3, 20), "b": torch.randn(17, 3)}, tmp_path / "adapter_model.safetensors")
    return tmp_path


def test_tensors_of_a_file_are_parts_of_one_piece_of_memory(tmp_path: Path) -> None:
    """But for those that do not lie on a multiple of their values' size; each is what safetensors reads."""
    header = {
        "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "astray": {"dtype": "F32", "shape": [1, 2], "data_offsets": [3, 11]},
        "five": {"dtype": "U8", "shape": [5], "data_offsets": [11, 16]},
        "none": {"dtype": "F32", "shape": [0, 7], "data_offsets": [16, 16]},
        "true": {"dtype": "F32", "shape": [2, 3], "data_offsets": [16, 40]},
    }
    text = json.dumps(header).encode()
    values = bytes(range(7, 10)) + torch.randn(2).numpy().tobytes() + bytes(5) + torch.randn(6).numpy().tobytes()
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + values)
    found, expected = read_tensors(tmp_path), load_file(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) and found[key].shape == expected[key].shape for key in expected)
    memory = {key: found[key].untyped_storage().data_ptr() for key in found if key != "none"}
    assert memory["odd"] == memory["five"] == memory["true"] != memory["astray"]
    path.write_bytes(len(b"{}").to_bytes(8, "little") + b"{}")
    assert read_tensors(tmp_path) == {}


def test_a_file_that_is_cut_while_it_is_read(folder: Path) -> None:
    headers = read_headers(folder)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    last = max(headers.values(), key=lambda tensor: tensor.start)
    with pytest.raises(FormatError, match=f"ends inside tensor '{re.escape(last.name)}'"):
        read_all(path, headers)


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_one_value_that_is_no_number_is_found_among_all(folder: Path, bad: float) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["b"][-1, -1] = bad
    save_file(tensors, path)
    assert unusable(read_tensors(folder)) == {"b": "holds NaN or infinity"}
    save_file(tensors | {"b": torch.full_like(tensors["b"], 3e38)}, path)
    assert unusable(read_tensors(folder)) == {}  # whose sum is infinite
