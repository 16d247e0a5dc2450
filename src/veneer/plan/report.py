"""Plans as output: bars in a terminal, a picture, a recipe; and the machine that they are for."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Group
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedConfig

from veneer.errors import UnmeasuredError
from veneer.model.memory.available import available_bytes, high_water
from veneer.plain.units import count, duration, size
from veneer.plan.budget import MeasuringTime
from veneer.plan.cards import Card, card_of
from veneer.plan.draw import DrawSize
from veneer.plan.fit import CHECKPOINTS, Fit
from veneer.plan.machine import Rates, free_here
from veneer.plan.model import base_quantization
from veneer.plan.observed import flops_a_second, knows_run, observed
from veneer.plan.plan import PHASES, Plan, as_json, plan_recipe
from veneer.plan.process import process_of
from veneer.plan.rows import OwnRows, own_rows
from veneer.plan.start import known_start
from veneer.plan.step import Batch
from veneer.plan.time import ROUGH, Seconds, seconds_by, seconds_here, seconds_like, seconds_on
from veneer.plan.work import Work
from veneer.recipe.parts import ModelPart
from veneer.recipe.recipe import Recipe
from veneer.store.source import float32_note
from veneer.train.config import SFTConfig

CONTEXT_BYTES = 500_000_000
"""CUDA's context and libraries (300 to 600 MB by card and driver)."""
MEASURING = (
    "measuring this machine, once: some 20 s, longer beside other work (--no-time plans memory alone; Ctrl-C goes on "
    "without)"
)
RUN_BYTES = 30_000_000
"""Bytes that the first steps add to a process in which all is imported and a plan is made: 24 MB were measured."""
FRAGMENTS = 1.05
"""Reserved over allocated with rows of one length (5 to 15% is reported)."""
WIDTH = 32
USEFUL = 6
"""Times that the high end of a range of seconds is the low one, at most, if the range is told before a run."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Machine that a plan is for: this one, its GPU, or a ``card`` by its data sheet. ``timed``: seconds are wanted.

    ``budget`` is the time for measuring this machine's rates. The plan of a run has none, and sets ``starts_here``:
    this process will train.
    """

    card: Card | None
    timed: bool
    gpu: torch.device | None = None
    budget: MeasuringTime = field(default_factory=MeasuringTime, compare=False)
    starts_here: bool = False

    @classmethod
    def of(cls, name: str | None, *, timed: bool) -> Machine:
        """Return the card with this name as a machine, or this machine if ``name`` is None. Raises ConfigError if no
        single card matches.
        """
        return cls(None if name is None else card_of(name), timed)

    @classmethod
    def of_run(cls, args: SFTConfig, *, timed: bool) -> Machine:
        """Return the machine of a run, on which nothing is measured: the GPU of this process, or this processor."""
        if args.use_cpu or not torch.cuda.is_available():
            return cls(None, timed, budget=MeasuringTime(0), starts_here=True)
        return cls(None, timed=False, gpu=torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))

    @property
    def isa(self) -> str | None:
        """Instruction set to trace for; None is this CPU's own. A GPU is traced with avx512_bf16, which has 16-bit
        products.
        """
        return None if self.card is None and self.gpu is None else "avx512_bf16"

    @property
    def measures(self) -> bool:
        """Return True if a plan will measure this machine's rates, which is slow and happens once for a machine."""
        return self.card is None and self.timed and self.budget.is_open and Rates.here().is_new

    def note(self, part: ModelPart, config: PreTrainedConfig) -> str | None:
        """Return a note that the base trains faster in float32 on this machine.

        Return None if it does not, if the recipe chose the dtype, or if the base is quantized.
        """
        if self.card is not None or part.dtype != "auto" or base_quantization(config, part) is not None:
            return None
        device = "cpu" if self.gpu is None else "cuda"
        return float32_note(config.dtype, device, "--set model.dtype=float32")

    @property
    def memory(self) -> int:
        """Bytes available to the plan."""
        if self.gpu is not None:
            return available_bytes(self.gpu)
        return free_here() if self.card is None else int(self.card.n_bytes)

    @property
    def told(self) -> str:
        """Source of the machine's memory and rates, in words."""
        if self.card is not None:
            return f"memory and cost by a {self.card.told}"
        return f"cost: {'seconds by rates measured on this machine' if self.timed else 'arithmetic alone, not timed'}"

    def bytes_of(self, plan: Plan) -> int:
        """Return all bytes that a process needs on this machine for a plan."""
        if self.gpu is not None:
            return int(plan.peak.n_bytes * FRAGMENTS)  # asking the driver has made the context: it is not free already
        if self.card is not None:
            return int(plan.peak.n_bytes * FRAGMENTS) + CONTEXT_BYTES
        return process_of(plan, start_of_this() if self.starts_here else None).n_bytes

    def seconds(self, plan: Plan) -> Seconds:
        """Return the seconds of one micro-batch. Raises UnmeasuredError if there is no time to measure a rate."""
        return self.seconds_of(plan.work)

    def seconds_of(self, work: Work) -> Seconds:
        """Return the seconds of some work. Raises UnmeasuredError if there is no time to measure a rate."""
        if self.card is not None:
            return seconds_on(work, self.card)
        return seconds_here(work, Rates.here(self.budget))

    @property
    def knows_seconds(self) -> bool:
        """Return True if seconds are wanted, or if the machine is a card, whose seconds follow from its data sheet."""
        return self.timed or self.card is not None

    def cost(self, plan: Plan) -> float:
        """Return the cost of a micro-batch, to rank plans by: seconds if they are known, otherwise TFLOP."""
        return self.seconds(plan).step if self.knows_seconds else plan.work.flops / 1e12

    def _replanned(self, plan: Plan, batch: Batch) -> Plan:
        """Plan another micro-batch of the same recipe, without its evaluation."""
        return plan_recipe(plan.recipe, config=plan.config, batch=batch, isa=self.isa, evaluated=False)

    def facts(self, plan: Plan, n_rows: int | None) -> dict[str, Any]:
        """Return memory and time of a process as plain numbers.

        The time is that of the recipe's own rows, if they can be read.
        """
        found: dict[str, Any] = {"process": {"bytes": self.bytes_of(plan), "free": self.memory}}
        if self.card is not None:
            found["process"]["source"] = self.card.told
        if self.timed:
            try:
                found["time"] = self._time(plan, n_rows)
                found |= self._draw_seconds(plan)
            except UnmeasuredError as error:
                found["no_time"] = str(error)
        return found

    def _draw_seconds(self, plan: Plan) -> dict[str, Any]:
        """Return a plan's draw (the generation of answers) as plain numbers, with seconds by measured rates. Return an
        empty dict if the plan has none.
        """
        if plan.draw is None:
            return {}
        draw = as_json(plan)["draw"]
        for name, work in plan.apart.items():
            draw["parts"][name]["seconds"] = self.seconds_of(work).step
        return {"draw": draw}

    def _time(self, plan: Plan, n_rows: int | None) -> dict[str, Any]:
        """Return the seconds of a micro-batch as plain numbers."""
        told = as_json(plan)
        if self.card is None and not knows_run(told) and Rates.here(self.budget).is_new:
            self.budget.begin()  # refused before rows are read, where nothing may be measured
        own = own_rows(plan.recipe, plan.batch)
        batch = plan.batch if own is None else own.batch
        seconds = self._seconds_of(plan, own, told)
        found = {
            **({} if own is None else {"rows": {"encoded": own.n_rows, "length": batch.length}}),
            "seconds_a_step": seconds.step,
            **({} if seconds.between is None else {"between": list(seconds.between)}),
            "tokens_a_second": batch.n_tokens / seconds.step,
            "kinds": dict(seconds.kinds),
            "source": seconds.source,
        }
        args = plan.recipe.training_config()
        n_trained = None if own is None else own.n_trained
        if args.max_steps > 0:
            found["micro_batches"] = args.max_steps * args.gradient_accumulation_steps
        elif n_trained is not None:
            found["micro_batches"] = math.ceil(n_trained / args.per_device_train_batch_size * args.num_train_epochs)
        if n_rows is not None:
            n_steps = n_rows / args.per_device_train_batch_size * args.num_train_epochs
            found["hours"] = seconds.step * n_steps / 3600
        return found

    def _seconds_of(self, plan: Plan, own: OwnRows | None, told: Mapping[str, Any]) -> Seconds:
        """Return the seconds of a micro-batch, from the best source there is.

        Sources are, in order: earlier runs with these settings, the machine's measured rates, and earlier runs with
        other settings. Raises UnmeasuredError if there is none.
        """
        run = observed(told) if self.card is None else None
        if run is not None:
            return seconds_by(run, None if own is None else own.tokens)
        timed = plan if own is None or own.batch == plan.batch else self._replanned(plan, own.batch)
        try:
            return self.seconds(timed)
        except UnmeasuredError:
            flops = plan.work.flops * (1.0 if own is None else own.tokens / plan.n_tokens)
            rates = flops_a_second(told, flops)
            if rates is None:
                raise
            return seconds_like(flops, rates)


def start_of_this() -> int:
    """Return the bytes that this process will hold besides the plan's tensors when it begins to train."""
    return known_start() or (high_water() or 0) + RUN_BYTES


def _stored(plan: Plan) -> str:
    part = plan.recipe.model
    if part.quantization != "none":
        return f"in {part.quantization}"
    return "in its own dtype" if base_quantization(plan.config, part) is None else "quantized as in its files"


def shown(plan: Plan, facts: dict[str, Any]) -> Group:
    """Return the plan as a page for a terminal."""
    batch, share = plan.batch, plan.n_trained / plan.n_parameters
    head = Text(
        f"{plan.recipe.model.source}, {_method(plan)}, base {_stored(plan)}: "
        f"{plan.n_trained:,} of {plan.n_parameters:,} parameters trained ({share:.2%}); "
        f"{_rows_told(batch)}"
    )
    lines: list[Any] = [head]
    if plan.not_fused:
        lines.append(Text(f"planned on the general path: {plan.not_fused}", style="yellow"))
    phases = {phase: plan.phases[phase].n_bytes for phase in PHASES if phase in plan.phases}
    lines += [
        Text(""),
        _bars(phases, "phase"),
        Text(f"\nthe peak, in {plan.peak_phase}:"),
        _bars(dict(plan.peak.kinds), "kind"),
    ]
    if plan.draw is not None:
        lines += [Text(f"\n{_draw_told(plan.draw, plan.copies)}"), _parts(facts["draw"]["parts"])]
    process = facts["process"]
    sheet = f" ({process['source']})" if "source" in process else ""
    lines.append(
        Text(f"\nthe whole process takes {size(process['bytes'])}; {size(process['free'])} may be taken{sheet}")
    )
    if process["bytes"] > process["free"]:
        lines.append(Text("it does not fit: `veneer plan … --fit SIZE` lists settings that do", style="yellow"))
    if "time" in facts:
        time = facts["time"]
        rate = _rate(time["tokens_a_second"])
        told = f"{_seconds(time)} a micro-batch {_rows(time, batch)}, {rate} tokens/s ({time['source']})"
        lines.append(Text(told + (f"; {duration(time['hours'] * 3600)} for the run" if "hours" in time else "")))
    elif "no_time" in facts:
        lines.append(Text(f"no seconds: {facts['no_time']}", style="yellow"))
    return Group(*lines)


def _rows_told(batch: Batch) -> str:
    """Return the rows of a micro-batch in words."""
    shared = f", {count(batch.n_prompts, 'prompt')} of {batch.n_shared:,} once each" if batch.n_prompts else ""
    return f"{count(batch.n_rows, 'row')} of {batch.length:,} tokens{shared}{', packed' if batch.packed else ''}"


def _draw_told(draw: DrawSize, copies: int) -> str:
    """Return in words what a draw is, and which micro-batches learn from it."""
    who = "the engine" if draw.by_engine else "transformers"
    held = {1: "one copy", 2: "two copies"}[copies]
    return (
        f"a draw by {who}: {count(draw.n_answers, 'answer')} of {draw.n_tokens:,} tokens to "
        f"{count(draw.n_prompts, 'prompt')} of {draw.prompt:,}; {held} of the base; "
        f"{draw.n_batches:g} micro-batch{'' if draw.n_batches == 1 else 'es'} trained on it:"
    )


def _parts(parts: Mapping[str, Mapping[str, float]]) -> Table:
    """Return a table of the parts of a draw, with the peak memory of each, and its seconds if they are known."""
    table = Table("part", "peak", "seconds", box=None, padding=(0, 2))
    for name, part in parts.items():
        told = "of your functions" if name == "rewards" else f"{part['seconds']:.3g}" if "seconds" in part else ""
        table.add_row(name, size(int(part["bytes"])), told)
    return table


def _method(plan: Plan) -> str:
    """Return the method, with its rank if it has one. The rank may be the method's default."""
    name, rank = plan.recipe.method, getattr(plan.recipe.adapter_config(), "r", None)
    return name if rank is None else f"{name} of rank {rank}"


def _bars(amounts: dict[str, int], noun: str) -> Table:
    table = Table(noun, "bytes", "", box=None, padding=(0, 2))
    most = max(amounts.values(), default=1) or 1
    for name, n in sorted(amounts.items(), key=lambda item: -item[1]) if noun == "kind" else amounts.items():
        table.add_row(name, size(n), "█" * max(1, round(WIDTH * n / most)))
    return table


def told(plan: Plan, facts: dict[str, Any]) -> str:
    """Return the plan in one line, for `veneer train`. A range of seconds that is too wide to be useful is left out."""
    time = facts.get("time")
    beside = "" if plan.recipe.metric is None else "; answers for its metric are not planned"
    memory = f"planned: {size(facts['process']['bytes'])} at most (in {plan.peak_phase}{beside})"
    low, high = _range(time) if time else (0.0, 0.0)
    if high > USEFUL * low or "no_time" in facts:
        return f"{memory}; its time is known after the first steps"
    if not time:
        return memory
    aside = [time["source"]] if "between" in time or time["source"] == ROUGH else ()
    n = time.get("micro_batches")
    whole = f"; {_duration_told(low * n, high * n)} for all {n:,}, without evaluations" if n else ""
    return f"{memory}, and about {_seconds(time)} a micro-batch {_rows(time, plan.batch, aside)}{whole}"


def _range(time: Mapping[str, Any]) -> tuple[float, float]:
    low, high = time.get("between", (time["seconds_a_step"],) * 2)
    return low, high


def _duration_told(low: float, high: float) -> str:
    first, last = duration(low), duration(high)
    return first if first == last else f"{first} to {last}"


def _seconds(time: Mapping[str, Any]) -> str:
    """Return the seconds of a micro-batch in words, as a number or a range."""
    low, high = time.get("between", (None, time["seconds_a_step"]))
    if high >= 60:
        return duration(high) if low is None else f"{duration(low)} to {duration(high)}"
    return f"{high:.2g} s" if low is None else f"{low:.2g} to {high:.2g} s"


def _rows(time: Mapping[str, Any], batch: Batch, aside: Sequence[str] = ()) -> str:
    """Return in words the rows that the seconds refer to, with ``aside`` in brackets."""
    if "rows" not in time:
        return "where its rows are full" + "".join(f" ({each})" for each in aside)
    length, n = time["rows"]["length"], time["rows"]["encoded"]
    told = f"{count(batch.n_rows, 'row')} of {length:,} tokens on average, by {n} that were encoded"
    return f"of its own rows ({'; '.join([told, *aside])})"


def fit_table(own: Mapping[str, object], found: Sequence[Fit], budget: int, machine: Machine) -> Table:
    """Return a table of settings that fit, best first, with tokens a second if the machine's rates are known.

    Each changed key has a column. It shows the recipe's ``own`` value for settings that do not change the key.
    """
    keys = list(dict.fromkeys(key for fit in found for key in fit.changes))
    table = Table("", box=None, padding=(0, 1, 0, 0), title=f"within {size(budget)}", caption=machine.told)
    heads = [key.partition(".")[2].replace("_", "_\n") for key in keys]  # narrow enough for 80 columns
    for name in (*heads, "memory", "cost a\ntoken", *(["tokens/s"] if machine.knows_seconds else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for number, fit in enumerate(found, 1):
        rate = [_rate(1 / fit.seconds_a_token)] if machine.knows_seconds else []
        cost = f"{fit.seconds_a_token / found[0].seconds_a_token:.2f} x"
        values = [str({**own, **fit.changes}[key]) for key in keys]
        table.add_row(str(number), *values, size(fit.n_bytes), cost, *rate)
    return table


def changes_line(own: Mapping[str, object], fit: Fit) -> str:
    """Return a line with the keys of a recipe that a fit changes, their ``own`` values and the new ones."""
    changes = [(key, own[key], value) for key, value in fit.changes.items()]
    told = [f"{key} from {before} to {value}" for key, before, value in changes if before != value]
    return f"the first changes {', '.join(told)}" if told else "the first is the recipe as it is"


def own_values(recipe: Recipe, found: Sequence[Fit]) -> dict[str, object]:
    """Return a recipe's own values of all keys that the found settings change. If the recipe does not set a key, its
    default is returned.
    """
    own = dict[str, object]()
    for key in dict.fromkeys(key for fit in found for key in fit.changes):
        part, _, name = key.partition(".")
        if part != "training":
            own[key] = getattr(getattr(recipe, part), name)
        elif name in recipe.training or name == CHECKPOINTS:
            own[key] = recipe.training.get(name, False)
        else:
            own[key] = getattr(recipe.training_config(), name)
    return own


def _rate(a_second: float) -> str:
    """Return a rate with enough digits to distinguish two slow ones."""
    return f"{a_second:,.0f}" if a_second >= 100 else f"{a_second:.3g}"


def as_yaml(recipe: Recipe) -> str:
    """Return a recipe as `veneer train` reads it."""
    return yaml.safe_dump(recipe.model_dump(exclude_unset=True, mode="json"), sort_keys=False)


def draw(plan: Plan, path: Path) -> None:
    """Write a picture of a plan to ``path``: one bar for each phase, stacked by the kinds of bytes."""
    from matplotlib.figure import Figure  # which takes a second to import, and few plans are drawn

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    phases = [phase for phase in PHASES if phase in plan.phases]
    below = [0.0] * len(phases)
    for kind in dict.fromkeys(kind for phase in phases for kind in plan.phases[phase].kinds):
        amounts = [plan.phases[phase].kinds.get(kind, 0) / 1e9 for phase in phases]
        axes.bar(phases, amounts, bottom=below, label=kind)
        below = [a + b for a, b in zip(below, amounts, strict=True)]
    axes.set_ylim(top=1.05 * max(below))
    axes.set_ylabel("GB")
    axes.set_title(f"{plan.recipe.model.source}: {_method(plan)}, {size(plan.peak.n_bytes)} at the peak")
    figure.legend(fontsize="small", loc="outside right upper", reverse=True)  # as the bars are stacked, beside them
    figure.savefig(path, dpi=144)
