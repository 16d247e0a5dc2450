"""Subjects of ``veneer eval``: rows, their tokenizer, and a model with adapters, loaded when needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from veneer.adapters.chosen import ModelParts, split
from veneer.cli import loading
from veneer.cli.pages.eval import EvalArguments, reader_of
from veneer.data.asked_rows import as_trained, read_rows
from veneer.errors import ConfigError
from veneer.train.outcome import held_out_rows, saved_by, trained_parts, trained_recipe, trained_tokenizer

Rows = Sequence[Mapping[str, Any]]
BASE = "(base)"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Rows to ask about: the first rows of ``whole``. ``load`` loads the model.

    ``adapters`` are measured side by side, preceded by the base alone if ``with_base``.
    """

    rows: Rows
    whole: Rows
    tokenizer: Any
    load: Callable[[], ModelParts]
    adapters: tuple[Path, ...]
    with_base: bool
    facts: dict[str, Any]

    @property
    def columns(self) -> list[Path | None]:
        """Adapter, or None for the base alone, for each result."""
        return [*([None] if self.with_base or not self.adapters else []), *self.adapters]

    @property
    def names(self) -> list[str]:
        """Names of the columns."""
        alone = BASE if self.adapters else str(self.facts["adapter"] or self.facts["model"])
        return [alone if folder is None else str(folder) for folder in self.columns]


def subjects_of(args: EvalArguments) -> list[Subject]:
    """Return the subject that the arguments name, or that of each recipe, fully checked, with no weight loaded.

    Raises ConfigError for recipes that cannot be compared: their held-out rows have different answers, or their
    tokenizers differ and the metric is perplexity.
    """
    if args.with_base and not args.adapters and not args.recipes and not _is_adapter(args.model):
        raise ConfigError("--with-base sets the base beside adapters, and none is given: add --adapter FOLDER")
    if args.model is not None and args.data is not None:
        return [_of_model(args, args.model, args.data)]
    subjects = [_of_recipe(path, args) for path in args.recipes]
    _require_comparable(subjects, args)
    if args.with_base and not subjects[0].adapters:
        raise ConfigError(
            f"--with-base sets the base beside an adapter, and --recipe {args.recipes[0]} trains all weights: give "
            "first a recipe with an adapter, or leave --with-base out"
        )
    whole = [row for subject in subjects for row in subject.whole]  # labels to choose from are the same for all
    first, *others = (replace(subject, whole=whole) for subject in subjects)
    return [replace(first, with_base=args.with_base), *others]


def _require_comparable(subjects: Sequence[Subject], args: EvalArguments) -> None:
    first, *others = subjects
    for path, other in zip(args.recipes[1:], others, strict=True):
        two = f"--recipe {args.recipes[0]} and {path}"
        if [_answer(row) for row in first.rows] != [_answer(row) for row in other.rows]:
            raise ConfigError(
                f"{two} hold out rows with different answers: give --data FILE, to measure both on its rows"
            )
        if args.metric == "perplexity" and first.tokenizer.get_vocab() != other.tokenizer.get_vocab():
            raise ConfigError(
                f"{two} have different tokenizers, so their perplexities cannot be compared: choose another metric"
            )


def _answer(row: Mapping[str, Any]) -> object:
    """Return the right answer of a row in a training format."""
    return row["messages"][-1] if "messages" in row else row.get("completion", row.get("text"))


def _is_adapter(model: str | None) -> bool:
    return model is not None and bool(split(model, ())[1])


def _of_model(args: EvalArguments, model: str, data: Path) -> Subject:
    whole = _as_trained(read_rows(data), args)
    chosen = loading.choose(model, args.adapters, four_bit=args.load_in_4bit, dtype=args.dtype)
    adapters = None if not args.adapters else ", ".join(map(str, args.adapters))
    return Subject(
        rows=whole[: args.limit],
        whole=whole,
        tokenizer=chosen.tokenizer,
        load=chosen.load,
        adapters=chosen.adapters,
        with_base=args.with_base,
        facts={"model": model, "adapter": adapters, "data": str(data)},
    )


def _of_recipe(path: Path, args: EvalArguments) -> Subject:
    recipe = trained_recipe(path)
    saved = saved_by(Path(recipe.output), recipe.method)
    tokenizer = trained_tokenizer(recipe.model.source, saved)
    rows, others = held_out_rows(recipe.data, recipe.seed, args.data)
    where = args.data or recipe.data.eval or f"{recipe.data.eval_fraction:.3g} of {recipe.data.train}, held out"
    return Subject(
        rows=rows[: args.limit],
        whole=[*rows, *others],
        tokenizer=tokenizer,
        load=lambda: trained_parts(recipe.model, recipe.method, saved, tokenizer),
        adapters=() if recipe.method == "full" else (saved,),
        with_base=False,
        facts={"model": recipe.model.source, "adapter": str(saved), "data": str(where)},
    )


def _as_trained(rows: Rows, args: EvalArguments) -> Rows:
    """Convert the rows to a training format; leave them unchanged if a template makes their prompts."""
    return as_trained(rows, reader_of(args)) if args.prompt is None else rows
