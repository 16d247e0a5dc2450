"""``veneer plan``: memory and time of a run before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from veneer.cli.facts import AsJson
from veneer.cli.pages.options import unset
from veneer.cli.plan_options import ADVICE, FIT, OF_SEVERAL, SERVE, bytes_from, unread, wrong
from veneer.errors import ConfigError, listed
from veneer.plain.progress import LIBRARIES, waits_told
from veneer.plan.planned_tasks import require_planned
from veneer.plan.presets import hub_id_of, require_named
from veneer.plan.start import start_measured
from veneer.recipe.distributed_part import with_accumulation
from veneer.recipe.early import refuse_early
from veneer.recipe.values import apply_override, put, read_values, section
from veneer.store.found import require_found

_What = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|RECIPE",
        show_default=False,
        help="A preset, a folder, a .gguf file, a fetched name, a hub id, or a recipe's file.",
    ),
]
_Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key, as veneer train does.")
]
_Method = Annotated[
    str | None,
    typer.Option(metavar="NAME", show_default="lora", help="As adapter.method; full trains the whole model."),
]
_Rank = Annotated[
    int | None, typer.Option("--rank", "--r", metavar="N", show_default="of LoRA: 8", help="As adapter.r.")
]
_Strategy = Annotated[
    str | None,
    typer.Option(metavar="NAME", show_default="the recipe's", help="Of --processes: auto, ddp, fsdp, hybrid."),
]
_Advice = Annotated[bool, typer.Option("--advice", help="Rank, alpha, targets, rate and batch, with sources.")]
_Tokens = Annotated[
    int | None, typer.Option(metavar="N", show_default="256", help="With --advice: trained tokens of a row.")
]
_Task = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        show_default="instruction",
        help="With --advice: instruction, code, math, classification, pretraining or rl.",
    ),
]
_Time = Annotated[bool, typer.Option("--time/--no-time", help="Seconds too; rates are measured once, and kept.")]


def plan(
    what: _What,
    overrides: _Set = None,
    method: _Method = None,
    rank: _Rank = None,
    targets: Annotated[str | None, unset("NAMES", "As adapter.target_modules, with commas.")] = None,
    quantization: Annotated[str | None, unset("FORMAT", "none, nf4, fp4 or int8.")] = None,
    length: Annotated[int | None, unset("N", "Tokens of a row.")] = None,
    batch: Annotated[int | None, unset("N", "Rows of a micro-batch.")] = None,
    fit: Annotated[str | None, unset("SIZE", "The settings that fit, best first, and a recipe.")] = None,
    write: Annotated[Path | None, unset("FILE", "With --fit: write the best recipe there.")] = None,
    card: Annotated[str | None, unset("NAME", "Time and memory by a GPU's data sheet.")] = None,
    serve: Annotated[bool, typer.Option("--serve", help="How many adapters and tokens fit beside the base.")] = False,
    memory: Annotated[str | None, unset("SIZE", "With --serve; else what is free.")] = None,
    processes: Annotated[int | None, unset("N", "Bytes and traffic of a rank of so many processes.")] = None,
    strategy: _Strategy = None,
    shard: Annotated[int | None, unset("N", "Of --processes: how many share a copy of the base.")] = None,
    bandwidth: Annotated[float | None, unset("GB/S", "Of --processes: what each receives, for seconds.")] = None,
    advice: _Advice = False,
    rows: Annotated[int | None, unset("N", "Rows of the data.")] = None,
    tokens: _Tokens = None,
    task: _Task = None,
    time: _Time = True,
    as_json: AsJson = False,
    png: Annotated[Path | None, unset("FILE", "Draw the plan there.")] = None,
) -> None:
    """Estimate a run before anything is loaded: memory by kind and phase, time, the settings that fit.

    Example: veneer plan llama-3-8b --quantization nf4 --fit 24GB
    """
    given = {
        "--method": method, "--rank": rank, "--targets": targets, "--quantization": quantization, "--length": length,
        "--batch": batch, "--write": write, "--card": card, "--memory": memory, "--processes": processes,
        "--strategy": strategy, "--shard": shard, "--bandwidth": bandwidth, "--rows": rows, "--tokens": tokens,
        "--task": task, "--png": png, "--no-time": None if time else True,
    }  # fmt: skip
    _require_read(what, {FIT: fit is not None, SERVE: serve, ADVICE: advice}, given)
    if write is not None and write.exists():
        raise ConfigError(f"{write} is there already: choose another name, or remove it")
    budget = None if fit is None else bytes_from(fit, "--fit")
    room = None if memory is None else bytes_from(memory, "--memory")
    values = _values(what, overrides or [], method, _changes(given), processes or 1)
    if not serve:
        require_planned(str(values.get("task", "sft")), str(section(values, "adapter").get("method", "lora")))
    source = section(values, "model").get("source")
    if isinstance(source, str) and hub_id_of(source) is None:
        require_found(source)
    elsewhere = card is not None or advice or serve
    begun = nullcontext() if elsewhere else start_measured()  # before torch is imported, which takes as long
    with waits_told(LIBRARIES), begun:
        # Here, as they import torch: a wrong option is refused before.
        from veneer.cli.plan_answers import answer_advice, answer_fit, answer_plan, answer_serve, opened
        from veneer.plan.layout import Ranks

        recipe, config, machine = opened(values, what, card, timed=time)
        missing = recipe.data.missing_files if _is_recipe(what) else ()
        _tell_beside(missing, None if advice or serve else machine.note(recipe.model, config))
        if advice:
            answer_advice(recipe, config, (task or "instruction", rows or 10_000, tokens or 256), as_json)
        elif serve:
            answer_serve(recipe, config, room if room is not None else machine.memory, as_json)
        elif budget is not None:
            answer_fit(recipe, config, budget, machine, write=write, as_json=as_json)
        else:
            ranks = Ranks(processes or 1, bandwidth and bandwidth * 1e9)
            answer_plan(recipe, config, machine, ranks, rows=rows, as_json=as_json, png=png)


def _tell_beside(missing: Iterable[str], note: str | None) -> None:
    """Print to stderr the reasons why rows are missing from the plan's count, and a note on the machine if there is
    one.
    """
    for problem in missing:
        typer.echo(f"rows that are not counted: {problem}", err=True)
    if note is not None:
        typer.echo(note, err=True)


def _require_read(what: str, modes: dict[str, bool], given: dict[str, Any]) -> None:
    """Raise ConfigError for options that would have no effect, and for values that are not allowed."""
    found = unread(modes, given)
    several = (given["--processes"] or 1) > 1 or any(modes.values())
    for option in OF_SEVERAL if not several else ():
        if given[option] is not None:
            found.append(f"{option} {given[option]} applies to several processes: add --processes N")
    if given["--strategy"] is not None and given["--shard"] is not None:
        found.append("--strategy and --shard both say how the base is shared: give one of the two")
    if given["--method"] is not None and _is_recipe(what):
        found.append(
            f"--method {given['--method']}: {what} names its own; use --set adapter.method={given['--method']}"
        )
    found += wrong(given)
    if found:
        raise ConfigError(listed(found))


def _changes(given: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe keys that the options set, with their values."""
    targets = given["--targets"]
    changes = {
        "adapter.r": given["--rank"],
        "adapter.target_modules": targets.split(",") if targets is not None and "," in targets else targets,
        "model.quantization": given["--quantization"],
        "training.max_length": given["--length"],
        "training.per_device_train_batch_size": given["--batch"],
        "distributed.strategy": given["--strategy"],
        "distributed.shard": given["--shard"],
    }
    return {key: value for key, value in changes.items() if value is not None}


def _is_recipe(what: str) -> bool:
    return Path(what).suffix in (".yaml", ".yml")


def _values(
    what: str, overrides: list[str], method: str | None, changes: dict[str, Any], n_processes: int
) -> dict[str, Any]:
    """Return the values of a recipe file, or of a recipe made for a model's name, for training in ``n_processes``."""
    if _is_recipe(what):
        values = read_values(Path(what), overrides)
    else:
        require_named(what)
        values = {
            "model": {"source": what},
            "data": {"train": "your-rows.jsonl"},
            "adapter": {"method": method or "lora"},
            "training": {"max_length": 1024},
            "output": "runs/first",
        }
        for override in overrides:
            apply_override(values, override)
    layout = {"distributed.strategy", "distributed.shard"}
    if layout & changes.keys():
        values["distributed"] = {
            name: value for name, value in section(values, "distributed").items() if f"distributed.{name}" not in layout
        }
    for key, value in changes.items():
        put(values, key, value)
    refuse_early(values, what, overrides, n_processes=n_processes)  # before torch is imported
    return with_accumulation(values, n_processes)
