"""Files run in llama.cpp as their models do in transformers. Skips without cyllama."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from veneer.export.gguf.model import GgufOptions, export_gguf

from .llama_cpp import LlamaCpp
from .tiny import SETTINGS, VOCAB, image_model, tiny_folder, tokenizer

IDS = [(i * 37 + 11) % (VOCAB - 3) for i in range(60)]


@pytest.mark.parametrize("family", SETTINGS)
@torch.no_grad()
def test_logits_are_those_of_the_model(tmp_path: Path, family: str) -> None:
    model = tiny_folder(tmp_path / "model", family)
    export_gguf(tmp_path / "model", tmp_path / "tiny.gguf", GgufOptions(type="F32"))
    expected = model(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(LlamaCpp(tmp_path / "tiny.gguf").logits(IDS), expected, rtol=2e-2, atol=2e-2)


@torch.no_grad()
def test_the_text_half_of_a_model_of_images_is_written(tmp_path: Path) -> None:
    model = image_model()
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    report = export_gguf(tmp_path / "model", tmp_path / "tiny.gguf", GgufOptions(type="F32"))
    assert {name.split(".")[0] for name in report.plan.left_out} <= {"vision_tower", "multi_modal_projector", "model"}
    expected = model(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(LlamaCpp(tmp_path / "tiny.gguf").logits(IDS), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("family", ["mistral", "mixtral", "phi3-plain"])
@torch.no_grad()
def test_up_to_the_window_of_every_layer_and_no_further(tmp_path: Path, family: str) -> None:
    """The reason for which the file says the window as its context."""
    window = 32
    model = tiny_folder(tmp_path / "model", family, sliding_window=window)
    report = export_gguf(tmp_path / "model", tmp_path / "tiny.gguf", GgufOptions(type="F32"))
    assert [pair.value for pair in report.plan.pairs if pair.key.endswith(".context_length")] == [window]
    expected = model(torch.tensor([IDS])).logits[0]
    found = LlamaCpp(tmp_path / "tiny.gguf").logits(IDS)
    torch.testing.assert_close(found[:window], expected[:window], rtol=2e-2, atol=2e-2)
    assert (found[window:] - expected[window:]).abs().max() > 2e-2
