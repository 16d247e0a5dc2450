"""Training on a Ray cluster of this machine: a sweep in packs, and a run whose worker is killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml

from veneer.errors import ConfigError
from veneer.ray.place import RayCluster
from veneer.recipe.recipe import load_recipe
from veneer.recipe.values import read_values
from veneer.train.checkpoint import checkpoints
from veneer.train.interrupt import Stop
from veneer.train.record.going_on import GoingOn
from veneer.train.record.record import record_of
from veneer.train.sweep.asha import divisor
from veneer.train.sweep.recipe import Sweep, parse_sweep
from veneer.train.sweep.report import outcomes
from veneer.train.sweep.sweep import run_sweep
from veneer.train.sweep.together import Job, train_together

if TYPE_CHECKING:
    from conftest import TinyProject

pytest.importorskip("ray", reason="Ray is not installed: pip install 'veneer[ray]'")

pytestmark = [pytest.mark.full]
RATES = {"dead": 0.0, "fast": 0.05, "quick": 0.03, "slow": 1e-6}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two workers on this machine's cores."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
        yield
        ray.shutdown()


def sweep_of(project: TinyProject, output: str) -> Sweep:
    values: dict[str, Any] = yaml.safe_load((project.folder / "recipe.yaml").read_text())
    values["training"] |= {"max_steps": 7, "use_cpu": True}
    values["output"] = str(project.folder / output)
    members = [{"name": name, "training.learning_rate": rate, "seed": 3} for name, rate in RATES.items()]
    values |= {"sweep": {"members": members, "scheduler": "asha"}}
    path = project.folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump(values))
    return parse_sweep(read_values(path), path)


def test_asha_over_two_packs_trains_each_pack_as_one_process_does(cluster: None, tiny_project: TinyProject) -> None:
    """Broken off once both packs wait at the rung, and resumed: the bits of the same packs trained here."""
    from veneer.ray.packs import on_ray

    torch.set_num_threads(1)
    ours, here = sweep_of(tiny_project, "ours"), sweep_of(tiny_project, "here")
    lines: list[str] = []

    def broken_off(line: str) -> None:
        lines.append(line)
        if line == "fast: to a worker":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(ours, tell=broken_off, engine=on_ray(RayCluster()))
    records = run_sweep(ours, resume="auto", tell=lines.append, engine=on_ray(RayCluster()))
    assert "dead, fast: to a worker" in lines
    assert "quick, slow: to a worker" in lines
    assert [record["status"] for record in records] == ["stopped", "finished", "finished", "stopped"]

    members = {member.name: member for member in here.members}
    for pack in (("dead", "fast"), ("quick", "slow")):
        train([Job(members[name], None, divisor(0, 1, 3)) for name in pack])
    for name in ("dead", "slow"):
        saved = Path(name, "checkpoint-3", "trained.safetensors")
        assert (ours.output / saved).read_bytes() == (here.output / saved).read_bytes()
    for name in ("fast", "quick"):
        train([Job(members[name], GoingOn(record_of(here.output / name)))])
        saved = Path(name, "adapter", "adapter_model.safetensors")
        assert (ours.output / saved).read_bytes() == (here.output / saved).read_bytes()
    (table := outcomes(ours, records)).sort(key=lambda each: each.name)
    assert [(each.status, each.steps) for each in table] == [
        ("stopped", 3), ("finished", 7), ("finished", 7), ("stopped", 3),
    ]  # fmt: skip


def train(jobs: list[Job]) -> None:
    train_together(jobs, lambda line: None, Stop())


def test_a_run_goes_on_by_itself_when_a_worker_is_killed(cluster: None, tiny_project: TinyProject) -> None:
    from veneer.ray.training import Loop, train_on

    options = ("training.max_steps=9", "training.save_strategy=steps", "training.save_steps=1", "training.use_cpu=true")
    tiny_project.run(
        *(part for each in options for part in ("--set", each)),
        "--set", f"output={tiny_project.folder / 'whole'}", n_processes=2,
    )  # fmt: skip
    path = tiny_project.folder / "recipe.yaml"
    loop = Loop(recipe=str(path), set=options, folder=os.getcwd())
    recipe, killed = load_recipe(path, options), list[int]()

    def kill() -> None:
        while len(checkpoints(Path(recipe.output))) < 2:
            time.sleep(0.01)
        killed.append(tiny_project.record()["process"]["pid"])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    record = train_on(RayCluster(n_workers=2), loop, recipe)
    assert killed
    assert record["process"]["pid"] != killed[0]
    assert (record["status"], record["n_processes"]) == ("finished", 2)
    assert tiny_project.weights().read_bytes() == tiny_project.weights("whole").read_bytes()
    assert tiny_project.log() == tiny_project.log("whole")
    assert not list((tiny_project.folder / "run").glob(".ray-*"))

    with pytest.raises(ConfigError, match=r"--on ray:5 is more than the 2 devices \(CPU\)"):
        train_on(RayCluster(n_workers=5), loop, recipe)
