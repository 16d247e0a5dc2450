"""Writing checkpoints: safetensors and transformers read them, and a failure leaves everything as it was."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch import program
from veneer.errors import DiskError, FormatError
from veneer.store import checkpoint_writer
from veneer.store.checkpoint import Checkpoint
from veneer.store.checkpoint_writer import CheckpointWriter, plan_shards


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "a": torch.randn(11, 7, generator=generator),
        "b": torch.randn(13, 3, generator=generator).to(torch.bfloat16),
        "c": torch.arange(5),
        "d": torch.randn(17, generator=generator),
        "scalar": torch.tensor(2, dtype=torch.uint8),
        "empty": torch.zeros(0, 3),
    }


def specs(parts: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (t.dtype, tuple(t.shape)) for name, t in parts.items()}


def write(folder: Path, parts: dict[str, torch.Tensor], max_shard_bytes: int = 10**9, overwrite: bool = False) -> None:
    with CheckpointWriter(folder, specs(parts), max_shard_bytes=max_shard_bytes, overwrite=overwrite) as writer:
        for name in reversed(parts):
            writer.write(name, parts[name])


@pytest.mark.parametrize("max_shard_bytes", [10**9, 300, 1])
def test_safetensors_reads_what_was_written(tmp_path: Path, max_shard_bytes: int) -> None:
    parts = tensors()
    write(tmp_path / "out", parts, max_shard_bytes)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) == 1) == (max_shard_bytes == 10**9)
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert read.keys() == parts.keys()
    assert all(torch.equal(read[n], parts[n]) and read[n].dtype == parts[n].dtype for n in parts)
    assert {n: t.shape for n, t in Checkpoint.open(tmp_path / "out").tensors.items()} == {
        n: tuple(t.shape) for n, t in parts.items()
    }
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_index_is_that_of_transformers(tmp_path: Path) -> None:
    parts = tensors()
    write(tmp_path / "out", parts, 300)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in parts.values())
    assert index["weight_map"].keys() == parts.keys()


def test_shards_stay_below_the_limit_unless_one_tensor_is_larger() -> None:
    spec = {name: (torch.uint8, (n,)) for name, n in {"a": 60, "b": 41, "c": 59, "d": 300, "e": 1}.items()}
    assert list(plan_shards(spec, 100).values()) == [["a"], ["b", "c"], ["d"], ["e"]]


def test_a_transposed_tensor_is_written_as_it_reads(tmp_path: Path) -> None:
    part = torch.arange(35.0).reshape(5, 7).T
    write(tmp_path / "out", {"t": part})
    assert torch.equal(Checkpoint.open(tmp_path / "out").read("t"), part)


@pytest.mark.parametrize("part", [torch.arange(77.0).reshape(11, 7).T, torch.tensor(2.5), torch.ones(0, 3)])
def test_converted_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: torch.Tensor) -> None:
    monkeypatch.setattr(checkpoint_writer, "PIECE_VALUES", 23)
    part = part / 3
    with CheckpointWriter(tmp_path / "out", {"t": (torch.bfloat16, tuple(part.shape))}) as writer:
        writer.write("t", part, convert=True)
    read = Checkpoint.open(tmp_path / "out").read("t")
    assert read.dtype == torch.bfloat16
    assert torch.equal(read, part.to(torch.bfloat16))


def test_files_beside_the_weights(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", specs({"t": torch.ones(3)})) as writer:
        (writer.staging / "config.json").write_text("{}")
        writer.write("t", torch.ones(3))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("x", torch.ones(3), "not among"),
        ("t", torch.ones(4), r"announced as torch.float32 \(3,\)"),
        ("t", torch.ones(3).half(), "is torch.float16"),
    ],
)
def test_tensor_that_does_not_fit(tmp_path: Path, name: str, tensor: torch.Tensor, message: str) -> None:
    with (
        pytest.raises(FormatError, match=message),
        CheckpointWriter(tmp_path / "out", specs({"t": torch.ones(3)})) as writer,
    ):
        writer.write(name, tensor)
    assert list(tmp_path.iterdir()) == []


def write_twice(folder: Path) -> None:
    with CheckpointWriter(folder, specs({"t": torch.ones(3)})) as writer:
        writer.write("t", torch.ones(3))
        writer.write("t", torch.ones(3))


def test_tensor_written_twice(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="written already"):
        write_twice(tmp_path / "out")


def test_tensor_never_written(tmp_path: Path) -> None:
    parts = {"a": torch.ones(3), "b": torch.ones(2), "c": torch.ones(1)}
    message = r"2 tensors were announced and not written: \['a', 'b'\]"
    with pytest.raises(FormatError, match=message), CheckpointWriter(tmp_path / "out", specs(parts)) as writer:
        writer.write("c", parts["c"])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_kept_unless_asked(tmp_path: Path) -> None:
    write(tmp_path / "out", {"old": torch.ones(3)})
    with pytest.raises(FormatError, match="not empty"):
        write(tmp_path / "out", {"new": torch.ones(5)})
    assert list(Checkpoint.open(tmp_path / "out").tensors) == ["old"]
    write(tmp_path / "out", {"new": torch.ones(5)}, overwrite=True)
    assert list(Checkpoint.open(tmp_path / "out").tensors) == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_error_in_the_middle_leaves_the_old_folder(tmp_path: Path) -> None:
    write(tmp_path / "out", {"old": torch.ones(3)})
    new = specs({"new": torch.ones(5)})
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path / "out", new, overwrite=True):
        raise KeyboardInterrupt
    assert list(Checkpoint.open(tmp_path / "out").tensors) == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("call", ["posix_fallocate", "fsync"])
def test_full_disk(tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", {"old": torch.ones(3)})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full, raising=False)
    with pytest.raises(DiskError, match=r"No space left on device.*(Nothing was |is un)changed"):
        write(tmp_path / "out", tensors(), overwrite=True)
    assert list(Checkpoint.open(tmp_path / "out").tensors) == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_folder_that_cannot_be_renamed_into_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", {"old": torch.ones(3)})
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if Path(target).name == "out" and not self.name.endswith(".old"):
            raise OSError(errno.EACCES, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(DiskError, match="Permission denied"):
        write(tmp_path / "out", {"new": torch.ones(3)}, overwrite=True)
    assert list(Checkpoint.open(tmp_path / "out").tensors) == ["old"]


def test_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="file is a file, not a folder"):
        write(tmp_path / "file" / "out", {"t": torch.ones(3)})


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE as Linux enforces it")
def test_a_real_limit_on_file_size(tmp_path: Path) -> None:
    """The kernel refuses the bytes: the error is ours and the folder is as before."""
    script = f"""
import resource, signal, sys, torch
from pathlib import Path
from veneer.errors import DiskError
from veneer.store.checkpoint_writer import CheckpointWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
part = torch.ones(1 << 16)
try:
    with CheckpointWriter({str(tmp_path / "out")!r}, {{"t": (part.dtype, tuple(part.shape))}}) as writer:
        writer.write("t", part)
except DiskError as error:
    print("refused:", error)
"""
    result = program(script)
    assert result.returncode == 0, result.stderr
    assert "refused: writing 0.3 MB" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["config.json", "model.safetensors", "adapter/adapter_config.json"], "adapter"),
        (["adapter_config.json", "adapter_model.safetensors"], "adapter_config.json"),
        (["notes.txt"], "notes.txt"),
    ],
)
def test_only_the_folder_of_a_model_is_overwritten(tmp_path: Path, files: list[str], named: str) -> None:
    for name in files:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("kept")
    with pytest.raises(FormatError, match=f"holds '{named}'.*Choose another folder"):
        write(tmp_path / "run", tensors(), overwrite=True)
    assert all((tmp_path / "run" / name).read_text() == "kept" for name in files)
