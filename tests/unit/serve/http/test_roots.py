"""The places from which adapters may come: roots, ids on the hub, and folders that are none."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from veneer.contract import source
from veneer.errors import FormatError
from veneer.serve.http.errors import ModelNotFoundError, RefusedError
from veneer.serve.http.folder import AdapterFolder
from veneer.serve.http.roots import Roots

from .test_adapters import raises


@pytest.fixture
def places(adapters, tmp_path) -> Path:
    for name in ("in/a", "out/b"):
        shutil.copytree(adapters["lora"].path, tmp_path / name)
    return tmp_path


def test_a_path_leads_nowhere_else(places, monkeypatch):
    roots = Roots([places / "in"])
    monkeypatch.chdir(places)
    assert roots.folder("a") == roots.folder("in/a") == roots.folder(str(places / "in" / "a")) == places / "in" / "a"
    (places / "in" / "link").symlink_to(places / "out" / "b")
    (places / "in" / "up").symlink_to("..")
    (places / "in" / "loop").symlink_to("loop")
    (places / "in" / "near").symlink_to("a")
    assert roots.folder("near") == places / "in" / "a"
    out = str(places / "out" / "b")
    for given in ("link", "up/out/b", out, "in/../out/b", "/", "/nowhere", "\ud800"):
        with pytest.raises(RefusedError, match="lora_path=") as told:
            roots.folder(given)
        assert told.value.status == 400, given
    for given in ("loop", "in", "c", "in/c", "out/b", "~", "a/adapter_config.json"):
        with pytest.raises(ModelNotFoundError):
            roots.folder(given)
    for file in ("adapter_model.safetensors", "tokenizer.json"):
        (places / "in" / "a" / file).unlink(missing_ok=True)
        (places / "in" / "a" / file).symlink_to(places / "out" / "b" / "adapter_model.safetensors")
        with pytest.raises(RefusedError, match=f"{file} there is a link that leads out"):
            roots.folder("a")
        (places / "in" / "a" / file).unlink()
        shutil.copy(places / "out" / "b" / "adapter_model.safetensors", places / "in" / "a" / file)
    assert roots.folder("a")


def test_a_link_may_lead_from_a_root_to_another(places):
    os.symlink(places / "out" / "b", places / "in" / "link")
    assert Roots([places / "in", places / "out"]).folder("link") == places / "out" / "b"
    with pytest.raises(RefusedError, match="loads adapters from nowhere"):
        Roots().folder("a")


@pytest.mark.parametrize("given", ["me/x", "me/x.y-z_1", "ours/one"])
def test_ids_that_are_allowed(given):
    assert Roots(hub=["me/*", "ours/one"]).hub_id(given) == given


@pytest.mark.parametrize("given", ["me", "me/", "me/x/y", "me/..", "ours/two", "Me/x", "me/x\n", "/me/x", ""])
def test_ids_that_are_not(given):
    assert Roots(hub=["me/*", "ours/one", "*/*/*"]).hub_id(given) is None


def test_a_repository_without_an_adapter(monkeypatch, tmp_path):
    monkeypatch.setattr(source, "snapshot_download", lambda repo, **options: str(tmp_path))
    assert source.hub_folder("me/x") == tmp_path
    monkeypatch.setattr(source, "snapshot_download", lambda repo, **options: raises(source.HFValidationError("bad")))
    with pytest.raises(FormatError, match="not on the hub: bad"):
        source.hub_folder("me/x")


def test_a_folder_that_cannot_be_listed_is_refused(places, monkeypatch):
    def deny(folder: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(RefusedError, match="cannot be listed: Permission denied"):
        Roots([places / "in"]).folder("a")


def test_a_folder_whose_name_is_no_text_is_not_served(adapters, tmp_path):
    for name in ("a", os.fsdecode(b"\xff")):
        shutil.copytree(adapters["lora"].path, tmp_path / name)
    assert AdapterFolder(tmp_path, (), lambda names: None).names == ("a",)
