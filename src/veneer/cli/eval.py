"""``veneer eval``: the quality of a model on data."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from veneer.cli import loading
from veneer.cli.facts import AsJson, print_facts
from veneer.cli.measurement import Measurement, Metric, Options, Subject
from veneer.core.progress import progress_bar


def _unescaped(text: str) -> str:
    r"""A shell passes \n on as two characters; in a prompt or a stop text they mean the line break."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


_Metric = Annotated[
    Metric, typer.Option("--metric", "-m", metavar="NAME", show_default=False, help=f"{', '.join(Metric)}.")
]
_Data = Annotated[
    Path | None,
    typer.Option("--data", "-d", metavar="FILE", show_default=False, help="A .jsonl, .json, .parquet or .txt file."),
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
_Pattern = Annotated[
    str | None, typer.Option(metavar="REGEX", show_default=False, help="regex: what to compare in answers.")
]
_Labels = Annotated[
    str | None,
    typer.Option(metavar="WORDS", show_default=False, help="labels: the words, with commas; else those in the data."),
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
    adapter: loading.Adapter = None,
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

    With --recipe all of that is taken from a recipe that was carried out.

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
    subject = Subject(
        model=model,
        adapter=adapter,
        recipe=recipe,
        data=data,
        limit=limit,
        chat=chat,
        system=system,
        load_in_4bit=load_in_4bit,
        dtype=dtype,
    )
    facts = _measured(Measurement(metric, options, batch_size), subject, predictions)
    typer.echo(json.dumps(facts, indent=2)) if as_json else _show(facts)


def _measured(measurement: Measurement, subject: Subject, predictions: Path | None) -> dict[str, Any]:
    """Measure; return the model, the data and the result, and write the answers to ``predictions``."""
    measurement.check(predictions)
    ready, facts = measurement.take(subject)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    started = time.perf_counter()
    with loading.quiet(), progress_bar(measurement.metric, *columns) as on_progress:
        result = measurement.measure(ready, on_progress)
    seconds = round(time.perf_counter() - started, 3)
    if predictions is not None:
        measurement.write_predictions(predictions, result)
    return {**facts, "metric": str(measurement.metric), **_numbers(result), "seconds": seconds}


def _numbers(result: Any) -> dict[str, float | int | None]:
    return {k: getattr(result, k) for k in result.__slots__ if k not in ("predictions", "right")}


_TITLES = {
    "value": "value",
    "n_rows": "rows",
    "n_tokens": "tokens",
    "n_right": "right",
    "nats_per_token": "nats per token",
}


def _show(facts: Mapping[str, Any]) -> None:
    shown: dict[str, str] = {}
    is_share = facts["metric"] != "perplexity"
    for name, value in facts.items():
        if value is None or name in ("metric", "standard_error"):
            continue
        if name == "value":
            title = f"accuracy ({facts['metric']})" if is_share else "perplexity"
            shown[title] = _share(value, facts["standard_error"]) if is_share else f"{value:,.4f}"
        else:
            shown[_TITLES.get(name, name)] = _number(value)
    print_facts(shown)


def _share(value: float, error: float | None) -> str:
    return f"{value:.1%}" if error is None else f"{value:.1%} ± {error:.1%}"


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
