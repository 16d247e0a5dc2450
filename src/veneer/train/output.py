"""Folder of a run: checks whether the run may write there, and saves its results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from veneer.adapters.card import tell_parent
from veneer.disk.folder import new_folder
from veneer.errors import ConfigError, DataError, listed
from veneer.recipe.adapter import FULL
from veneer.recipe.parts import DataPart
from veneer.recipe.recipe import Recipe
from veneer.train.asking import ask_command
from veneer.train.checkpoint import latest_checkpoint
from veneer.train.processes import by_main, is_main
from veneer.train.record.going_on import is_complete, parent_of
from veneer.train.record.place import ADAPTER, MODEL, Resume, require_fresh
from veneer.train.record.record import record_of
from veneer.train.run_trainer import RunTrainer

_SHOWN = 3  # other files


def is_over(recipe: Recipe) -> bool:
    """Return True if the output folder holds a finished run, and the recipe asks for no more steps."""
    record = record_of(Path(recipe.output))
    return record is not None and is_complete(record, recipe)


@contextmanager
def taken_back(output: Path, made: bool) -> Iterator[None]:
    """Enter a context that removes the output folder if the block fails while the folder is empty.

    ``made``: the folder was created for this block. If it is False, nothing is removed.
    """
    try:
        yield
    except BaseException:
        if made and is_main():
            with suppress(OSError):  # something was put into it
                output.rmdir()
        raise


def other_files(output: Path) -> str | None:
    """Return a note on the files of a folder that holds no run, or None if it is empty."""
    names = sorted(path.name for path in output.iterdir()) if record_of(output) is None else []
    if not names:
        return None
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    return f"{output} holds other files, which stay as they are: {shown}"


def require_free(output: Path, data: DataPart, resume: Resume) -> None:
    """Check an output folder by `require_fresh`. If data files are missing too, the same error names them."""
    try:
        require_fresh(output, resume)
    except ConfigError as error:
        raise ConfigError(listed([str(error), *data.missing_files])) from error


def require_data_files(part: DataPart) -> None:
    """Raise DataError if files of rows do not exist. The error names all of them."""
    if part.missing_files:
        raise DataError(listed(part.missing_files))


def require_begun(output: Path, data: DataPart) -> None:
    """Raise TrainingError if there is nothing to resume: neither a checkpoint nor a finished run.

    Raises DataError if files of the rows of the resumed run do not exist.
    """
    record = record_of(output)
    if record is None or record["status"] != "finished":
        latest_checkpoint(output)
        require_data_files(data)


def save_trained(trainer: RunTrainer, folder: Path, adapter: Mapping[str, Any]) -> None:
    """Write the trained adapter or model, completely or not at all, and upload the run's folder if settings say so.

    ``adapter`` is that part of the recipe, which may name the adapter on which training continued. All processes wait
    for the main one. Otherwise, after a signal, the others would end, and their launcher would end the main one with
    them.
    """
    if is_main():
        with new_folder(folder) as scratch:
            trainer.save_model(str(scratch), _internal_call=True)
            parent = parent_of(adapter)
            if parent is not None:
                tell_parent(scratch, parent)
    else:
        trainer.save_model(str(folder), _internal_call=True)  # which takes part, and writes nothing
    if trainer.args.push_to_hub:  # once it stands under its name
        trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)
    by_main(lambda: None)


def usable(recipe: Recipe, checkpoint: Path) -> str:
    """Return a sentence with commands that use a checkpoint's adapter or model like the results of a finished run."""
    base, kind = recipe.model.source, MODEL if recipe.method == FULL else ADAPTER
    if recipe.task == "reward":
        return f"The {kind} in {checkpoint} loads as that of a finished run does"
    metric = "perplexity" if recipe.metric is None else recipe.metric.name
    what, served = {
        MODEL: (f"{checkpoint}", f"veneer serve {checkpoint}"),
        ADAPTER: (f"{base} --adapter {checkpoint}", f"veneer serve {base} --adapters {checkpoint.parent}"),
    }[kind]
    commands = ask_command(what, recipe.data, recipe.task), served, f"veneer eval {checkpoint} -d FILE -m {metric}"
    told = ", ".join(f"`{command}`" for command in commands)
    return f"The {kind} in {checkpoint} can be used now: {told}"
