"""Implementation of ``veneer eval``."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from veneer.adapters.chosen import Parts
from veneer.cli import loading
from veneer.cli.arguments import require_file
from veneer.cli.measured import Measured
from veneer.cli.subject import Named, Subject, subject_of
from veneer.core.progress import progress_bar
from veneer.errors import ConfigError
from veneer.evaluate.measurement import Result, measure_each
from veneer.evaluate.metric import METRICS, Answers, Asked, Metric, RegexMatch, TokenPerplexity
from veneer.evaluate.questions import QuestionReader
from veneer.evaluate.scoring import Batching, OnProgress
from veneer.model.routing import BASE
from veneer.store.bars import quiet

_OF_ROWS = {"prompt", "answer_field"}  # read with every metric


def eval_(
    *,
    metric: str,
    model: str | None,
    data: Path | None,
    recipe: Path | None,
    adapter: list[Path] | None,
    with_base: bool,
    pattern: str | None,
    labels: str | None,
    prompt: str | None,
    answer_field: str | None,
    ignore_case: bool,
    max_new_tokens: int | None,
    stop: list[str] | None,
    context: int | None,
    stride: int | None,
    chat: bool,
    system: str | None,
    whole_rows: bool,
    limit: int | None,
    batch_size: int,
    predictions: Path | None,
    load_in_4bit: bool,
    dtype: str,
    as_json: bool,
) -> None:
    """Measure the subject of the arguments, and print or write the results."""
    given = {
        "pattern": pattern, "labels": labels, "prompt": prompt, "answer_field": answer_field, "stop": stop or None,
        "ignore_case": ignore_case, "max_new_tokens": max_new_tokens, "context": context, "stride": stride,
        "whole_rows": whole_rows,
    }  # fmt: skip
    settings = metric_of(metric, given, predictions)
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
    measured = _measured(settings, named, batch_size)
    if predictions is not None:
        measured.write_predictions(predictions)
    typer.echo(json.dumps(measured.facts(), indent=2)) if as_json else measured.show()


def metric_of(name: str, given: Mapping[str, Any], predictions: Path | None) -> Metric:
    """Return the metric with the options ``given`` (None or False: not given).

    Raises ConfigError for unused or missing options, and for ``predictions`` that cannot be written.
    """
    kind, chosen = METRICS[name], {key: value for key, value in given.items() if value not in (None, False)}
    reads = {field.name for field in fields(kind)}
    foreign = sorted(chosen.keys() - reads - _OF_ROWS)
    problems = [f"--{key.replace('_', '-')} is not read by --metric {name}" for key in foreign]
    if kind is RegexMatch and "pattern" not in chosen:
        problems.append("--metric regex needs --pattern")
    if kind is TokenPerplexity and predictions is not None:
        problems.append("--predictions is not read by --metric perplexity")
    if kind is TokenPerplexity and "answer_field" in chosen and "prompt" not in chosen:
        problems.append("--metric perplexity reads --answer-field together with --prompt")
    if problems:
        raise ConfigError("; ".join(problems))
    if predictions is not None:
        require_file("--predictions", predictions)
    own = {key: value for key, value in chosen.items() if key in reads}
    own |= {"labels": _words(chosen["labels"])} if "labels" in own else {}
    own |= {"stop": tuple(chosen["stop"])} if "stop" in own else {}
    metric: Metric = kind(**own)
    return metric


def _words(labels: str) -> tuple[str, ...]:
    """The words of ``--labels``: with commas between them, or the lines of a file."""
    file = Path(labels)
    if not file.is_file() and (file.suffix != ".txt" or "," in labels):
        return tuple(labels.split(","))
    try:
        return tuple(line for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except OSError as error:
        raise ConfigError(f"--labels {file}: the file cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--labels {file} is not text in UTF-8: {error}") from error


def _measured(metric: Metric, named: Named, batch_size: int) -> Measured:
    subject = subject_of(named)
    reader = QuestionReader(tokenizer=subject.tokenizer, prompt=named.prompt, answer_field=named.answer_field)
    asked = metric.ask(reader, subject.rows, subject.whole)
    parts = subject.load()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    started = time.perf_counter()
    with quiet(), progress_bar(metric.name, *columns) as on_progress:
        results = _results(asked, subject, parts, batch_size, on_progress)
    return Measured(metric.name, subject, asked, results, round(time.perf_counter() - started, 3))


def _results(
    asked: Asked, subject: Subject, parts: Parts, batch_size: int, on_progress: OnProgress
) -> Sequence[Result]:
    """A result for each column of the subject: an adapter, or the base without one."""
    columns = subject.columns
    if not isinstance(asked, Answers):
        loaded, batching = loading.joined(parts), Batching(n_rows=batch_size)
        names = [BASE if folder is None else loaded.names[folder] for folder in columns] if loaded.names else []
        return measure_each(
            loaded.model, asked, names, tokenizer=loaded.tokenizer, batching=batching, on_progress=on_progress
        )
    answerer, n = loading.answerer_of(parts, n_rows=batch_size), len(asked.questions)
    prompts = [question.prompt for question in asked.questions] * len(columns)
    folders = [folder for folder in columns for _ in range(n)] if subject.adapters else []
    answers = answerer.answers(prompts, asked.answering, on_progress, folders)
    return [asked.judged(answers[i * n : (i + 1) * n]) for i in range(len(columns))]
