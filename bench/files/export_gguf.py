"""From an adapter to a Q4_K_M file: ``python -m bench.files.export_gguf MODEL_FOLDER [--rounds N]``.

One command of veneer beside the three steps that people take: PEFT's merge saved as a folder, that folder converted to
F16, and llama-quantize (llama.cpp's own, through cyllama). The middle step is veneer's export to F16, which stands for
llama.cpp's converter: no package carries that. Of both files the change of the base's weights must be the same, but for
rounding. Each step is a process of its own; sides take turns, medians are told. The adapter is a random LoRA of rank 8
on q, k, v and down."""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import peft
import torch
import transformers

from bench.report import add_keep, done, ends_as_interrupted, keep, working
from bench.same import SHARE, require_small
from veneer.store.source import load_model

MERGE = """
import sys, peft, torch, transformers
base, adapter, out = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
transformers.AutoTokenizer.from_pretrained(base).save_pretrained(out)
"""
QUANTIZE = """
import sys
import cyllama.llama.llama_cpp as llama
llama.disable_logging()
params = llama.LlamaModelQuantizeParams()
params.ftype, params.nthread = 15, int(sys.argv[3])
llama.model_quantize(sys.argv[1], sys.argv[2], params)
"""


def export(model: Path, target: Path, kind: str, *more: str) -> list[str]:
    veneer = str(Path(sys.executable).with_name("veneer"))
    return [veneer, "export", "gguf", str(model), "-o", str(target), "--type", kind, *more]


def one_command(base: Path, adapter: Path, folder: Path) -> list[list[str]]:
    return [export(base, folder / "x.gguf", "Q4_K_M", "--adapter", str(adapter))]


def three_steps(base: Path, adapter: Path, folder: Path) -> list[list[str]]:
    python, merged, whole = [sys.executable, "-c"], folder / "merged", folder / "whole.gguf"
    return [
        [*python, MERGE, str(base), str(adapter), str(merged)],
        export(merged, whole, "F16"),
        [*python, QUANTIZE, str(whole), str(folder / "x.gguf"), str(torch.get_num_threads())],
    ]


def run(steps: list[list[str]], folder: Path) -> tuple[list[float], int]:
    """Seconds of each step, and the bytes in the folder at the end: nobody removes anything on the way."""
    seconds = []
    for step in steps:
        start = time.perf_counter()
        subprocess.run(step, check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    return seconds, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def require_same_change(base: Path, own: Path, theirs: Path) -> None:
    """PartedError where the weights of two files are apart by more than a share of what the adapter changes."""
    before = load_model(str(base), dtype=torch.float32).state_dict()
    one, other = (load_model(str(file), dtype=torch.float32, gguf="dense").state_dict() for file in (own, theirs))
    names = [name for name in before if name.endswith("_proj.weight")]
    change, apart = (
        torch.stack([(file[name] - other[name]).norm() for name in names]).norm() for file in (before, one)
    )
    require_small("weights of both files, of what the adapter changes", float(apart / change), SHARE)


def make_adapter(base: Path, folder: Path) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    names = ["q_proj", "k_proj", "v_proj", "down_proj"]
    config = peft.LoraConfig(r=8, lora_alpha=16, init_lora_weights=False, target_modules=names)
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    add_keep(parser)
    given = parser.parse_args()
    ends_as_interrupted()
    with tempfile.TemporaryDirectory() as scratch:
        adapter = make_adapter(given.model, Path(scratch) / "adapter")
        sides = {"one command": one_command, "merge, convert, quantize": three_steps}
        times: dict[str, list[list[float]]] = {name: [] for name in sides}
        sizes = {}
        files = Path(scratch) / "own.gguf", Path(scratch) / "theirs.gguf"
        for turn in range(given.rounds):
            for name, steps in sides.items():
                working(f"turn {turn + 1} of {given.rounds}, {name}")
                folder = Path(scratch) / "out"
                folder.mkdir()
                seconds, sizes[name] = run(steps(given.model, adapter, folder), folder)
                times[name].append(seconds)
                (folder / "x.gguf").rename(files[steps is three_steps])
                shutil.rmtree(folder)
            if not turn:
                require_same_change(given.model, *files)
    done()
    wholes = {name: statistics.median(sum(steps) for steps in rounds) for name, rounds in times.items()}
    for name, rounds in times.items():
        parts = ", ".join(f"{statistics.median(step):.1f}" for step in zip(*rounds, strict=True))
        print(f"{name}: {wholes[name]:.1f} s ({parts}), {sizes[name] / 1e6:,.1f} MB on disk")
    (own, other), (small, large) = wholes.values(), sizes.values()
    keep(given.keep, {"time": own / other, "disk": small / large})


if __name__ == "__main__":
    main()
