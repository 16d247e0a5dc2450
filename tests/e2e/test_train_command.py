"""``veneer train`` on a tiny random model, and a few steps of the real one."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from models import llama_config, word_tokenizer
from veneer import PeftModel
from veneer.cli.app import app
from veneer.export.merged import merge_checkpoint
from veneer.store.known import is_fetched, model_folder
from veneer.train.show.report import draw_loss

WORDS = [f"w{i}" for i in range(23)]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a base model, rows and a recipe."""
    tokenizer = word_tokenizer(WORDS, ("<unk>", "<end>", "<user>", "<assistant>"))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' <end> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
    )
    torch.manual_seed(3)
    config = llama_config(
        intermediate_size=44, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=1, pad_token_id=1
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"question": f"w{i} w{i + 1}", "answer": f"w{i + 2}"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    recipe = {
        "model": {"source": "base"},
        "adapter": {"method": "lora", "r": 3, "lora_alpha": 5},
        "data": {
            "train": "rows.jsonl", "eval_fraction": 0.2, "prompt": "{question}", "completion": "{answer}", "chat": True,
        },
        "training": {
            "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 0.05, "logging_steps": 2,
            "eval_steps": 3, "save_steps": 3, "bf16": False, "disable_tqdm": True,
        },
        "output": str(tmp_path / "run"),
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def train(project: Path, *options: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["train", str(project / "recipe.yaml"), *options])
    return result.exit_code, result.output + result.stderr


@pytest.mark.parametrize(("method", "storage"), [("lora", "none"), ("lora", "nf4"), ("lora", "int8"), ("full", "none")])
def test_a_recipe_is_carried_out(project: Path, method: str, storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.train.run.draw_loss", draw_loss)
    whole = ["--set", "adapter={method: full}"] if method == "full" else []
    code, output = train(project, "--set", f"model.quantization={storage}", *whole)
    assert code == 0, output
    assert "trains" in output
    rate = r"lr \d\.\d\de-\d\d  [\d,]+ tokens/s"
    assert re.search(rf"^step 2/6  loss \d\.\d{{4}} \(mean of 2 steps\)  {rate}$", output, re.M)
    assert re.search(rf"^step 4/6  loss \d\.\d{{4}} \(mean of 2 steps\)  {rate}  .* left$", output, re.M)
    assert re.search(r"^step 3/6  held out: loss \d\.\d{4}  mean token accuracy \d+\.\d%$", output, re.M)
    assert not re.search(r"\x1b|\r|\{'|examples/s|it/s", output)  # no codes, no dicts, no bars of other libraries
    record = json.loads((project / "run" / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["data"]["train"]["rows"] == 16
    assert record["data"]["train"]["trained_tokens"] == 16 * 2  # the answer's word and the end of the turn
    assert record["data"]["eval"]["rows"] == 4
    losses = [line["loss"] for line in record["log"] if "loss" in line]
    assert losses[-1] < losses[0]
    assert record["results"]["steps"] == 6
    assert record["results"]["eval_loss"] > 0
    assert record["environment"]["versions"]["veneer"]
    assert (project / "run" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert list((project / "run" / "runs").rglob("events.out.tfevents.*"))
    if method == "lora":
        base = AutoModelForCausalLM.from_pretrained(project / "base")
        PeftModel.from_pretrained(base, project / "run" / "adapter")
    else:
        AutoModelForCausalLM.from_pretrained(project / "run" / "model")


@pytest.mark.usefixtures("unplanned")
def test_what_a_run_without_checkpoints_saved_is_not_written_over(project: Path) -> None:
    short = ("--set", "training.max_steps=1", "--set", "training.save_strategy='no'")
    assert train(project, *short)[0] == 0
    saved = (project / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    code, output = train(project, *short, "--set", "seed=5")
    assert code == 2
    assert "holds a finished run: choose another output" in " ".join(output.split())
    assert (project / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == saved


@pytest.mark.usefixtures("unplanned")
def test_resuming_and_refusing_to_overwrite(project: Path) -> None:
    assert train(project, "--set", "training.max_steps=3", "--set", "training.lr_scheduler_type=constant")[0] == 0
    code, output = train(project)
    assert code == 2
    assert "--resume" in output
    code, output = train(project, "--resume", "--set", "training.lr_scheduler_type=constant")
    assert code == 0, output
    assert json.loads((project / "run" / "run.json").read_text())["results"]["steps"] == 6


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("unplanned")
@pytest.mark.parametrize("steps", [3, 4])  # epochs have four: one ends within an epoch
def test_resuming_a_finished_run_changes_nothing(project: Path, steps: int) -> None:
    options = ("--set", f"training.max_steps={steps}", "--set", "training.save_steps=1")
    assert train(project, *options)[0] == 0
    before = files_of(project / "run")
    code, output = train(project, *options, "--resume")
    assert code == 0, output
    assert "already finished" in output
    assert files_of(project / "run") == before
    code, output = train(project, *options, "--resume", "--allow-changes", "--set", "training.max_steps=2")
    assert code == 0, output
    assert "already finished" in output
    assert files_of(project / "run") == before


@pytest.mark.usefixtures("unplanned")
def test_a_run_killed_after_its_last_checkpoint_takes_no_further_step(project: Path) -> None:
    options = ("--set", "training.max_steps=3", "--set", "training.save_steps=1")
    assert train(project, *options)[0] == 0
    path = project / "run" / "run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "status": "running"}))
    saved = project / "run" / "adapter" / "adapter_model.safetensors"
    weights = saved.read_bytes()
    saved.unlink()
    code, output = train(project, *options, "--resume")
    assert code == 0, output
    resumed = json.loads(path.read_text())
    assert resumed["status"] == "finished"
    for key in ("train_loss", "eval_loss", "steps"):
        assert resumed["results"][key] == record["results"][key]
    assert saved.read_bytes() == weights
    assert not (project / "run" / "checkpoint-4").exists()


def test_one_command_begins_goes_on_and_says_that_it_is_done(project: Path) -> None:
    again = ("--resume", "auto", "--set", "training.max_steps=2", "--set", "training.save_steps=1")
    run, saved = project / "run", project / "run" / "adapter" / "adapter_model.safetensors"
    (run / "adapter").mkdir(parents=True)
    code, output = train(project, *again)  # not of a run that is known to have broken off
    assert (code, "holds the adapter that a run saved" in " ".join(output.split())) == (2, True), output
    (run / "run.json").write_text('{"status": "running", "recipe": {}}')
    code, output = train(project, *again)
    assert code == 0, output
    assert "the run begins again" in output
    weights, record = saved.read_bytes(), json.loads((run / "run.json").read_text())
    assert record["log"][0]["step"] == 1
    (run / "run.json").write_text(json.dumps({**record, "status": "running"}))
    shutil.rmtree(run / "checkpoint-2")
    saved.unlink()
    code, output = train(project, *again)
    assert code == 0, output
    assert "going on from its last checkpoint" in output
    assert "step 1/2" not in output
    assert saved.read_bytes() == weights
    before = files_of(run)
    code, output = train(project, *again)
    assert code == 0, output
    assert "already finished" in output
    assert "planned" not in output
    assert files_of(run) == before


def test_processes_run_the_command_that_started_them(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], int]] = []
    monkeypatch.setattr("veneer.train.launcher.launched", lambda command, n: asked.append((command, n)) or 7)
    given = ["--processes", "3", "--resume", "auto"]
    assert train(project, *given)[0] == 7
    ((command, n),) = asked
    assert (command[:3], n) == ([sys.executable, "-P", "-c"], 3)
    assert command[4:] == ["train", str(project / "recipe.yaml"), *given]
    code, output = train(project, "--processes", "2", "--set", "sweep={grid: {adapter.r: [2, 3]}}")
    assert (code, "share one process" in output) == (2, True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, output = train(project, *given)
    assert (code, "--processes asks for 3" in " ".join(output.split())) == (2, True)
    assert len(asked) == 1


def test_a_run_that_cannot_begin_leaves_no_folder_and_tells_all_that_is_wrong(project: Path) -> None:
    assert train(project, "--set", "data.train=none.jsonl")[0] == 2
    assert not (project / "run").exists()
    code, output = train(project, "--resume")
    assert code == 2
    told = " ".join(output.split())
    assert "nothing to resume" in told
    assert "Leave --resume out to begin anew" in told
    assert "planned" not in told  # it is looked at first
    assert not (project / "run").exists()
    (project / "run" / "checkpoint-3").mkdir(parents=True)
    files = ("--set", "data.train=none.jsonl", "--set", "data.eval=away.jsonl", "--set", "data.eval_fraction=0")
    code, output = train(project, *files)
    assert code == 2
    told = " ".join(output.split())
    assert all(part in told for part in ("holds the checkpoints", "no file none.jsonl", "no file away.jsonl"))
    assert "planned" not in told
    assert (project / "run").exists()


@pytest.mark.usefixtures("unplanned")
def test_a_refused_resume_leaves_the_run_as_it_was_and_tells_all_that_differs(project: Path) -> None:
    assert train(project)[0] == 0
    before = files_of(project / "run")
    rows = (project / "rows.jsonl").read_text()
    (project / "rows.jsonl").write_text(rows.replace("w2 w3", "w2 w5"))
    other = ("adapter.r=4", "training.learning_rate=0.02", "seed=5", "model.quantization=nf4", "training.max_length=31")
    code, output = train(project, "--resume", *(part for each in other for part in ("--set", each)))
    assert code == 2, output
    told = " ".join(output.split())
    for part in (
        "adapter.r: 3 before, 4 now", "training.learning_rate: 0.05 before, 0.02 now", "seed: 0 before, 5 now",
        "model.quantization: none before, nf4 now", "training.max_length: 1024 before, 31 now",
        "data.train: a file with the hash", "--allow-changes",
    ):  # fmt: skip
        assert part in told
    assert files_of(project / "run") == before
    code, output = train(
        project, "--resume", "--allow-changes", "--set", "adapter.r=4", "--set", "training.max_steps=9"
    )
    assert code == 2, output
    assert "holds another adapter than this run trains" in output
    assert files_of(project / "run") == before


@pytest.mark.usefixtures("unplanned")
def test_other_rows_under_the_same_name_are_no_resume(project: Path) -> None:
    options = ("--set", "training.lr_scheduler_type=constant", "--set", "training.save_steps=1")
    assert train(project, *options)[0] == 0
    before = files_of(project / "run")
    longer = (*options, "--set", "training.max_steps=7", "--resume")
    rows = (project / "rows.jsonl").read_text()
    (project / "rows.jsonl").write_text("\n".join(reversed(rows.splitlines())))
    code, output = train(project, *longer)
    assert code == 2, output
    assert re.search(r"data.train: 16 rows with the hash \w+ before, 16 rows with the hash \w+ now", output)
    assert files_of(project / "run") == before
    (project / "rows.jsonl").write_text(rows.replace(": ", ":   "))  # the same rows, written otherwise
    assert train(project, *longer)[0] == 0
    assert json.loads((project / "run" / "run.json").read_text())["results"]["steps"] == 7


@pytest.mark.usefixtures("unplanned")
def test_what_does_not_touch_the_weights_may_change(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train(project)[0] == 0
    before = files_of(project / "run")
    harmless = (
        "training.logging_steps=1", "training.report_to=none", "training.save_steps=2", "training.eval_steps=2",
        "training.gradient_checkpointing=selective", "training.per_device_eval_batch_size=3", "training.run_name=x",
    )  # fmt: skip
    code, output = train(project, "--resume", *(part for each in harmless for part in ("--set", each)))
    assert code == 0, output
    assert "already finished" in output
    assert files_of(project / "run") == before
    monkeypatch.chdir(project / "base")  # the same files, named from elsewhere
    result = CliRunner().invoke(app, ["train", "../recipe.yaml", "--resume"])
    assert result.exit_code == 0, result.output + result.stderr


@pytest.mark.usefixtures("unplanned")
def test_changes_that_are_allowed_act_and_are_written_down(project: Path) -> None:
    assert train(project, "--set", "training.max_steps=3")[0] == 0
    longer = ("--resume", "--set", "training.max_steps=6", "--set", "training.learning_rate=0.002")
    assert train(project, *longer)[0] == 2
    code, output = train(project, *longer, "--allow-changes", "--set", "training.logging_steps=1")
    assert code == 0, output
    record = json.loads((project / "run" / "run.json").read_text())
    assert record["changes"] == [
        {"step": 3, "key": "training.learning_rate", "before": 0.05, "now": 0.002},
        {"step": 3, "key": "training.max_steps", "before": 3, "now": 6},
    ]
    rates = {line["step"]: line["learning_rate"] for line in record["log"] if "loss" in line}
    # 0.002 after one step of warm-up, along a cosine of six steps; "learning_rate" of a line is that of its step
    for step in (4, 5, 6):
        assert rates[step] == pytest.approx(0.002 * (1 + math.cos(math.pi * (step - 1 - 1) / (6 - 1))) / 2)
    after = files_of(project / "run")
    assert train(project, *longer)[0] == 0  # they are the run's settings from here on
    assert files_of(project / "run") == after
    code, output = train(project, "--allow-changes")
    assert code == 2
    assert "add --resume" in output


def test_show_sample_marks_what_is_trained(project: Path) -> None:
    code, output = train(project, "--show-sample")
    assert code == 0, output
    assert re.search(r"<user> w\d+ w\d+ <end> <assistant>【w\d+ <end>】", output), output
    assert not (project / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "adapter.rr=3"], "adapter.rr: unknown key; the nearest is 'r'"),
        (["--set", "model.source=gemma-2-9b"], "gemma-2-9b is a preset of `veneer plan`"),
        (["--set", "data.train=none.jsonl"], "there is no file none.jsonl"),
        (["--set", "adapter.target_modules=[q_prj]"], "q_proj"),
        (["--set", "adapter.target_modules=[query]"], "nearest: q_proj"),
        (["--set", "training.max_length=2"], "is masked"),
        (["--set", "output=/dev/null/run"], "/dev/null/run cannot be made"),
    ],
)
def test_what_a_user_can_mend_is_one_message(project: Path, options: list[str], message: str) -> None:
    code, output = train(project, *options)
    assert code == 2, output
    assert message in " ".join(output.split())
    assert "Traceback" not in output
    assert "not planned" not in output  # by what is told already


def test_files_of_rows_that_are_missing_are_told_together_before_a_plan(project: Path) -> None:
    more = '--set=data.more=[{"source": "more.jsonl"}]'
    code, output = train(
        project,
        "--set",
        f"data.train={project / 'row.jsonl'}",
        "--set",
        "data.eval=held_out.jsonl",
        "--set",
        "data.eval_fraction=0",
        more,
    )
    told = " ".join(output.split())
    assert code == 2, output
    assert f"there is no file {project}/row.jsonl; the nearest is {project}/rows.jsonl data.more" in told
    assert "data.more, entry 1: there is no file more.jsonl --set data.eval=held_out.jsonl: data.eval" in told
    assert "data.eval: there is no file held_out.jsonl" in told
    assert "planned" not in told
    assert not (project / "run").exists()


def test_a_run_that_goes_on_needs_its_rows(project: Path) -> None:
    assert train(project, "--set", "training.save_steps=1")[0] == 0
    record = json.loads((project / "run" / "run.json").read_text())
    (project / "run" / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
    before = files_of(project / "run")
    (project / "rows.jsonl").rename(project / "moved.jsonl")
    code, output = train(project, "--resume")
    assert code == 2, output
    assert "data.train: there is no file rows.jsonl" in output
    assert "planned" not in output
    assert files_of(project / "run") == before


@pytest.mark.usefixtures("unplanned")
def test_the_hash_of_every_file_of_rows_is_written_down(project: Path) -> None:
    (project / "more.jsonl").write_text((project / "rows.jsonl").read_text().replace("w2 w3", "w2 w5"))
    assert train(project, f'--set=data.more=[{{"source": "{project / "more.jsonl"}"}}]')[0] == 0
    found = json.loads((project / "run" / "run.json").read_text())["files"]
    assert found.keys() == {"data.train", "data.more, entry 1"}
    assert len(set(found.values())) == 2


@pytest.mark.usefixtures("unplanned")
def test_an_adapter_that_was_merged_into_the_base_is_not_trained_on(project: Path) -> None:
    assert train(project)[0] == 0
    adapter, merged = project / "run" / "adapter", project / "merged"
    merge_checkpoint(project / "base", adapter, merged)
    into = ("--set", f"model.source={merged}", "--set", f"output={project / 'on'}")
    code, output = train(project, "--set", f"adapter={{from: {adapter}}}", *into)
    assert code == 2, output
    assert "merged has" in output
    assert "in it already" in " ".join(output.split())
    assert not (project / "on").exists()


def test_without_a_recipe() -> None:
    result = CliRunner().invoke(app, ["train"])
    assert result.exit_code == 2
    assert "--print-recipe" in result.output + result.stderr
    printed = CliRunner().invoke(app, ["train", "--print-recipe"])
    assert printed.exit_code == 0
    assert yaml.safe_load(printed.output)["model"]["source"] == "smollm2-135m-instruct"


@pytest.mark.model
def test_the_real_model_learns_in_a_few_steps(project: Path) -> None:
    assert is_fetched("smollm2-135m-instruct"), "run `veneer fetch smollm2-135m-instruct` first"
    changes = [
        f"model.source={model_folder('smollm2-135m-instruct')}",
        "training.learning_rate=1e-3",
        "training.warmup_steps=0",
        "data.limit=2",
        "data.eval_fraction=0",
        "training.max_steps=3",
        "training.logging_steps=1",
        "training.packing=true",
        "training.max_length=96",
        "training.optim=paged_adamw_8bit",
        "training.bf16=true",
        "training.per_device_train_batch_size=1",
    ]
    code, output = train(project, *(part for change in changes for part in ("--set", change)))
    assert code == 0, output
    record = json.loads((project / "run" / "run.json").read_text())
    losses = [line["loss"] for line in record["log"] if "loss" in line]
    assert losses[-1] < losses[0]
