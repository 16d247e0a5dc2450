"""Last lines that a run prints: its results, where they are saved, and the command that queries the model."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.plain.units import count, duration
from veneer.recipe.recipe import Recipe
from veneer.train.asking import ask_command, long_system

_ACCURACIES = ("eval_rewards/accuracies", "eval_accuracy")  # of DPO, of reward models


def result_lines(recipe: Recipe, record: Mapping[str, Any]) -> list[str]:
    """Return the last lines of a finished run, from its recipe and its record."""
    results, output = record["results"], Path(recipe.output)
    rewards = [line["reward"] for line in record.get("log", ()) if "reward" in line]
    told = [f"reward {rewards[-1]:.4f}, at first {rewards[0]:.4f}"] if rewards else []
    told += [f"held-out reward {results['eval_reward']:.4f}"] if "eval_reward" in results else []
    told += [f"training loss {results['train_loss']:.4f}"]
    told += [f"held-out loss {results['eval_loss']:.4f}"] if "eval_loss" in results else []
    told += [f"held-out accuracy {results[key]:.1%}" for key in _ACCURACIES if key in results]
    system = long_system(recipe.data, recipe.task)
    return [
        f"{', '.join(told)} after {count(results['steps'], 'step')} in {duration(results['seconds'])}",
        f"saved in {record['saved']}; the run is written down in {output / 'run.json'}",
        f"next: {next_command(recipe, str(record['saved']))}",
        *([] if system is None else [system]),
    ]


def next_command(recipe: Recipe, saved: str) -> str:
    """Return the command that queries the trained model in the form of its rows; for a reward model, one that evaluates
    it.
    """
    if recipe.task == "reward":
        return f"veneer info {shlex.quote(recipe.output)}"
    name = shlex.quote(saved)
    ask = ask_command(name, recipe.data, recipe.task)
    metric = "perplexity" if recipe.metric is None else recipe.metric.name
    others = [f"veneer eval --recipe {shlex.quote(recipe.output)} -m {metric}"] if recipe.data.holds_out else []
    if recipe.method != "full":
        merged = shlex.quote(str(Path(recipe.output) / "merged"))
        others.append(f"veneer merge --base {shlex.quote(recipe.model.source)} --adapter {name} -o {merged}")
    return f"{ask}{' (or: ' if others else ''}{'; '.join(others)}{')' if others else ''}"
