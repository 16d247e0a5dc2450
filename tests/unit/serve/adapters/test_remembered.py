"""Memory of files and places: within bounds, those that were used last."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from tests.unit.serve.conftest import byte_tokenizer, make_model

from veneer import LoraConfig, LoRARequest
from veneer.errors import CompositionError
from veneer.serve.adapters import versions
from veneer.serve.adapters.versions import Versions
from veneer.serve.program import effects
from veneer.serve.program.effects import Lookup
from veneer.serve.requests import readers
from veneer.serve.requests.prompts import PromptReader
from veneer.serve.requests.readers import Readers


@pytest.fixture
def folders(adapters, tmp_path) -> list[Path]:
    made = []
    for number in range(3):
        made.append(Path(shutil.copytree(adapters["lora"].path, tmp_path / str(number))))
        config = made[-1] / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 5 + number}))
    return made


def test_the_versions_of_the_folders_asked_for_last_are_remembered(folders, monkeypatch):
    read, own = list[Path](), versions.read_config
    monkeypatch.setattr(versions, "_KEPT", 2)
    monkeypatch.setattr(versions, "read_config", lambda folder: read.append(folder) or own(folder))
    found = Versions()
    for number in (0, 1, 0, 2):
        found.of(LoRARequest("x", 1, str(folders[number])))
    assert [found.seen(folder) is not None for folder in folders] == [True, False, True]
    for number in (0, 1, 2, 0):  # the first is forgotten by its files as well
        found.of(LoRARequest("x", 1, str(folders[number])))
    assert [folder.name for folder in read] == ["0", "1", "2", "0"]


def test_other_files_under_the_inodes_of_old_ones_are_read(folders):
    """A deleted file's inode is soon another's, and a tool that copies may set its time."""
    found, config = Versions(), folders[1] / "adapter_config.json"
    before, old = config.stat(), found.of(LoRARequest("x", 1, str(folders[1])))
    while config.stat().st_ctime_ns == before.st_ctime_ns:
        config.write_text((folders[2] / config.name).read_text())
        os.utime(config, ns=(before.st_atime_ns, before.st_mtime_ns))
    now = config.stat()
    assert (now.st_ino, now.st_mtime_ns, now.st_size) == (before.st_ino, before.st_mtime_ns, before.st_size)
    moved = Path(shutil.move(folders[1], folders[1].with_name("b")))
    assert found.of(LoRARequest("x", 1, str(moved))).id == Versions().of(LoRARequest("x", 1, str(folders[2]))).id
    assert found.of(LoRARequest("x", 1, str(moved))).id != old.id


def test_the_places_of_the_configs_used_last_are_remembered(monkeypatch):
    planned, own = list[int](), effects.plan_of
    monkeypatch.setattr(effects, "_KEPT", 2)
    monkeypatch.setattr(
        effects, "plan_of", lambda snapshot, config, **how: planned.append(config.r) or own(snapshot, config, **how)
    )
    lookup = Lookup(make_model("llama"))
    for rank in (2, 3, 2, 5, 2, 3):
        lookup.of(LoraConfig(r=rank, target_modules=["q_proj"]))
    assert planned == [2, 3, 5, 3]


def test_the_tokenizers_of_few_folders_are_remembered(folders, monkeypatch):
    monkeypatch.setattr(readers, "_FOLDERS", 2)
    found = Readers(PromptReader(byte_tokenizer(), 99))
    for folder in folders:
        byte_tokenizer().save_pretrained(folder)
        found.of(LoRARequest("x", 1, str(folder)))
    assert list(found._keys) == folders[1:]


def test_an_adapter_with_a_head_is_refused_with_what_runs_it(folders):
    config = folders[0] / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"task_type": "TOKEN_CLS"}))
    with pytest.raises(CompositionError, match=r"has its own head \(task_type TOKEN_CLS\).*AutoPeftModel"):
        Versions().of(LoRARequest("a", 1, str(folders[0])))
