"""The base that an adapter names, and the one that is given: the same, another one, or nobody knows."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from veneer.store.named_base import GivenBase, is_one_model

SMALL, LARGE = "SmolLM2-135M-Instruct.Q4_1.gguf@sha256:" + "0f" * 32, "Qwen3-0.6B-Q8_0.gguf@sha256:" + "1e" * 32


@pytest.mark.parametrize(
    ("root", "named"),
    [
        ("smollm2-135m-instruct", None),
        ("smollm2-135m-instruct", ""),
        ("smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "unsloth/SmolLM2-135M-Instruct-unsloth-bnb-4bit"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", SMALL),
        (SMALL, SMALL.replace("Q4_1", "Q8_0").replace("0f", "2d")),
        ("/models/base", "Qwen/Qwen3-0.6B"),
        ("Qwen/Qwen3-0.6B", "/home/me/finetuned"),
        ("", "Qwen/Qwen3-0.6B"),
        ("Qwen/Qwen3-0.6B", "~" + "x" * 255),  # too long for a name of a file
    ],
)
def test_names_of_one_model_and_unknown_places_are_no_reason_to_doubt(root: str, named: str | None) -> None:
    assert GivenBase(root).warning(named) == ""


@pytest.mark.parametrize(
    ("root", "named"),
    [
        ("smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"),
        ("Qwen/Qwen3-0.6B", SMALL),
        (LARGE, SMALL),
    ],
)
def test_names_of_two_models_are(root: str, named: str) -> None:
    said = f"the adapter names the base {named}, and this is {root}: the result is wrong if these are two models"
    assert GivenBase(root).warning(named).startswith(said)
    assert GivenBase(root, ["me/" + named.rpartition("/")[2]]).warning(named) == ""


def test_long_names_take_no_time() -> None:
    assert GivenBase("Qwen/Qwen3-0.6B").warning("x-q4" + "_q4" * 83 + "!") == ""  # not a name of a model
    assert GivenBase("Qwen/Qwen3-0.6B").warning("x" * 257) == ""


def test_folders_are_compared_by_what_they_hold(tmp_path: Path) -> None:
    own, copy, other = (tmp_path / name for name in ("own", "copy", "other"))
    own.mkdir()
    (own / "config.json").write_text("{}")
    (own / "model.safetensors").write_bytes(b"12345")
    shutil.copytree(own, copy)
    shutil.copytree(own, other)
    (other / "model.safetensors").write_bytes(b"1234567")
    served = GivenBase(str(own), folder=own)
    assert [bool(served.warning(str(each))) for each in (own, copy, other)] == [False, False, True]
    (other / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    assert served.warning(str(other)) == ""  # nobody can tell


def test_folders_of_one_name_are_compared_too_and_formats_of_one_model_are_not(tmp_path: Path) -> None:
    own, other, coded = (tmp_path / name for name in ("a/base", "b/base", "a/base-4bit"))
    for folder, config in ((own, '{"model_type": "llama"}'), (other, '{"model_type": "qwen2"}'), (coded, "{}")):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(config)
    served = GivenBase(str(own), folder=own)
    for folder, is_one in ((own, True), (other, False), (coded, True)):
        assert is_one_model(str(own), str(folder)) == is_one
        assert (served.warning(str(folder)) == "") == is_one
    shutil.copy(own / "config.json", other)
    assert is_one_model(str(own), str(other))
    assert served.warning(str(other)) == ""
