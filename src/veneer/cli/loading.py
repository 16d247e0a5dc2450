"""Loading shared by several verbs: load the model that the arguments name, and print warnings on stderr."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from veneer.adapters.chosen import Chosen, LoadedModel, ModelParts
from veneer.adapters.chosen import choose as choose_quietly
from veneer.answer.answerer import Answerer, Drawing
from veneer.answer.engine import answerer_of as quiet_answerer_of
from veneer.answer.model import ModelAnswerer
from veneer.cli.arguments import is_found
from veneer.cli.bases import warn
from veneer.model.memory.default_device import told_device
from veneer.plain.progress import waits_told
from veneer.plan.presets import require_weights
from veneer.store.adapter.fit import base_named_by, require_one_base
from veneer.store.adapter.records import NeedsBaseError
from veneer.store.bars import quiet
from veneer.store.named_base import is_one_model


def choose(model: str, adapters: Sequence[Path] = (), **how: Any) -> Chosen:
    """Return the result of `adapters.chosen.choose`, and print its warnings.

    Raises ConfigError for a preset, which has no weights.
    """
    require_weights(model)
    with waits_told(f"reading {model}"):
        chosen = choose_quietly(model, adapters, **how)
    return told(chosen)


def told(chosen: Chosen) -> Chosen:
    """Print the warnings about the chosen model and adapters, and return ``chosen``."""
    warn(chosen.warnings)
    return chosen


def loaded(chosen: Chosen, *, encodes: bool = False) -> ModelParts:
    """Load the chosen base and adapters. ``encodes``: an encoder-decoder is accepted too."""
    with waits_told(f"loading {chosen.source}"):
        parts = chosen.load(encodes=encodes)
    tell_of_device(parts)
    return parts


def tell_of_device(parts: ModelParts) -> None:
    """Print the GPU that a base is on; nothing if it is on the CPU."""
    if parts.base.device.type != "cpu":
        typer.echo(f"device: {told_device(parts.base.device)}", err=True)


def load_parts(model: str, adapter: Path | None = None, **how: Any) -> ModelParts:
    """Return a model and an adapter, if one is given, checked and loaded."""
    return loaded(choose(model, adapter_list(adapter), **how))


def load(model: str, adapter: Path | None = None, **how: Any) -> LoadedModel:
    """Return a model with its adapter on it."""
    return joined(load_parts(model, adapter, **how))


def joined(parts: ModelParts) -> LoadedModel:
    """Put the adapter on the base, and print a note if float32 would be faster."""
    _tell_of_float32(parts)
    with quiet(), waits_told("attaching the adapter"):
        return parts.joined()


def answerer_of(parts: ModelParts, drawing: Drawing | None = None, n_rows: int = 1) -> Answerer:
    """Return the result of `answer.engine.answerer_of`, and print the answerer's name."""
    with waits_told("packing the weights"):
        answerer, name = quiet_answerer_of(parts, drawing, n_rows)
    typer.echo(f"answers: {name}", err=True)
    if isinstance(answerer, ModelAnswerer):
        _tell_of_float32(parts)
    return answerer


def adapter_list(adapter: Path | None) -> list[Path]:
    """Return an optional adapter as a list."""
    return [] if adapter is None else [adapter]


def require_of_one_base(adapters: Sequence[Path], base: str | None, use: str) -> None:
    """Raise FormatError for a folder that is not an adapter, or ConfigError if the adapters' bases differ in size.

    The bases are compared with each other and with ``base``. If bases of equal size have names that may mean two
    models, a warning on stderr says so. ``use`` names the subject of the warning. No weight is loaded.
    """
    named = require_one_base(adapters) if base is None else []
    if base is not None:
        choose(base, list(dict.fromkeys(adapters)))
    if named:
        warn([f"{', '.join(named)}: {use} is meaningless unless these names mean one model"])


def own_base(adapters: Sequence[Path], needed: NeedsBaseError) -> str:
    """Return the base that adapters name, and print it. Raises ``needed`` unless they name one model.

    If there are several names for it, the first one that is found is used.
    """
    first, *others = dict.fromkeys(filter(None, map(base_named_by, adapters))) or ("",)
    if not first or not all(is_one_model(first, other) for other in others):
        raise needed
    base = next(filter(is_found, (first, *others)), first)
    typer.echo(f"base: {base}, as the adapters name it", err=True)
    return base


def _tell_of_float32(parts: ModelParts) -> None:
    note = parts.float32_note("--dtype float32")
    if note is not None:
        typer.echo(note, err=True)
