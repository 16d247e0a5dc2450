"""Implementation of ``veneer info`` of an adapter or a model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from veneer.cli.facts import print_facts
from veneer.cli.pages.info import InfoArguments
from veneer.contract.file import CONFIG_FILE
from veneer.errors import ConfigError
from veneer.plain.units import size
from veneer.recipe.methods import name_of
from veneer.store.bars import quiet
from veneer.store.facts import AdapterFacts, ModelFacts, adapter_facts, model_facts
from veneer.store.gguf.blocks import why_not_in_blocks
from veneer.store.gguf.facts import gguf_facts, gguf_section
from veneer.store.gguf.header import GgufHeader, read_header
from veneer.store.source import resolve

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


def info(args: InfoArguments) -> None:
    """Print facts about an adapter or a model."""
    facts, section = _facts(args.what)
    if args.as_json:
        typer.echo(json.dumps(facts, indent=2, default=str))
        return
    print_facts(section)


def _facts(what: str) -> tuple[dict[str, Any], Section]:
    """All that is known of what is meant, and the rows of the table."""
    folder = Path(what).expanduser()
    if folder.suffix == ".gguf" and folder.is_file():
        header = read_header(folder)
        return gguf_facts(header), gguf_section(folder, header) | _as_base(folder, header)
    place, facts = _find(what)
    section = _section(place, facts)
    return {**({"method": section["method"]} if "method" in section else {}), **asdict(facts)}, section


def _as_base(path: Path, header: GgufHeader) -> Section:
    """How the weights of a model's file are used."""
    if header.values.get("general.type", "model") != "model":
        return {}
    reason = why_not_in_blocks(path)
    copied = f"decoded into a dense copy: {reason}" if reason else "copied: nothing is quantized"
    return {"as a base": "its blocks stay in the file" if reason is None else copied}


def _find(what: str) -> tuple[Path, AdapterFacts | ModelFacts]:
    """Find the folder that is meant, and read the facts in it."""
    folder = Path(what).expanduser()
    if (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file():
        return folder, adapter_facts(folder)
    with quiet():
        place = resolve(what)
        if not isinstance(place, Path):
            raise ConfigError(f"{what!r} is on the hub; info reads what is on this machine: download it first")
        return place, model_facts(place)


def _section(place: Path, facts: AdapterFacts | ModelFacts) -> Section:
    return _adapter(place, facts) if isinstance(facts, AdapterFacts) else _model(place, facts)


def _adapter(folder: Path, facts: AdapterFacts) -> Section:
    config = facts.config
    last = sorted({module.rpartition(".")[2] for module in facts.modules})
    return {
        "adapter": str(folder),
        "method": name_of(config),
        **{name: _text(value) for name, value in config.told().items()},
        **({"modules": f"{len(facts.modules)} ({', '.join(last)})"} if last else {}),
        "parameters": f"{facts.n_parameters:,}",
        "size": f"{size(facts.n_bytes)} ({', '.join(facts.dtypes)})",
        "base": config.base_model_name_or_path or "not recorded",
    }


def _model(folder: Path, facts: ModelFacts) -> Section:
    config = facts.config
    total = sum(facts.parameters.values())
    shape = {title: _text(config[name]) for name, title in _MODEL_FIELDS.items() if config.get(name) is not None}
    kinds = {f"  {kind}": f"{count:,} ({count / total:.1%})" for kind, count in facts.parameters.items()}
    section = {
        "model": str(folder),
        "architecture": ", ".join(config.get("architectures") or [str(config.get("model_type"))]),
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
