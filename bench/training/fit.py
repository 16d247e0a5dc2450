"""The settings that fit a budget, against a limit of memory that the system enforces.

`veneer plan --fit` chooses for the budget. `veneer train` then makes three updates with its best setting, in a process
that may hold no more (RLIMIT_DATA: the budget less other resident memory). A second process takes the next larger
number of rows a micro-batch. The first must end, the second must be refused memory; otherwise the exit code is 1.

    python -m bench.training.fit --budget 1700MB [--model NAME|FOLDER] [--rows 24] [--length 256]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.report import ends_as_interrupted
from bench.training.plan import N_UPDATES, whole_path, write_rows
from veneer.cli.plan_options import bytes_from
from veneer.plain.units import size


def values_of(options: argparse.Namespace) -> dict[str, Any]:
    """LoRA on all linear layers, as many rows a step as are asked for."""
    return {
        "model": {"source": whole_path(options.model)}, "data": {"train": "rows.jsonl"},
        "adapter": {"method": "lora", "r": 16, "target_modules": "all-linear"}, "output": "run",
        "training": {
            "per_device_train_batch_size": options.rows, "max_length": options.length, "max_steps": N_UPDATES,
        },
    }  # fmt: skip


def status(name: str) -> int:
    """Bytes of this process by a name of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def carry_out(options: argparse.Namespace) -> int:
    """Train the recipe with changes, within the budget."""
    import veneer.plan.memory_trace
    import veneer.train.run  # noqa: F401  what a run imports is there before the limit
    from veneer.cli.app import app
    from veneer.model.memory.available import high_water
    from veneer.plan.report import as_yaml
    from veneer.recipe.recipe import changed, parse_recipe

    recipe = changed(parse_recipe(values_of(options)), json.loads(options.changes))
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder), options.length, n_rows=N_UPDATES * options.rows)
        Path(folder, "recipe.yaml").write_text(as_yaml(recipe), encoding="utf-8")
        os.chdir(folder)
        most = status("VmData") + bytes_from(options.budget, "--budget") - status("VmRSS")
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        app(["train", "recipe.yaml", "--beyond-memory"], standalone_mode=False)
    print(json.dumps(high_water()))
    return 0


def apart(options: argparse.Namespace, changes: dict[str, Any]) -> str:
    """The end of a process of its own: the high water of one that trained, else its last line."""
    command = [sys.executable, "-m", "bench.training.fit", "--changes", json.dumps(changes), "--budget", options.budget]
    command += ["--model", options.model, "--rows", str(options.rows), "--length", str(options.length)]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    if out.returncode == 0:
        return f"trained, high water {size(json.loads(out.stdout.splitlines()[-1]))}"
    told = (out.stderr.strip().splitlines() or ["killed"])[-1][:150]
    if "memory" not in told and told != "killed":
        raise SystemExit(f"{changes}: it ended for another reason: {told}")
    return f"died: {told}"


def main() -> int:
    """Print what was planned and seen; 1 where the best setting died or one notch more trained."""
    ends_as_interrupted()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--changes")
    options = parser.parse_args()
    if options.changes is not None:
        return carry_out(options)
    from veneer.plan.architecture import config_of
    from veneer.plan.fit import fits
    from veneer.plan.plan import plan_recipe
    from veneer.plan.report import Machine
    from veneer.recipe.recipe import changed, parse_recipe

    recipe, config = parse_recipe(values_of(options)), config_of(options.model)
    machine = Machine.of(None, timed=True)  # rates are measured here, so that no run has to
    found = fits(
        recipe, config, bytes_from(options.budget, "--budget"), machine.bytes_of, machine.cost, isa=machine.isa
    )
    best = dict(found[0].changes)
    rows = best.get("training.per_device_train_batch_size", options.rows)
    larger = [n for n in range(rows + 1, options.rows + 1) if options.rows % n == 0]
    if not larger:
        raise SystemExit(f"all {options.rows} rows fit {options.budget}: give a smaller --budget, or more --rows")
    more = best | {
        "training.per_device_train_batch_size": larger[0],
        "training.gradient_accumulation_steps": options.rows // larger[0],
    }
    ends = []
    for name, changes in (("best", best), ("one notch more", more)):
        n_bytes = machine.facts(plan_recipe(changed(recipe, changes), config=config), None)["process"]["bytes"]
        ends.append(apart(options, changes))
        print(f"{name}: {changes}\n  planned {size(n_bytes)} of {options.budget}; {ends[-1]}", flush=True)
    return int(ends[0].startswith("died") or ends[1].startswith("trained"))


if __name__ == "__main__":
    raise SystemExit(main())
