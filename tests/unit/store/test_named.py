"""Bases of adapters by names that mean the same on another machine: written, found again, asked for."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from veneer import AutoPeftModelForCausalLM, LoraConfig, PeftModel, VeraConfig, get_peft_model
from veneer.contract.file import CONFIG_FILE
from veneer.disk.cache import cache_dir
from veneer.errors import ConfigError
from veneer.store import fetch, named
from veneer.store.adapter.skeleton import places_in_base
from veneer.store.gguf.model import converted_folder
from veneer.store.named import folder_of
from veneer.store.source import load_model, resolve

Make = Callable[..., tuple[Path, Any]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def known(make_gguf: Make, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model that `veneer fetch` knows, fetched."""
    _, model = make_gguf("llama")
    monkeypatch.setitem(known_models := dict(fetch.KNOWN), "tiny", fetch.KNOWN["smollm2-135m-instruct"])
    for module in (fetch, named):
        monkeypatch.setattr(module, "KNOWN", known_models)
    folder = cache_dir() / "models" / "tiny"
    model.save_pretrained(folder)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    (folder / "veneer.json").write_text(json.dumps({"source": "tiny==1", "bytes": sizes}))
    return "tiny"


def base_in(folder: Path) -> str:
    return json.loads((folder / CONFIG_FILE).read_text())["base_model_name_or_path"]


def save_adapter(model: Any, folder: Path) -> torch.Tensor:
    """An adapter that changes the logits, which are returned."""
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5)
    adapted.save_pretrained(folder)
    return adapted(torch.tensor([[3, 17, 41, 5]])).logits.detach()


def test_a_fetched_base_goes_by_its_name_however_it_was_loaded(known: str, tmp_path: Path) -> None:
    folder = fetch.model_folder(known)
    for model in (load_model(known), load_model(folder), AutoModelForCausalLM.from_pretrained(folder)):
        logits = save_adapter(model, tmp_path / "adapter")
        assert base_in(tmp_path / "adapter") == known
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(found(torch.tensor([[3, 17, 41, 5]])).logits, logits)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert str(cache_dir()) not in card
    assert "base_model" not in card.split("---")[1]  # the hub has no model of that name
    assert "AutoPeftModelForCausalLM.from_pretrained(" in card


def test_a_gguf_file_goes_by_its_name_and_hash(
    make_gguf: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = make_gguf("llama")
    file = shutil.copy(made, tmp_path / "tiny-Q8.gguf")
    name = f"tiny-Q8.gguf@sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    logits = save_adapter(load_model(file), tmp_path / "adapter")
    assert base_in(tmp_path / "adapter") == name
    folder = folder_of(name)
    assert folder is not None
    assert folder.parent == cache_dir() / "gguf"
    assert (resolve(name), resolve(file)) == (folder, folder)
    # another machine: the file lies somewhere, and nothing is in the cache
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "theirs"))
    monkeypatch.chdir(tmp_path)
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(found(torch.tensor([[3, 17, 41, 5]])).logits, logits)


def test_a_file_is_found_by_its_hash_in_its_blocks_whatever_copy_lies_beside_it(make_gguf: Make) -> None:
    file, _ = make_gguf("llama", "Q8_0")
    name = f"tiny.gguf@sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    in_blocks, copy = resolve(file), converted_folder(file)
    for place in ("0 in front of it", "~ behind it"):
        copy = copy.rename(copy.with_name(place))
        assert folder_of(name) == in_blocks
        assert named.file_of(name) == file
    file.unlink()
    assert folder_of(name) == copy


def test_a_missing_base_says_what_to_fetch(make_gguf: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    digest = "0f" * 32
    with pytest.raises(ConfigError, match=rf"GGUF file x\.gguf with the SHA-256 {digest}.* put that file"):
        resolve(f"x.gguf@sha256:{digest}")
    (tmp_path / "x.gguf").write_bytes(b"GGUF another")
    with pytest.raises(ConfigError, match=r"the x\.gguf in this folder has another hash"):
        resolve(f"x.gguf@sha256:{digest}")
    with pytest.raises(ConfigError, match="run `veneer fetch smollm2-135m-instruct`"):
        resolve("/home/ann/.cache/veneer/models/smollm2-135m-instruct")


def test_a_folder_converted_by_an_older_veneer_is_not_taken(make_gguf: Make, tmp_path: Path) -> None:
    file, _ = make_gguf("llama")
    folder = resolve(file)
    assert isinstance(folder, Path)
    manifest = json.loads((folder / "veneer.json").read_text())
    assert folder_of(manifest["name"]) == folder
    (folder / "veneer.json").write_text(json.dumps({**manifest, "conversion": manifest["conversion"] - 1}))
    with pytest.raises(ConfigError, match="not yet read on this machine"):
        folder_of(manifest["name"])


def test_an_adapter_of_before_that_names_a_path_into_the_cache_works_and_is_saved_without(
    known: str, tmp_path: Path
) -> None:
    save_adapter(load_model(known), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())
    for path in (fetch.model_folder(known), "/home/ann/.cache/veneer/models/tiny"):
        text = json.dumps({**config, "base_model_name_or_path": str(path)})
        (tmp_path / "adapter" / CONFIG_FILE).write_text(text)
        model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
        assert isinstance(model, PeftModel)
        model.save_pretrained(tmp_path / "again")
        assert base_in(tmp_path / "again") == "tiny"


def test_what_reads_the_bases_config_finds_it_by_its_name(known: str, tmp_path: Path) -> None:
    model = get_peft_model(load_model(known), VeraConfig(r=3, target_modules=["q_proj"], save_projection=False))
    model.save_pretrained(tmp_path / "vera")
    assert base_in(tmp_path / "vera") == "tiny"
    places = places_in_base(tmp_path / "vera")
    assert places is not None
    os.rename(fetch.model_folder(known), tmp_path / "gone")
    assert places_in_base(tmp_path / "vera") is None
