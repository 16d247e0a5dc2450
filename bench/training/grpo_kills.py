"""A GRPO run that is killed at random moments and resumed, beside the run that never was: equal to the bit, or not.

    python -m bench.training.grpo_kills --kills 30

A tiny Llama over bytes, whose rewards are a tool's that answers by chance of its own seed. Each kill is SIGKILL, at a
moment drawn after the run's start: while it draws, rewards, trains or writes. Adapter, log and journal must be equal.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.report import done, ends_as_interrupted, working

CLOCKS = ("_second", "runtime", "_time")


def main() -> None:
    ends_as_interrupted()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        train(options.run, options.steps)
    else:
        compare(options.kills, options.steps, random.Random(options.seed))


def reward(completions: list[str], **row: Any) -> list[float]:
    """Return what the bytes of an answer give, as a tool would that draws by them."""
    return [random.Random(text).random() for text in completions]


def train(folder: Path, steps: int) -> None:
    """Train in a folder, from its last checkpoint if it has one; write the log beside it."""
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    from bench.training.tiny_hub import tokenizer
    from veneer import GRPOConfig, GRPOTrainer, LoraConfig
    from veneer.train.checkpoint import checkpoints

    torch.set_num_threads(1)
    torch.manual_seed(0)
    own = tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(own), num_key_value_heads=2, **sizes))
    args = GRPOConfig(
        output_dir=str(folder), max_steps=steps, save_steps=1, save_total_limit=2, logging_steps=1, bf16=False,
        num_generations=4, per_device_train_batch_size=8, steps_per_generation=2, num_iterations=2, beta=0.02,
        max_completion_length=12, report_to="none", use_cpu=True, disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": f"say {i}"} for i in range(40)])
    trainer = GRPOTrainer(
        model, reward, args, rows, processing_class=own, peft_config=LoraConfig(r=4, target_modules="all-linear")
    )
    trainer.train(resume_from_checkpoint=bool(checkpoints(folder)))
    lines = [{k: v for k, v in line.items() if not k.endswith(CLOCKS)} for line in trainer.state.log_history]
    (folder / "log.json").write_text(json.dumps([line for line in lines if "loss" in line], sort_keys=True))
    trainer.save_model(str(folder / "adapter"))


def started(folder: Path, steps: int) -> subprocess.Popen[str]:
    """Start `train` in a process of its own."""
    command = [sys.executable, "-m", "bench.training.grpo_kills", "--run", str(folder), "--steps", str(steps)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for a run. Raises SystemExit with its errors if it fails."""
    told = process.communicate()[1]
    if process.returncode:
        raise SystemExit(told)


def compare(kills: int, steps: int, chance: random.Random) -> None:
    """Kill one of two runs at random moments of its life, end it, and tell whether it is the other one."""
    with tempfile.TemporaryDirectory() as place:
        whole, broken = Path(place, "whole"), Path(place, "broken")
        finish(started(whole, steps))
        n_killed = 0
        while n_killed < kills:
            working(f"{n_killed} of {kills} kills, {len(list(broken.glob('checkpoint-*')))} checkpoints")
            n_killed += killed(started(broken, steps), broken, chance)
            if (broken / "log.json").exists():
                raise SystemExit(f"the run ended after {n_killed} kills: give more --steps")
        finish(started(broken, steps))
        done()
        names = ("log.json", "adapter/adapter_model.safetensors", "rollouts/0_of_1.jsonl")
        equal = {name: (whole / name).read_bytes() == (broken / name).read_bytes() for name in names}
        differing = first_difference(*(json.loads((folder / names[0]).read_text()) for folder in (whole, broken)))
    print(
        f"{kills} kills in {steps} steps: " + ", ".join(f"{n} {'equal' if e else 'DIFFERS'}" for n, e in equal.items())
    )
    if not all(equal.values()):
        raise SystemExit(differing)


def first_difference(whole: list[dict[str, Any]], broken: list[dict[str, Any]]) -> str:
    """Return the first line of two logs that differs, with its differing values."""
    for number, (one, other) in enumerate(zip(whole, broken, strict=False), start=1):
        values = {key: (one.get(key), other.get(key)) for key in one.keys() | other.keys()}
        if one != other:
            return f"line {number}: { ({key: pair for key, pair in values.items() if pair[0] != pair[1]}) }"
    return f"{len(whole)} and {len(broken)} lines"


def killed(process: subprocess.Popen[str], folder: Path, chance: random.Random) -> bool:
    """Kill a run up to a second after its first own checkpoint; False if it ended before."""
    before = _newest(folder)
    while process.poll() is None and _newest(folder) == before:
        time.sleep(0.01)
    time.sleep(chance.random())
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


def _newest(folder: Path) -> int:
    return max((int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*")), default=0)


if __name__ == "__main__":
    main()
