"""Reading checkpoints: what safetensors and transformers write comes back bit by bit, and damage is named."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from veneer.disk.safetensors import DTYPES
from veneer.errors import FormatError
from veneer.store.checkpoint import Checkpoint, is_finite


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "a.weight": torch.randn(13, 7, generator=generator).to(torch.bfloat16),
        "a.bias": torch.randn(13, generator=generator),
        "b.weight": torch.randn(5, 3, 2, generator=generator).half(),
        "c": torch.tensor(3, dtype=torch.uint8),
        "d": torch.arange(11, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
    }


def damaged(path: Path, header: dict[str, object], data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def sharded(folder: Path) -> dict[str, torch.Tensor]:
    """Two shards with an index, as transformers lays them out."""
    parts = tensors()
    names = list(parts)
    files = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for file, members in files.items():
        save_file({n: parts[n] for n in members}, folder / file)
    weight_map = {n: file for file, members in files.items() for n in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return parts


def edit_index(folder: Path, **changes: str) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] |= changes
    index.write_text(json.dumps(content))


@pytest.mark.parametrize("as_folder", [True, False])
def test_single_file_comes_back_bit_by_bit(tmp_path: Path, as_folder: bool) -> None:
    parts = tensors()
    save_file(parts, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path if as_folder else tmp_path / "model.safetensors")
    assert checkpoint.tensors.keys() == parts.keys()
    for name, tensor in checkpoint.stream():
        assert tensor.dtype == parts[name].dtype
        assert torch.equal(tensor, parts[name])
    assert checkpoint.nbytes == sum(t.nbytes for t in parts.values())


def test_sharded_comes_back_bit_by_bit(tmp_path: Path) -> None:
    parts = sharded(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.tensors.keys() == parts.keys()
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in parts.items())


@pytest.mark.parametrize("dtype", [d for d in DTYPES.values() if d not in (torch.uint16, torch.uint32, torch.uint64)])
def test_every_dtype_of_the_format(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(1, 8).to(dtype)
    save_file({"t": tensor}, tmp_path / "model.safetensors")
    read = Checkpoint.open(tmp_path).read("t")
    assert read.dtype == dtype
    assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))


def test_unknown_tensor(tmp_path: Path) -> None:
    sharded(tmp_path)
    with pytest.raises(FormatError, match=r"no tensor 'x.weight'"):
        Checkpoint.open(tmp_path).read("x.weight")


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="holds neither"):
        Checkpoint.open(tmp_path)


def test_file_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="does not exist"):
        Checkpoint.from_files([tmp_path / "x.safetensors"])


@pytest.mark.parametrize("keep", [3, 8, 40, -1])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:keep])
    told = f"the checkpoint in {tmp_path} cannot be used: model.safetensors: it "
    with pytest.raises(FormatError, match=rf"^{re.escape(told)}.*(truncated|too short)"):
        Checkpoint.open(tmp_path)


def test_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    save_file({"t": torch.ones(17)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(FormatError, match="ends inside tensor 't'"):
        checkpoint.read("t")


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "n_bytes", "message"),
    [
        ({"t": {**F32, "data_offsets": [0, 12]}}, 12, "takes 8 bytes"),
        ({"t": {**F32, "data_offsets": [8, 0]}}, 8, "data_offsets"),
        ({"t": {**F32, "data_offsets": [-8, 0]}}, 8, "data_offsets"),
        ({"t": {**F32, "data_offsets": "all"}}, 8, "data_offsets"),
        ({"t": {**F32, "dtype": "F31"}}, 8, "dtype 'F31'"),
        ({"t": {**F32, "shape": [-2]}}, 8, "shape"),
        ({"t": {**F32, "shape": 2}}, 8, "shape"),
        ({"t": {"dtype": "F32"}}, 8, "lacks one of"),
        ({"t": 3}, 8, "lacks one of"),
        ({"t": F32, "u": F32}, 8, "overlaps"),
        ({"t": {**F32, "data_offsets": [4, 12]}}, 12, "leaves a gap of 4"),
        ({"t": F32}, 12, "no tensor owns"),
        ({"t": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, 8, "truncated"),
    ],
)
def test_header_that_lies(tmp_path: Path, header: dict[str, object], n_bytes: int, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Checkpoint.open(damaged(tmp_path / "model.safetensors", header, bytes(n_bytes)))


@pytest.mark.parametrize(
    ("text", "message"), [(b"{not json", "not JSON"), (b"[1, 2]", "is a list"), (b"\xff\xfe", "not JSON")]
)
def test_header_that_is_no_table(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(FormatError, match=message):
        Checkpoint.open(path)


def test_name_given_twice(tmp_path: Path) -> None:
    entry = '"t": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}'
    text = f"{{{entry}, {entry}}}".encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"x")
    with pytest.raises(FormatError, match="names 't' twice"):
        Checkpoint.open(path)


def test_all_problems_of_all_shards_in_one_error(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    edit_index(tmp_path, **{"x.weight": "../x.safetensors", "lost": "model-00001-of-00002.safetensors"})
    with pytest.raises(FormatError) as caught:
        Checkpoint.open(tmp_path)
    absent = "'model-00002-of-00002.safetensors' is missing"
    for message in ("lies outside the folder", absent, "tensor 'lost' is not in"):
        assert message in str(caught.value)


@pytest.mark.parametrize("path", ["/etc/passwd", "../../x", "a/../../x", "..\\x", "c:x"])
def test_index_that_leaves_the_folder(tmp_path: Path, path: str) -> None:
    sharded(tmp_path)
    edit_index(tmp_path, **{"a.weight": path})
    with pytest.raises(FormatError, match="lies outside the folder"):
        Checkpoint.open(tmp_path)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    save_file({"t": torch.ones(3)}, tmp_path / "one.safetensors")
    save_file({"t": torch.ones(3)}, tmp_path / "two.safetensors")
    with pytest.raises(FormatError, match=r"is in one.safetensors and in two.safetensors"):
        Checkpoint.from_files([tmp_path / "one.safetensors", tmp_path / "two.safetensors"])


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"t": 3}}'])
def test_damaged_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(FormatError, match="index"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_values_that_are_not_finite_are_all_named(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    bad = torch.ones(3, 5)
    bad[1, 2] = value
    save_file({"good": torch.ones(2), "p": bad.to(dtype), "q": bad.to(dtype).clone()}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(FormatError, match=r"'p' holds .*; tensor 'q' holds"):
        list(checkpoint.stream())
    with pytest.raises(FormatError, match="not finite"):
        checkpoint.read("p")


def test_a_sum_that_overflows_is_no_damage() -> None:
    assert is_finite(torch.full((11,), 3e38))
    assert is_finite(torch.full((70_001,), 6e4).half())


@settings(max_examples=60)
@given(data=st.data())
def test_any_change_of_a_header_byte_is_an_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """No damage to the header makes the reader crash or hand out bytes outside the file."""
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    save_file(tensors(), path)
    content = bytearray(path.read_bytes())
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header_end - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        checkpoint = Checkpoint.open(path)
        for stored in checkpoint.tensors.values():
            assert stored.read().nbytes == stored.nbytes
    except FormatError:
        pass
