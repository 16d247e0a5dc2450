"""``veneer plan``: memory and time of a run before anything is loaded."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.facts import AsJson
from veneer.cli.plan_options import ADVICE, FIT, SERVE, bytes_from, unread, wrong
from veneer.core.progress import waiting_for, waits_told
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from veneer.recipe.recipe import Recipe

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
_Rank = Annotated[
    int | None, typer.Option("--rank", "--r", metavar="N", show_default="of LoRA: 8", help="As adapter.r.")
]
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
_Processes = Annotated[
    int | None, typer.Option(metavar="N", show_default=False, help="Bytes a rank of so many processes.")
]
_Strategy = Annotated[str | None, typer.Option(metavar="NAME", show_default="ddp", help="Of --processes: ddp or fsdp.")]
_Advice = Annotated[bool, typer.Option("--advice", help="Rank, alpha, targets, rate and batch, with sources.")]
_Rows = Annotated[int | None, typer.Option(metavar="N", show_default=False, help="Rows of the data.")]
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
    processes: _Processes = None,
    strategy: _Strategy = None,
    advice: _Advice = False,
    rows: _Rows = None,
    tokens: _Tokens = None,
    task: _Task = None,
    time: _Time = True,
    as_json: AsJson = False,
    png: _Png = None,
) -> None:
    """Tell what a run takes before anything is loaded: memory by kind and phase, time, the settings that fit.

    Example: veneer plan llama-3-8b --quantization nf4 --fit 24GB
    """
    given = {
        "--method": method, "--rank": rank, "--targets": targets, "--quantization": quantization, "--length": length,
        "--batch": batch, "--write": write, "--card": card, "--memory": memory, "--processes": processes,
        "--strategy": strategy, "--rows": rows, "--tokens": tokens, "--task": task, "--png": png,
        "--no-time": None if time else True,
    }  # fmt: skip
    _require_read(what, {FIT: fit is not None, SERVE: serve, ADVICE: advice}, given)
    budget = None if fit is None else bytes_from(fit, "--fit")
    room = None if memory is None else bytes_from(memory, "--memory")
    values = _values(what, overrides or [], method, _changes(given))
    from veneer.plan.start import start_measured

    of_a_process = card is None and not advice and not serve
    begun = start_measured() if of_a_process else nullcontext()  # before torch is imported, which takes as long
    with waits_told("loading torch and transformers"), begun:
        from veneer.plan.architecture import config_of
        from veneer.plan.report import Machine
        from veneer.recipe.recipe import parse_recipe

        recipe = parse_recipe(values, what)
        waiting_for(f"reading the config of {recipe.model.source}")
        config = config_of(recipe.model.source)
        waiting_for("planning")
        machine = Machine.of(card, timed=time)
        for missing in recipe.data.missing_files if _is_recipe(what) else ():
            typer.echo(f"rows that are not counted: {missing}", err=True)
        if advice:
            _advise(recipe, config, (task or "instruction", rows or 10_000, tokens or 256), as_json)
        elif serve:
            _serve(recipe, config, room if room is not None else machine.memory, as_json)
        elif budget is not None:
            _fit(recipe, config, budget, machine, write=write, as_json=as_json)
        else:
            _plan(recipe, config, machine, (processes or 1, strategy or "ddp"), rows=rows, as_json=as_json, png=png)


def _require_read(what: str, modes: dict[str, bool], given: dict[str, Any]) -> None:
    """Raise ConfigError for options that nothing would read, and for values that they cannot have."""
    found = unread(modes, given)
    if given["--strategy"] is not None and (given["--processes"] or 1) < 2 and not any(modes.values()):
        found.append(f"--strategy {given['--strategy']} is of several processes: add --processes N")
    if given["--method"] is not None and _is_recipe(what):
        found.append(
            f"--method {given['--method']}: {what} names its own; use --set adapter.method={given['--method']}"
        )
    found += wrong(given)
    if found:
        raise ConfigError("; ".join(found))


def _changes(given: dict[str, Any]) -> dict[str, Any]:
    """Keys of a recipe and their values, from the options that are given for them."""
    targets = given["--targets"]
    changes = {
        "adapter.r": given["--rank"],
        "adapter.target_modules": targets.split(",") if targets is not None and "," in targets else targets,
        "model.quantization": given["--quantization"],
        "training.max_length": given["--length"],
        "training.per_device_train_batch_size": given["--batch"],
    }
    return {key: value for key, value in changes.items() if value is not None}


def _is_recipe(what: str) -> bool:
    return Path(what).suffix in (".yaml", ".yml")


def _values(what: str, overrides: list[str], method: str | None, changes: dict[str, Any]) -> dict[str, Any]:
    """The values of a recipe's file, or of a recipe made for a model's name."""
    from veneer.plan.presets import require_named
    from veneer.recipe.recipe import apply_override, put, read_values, refuse_early

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
    for key, value in changes.items():
        put(values, key, value)
    refuse_early(values, what)  # before torch is imported
    return values


def _plan(
    recipe: Recipe,
    config: PreTrainedConfig,
    machine: Any,
    ranks: tuple[int, str],
    *,
    rows: int | None,
    as_json: bool,
    png: Path | None,
) -> None:
    from veneer.plan.plan import as_json as plain
    from veneer.plan.plan import plan_recipe
    from veneer.plan.processes import rank_peak
    from veneer.plan.report import draw, shown

    _tell_measuring(machine)
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
    recipe: Recipe, config: PreTrainedConfig, budget: int, machine: Any, *, write: Path | None, as_json: bool
) -> None:
    from veneer.plan.fit import changed, fits, loadable
    from veneer.plan.report import as_yaml, fit_table

    if write is not None and write.exists():
        raise ConfigError(f"{write} is there already: choose another name, or remove it")
    _tell_measuring(machine)
    found = fits(recipe, config, budget, machine.bytes_of, machine.cost)
    best = as_yaml(loadable(changed(recipe, found[0].changes)))
    if write is not None:
        write.write_text(best, encoding="utf-8")
    if as_json:
        settings = [
            {"changes": dict(f.changes), "bytes": f.n_bytes, "seconds_a_token": f.seconds_a_token} for f in found
        ]
        typer.echo(
            json.dumps({"budget": budget, "source": machine.told, "settings": settings, "recipe": best}, indent=2)
        )
        return
    _console().print(fit_table(found, budget, machine))
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
        f"base {size(found.base)} of {size(memory)}; {size(found.reserve)} left free, as the engine leaves them;\n"
        f"{size(found.room)} for keys, values and adapters\n"
        f"{found.tokens(0):,} tokens, or {found.adapters(0):,} adapters ({size(found.adapter)} each),\n"
        f"or on the line between: {half:,} adapters and {found.tokens(half):,} tokens"
    )


def _advise(recipe: Recipe, config: PreTrainedConfig, given: tuple[str, int, int], as_json: bool) -> None:
    """``given``: task, rows, and trained tokens of a row."""
    from dataclasses import asdict

    from rich.padding import Padding
    from rich.text import Text

    from veneer.plan.advice import advise, as_advised
    from veneer.plan.plan import count_trained

    found = advise(*given, count_trained(as_advised(recipe, 1), config))
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in found], indent=2))
        return
    console = _console()
    for each in found:
        console.print(f"{each.key}: {each.value}  ({each.confidence})", markup=False)
        console.print(Padding(Text(f"{each.reason} [{each.source}]"), (0, 0, 0, 4)))


def _tell_measuring(machine: Any) -> None:
    from rich.console import Console

    from veneer.plan.report import MEASURING

    if machine.measures:
        Console(stderr=True, highlight=False).print(MEASURING, style="dim")


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False)
