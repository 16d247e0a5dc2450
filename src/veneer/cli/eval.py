"""Implementation of ``veneer eval``."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from veneer.adapters.chosen import ModelParts
from veneer.cli import loading
from veneer.cli.arguments import require_file
from veneer.cli.measured import Column, Measured
from veneer.cli.pages.eval import EvalArguments
from veneer.cli.subject import Subject, subjects_of
from veneer.errors import ConfigError, listed
from veneer.evaluate.measurement import Result, measure_each
from veneer.evaluate.metric import METRICS, Answers, Asked, Metric, RegexMatch, TokenPerplexity
from veneer.evaluate.questions import QuestionReader
from veneer.evaluate.scoring import Batching, OnProgress
from veneer.model.adapted.routing import BASE
from veneer.plain.progress import progress_bar, waits_told
from veneer.store.bars import quiet

_OF_ROWS = ("prompt", "answer_field")  # read with every metric
_OPTIONS = (
    *_OF_ROWS,
    *("pattern", "labels", "stop", "ignore_case", "max_new_tokens", "context", "stride", "whole_rows"),
)


def eval_(args: EvalArguments) -> None:
    """Measure the subject of the arguments, and print or write the results."""
    measured = _measured(metric_of(args), args)
    if args.predictions is not None:
        measured.write_predictions(args.predictions)
    typer.echo(json.dumps(measured.facts(), indent=2)) if args.as_json else measured.show()


def metric_of(args: EvalArguments) -> Metric:
    """Return the metric with its options.

    Raises ConfigError for unused or missing options, and for ``predictions`` that cannot be written.
    """
    kind, predictions = METRICS[args.metric], args.predictions
    given = {name: getattr(args, name) for name in _OPTIONS}
    chosen = {key: value for key, value in given.items() if value not in (None, False, [])}
    reads = {field.name for field in fields(kind)}
    foreign = sorted(chosen.keys() - reads - {*_OF_ROWS})
    problems = [f"--{key.replace('_', '-')} is not read by --metric {args.metric}" for key in foreign]
    if kind is RegexMatch and "pattern" not in chosen:
        problems.append("--metric regex needs --pattern")
    if kind is TokenPerplexity and predictions is not None:
        problems.append("--predictions is not read by --metric perplexity")
    if kind is TokenPerplexity and "answer_field" in chosen and "prompt" not in chosen:
        problems.append("--metric perplexity reads --answer-field together with --prompt")
    if problems:
        raise ConfigError(listed(problems))
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
        raise ConfigError(
            f"--labels {file}: the file cannot be read ({error.strerror}). Give a text file with one label a line"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--labels {file} is not text in UTF-8: {error}. Save it as UTF-8") from error


def _measured(metric: Metric, args: EvalArguments) -> Measured:
    subjects = subjects_of(args)
    asked = [_asked(metric, subject, args) for subject in subjects]  # all are checked before one is loaded
    seconds, columns = 0.0, list[Column]()
    for subject, questions in zip(subjects, asked, strict=True):
        with waits_told(f"loading {subject.facts['model']}"):
            parts = subject.load()
        loading.tell_of_device(parts)
        bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        started = time.perf_counter()
        with quiet(), progress_bar(f"{metric.name} of {len(subject.rows):,} rows", *bars) as on_progress:
            results = _results(questions, subject, parts, args.batch_size, on_progress)
        seconds += time.perf_counter() - started
        del parts  # before the next is loaded
        named = zip(subject.names, results, strict=True)
        columns += [Column(name, result, questions, subject.tokenizer) for name, result in named]
    return Measured(metric.name, columns, _facts(subjects), round(seconds, 3))


def _asked(metric: Metric, subject: Subject, args: EvalArguments) -> Asked:
    reader = QuestionReader(
        tokenizer=subject.tokenizer,
        prompt=args.prompt,
        answer_field=args.answer_field,
        chat=args.chat,
        system=args.system,
    )
    return metric.ask(reader, subject.rows, subject.whole)


def _facts(subjects: Sequence[Subject]) -> dict[str, str | None]:
    """The facts of all subjects, each value once."""
    found = {}
    for name in subjects[0].facts:
        values = dict.fromkeys(subject.facts[name] for subject in subjects)
        found[name] = None if None in values else ", ".join(values)
    return found


def _results(
    asked: Asked, subject: Subject, parts: ModelParts, batch_size: int, on_progress: OnProgress
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
