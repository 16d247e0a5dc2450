"""Implementation of ``veneer info`` of an adapter or a model; torch is imported only if headers and configs do not
suffice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from veneer.cli.facts import print_facts
from veneer.cli.pages.info import InfoArguments
from veneer.contract.file import WEIGHTS_FILE
from veneer.disk.safetensors_header import read_entries
from veneer.errors import ConfigError
from veneer.plain.libraries import libraries_loading
from veneer.plain.units import size
from veneer.recipe.declared_config import declared_config, modules_named
from veneer.store.adapter.folder import entries_in, is_alone
from veneer.store.counted import ModelFacts, dtypes_of, n_values_of, plain_facts
from veneer.store.found import folder_here, require_model

if TYPE_CHECKING:
    from veneer.store.gguf.header import GgufHeader

Section = dict[str, str]
_SHOWN = 12  # of the values of a list
_MODEL_FIELDS = {
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "attention heads",
    "num_key_value_heads": "key/value heads",
    "intermediate_size": "feed-forward width",
    "vocab_size": "vocabulary",
    "max_position_embeddings": "context",
    "tie_word_embeddings": "tied embeddings",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFacts:
    """Facts about an adapter: its config, and the contents of its file."""

    method: str
    config: Mapping[str, Any]
    n_parameters: int
    n_bytes: int
    dtypes: tuple[str, ...]
    modules: tuple[str, ...]


def info(args: InfoArguments) -> None:
    """Print facts about an adapter or a model."""
    facts, section = _facts(args.what, as_json=args.as_json)
    if args.as_json:
        typer.echo(json.dumps(facts, indent=2, default=str))
        return
    print_facts(section)


def _facts(what: str, *, as_json: bool) -> tuple[dict[str, Any], Section]:
    """Return all known facts, and the rows of the table.

    JSON also holds every field of transformers' config, whose class is loaded for it.
    """
    folder = Path(what).expanduser()
    if folder.suffix == ".gguf" and folder.is_file():
        return _gguf(folder)
    if is_alone(folder):
        return _adapter(folder)
    require_model(folder)
    here = folder_here(what)
    plain = None if here is None or as_json else plain_facts(here)
    if here is not None and plain is not None:
        return asdict(plain), _model(here, plain)
    with libraries_loading():
        # Here, as it imports both.
        from veneer.store.bars import quiet
        from veneer.store.facts import model_facts
        from veneer.store.source import resolve

        with quiet():
            place = resolve(what)
            if not isinstance(place, Path):
                raise ConfigError(f"{what!r} is on the hub; info reads what is on this machine: download it first")
            facts = model_facts(place)
    return asdict(facts), _model(place, facts)


def _gguf(path: Path) -> tuple[dict[str, Any], Section]:
    # Here, as they import numpy, which folders do not need.
    from veneer.store.gguf.facts import gguf_facts, gguf_section
    from veneer.store.gguf.header import read_header

    header = read_header(path)
    return gguf_facts(header), gguf_section(path, header) | _as_base(path, header)


def _as_base(path: Path, header: GgufHeader) -> Section:
    """Return the row that says how the file's weights are used as a base."""
    from veneer.store.gguf.in_place import why_not_in_blocks  # which imports numpy, as folders do not need

    if header.values.get("general.type", "model") != "model":
        return {}
    reason = why_not_in_blocks(path)
    copied = f"decoded into a dense copy: {reason}" if reason else "copied: nothing is quantized"
    return {"as a base": "its blocks stay in the file" if reason is None else copied}


def _adapter(folder: Path) -> tuple[dict[str, Any], Section]:
    """Return the facts of an adapter folder, read from its method's source if possible, else from the method's class.

    Raises FormatError if the folder is not an adapter or is damaged.
    """
    declared = declared_config(folder)
    tensors = entries_in(folder, WEIGHTS_FILE, read_entries)
    modules = None if declared is None else modules_named(declared, tensors)
    if declared is None or modules is None:
        return _checked_adapter(folder)
    facts = AdapterFacts(
        method=declared.method,
        config=declared.values,
        n_parameters=n_values_of(tensors.values()),
        n_bytes=(folder / WEIGHTS_FILE).stat().st_size,
        dtypes=dtypes_of(tensors.values()),
        modules=modules,
    )
    return asdict(facts), _adapter_section(folder, facts, declared.told)


def _checked_adapter(folder: Path) -> tuple[dict[str, Any], Section]:
    with libraries_loading():
        # Here, as they import torch.
        from veneer.contract.places import modules_in
        from veneer.recipe.methods import name_of
        from veneer.store.adapter.config import read_config
        from veneer.store.adapter.files import read_headers

    config, tensors = read_config(folder), read_headers(folder)
    facts = AdapterFacts(
        method=name_of(config),
        config=asdict(config),
        n_parameters=n_values_of(tensors.values()),
        n_bytes=(folder / WEIGHTS_FILE).stat().st_size,
        dtypes=dtypes_of(tensors.values()),
        modules=tuple(modules_in(config, tensors)),
    )
    return asdict(facts), _adapter_section(folder, facts, config.told())


def _adapter_section(folder: Path, facts: AdapterFacts, told: Mapping[str, object]) -> Section:
    last = sorted({module.rpartition(".")[2] for module in facts.modules})
    return {
        "adapter": str(folder),
        "method": facts.method,
        **{name: _text(value) for name, value in told.items()},
        **({"modules": f"{len(facts.modules)} ({', '.join(last)})"} if last else {}),
        "parameters": f"{facts.n_parameters:,}",
        "size": f"{size(facts.n_bytes)} ({', '.join(facts.dtypes)})",
        "base": facts.config["base_model_name_or_path"] or "not recorded",
    }


def _model(folder: Path, facts: ModelFacts) -> Section:
    config = facts.config
    total = sum(facts.parameters.values())
    shape = {title: _text(config[name]) for name, title in _MODEL_FIELDS.items() if config.get(name) is not None}
    kinds = {f"  {kind}": f"{count:,} ({count / max(total, 1):.1%})" for kind, count in facts.parameters.items()}
    made = config.get("architectures")
    section = {
        "model": str(folder),
        "architecture": ", ".join(map(str, made if made and isinstance(made, list) else [config.get("model_type")])),
        **shape,
        **facts.described,
        "parameters": f"{total:,}",
        **kinds,
        "size": f"{size(facts.n_bytes)} ({', '.join(facts.dtypes)})",
    }
    if facts.nbytes_4bit is None:
        return section | {"quantization": str(facts.quantization)}
    return section | {"size in 4 bits": f"{size(facts.nbytes_4bit)} (NF4 with double quantization)"}


def _text(value: object) -> str:
    if isinstance(value, (tuple, list)):
        more = len(value) - _SHOWN
        return ", ".join(map(str, value[:_SHOWN])) + (f" and {more} more" if more > 0 else "")
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
