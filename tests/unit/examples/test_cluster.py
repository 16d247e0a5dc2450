"""examples/cluster: files that parse, each with one command that begins a run or goes on with it."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from veneer.cli.app import app
from veneer.plain.group import join_slurm
from veneer.recipe.distributed_part import with_accumulation
from veneer.recipe.early import refuse_early
from veneer.recipe.values import read_values

FOLDER = Path(__file__).parents[3] / "examples" / "cluster"
RECIPE = FOLDER / "recipe.yaml"
TRAIN: Any = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def shell_parses(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


SCRIPTS = {
    "slurm.sh": (FOLDER / "slurm.sh").read_text(encoding="utf-8"),
    "sky.yaml": read("sky.yaml")["run"],
    "trainjob.yaml": shlex.join(read("trainjob.yaml")["spec"]["trainer"]["command"]),
    "rayjob.yaml": read("rayjob.yaml")["spec"]["entrypoint"],
}


def test_every_file_is_looked_at() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {*SCRIPTS, RECIPE.name}


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_one_command_begins_the_run_or_goes_on(name: str) -> None:
    shell_parses(SCRIPTS[name])
    code = "\n".join(line for line in SCRIPTS[name].splitlines() if not line.startswith("#"))
    [command] = re.findall(r"\bveneer (train [^\n]*)", code)
    verb, *arguments = shlex.split(command)
    with TRAIN.make_context(verb, arguments) as context:  # which refuses unknown options
        assert context.params["resume"] == "auto"
        assert context.params["processes"] in (None, read("rayjob.yaml")["spec"]["entrypointNumGpus"])


@pytest.mark.parametrize("n", [1, 4, 8])
def test_the_recipe_is_one_for_any_number_of_processes(n: int) -> None:
    values = read_values(RECIPE, [])
    refuse_early(values, n_processes=n)
    if n > 1:
        assert with_accumulation(values, n)["training"]["gradient_accumulation_steps"] == 16 // n


def test_slurm_signals_before_the_end_and_starts_a_task_for_each_gpu() -> None:
    given = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", SCRIPTS["slurm.sh"], flags=re.M))
    assert given["ntasks-per-node"] == given["gpus-per-node"]
    assert given["signal"] == "TERM@120"  # to the tasks: `B:` would signal the script alone
    assert {"requeue", "open-mode"} <= given.keys()
    nodes, tasks = int(given["nodes"]), int(given["ntasks-per-node"])
    environment = {
        "SLURM_STEP_NUM_TASKS": str(nodes * tasks), "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "7",
        "SLURM_STEP_TASKS_PER_NODE": f"{tasks}(x{nodes})", "SLURM_STEP_NODELIST": "gpu[03-04]",
    }  # fmt: skip
    join_slurm(environment)
    assert (environment["WORLD_SIZE"], environment["LOCAL_WORLD_SIZE"], environment["MASTER_ADDR"]) == (
        "8",
        "4",
        "gpu03",
    )


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (143, True), (2, False)])
def test_slurm_asks_for_another_turn_where_a_signal_stopped_the_run(
    status: int, requeued: bool, tmp_path: Path
) -> None:
    for name, body in {"srun": f"exit {status}", "scontrol": f'echo "$@" > {tmp_path}/asked'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", str(FOLDER / "slurm.sh")], env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}, check=False
    )
    assert done.returncode == status
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else None) == ("requeue 7\n" if requeued else None)


def test_kubernetes_gives_a_process_to_each_gpu() -> None:
    trainer = read("trainjob.yaml")["spec"]["trainer"]
    assert trainer["numProcPerNode"] == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    ray = read("rayjob.yaml")["spec"]
    [group] = ray["rayClusterSpec"]["workerGroupSpecs"]
    [container] = group["template"]["spec"]["containers"]
    assert ray["entrypointNumGpus"] == container["resources"]["limits"]["nvidia.com/gpu"]
