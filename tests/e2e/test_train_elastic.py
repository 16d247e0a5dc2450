"""Training on a Ray cluster of two nodes, of which one goes down: the run continues with the workers that are left."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file

from veneer.ray.place import RayCluster
from veneer.recipe.recipe import load_recipe

if TYPE_CHECKING:
    from conftest import TinyProject

pytest.importorskip("ray", reason="Ray is not installed: pip install 'veneer[ray]'")

pytestmark = [pytest.mark.full]
N_STEPS = 7
OPTIONS = (
    f"training.max_steps={N_STEPS}", "training.save_strategy=steps", "training.save_steps=1", "training.use_cpu=true",
    "training.per_device_train_batch_size=1", "adapter.lora_dropout=0.0", "distributed.global_batch=12",
)  # fmt: skip


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head with two workers, and room for a node beside it."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        node = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 80 * 2**20}
        started = Cluster(initialize_head=True, head_node_args=node)
        try:
            ray.init(started.address, log_to_driver=False)
            yield started
        finally:
            ray.shutdown()
            started.shutdown()


def test_a_run_goes_on_with_the_workers_that_are_left(cluster: Any, tiny_project: TinyProject) -> None:
    """Four workers, then two: the rows of each step are those of one process, so losses and weights are too."""
    from veneer.ray.training import Loop, train_on

    node = cluster.add_node(num_cpus=2, object_store_memory=80 * 2**20)
    options = [part for each in OPTIONS for part in ("--set", each)]
    tiny_project.run(*options, "--set", f"output={tiny_project.folder / 'whole'}")

    began = list[int]()

    def take_down() -> None:
        while not (tiny_project.folder / "run" / "checkpoint-2").exists():
            time.sleep(0.01)
        began.append(tiny_project.record()["n_processes"])
        cluster.remove_node(node, allow_graceful=False)

    threading.Thread(target=take_down, daemon=True).start()
    path = tiny_project.folder / "recipe.yaml"
    loop = Loop(recipe=str(path), set=OPTIONS, folder=os.getcwd())
    record = train_on(RayCluster(n_workers=4, least=2), loop, load_recipe(path, OPTIONS))

    assert began == [4]
    assert (record["status"], record["n_processes"], record["results"]["steps"]) == ("finished", 2, N_STEPS)
    [change] = record["changes"]
    assert (change["key"], change["before"], change["now"]) == ("processes", 4, 2)
    assert 2 <= change["step"] < N_STEPS
    ours, whole = (load_file(tiny_project.weights(name)) for name in ("run", "whole"))
    assert ours.keys() == whole.keys()
    for key, weight in whole.items():
        assert (ours[key] - weight).norm() <= 1e-4 * weight.norm(), key
    for line, expected in zip(tiny_project.log(), tiny_project.log("whole"), strict=True):
        for counted in (line, expected):
            counted.pop("total_flos", None)  # of padding too, which micro-batches have otherwise
        assert line == pytest.approx(expected, rel=1e-5, abs=1e-6)
