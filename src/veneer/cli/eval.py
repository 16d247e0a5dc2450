"""``veneer eval``: the quality of a model on data."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from veneer.cli import loading
from veneer.cli.facts import AsJson
from veneer.cli.measured import Measured
from veneer.cli.measurement import Measurement, Metric, Options
from veneer.cli.subject import Named, subject_of
from veneer.core.progress import progress_bar


def _unescaped(text: str) -> str:
    r"""A shell passes \n on as two characters; in a prompt or a stop text they mean the line break."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


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


def eval_(
    metric: _Metric,
    model: loading.MaybeModel = None,
    data: _Data = None,
    recipe: _Recipe = None,
    adapter: loading.Adapters = None,
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
    load_in_4bit: loading.FourBit = False,
    dtype: loading.Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure a model, with or without an adapter, on data in a training format (chat, or prompt and completion).

    Several adapters (-a again) are measured side by side, with paired differences. With --recipe all of that is taken
    from a recipe that was carried out.

    Example: veneer eval runs/first/adapter -d heldout.jsonl -m exact-match
    """
    options = Options(
        pattern=pattern,
        labels=labels,
        prompt=prompt,
        answer_field=answer_field,
        ignore_case=ignore_case,
        max_new_tokens=max_new_tokens,
        stop=stop or None,
        context=context,
        stride=stride,
        whole_rows=whole_rows,
    )
    named = Named(
        model=model,
        adapters=tuple(adapter or ()),
        with_base=with_base,
        recipe=recipe,
        data=data,
        limit=limit,
        chat=chat,
        system=system,
        load_in_4bit=load_in_4bit,
        dtype=dtype,
        prompt=prompt,
        answer_field=answer_field,
    )
    measured = _measured(Measurement(metric, options, batch_size), named, predictions)
    typer.echo(json.dumps(measured.facts(), indent=2)) if as_json else measured.show()


def _measured(measurement: Measurement, named: Named, predictions: Path | None) -> Measured:
    """Measure, and write the answers to ``predictions``."""
    measurement.check(predictions)
    subject = subject_of(named)
    measurement.ask(subject)
    parts = subject.load()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    started = time.perf_counter()
    with loading.quiet(), progress_bar(measurement.metric, *columns) as on_progress:
        results = measurement.measure(subject, parts, on_progress)
    seconds = round(time.perf_counter() - started, 3)
    measured = Measured(measurement, subject, results, seconds)
    if predictions is not None:
        measured.write_predictions(predictions)
    return measured
