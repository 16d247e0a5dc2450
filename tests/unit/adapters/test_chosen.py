"""A base and adapters by name: the base that an adapter names, warnings, tokenizers that adapters bring along."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from chat_models import adapter_folder as adapter_folder
from chat_models import model_folder as model_folder
from veneer.adapters.chosen import choose, split, split_one, tokenizer_with
from veneer.errors import ConfigError, FormatError


def test_an_adapter_stands_for_its_base_and_itself(model_folder: Path, adapter_folder: Path) -> None:
    assert split(str(adapter_folder), ()) == (str(model_folder), (adapter_folder,))
    assert split_one(str(model_folder), None) == (str(model_folder), None)
    assert split_one(str(model_folder), adapter_folder) == (str(model_folder), adapter_folder)
    with pytest.raises(ConfigError, match="give the base as MODEL"):
        split(str(adapter_folder), (adapter_folder,))


def test_a_base_of_equal_shapes_and_other_files_is_warned_of(
    model_folder: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    copy, other = (shutil.copytree(model_folder, tmp_path / name) for name in ("copy", "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 3e-5}))
    assert choose(str(model_folder), [adapter_folder]).warnings == ()
    assert choose(str(copy), [adapter_folder]).warnings == ()
    (said,) = choose(str(other), [adapter_folder]).warnings
    assert said.startswith(f"{adapter_folder}: the adapter names the base {model_folder}, and this is {other}: ")


def test_the_parts_are_joined_under_names_of_their_folders(model_folder: Path, adapter_folder: Path) -> None:
    parts = choose(str(model_folder), [adapter_folder]).load()
    assert parts.adapter == adapter_folder
    loaded = parts.joined()
    assert loaded.names == {adapter_folder: "adapter0"}
    assert loaded.model.active_adapters == ["adapter0"]
    plain = choose(str(model_folder)).load().joined()
    assert (plain.names, type(plain.model).__name__) == ({}, "LlamaForCausalLM")


def test_adapters_that_want_other_prompts_are_taken_one_at_a_time(
    model_folder: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    base, folder = AutoTokenizer.from_pretrained(model_folder), shutil.copytree(adapter_folder, tmp_path / "own")
    own = AutoTokenizer.from_pretrained(model_folder)
    own.chat_template = "{{ messages[0]['content'] }}"
    own.save_pretrained(folder)
    assert tokenizer_with(base, [adapter_folder]) is base
    assert tokenizer_with(base, [folder]).chat_template == own.chat_template
    with pytest.raises(ConfigError, match="take one at a time"):
        tokenizer_with(base, [adapter_folder, folder])

    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(model_folder)


def test_a_template_in_a_file_alone_is_the_adapters(model_folder: Path, adapter_folder: Path, tmp_path: Path) -> None:
    base, folder = AutoTokenizer.from_pretrained(model_folder), shutil.copytree(adapter_folder, tmp_path / "told")
    before = base.chat_template
    (folder / "chat_template.jinja").write_text("{{ messages }}!")
    assert tokenizer_with(base, [folder]).chat_template == "{{ messages }}!"
    assert base.chat_template == before
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(FormatError, match="remove it to use the base's"):
        tokenizer_with(base, [folder])
