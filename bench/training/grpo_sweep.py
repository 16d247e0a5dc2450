"""Members of GRPO that draw by one engine, beside the same runs one after another, with SmolLM2-135M-Instruct.

    python -m bench.training.grpo_sweep [--members 8] [--prompts 8] [--answers 4]

Each member has prompts of 32 tokens, with answers of 32 tokens each, in float32; LoRA of rank 8 on all linear layers,
with a rate and a seed of its own, and one copy of the base. Each measurement is a process of its own. The adapters that
the two sides train must be equal to the bit. The first step, with its proof, and the last, with the end of a
run, are left out, as is the loading.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.report import Rows, add_keep, done, ends_as_interrupted, keep, last_printed, quiet_libraries, working

SIDES = {"one after another": "alone", "together": "together"}
N_TOKENS = 32
REWARDS = """
def spread(completions, **row):
    return [len(set(text)) / max(len(text), 1) for text in completions]
"""


def main() -> None:
    ends_as_interrupted()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--side", choices=list(SIDES.values()))
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--answers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    add_keep(parser)
    options = parser.parse_args()
    compare(options) if options.side is None else one_side(options)


def jobs_of(options: argparse.Namespace, place: Path) -> list[Any]:
    """Return the jobs of the members, each a GRPO run of its own."""
    from veneer.store.source import load_tokenizer
    from veneer.train.sweep.recipe import parse_sweep
    from veneer.train.sweep.together import Job

    tokenizer = load_tokenizer(options.model)
    words = [f"{i} {'word ' * N_TOKENS}" for i in range(64)]
    rows = [{"prompt": tokenizer.decode(tokenizer(text)["input_ids"][:N_TOKENS])} for text in words]
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (place / "rewards.py").write_text(REWARDS)
    training = {
        "max_steps": options.steps + 2, "per_device_train_batch_size": options.prompts * options.answers,
        "num_generations": options.answers, "max_completion_length": N_TOKENS, "save_strategy": "no", "bf16": False,
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False, "logging_steps": 1,
    }  # fmt: skip
    values = {
        "task": "grpo", "model": {"source": options.model, "dtype": "float32"},
        "adapter": {"method": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "data": {"train": str(place / "rows.jsonl")}, "rewards": [f"{place / 'rewards.py'}:spread"],
        "rollouts": {"engine": "engine", "memory": "one"}, "training": training, "output": str(place / "runs"),
        "sweep": {
            "members": [
                {"name": f"m{n}", "seed": n, "training.learning_rate": 1e-4 * (n + 1)} for n in range(options.members)
            ]
        },
    }  # fmt: skip
    return [Job(member, None) for member in parse_sweep(values, place / "sweep.yaml").members]


def one_side(options: argparse.Namespace) -> None:
    """Train the members and print the seconds of a step of all, the peak of memory, and a hash of the adapters."""
    import torch
    from transformers import TrainerCallback

    from bench.resident import forget_high_water, high_water_mb
    from veneer.learn.together import draw_together
    from veneer.learn.trainer import DrawingTrainer
    from veneer.train.interrupt import Stop

    quiet_libraries()
    torch.set_num_threads(options.threads)
    steps: dict[int, list[tuple[float, float]]] = {}  # of each trainer, the times at the ends of its steps

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            steps.setdefault(id(self), []).append((time.process_time(), time.perf_counter()))

    surround = DrawingTrainer.surround

    def clocked(self: Any) -> None:
        surround(self)
        self.add_callback(Clock())
        self.policy.params.stop_token_ids = None  # so that no answer ends before its length

    DrawingTrainer.surround = clocked  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        jobs = jobs_of(options, Path(folder))
        forget_high_water()
        packs = [jobs] if options.side == "together" else [[job] for job in jobs]
        for pack in packs:
            draw_together(pack, lambda line: None, Stop())
        saved = [Path(job.member.recipe.output) / "adapter" / "adapter_model.safetensors" for job in jobs]
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in saved]
    times = [*steps.values()]
    if options.side == "together":  # rounds, which end with the last member's step
        times = [[max(own[n] for own in times) for n in range(options.steps + 2)]]
    spent = [sum(own[-2][i] - own[0][i] for own in times) / options.steps for i in (0, 1)]
    print(json.dumps({"cpu": spent[0], "wall": spent[1], "mb": high_water_mb(), "adapters": digests}))


def measured(options: argparse.Namespace, side: str) -> dict[str, Any]:
    """Return the figures that `one_side` prints in a process of its own."""
    told = ("model", "members", "prompts", "answers", "steps", "threads")
    given = [part for name in told for part in (f"--{name}", str(getattr(options, name)))]
    return last_printed([sys.executable, "-m", "bench.training.grpo_sweep", "--side", side, *given], side)


def compare(options: argparse.Namespace) -> None:
    """Print medians of the sides, taken in turns."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
    for turn in range(options.repeats):
        for name, side in SIDES.items():
            working(f"turn {turn + 1} of {options.repeats}, {name}")
            found[name].append(measured(options, side))
        if len({tuple(runs[-1]["adapters"]) for runs in found.values()}) > 1:
            raise SystemExit("the two sides train different adapters: no times are given")
    done()
    rows = Rows(SIDES, ("CPU s a step of all", "wall s", "peak MB"))
    middle = {
        name: [statistics.median(run[key] for run in runs) for key in ("cpu", "wall", "mb")]
        for name, runs in found.items()
    }
    for name, (cpu, wall, mb) in middle.items():
        rows.add(name, f"{cpu:.2f}", f"{wall:.2f}", f"{mb:.0f}")
    alone, together = middle.values()
    print(
        f"{options.members} members of {options.prompts} x {options.answers} answers: {alone[0] / together[0]:.2f}x as "
        f"fast together (CPU; wall {alone[1] / together[1]:.2f}x), {together[2] / alone[2]:.2f}x of the memory of one "
        "after another; adapters equal to the bit"
    )
    keep(options.keep, {"cpu": alone[0] / together[0], "memory": together[2] / alone[2]})


if __name__ == "__main__":
    main()
