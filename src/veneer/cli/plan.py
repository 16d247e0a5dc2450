"""``veneer plan``: memory and time of a run before anything is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.facts import AsJson
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from veneer.train.recipe.recipe import Recipe

_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def bytes_from(text: str, option: str) -> int:
    """``24GB``, ``80GiB``, ``500 MB`` as bytes. Raises ConfigError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = None if match is None else _UNITS.get(match[2].upper())
    if match is None or unit is None or float(match[1]) <= 0:
        raise ConfigError(f"{option} {text!r} is no size: write a number above 0 with MB, GB, MiB or GiB, such as 24GB")
    return int(float(match[1]) * unit)


_What = Annotated[
    str,
    typer.Argument(metavar="MODEL|RECIPE", show_default=False, help="A preset, a folder, a name, or a recipe's file."),
]
_Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key, as veneer train does.")
]
_Method = Annotated[
    str | None,
    typer.Option(metavar="NAME", show_default="lora", help="As adapter.method; full trains the whole model."),
]
_Rank = Annotated[int | None, typer.Option("--rank", "--r", metavar="N", show_default=False, help="As adapter.r.")]
_Targets = Annotated[
    str | None, typer.Option(metavar="NAMES", show_default=False, help="As adapter.target_modules, with commas.")
]
_Quantization = Annotated[
    str | None, typer.Option(metavar="FORMAT", show_default=False, help="none, nf4, fp4 or int8.")
]
_Length = Annotated[int | None, typer.Option(metavar="N", show_default=False, help="Tokens of a row.")]
_Batch = Annotated[int | None, typer.Option(metavar="N", show_default=False, help="Rows of a micro-batch.")]
_Fit = Annotated[
    str | None,
    typer.Option(metavar="SIZE", show_default=False, help="The settings that fit, best first, and a recipe."),
]
_Write = Annotated[
    Path | None, typer.Option(metavar="FILE", show_default=False, help="With --fit: write the best recipe there.")
]
_Card = Annotated[
    str | None, typer.Option(metavar="NAME", show_default=False, help="Time and memory by a GPU's data sheet.")
]
_Serve = Annotated[bool, typer.Option("--serve", help="How many adapters and tokens fit beside the base.")]
_Memory = Annotated[
    str | None, typer.Option(metavar="SIZE", show_default=False, help="With --serve; else what is free.")
]
_Processes = Annotated[int, typer.Option(metavar="N", help="Bytes a rank of so many processes.")]
_Strategy = Annotated[str, typer.Option(metavar="NAME", help="Of several processes: ddp or fsdp.")]
_Advice = Annotated[bool, typer.Option("--advice", help="Rank, alpha, targets, rate and batch, with sources.")]
_Rows = Annotated[int | None, typer.Option(metavar="N", show_default=False, help="Rows of the data.")]
_Tokens = Annotated[int, typer.Option(metavar="N", help="Trained tokens of a row, for --advice.")]
_Task = Annotated[str, typer.Option(metavar="NAME", help="instruction, code, math, classification, pretraining or rl.")]
_Png = Annotated[Path | None, typer.Option(metavar="FILE", show_default=False, help="Draw the plan there.")]
_Time = Annotated[bool, typer.Option("--time/--no-time", help="Seconds too; rates are measured once and kept.")]


def plan(
    what: _What,
    overrides: _Set = None,
    method: _Method = None,
    rank: _Rank = None,
    targets: _Targets = None,
    quantization: _Quantization = None,
    length: _Length = None,
    batch: _Batch = None,
    fit: _Fit = None,
    write: _Write = None,
    card: _Card = None,
    serve: _Serve = False,
    memory: _Memory = None,
    processes: _Processes = 1,
    strategy: _Strategy = "ddp",
    advice: _Advice = False,
    rows: _Rows = None,
    tokens: _Tokens = 256,
    task: _Task = "instruction",
    time: _Time = True,
    as_json: AsJson = False,
    png: _Png = None,
) -> None:
    """Tell what a run takes before anything is loaded: memory by kind and phase, time, the settings that fit.

    Example: veneer plan llama-3-8b --quantization nf4 --fit 24GB
    """
    modes = {"--fit": fit is not None, "--serve": serve, "--advice": advice}
    given = {"--write": write is not None, "--memory": memory is not None, "--png": png is not None}
    _require_read(what, method, rows, modes, given | {"--processes": processes > 1})
    budget = None if fit is None else bytes_from(fit, "--fit")
    room = None if memory is None else bytes_from(memory, "--memory")
    changes = {
        "adapter.r": rank,
        "adapter.target_modules": None if targets is None else targets.split(",") if "," in targets else targets,
        "model.quantization": quantization,
        "training.max_length": length,
        "training.per_device_train_batch_size": batch,
    }
    recipe = _recipe(what, overrides or [], method, {k: v for k, v in changes.items() if v is not None})
    from veneer.plan.architecture import config_of
    from veneer.plan.report import Machine

    config = config_of(recipe.model.source)
    machine = Machine.of(card, timed=time)
    if advice:
        _advise(recipe, config, task, rows or 10_000, tokens, as_json)
    elif serve:
        _serve(recipe, config, room if room is not None else machine.memory, as_json)
    elif budget is not None:
        _fit(recipe, config, budget, machine, write, as_json)
    else:
        _plan(recipe, config, machine, (processes, strategy), rows, as_json, png)


def _require_read(
    what: str, method: str | None, rows: int | None, modes: dict[str, bool], given: dict[str, bool]
) -> None:
    """Raise ConfigError for options that nothing would read."""
    chosen = [name for name, asked in modes.items() if asked]
    found = []
    if len(chosen) > 1:
        found.append(f"{' and '.join(chosen)} answer questions of their own: give one of them")
    for option, mode in (("--write", "--fit"), ("--memory", "--serve")):
        if given[option] and not modes[mode]:
            found.append(f"{option} is read by {mode} alone: add {mode}, or leave it out")
    found += [
        f"{option} is not read by {chosen[0]}: leave it out"
        for option in ("--png", "--processes")
        if chosen and given[option]
    ]
    if method is not None and _is_recipe(what):
        found.append(f"--method {method}: {what} names its own; use --set adapter.method={method}")
    if rows is not None and rows < 1:
        found.append(f"--rows {rows} must be at least 1")
    if found:
        raise ConfigError("; ".join(found))


def _is_recipe(what: str) -> bool:
    return Path(what).suffix in (".yaml", ".yml")


def _recipe(what: str, overrides: list[str], method: str | None, changes: dict[str, Any]) -> Recipe:
    """The recipe of a file, or one made for a model's name."""
    from veneer.train.recipe.recipe import parse_recipe, put, read_values

    if _is_recipe(what):
        values = read_values(Path(what), overrides)
    else:
        values = {
            "model": {"source": what},
            "data": {"train": "train.jsonl"},
            "adapter": {"method": method or "lora"},
            "training": {"max_length": 1024},
            "output": "runs/first",
        }
        from veneer.train.recipe.recipe import apply_override

        for override in overrides:
            apply_override(values, override)
    for key, value in changes.items():
        put(values, key, value)
    return parse_recipe(values, what)


def _plan(
    recipe: Recipe,
    config: PreTrainedConfig,
    machine: Any,
    ranks: tuple[int, str],
    rows: int | None,
    as_json: bool,
    png: Path | None,
) -> None:
    from veneer.plan.plan import as_json as plain
    from veneer.plan.plan import plan_recipe
    from veneer.plan.processes import rank_peak
    from veneer.plan.report import draw, shown

    plan = plan_recipe(recipe, config=config, isa=machine.isa)
    facts = plain(plan) | machine.facts(plan, rows)
    if ranks[0] != 1:
        peak = rank_peak(plan, *ranks)
        facts["rank"] = {"processes": ranks[0], "strategy": ranks[1], "bytes": peak.n_bytes, "kinds": dict(peak.kinds)}
    if png is not None:
        draw(plan, png)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    _console().print(shown(plan, facts))


def _fit(
    recipe: Recipe, config: PreTrainedConfig, budget: int, machine: Any, write: Path | None, as_json: bool
) -> None:
    from veneer.plan.fit import changed, fits
    from veneer.plan.report import as_yaml, fit_table

    found = fits(recipe, config, budget, machine.bytes_of, machine.cost)
    best = as_yaml(changed(recipe, found[0].changes))
    if write is not None:
        if write.exists():
            raise ConfigError(f"{write} is there already: choose another name, or remove it")
        write.write_text(best, encoding="utf-8")
    if as_json:
        settings = [
            {"changes": dict(f.changes), "bytes": f.n_bytes, "seconds_a_token": f.seconds_a_token} for f in found
        ]
        typer.echo(json.dumps({"budget": budget, "settings": settings, "recipe": best}, indent=2))
        return
    _console().print(fit_table(found, budget))
    typer.echo(best if write is None else f"written: {write}")


def _serve(recipe: Recipe, config: PreTrainedConfig, memory: int, as_json: bool) -> None:
    from dataclasses import asdict

    from veneer.core.units import size
    from veneer.plan.plan import count_trained
    from veneer.plan.serving import serving_of

    adapter = recipe.adapter_config()
    if adapter is None:
        raise ConfigError("--serve counts adapters beside a base, and method full has none: choose another method")
    found = serving_of(config, recipe.model, adapter, memory, count_trained(recipe, config))
    facts = {**asdict(found), "memory": memory, "adapters": found.adapters(0), "tokens": found.tokens(0)}
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    half = found.adapters(0) // 2
    typer.echo(
        f"base {size(found.base)} of {size(memory)}; {size(found.room)} for keys, values and adapters\n"
        f"{found.tokens(0):,} tokens, or {found.adapters(0):,} adapters ({size(found.adapter)} each), or on the line "
        f"between: {half:,} adapters and {found.tokens(half):,} tokens"
    )


def _advise(recipe: Recipe, config: PreTrainedConfig, task: str, rows: int, tokens: int, as_json: bool) -> None:
    from dataclasses import asdict

    from rich.table import Table

    from veneer.plan.advice import advise
    from veneer.plan.fit import changed
    from veneer.plan.plan import count_trained

    one = changed(recipe, {"adapter.r": 1}) if recipe.method in ("lora", "dora", "rslora") else recipe
    found = advise(task, rows, tokens, count_trained(one, config))
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in found], indent=2))
        return
    table = Table("setting", "value", "sure", "why, and who says so", box=None, padding=(0, 2))
    for each in found:
        table.add_row(each.key, str(each.value), each.confidence, f"{each.reason} [{each.source}]".replace("[", "\\["))
    _console().print(table)


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False)
