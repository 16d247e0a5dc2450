"""A DPO step of SmolLM2-135M-Instruct beside TRL with PEFT, and a short run that moves a held-out preference.

    python -m bench.training.preference pairs ROWS.jsonl PAIRS.jsonl      pairs from rows of prompt and completion
    python -m bench.training.preference step PAIRS.jsonl                  time and memory of a step, both sides in turns
    python -m bench.training.preference learn PAIRS.jsonl HELD_OUT.jsonl  accuracy before and after

A pair is a row's own completion and that of another row. Each measurement of a step is a process of its own. Three
steps of both sides are compared first, from the same factors, which change the logits, and without dropout: losses, and
gradients of the first step.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.report import add_keep, done, ends_as_interrupted, keep, last_printed, working


def main() -> None:
    ends_as_interrupted()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["pairs", "step", "learn", "side"])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--side", default="veneer", choices=["veneer", "peer"])
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--max-length", type=int, default=256)
    add_keep(parser)
    options = parser.parse_args()
    {"pairs": make_pairs, "step": compare, "learn": learn, "side": one_side}[options.what](options)


def make_pairs(options: argparse.Namespace) -> None:
    """Write pairs: a row's own completion, and that of the row seven further on."""
    rows = [json.loads(line) for line in options.files[0].read_text().splitlines()]
    others = [rows[(i + 7) % len(rows)]["completion"] for i in range(len(rows))]
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other}
        for row, other in zip(rows, others, strict=True)
        if row["completion"] != other
    ]
    options.files[1].write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def trainer_of(options: argparse.Namespace, side: str, **changes: Any) -> Any:
    """The trainer of a side; LoRA of rank 16 on all linear layers, no checkpointing, autocast to bfloat16."""
    import torch
    from datasets import Dataset

    from veneer.store.source import load_model, load_tokenizer

    if side == "veneer":
        adapters = trainers = importlib.import_module("veneer")
    else:
        adapters, trainers = importlib.import_module("peft"), importlib.import_module("trl")
    sets = [Dataset.from_list([json.loads(line) for line in file.read_text().splitlines()]) for file in options.files]
    args = trainers.DPOConfig(
        **{
            "output_dir": tempfile.mkdtemp(), "max_steps": options.steps, "logging_steps": 1, "save_strategy": "no",
            "report_to": "none", "per_device_train_batch_size": options.pairs, "max_length": options.max_length,
            "learning_rate": options.learning_rate, "gradient_checkpointing": False, "disable_tqdm": True,
            "disable_dropout": options.dropout == 0,
            "train_sampling_strategy": "sequential", "use_cpu": not torch.cuda.is_available(), **changes,
        }
    )  # fmt: skip
    lora = {"r": 16, "lora_alpha": 32, "lora_dropout": options.dropout, "target_modules": "all-linear"}
    return trainers.DPOTrainer(
        load_model(options.model),
        args=args,
        train_dataset=sets[0],
        eval_dataset=sets[1] if len(sets) > 1 else None,
        processing_class=load_tokenizer(options.model),
        peft_config=adapters.LoraConfig(**lora),
    )


def checked(options: argparse.Namespace, side: str, start: dict[str, Any]) -> tuple[list[float], dict[str, Any]]:
    """Losses of three steps from some factors and the gradients of the first; ``start`` is filled if it is empty."""
    from bench.same import saved, stir
    from bench.training.train_sides import Gradients

    quiet = argparse.Namespace(**vars(options) | {"dropout": 0.0, "steps": 3, "learning_rate": 1e-3})
    trainer, first = trainer_of(quiet, side), Gradients()
    if start:
        importlib.import_module("veneer").set_peft_model_state_dict(trainer.model, start)
    else:
        start |= saved(stir(trainer.model))
    trainer.add_callback(first)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], first.found


def require_same(options: argparse.Namespace) -> None:
    """SystemExit where gradients or losses of both sides part."""
    from bench.lora_step import agree
    from bench.same import SHARE, require_same_gradients

    start: dict[str, Any] = {}
    (theirs, expected), (own, found) = (checked(options, side, start) for side in ("peer", "veneer"))
    require_same_gradients("DPO", expected, found, SHARE)
    agree("DPO: losses of three steps", theirs, own)


def one_side(options: argparse.Namespace) -> None:
    """Train some steps and print their seconds, losses and the growth of peak memory, as JSON."""
    from transformers import TrainerCallback

    from bench.resident import forget_high_water, high_water_mb

    class Clock(TrainerCallback):  # type: ignore[misc]
        seconds: list[float]
        cpu: list[float]
        began: tuple[float, float]

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.seconds, self.cpu = [], []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.began[0])
            self.cpu.append(time.process_time() - self.began[1])

    trainer, clock = trainer_of(options, options.side), Clock()
    trainer.add_callback(clock)
    forget_high_water()
    before = high_water_mb()
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    mb = high_water_mb() - before
    print(json.dumps({"seconds": clock.seconds[1:], "cpu": clock.cpu[1:], "losses": losses, "mb": mb}))


def measured(options: argparse.Namespace, side: str, dropout: float) -> dict[str, Any]:
    """Return the figures that `one_side` prints in a process of its own."""
    command = [
        sys.executable, "-m", "bench.training.preference", "side", str(options.files[0]), "--side", side,
        "--dropout", str(dropout), "--steps", str(options.steps), "--model", options.model,
        "--pairs", str(options.pairs), "--max-length", str(options.max_length),
    ]  # fmt: skip
    return last_printed(command, side)


def compare(options: argparse.Namespace) -> None:
    """Print medians of both sides, taken in turns. SystemExit where they do not compute the same."""
    require_same(options)
    times, cpu, memory = ({side: list[float]() for side in ("peer", "veneer")} for _ in range(3))
    for turn in range(options.repeats):
        for side in times:
            working(f"turn {turn + 1} of {options.repeats}, {side}")
            found = measured(options, side, options.dropout)
            times[side].append(statistics.median(found["seconds"]))
            cpu[side].append(statistics.median(found["cpu"]))
            memory[side].append(found["mb"])
    done()
    middle = {side: [statistics.median(kept[side]) for kept in (times, cpu, memory)] for side in times}
    for side, (seconds, busy, mb) in middle.items():
        spread = f"{min(cpu[side]):.2f}-{max(cpu[side]):.2f}"
        print(f"{side}: {seconds:.2f} s a step, {busy:.2f} s of CPU time ({spread}), {mb:.0f} MB")
    ratios = [own / other for own, other in zip(middle["veneer"], middle["peer"], strict=True)]
    print("time {:.2f}x, CPU time {:.2f}x, memory {:.2f}x".format(*ratios))
    keep(options.keep, dict(zip(("time", "cpu", "memory"), ratios, strict=True)))


def learn(options: argparse.Namespace) -> None:
    """Train, and print the share of held-out pairs whose chosen answer is the more probable one, before and after."""
    trainer = trainer_of(
        options, "veneer", warmup_steps=5, lr_scheduler_type="cosine", train_sampling_strategy="random"
    )

    def accuracies() -> tuple[float, float]:
        import torch

        from veneer.adapters.token_scores import PreferenceScoring
        from veneer.train.preference.scores import ScoredModel

        with torch.no_grad():
            found, total = 0, 0
            for batch in trainer.get_eval_dataloader():
                labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
                inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
                own = ScoredModel(trainer.model, PreferenceScoring(details=False))(
                    **inputs, labels=labels, fused_lm_head=True
                ).log_probs.sum(dim=1)
                chosen, rejected = own.chunk(2)
                found, total = found + int((chosen > rejected).sum()), total + len(chosen)
        return found / total, total

    before, total = accuracies()
    trainer.train()
    after, _ = accuracies()
    rewards = trainer.evaluate()["eval_rewards/accuracies"]
    print(f"{total} held-out pairs: chosen more probable {before:.1%} before, {after:.1%} after {options.steps} steps;")
    print(f"rewards prefer the chosen one in {rewards:.1%}")


if __name__ == "__main__":
    main()
