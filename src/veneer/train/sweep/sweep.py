"""Trains the members of a sweep in groups, on one worker or several, until each has ended or is stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from veneer.errors import ConfigError
from veneer.train.interrupt import Stop, listening
from veneer.train.output import require_data_files
from veneer.train.processes import n_processes
from veneer.train.record.place import Resume, continues
from veneer.train.run import Tell
from veneer.train.sweep.course import Course
from veneer.train.sweep.recipe import Sweep
from veneer.train.sweep.together import Job, JobEnd, told, train_together


class Workers(Protocol):
    """Workers, each of which trains one group of members at a time. ``n_places``: members for which a worker has
    memory.
    """

    n_workers: int
    n_places: int

    def begin(self, jobs: Sequence[Job]) -> None:
        """Start jobs together on an idle worker."""

    def wait(self) -> tuple[Sequence[Job], Sequence[JobEnd] | str]:
        """Wait until a worker ends. Return its jobs with how they ended, or with the reason why the worker died."""


Engine = Callable[[Sweep, Tell, Stop], AbstractContextManager[Workers]]
Train = Callable[[Sequence[Job], Tell, Stop], Sequence[JobEnd]]


def run_sweep(
    sweep: Sweep,
    *,
    resume: Resume = False,
    allow_changes: bool = False,
    tell: Tell = lambda line: None,
    engine: Engine | None = None,
) -> list[dict[str, Any]]:
    """Train all members and return the content of each one's ``run.json``, in their order.

    Each member writes the files of a single run into a folder of its name. A member ends early with the status
    ``diverged`` if its loss is not finite; the others train on. If the task generates answers, the others also train on
    after a member ``failed``.

    ``engine`` gives the workers; without one, this process trains all members together. With the scheduler ``asha``,
    members wait at rungs to be compared, and those that may not go on get the status ``stopped``.

    With ``resume``, members that have ended stay as they are, and the others continue from their last checkpoints.
    ``"auto"`` also begins a new sweep. Members keep the settings with which they began, unless ``allow_changes``. After
    SIGTERM or SIGINT each member ends its current step, writes a checkpoint, and Interrupted is raised. Raises
    ConfigError if several processes were started, DataError if files of rows do not exist.
    """
    if n_processes() > 1:
        raise ConfigError("the members of a sweep share one process: start it with `veneer train`, without torchrun")
    if (task := sweep.members[0].recipe.task) != "sft" and engine is None:
        raise ConfigError(
            f"members of {task} draw answers, and no engine that draws is given. Start it with `veneer sweep`, or pass "
            "engine=in_this_process(veneer.learn.together.draw_together)."
        )
    if sweep.engine == "ray" and engine is None:
        raise ConfigError(
            "sweep.engine: ray needs the workers of a cluster, and none are given. Start it with `veneer sweep`, "
            "or pass engine=veneer.ray.packs.on_ray(Place())."
        )
    for member in sweep.members:
        if not continues(Path(member.recipe.output), resume):
            require_data_files(member.recipe.data)
    course = Course(sweep, resume, allow_changes)
    for name, record in course.records.items():
        tell(f"{name}: {told(JobEnd(record))}, before")
    if any(each.trains for each in course.standings.values()):
        with listening() as stop, (engine or in_this_process(train_together))(sweep, tell, stop) as workers:
            _train(course, workers, stop)
    return course.finish()


def _train(course: Course, workers: Workers, stop: Stop) -> None:
    """Keep the workers busy until no job is left."""
    n_idle = workers.n_workers
    while True:
        while n_idle and (jobs := course.next_jobs(n_idle, workers.n_places)):
            workers.begin(jobs)
            n_idle -= 1
        if n_idle == workers.n_workers:
            return
        pack, ended = workers.wait()
        n_idle += 1
        if isinstance(ended, str):
            course.note_lost(pack, ended)
        else:
            course.note(pack, ended)
        stop.check()


def in_this_process(train: Train) -> Engine:
    """Return an engine of `run_sweep` that trains all members by ``train``, in this process."""

    @contextmanager
    def engine(sweep: Sweep, tell: Tell, stop: Stop) -> Iterator[Workers]:
        yield _ThisProcess(len(sweep.members), lambda jobs: train(jobs, tell, stop))

    return engine


class _ThisProcess:
    """Worker of a sweep that trains within this process, and is the sweep's only worker. It trains all members given to
    it together.
    """

    n_workers = 1

    def __init__(self, n_places: int, train: Callable[[Sequence[Job]], Sequence[JobEnd]]) -> None:
        self.n_places, self._train = n_places, train
        self._jobs: Sequence[Job] = ()

    def begin(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs

    def wait(self) -> tuple[Sequence[Job], Sequence[JobEnd]]:
        return self._jobs, self._train(self._jobs)
