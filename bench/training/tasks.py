"""LoRA, DoRA, IA3 and full fine-tuning on SST-2, AG News, E2E and GSM8K, through ``veneer train`` and ``veneer eval``.

    python -m bench.training.tasks --data FOLDER [--output runs/tasks] [--only sst2 --only gsm8k]

FOLDER holds a sub-folder a set with ``train.pc.jsonl`` and ``eval.pc.jsonl`` (rows ``{"prompt", "completion"}``).
Every run is one seed and one learning rate a method, chosen beforehand and the same on all sets. Results are kept as
they come: a second call goes on where the first stopped. Prints a table, writes ``tasks.md`` and ``tasks.png``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from bench.report import ends_as_interrupted

MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Measure:
    """One column of the table: what `veneer eval` is asked for on the first ``n_rows`` held-out rows."""

    title: str
    n_rows: int
    metric: Sequence[str]
    higher_is_better: bool = True


@dataclass(frozen=True)
class Task:
    """A set, how many of its rows are trained on, and what is measured on its held-out part; the first is drawn."""

    n_train: int
    batch: int
    measures: Sequence[Measure]


ANSWER = ("regex", "--pattern", r"####\s*(-?[\d,.]+)", "--max-new-tokens", "200")
TASKS = {
    "sst2": Task(1000, 16, [Measure("SST-2, accuracy", 800, ("labels",))]),
    "agnews": Task(800, 16, [Measure("AG News, accuracy", 600, ("labels",))]),
    "e2e": Task(600, 8, [Measure("E2E, perplexity of the text", 300, ("perplexity",), False)]),
    "gsm8k": Task(
        320,
        8,
        [
            Measure("GSM8K, perplexity of the solution", 100, ("perplexity",), False),
            Measure("GSM8K, right answers", 100, ANSWER),
        ],
    ),
}
METHODS: dict[str, dict[str, object]] = {
    "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
    "dora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
    "ia3": {},
    "full": {},
}
LABELS = {"lora": (6, -4), "dora": (-36, -4), "ia3": (5, 4), "full": (-12, 7)}  # in points from the dot; two lie close
Results = dict[str, dict[str, Any]]  # "sst2/lora": parameters, seconds, values (one a measure)
LEARNING_RATES = {"lora": 5e-4, "dora": 5e-4, "ia3": 1e-2, "full": 5e-5}


def main() -> None:
    ends_as_interrupted()
    options = arguments()
    results = options.output / "results.json"
    found: Results = json.loads(results.read_text()) if results.exists() else {}
    for name in options.only or TASKS:
        for method in ("base", *METHODS):
            key = f"{name}/{method}"
            if key not in found:
                found[key] = run(name, method, options)
                results.parent.mkdir(parents=True, exist_ok=True)
                results.write_text(json.dumps(found, indent=2))
                Console().print(key, found[key])
    show(found, options.output)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--output", type=Path, default=Path("runs/tasks"))
    parser.add_argument("--only", action="append", choices=list(TASKS), help="only this set; may be given again")
    return parser.parse_args()


def run(name: str, method: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train (but for the base itself) and evaluate; trained parameters, seconds of training and the values."""
    folder = options.output / name / method
    if method == "base":
        return {"parameters": 0, "seconds": 0.0, "values": evaluate(name, [MODEL], options)}
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_for(name, method, folder, options)))
    veneer("train", str(recipe))
    record = json.loads((folder / "run.json").read_text())
    saved = record["saved"]
    model = [saved] if method == "full" else [MODEL, "--adapter", saved]
    return {
        "parameters": int(record["trained"].split()[1].replace(",", "")),  # "trains 4,884,480 of …"
        "seconds": record["results"]["seconds"],
        "values": evaluate(name, model, options),
    }


def recipe_for(name: str, method: str, folder: Path, options: argparse.Namespace) -> dict[str, object]:
    return {
        "model": {"source": MODEL, "dtype": "float32" if method == "full" else "bfloat16"},
        "data": {"train": str((options.data / name / "train.pc.jsonl").resolve()), "limit": TASKS[name].n_train},
        "adapter": {"method": method, **METHODS[method]},
        "training": {
            "learning_rate": LEARNING_RATES[method],
            "num_train_epochs": 1,
            "per_device_train_batch_size": TASKS[name].batch,
            "max_length": 512,
            "max_grad_norm": 1.0,
            "bf16": True,
            "save_strategy": "no",
            "report_to": "none",
            "train_sampling_strategy": "group_by_length",
        },
        "output": str(folder),
    }


def evaluate(name: str, model: Sequence[str], options: argparse.Namespace) -> list[float]:
    data, values = str(options.data / name / "eval.pc.jsonl"), []
    for measure in TASKS[name].measures:
        limit = ("--limit", str(measure.n_rows), "--dtype", "bfloat16", "--json")
        told = veneer("eval", *model, "--data", data, "--metric", *measure.metric, *limit)
        values.append(float(json.loads(told)["value"]))
    return values


def veneer(*arguments: str) -> str:
    command = [sys.executable, "-c", "from veneer.cli.app import main; main()", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def show(found: Results, output: Path) -> None:
    """The table, as text and Markdown, and the picture."""
    names = [n for n in TASKS if f"{n}/full" in found]
    titles = ["method", *(measure.title for n in names for measure in TASKS[n].measures)]
    rows = [[m, *(cell for n in names for cell in cells(found[f"{n}/{m}"], TASKS[n]))] for m in ("base", *METHODS)]
    table = Table(title="on held-out rows")
    for title in titles:
        table.add_column(title, justify="left" if title == "method" else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1), *rows]
    (output / "tasks.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))
    draw(found, names, output / "tasks.png")


def cells(result: dict[str, Any], task: Task) -> list[str]:
    pairs = zip(result["values"], task.measures, strict=True)
    return [f"{value:.1%}" if measure.higher_is_better else f"{value:.3f}" for value, measure in pairs]


def draw(found: Results, names: Sequence[str], path: Path) -> None:
    """Quality (the first measure) against trained parameters, one panel a set."""
    figure = Figure(figsize=(3.1 * len(names), 3.2), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        panel.axhline(found[f"{name}/base"]["values"][0], color="0.6", linestyle="--", linewidth=1)
        for method in METHODS:
            result = found[f"{name}/{method}"]
            dot = (result["parameters"], result["values"][0])
            panel.scatter(*dot, s=45, label=method)
            panel.annotate(method, dot, xytext=LABELS[method], textcoords="offset points")
        panel.set_xscale("log")
        panel.margins(y=0.15)
        panel.set_xlim(1e4, 1e9)
        panel.set_title(TASKS[name].measures[0].title, fontsize=9)
        panel.set_xlabel("trained parameters (dashed: the base)", fontsize=8)
    figure.savefig(path, dpi=140)


if __name__ == "__main__":
    main()
