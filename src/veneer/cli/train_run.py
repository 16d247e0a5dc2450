"""Run of ``veneer train``: the output while it is planned and trained."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from rich.console import Console

from veneer.cli.bases import compare_bases
from veneer.cli.rollouts.samples import shown
from veneer.contract.source import adapter_folder
from veneer.errors import ConfigError
from veneer.learn.report import write_run_page
from veneer.plain.group import n_on_this_machine
from veneer.plain.outlasting import outlasting_readers
from veneer.plain.progress import draws_bars, waits_told
from veneer.plain.units import size
from veneer.plan.before import planned_facts, remember_run, require_room, with_shard
from veneer.plan.planned_tasks import require_planned
from veneer.ray.place import RayCluster
from veneer.recipe.adapter import FROM
from veneer.recipe.readers import require_first_rows
from veneer.recipe.recipe import Recipe, parse_recipe
from veneer.recipe.sweep_part import PART
from veneer.recipe.tasks import KEYS
from veneer.store.bars import without_bars
from veneer.train.checkpoint import checkpoints
from veneer.train.output import (
    is_over,
    require_begun,
    require_data_files,
    require_free,
    usable,
)
from veneer.train.processes import by_main, is_main, meet, n_processes, part, together
from veneer.train.recipe_trainer import make_trainer, require_not_in_base
from veneer.train.record.going_on import changes_since
from veneer.train.record.place import Resume, continues
from veneer.train.record.record import record_of
from veneer.train.results import result_lines
from veneer.train.run import run_recipe
from veneer.train.samples import samples_of
from veneer.train.show.sample import shown_sample
from veneer.train.sweep.recipe import Sweep, parse_sweep
from veneer.train.sweep.report import PAGE, SWEEP_FILE, outcomes, require_finished, table, write_report
from veneer.train.sweep.sweep import in_this_process, run_sweep


class OnRay(NamedTuple):
    """Ray cluster to train on, and the recipe's file and changes, which its workers read."""

    place: RayCluster
    recipe: Path
    overrides: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """Options of the command."""

    show_sample: bool
    show_rollouts: int | None
    resume: Resume
    allow_changes: bool
    beyond_memory: bool
    timed: bool
    on: OnRay | None = None


def parsed(values: Mapping[str, Any], path: Path) -> Recipe | Sweep:
    """Return the recipe, or the sweep, from the values of a file. Raises ConfigError with all problems."""
    return parse_sweep(values, path) if PART in values else parse_recipe(values, str(path))


def carried_out(wanted: Recipe | Sweep, asked: TrainOptions) -> None:
    """Plan and train a recipe, or train a sweep, and print the outcome. Raises the errors of `run_recipe`."""
    if not is_main():
        logging.getLogger().setLevel(logging.ERROR)  # what the others would say is the same
    console = Console(soft_wrap=True, quiet=not is_main())
    with outlasting_readers(), without_bars(), _rows_counted_in_terminals():
        if asked.show_sample:
            _show_sample(wanted if isinstance(wanted, Recipe) else wanted.members[0].recipe, console)
        elif isinstance(wanted, Recipe) and asked.show_rollouts is not None:
            _show_rollouts(wanted, asked.show_rollouts, console)
        elif isinstance(wanted, Recipe) and asked.on is not None:
            _train_on_ray(wanted, asked, asked.on, console)
        elif isinstance(wanted, Recipe):
            planned = _prepared(wanted, asked, console)
            if planned is not None and planned.facts is not None and "shard" in planned.facts:
                layout = wanted.distributed.with_copy_size(planned.facts["shard"])
                wanted = wanted.model_copy(update={"distributed": layout})
            _train_one(wanted, asked, planned, console)
        else:
            console.print(
                f"not planned: {len(wanted.members)} members share one base; `veneer plan` tells of one recipe",
                highlight=False,
            )
            _train_sweep(wanted, asked, console)
    part()


@contextmanager
def _rows_counted_in_terminals() -> Iterator[None]:
    """Enter a context that shows the progress of encoding in a terminal, and hides it in a file or a pipe."""
    if datasets.are_progress_bars_disabled() or (is_main() and draws_bars(Console(stderr=True))):
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _show_sample(recipe: Recipe, console: Console) -> None:
    samples, tokenizer = samples_of(recipe)
    for name, sample in samples.items():
        if len(samples) > 1 or recipe.task != "sft":
            console.print(f"{name}:", style="bold", highlight=False)
        console.print(shown_sample(sample, tokenizer, marks=not console.is_terminal))


def _show_rollouts(recipe: Recipe, n: int, console: Console) -> None:
    """Generate ``n`` answers to the recipe's prompts, compute their rewards and print both. Nothing is trained, and no
    file is left.
    """
    require_data_files(recipe.data)
    with tempfile.TemporaryDirectory() as place:
        trainer: Any = make_trainer(recipe.model_copy(update={"output": place}))
        lines = trainer.show_rollouts(n)
    for line in lines:
        console.print(shown(line), highlight=False)
    size = trainer.num_generations
    groups = [
        [line["reward"] for line in lines[start : start + size] if line["reward"] is not None]
        for start in range(0, len(lines), size)
    ]
    rewards = [reward for group in groups for reward in group] or [math.nan]
    learning = sum(len({*group}) > 1 for group in groups)
    console.print(
        f"{len(lines)} answers to {len(groups)} prompts: reward {sum(rewards) / len(rewards):.3g} in the mean, from "
        f"{min(rewards):.3g} to {max(rewards):.3g}. {learning} of {len(groups)} groups have different rewards",
        style="bold", highlight=False,
    )  # fmt: skip
    if not learning:
        console.print(
            "Answers of equal rewards teach nothing: raise training.temperature or training.num_generations, choose "
            "easier prompts, or let a reward tell better answers from worse ones",
            highlight=False,
        )


def _require_startable(recipe: Recipe, asked: TrainOptions) -> None:
    """Raise, before a plan is made, the errors by which a run cannot start.

    TrainingError: there is no checkpoint to resume from. ConfigError: the output holds another run, or a resumed run
    would have other settings. DataError: files of rows are missing, or their first row cannot be read. FormatError: the
    adapter to train on is damaged. CompositionError: that adapter is already merged into the base.
    """
    resume, before = asked.resume, record_of(Path(recipe.output)) if asked.resume else None
    if continues(Path(recipe.output), resume):
        require_begun(Path(recipe.output), recipe.data)
        if before is not None:
            changes_since(before, recipe, asked.allow_changes)
        return
    if Path(recipe.output).exists():
        require_free(Path(recipe.output), recipe.data, resume)
    require_data_files(recipe.data)
    require_first_rows(recipe.data, recipe.task)
    if FROM in recipe.adapter:
        compare_bases(adapter_folder(recipe.adapter[FROM]), recipe.model.source)
    require_not_in_base(recipe.adapter, recipe.model.source)


class _Planned(NamedTuple):
    """Plan of a run, and the line that reports it (empty once printed). The plan is None if none is possible."""

    facts: dict[str, Any] | None
    line: str


def _prepared(recipe: Recipe, asked: TrainOptions, console: Console) -> _Planned | None:
    """In a run's first process, check that the run can start, and plan it. Return None if the run has ended already.

    The other processes wait, and raise the first one's errors.
    """
    args = recipe.training_config()
    meet(args)
    with together():
        n, here = n_processes(), n_on_this_machine()
        recipe.distributed.require_layout(n, here)

        def prepare() -> _Planned | None:
            _require_startable(recipe, asked)
            if asked.resume and is_over(recipe):
                return None
            sizes = recipe.distributed.copy_sizes(n, here) if n > 1 else []
            sharing = here if n > 1 and args.device.type == "cpu" else 1
            return _planned(recipe, _Sharing(n, sharing, sizes), asked, console)

        return by_main(prepare)


class _Sharing(NamedTuple):
    """Numbers of a run's processes: of all, of those on this machine, and of those that may share one copy of
    the base.
    """

    n_processes: int
    n_here: int
    copy_sizes: list[int]


def _planned(recipe: Recipe, sharing: _Sharing, asked: TrainOptions, console: Console) -> _Planned:
    """Print the plan of a run and return it. If the task cannot be planned, print the reason. Raises ConfigError if
    memory is too small.
    """
    notes = Console(stderr=True, soft_wrap=True, quiet=console.quiet)

    def tell(line: str) -> None:
        notes.print(line, style="dim", highlight=False)

    try:
        require_planned(recipe.task, recipe.method)
    except ConfigError as error:
        console.print(f"not planned: {error}", highlight=False)
        return _Planned(None, "")
    with waits_told("planning"):
        facts, line = planned_facts(recipe, tell, sharing.n_processes, sharing.copy_sizes, timed=asked.timed)
    if facts is not None:
        facts = with_shard(facts, sharing.n_here)
        console.print(line, highlight=False)
        if facts.get("shard", 1) > 1:
            each = size(facts["process"]["bytes"])
            console.print(
                f"a copy of the base is sharded over {facts['shard']} processes: {each} each", highlight=False
            )
        if not asked.beyond_memory:
            require_room(facts, sharing.n_here)
    return _Planned(facts, line)


def _train_one(recipe: Recipe, asked: TrainOptions, planned: _Planned | None, console: Console) -> None:
    # A run that cannot be planned is mostly refused for the same reason: only one that begins says so.
    untold = [planned.line] if planned is not None and planned.facts is None and planned.line else []

    def tell(line: str) -> None:
        while untold:
            console.print(untold.pop(), highlight=False)
        console.print(line, style="bold", highlight=False)

    try:
        record = run_recipe(
            recipe,
            resume=asked.resume,
            allow_changes=asked.allow_changes,
            planned=None if planned is None else planned.facts,
            tell=tell,
        )
    except KeyboardInterrupt as error:
        kept = checkpoints(Path(recipe.output))
        if not error.args and kept:
            going_on = "checkpoints are kept, and the same command with --resume goes on from the last one."
            error.args = (f"{going_on} {usable(recipe, kept[-1])}",)
        raise
    if planned is not None and planned.facts is not None and is_main() and n_processes() == 1:
        remember_run(planned.facts, record)
    _tell(result_lines(recipe, record), console)
    if KEYS[recipe.task].rewards and is_main():
        console.print(f"curves and answers: {write_run_page(Path(recipe.output))}", highlight=False)


def _train_on_ray(recipe: Recipe, asked: TrainOptions, on: OnRay, console: Console) -> None:
    """Train in a cluster's workers. No plan is made, since their memory is not visible from here."""
    _require_startable(recipe, asked)
    with waits_told("loading Ray"):
        from veneer.ray.training import Loop, train_on  # Ray is no dependency of other runs
    loop = Loop(recipe=str(on.recipe), set=tuple(on.overrides), folder=os.getcwd(), allow_changes=asked.allow_changes)
    console.print("not planned: the workers of Ray have memory of their own", highlight=False)
    _tell(result_lines(recipe, train_on(on.place, loop, recipe)), console)


def _tell(lines: Iterable[str], console: Console) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False)


def _train_sweep(sweep: Sweep, asked: TrainOptions, console: Console) -> None:
    engine = None
    if asked.on is not None:
        with waits_told("loading Ray"):
            from veneer.ray.packs import on_ray  # as above
        engine = on_ray(asked.on.place)
    elif sweep.members[0].recipe.task != "sft":
        with waits_told("loading the trainers and their engine"):
            from veneer.learn.together import draw_together  # which other runs need not wait for
        engine = in_this_process(draw_together)
    records = run_sweep(
        sweep,
        resume=asked.resume,
        allow_changes=asked.allow_changes,
        tell=lambda line: console.print(line, highlight=False),
        engine=engine,
    )
    found = outcomes(sweep, records)
    write_report(sweep, found)
    console.print(table(found))
    console.print(f"written down in {sweep.output / SWEEP_FILE}, drawn in {sweep.output / PAGE}", highlight=False)
    require_finished(found)
