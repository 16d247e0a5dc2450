"""``veneer plan``: options that nothing would read are told, all together, before anything is planned."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tests.pictures import check_picture
from transformers import AutoModelForCausalLM

from veneer.cli import plan_answers
from veneer.errors import ConfigError
from veneer.plain.units import size
from veneer.plan.architecture import config_of
from veneer.plan.fit import Fit
from veneer.plan.presets import hub_id_of, presets, require_weights

from .conftest import told_early


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--fit", "4GB", "--serve"], ["--fit and --serve answer questions of their own"]),
        (["--memory", "4GB"], ["--memory is read by --serve alone", "that fit into it: --fit 4GB"]),
        (["--write", "best.yaml"], ["--write is read by --fit alone"]),
        (["--advice", "--png", "p.png", "--processes", "3"], ["--png is not read by --advice", "--processes is not"]),
        (["--advice", "--rows", "0", "--tokens", "-3"], ["--rows 0 must be at least 1", "--tokens -3 must be"]),
        (["--task", "code", "--tokens", "7"], ["--tokens is read by --advice alone", "--task is read by --advice"]),
        (["--advice", "--rank", "7"], ["--rank is not read by --advice: leave it out"]),
        (["--strategy", "fsdp"], ["--strategy fsdp applies to several processes: add --processes N"]),
        (["--shard", "3", "--bandwidth", "7"], ["--shard 3 applies to several", "--bandwidth 7.0 applies to several"]),
        (
            ["--processes", "6", "--shard", "0", "--strategy", "fsdp", "--bandwidth", "-2"],
            ["give one of the two", "--shard 0 must be at least 1", "--bandwidth -2.0 must be above 0"],
        ),
        (["--serve", "--no-time"], ["--no-time is not read by --serve"]),
        (["--method", "dora"], ["use --set adapter.method=dora"]),
    ],
)
def test_options_that_nothing_reads_are_told(veneer: Any, options: list[str], told: list[str]) -> None:
    what = "recipe.yaml" if "--method" in options else "smollm2-135m"
    done = veneer("plan", what, *options)
    said = " ".join(done.stderr.split())
    assert (done.exit_code, [part for part in told if part not in said]) == (2, [])


_PRESET = "is a preset of `veneer plan`, a shape without weights. Give the model's id on the hub, meta-llama/Meta-Llama"


def test_what_is_wrong_by_itself_is_told_before_torch_is_imported() -> None:
    cases = [
        (("plan", "llama-3-8"), "no model 'llama-3-8': it is no preset, .* did you mean llama-3-8b"),
        (
            ("plan", "llama-3-8b", "--quantization", "nf5"),
            "error: --quantization 'nf5' must be one of none, nf4.*'nf4'",
        ),
        (("plan", "llama-3-8b", "--card", "rtx-409"), "error: --card 'rtx-409' must be one of .*nearest is 'rtx-4090'"),
        (("plan", "llama-3-8b", "--card", "a100"), "error: --card 'a100' means a100-40gb or a100-80gb: give one"),
        (
            ("plan", "llama-3-8b", "--length", "0", "--rank", "-1"),
            r"--rank \(--r\) -1 must be at least 1 --length 0 must be",
        ),
        (
            ("plan", "llama-3-8b", "--processes", "0", "--strategy", "zero"),
            "--processes 0 must be at least 1 --strategy 'zero' must be one of auto, ddp, fsdp",
        ),
        (("plan", "llama-3-8b", "--advice", "--task", "maths"), "--task 'maths' must be .*the nearest is 'math'"),
        (("plan", "llama-3-8b", "--set", "model.quantization=nf5"), "model.quantization: 'nf5' does not fit"),
        (("generate", "Llama-3-8B", "-p", "?"), f"MODEL: Llama-3-8B {_PRESET}"),
        (("chat", "llama-3-8b"), f"MODEL: llama-3-8b {_PRESET}"),
        (("serve", "llama-3-8b"), f"MODEL: llama-3-8b {_PRESET}"),
    ]
    for (command, told), (code, said) in zip(cases, told_early([command for command, _ in cases]), strict=True):
        assert code == 2, command
        assert re.search(told, said), (command, said)


@pytest.mark.parametrize(
    ("options", "told", "rate"),
    [
        (("--card", "rtx-4090"), "memory and cost by a data sheet, not measured: NVIDIA, Ada", "1.00 x 3,333"),
        (("--no-time",), "cost: arithmetic alone, not timed", None),
    ],
)
def test_settings_that_fit_say_where_their_numbers_come_from(
    options: tuple[str, ...], told: str, rate: str | None, veneer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_answers, "fits", lambda *_, **__: [Fit({}, None, 7, 0.0003)])  # type: ignore[arg-type]
    said = " ".join(veneer("plan", "smollm2-135m", "--fit", "900MB", *options).stdout.split())
    assert told in said
    assert rate in said if rate else "tokens/s" not in said
    facts = json.loads(veneer("plan", "smollm2-135m", "--fit", "900MB", "--json", *options).stdout)
    assert told in facts["source"]


def test_settings_that_fit_show_every_key_that_one_of_them_changes(
    veneer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, steps = "training.per_device_train_batch_size", "training.gradient_accumulation_steps"
    found = [
        Fit({"model.quantization": "nf4", batch: 2, steps: 4}, None, 7, 0.3),  # type: ignore[arg-type]
        Fit({"training.gradient_checkpointing": True, batch: 8, steps: 1}, None, 7, 0.3),  # type: ignore[arg-type]
    ]
    monkeypatch.setattr(plan_answers, "fits", lambda *_, **__: found)
    monkeypatch.setenv("COLUMNS", "80")
    shown = veneer("plan", "smollm2-135m", "--fit", "900MB", "--no-time", "--batch", "8").stdout
    rows = [line.split() for line in shown.splitlines() if re.match(r" *[12] ", line)]
    assert [row[:5] for row in rows] == [["1", "nf4", "2", "4", "False"], ["2", "none", "8", "1", "True"]]
    assert f"the first changes model.quantization from none to nf4, {batch} from 8 to 2, {steps} from 1 to 4\n" in shown
    found[0] = Fit({batch: 8}, None, 7, 0.3)  # type: ignore[arg-type]
    shown = veneer("plan", "smollm2-135m", "--fit", "900MB", "--no-time", "--batch", "8").stdout
    assert "the first is the recipe as it is\n" in shown


def test_a_plan_by_a_data_sheet_says_so_and_names_the_rank(veneer: Any) -> None:
    done = veneer("plan", "smollm2-135m", "--card", "l4", "--no-time", "--length", "17")
    said = " ".join(done.stdout.split())
    assert "smollm2-135m, lora of rank 8, base in its own dtype" in said
    assert "24.00 GB may be taken (data sheet, not measured: NVIDIA, L4 data sheet)" in said


def test_what_is_left_free_beside_a_served_base_is_told(veneer: Any) -> None:
    options = ("plan", "smollm2-135m", "--serve", "--memory", "1GB")
    facts = json.loads(veneer(*options, "--json").stdout)
    assert facts["base"] + facts["reserve"] + facts["room"] == facts["memory"] == 10**9
    assert facts["reserve"] == pytest.approx(0.08 * (facts["memory"] - facts["base"]))
    assert f"; {size(facts['reserve'])} left free, as the engine leaves them" in veneer(*options).stdout


def test_the_legend_of_a_picture_covers_no_bar(veneer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(FigureCanvasAgg(figure).figure))
    veneer("plan", "smollm2-135m", "--no-time", "--length", "17", "--png", tmp_path / "plan.png")
    check_picture(drawn[0])
    [axes], [legend] = drawn[0].axes, drawn[0].legends
    assert axes.get_window_extent().x1 <= legend.get_window_extent().x0
    assert max(bar.get_y() + bar.get_height() for bar in axes.patches) < axes.get_ylim()[1]


def test_an_unknown_method_is_told_by_its_option(veneer: Any) -> None:
    done = veneer("plan", "llama-3-8b", "--method", "lorra")
    assert done.exit_code == 2
    assert "--method 'lorra' must be one of lora, adalora" in " ".join(done.stderr.split())


def test_advice_counts_the_adapter_that_it_advises_and_cuts_no_key(veneer: Any) -> None:
    done = veneer("plan", "smollm2-135m", "--advice", "--task", "rl", "--rows", "1009", "--set", "adapter.method=ia3")
    assert done.exit_code == 0
    assert "adapter.r: 8  (medium)" in done.stdout
    assert "2,442,240 parameters" in " ".join(done.stdout.split())  # rank 8 on all linear layers
    assert "training.per_device_train_batch_size: 32" in done.stdout
    memory = r"memory: [\d.]+ GB at the peak, with 32 rows of 1,024 tokens; --fit SIZE in place of --advice"
    assert re.search(memory, " ".join(done.stdout.split()))
    told = json.loads(veneer("plan", "smollm2-135m", "--advice", "--json").stdout)
    assert {each["key"]: each["value"] for each in told}["adapter.method"] == "lora"


def test_a_written_recipe_names_the_model_on_the_hub(
    veneer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [Fit({"training.gradient_checkpointing": "selective"}, None, 7, 0.3)]  # type: ignore[arg-type]
    monkeypatch.setattr(plan_answers, "fits", lambda *_, **__: found)
    file = tmp_path / "best.yaml"
    done = veneer("plan", "SmolLM2-135M", "--fit", "900MB", "--write", file, "--no-time")
    assert done.exit_code == 0, done.output
    written = yaml.safe_load(file.read_text())
    assert written["model"]["source"] == "HuggingFaceTB/SmolLM2-135M"
    assert written["training"] == {"max_length": 1024, "gradient_checkpointing": "selective"}


def test_every_preset_knows_its_id_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(str(each["hub_id"]).count("/") == 1 for each in presets().values())
    assert not hasattr(config_of("qwen2.5-7b"), "hub_id")
    shape = config_of("llama-3.1-8b")
    assert (shape.hidden_size, shape.num_hidden_layers, shape.max_position_embeddings) == (4096, 32, 131072)
    assert hub_id_of("someone/qwen2.5-7b") is None
    with pytest.raises(ConfigError, match=r"MODEL: Llama-3-8B is a preset .*id on the hub, meta-llama/Meta-Llama-3-8B"):
        require_weights("Llama-3-8B")
    monkeypatch.chdir(tmp_path)
    Path("llama-3-8b").mkdir()
    require_weights("llama-3-8b")


MILLIONS = {
    "gpt-oss-20b": 20_915, "gpt-oss-120b": 116_829, "mixtral-8x7b": 46_703, "olmoe-1b-7b": 6_919,
    "qwen3-30b-a3b": 30_532, "qwen3-next-80b-a3b": 79_674, "qwen3.5-9b": 8_954, "lfm2-1.2b": 1_170,
    "glm-4.5-air": 106_852,
}  # fmt: skip


@pytest.mark.parametrize("name", MILLIONS)
def test_a_mixture_or_hybrid_has_its_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(name))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == MILLIONS[name]


def test_rows_that_a_plan_does_not_count_are_told(model_folder: Path, tmp_path: Path, veneer: Any) -> None:
    values = {"model": {"source": str(model_folder)}, "data": {"train": "none.jsonl"}, "output": str(tmp_path / "run")}
    (tmp_path / "recipe.yaml").write_text(json.dumps({**values, "training": {"max_length": 23}}))
    result = veneer("plan", tmp_path / "recipe.yaml", "--card", "l4")
    assert result.exit_code == 0, result.output
    assert "rows that are not counted: data.train: there is no file none.jsonl" in result.stderr
    assert "rows" not in veneer("plan", model_folder, "--card", "l4", "--length", "23").stderr
