"""Answers that need no torch, whose import takes seconds: records of runs, and outputs that a run cannot use."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import yaml

from .conftest import told_early


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
    cases = [
        (("info", str(done)), 0, "status finished steps 7 training loss 1.2500"),
        (("info", str(done), "--json"), 0, '"life": "over"'),
        (("info", str(trains)), 2, "is not the record of a run"),
        (("train", recipe(tmp_path, "a.yaml", tmp_path / "file" / "run")), 2, "cannot be made (Not a directory)"),
        (("train", recipe(tmp_path, "b.yaml", done)), 2, "holds a finished run"),
        (("train", recipe(tmp_path, "c.yaml", begun)), 2, "holds the checkpoints of a run"),
        (("train", recipe(tmp_path, "d.yaml", trains)), 2, "is not the record of a run"),
        (("train", recipe(tmp_path, "e.yaml", done, data={"train": "none.jsonl"})), 2, "there is no file none.jsonl"),
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
    cases = [
        (("info", str(adapter_folder)), "method lora r 3 lora_alpha 7 target_modules q_proj, up_proj modules 4"),
        (("info", str(adapter_folder), "--json"), '"modules": [ "model.layers.0.mlp.up_proj"'),
        (("info", str(model_folder)), "head width 16 rotary theta 10,000"),
        (("info", str(tmp_path / "x.gguf")), "as a base its blocks stay in the file"),
    ]
    for (command, said), (code, told) in zip(cases, told_early([each[0] for each in cases]), strict=True):
        assert (code, said in told) == (0, True), (command, told)


def test_a_folder_that_may_not_be_written_to_holds_no_run(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    if os.access(closed, os.W_OK):
        return  # everything may be written by root
    ((code, told),) = told_early([["train", recipe(tmp_path, "a.yaml", closed / "run")]])
    assert (code, "cannot be made (Permission denied)" in told) == (2, True)
