"""Loop of a worker: its settings, and the errors for which the workers are not begun again."""

from __future__ import annotations

from pathlib import Path

import pytest

from veneer.errors import ConfigError, DataError, LostProcessError
from veneer.ray import train_loop

pytest.importorskip("ray", reason="Ray is not installed: pip install 'veneer[ray]'")


def test_settings_of_the_loop_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"train_loop_config: recipe: .*; sett: .*Known keys: recipe, set, folder"):
        train_loop({"sett": 3})


def test_a_cluster_has_a_device_for_each_worker() -> None:
    from veneer.ray.cluster import Devices, n_workers
    from veneer.ray.place import Place

    assert n_workers(Place(), Devices("CPU", 3)) == 3
    with pytest.raises(ConfigError, match=r"ray:4 is more than the 3 devices \(CPU\)"):
        n_workers(Place(n_workers=4), Devices("CPU", 3))
    with pytest.raises(ConfigError, match=r"the Ray cluster has no device \(CPU\) for a worker"):
        n_workers(Place(), Devices("CPU", 0))


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


def test_any_number_of_workers_only_if_the_rows_can_be_dealt(tmp_path: Path) -> None:
    from veneer.ray.training import Loop, _elastic

    def workers(distributed: str, n: int) -> int | tuple[int, int]:
        (tmp_path / "recipe.yaml").write_text(
            f"training: {{per_device_train_batch_size: 2}}\ndistributed: {distributed}"
        )
        return _elastic(Loop(recipe=str(tmp_path / "recipe.yaml")), n)

    assert workers("{}", 3) == 3
    assert workers("{global_batch: 12}", 3) == (1, 3)
    assert workers("{global_batch: 6}", 3) == 3  # not to two
    assert workers("{global_batch: 12, shard: 3}", 3) == 3
