"""``veneer train``: train as a recipe says."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console

from veneer.core.progress import draws_bars, waits_told
from veneer.core.units import duration
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from veneer.recipe.recipe import Recipe
    from veneer.train.sweep.recipe import Sweep


_Recipe = Annotated[
    Path | None, typer.Argument(metavar="RECIPE", show_default=False, help="A YAML file; see --print-recipe.")
]
_Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key, such as training.learning_rate=1e-4."),
]
_PrintRecipe = Annotated[bool, typer.Option("--print-recipe", help="Print a recipe with comments and leave.")]
_ShowSample = Annotated[
    bool, typer.Option("--show-sample", help="Print one row with its trained tokens coloured and leave.")
]
_Resume = Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint, bit for bit.")]
_BeyondMemory = Annotated[
    bool, typer.Option("--beyond-memory", help="Train although the plan says that memory will not do.")
]
_AllowChanges = Annotated[
    bool,
    typer.Option("--allow-changes", help="With --resume: go on with other settings, and write down what changed."),
]


_ACCURACIES = ("eval_rewards/accuracies", "eval_accuracy")  # of DPO, of reward models


def train(
    recipe: _Recipe = None,
    overrides: _Overrides = None,
    print_recipe: _PrintRecipe = False,
    show_sample: _ShowSample = False,
    resume: _Resume = False,
    allow_changes: _AllowChanges = False,
    beyond_memory: _BeyondMemory = False,
) -> None:
    """Fit an adapter (or the whole model) as a recipe says; several at once where it has a sweep part.

    Example: veneer train --print-recipe > recipe.yaml && veneer train recipe.yaml
    """
    if print_recipe:
        from veneer.recipe.commented import commented_recipe

        typer.echo(commented_recipe(), nl=False)
        return
    if recipe is None:
        raise ConfigError("veneer train needs a recipe: `veneer train --print-recipe > recipe.yaml` writes one to edit")
    if allow_changes and not resume:
        raise ConfigError("--allow-changes says how a run goes on, so it needs --resume beside it")
    with waits_told("loading torch and transformers"):
        wanted = _read(recipe, overrides or [])
        from veneer.train.processes import is_main, part

    level = logging.WARNING if is_main() else logging.ERROR  # what the others would say is the same
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s", stream=sys.stderr)
    from veneer.plan.presets import require_weights
    from veneer.recipe.recipe import Recipe
    from veneer.store.bars import without_bars

    first = wanted if isinstance(wanted, Recipe) else wanted.members[0].recipe
    require_weights(first.model.source, "model.source")
    console = Console(soft_wrap=True, quiet=not is_main())
    with without_bars(), _rows_counted_in_terminals():
        if show_sample:
            _show_sample(first, console)
        elif isinstance(wanted, Recipe):
            _require_startable(wanted, resume)
            _train_one(wanted, resume, allow_changes, _planned(wanted, beyond_memory, console), console)
        else:
            console.print(
                f"not planned: {len(wanted.members)} members share one base; `veneer plan` tells of one recipe",
                highlight=False,
            )
            _train_sweep(wanted, resume, allow_changes, console)
    part()


def _read(recipe: Path, overrides: list[str]) -> Recipe | Sweep:
    """Read the recipe, or the sweep, and check it as a whole."""
    from veneer.recipe.recipe import parse_recipe, read_values, refuse_early

    values = read_values(recipe, overrides)
    if "sweep" not in values:
        refuse_early(values, str(recipe))  # before torch is imported
    from veneer.train.sweep.recipe import PART, parse_sweep

    return parse_sweep(values, recipe) if PART in values else parse_recipe(values, str(recipe))


@contextmanager
def _rows_counted_in_terminals() -> Iterator[None]:
    """Encoding many rows takes minutes, so a terminal shows the bars of datasets; a file or a pipe does not."""
    import datasets

    from veneer.train.processes import is_main

    if datasets.are_progress_bars_disabled() or (is_main() and draws_bars(Console(stderr=True))):
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _show_sample(recipe: Recipe, console: Console) -> None:
    from veneer.train.samples import samples_of
    from veneer.train.show.sample import shown_sample

    samples, tokenizer = samples_of(recipe)
    for name, sample in samples.items():
        if len(samples) > 1 or recipe.task != "sft":
            console.print(f"{name}:", style="bold", highlight=False)
        console.print(shown_sample(sample, tokenizer, marks=not console.is_terminal))


def _require_startable(recipe: Recipe, resume: bool) -> None:
    """Before a plan: raise TrainingError where there is no checkpoint to go on from, ConfigError where a new run would
    be mixed up with one that is there, DataError where files of rows are not there, and CompositionError where the
    adapter that is trained on is in the base already.
    """
    from veneer.train.processes import is_main
    from veneer.train.run import require_begun, require_data_files, require_free, require_not_in_base

    if not is_main():
        return
    if resume:
        require_begun(recipe)
        return
    if Path(recipe.output).exists():
        require_free(recipe, resume)
    require_data_files(recipe.data)
    require_not_in_base(recipe)


class _Planned(NamedTuple):
    """The plan of a run, None where it cannot be planned, and the line that says so."""

    facts: dict[str, Any] | None
    line: str


def _planned(recipe: Recipe, beyond_memory: bool, console: Console) -> _Planned:
    """The plan of a run, told in one line. Raises ConfigError where memory will not do."""
    from veneer.plan.before import planned_facts, require_room

    with waits_told("planning"):
        facts, line = planned_facts(recipe, lambda line: console.print(line, style="dim", highlight=False))
    if facts is not None:
        console.print(line, highlight=False)
        if not beyond_memory:
            require_room(facts)
    return _Planned(facts, line)


def _train_one(recipe: Recipe, resume: bool, allow_changes: bool, planned: _Planned, console: Console) -> None:
    from veneer.train.checkpoint import holds_checkpoints
    from veneer.train.run import run_recipe

    # A run that cannot be planned is mostly refused for the same reason: only one that begins says so.
    untold = [planned.line] if planned.facts is None else []

    def tell(line: str) -> None:
        while untold:
            console.print(untold.pop(), highlight=False)
        console.print(line, style="bold", highlight=False)

    try:
        record = run_recipe(
            recipe,
            resume=resume,
            allow_changes=allow_changes,
            planned=planned.facts,
            tell=tell,
        )
    except KeyboardInterrupt as error:
        if not error.args and holds_checkpoints(Path(recipe.output)):
            error.args = ("checkpoints are kept, and --resume goes on from the last one",)
        raise
    results = record["results"]
    told = [f"training loss {results['train_loss']:.4f}"]
    told += [f"held-out loss {results['eval_loss']:.4f}"] if "eval_loss" in results else []
    told += [f"held-out accuracy {results[key]:.1%}" for key in _ACCURACIES if key in results]
    told += [f"held-out reward {results['eval_reward']:.4f}"] if "eval_reward" in results else []
    console.print(
        f"{', '.join(told)} after {results['steps']} steps in {duration(results['seconds'])}", highlight=False
    )
    console.print(
        f"saved in {record['saved']}; the run is written down in {Path(recipe.output) / 'run.json'}", highlight=False
    )


def _train_sweep(sweep: Sweep, resume: bool, allow_changes: bool, console: Console) -> None:
    from veneer.train.sweep.report import PAGE, SWEEP_FILE, outcomes, table, write_report
    from veneer.train.sweep.sweep import run_sweep

    records = run_sweep(
        sweep,
        resume=resume,
        allow_changes=allow_changes,
        tell=lambda line: console.print(line, highlight=False),
    )
    found = outcomes(sweep, records)
    write_report(sweep, found)
    console.print(table(found))
    console.print(f"written down in {sweep.output / SWEEP_FILE}, drawn in {sweep.output / PAGE}", highlight=False)
