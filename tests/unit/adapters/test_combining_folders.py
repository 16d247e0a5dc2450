"""Adapters of methods other than LoRA, combined on disk: the sum is that of the merged models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from veneer import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from veneer.adapters.combining import combine_folders
from veneer.combine import Combination
from veneer.errors import CompositionError

CONFIGS: dict[str, Any] = {
    "vera": VeraConfig(r=5, target_modules=["q_proj", "down_proj"], save_projection=False),
    "adalora": AdaLoraConfig(init_r=4, target_r=2, lora_alpha=7, target_modules=["q_proj", "up_proj"]),
    "lora": LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"]),
}


def save(tiny: Any, config: Any, folder: Path, randomize: Any) -> dict[str, torch.Tensor]:
    """An adapter in a folder, and the weights that it makes of the base's."""
    model = get_peft_model(tiny("llama", dtype=torch.float64), config)
    randomize(model)
    model.save_pretrained(folder)
    return model.merge_and_unload().state_dict()


def test_the_sum_is_that_of_the_merged_models(tiny: Any, randomize: Any, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()  # its config is all that is read
    merged = {
        name: save(tiny, replace(config, base_model_name_or_path=str(tmp_path / "base")), tmp_path / name, randomize)
        for name, config in CONFIGS.items()
    }
    weights = {"vera": 0.7, "adalora": -0.3, "lora": 1.2}
    steps: list[tuple[int, int]] = []
    report = combine_folders(
        [tmp_path / n for n in weights], list(weights.values()), Combination(), tmp_path / "sum",
        on_progress=lambda *step: steps.append(step),
    )  # fmt: skip
    assert steps == [(i + 1, len(report.errors)) for i in range(len(report.errors))]
    assert report.worst == 0
    base = tiny("llama", dtype=torch.float64)
    own = {key: value.clone() for key, value in base.state_dict().items()}
    got = PeftModel.from_pretrained(base, tmp_path / "sum").merge_and_unload().state_dict()
    for key, value in own.items():
        wanted = value + sum(weight * (merged[name][key] - value) for name, weight in weights.items())
        torch.testing.assert_close(got[key], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CONFIGS["vera"], r"\(VERA\) does not tell the sizes of the layers.*give the base too"),
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "give the base too"),
        (LoraConfig(use_dora=True, target_modules=["q_proj"]), "scales or reads the weights of its base"),
    ],
    ids=["vera", "ia3", "dora"],
)
def test_what_needs_its_base_gives_the_true_reason(
    config: Any, message: str, tiny: Any, randomize: Any, tmp_path: Path
) -> None:
    save(tiny, config, tmp_path / "part", randomize)
    with pytest.raises(CompositionError, match=message):
        combine_folders([tmp_path / "part"], [1.0], Combination(), tmp_path / "sum")
    assert not (tmp_path / "sum").exists()
