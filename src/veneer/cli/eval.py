"""``veneer eval``: how good a model is on data."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from veneer.cli import loading
from veneer.train.terminal import draws_bars

if TYPE_CHECKING:
    from veneer.train.evaluate import Accuracy, Perplexity
    from veneer.train.questions import Question

OnProgress = Callable[[int, int], None]


class Metric(StrEnum):
    """What is measured."""

    PERPLEXITY = "perplexity"
    EXACT_MATCH = "exact-match"
    REGEX = "regex"
    LABELS = "labels"


_READS = {  # which options each metric reads; any other that is given is an error
    Metric.PERPLEXITY: {"prompt", "answer_field", "context", "stride", "whole_rows"},
    Metric.EXACT_MATCH: {"prompt", "answer_field", "ignore_case", "max_new_tokens", "stop"},
    Metric.REGEX: {"prompt", "answer_field", "ignore_case", "max_new_tokens", "stop", "pattern"},
    Metric.LABELS: {"prompt", "answer_field", "labels"},
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options that only some metrics read; None where not given."""

    pattern: str | None
    labels: str | None
    prompt: str | None
    answer_field: str | None
    ignore_case: bool | None
    max_new_tokens: int | None
    stop: list[str] | None
    context: int | None
    stride: int | None
    whole_rows: bool | None


def eval_(
    metric: Annotated[
        Metric, typer.Option("--metric", "-m", metavar="NAME", show_default=False, help=f"{', '.join(Metric)}.")
    ],
    model: loading.MaybeModel = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", "-d", metavar="FILE", show_default=False, help="A .jsonl, .json, .parquet or .txt file."
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            metavar="FILE",
            show_default=False,
            help="In place of MODEL: what this recipe trained, on its held-out rows (or on --data, read as it reads).",
        ),
    ] = None,
    adapter: loading.Adapter = None,
    pattern: Annotated[
        str | None, typer.Option(metavar="REGEX", show_default=False, help="regex: what to compare in answers.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="WORDS", show_default=False, help="labels: the words, with commas; else those in the data."
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", show_default=False, help="Prompt made of a row's fields: 'Review: {text}\\nMood:'."
        ),
    ] = None,
    answer_field: Annotated[
        str | None,
        typer.Option(metavar="FIELD", show_default=False, help="Field of the right answer (or of a list of them)."),
    ] = None,
    ignore_case: Annotated[
        bool | None, typer.Option("--ignore-case", show_default=False, help="Case and white space do not count.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, show_default="256", help="Longest answer, in tokens.")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", show_default=False, help="Text that ends an answer; may be given again."),
    ] = None,
    context: Annotated[
        int | None, typer.Option(metavar="N", min=2, show_default="1024", help="perplexity: window in tokens.")
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, show_default="context/2", help="perplexity: from window to window."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask prompts as turns of a chat, as data.chat does in a recipe.")
    ] = False,
    system: Annotated[
        str | None,
        typer.Option(metavar="TEXT", show_default=False, help="A system message before each chat, as data.system."),
    ] = None,
    whole_rows: Annotated[
        bool | None, typer.Option("--whole-rows", show_default=False, help="perplexity: of prompts too.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, show_default=False, help="Only the first so many rows.")
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Most rows in one forward pass.")] = 16,
    predictions: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default=False, help="Write every answer and whether it is right (.jsonl)."),
    ] = None,
    load_in_4bit: loading.FourBit = False,
    dtype: loading.Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
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
    run = _Run(metric, options, batch_size)
    run.check(predictions)
    facts: dict[str, Any]
    if recipe is not None:
        given: dict[str, object] = {"MODEL": model, "--adapter": adapter, "--system": system, "--prompt": prompt}
        given |= {"--answer-field": answer_field, "--chat": chat, "--load-in-4bit": load_in_4bit}
        loaded, facts = run.take_recipe(recipe, data, {**given, "--dtype": dtype != "auto"}, limit)
    else:
        loaded, facts = run.take_model(model, adapter, data, limit, _Reading(chat, system, load_in_4bit, dtype))
    started = time.perf_counter()
    with loading.quiet(), _Bar(metric) as on_progress:
        result = run.measure(loaded, on_progress)
    facts |= {"metric": str(metric), **_numbers(result), "seconds": round(time.perf_counter() - started, 3)}
    if predictions is not None:
        run.write_predictions(predictions, result)
    typer.echo(json.dumps(facts, indent=2)) if as_json else _show(facts)


@dataclass(frozen=True)
class _Reading:
    """How rows become questions, and how the model is loaded."""

    chat: bool
    system: str | None
    load_in_4bit: bool
    dtype: str


class _Run:
    """One measurement: its rows, its options, what it finds."""

    def __init__(self, metric: Metric, options: Options, batch_size: int) -> None:
        self.metric, self.options, self.batch_size = metric, options, batch_size
        self.rows: Sequence[Mapping[str, Any]] = ()
        self.questions: list[Question] = []

    def take_model(
        self, model: str | None, adapter: Path | None, data: Path | None, limit: int | None, reading: _Reading
    ) -> tuple[loading.Loaded, dict[str, Any]]:
        """Read the rows, then load the model; with the facts that are known of both."""
        from veneer.errors import ConfigError
        from veneer.train.questions import read_rows

        if model is None or data is None:
            raise ConfigError("say what to measure: MODEL and --data FILE, or --recipe FILE for what a recipe trained")
        self.rows = read_rows(data)[:limit]
        self._read_as_trained(reading.chat, reading.system)
        loaded = loading.load(model, adapter, four_bit=reading.load_in_4bit, dtype=reading.dtype)
        return loaded, {"model": model, "adapter": None if adapter is None else str(adapter), "data": str(data)}

    def take_recipe(
        self, path: Path, data: Path | None, given: Mapping[str, Any], limit: int | None
    ) -> tuple[loading.Loaded, dict[str, Any]]:
        """`take_model` for what a recipe trained."""
        from veneer.cli.eval_recipe import held_out_rows, load_trained, saved_by, trained_recipe
        from veneer.errors import ConfigError

        beside = [name for name, value in given.items() if value]
        if beside:
            raise ConfigError(f"--recipe says it already, so leave out {', '.join(beside)}")
        recipe = trained_recipe(path)
        saved = saved_by(recipe)
        self.rows = held_out_rows(recipe, data)[:limit]
        named = data or recipe.data.eval or f"{recipe.data.eval_fraction:.3g} of {recipe.data.train}, held out"
        return load_trained(recipe), {"model": recipe.model.source, "adapter": str(saved), "data": str(named)}

    def _read_as_trained(self, chat: bool, system: str | None) -> None:
        """Bring the rows into the forms of training. Raises ConfigError where a template makes the prompts already."""
        from veneer.errors import ConfigError
        from veneer.train.questions import as_trained

        if self.options.prompt is None:
            self.rows = as_trained(self.rows, chat=chat, system=system)
        elif chat or system is not None:
            option = "--chat makes turns of its fields" if chat else "--system belongs to turns"
            raise ConfigError(f"--prompt makes plain text of each row, and {option}: give one")

    def check(self, predictions: Path | None) -> None:
        """Raise ConfigError for options that this metric does not read, or lacks."""
        from veneer.errors import ConfigError

        given = {name for name, value in vars(self.options).items() if value is not None}
        foreign = sorted(given - _READS[self.metric])
        problems = [f"--{name.replace('_', '-')} is not read by --metric {self.metric}" for name in foreign]
        if self.metric is Metric.REGEX and self.options.pattern is None:
            problems.append("--metric regex needs --pattern")
        if self.metric is Metric.PERPLEXITY and predictions is not None:
            problems.append("--predictions is not read by --metric perplexity")
        if self.metric is Metric.PERPLEXITY and self.options.answer_field and self.options.prompt is None:
            problems.append("--metric perplexity reads --answer-field together with --prompt")
        if problems:
            raise ConfigError("; ".join(problems))

    def measure(self, loaded: loading.Loaded, on_progress: OnProgress) -> Perplexity | Accuracy:
        """The result."""
        from veneer.train import evaluate
        from veneer.train.questions import QuestionReader, as_templated
        from veneer.train.scoring import Batching

        options, batching = self.options, Batching(n_rows=self.batch_size)
        if self.metric is Metric.PERPLEXITY:
            rows = self.rows
            if options.prompt is not None:
                rows = as_templated(rows, _unescaped(options.prompt) or "", options.answer_field)
            context = options.context or evaluate.Windows.context
            windows = evaluate.Windows(context=context, stride=options.stride or max(context // 2, 1))
            return evaluate.perplexity(
                loaded.model,
                loaded.tokenizer,
                rows,
                windows=windows,
                whole_rows=bool(options.whole_rows),
                batching=batching,
                on_progress=on_progress,
            )
        reader = QuestionReader(
            tokenizer=loaded.tokenizer, prompt=_unescaped(options.prompt), answer_field=options.answer_field
        )
        self.questions = reader.read(self.rows)
        if self.metric is Metric.LABELS:
            words = options.labels.split(",") if options.labels is not None else ()
            return evaluate.label_accuracy(
                loaded.model, loaded.tokenizer, self.questions, words, batching=batching, on_progress=on_progress
            )
        return evaluate.answer_accuracy(
            loaded.model,
            loaded.tokenizer,
            self.questions,
            self._judge(),
            answering=self._answering(),
            batching=batching,
            on_progress=on_progress,
        )

    def write_predictions(self, path: Path, result: Any) -> None:
        """One JSON object a row: the answers that are right, the prediction, whether it is one of them."""
        with path.open("w", encoding="utf-8") as file:
            for question, given, right in zip(self.questions, result.predictions, result.right, strict=True):
                row = {"answers": question.answers, "prediction": given, "right": right}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _judge(self) -> Callable[[str, Sequence[str]], bool]:
        from veneer.train.evaluate import exact_match, regex_match

        fold = bool(self.options.ignore_case)
        pattern = self.options.pattern
        return exact_match(fold=fold) if pattern is None else regex_match(pattern, fold=fold)

    def _answering(self) -> Any:
        from veneer.train.scoring import Answering

        stop = tuple(text for text in map(_unescaped, self.options.stop or ()) if text)
        return Answering(max_new_tokens=self.options.max_new_tokens or Answering.max_new_tokens, stop=stop)


def _unescaped(text: str | None) -> str | None:
    r"""A shell passes \n on as two characters; in a prompt or a stop text they mean the line break."""
    return None if text is None else text.replace("\\n", "\n").replace("\\t", "\t")


def _numbers(result: Any) -> dict[str, float | int]:
    return {k: getattr(result, k) for k in result.__slots__ if k not in ("predictions", "right")}


class _Bar:
    """A progress bar on stderr while something is measured."""

    def __init__(self, metric: Metric) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        self._progress = Progress(*columns, console=console, transient=True, disable=not draws_bars(console))
        self._task = self._progress.add_task(metric, total=None)

    def __enter__(self) -> OnProgress:
        self._progress.start()
        return lambda done, total: self._progress.update(self._task, completed=done, total=total)

    def __exit__(self, *unused: object) -> None:
        self._progress.stop()


_TITLES = {
    "value": "value",
    "n_rows": "rows",
    "n_tokens": "tokens",
    "n_right": "right",
    "nats_per_token": "nats per token",
}


def _show(facts: Mapping[str, Any]) -> None:
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    is_share = facts["metric"] != "perplexity"
    for name, value in facts.items():
        if value is None or name in ("metric", "standard_error"):
            continue
        if name == "value":
            shown = f"{value:.1%} ± {facts['standard_error']:.1%}" if is_share else f"{value:,.4f}"
            table.add_row(f"accuracy ({facts['metric']})" if is_share else "perplexity", shown)
        else:
            table.add_row(_TITLES.get(name, name), _number(value))
    Console().print(table)


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
