"""Names of models that lie in a cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from veneer.disk.known_name import known_name


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    (tmp_path / "real" / "models" / "tiny").mkdir(parents=True)
    converted = tmp_path / "real" / "gguf" / "x-0f3a"
    converted.mkdir(parents=True)
    (converted / "veneer.json").write_text(json.dumps({"name": "x.gguf@sha256:00ff", "conversion": 3}))
    (tmp_path / "real" / "gguf" / "old-0f3a").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "real")
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_path_into_veneers_cache(cache: Path) -> None:
    assert known_name(f"{cache}/models/tiny") == "tiny"
    assert known_name(f"{cache.resolve()}/models/tiny/") == "tiny"
    assert known_name(f"{cache}/gguf/x-0f3a") == "x.gguf@sha256:00ff"
    assert known_name(f"{cache}/gguf/old-0f3a") == f"{cache}/gguf/old-0f3a"  # nobody wrote down what it is


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("/home/ann/.cache/veneer/models/tiny-1.5b", "tiny-1.5b"),
        ("/Users/ann/Library/Caches/veneer/models/tiny/", "tiny"),
        ("C:\\Users\\ann\\AppData\\Local\\veneer\\models\\tiny", "tiny"),
        ("/home/ann/.cache/huggingface/hub/models--org--some--name/snapshots/0f3a", "org/some--name"),
        ("/data/hub/models--gpt2/snapshots/0f3a/", "gpt2"),
        ("/home/ann/veneer/models/tiny/checkpoint-5", None),
        ("/home/ann/models/tiny", None),
        ("org/name", None),
        ("tiny", None),
        ("/" + "x" * 256, None),  # too long for a name of a file
    ],
)
def test_other_machines_paths(cache: Path, given: str, name: str | None) -> None:
    assert known_name(given) == (name or given)


def test_a_folder_of_ones_own_keeps_its_path(cache: Path, tmp_path: Path) -> None:
    own = tmp_path / "veneer" / "models" / "mine"
    own.mkdir(parents=True)
    assert known_name(str(own)) == str(own)
