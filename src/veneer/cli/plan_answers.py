"""Answers of ``veneer plan``: printed, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text
from transformers import PreTrainedConfig

from veneer.errors import ConfigError, UnmeasuredError
from veneer.plain.progress import waiting_for, waiting_over
from veneer.plain.units import count, size
from veneer.plan.advice import ADVISED, advise
from veneer.plan.architecture import config_of
from veneer.plan.fit import fits, loadable
from veneer.plan.layout import Ranks, rank_facts, told_ranks
from veneer.plan.plan import as_json as as_plain
from veneer.plan.plan import batch_of, count_trained, left_out_experts, plan_recipe
from veneer.plan.processes import copy_sizes
from veneer.plan.report import MEASURING, Machine, as_yaml, changes_line, draw, fit_table, own_values, shown
from veneer.plan.rows import filled
from veneer.plan.serving import Serving, serving_of
from veneer.recipe.recipe import Recipe, changed, parse_recipe


def opened(
    values: Mapping[str, Any], name: str, card: str | None, *, timed: bool
) -> tuple[Recipe, PreTrainedConfig, Machine]:
    """Return the recipe of these values, the config of its base and the machine to plan for."""
    recipe = parse_recipe(values, name)
    waiting_for(f"reading the config of {recipe.model.source}")
    config = config_of(recipe.model.source)
    waiting_for("planning")
    return recipe, config, Machine.of(card, timed=timed)


def answer_plan(
    recipe: Recipe,
    config: PreTrainedConfig,
    machine: Machine,
    ranks: Ranks,
    *,
    rows: int | None,
    as_json: bool,
    png: Path | None,
) -> None:
    """Print the plan of a run. Raises ConfigError for a strategy whose bytes depend on the machines."""
    several = ranks.n_processes > 1
    if several:
        copy_sizes(recipe.distributed, ranks.n_processes)  # refused before anything is measured
    _tell_measuring(machine)
    batch = filled(batch_of(recipe, config), recipe)
    plan = plan_recipe(recipe, config=config, batch=batch, isa=machine.isa, n_processes=ranks.n_processes)
    facts = as_plain(plan) | machine.facts(plan, rows)
    if several:
        facts["rank"] = rank_facts(plan, machine, ranks, facts.get("time", {}).get("seconds_a_step"))
    if png is not None:
        draw(plan, png)
    waiting_over()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    _console().print(shown(plan, facts))
    for line in told_ranks(facts["rank"]) if several else ():
        typer.echo(line)


def answer_fit(
    recipe: Recipe, config: PreTrainedConfig, budget: int, machine: Machine, *, write: Path | None, as_json: bool
) -> None:
    """Print the settings that fit a budget of bytes, and write the best recipe to ``write``, if given. Raises
    ConfigError if no settings fit.
    """
    _tell_measuring(machine)
    try:
        found = fits(recipe, config, budget, machine.bytes_of, machine.cost, isa=machine.isa)
    except UnmeasuredError as error:
        Console(stderr=True, highlight=False).print(f"no seconds: {error}", style="dim", soft_wrap=True)
        machine = replace(machine, timed=False)
        found = fits(recipe, config, budget, machine.bytes_of, machine.cost, isa=machine.isa)
    best = as_yaml(loadable(changed(recipe, found[0].changes)))
    if write is not None:
        write.write_text(best, encoding="utf-8")
    waiting_over()
    if as_json:
        settings = [
            {"changes": dict(f.changes), "bytes": f.n_bytes, "seconds_a_token": f.seconds_a_token} for f in found
        ]
        typer.echo(
            json.dumps({"budget": budget, "source": machine.told, "settings": settings, "recipe": best}, indent=2)
        )
        return
    own = own_values(recipe, found)
    _console().print(fit_table(own, found, budget, machine))
    typer.echo(changes_line(own, found[0]))
    typer.echo(best if write is None else f"written: {write}")


def answer_serve(recipe: Recipe, config: PreTrainedConfig, memory: int, as_json: bool) -> None:
    """Print how many adapters and tokens fit in memory with the base. Raises ConfigError for a run without
    an adapter.
    """
    adapter = recipe.adapter_config()
    if adapter is None:
        raise ConfigError("--serve counts adapters beside a base, and method full has none: choose another method")
    found = serving_of(config, recipe.model, adapter, memory, count_trained(recipe.model, recipe.adapter, config))
    facts = {**asdict(found), "memory": memory, "adapters": found.adapters(0), "tokens": found.tokens(0)}
    waiting_over()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    typer.echo(
        f"base {size(found.base)} of {size(memory)}; {size(found.reserve)} left free, as the engine leaves them;\n"
        f"{size(found.room)} for keys, values and adapters\n" + _told_room(found)
    )


def _told_room(found: Serving) -> str:
    """Print how many tokens or sequences, and how many adapters, fit into memory."""
    n_adapters = found.adapters(0)
    adapters = f"{n_adapters:,} adapters ({size(found.adapter)} each)"
    if found.sequence:
        a_token = found.page // found.block
        return (
            f"a sequence takes {size(found.sequence)} and {size(a_token)} a token: {found.sequences(2048):,} sequences "
            f"of 2,048 tokens,\nor {adapters}"
        )
    half = n_adapters // 2
    return (
        f"{found.tokens(0):,} tokens, or {adapters},\n"
        f"or on the line between: {half:,} adapters and {found.tokens(half):,} tokens"
    )


def answer_advice(recipe: Recipe, config: PreTrainedConfig, given: tuple[str, int, int], as_json: bool) -> None:
    """Print the advised settings and their memory. ``given``: task, rows, and trained tokens of a row."""
    advised = changed(recipe, {"adapter": ADVISED})
    whose = advised.model, advised.adapter, config
    found = advise(*given, count_trained(*whose), left_out_experts(*whose))
    waiting_over()
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in found], indent=2))
        return
    console = _console()
    for each in found:
        console.print(f"{each.key}: {each.value}  ({each.confidence})", markup=False)
        console.print(Padding(Text(f"{each.reason} [{each.source}]"), (0, 0, 0, 4)))
    planned = plan_recipe(changed(advised, {each.key: each.value for each in found}), config=config)
    console.print(
        f"memory: {size(planned.peak.n_bytes)} at the peak, with {count(planned.batch.n_rows, 'row')} of "
        f"{planned.batch.length:,} tokens; --fit SIZE in place of --advice finds settings that take less",
        markup=False,
    )


def _tell_measuring(machine: Machine) -> None:
    if machine.measures:
        Console(stderr=True, highlight=False).print(MEASURING, style="dim")


def _console() -> Any:
    return Console(highlight=False)
