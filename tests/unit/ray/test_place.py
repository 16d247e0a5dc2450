"""Places to train on: which there are, and which cannot be used."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from veneer.cli.app import app
from veneer.errors import ConfigError
from veneer.ray.place import RayCluster, place_of, require_ray


def test_the_words_for_a_cluster() -> None:
    assert place_of("ray") == RayCluster()
    assert place_of("ray:4") == RayCluster(n_workers=4)
    assert place_of("ray:2-4") == RayCluster(n_workers=4, least=2)
    assert place_of("ray://head:10001") == RayCluster(address="ray://head:10001")
    for word in ("rey", "ray:0", "ray:x", "ray://head", "ray:4:4", "ray:4-2", "ray:0-2", "ray:2-", ""):
        with pytest.raises(ConfigError, match=r"is no place to train on: it is ray, ray:N .*ray:M-N"):
            place_of(word)


@pytest.fixture
def silent() -> str:
    """An address that nothing listens at."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


def test_an_address_must_answer(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())  # as if Ray were installed
    with pytest.raises(ConfigError, match=f"no Ray cluster answers at ray://{silent} within 10 s"):
        require_ray(RayCluster(f"ray://{silent}"), {})
    with pytest.raises(ConfigError, match=f"no Ray cluster answers at {silent}"):
        require_ray(RayCluster(), {"RAY_ADDRESS": silent})
    require_ray(RayCluster(), {"RAY_ADDRESS": "auto"})
    with socket.create_server(("127.0.0.1", 0)) as listening:
        require_ray(RayCluster(f"ray://127.0.0.1:{listening.getsockname()[1]}"), {"RAY_ADDRESS": silent})


@pytest.mark.parametrize(
    ("options", "part", "told"),
    [
        (["--on", "ray"], {}, "Ray is not installed: pip install 'veneer[ray]'"),
        ([], {"engine": "ray", "grid": {"adapter.r": [2]}}, "Ray is not installed"),
        (["--on", "rey"], {}, "--on rey is no place to train on"),
        (["--on", "ray", "--processes", "2"], {}, "Leave --processes and launchers out"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], part: dict, told: str
) -> None:
    recipe = {"model": {"source": "none"}, "data": {"train": "none.jsonl"}, "output": str(tmp_path / "run")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | ({"sweep": part} if part else {})))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml"), *options])
    assert done.exit_code == 2
    assert f"error: {told}" in done.output or (told in done.output and done.output.startswith("error: --on"))
    assert done.output.count("\n") == 1
