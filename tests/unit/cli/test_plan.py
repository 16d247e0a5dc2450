"""``veneer plan``: options that nothing would read are told, all together, before anything is planned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from veneer.errors import ConfigError
from veneer.plan import fit
from veneer.plan.architecture import config_of, hub_id_of, presets, require_weights
from veneer.plan.fit import Fit


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--fit", "4GB", "--serve"], ["--fit and --serve answer questions of their own"]),
        (["--memory", "4GB"], ["--memory is read by --serve alone"]),
        (["--write", "best.yaml"], ["--write is read by --fit alone"]),
        (["--advice", "--png", "p.png", "--processes", "3"], ["--png is not read by --advice", "--processes is not"]),
        (["--advice", "--rows", "0", "--tokens", "-3"], ["--rows 0 must be at least 1", "--tokens -3 must be"]),
        (["--task", "code", "--tokens", "7"], ["--tokens is read by --advice alone", "--task is read by --advice"]),
        (["--advice", "--rank", "7"], ["--rank is not read by --advice: leave it out"]),
        (["--strategy", "fsdp"], ["--strategy fsdp is of several processes: add --processes N"]),
        (["--serve", "--no-time"], ["--no-time is not read by --serve"]),
        (["--method", "dora"], ["use --set adapter.method=dora"]),
    ],
)
def test_options_that_nothing_reads_are_told(veneer: Any, options: list[str], told: list[str]) -> None:
    what = "recipe.yaml" if "--method" in options else "smollm2-135m"
    done = veneer("plan", what, *options)
    said = " ".join(done.stderr.split())
    assert (done.exit_code, [part for part in told if part not in said]) == (2, [])


def test_advice_counts_the_adapter_that_it_advises_and_cuts_no_key(veneer: Any) -> None:
    done = veneer("plan", "smollm2-135m", "--advice", "--task", "rl", "--rows", "1009", "--set", "adapter.method=ia3")
    assert done.exit_code == 0
    assert "adapter.r: 8  (medium)" in done.stdout
    assert "2,442,240 parameters" in " ".join(done.stdout.split())  # rank 8 on all linear layers
    assert "training.per_device_train_batch_size: 32" in done.stdout
    told = json.loads(veneer("plan", "smollm2-135m", "--advice", "--json").stdout)
    assert {each["key"]: each["value"] for each in told}["adapter.method"] == "lora"


def test_a_written_recipe_names_the_model_on_the_hub(
    veneer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [Fit({"training.gradient_checkpointing": "selective"}, None, 7, 0.3)]  # type: ignore[arg-type]
    monkeypatch.setattr(fit, "fits", lambda *_: found)
    file = tmp_path / "best.yaml"
    done = veneer("plan", "SmolLM2-135M", "--fit", "900MB", "--write", file, "--no-time")
    assert done.exit_code == 0, done.output
    written = yaml.safe_load(file.read_text())
    assert written["model"]["source"] == "HuggingFaceTB/SmolLM2-135M"
    assert written["training"] == {"max_length": 1024, "gradient_checkpointing": "selective"}


def test_every_preset_knows_its_id_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(str(each["hub_id"]).count("/") == 1 for each in presets().values())
    assert not hasattr(config_of("qwen2.5-7b"), "hub_id")
    assert hub_id_of("someone/qwen2.5-7b") is None
    with pytest.raises(ConfigError, match=r"Llama-3-8B is a preset .*id on the hub, meta-llama/Meta-Llama-3-8B"):
        require_weights("Llama-3-8B")
    monkeypatch.chdir(tmp_path)
    Path("llama-3-8b").mkdir()
    require_weights("llama-3-8b")
