"""Adapters that name another base: every verb has the same warning, and one that does not fit is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from veneer.disk.known_name import FETCHED, MANIFEST

BASE, OTHER = "smollm2-135m-instruct", "meta-llama/Llama-3.2-1B"


@pytest.fixture
def fetched(veneer, model_folder: Path, tmp_path: Path) -> str:
    """The tiny model under the name of a fetched one."""
    folder = shutil.copytree(model_folder, tmp_path / "cache" / FETCHED / BASE)
    (folder / MANIFEST).write_text(json.dumps({"bytes": {}}))
    return BASE


def renamed(adapter: Path, base: str, folder: Path) -> Path:
    """A copy of an adapter that names another base."""
    shutil.copytree(adapter, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))
    return folder


def test_an_adapter_that_names_another_base_has_one_warning_in_every_verb(
    veneer, fetched: str, adapter_folder: Path, tmp_path: Path
) -> None:
    other = renamed(adapter_folder, OTHER, tmp_path / "renamed")
    own = renamed(adapter_folder, f"HuggingFaceTB/{BASE}", tmp_path / "own")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "a b c"}) + "\n")
    said = (
        f"warning: {other}: the adapter names the base {OTHER}, and this is {fetched}: the result is wrong if these "
        "are two models. Use the adapter with its own base"
    )

    def commands(adapter: Path) -> list[tuple[object, ...]]:
        out, recipe = tmp_path / f"of_{adapter.name}", tmp_path / f"{adapter.name}.yaml"
        parts = {"model": {"source": fetched}, "data": {"train": str(rows)}, "adapter": {"from": str(adapter)}}
        recipe.write_text(json.dumps(parts | {"training": {"max_steps": 1}, "output": str(out / "run")}))
        return [
            ("train", recipe),
            ("merge", "--base", fetched, "--adapter", adapter, "-o", out / "merged"),
            ("export", "gguf", fetched, "--adapter", adapter, "-o", tmp_path / f"{adapter.name}.gguf", "--type", "F16"),
            ("export", "lora", adapter, "--base", fetched, "-o", tmp_path / f"{adapter.name}_lora.gguf"),
            ("export", "vllm", adapter, "--base", fetched, "-o", out / "vllm"),
            ("export", "as-lora", adapter, "--base", fetched, "-o", out / "lora", "--rank", 3),
            ("eval", fetched, "-a", adapter, "-d", rows, "-m", "perplexity"),
            ("generate", fetched, "--adapter", adapter, "-p", "a", "--max-new-tokens", 2, "--raw"),
        ]

    for command in commands(other):
        told = " ".join(veneer(*command).stderr.split())
        assert told.count("names the base") == 1, command
        assert said in told, (command, told)
    for command in commands(own):
        assert "warning" not in veneer(*command).stderr, command


def test_an_adapter_that_does_not_fit_is_refused_in_the_same_words(
    veneer, fetched: str, other_adapter: Path, tmp_path: Path
) -> None:
    other = renamed(other_adapter, OTHER, tmp_path / "renamed")
    for command in (
        ("merge", "--base", fetched, "--adapter", other, "-o", tmp_path / "merged"),
        ("export", "gguf", fetched, "--adapter", other, "-o", tmp_path / "x.gguf"),
        ("generate", fetched, "--adapter", other, "-p", "a"),
    ):
        result = veneer(*command)
        said = f"the adapter {other} does not fit the model {fetched}: it was trained on {OTHER}: give {OTHER} as"
        assert (result.exit_code, said in " ".join(result.stderr.split())) == (2, True), result.output
