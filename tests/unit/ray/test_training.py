"""Loop of a worker: its settings, and the errors for which the workers are not begun again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from veneer.errors import ConfigError, DataError, LostProcessError
from veneer.ray import train_loop
from veneer.ray.place import RayCluster
from veneer.recipe.recipe import load_recipe

pytest.importorskip("ray", reason="Ray is not installed: pip install 'veneer[ray]'")


def test_settings_of_the_loop_are_checked() -> None:
    told = r"(?s)train_loop_config: 2 problems\n  recipe: .*\n  sett: .*\nKnown keys: recipe, set, folder"
    with pytest.raises(ConfigError, match=told):
        train_loop({"sett": 3})


def test_a_cluster_has_a_device_for_each_worker() -> None:
    from veneer.ray.cluster import Devices, n_workers

    assert n_workers(RayCluster(), Devices("CPU", 3)) == 3
    with pytest.raises(ConfigError, match=r"ray:4 is more than the 3 devices \(CPU\)"):
        n_workers(RayCluster(n_workers=4), Devices("CPU", 3))
    assert n_workers(RayCluster(n_workers=4, least=2), Devices("CPU", 3)) == 3
    assert n_workers(RayCluster(n_workers=4, least=2), Devices("CPU", 5)) == 4
    with pytest.raises(ConfigError, match=r"ray:2-4 is more than the 1 devices \(CPU\)"):
        n_workers(RayCluster(n_workers=4, least=2), Devices("CPU", 1))
    with pytest.raises(ConfigError, match=r"the Ray cluster has no device \(CPU\) for a worker"):
        n_workers(RayCluster(), Devices("CPU", 0))


def test_an_error_that_stays_is_told_and_one_of_another_process_begins_the_workers_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from veneer.ray import training

    config = {"recipe": "recipe.yaml", "refusal.json": str(tmp_path / "refusal.json")}
    errors = [LostProcessError("process 1 has ended"), DataError("data.train: no rows")]

    def run(loop: training.Loop) -> None:
        raise errors.pop(0)

    monkeypatch.setattr(training, "run_here", run)
    with pytest.raises(LostProcessError):
        training._in_worker(config)
    training._raise_refusal(tmp_path)
    training._in_worker(config)
    with pytest.raises(DataError, match=r"^data.train: no rows$"):
        training._raise_refusal(tmp_path)
    training._in_worker(config)  # the other workers, and those that are begun again


def made(
    folder: Path, distributed: str, training: str = "", data: str = "", task: str = "sft"
) -> Callable[[int, int], list[str]]:
    """The problems that a recipe's run has with numbers of workers."""
    from veneer.ray.training import _problems

    (folder / "recipe.yaml").write_text(
        f"model: {{source: base}}\noutput: {folder}/run\ntask: {task}\ndata: {{train: rows.jsonl{data}}}\n"
        f"training: {{per_device_train_batch_size: 2, use_cpu: true, bf16: false{training}}}\n"
        f"distributed: {{{distributed}}}\n"
    )
    return partial(_problems, load_recipe(folder / "recipe.yaml"))


def test_any_number_of_workers_only_if_the_rows_can_be_dealt(tmp_path: Path) -> None:
    from veneer.ray.training import _workers

    def workers(n: int, *parts: str, **further: str) -> int | tuple[int, int]:
        return _workers(RayCluster(), made(tmp_path, *parts, **further), n)

    assert workers(3, "") == 3
    assert workers(3, "global_batch: 12") == (1, 3)
    assert workers(1, "global_batch: 12") == 1
    assert workers(3, "global_batch: 6") == 3  # not to two
    assert workers(3, "global_batch: 12, shard: 3") == 3
    assert workers(3, "global_batch: 12, strategy: fsdp") == (1, 3)
    assert workers(3, "global_batch: 12, strategy: hybrid") == 3  # two may be left on one machine
    assert workers(3, "global_batch: 12", ", dataloader_drop_last: true") == 3
    assert workers(3, "global_batch: 12", task="dpo") == 3


def test_a_range_of_workers_needs_rows_that_each_number_can_be_dealt(tmp_path: Path) -> None:
    from veneer.ray.training import _require_elastic, _workers

    place = RayCluster(n_workers=4, least=2)
    good = made(tmp_path, "global_batch: 24")
    _require_elastic(place, good)
    assert _workers(place, good, 3) == (2, 4)
    for part, told in (
        ("", "no distributed.global_batch"),
        ("global_batch: 16", "distributed.global_batch 16 is not a multiple of 24"),
        ("global_batch: 24, shard: 2", "distributed.shard 2 does not divide each number of workers"),
        ("global_batch: 24, strategy: hybrid", "distributed.strategy hybrid needs several machines, .* may share one"),
    ):
        with pytest.raises(ConfigError, match=f"^--on ray:2-4 changes .*with each: {told}. Change that, or take"):
            _require_elastic(place, made(tmp_path, part))
    with pytest.raises(ConfigError, match=r"same rows with each: data.streaming\. Change"):
        _require_elastic(place, made(tmp_path, "global_batch: 24", ", max_steps: 3", ", streaming: true"))
