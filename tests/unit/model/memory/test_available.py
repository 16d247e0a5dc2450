"""Memory that may still be taken: the machine's and that of control groups."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from veneer.model.memory import available
from veneer.model.memory.available import available_bytes, group_rooms


def group(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def test_groups_of_version_2_count_up_to_the_topmost(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("0::/outer/inner\n")
    root = tmp_path / "fs"
    group(root, {"memory.stat": "inactive_file 5\n"})  # the topmost has no limit
    group(
        root / "outer", {"memory.max": "700\n", "memory.current": "500\n", "memory.stat": "anon 1\ninactive_file 41\n"}
    )
    group(root / "outer/inner", {"memory.max": "max\n", "memory.current": "400\n", "memory.stat": "inactive_file 3\n"})
    assert list(group_rooms(tmp_path / "cgroup", root)) == [700 - 500 + 41]


def test_groups_of_version_1_and_a_group_over_its_limit(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("8:pids:/x\n4:cpu,memory:/box\n0::/nowhere\n")
    root = tmp_path / "fs"
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    group(root / "memory", dict(zip(names, ("9000\n", "2000\n", "total_inactive_file 300\n"), strict=True)))
    group(root / "memory/box", dict(zip(names, ("100\n", "170\n", "total_inactive_file 20\n"), strict=True)))
    assert list(group_rooms(tmp_path / "cgroup", root)) == [0, 9000 - 2000 + 300]


def test_the_smallest_room_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "PROC", tmp_path / "none")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1234})())
    assert available_bytes(torch.device("cpu")) == 1234
    (tmp_path / "cgroup").write_text("0::/\n")
    group(tmp_path / "fs", {"memory.max": "900", "memory.current": "800", "memory.stat": "inactive_file 7"})
    monkeypatch.setattr(available, "PROC", tmp_path / "cgroup")
    monkeypatch.setattr(available, "CGROUPS", tmp_path / "fs")
    assert available_bytes(torch.device("cpu")) == 107
