"""One run in several workers of Ray, which are restarted if one of them dies."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import ray
import ray.train
from pydantic import BaseModel, ConfigDict, ValidationError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from veneer import errors
from veneer.errors import (
    ConfigError,
    DiskError,
    Interrupted,
    LostProcessError,
    TrainingError,
    VeneerError,
    listed,
)
from veneer.plain.refusals import allowed
from veneer.ray.cluster import connected, devices, last_line, n_workers
from veneer.ray.place import RayCluster
from veneer.recipe.distributed_part import dealing_problems
from veneer.recipe.recipe import Recipe, load_recipe
from veneer.recipe.values import read_values
from veneer.store.bars import without_bars
from veneer.train.checkpoint import write_json
from veneer.train.interrupt import SIGNALS
from veneer.train.record.going_on import tied_to_its_processes
from veneer.train.record.record import record_of
from veneer.train.run import run_recipe

MOST_FAILURES = 3  # deaths of workers after which the run is given up
Uneven = Callable[[int, int], list[str]]  # problems of a run whose workers number from the first to the second
_REFUSAL = "refusal.json"


class Loop(BaseModel):
    """Settings of `veneer.ray.train_loop`.

    ``set``: changes of the recipe, each ``key=value``. ``folder``: the working directory, which relative paths refer
    to. ``allow_changes``: a resumed run may have other settings.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str
    set: tuple[str, ...] = ()
    folder: str | None = None
    allow_changes: bool = False


def loop_of(config: Mapping[str, Any]) -> Loop:
    """Return checked settings of the loop. Raises ConfigError that lists all problems."""
    try:
        return Loop.model_validate(dict(config))
    except ValidationError as error:
        told = [f"{'.'.join(map(str, each['loc']))}: {allowed([each])}" for each in error.errors()]
        known = f"Known keys: {', '.join(Loop.model_fields)}"
        raise ConfigError(listed(told, "train_loop_config", remedy=known)) from error


def run_here(loop: Loop) -> dict[str, Any]:
    """Train in this worker of Ray Train, report the results to Ray, and return the content of ``run.json``."""
    if loop.folder is not None:
        os.chdir(loop.folder)
    with without_bars():
        record = run_recipe(
            load_recipe(Path(loop.recipe), loop.set),
            resume="auto",
            allow_changes=loop.allow_changes,
            tell=_print,
        )
    ray.train.report({key: value for key, value in record["results"].items() if isinstance(value, int | float)})
    return record


def train_on(place: RayCluster, loop: Loop, recipe: Recipe) -> dict[str, Any]:
    """Train a recipe in the workers of a Ray cluster, and return the content of ``run.json``.

    If a worker dies, the run continues from its last checkpoint. If the rows of a step are the same with any number of
    workers, the run goes on with the remaining workers. For a range (``place.least``), they must be the same with every
    number in it. New workers are used when they become available.

    Raises ConfigError if there are more workers than devices, if the rows differ for some number in the range, and for
    a layout that only a plan can choose. Raises the errors of `run_recipe`, and TrainingError if workers die again and
    again. Raises DiskError if the output cannot be made.
    """
    args, output = recipe.training_config(), Path(recipe.output)
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # dill, which hashes for datasets, reads what is printed
    uneven = partial(_problems, recipe)
    _require_elastic(place, uneven)
    with connected(place):
        found = devices(bool(args.use_cpu))
        n = n_workers(place, found)
        recipe.distributed.copy_size(n, n)
        problems = dealing_problems(read_values(Path(loop.recipe), loop.set), n)
        if problems:
            raise ConfigError(listed(problems))
        with _scratch(output) as folder:
            trainer = TorchTrainer(
                _in_worker,
                train_loop_config={**loop.model_dump(), _REFUSAL: str(folder / _REFUSAL)},
                scaling_config=ScalingConfig(num_workers=_workers(place, uneven, n), use_gpu=found.kind == "GPU"),
                torch_config=TorchConfig(timeout_s=args.ddp_timeout),
                run_config=RunConfig(
                    storage_path=str(folder), failure_config=FailureConfig(max_failures=MOST_FAILURES)
                ),
            )
            try:
                with _interruptible():
                    trainer.fit()
            except TrainingFailedError as error:
                _raise_refusal(folder)
                raise TrainingError(
                    f"the workers on Ray have failed: {last_line(error)}. Remove the cause, then continue with --resume"
                ) from error
            _raise_refusal(folder)
    return cast("dict[str, Any]", record_of(output))


def _in_worker(config: Mapping[str, Any]) -> None:
    """Train in a worker of Ray.

    If an error would come again after a restart, write it to a file and return, so that Ray does not restart the
    worker.
    """
    loop = loop_of({key: value for key, value in config.items() if key != _REFUSAL})
    if Path(config[_REFUSAL]).exists():
        return
    try:
        run_here(loop)
    except LostProcessError:
        raise
    except VeneerError as error:
        write_json(Path(config[_REFUSAL]), {"kind": type(error).__name__, "told": str(error)})


def _raise_refusal(folder: Path) -> None:
    """Raise the error that a worker has written to a file in ``folder`` because it refused the run. Do nothing if there
    is none.
    """
    if (folder / _REFUSAL).exists():
        found = json.loads((folder / _REFUSAL).read_text(encoding="utf-8"))
        kind: type[VeneerError] = getattr(errors, found["kind"])
        raise kind(found["told"])


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise Interrupted on SIGTERM and on Ctrl-C: on Ctrl-C, Ray would end the workers and exit with the status 0."""
    came = signal.SIGINT

    def end_as_by_ctrl_c(number: int, _: object) -> None:
        nonlocal came
        came = signal.Signals(number)
        signal.raise_signal(signal.SIGINT)

    in_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if in_main:
        signal.signal(signal.SIGTERM, end_as_by_ctrl_c)
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as error:
        raise Interrupted(came) from error
    finally:
        if in_main:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _scratch(output: Path) -> Iterator[Path]:
    """Yield a folder for Ray's own state in the run's output folder, which all nodes see.

    If the output folder had to be created and stays empty, it is removed too.
    """
    made = not output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"the output folder {output} cannot be made ({error.strerror}): choose another") from error
    try:
        with TemporaryDirectory(dir=output.absolute(), prefix=".ray-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)
    finally:
        if made:
            with suppress(OSError):  # a run is in it
                output.rmdir()


def _require_elastic(place: RayCluster, uneven: Uneven) -> None:
    """Raise ConfigError if a run's rows depend on the number of workers, and that number may change."""
    if place.least is None or place.n_workers is None:
        return
    problems = uneven(place.least, place.n_workers)
    if problems:
        raise ConfigError(
            listed(
                problems,
                f"--on ray:{place.least}-{place.n_workers} changes the number of workers, and the steps of this run "
                "must have the same rows with each",
                remedy=f"Change that, or take --on ray:{place.n_workers}",
            )
        )


def _workers(place: RayCluster, uneven: Uneven, n: int) -> int | tuple[int, int]:
    """Return the number of workers, or the least and the most if Ray may change the number while it trains."""
    if place.least is not None:
        return place.least, place.n_workers or n
    return (1, n) if n > 1 and not uneven(1, n) else n


def _problems(recipe: Recipe, least: int, most: int) -> list[str]:
    """Return the settings by which a run's rows would depend on the number of workers, between the least and
    the most.
    """
    found, part = tied_to_its_processes(recipe), recipe.distributed
    if part.shard not in (None, 1):
        found.append(f"distributed.shard {part.shard} does not divide each number of workers")
    if part.strategy == "hybrid":  # workers that are left on one machine are refused it
        found.append("distributed.strategy hybrid needs several machines, and fewer workers may share one")
    unit = recipe.training_config().per_device_train_batch_size * math.lcm(*range(least, most + 1))
    if part.global_batch is not None and part.global_batch % unit:
        found.append(f"distributed.global_batch {part.global_batch} is not a multiple of {unit}")
    return found


def _print(line: str) -> None:
    if ray.train.get_context().get_world_rank() == 0:
        print(line, flush=True)
