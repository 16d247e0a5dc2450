"""Weighted mix of adapters: the sum of their changes, as the effects of one adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from veneer.errors import CompositionError
from veneer.model.adapted.copies import own_parameters
from veneer.model.program.program import Program
from veneer.model.program.version import Effects
from veneer.plain.tensor_tree import moved
from veneer.records.linear import compose_linear
from veneer.serve.program.effects import Lookup, read_effects

Parts = Sequence[tuple[Path, float]]
"""The folders of a mix's adapters, each with its weight."""


def read_mix(lookup: Lookup, program: Program, parts: Parts) -> Effects:
    """Return the effects ``Σ w_i ΔW_i`` and ``Σ w_i Δbias_i`` of saved adapters, on the layers that any of them
    changes.

    Raises the errors of `read_effects`. Raises CompositionError for an adapter that has an effect other than changes of
    linear layers, which cannot be summed.
    """
    device = lookup.model.device  # where their biases are added to the layers' own
    read = [
        (moved(_summand(folder, read_effects(lookup, program, folder)), device), weight) for folder, weight in parts
    ]
    found = Effects()
    for path in dict.fromkeys(path for effects, _ in read for path in effects.linear):
        module = None if path in program.stack_paths else lookup.model.get_submodule(path)  # experts have no bias here
        own = None if module is None else dict(own_parameters(module)).get("bias")
        records = [effects.linear[path].weighed(w, own) for effects, w in read if path in effects.linear]
        found.linear[path] = compose_linear(records, own)
    tables = [effects.table.weighed(w) for effects, w in read if effects.table is not None]
    if tables:
        found.table = compose_linear(tables)
    return found


def _summand(folder: Path, effects: Effects) -> Effects:
    reason = _reason(effects)
    if reason:
        raise CompositionError(
            f"the adapter in {folder} {reason}, which cannot be summed with others: a mix takes low-rank updates "
            "(LoRA, rsLoRA, AdaLoRA, VeRA) and biases; ask for this adapter by itself"
        )
    return effects


def _reason(effects: Effects) -> str:
    """Return the part of an adapter that cannot be summed with others, in words; empty if there is none."""
    if effects.front is not None:
        return "has virtual tokens (a prefix or a prompt)"
    if effects.residual:
        return f"has a bottleneck at {next(iter(effects.residual))}"
    if effects.whole or effects.rows:
        place = next((f"{path}.{name}" for path, name in effects.whole), None) or next(iter(effects.rows))
        return f"replaces values of the base at {place}"
    records = effects.linear if effects.table is None else {**effects.linear, "the embeddings": effects.table}
    for path, record in records.items():
        if not record.only_adds:
            how = "scales" if record.is_elementary else "rotates"
            return f"{how} the inputs or outputs of {path} (DoRA, IA3, OFT)"
    return ""
