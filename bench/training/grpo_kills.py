"""A GRPO run that is killed at random moments and resumed, beside the run that never was: equal to the bit, or not.

    python -m bench.training.grpo_kills --kills 30

A tiny Llama over bytes, whose conversations call a tool. Tool and rewards answer at random, from the system's own
source. Each kill is SIGKILL, at a moment drawn after the run's start: while it draws, rewards, trains or writes.
The uninterrupted run comes second, and is told by the first one's journal what tool and rewards said. It draws anew
if its adapter, prompts or answers are others. Adapter, log and journal must be equal.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.report import done, ends_as_interrupted, working

CLOCKS = ("_second", "runtime", "_time")
JOURNAL = "rollouts/0_of_1.jsonl"
CALL = r'<tool_call>\{"name": "roll", "arguments": \{"sides": [2-9]\}\}</tool_call>'
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CALLS = {"open": "<tool_call>", "close_pattern": r"</tool_call>\s*", "repeats": True, "content": "json"}
RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {**CALLS, "transform": {"type": "function", "function": "{content}"}},
        "content": {"close_pattern": r"<\|end\|>\s*", "content": "text"},
    },
}


def main() -> None:
    ends_as_interrupted()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--told-by", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        train(options.run, options.steps, options.told_by)
    else:
        compare(options.kills, options.steps, random.Random(options.seed))


def reward(completions: list[Any], **row: Any) -> list[float]:
    """Return rewards of chance."""
    return [random.SystemRandom().random() for _ in completions]


def roll(sides: int) -> str:
    """Roll a die.

    Args:
        sides: Its sides.
    """
    return str(random.SystemRandom().randint(1, sides))


def train(folder: Path, steps: int, told_by: Path | None) -> None:
    """Train in a folder, from its last checkpoint if it has one; write the log beside it.

    ``told_by``: a journal that tells from the first step what tool and rewards said.
    """
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    from bench.training.tiny_hub import tokenizer
    from veneer import GRPOConfig, GRPOTrainer, LoraConfig
    from veneer.learn.journal import Journal
    from veneer.train.checkpoint import checkpoints

    class Trainer(GRPOTrainer):
        def resolve_resume(self, resume: str | bool | None) -> str | None:
            found = super().resolve_resume(resume)
            if told_by is not None:
                self.journal = Journal(told_by, keeps=True)
            return found

    torch.set_num_threads(1)
    torch.manual_seed(0)
    own = tokenizer()
    own.chat_template, own.response_template = TEMPLATE, RESPONSE
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(own), num_key_value_heads=2, **sizes))
    args = GRPOConfig(
        output_dir=str(folder), max_steps=steps, save_steps=1, save_total_limit=2, logging_steps=1, bf16=False,
        num_generations=4, per_device_train_batch_size=8, steps_per_generation=2, num_iterations=2, beta=0.02,
        max_completion_length=200, report_to="none", use_cpu=True, disable_tqdm=True, learning_rate=1e-2,
        max_tool_calling_iterations=1, use_vllm=True, vllm_structured_outputs_regex=CALL, rollout_engine="engine",
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": f"roll {i}"}]} for i in range(40)])
    trainer = Trainer(
        model, reward, args, rows, processing_class=own, tools=[roll],
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=bool(checkpoints(folder)))
    lines = [{k: v for k, v in line.items() if not k.endswith(CLOCKS)} for line in trainer.state.log_history]
    (folder / "log.json").write_text(json.dumps([line for line in lines if "loss" in line], sort_keys=True))
    trainer.save_model(str(folder / "adapter"))


def started(folder: Path, steps: int, told_by: Path | None = None) -> subprocess.Popen[str]:
    """Start `train` in a process of its own."""
    command = [sys.executable, "-m", "bench.training.grpo_kills", "--run", str(folder), "--steps", str(steps)]
    command += [] if told_by is None else ["--told-by", str(told_by)]
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
        n_killed = 0
        while n_killed < kills:
            working(f"{n_killed} of {kills} kills, {len(list(broken.glob('checkpoint-*')))} checkpoints")
            n_killed += killed(started(broken, steps), broken, chance)
            if (broken / "log.json").exists():
                raise SystemExit(f"the run ended after {n_killed} kills: give more --steps")
        finish(started(broken, steps))
        (whole / JOURNAL).parent.mkdir(parents=True)
        told_by = Path(place, "told.jsonl")
        shutil.copy(broken / JOURNAL, told_by)
        finish(started(whole, steps, told_by))
        shutil.move(told_by, whole / JOURNAL)
        done()
        names = ("log.json", "adapter/adapter_model.safetensors", JOURNAL)
        equal = {name: (whole / name).read_bytes() == (broken / name).read_bytes() for name in names}
        n_calls = sum(json.loads(line)["calls"] for line in (broken / JOURNAL).read_text().splitlines())
        differing = first_difference(*(json.loads((folder / names[0]).read_text()) for folder in (whole, broken)))
    print(
        f"{kills} kills in {steps} steps, {n_calls} calls of the tool: "
        + ", ".join(f"{n} {'equal' if e else 'DIFFERS'}" for n, e in equal.items())
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
