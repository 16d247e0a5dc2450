"""Stage 1: commands on a tiny model, on the GPU and beside it on the CPU, whose losses and answers must agree.

    python -m bench.gpu.commands train dense|nf4|… [--rehearse]
    python -m bench.gpu.commands generate|eval|serve [--rehearse]

Exit status 1 if a command fails or the two sides part.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from bench.gpu.runner import figure
from bench.serving.engine import process_group
from bench.tiny_model import write_tiny

STEPS = 5
APART = 0.02  # between losses of the two sides in bfloat16, and perplexities, of their size
VENEER = (sys.executable, "-c", "from veneer.cli.app import main; main()")
SIDES: dict[str, dict[str, str]] = {"gpu": {}, "cpu": {"CUDA_VISIBLE_DEVICES": ""}}
PAIRS = {"train": "pairs.jsonl"}
CHANGES: dict[str, dict[str, Any]] = {
    "dense": {},
    "nf4": {"model": {"quantization": "nf4"}},
    "int8": {"model": {"quantization": "int8"}},
    "paged": {"model": {"quantization": "nf4"}, "training": {"optim": "paged_adamw_8bit"}},
    "dropout": {"adapter": {"lora_dropout": 0.1}},
    "dora": {"adapter": {"method": "dora"}},
    "packed": {"training": {"packing": True}},
    "galore": {"adapter": {"method": "full"}, "training": {"optim": "galore_adamw"}},
    "dpo": {"task": "dpo", "data": PAIRS},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "generate", "eval", "serve"))
    parser.add_argument("change", choices=CHANGES, nargs="?", default="dense")
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny(folder / "model")
        _write_rows(folder)
        compare = {"train": _train, "generate": _generate, "eval": _eval, "serve": _serve}[args.command]
        agrees = compare(folder, args.change)
    if not agrees:
        print("the GPU and the CPU part, or nothing was learned: see the figures")
    return int(not agrees)


def _write_rows(folder: Path) -> None:
    texts = [" ".join(f"w{(7 * n * k + k) % 200 + 2}" for k in range(1, 40)) for n in range(1, 17)]
    rows = [{"text": text} for text in texts]
    pairs = [{"prompt": text[:40], "chosen": text[40:90], "rejected": text[90:140]} for text in texts]
    for file, made in (("rows", rows), ("pairs", pairs)):
        (folder / f"{file}.jsonl").write_text("\n".join(map(json.dumps, made)), encoding="utf-8")


def _veneer(folder: Path, side: str, *words: str) -> str:
    """Return what a command prints. SystemExit with its last lines if it fails."""
    done = subprocess.run(
        [*VENEER, *words], cwd=folder, env=os.environ | SIDES[side], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"veneer {' '.join(words)}, on the {side}: {(done.stdout + done.stderr).strip()[-1500:]}")
    return done.stdout


def _train(folder: Path, change: str) -> bool:
    """Losses of both sides, which fall."""
    losses = {side: _losses(folder, side, CHANGES[change]) for side in SIDES}
    apart = max(abs(a - b) / abs(b) for a, b in zip(losses["gpu"], losses["cpu"], strict=True))
    figure("losses", first=losses["gpu"][0], last=losses["gpu"][-1], apart=apart)
    # Masks of dropout are alike on both: they are drawn by a counter.
    return apart <= APART and losses["gpu"][-1] < losses["gpu"][0]


def _losses(folder: Path, side: str, change: dict[str, Any]) -> list[float]:
    recipe: dict[str, Any] = {
        "task": "sft",
        "model": {"source": "model", "dtype": "bfloat16"},
        "data": {"train": "rows.jsonl"},
        "adapter": {"method": "lora", "r": 8},
        "training": {
            "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "logging_steps": 1,
            "max_length": 32, "report_to": "none",
        },
        "seed": 3,
        "output": side,
    }  # fmt: skip
    for key, value in change.items():
        own = recipe.get(key)
        recipe[key] = {**own, **value} if isinstance(own, dict) and value is not PAIRS else value
    if recipe["adapter"]["method"] == "full":
        recipe["adapter"] = {"method": "full"}
    (folder / f"{side}.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    _veneer(folder, side, "train", f"{side}.yaml", "--beyond-memory")
    log = json.loads((folder / side / "run.json").read_text(encoding="utf-8"))["log"]
    return [entry["loss"] for entry in log if "loss" in entry]


def _generate(folder: Path, change: str) -> bool:
    """The greedy answer in float32, in which both sides choose the same tokens."""
    asked = ("generate", "model", "-p", "w5 w9 w21", "--raw", "--max-new-tokens", "12", "--dtype", "float32")
    answers = {side: _veneer(folder, side, *asked).split() for side in SIDES}
    figure("answer", tokens=float(len(answers["gpu"])), alike=float(answers["gpu"] == answers["cpu"]))
    return answers["gpu"] == answers["cpu"] != []


def _eval(folder: Path, change: str) -> bool:
    asked = ("eval", "model", "-d", "rows.jsonl", "-m", "perplexity", "--json")
    found = [float(json.loads(_veneer(folder, side, *asked))["value"]) for side in SIDES]
    apart = abs(found[0] - found[1]) / found[1]
    figure("perplexity", gpu=found[0], cpu=found[1], apart=apart)
    return apart <= APART


def _serve(folder: Path, change: str) -> bool:
    """A completion over HTTP is the one of `generate`."""
    expected = _veneer(
        folder, "gpu", "generate", "model", "-p", "w5 w9 w21", "--raw", "--max-new-tokens", "12", "--dtype", "float32"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begin = time.monotonic()
    command = [*VENEER, "serve", str(folder / "model"), "--port", str(port), "--dtype", "float32", "--kv-gib", "0.5"]
    with process_group(command, stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno()) as server:
        _wait_for(f"http://127.0.0.1:{port}/health", server)
        figure("server", ready_s=time.monotonic() - begin)
        body = {"model": str(folder / "model"), "prompt": "w5 w9 w21", "max_tokens": 12, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            text = json.loads(response.read())["choices"][0]["text"]
    figure("completion", tokens=float(len(text.split())), alike=float(text.split() == expected.split()))
    return bool(text.split() == expected.split() != [])


def _wait_for(url: str, server: subprocess.Popen[str]) -> None:
    """SystemExit if the server ends before it answers."""
    while server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.3)
    raise SystemExit(f"veneer serve ended with {server.returncode}")


if __name__ == "__main__":
    sys.exit(main())
