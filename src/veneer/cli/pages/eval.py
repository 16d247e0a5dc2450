"""``veneer eval``: the quality of a model on data."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.facts import AsJson
from veneer.cli.pages import options
from veneer.cli.work import carried_out_by
from veneer.plan.presets import require_weights


def _unescaped(text: str) -> str:
    r"""A shell passes \n on as two characters; in a prompt or a stop text they mean the line break."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


class Metric(StrEnum):
    """Metrics by name."""

    PERPLEXITY = "perplexity"
    EXACT_MATCH = "exact-match"
    REGEX = "regex"
    LABELS = "labels"


_Metric = Annotated[
    Metric, typer.Option("--metric", "-m", metavar="NAME", show_default=False, help=f"{', '.join(Metric)}.")
]
_Data = Annotated[
    Path | None,
    typer.Option(
        "--data", "-d", metavar="FILE", show_default=False, help="Rows: .jsonl, .json, .csv, .parquet or .txt."
    ),
]
_Recipe = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        metavar="FILE",
        show_default=False,
        help="In place of MODEL: what this recipe trained, on its held-out rows (or on --data, read as it reads).",
    ),
]
_WithBase = Annotated[bool, typer.Option("--with-base", help="Measure the base without an adapter too.")]
_Pattern = Annotated[
    str | None, typer.Option(metavar="REGEX", show_default=False, help="regex: what to compare in answers.")
]
_Labels = Annotated[
    str | None,
    typer.Option(
        metavar="WORDS",
        show_default=False,
        help="labels: words with commas or a file of lines; else the data's.",
    ),
]
_Prompt = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        parser=_unescaped,
        show_default=False,
        help="Prompt made of a row's fields: 'Review: {text}\\nMood:'.",
    ),
]
_AnswerField = Annotated[
    str | None,
    typer.Option(metavar="FIELD", show_default=False, help="Field of the right answer (or of a list of them)."),
]
_IgnoreCase = Annotated[
    bool, typer.Option("--ignore-case", show_default=False, help="Case and white space do not count.")
]
_MaxNewTokens = Annotated[
    int | None, typer.Option(metavar="N", min=1, show_default="256", help="Longest answer, in tokens.")
]
_Stop = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT", parser=_unescaped, show_default=False, help="Text that ends an answer; may be given again."
    ),
]
_Context = Annotated[
    int | None,
    typer.Option(metavar="N", min=2, show_default="1024", help="perplexity: window in tokens."),
]
_Stride = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, show_default="context/2", help="perplexity: from window to window."),
]
_Chat = Annotated[bool, typer.Option("--chat", help="Ask prompts as turns of a chat, as data.chat does in a recipe.")]
_System = Annotated[
    str | None,
    typer.Option(metavar="TEXT", show_default=False, help="A system message before each chat, as data.system."),
]
_WholeRows = Annotated[bool, typer.Option("--whole-rows", show_default=False, help="perplexity: of prompts too.")]
_Limit = Annotated[
    int | None, typer.Option(metavar="N", min=1, show_default=False, help="Only the first so many rows.")
]
_BatchSize = Annotated[int, typer.Option(metavar="N", min=1, help="Most rows in one forward pass.")]
_Predictions = Annotated[
    Path | None,
    typer.Option(metavar="FILE", show_default=False, help="Write every answer and whether it is right (.jsonl)."),
]


@carried_out_by("veneer.cli.eval")
def eval_(
    metric: _Metric,
    model: options.MaybeModel = None,
    data: _Data = None,
    recipe: _Recipe = None,
    adapter: options.Adapters = None,
    with_base: _WithBase = False,
    pattern: _Pattern = None,
    labels: _Labels = None,
    prompt: _Prompt = None,
    answer_field: _AnswerField = None,
    ignore_case: _IgnoreCase = False,
    max_new_tokens: _MaxNewTokens = None,
    stop: _Stop = None,
    context: _Context = None,
    stride: _Stride = None,
    chat: _Chat = False,
    system: _System = None,
    whole_rows: _WholeRows = False,
    limit: _Limit = None,
    batch_size: _BatchSize = 16,
    predictions: _Predictions = None,
    load_in_4bit: options.FourBit = False,
    dtype: options.Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure a model, with or without an adapter, on data in a training format (chat, or prompt and completion).

    Several adapters (-a again) are measured side by side, with paired differences. --recipe takes the model, adapter
    and data from the recipe of a finished run.

    Example: veneer eval runs/first/adapter -d heldout.jsonl -m exact-match
    """
    if model is not None:
        require_weights(model)
