"""``veneer eval``: the quality of a model on data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.arguments import require_model, require_rows
from veneer.cli.facts import AsJson
from veneer.cli.pages import options
from veneer.cli.pages.options import unset
from veneer.cli.work import verb
from veneer.recipe.values import read_values
from veneer.store.adapter.folder import require_adapter, require_whole


def _unescaped(text: str) -> str:
    r"""A shell passes \n on as two characters; in a prompt or a stop text they mean the line break."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


class MetricName(StrEnum):
    """Metrics by name."""

    PERPLEXITY = "perplexity"
    EXACT_MATCH = "exact-match"
    REGEX = "regex"
    LABELS = "labels"


_Recipe = Annotated[
    list[Path] | None,
    unset(
        "FILE",
        "In place of MODEL: what this recipe trained, on its held-out rows (or on --data, read as it reads). "
        "Again: another run beside it.",
        "--recipe",
    ),
]
_Labels = Annotated[str | None, unset("WORDS", "labels: words with commas or a file of lines; else the data's.")]
_Prompt = Annotated[
    str | None,
    unset("TEXT", "Prompt made of a row's fields: 'Review: {text}\\nMood:'.", "--prompt", "-p", parser=_unescaped),
]
_IgnoreCase = Annotated[
    bool, typer.Option("--ignore-case", show_default=False, help="Case and white space do not count.")
]
_MaxNewTokens = Annotated[
    int | None, typer.Option(metavar="N", min=1, show_default="256", help="Longest answer, in tokens.")
]
_Stop = Annotated[list[str] | None, unset("TEXT", "Text that ends an answer; may be given again.", parser=_unescaped)]
_Context = Annotated[
    int | None,
    typer.Option(metavar="N", min=2, show_default="1024", help="perplexity: window in tokens."),
]
_Stride = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, show_default="context/2", help="perplexity: from window to window."),
]
_Chat = Annotated[bool, typer.Option("--chat", help="Ask prompts as turns of a chat, as data.chat does in a recipe.")]
_WholeRows = Annotated[bool, typer.Option("--whole-rows", show_default=False, help="perplexity: of prompts too.")]


@dataclass(frozen=True, kw_only=True)
class EvalArguments:
    """Measure a model, with or without an adapter, on data in a training format (chat, or prompt and completion).

    Two runs are compared row by row, with intervals: adapters of one base (-a again, --with-base), or what recipes
    trained (--recipe again). --recipe takes the model, adapter and data from the recipe of a finished run.

    Example: veneer eval runs/first/adapter -d heldout.jsonl -m exact-match
    """

    metric: Annotated[MetricName, unset("NAME", f"{', '.join(MetricName)}.", "--metric", "-m")]
    model: options.MaybeModel = None
    data: Annotated[Path | None, unset("FILE", "Rows: .jsonl, .json, .csv, .parquet or .txt.", "--data", "-d")] = None
    recipe: _Recipe = None
    adapter: options.Adapters = None
    with_base: Annotated[bool, typer.Option("--with-base", help="Measure the base without an adapter too.")] = False
    pattern: Annotated[str | None, unset("REGEX", "regex: what to compare in answers.")] = None
    labels: _Labels = None
    prompt: _Prompt = None
    answer_field: Annotated[str | None, unset("FIELD", "Field of the right answer (or of a list of them).")] = None
    ignore_case: _IgnoreCase = False
    max_new_tokens: _MaxNewTokens = None
    stop: _Stop = None
    context: _Context = None
    stride: _Stride = None
    chat: _Chat = False
    system: Annotated[str | None, unset("TEXT", "A system message before each chat, as data.system.")] = None
    whole_rows: _WholeRows = False
    limit: Annotated[int | None, unset("N", "Only the first so many rows.", min=1)] = None
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Most rows in one forward pass.")] = 16
    predictions: Annotated[Path | None, unset("FILE", "Write every answer and whether it is right (.jsonl).")] = None
    load_in_4bit: options.FourBit = False
    dtype: options.Dtype = "auto"
    as_json: AsJson = False

    @property
    def adapters(self) -> tuple[Path, ...]:
        """Adapters that are given."""
        return tuple(self.adapter or ())

    @property
    def recipes(self) -> tuple[Path, ...]:
        """Recipes that are given."""
        return tuple(self.recipe or ())

    def __post_init__(self) -> None:
        require_rows(self.data)
        for recipe in self.recipes:
            read_values(recipe)
        if self.recipes:
            return  # model and adapters do not go with them
        for adapter in self.adapters:
            require_adapter(adapter)
        require_model(self.model)
        require_whole(*self.adapters)


eval_ = verb(EvalArguments, "veneer.cli.eval", "eval_")
