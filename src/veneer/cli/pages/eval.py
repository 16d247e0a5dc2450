"""``veneer eval``: the quality of a model on data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer

from veneer.cli.arguments import require_file, require_model, require_rows
from veneer.cli.facts import AsJson
from veneer.cli.pages import options
from veneer.cli.pages.options import unset
from veneer.cli.work import verb
from veneer.data.asked_rows import pattern_of_answers, require_askable
from veneer.data.reader import RowReader
from veneer.data.windows import Windows
from veneer.errors import ConfigError, listed
from veneer.store.adapter.folder import require_adapter, require_whole
from veneer.train.record.record import require_recipe


def _unescaped(text: str) -> str:
    r"""Turn ``\n`` in a prompt or a stop text into a line break: a shell passes it on as two characters."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


class MetricName(StrEnum):
    """Name of a metric."""

    PERPLEXITY = "perplexity"
    EXACT_MATCH = "exact-match"
    REGEX = "regex"
    LABELS = "labels"


_OF_ROWS = ("prompt", "answer_field")  # read with every metric
_OF_ANSWERS = ("ignore_case", "max_new_tokens", "stop")
READ: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "perplexity": ("context", "stride", "whole_rows"),
        "exact-match": _OF_ANSWERS,
        "regex": (*_OF_ANSWERS, "pattern"),
        "labels": ("labels",),
    }
)
"""Options of each metric, by the names of its fields."""

_Recipe = Annotated[
    list[Path] | None,
    unset(
        "RUN",
        "In place of MODEL: what a recipe's file or a run's folder trained, on its held-out rows (or on --data, read "
        "as it reads). Again: another run beside it.",
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
        require_options(self)
        require_rows(self.data)
        for recipe in self.recipes:
            require_recipe(recipe)
        if self.recipes:
            return  # model and adapters do not go with them
        for adapter in self.adapters:
            require_adapter(adapter)
        require_model(self.model)
        require_whole(*self.adapters)
        require_own_rows(self)


def own_options(args: EvalArguments) -> dict[str, Any]:
    """Return the options of the metric that are given. Raises ConfigError for labels that cannot be read."""
    own = {name: value for name, value in _given(args).items() if name in READ[args.metric]}
    own |= {"labels": _words(own["labels"])} if "labels" in own else {}
    return own | ({"stop": tuple(own["stop"])} if "stop" in own else {})


def require_options(args: EvalArguments) -> None:
    """Raise ConfigError for unused or missing options, and for ``predictions`` that cannot be written."""
    given, own = _given(args), READ[args.metric]
    foreign = sorted(given.keys() - {*own, *_OF_ROWS})
    problems = [f"--{key.replace('_', '-')} is not read by --metric {args.metric}" for key in foreign]
    if "pattern" in own and "pattern" not in given:
        problems.append("--metric regex needs --pattern")
    if args.metric == "perplexity" and args.predictions is not None:
        problems.append("--predictions is not read by --metric perplexity")
    if args.metric == "perplexity" and "answer_field" in given and "prompt" not in given:
        problems.append("--metric perplexity reads --answer-field together with --prompt")
    if problems:
        raise ConfigError(listed(problems))
    _require_subject(args)
    own_options(args)
    if args.predictions is not None:
        require_file("--predictions", args.predictions)
    if args.pattern is not None:
        pattern_of_answers(args.pattern)
    Windows.within(None, args.context, args.stride)


def require_own_rows(args: EvalArguments) -> None:
    """Check the first rows of ``--data``, unless a recipe says how they are read. Raises the errors of
    `require_askable`.
    """
    if args.data is not None and not args.recipes:
        judged = args.metric != MetricName.PERPLEXITY
        require_askable(args.data, reader_of(args), args.prompt, args.answer_field, judged=judged)


def reader_of(args: EvalArguments) -> RowReader:
    """Return the reader of rows that are in a training format (chat, or prompt and completion). Raises ConfigError for
    ``--system`` without a chat.
    """
    if args.prompt is not None and args.system is not None and not args.chat:
        raise ConfigError("--system belongs to a chat, and --prompt makes plain text of each row: add --chat")
    beside = [option for option, value in (("--chat", args.chat), ("--system", args.system)) if value]
    advice = "--prompt 'Question: {question}' and --answer-field answer"
    advice += f", in place of {' and '.join(beside)}" if beside else ""
    return RowReader(chat=args.chat, system=args.system, advice=advice)


def _require_subject(args: EvalArguments) -> None:
    """Raise ConfigError unless the options name what to measure: MODEL and ``--data``, or ``--recipe``.

    Repeated adapters or recipes, and options that a recipe already sets, are errors too.
    """
    for option, given in (("--adapter", args.adapters), ("--recipe", args.recipes)):
        twice = [each for each, n in Counter(given).items() if n > 1]
        if twice:
            raise ConfigError(
                f"{option} {twice[0]} is given twice, and a run does not differ from itself: leave one out"
            )
    if not args.recipes and (args.model is None or args.data is None):
        raise ConfigError("say what to measure: MODEL and --data FILE, or --recipe FILE for what a recipe trained")
    beside = _said_by_recipes(args) if args.recipes else []
    if beside:
        raise ConfigError(f"--recipe says it already, so leave out {', '.join(beside)}")


def _said_by_recipes(args: EvalArguments) -> list[str]:
    """Return the given options that a recipe already settles."""
    given: dict[str, object] = {"MODEL": args.model, "--adapter": args.adapters, "--system": args.system}
    given |= {"--prompt": args.prompt, "--answer-field": args.answer_field}
    given |= {"--chat": args.chat, "--load-in-4bit": args.load_in_4bit, "--dtype": args.dtype != "auto"}
    return [name for name, value in given.items() if value]


def _words(labels: str) -> tuple[str, ...]:
    """Split ``--labels`` into words: at commas, or by the lines of a file."""
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


def _given(args: EvalArguments) -> dict[str, Any]:
    names = dict.fromkeys([*_OF_ROWS, *(name for own in READ.values() for name in own)])
    values = {name: getattr(args, name) for name in names}
    return {name: value for name, value in values.items() if value not in (None, False, [])}


eval_ = verb(EvalArguments, "veneer.cli.eval", "eval_")
