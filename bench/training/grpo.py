"""A GRPO step of SmolLM2-135M-Instruct: the engine draws, transformers draws, and TRL with PEFT.

    python -m bench.training.grpo step        CPU seconds and memory of a step, the sides in turns
    python -m bench.training.grpo pass        the training pass with the prompt once, and with a copy for each answer,
                                              which must have equal log-probabilities and gradients
    python -m bench.training.grpo handover    milliseconds to give the engine the adapter in training

Four prompts of 32 tokens with four answers of 32 tokens each, in float32; LoRA of rank 8 on all linear layers, with
dropout in the training passes. Each measurement of a step is a process of its own, whose first step is left out. Before
it, each side computes the loss and gradient of the same answers with the same adapter, which must be equal. The seconds
that drawing takes are apart.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import sys
import tempfile
import time
from typing import Any

from bench.report import Rows, add_keep, done, ends_as_interrupted, keep, last_printed, quiet_libraries, working

SIDES = {
    "TRL + PEFT, generate": "peer", "veneer, generate": "generate", "veneer, engine": "engine",
    "veneer, engine, one copy of the base": "one",
}  # fmt: skip
N_TOKENS, N_PROMPTS, N_ANSWERS = 32, 4, 4
CLOSE = 1e-4  # relative, between losses and between norms of gradients of two sides


def main() -> None:
    ends_as_interrupted()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["step", "pass", "handover", "side"])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--side", default="engine", choices=list(SIDES.values()))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dropout", type=float, default=0.05)
    add_keep(parser)
    options = parser.parse_args()
    {"step": compare, "pass": pass_of_answers, "handover": hand_over, "side": one_side}[options.what](options)


def reward(completions: list[str], **row: Any) -> list[float]:
    """The share of different characters, so that answers of a prompt differ in reward."""
    return [len(set(text)) / max(len(text), 1) for text in completions]


def trainer_of(options: argparse.Namespace) -> Any:
    """The trainer of a side; no answer ends before its length, so that all sides compute equally much."""
    from datasets import Dataset

    from veneer.store.source import load_model, load_tokenizer

    quiet_libraries()
    peer = options.side == "peer"
    adapters, trainers = (importlib.import_module(name) for name in (("peft", "trl") if peer else ("veneer",) * 2))
    tokenizer = load_tokenizer(options.model)
    words = [f"{i} {'word ' * N_TOKENS}" for i in range(64)]
    rows = [{"prompt": tokenizer.decode(tokenizer(text)["input_ids"][:N_TOKENS])} for text in words]
    one = {"rollout_engine": "engine", "rollout_memory": "one"}
    own = {} if peer else one if options.side == "one" else {"rollout_engine": options.side}
    args = trainers.GRPOConfig(
        output_dir=tempfile.mkdtemp(), max_steps=options.steps + 1, logging_steps=1, save_strategy="no", use_cpu=True,
        report_to="none", per_device_train_batch_size=N_PROMPTS * N_ANSWERS, num_generations=N_ANSWERS, bf16=False,
        max_completion_length=N_TOKENS, gradient_checkpointing=False, disable_tqdm=True, disable_dropout=False, **own,
    )  # fmt: skip
    trainer = trainers.GRPOTrainer(
        load_model(options.model, dtype="float32"),
        reward,
        args,
        Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=adapters.LoraConfig(r=8, lora_alpha=16, lora_dropout=options.dropout, target_modules="all-linear"),
    )
    _without_end(trainer)
    return trainer


def _without_end(trainer: Any) -> None:
    if getattr(trainer, "policy", None) is not None:
        trainer.policy.params.stop_token_ids = None
    else:
        trainer.generation_config.eos_token_id = None
        trainer.eos_token_ids = [-1]  # TRL cuts what transformers drew by these


def loss_of(trainer: Any) -> tuple[float, float]:
    """Return the loss of given answers under an adapter of given values, and the norm of its gradient.

    The adapter is as it was afterwards. Sides agree on this pair if they learn the same from the same answers.
    """
    import torch

    own = [(name, x) for name, x in trainer.model.named_parameters() if x.requires_grad]
    before = [x.detach().clone() for _, x in own]
    n, t = N_PROMPTS * N_ANSWERS, N_TOKENS
    n_ids = min(40_000, trainer.model.config.vocab_size)
    ids = (torch.arange(n * t).view(n, t) * 37 + 11) % n_ids
    ones = torch.ones(n, t, dtype=torch.long)
    inputs = {
        "prompt_ids": (ids * 3 % n_ids)[::N_ANSWERS].repeat_interleave(N_ANSWERS, dim=0), "prompt_mask": ones,
        "completion_ids": ids, "completion_mask": ones, "advantages": torch.linspace(-1, 1.5, n),
        "old_per_token_logps": torch.full((n, t), -14.0), "num_items_in_batch": torch.tensor(n * t),
    }  # fmt: skip
    with torch.no_grad():
        for name, x in own:
            places = torch.arange(x.numel(), dtype=torch.float32).view(x.shape)
            x.copy_(torch.sin(places * (0.37 if "lora_A" in name else 0.73)) * 0.02)
    trainer.model.eval()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    norm = norm_of_gradient(trainer.model)
    trainer._metrics["eval"].clear()
    with torch.no_grad():
        for (_, x), old in zip(own, before, strict=True):
            x.copy_(old)
    return float(loss), norm


def norm_of_gradient(model: Any) -> float:
    """Return the norm of the gradient that a model holds, and take it away."""
    trained = [x for x in model.parameters() if x.requires_grad]
    norm = math.sqrt(sum(float(x.grad.double().square().sum()) for x in trained))
    model.zero_grad()
    return norm


def require_same_loss(found: dict[str, tuple[float, float]]) -> None:
    """Raise SystemExit unless all sides compute the same loss with the same norm of its gradient."""
    (first, told), *others = found.items()
    for name, own in others:
        if not all(math.isclose(a, b, rel_tol=CLOSE) for a, b in zip(told, own, strict=True)):
            raise SystemExit(f"loss and norm of the gradient are {told} in {first} and {own} in {name}")


def one_side(options: argparse.Namespace) -> None:
    """Train some steps and print their CPU seconds, those of drawing, and the peak of memory, as JSON."""
    import torch
    from transformers import TrainerCallback

    from bench.resident import forget_high_water, high_water_mb

    torch.set_num_threads(options.threads)
    drawing, steps, began = [0.0], list[tuple[float, float]](), [0.0]

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.process_time()
            steps.append((now - began[0], drawing[0]))
            began[0], drawing[0] = now, 0.0

    trainer = trainer_of(options)
    loss = loss_of(trainer)
    turn = trainer._generate_single_turn

    def timed(*args: Any, **how: Any) -> Any:
        start = time.process_time()
        found = turn(*args, **how)
        drawing[0] += time.process_time() - start
        return found

    trainer._generate_single_turn = timed
    trainer.add_callback(Clock())
    forget_high_water()
    began[0] = time.process_time()
    trainer.train()
    lengths = {line["completions/mean_length"] for line in trainer.state.log_history if "loss" in line}
    if lengths != {float(N_TOKENS)}:
        raise SystemExit(f"answers have {lengths} tokens, and {N_TOKENS} were asked for")
    print(json.dumps({"steps": steps[1:], "mb": high_water_mb(), "loss": loss}))


def measured(options: argparse.Namespace, side: str) -> dict[str, Any]:
    """Return the figures that `one_side` prints in a process of its own."""
    command = [
        sys.executable, "-m", "bench.training.grpo", "side", "--side", side, "--steps", str(options.steps),
        "--model", options.model, "--threads", str(options.threads), "--dropout", str(options.dropout),
    ]  # fmt: skip
    return last_printed(command, side)


def compare(options: argparse.Namespace) -> None:
    """Print medians of the sides, taken in turns."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
    for turn in range(options.repeats):
        for name, side in SIDES.items():
            working(f"turn {turn + 1} of {options.repeats}, {name}")
            found[name].append(measured(options, side))
        require_same_loss({name: runs[-1]["loss"] for name, runs in found.items()})
    done()
    rows = Rows(SIDES, ("CPU s a step", "draw", "share", "peak MB"))
    middle = {}
    for name, runs in found.items():
        step, draw = (statistics.median(s[i] for run in runs for s in run["steps"]) for i in (0, 1))
        mb = statistics.median(run["mb"] for run in runs)
        middle[name] = step, mb
        rows.add(name, f"{step:.2f}", f"{draw:.2f}", f"{draw / step:.0%}", f"{mb:.0f}")
    peer, before, own, one = (middle[name] for name in SIDES)
    print(f"engine: {own[0] / peer[0]:.2f}x of TRL + PEFT (goal 0.50x), {own[0] / before[0]:.2f}x of generate (0.60x)")
    print(f"one copy of the base: {one[0] / own[0]:.2f}x of the time of two, {one[1] / own[1]:.2f}x of the memory")
    keep(options.keep, {"cpu": own[0] / peer[0], "cpu of generate": own[0] / before[0], "memory": own[1] / peer[1]})


def pass_of_answers(options: argparse.Namespace) -> None:
    """Print the CPU seconds of forward and backward pass over the answers to one prompt: 256 and 8 times 64 tokens."""
    import torch

    from bench.same import stir
    from veneer.adapters import token_scores
    from veneer.model.fused.decoder import fused

    torch.set_num_threads(options.threads)
    model = trainer_of(argparse.Namespace(**vars(options) | {"side": "engine"})).model
    model.config.use_cache = False
    ids = (torch.arange(8 * 320).view(8, 320) * 37 + 11) % min(40_000, model.config.vocab_size)
    ids[:, :256] = ids[0, :256]
    labels = ids.clone()
    labels[:, :256] = -100
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    ways = {"prompt once": token_scores.shared_rows, "a copy for each answer": lambda *_: None}
    found: dict[str, list[float]] = {name: [] for name in ways}
    stir(model)
    losses = dict[str, tuple[float, float]]()
    with model.adapter_state.without_dropout(), fused(model):
        for _ in range(options.repeats + 1):
            for name, way in ways.items():
                token_scores.shared_rows = way
                start = time.process_time()
                loss = token_scores.token_scores(model, inputs, token_scores.PreferenceScoring()).log_probs.sum()
                loss.backward()
                found[name].append(time.process_time() - start)
                losses[name] = float(loss), norm_of_gradient(model)
            require_same_loss(losses)
    one, apart = (statistics.median(seconds[1:]) for seconds in found.values())
    print(f"log-probabilities: {', '.join(f'{loss:.6f}' for loss, _ in losses.values())}")
    print(f"prompt once: {one:.2f} s, a copy for each answer: {apart:.2f} s, {one / apart:.3f}x (goal 0.35x)")
    keep(options.keep, {"pass": one / apart})


def hand_over(options: argparse.Namespace) -> None:
    """Print the milliseconds of the first handover and of later ones."""
    import torch

    torch.set_num_threads(options.threads)
    trainer = trainer_of(argparse.Namespace(**vars(options) | {"side": "engine"}))
    policy = trainer.policy
    times = []
    for _ in range(9):
        with torch.no_grad():
            next(p for p in trainer.model.parameters() if p.requires_grad).add_(1e-3)
        start = time.process_time()
        policy.rollouts.hand_over(policy.adapter)
        times.append(1e3 * (time.process_time() - start))
    n = sum(1 for name, _ in trainer.model.named_parameters() if name.endswith("lora_A"))
    print(f"handover of {n} layers: {statistics.median(times):.1f} ms of CPU time (goal 10), {min(times):.1f} at best")
    keep(options.keep, {"ms": statistics.median(times)})


if __name__ == "__main__":
    main()
