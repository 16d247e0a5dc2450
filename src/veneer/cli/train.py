"""``veneer train``: train from a recipe. Options and recipe are checked before torch is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from veneer.cli.pages.options import unset
from veneer.data.tasks import OF_REWARDS
from veneer.errors import ConfigError
from veneer.plain.group import group_size, join_slurm, starts_processes
from veneer.plain.libraries import libraries_loading
from veneer.plan.presets import require_weights
from veneer.ray.place import RayCluster, place_of, require_ray
from veneer.recipe.adapter import names_of
from veneer.recipe.commented import commented_recipe
from veneer.recipe.distill_checks import BASE
from veneer.recipe.early import refuse_early
from veneer.recipe.known import declared_methods
from veneer.recipe.readers import refuse_rows
from veneer.recipe.sweep_part import PART
from veneer.recipe.values import read_values, section
from veneer.store.adapter.folder import is_alone, require_whole
from veneer.store.found import require_found, require_model
from veneer.train.record.place import Resume, refuse_place

_Recipe = Annotated[
    Path | None, typer.Argument(metavar="RECIPE", show_default=False, help="A YAML file; see --print-recipe.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change one key, such as training.learning_rate=1e-4; ~KEY removes one."
    ),
]
_PrintRecipe = Annotated[bool, typer.Option("--print-recipe", help="Print a recipe with comments and leave.")]
_ShowSample = Annotated[
    bool, typer.Option("--show-sample", help="Print one row with its trained tokens coloured and leave.")
]
_ShowRollouts = Annotated[
    int | None,
    unset("N", "Draw and reward N answers (of grpo, rloo and best_of), print them and leave.", "--show-rollouts"),
]
_BeyondMemory = Annotated[
    bool, typer.Option("--beyond-memory", help="Train although the plan says that memory will not do.")
]
AllowChanges = Annotated[
    bool,
    typer.Option("--allow-changes", help="With --resume: go on with other settings, and write down what changed."),
]
MaybeResume = Annotated[
    Literal["last", "auto"] | None,
    typer.Option(
        "--resume",
        metavar="[auto]",
        show_default=False,
        help="Continue from the last checkpoint, bit for bit; auto: begin, continue, or say that the run is finished.",
    ),
]
_Time = Annotated[
    bool,
    typer.Option("--time/--no-time", help="Plan seconds too, if earlier runs or a plan tell this machine's rates."),
]
_Processes = Annotated[
    int | None,
    unset("N", "Train in N processes of this machine, a device each; they share every batch.", "--processes", min=1),
]
_On = Annotated[
    str | None,
    unset("PLACE", "Train on Ray: ray, ray:N (N workers), ray:M-N (M to N) or ray://host:port.", "--on"),
]
_MAIN = "from veneer.cli.app import main; main()"


def train(
    context: typer.Context,
    recipe: _Recipe = None,
    overrides: Overrides = None,
    print_recipe: _PrintRecipe = False,
    show_sample: _ShowSample = False,
    show_rollouts: _ShowRollouts = None,
    resume: MaybeResume = None,
    allow_changes: AllowChanges = False,
    beyond_memory: _BeyondMemory = False,
    time: _Time = True,
    processes: _Processes = None,
    on: _On = None,
) -> None:
    """Train an adapter (or the whole model) from a recipe; several at once if it has a sweep part.

    Example: veneer train --print-recipe > recipe.yaml && veneer train recipe.yaml
    """
    if print_recipe:
        typer.echo(commented_recipe(names_of(declared_methods())), nl=False)
        return
    if recipe is None:
        raise ConfigError("veneer train needs a recipe: `veneer train --print-recipe > recipe.yaml` writes one to edit")
    if allow_changes and resume is None:
        raise ConfigError("--allow-changes says how a run continues: add --resume")
    join_slurm(os.environ)
    values = read_values(recipe, overrides or [])
    shows = show_sample or show_rollouts is not None
    if show_rollouts is not None:
        _require_rollouts(show_rollouts, values)
    place = None if shows else _place(on, values, processes)
    starts = starts_processes(processes) and not shows
    # A member of a sweep trains in one process, wherever it is.
    on_ray = None if place is None or PART in values else place.n_workers
    goes_on: Resume = "auto" if resume == "auto" else resume == "last"
    _refuse(values, recipe, overrides or (), goes_on, n_processes=processes if starts else on_ray, shows=shows)
    if starts:
        raise typer.Exit(_in_processes(context.find_root().obj, processes or 1, values))
    with libraries_loading():
        # Here, as it imports torch: a wrong option or recipe is refused before.
        from veneer.cli.train_run import OnRay, TrainOptions, carried_out, parsed

        wanted = parsed(values, recipe)
    asked = TrainOptions(
        show_sample=show_sample,
        show_rollouts=show_rollouts,
        resume=goes_on,
        allow_changes=allow_changes,
        beyond_memory=beyond_memory,
        timed=time,
        on=None if place is None else OnRay(place, recipe, overrides or []),
    )
    carried_out(wanted, asked)


def _require_rollouts(n: int, values: Mapping[str, Any]) -> None:
    """Raise ConfigError if ``n`` is less than 1, or if the recipe's task generates no answers, so that there are none
    to show.
    """
    if n < 1:
        raise ConfigError(f"--show-rollouts {n} must be at least 1")
    task = values.get("task", "sft")
    if task not in OF_REWARDS or PART in values:
        which = "a sweep" if PART in values else f"task {task}"
        raise ConfigError(
            f"--show-rollouts: {which} draws no answers to learn from; {', '.join(OF_REWARDS)} do. --show-sample "
            "shows a row"
        )


def _refuse(
    values: Mapping[str, Any],
    recipe: Path,
    overrides: Sequence[str],
    resume: Resume,
    *,
    n_processes: int | None,
    shows: bool,
) -> None:
    """Raise the errors of a run that can be found without torch: wrong keys, a used output folder, bad rows, a missing
    base or teacher.
    """
    refuse_early(values, str(recipe), overrides, begins=resume is not True, n_processes=n_processes)
    if PART not in values and not shows:
        refuse_place(values, resume)
    if resume is not True:
        refuse_rows(values, recipe)
    source, teacher = section(values, "model").get("source"), section(values, "distill").get("teacher", BASE)
    if isinstance(source, str):
        require_weights(source, "model.source")
        require_found(source)
    if isinstance(teacher, str) and teacher != BASE:
        require_weights(teacher, "distill.teacher")
        require_found(teacher)
        folder = Path(teacher).expanduser()
        require_whole(folder) if is_alone(folder) else require_model(folder)


def _place(on: str | None, values: Mapping[str, Any], processes: int | None) -> RayCluster | None:
    """Return the Ray cluster to train on, if any. Raises ConfigError if it cannot be used."""
    by_recipe = section(values, PART).get("engine") == "ray"
    if on is None and not by_recipe:
        return None
    if processes is not None or group_size() > 1:
        asked = "sweep.engine: ray" if on is None else "--on"
        raise ConfigError(
            f"{asked}: the workers of Ray are the processes of a run. Leave --processes and launchers out."
        )
    place = place_of(on or "ray")
    require_ray(place)
    return place


def _in_processes(args: Sequence[str], n: int, values: Mapping[str, Any]) -> int:
    """Run the same command in ``n`` processes, and return its exit status. Raises ConfigError if they cannot start."""
    if PART in values:
        raise ConfigError(f"--processes {n}: the members of a sweep share one process. Leave --processes out.")
    with libraries_loading():
        # Here, as it imports torch: a sweep is refused before.
        from veneer.train.launcher import launched, require_devices

        if not section(values, "training").get("use_cpu"):
            require_devices(n)
    return launched([sys.executable, "-P", "-c", _MAIN, *args], n)
