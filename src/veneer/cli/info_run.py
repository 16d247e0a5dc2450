"""``veneer info`` of a run's output: its status, from its ``run.json``; torch is not imported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from veneer.cli.facts import print_facts
from veneer.train.checkpoint import checkpoints
from veneer.train.record.record import life_of, record_of, told_life

if TYPE_CHECKING:
    from veneer.cli.pages.info import InfoArguments


def info(args: InfoArguments) -> None:
    """Print facts about a run."""
    folder = Path(args.what).expanduser()
    record = record_of(folder) or {}
    if args.as_json:
        typer.echo(json.dumps({**record, "life": life_of(record)}, indent=2, default=str))
        return
    facts = {"run": str(folder), **run_section(record)}
    if life_of(record) == "gone" or record.get("status") in ("interrupted", "failed"):
        facts["going on"] = _going_on(folder)
    print_facts(facts)


def _going_on(folder: Path) -> str:
    kept = checkpoints(folder)
    if not kept:
        return "no checkpoint is kept: `veneer train RECIPE --resume auto` begins again"
    return f"`veneer train RECIPE --resume` goes on from {kept[-1].name}"


def run_section(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the table rows for a run: status, last step, losses, saved files, changes during the run."""
    recipe, results = record["recipe"], record.get("results", {})
    step, most = results.get("steps", record.get("step")), None if results else record.get("max_steps")
    logged = [line["loss"] for line in record.get("log", ()) if "loss" in line]
    found = {
        "status": told_life(record),
        "reason": record.get("reason"),
        "steps": None if step is None else f"{step:,}" + (f" of {most:,}" if most else ""),
        "last loss": f"{logged[-1]:.4f}" if logged and not results else None,
        **{name: f"{results[key]:.4f}" for key, name in _LOSSES.items() if key in results},
        "method": recipe.get("adapter", {}).get("method", "lora"),
        "model": recipe.get("model", {}).get("source"),
        "data": recipe.get("data", {}).get("train"),
        "saved": record.get("saved"),
        "changed": "; ".join(_change(each) for each in record.get("changes", ())) or None,
    }
    return {name: str(value) for name, value in found.items() if value is not None}


_LOSSES = {"train_loss": "training loss", "eval_loss": "held-out loss"}


def _change(change: Mapping[str, Any]) -> str:
    return f"after step {change['step']} {change['key']} from {change['before']} to {change['now']}"
