"""Implementation of ``veneer draw``."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

import typer

from veneer.answer.answerer import Drawing
from veneer.answer.engine import engine_answerer
from veneer.answer.files import PromptRow, read_asked
from veneer.answer.prompts import PromptRows
from veneer.cli import loading
from veneer.cli.pages.draw import DrawArguments
from veneer.disk.atomic import write_atomically
from veneer.errors import ConfigError
from veneer.learn.drawn_rows import RowRewards, draw_rows, kept_rows, rewarded
from veneer.learn.journal import Line
from veneer.learn.rewards import RewardError, RewardLimits
from veneer.plain.progress import progress_bar, waits_told
from veneer.plain.units import count
from veneer.store.bars import quiet


def draw(args: DrawArguments) -> None:
    """Generate several answers to each prompt of a file, and write them into another file. Raises ConfigError if
    veneer's engine cannot run the model.

    If a reward fails, the answers stay, without rewards, in a file beside the output. RewardError names that file.
    """
    on_error = cast(Literal["stop", "none"], args.reward_on_error)
    limits = RewardLimits(args.reward_timeout or None, on_error, args.reward_most_failed)
    rewards = RowRewards.of(args.rewards(), limits)
    reader = PromptRows(prompt=args.prompt, system=args.system, raw=args.raw)
    chosen, asked = read_asked(
        args.input_, args.model, args.adapter, reader, args.limit, four_bit=args.load_in_4bit, dtype=args.dtype
    )
    parts = loading.loaded(loading.told(chosen))
    drawing = Drawing(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k)
    with waits_told("packing the weights"), quiet():
        answerer = engine_answerer(parts, drawing, args.batch_size)
    if isinstance(answerer, str):
        raise ConfigError(f"the engine cannot draw: {answerer}")
    seed = secrets.randbits(63) if args.seed is None else args.seed
    with quiet(), progress_bar("drawing") as on_progress:
        groups = draw_rows(answerer, asked, reader, args.n, args.max_new_tokens, seed, on_progress)
    if rewards.functions:
        groups = _rewarded(args.unrewarded, asked, groups, rewards)
    rows = kept_rows(groups, best=args.keep == "best", above=args.above)
    _write(args.output, rows)
    told = [line["reward"] for lines in groups for line in lines if line.get("reward") is not None]
    mean = f", reward {sum(told) / len(told):.3g} in the mean" if told else ""
    typer.echo(f"{args.output}: {count(len(rows), 'row')} of {count(args.n * len(groups), 'answer')}{mean}")


def _rewarded(
    kept: Path, asked: Sequence[PromptRow], groups: Sequence[Sequence[Line]], rewards: RowRewards
) -> list[list[Line]]:
    """Return the answers with their rewards. The file ``kept`` holds the answers until the rewards are computed.

    If that fails, the message of RewardError or of Ctrl-C names the file.
    """
    _write(kept, [line for lines in groups for line in lines])
    try:
        found = rewarded(asked, groups, rewards)
    except RewardError as error:
        raise RewardError(f"{error}. All answers are in {kept}, without rewards") from error
    except KeyboardInterrupt as error:
        error.args = (f"all answers are in {kept}, without rewards",)
        raise
    kept.unlink()
    return found


def _write(path: Path, rows: Sequence[Line]) -> None:
    content = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    write_atomically(path, content.encode())
