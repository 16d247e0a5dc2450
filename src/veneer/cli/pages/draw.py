"""``veneer draw``: several answers to each prompt of a file, with log-probabilities and rewards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from veneer.cli.arguments import require_file, require_model, require_rows
from veneer.cli.pages import options
from veneer.cli.pages.options import unset
from veneer.cli.work import verb
from veneer.errors import ConfigError
from veneer.store.adapter.folder import require_adapter, require_whole

_Input = Annotated[
    Path,
    unset(
        "FILE", "The rows: prompt or messages; .txt: each line. A field adapter names the row's own.", "--input", "-i"
    ),
]
_Reward = Annotated[
    list[str] | None,
    unset(
        "ENTRY",
        "A reward function, as an entry of a recipe's rewards: exact-match, file.py:function, or "
        "'{function: regex, pattern: \"[0-9]+\", weight: 0.5}'. May be given again.",
        "--reward",
        "-r",
    ),
]


@dataclass(frozen=True, kw_only=True)
class DrawArguments:
    """Draw several answers to each prompt of a file, and reward them; with --keep best, rows to train on.

    Example: veneer draw MODEL -i rows.jsonl -o best.jsonl -r exact-match --keep best
    """

    model: options.Model
    input_: _Input
    output: Annotated[Path, unset("FILE", "The .jsonl to write.", "--output", "-o")]
    n: Annotated[int, typer.Option("--n", metavar="N", min=1, help="Answers to each prompt.")] = 8
    adapter: options.Adapter = None
    reward: _Reward = None
    reward_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="Of one call of a reward function; 0: no limit.")
    ] = 60.0
    reward_on_error: Annotated[
        str, typer.Option(metavar="WHICH", help="If a reward fails: stop, or none (no opinion on that answer).")
    ] = "stop"
    reward_most_failed: Annotated[
        float, typer.Option(metavar="X", min=0, max=1, help="With none: share of failed answers that ends the command.")
    ] = 0.1
    keep: Annotated[
        str, typer.Option(metavar="WHICH", help="all, or best: a row of prompt and completion for each prompt.")
    ] = "all"
    above: Annotated[float | None, unset("X", "Keep answers with a reward above X alone.")] = None
    prompt: Annotated[
        str | None, unset("TEXT", "A template over a row's fields: 'Question: {question}'.", "--prompt", "-p")
    ] = None
    system: options.System = None
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompts as plain text.")] = False
    limit: Annotated[int | None, unset("N", "Only the first so many rows.", min=1)] = None
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Most answers drawn at once.")] = 32
    force: options.Force = False
    max_new_tokens: options.MaxNewTokens = 128
    temperature: Annotated[float, typer.Option(metavar="X", help="Temperature, above 0.")] = 1.0
    top_p: options.TopP = 1.0
    top_k: options.TopK = 0
    seed: options.Seed = None
    load_in_4bit: options.FourBit = False
    dtype: options.Dtype = "auto"

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ConfigError(f"--temperature {self.temperature} must be above 0: answers are drawn")
        if self.keep not in ("all", "best"):
            raise ConfigError(f"--keep {self.keep!r} must be all or best")
        if self.reward_on_error not in ("stop", "none"):
            raise ConfigError(f"--reward-on-error {self.reward_on_error!r} must be stop or none")
        if not self.reward and (self.keep == "best" or self.above is not None):
            raise ConfigError("--keep best and --above compare rewards: add --reward ENTRY")
        self.rewards()
        for path in (self.output, self.unrewarded) if self.reward else (self.output,):
            require_file("--output", path, ".jsonl", replaces=self.force)
            if path.exists() and self.input_.exists() and path.samefile(self.input_):
                raise ConfigError(f"--output {self.output} writes {path}, which is the input: choose another file")
        require_adapter(self.adapter)
        require_rows(self.input_)
        require_model(self.model)
        require_whole(self.adapter)

    @property
    def unrewarded(self) -> Path:
        """Return the file that holds the answers until they are rewarded."""
        return self.output.with_suffix(".drawn.jsonl")

    def rewards(self) -> list[dict[str, Any]]:
        """Return the entries of ``--reward`` in the form of a recipe's ``rewards``. Raises ConfigError for an invalid
        entry.
        """
        found = []
        for given in self.reward or []:
            try:
                entry = yaml.safe_load(given)
            except yaml.YAMLError as error:
                raise ConfigError(f"--reward {given!r} is not an entry of a recipe: correct its YAML") from error
            entry = {"function": entry} if isinstance(entry, str) else entry
            if not isinstance(entry, dict) or not isinstance(entry.get("function"), str):
                raise ConfigError(f"--reward {given!r} names no function: write NAME, or '{{function: NAME, …}}'")
            weight = entry.get("weight", 1.0)
            if not isinstance(weight, int | float) or isinstance(weight, bool):
                raise ConfigError(f"--reward {given!r}: weight {weight!r} must be a number")
            found.append(entry)
        return found


draw = verb(DrawArguments, "veneer.cli.rollouts.draw", "draw")
