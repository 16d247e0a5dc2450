"""GGUF files are written whole, in any order, or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFValueType

from veneer.errors import DiskError, FormatError
from veneer.store.gguf.keys import KeyValue
from veneer.store.gguf.writer import GgufFileWriter, TensorSpec, file_nbytes

PAIRS = [
    KeyValue("general.architecture", "llama", GGUFValueType.STRING),
    KeyValue("llama.block_count", 3, GGUFValueType.UINT32),
    KeyValue("llama.names", ["a", "", "ü"], GGUFValueType.ARRAY, GGUFValueType.STRING),
    KeyValue("llama.empty", "", GGUFValueType.STRING),
]
SPECS = [TensorSpec("a.weight", "F32", (3, 7)), TensorSpec("b.weight", "Q8_0", (5, 64)), TensorSpec("c", "F16", (11,))]
VALUES = {
    "a.weight": torch.arange(21.0).view(3, 7),
    "b.weight": torch.from_numpy(gguf.quants.quantize(np.linspace(-3, 3, 320, dtype="f").reshape(5, 64), 8)),
    "c": torch.arange(11.0).half(),
}


def write(target: Path, **options: object) -> GgufFileWriter:
    writer = GgufFileWriter(target, PAIRS, SPECS, **options)  # type: ignore[arg-type]
    with writer:
        for name in ("c", "b.weight", "a.weight"):
            writer.write(name, torch.split(VALUES[name], 2))
    return writer


def write_twice(writer: GgufFileWriter) -> None:
    for _ in range(2):
        writer.write("c", [VALUES["c"]])


def check(path: Path, names: list[str]) -> GGUFReader:
    reader = GGUFReader(path)
    assert [tensor.name for tensor in reader.tensors] == names
    for tensor in reader.tensors:
        assert tensor.data_offset % 32 == 0
        assert tensor.data.tobytes() == VALUES[tensor.name].numpy().tobytes()
        spec = next(spec for spec in SPECS if spec.name == tensor.name)
        assert tuple(reversed(tensor.shape.tolist())) == spec.shape
        assert tensor.tensor_type.name == spec.kind
    return reader


def test_tensors_come_in_any_order_and_the_size_is_known_before(tmp_path: Path) -> None:
    writer = write(tmp_path / "x.gguf")
    reader = check(tmp_path / "x.gguf", [spec.name for spec in SPECS])
    assert {pair.key: pair.value for pair in PAIRS} == {pair.key: reader.fields[pair.key].contents() for pair in PAIRS}
    assert writer.nbytes == (tmp_path / "x.gguf").stat().st_size == file_nbytes(PAIRS, SPECS)
    assert os.listdir(tmp_path) == ["x.gguf"]


def test_parts_are_named_and_numbered_as_llama_cpp_finds_them(tmp_path: Path) -> None:
    write(tmp_path / "x.gguf", max_part_bytes=400)
    names = [f"x-0000{number}-of-00002.gguf" for number in (1, 2)]
    assert sorted(os.listdir(tmp_path)) == names
    first = check(tmp_path / names[0], ["a.weight"])
    second = check(tmp_path / names[1], ["b.weight", "c"])
    for number, reader in enumerate((first, second)):
        found = [reader.fields[f"split.{key}"].contents() for key in ("no", "count", "tensors.count")]
        assert found == [number, 2, 3]
    assert "llama.block_count" in first.fields
    assert "llama.block_count" not in second.fields


def test_nothing_is_left_of_a_file_that_failed_and_the_old_one_stays(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"old")
    with (
        pytest.raises(FormatError, match="written already"),
        GgufFileWriter(tmp_path / "x.gguf", PAIRS, SPECS, overwrite=True) as writer,
    ):
        write_twice(writer)
    assert os.listdir(tmp_path) == ["x.gguf"]
    assert (tmp_path / "x.gguf").read_bytes() == b"old"


def test_what_a_killed_process_left_goes_with_the_next_run(tmp_path: Path) -> None:
    (tmp_path / ".x.gguf.partial-999999999-abcd").write_bytes(b"half")
    (tmp_path / f".x.gguf.partial-{os.getpid()}-abcd").write_bytes(b"at work")
    write(tmp_path / "x.gguf")
    assert sorted(os.listdir(tmp_path)) == [f".x.gguf.partial-{os.getpid()}-abcd", "x.gguf"]


def test_leftovers_of_a_name_with_brackets_go_and_those_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / ".x[12].gguf.partial-999999999-abcd").write_bytes(b"half")
    (tmp_path / ".x1.gguf.partial-999999999-abcd").write_bytes(b"another's")
    write(tmp_path / "x[12].gguf")
    assert sorted(os.listdir(tmp_path)) == [".x1.gguf.partial-999999999-abcd", "x[12].gguf"]


def test_overwriting_with_other_parts_leaves_no_old_ones(tmp_path: Path) -> None:
    others = ["x-00001-of-2.gguf", "x-y-00001-of-00002.gguf", "x.gguf.txt"]
    for name in others:
        (tmp_path / name).write_bytes(b"another's")
    for limit, n_parts in ((None, 1), (400, 2), (100, 3), (None, 1)):
        writer = write(tmp_path / "x.gguf", max_part_bytes=limit, overwrite=True)
        assert len(writer.paths) == n_parts
        assert sorted(os.listdir(tmp_path)) == sorted([*others, *(path.name for path in writer.paths)])


def test_old_parts_stay_where_writing_fails_or_overwriting_is_not_asked_for(tmp_path: Path) -> None:
    old = write(tmp_path / "x.gguf", max_part_bytes=400).paths
    with (
        pytest.raises(FormatError, match="not written"),
        GgufFileWriter(tmp_path / "x.gguf", PAIRS, SPECS, overwrite=True),
    ):
        pass
    write(tmp_path / "x.gguf")
    assert all(path.is_file() for path in old)


def test_what_is_new_and_what_is_old_is_told_where_a_part_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = write(tmp_path / "x.gguf").paths
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        if target.name.startswith("x-00002"):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(DiskError, match=r"Only x-00001-of-00002\.gguf is new.* not whole.*--force") as refusal:
        write(tmp_path / "x.gguf", max_part_bytes=400, overwrite=True)
    assert "Nothing was changed" not in str(refusal.value)
    assert sorted(os.listdir(tmp_path)) == ["x-00001-of-00002.gguf", old[0].name]


def test_a_full_disk_is_told_before_any_work_with_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, start: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskError, match=r"to .*x\.gguf failed: No space left.* free\).*Nothing was changed"):
        write(tmp_path / "x.gguf")
    assert os.listdir(tmp_path) == []


def test_a_target_that_is_there_is_kept_unless_overwriting_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "x.gguf")
    with pytest.raises(FormatError, match=r"x\.gguf is there already: .*--force"):
        write(tmp_path / "x.gguf")
    write(tmp_path / "x.gguf", overwrite=True)
    with pytest.raises(FormatError, match="is a folder"):
        write(tmp_path, overwrite=True)


def test_tensors_that_do_not_fit_what_was_announced_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(FormatError, match="announced with 84 bytes and has 44"),
        GgufFileWriter(tmp_path / "x.gguf", PAIRS, SPECS) as writer,
    ):
        writer.write("a.weight", [torch.zeros(11)])
    with (
        pytest.raises(FormatError, match="'d' is not among the tensors announced"),
        GgufFileWriter(tmp_path / "x.gguf", PAIRS, SPECS) as writer,
    ):
        writer.write("d", [torch.zeros(11)])
    with (
        pytest.raises(FormatError, match=r"2 tensors were announced and not written: \['b.weight', 'c'\]"),
        GgufFileWriter(tmp_path / "x.gguf", PAIRS, SPECS) as writer,
    ):
        writer.write("a.weight", [VALUES["a.weight"]])
    assert os.listdir(tmp_path) == []
