"""Implementation of ``veneer eval``."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from veneer.adapters.chosen import ModelParts
from veneer.cli import loading
from veneer.cli.measured import Column, Measured
from veneer.cli.pages.eval import EvalArguments, own_options
from veneer.cli.subject import Subject, subjects_of
from veneer.evaluate.measurement import Result, measure_each
from veneer.evaluate.metric import METRICS, Answers, Asked, Metric
from veneer.evaluate.questions import QuestionReader
from veneer.evaluate.scoring import Batching, OnProgress
from veneer.model.adapted.routing import BASE
from veneer.plain.progress import progress_bar, waits_told
from veneer.store.bars import quiet


def eval_(args: EvalArguments) -> None:
    """Measure the subject of the arguments, and print or write the results."""
    measured = _measured(metric_of(args), args)
    if args.predictions is not None:
        measured.write_predictions(args.predictions)
    typer.echo(json.dumps(measured.facts(), indent=2)) if args.as_json else measured.show()


def metric_of(args: EvalArguments) -> Metric:
    """Return the metric with its options. Raises ConfigError for labels that cannot be read."""
    metric: Metric = METRICS[args.metric](**own_options(args))
    return metric


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
    """Return the facts of all subjects by name. If they differ in a fact, each distinct value is listed once."""
    found = {}
    for name in subjects[0].facts:
        values = dict.fromkeys(subject.facts[name] for subject in subjects)
        found[name] = None if None in values else ", ".join(values)
    return found


def _results(
    asked: Asked, subject: Subject, parts: ModelParts, batch_size: int, on_progress: OnProgress
) -> Sequence[Result]:
    """Return a result for each column of the subject: for each adapter, or for the base if there is none."""
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
