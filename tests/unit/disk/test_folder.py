"""Folders that are whole or absent."""

from __future__ import annotations

import errno
import glob
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from patience import PATIENCE
from veneer.disk.folder import build_once, drop_folder, drop_leftovers, new_folder
from veneer.errors import DiskError

RACER = """
import sys, time
from pathlib import Path
from veneer.disk.folder import build_once

root = Path(sys.argv[1])

def build(scratch):
    with (root / "log").open("a") as log:
        log.write("built\\n")
    time.sleep(0.5)
    (scratch / "weights").write_text("whole")

folder = build_once(root / "model", Path.is_dir, build)
assert (folder / "weights").read_text() == "whole"
"""

WRITER = """
import sys, time
from pathlib import Path
from veneer.disk.folder import new_folder

with new_folder(Path(sys.argv[1])) as scratch:
    (scratch / "half").touch()
    time.sleep(60)
"""


def test_a_new_folder_appears_only_when_whole(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as scratch:
        (scratch / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_being_removed_no_longer_stands_under_its_name(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").touch()
    with monkeypatch.context() as killed:
        killed.setattr("veneer.disk.folder.shutil.rmtree", lambda *_, **__: None)
        drop_folder(tmp_path / "out")
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".out.partial-")
    drop_folder(tmp_path / "out")  # which is not there
    drop_leftovers(tmp_path, "out")
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "out") as scratch:
        (scratch / "no" / "folder").write_text("1")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_gives_way_to_the_whole_new_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("kept")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out"):
        raise RuntimeError
    assert (tmp_path / "out" / "old").read_text() == "kept"
    with new_folder(tmp_path / "out") as scratch:
        (scratch / "new").write_text("1")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_old_folder_comes_back_where_the_swap_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("kept")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.startswith(".out") and not self.name.endswith(".old"):
            raise OSError("the disk went away")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="went away"), new_folder(tmp_path / "out") as scratch:
        (scratch / "new").write_text("1")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        Exception("No space left on device (os error 28)"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/0"),
    ],
    ids=["python", "tokenizers", "safetensors", "torch"],
)
def test_a_full_disk_is_told_in_whatever_words(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(DiskError, match=r"out could not be written .*make room"), new_folder(tmp_path / "out"):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_processes_that_race_build_once(tmp_path: Path) -> None:
    racers = [subprocess.Popen([sys.executable, "-c", RACER, str(tmp_path)]) for _ in range(3)]
    assert [racer.wait(PATIENCE) for racer in racers] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "built\n"


def test_what_a_crashed_process_left_is_removed(tmp_path: Path) -> None:
    leftover = tmp_path / ".model.partial-123-abc"
    leftover.mkdir()
    (leftover / "half").write_text("x")
    build_once(tmp_path / "model", Path.is_dir, lambda scratch: None)
    assert not leftover.exists()


def test_a_folder_that_is_not_whole_is_built_anew(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    folder = build_once(tmp_path / "model", lambda f: (f / "w").exists(), lambda s: (s / "w").touch())
    assert (folder / "w").exists()


def settled_writer(target: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """A process in the middle of writing ``target``, and its scratch folder, made to look a minute old."""
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(target)])
    while not (found := list(target.parent.glob(f".{glob.escape(target.name)}.partial-*/half"))):
        assert writer.poll() is None
        time.sleep(0.02)
    os.utime(found[0].parent, (time.time() - 60,) * 2)
    return writer, found[0].parent


@pytest.mark.skipif(os.name != "posix", reason="folders are locked on POSIX systems only")
def test_the_next_writer_clears_what_a_killed_one_left_and_nothing_of_a_live_one(tmp_path: Path) -> None:
    target = tmp_path / "model [v1.5]"
    writer, scratch = settled_writer(target)
    try:
        with new_folder(target):
            pass
        assert scratch.exists()
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    other = tmp_path / ".model.partial-123-abc"
    other.mkdir()
    with new_folder(target) as mine:
        assert {path for path in tmp_path.iterdir() if path.name.startswith(".")} == {mine, other}


@pytest.mark.skipif(os.name != "posix", reason="folders are locked on POSIX systems only")
def test_an_old_folder_that_a_killed_process_had_moved_aside_comes_back(tmp_path: Path) -> None:
    target, scratch = tmp_path / "model", tmp_path / ".model.partial-123-abc"
    scratch.mkdir()
    os.utime(scratch, (time.time() - 60,) * 2)
    old = tmp_path / f"{scratch.name}.old"
    old.mkdir()
    (old / "weights").write_text("old")
    with pytest.raises(KeyError), new_folder(target):
        raise KeyError
    assert (target / "weights").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("place", ["blocked", "blocked/model", "blocked/deeper/model"])
@pytest.mark.parametrize("kind", ["a file", "a link to nowhere"])
def test_what_stands_in_the_way_of_a_folder_is_named_and_stays(tmp_path: Path, place: str, kind: str) -> None:
    blocked = tmp_path / "blocked"
    if kind == "a file":
        blocked.write_text("mine")
    else:
        blocked.symlink_to(tmp_path / "nowhere")
    for enter in (
        lambda: new_folder(tmp_path / place).__enter__(),
        lambda: build_once(tmp_path / place, Path.is_dir, print),
    ):
        with pytest.raises(DiskError, match=rf"{place} cannot be made: .*blocked is {kind}, not a folder"):
            enter()
    assert [path.name for path in tmp_path.iterdir()] == ["blocked"]


def test_what_a_link_leads_to_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "disk" / "real" / "old").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    with new_folder(tmp_path / "link") as scratch:
        (scratch / "new").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert [p.name for p in (tmp_path / "disk" / "real").iterdir()] == ["new"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "link"]
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["real"]
