"""Answers that need no torch, whose import takes seconds: records of runs, and outputs that a run cannot use."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import yaml

from .conftest import told_early


def asked(prompt: str) -> dict[str, str]:
    """A part ``data`` with a template for prompts."""
    return {"train": "rows.jsonl", "prompt": prompt, "completion": "{text}"}


def recipe(folder: Path, name: str, output: Path, **changes: Any) -> str:
    values = {
        "model": {"source": "nowhere"}, "data": {"train": "rows.jsonl"}, "output": str(output), **changes,
    }  # fmt: skip
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    (folder / name).write_text(yaml.safe_dump(values))
    return str(folder / name)


def test_a_run_is_shown_and_a_wrong_output_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done, trains, begun = (tmp_path / name for name in ("done", "trains", "begun"))
    (done / "adapter").mkdir(parents=True)
    (begun / "checkpoint-3").mkdir(parents=True)
    trains.mkdir()
    run = {"status": "finished", "recipe": {}, "results": {"steps": 7, "train_loss": 1.25}}
    (done / "run.json").write_text(json.dumps(run))
    (trains / "run.json").write_text("[]")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "odd.jsonl").write_text('{"ticket": "a"}\n')
    cases = [
        (("info", str(done)), 0, "status finished steps 7 training loss 1.2500"),
        (("info", str(done), "--json"), 0, '"life": "over"'),
        (("info", str(trains)), 2, "is not the record of a run"),
        (("train", recipe(tmp_path, "a.yaml", tmp_path / "file" / "run")), 2, "cannot be made (Not a directory)"),
        (("train", recipe(tmp_path, "b.yaml", done)), 2, "holds a finished run"),
        (("train", recipe(tmp_path, "c.yaml", begun)), 2, "holds the checkpoints of a run"),
        (("train", recipe(tmp_path, "d.yaml", trains)), 2, "is not the record of a run"),
        (("train", recipe(tmp_path, "e.yaml", done, data={"train": "none.jsonl"})), 2, "there is no file none.jsonl"),
        (
            ("train", recipe(tmp_path, "g.yaml", tmp_path / "new", data=asked("{ticket}"))),
            2,
            "asks for the field 'ticket'",
        ),
        (("train", recipe(tmp_path, "h.yaml", tmp_path / "new", data={"train": "empty.jsonl"})), 2, "holds no rows"),
        (("train", recipe(tmp_path, "i.yaml", tmp_path / "new", data={"train": "odd.jsonl"})), 2, "none of the forms"),
        (
            (
                "train",
                recipe(tmp_path, "j.yaml", tmp_path / "new", data={"train": "rows.jsonl", "train_on": "answers"}),
            ),
            2,
            "data.train_on: answers, and the rows are plain text",
        ),
        (("train", recipe(tmp_path, "f.yaml", tmp_path / "new"), "--resume", "auto"), 2, "no model 'nowhere'"),
    ]
    for (command, status, said), (code, told) in zip(cases, told_early([each[0] for each in cases]), strict=True):
        assert (code, said in told) == (status, True), (command, told)
    assert not (tmp_path / "new").exists()


def test_facts_of_folders_and_files_are_read_before_torch_is_imported(
    model_folder: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((3, 18), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    of_a_recipe = tmp_path / "of_a_recipe"  # in which lora_alpha is 7.0
    shutil.copytree(adapter_folder, of_a_recipe)
    config = json.loads((adapter_folder / "adapter_config.json").read_text())
    (of_a_recipe / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 7.0}))
    cases = [
        (("info", str(of_a_recipe)), "method lora r 3 lora_alpha 7.0 target_modules q_proj, up_proj modules 4"),
        (("info", str(adapter_folder)), "method lora r 3 lora_alpha 7 target_modules q_proj, up_proj modules 4"),
        (("info", str(adapter_folder), "--json"), '"modules": [ "model.layers.0.mlp.up_proj"'),
        (("info", str(model_folder)), "head width 16 rotary theta 10,000"),
        (("info", str(tmp_path / "x.gguf")), "as a base its blocks stay in the file"),
    ]
    for (command, said), (code, told) in zip(cases, told_early([each[0] for each in cases]), strict=True):
        assert (code, said in told) == (0, True), (command, told)


def test_a_damaged_adapter_is_told_before_torch_is_imported(
    model_folder: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    base, weights = str(model_folder), (adapter_folder / "adapter_model.safetensors").read_bytes()
    for name, config, content in (("cut", "{}", weights[:-9]), ("torn", "{", weights), ("bare", "{}", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(config)
        if content is not None:
            (tmp_path / name / "adapter_model.safetensors").write_bytes(content)
    ia3 = tmp_path / "ia3"
    ia3.mkdir()
    values = {"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": []}
    (ia3 / "adapter_config.json").write_text(json.dumps(values))
    key = "base_model.model.model.layers.0.self_attn.k_proj.ia3_l"
    header = json.dumps({key: {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}}).encode()
    (ia3 / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    wrong = {"cut": "is damaged or was cut off (", "torn": "is not valid JSON", "bare": "holds no adapter_model.safete"}
    cases = [
        (command, said)
        for name, said in wrong.items()
        for command in (
            ["generate", base, "-a", str(tmp_path / name), "-p", "x"],
            ["chat", base, "-a", str(tmp_path / name)],
            ["generate", str(tmp_path / name), "-p", "x"],
            ["eval", base, "-a", str(tmp_path / name), "-d", __file__, "-m", "labels"],
            ["combine", str(adapter_folder), str(tmp_path / name), "-o", str(tmp_path / "new")],
        )
    ]
    both = ["combine", str(adapter_folder), str(ia3), "--base", base, "-o", str(tmp_path / "new")]
    cases += [(both, "no method writes both kinds into one adapter")]
    for (command, said), (code, told) in zip(cases, told_early([each[0] for each in cases]), strict=True):
        assert (code, said in told) == (2, True), (command, told)


def test_a_wrong_teacher_is_told_before_torch_is_imported(
    model_folder: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(adapter_folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    teachers = [
        (str(tmp_path / "cut"), "is damaged or was cut off ("),
        ("no_such_model", "'no_such_model'"),
        ("llama-3.1-8b", "distill.teacher: llama-3.1-8b is a preset of `veneer plan`, a shape without weights"),
        (str(tmp_path / "empty"), "empty holds no config.json, so it is not a model"),
    ]
    changes = {"model": {"source": str(model_folder)}, "task": "distill"}
    cases = [
        (("train", recipe(tmp_path, f"{n}.yaml", tmp_path / "new", **changes, distill={"teacher": teacher})), said)
        for n, (teacher, said) in enumerate(teachers)
    ]
    for (command, said), (code, told) in zip(cases, told_early([each[0] for each in cases]), strict=True):
        assert (code, said in told) == (2, True), (command, told)


def test_a_wrong_adapter_to_train_on_is_told_before_torch_is_imported(adapter_folder: Path, tmp_path: Path) -> None:
    for name in ("cut", "bare"):
        (tmp_path / name).mkdir()
    shutil.copy(adapter_folder / "adapter_config.json", tmp_path / "cut")
    weights = (adapter_folder / "adapter_model.safetensors").read_bytes()
    (tmp_path / "cut" / "adapter_model.safetensors").write_bytes(weights[:-9])
    parts: list[tuple[dict[str, str], str]] = [
        ({"from": str(tmp_path / "none")}, f"adapter.from: {tmp_path / 'none'} does not exist"),
        ({"from": str(tmp_path / "bare")}, f"adapter.from: {tmp_path / 'bare'} holds no adapter_config.json"),
        ({"from": str(tmp_path / "cut")}, "is damaged or was cut off ("),
        ({"from": str(adapter_folder), "method": "ia3"}, f"adapter.method: ia3 here, lora in {adapter_folder}"),
    ]
    cases = [
        ([verb, recipe(tmp_path, f"{number}.yaml", tmp_path / "new", adapter=part)], said)
        for number, (part, said) in enumerate(parts)
        for verb in ("train", "plan")
    ]
    for (command, said), (code, told) in zip(cases, told_early([each[0] for each in cases]), strict=True):
        assert (code, said in told) == (2, True), (command, told)


def test_wrong_options_and_rows_of_eval_are_told_before_torch_is_imported(model_folder: Path, tmp_path: Path) -> None:
    base, rows, odd, empty = (
        str(model_folder),
        tmp_path / "rows.jsonl",
        tmp_path / "odd.jsonl",
        tmp_path / "empty.jsonl",
    )
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    odd.write_text('{"asked": "a", "right": "b"}\n')
    empty.write_text("")
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"text": "a", "label": "b"}\n')
    prompt = ("--prompt", "{asked}")
    cases = [
        ((rows, "labels", "--pattern", "x"), "--pattern is not read by --metric labels"),
        ((rows, "regex"), "--metric regex needs --pattern"),
        ((rows, "regex", "--pattern", "("), "not a regular expression"),
        ((rows, "perplexity", "--context", "8", "--stride", "8"), "less than the context"),
        ((rows, "labels", "--predictions", str(tmp_path)), "is a folder: give the file"),
        ((rows, "labels", "--labels", "none.txt"), "--labels none.txt: the file cannot be read"),
        ((rows, "labels", "--system", "be brief"), "system is for conversations"),
        ((odd, "exact-match"), "say how to read them: --prompt"),
        ((odd, "exact-match", *prompt, "--answer-field", "answer"), "no field 'answer'; it has ['asked', 'right']"),
        ((odd, "exact-match", "--prompt", "{question}", "--answer-field", "right"), "'question'"),
        ((odd, "exact-match", *prompt, "--system", "be brief"), "--system belongs to a chat, and --prompt"),
        ((plain, "labels"), "row 1: it has the fields ['label', 'text']; needed are messages, or prompt"),
        ((empty, "exact-match"), "holds no rows"),
    ]
    commands = [["eval", base, "-d", str(file), "-m", *options] for (file, *options), _ in cases]
    commands += [["eval", "-m", "labels"], ["eval", base, "-m", "labels", "--recipe", str(rows)]]
    said = [*(told for _, told in cases), "say what to measure: MODEL and --data FILE", "--recipe says it already"]
    for command, wanted, (code, told) in zip(commands, said, told_early(commands), strict=True):
        assert (code, wanted in told) == (2, True), (command, told)


def test_a_task_that_is_not_planned_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    reward = recipe(tmp_path, "a.yaml", tmp_path / "run", task="reward")
    commands = [["plan", reward, *more] for more in ([], ["--fit", "8GB"], ["--advice"])]
    for command, (code, told) in zip(commands, told_early(commands), strict=True):
        assert (code, " is not planned, because its step has " in told) == (2, True), (command, told)


def test_a_folder_that_may_not_be_written_to_holds_no_run(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    if os.access(closed, os.W_OK):
        return  # everything may be written by root
    ((code, told),) = told_early([["train", recipe(tmp_path, "a.yaml", closed / "run")]])
    assert (code, "cannot be made (Permission denied)" in told) == (2, True)


def test_the_program_finds_no_package_that_it_does_not_use_and_code_of_users_does() -> None:
    code = (
        "import sys\nfrom importlib.util import find_spec\nfrom unittest import mock\nfrom veneer.cli import app\n"
        "from veneer.plain.unused_packages import show_unused\n"
        "with mock.patch.object(app, 'app', lambda: print(find_spec('peft'), find_spec('bitsandbytes'))): app.main()\n"
        "show_unused()\nprint(find_spec('peft') is not None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["None None", "True"], done.stderr
