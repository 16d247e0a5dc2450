"""The model card that goes with a saved adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from veneer.contract import MethodConfig
from veneer.disk.atomic import write_atomically

_SHOWN = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora", "target_modules", "modules_to_save")
_PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification"}


def write_card(folder: Path, config: MethodConfig, tags: Sequence[str] = ()) -> None:
    """Write ``README.md`` with the metadata that the hub reads, ``tags`` among it; one that is there keeps its own."""
    path = folder / "README.md"
    card = ModelCard.load(path) if path.is_file() else ModelCard(_text(config))
    card.data = _data(config, card.data, tags)
    write_atomically(path, str(card).encode())


def _data(config: MethodConfig, data: Any, more_tags: Sequence[str]) -> ModelCardData:
    values = data.to_dict() if data is not None else {}
    base = _id_of(config.base_model_name_or_path)
    tags = {*(values.get("tags") or []), *more_tags, "transformers", "veneer", config.peft_type.lower()}
    if base:
        tags.add(f"base_model:adapter:{base}")
        values["base_model"] = base
    values |= {"library_name": "peft", "tags": sorted(tags)}
    if config.task_type in _PIPELINES:
        values.setdefault("pipeline_tag", _PIPELINES[config.task_type])
    return ModelCardData(**values)


def _id_of(base: str | None) -> str | None:
    """The base as others can find it: not a folder of this machine, which the hub's check of a card refuses."""
    if base is None or Path(base).is_absolute() or Path(base).is_dir():
        return None
    return base


def _text(config: MethodConfig) -> str:
    name = config.base_model_name_or_path
    base = _id_of(name) or "BASE_MODEL"
    known = {spec.name: getattr(config, spec.name) for spec in fields(config)}
    rows = [f"| {name} | `{known[name]}` |" for name in _SHOWN if name in known]
    return "\n".join(
        [
            "---\nlibrary_name: peft\n---\n",
            f"# {config.peft_type} adapter of {Path(name).name if name and base != name else base}\n",
            "The files are in PEFT's format: PEFT, vLLM and veneer load them.\n",
            "```python",
            "from transformers import AutoModelForCausalLM",
            "from veneer import PeftModel\n",
            f'base = AutoModelForCausalLM.from_pretrained("{base}")',
            'model = PeftModel.from_pretrained(base, "PATH_OR_ID_OF_THIS_ADAPTER")',
            "```\n",
            "| setting | value |\n| --- | --- |",
            *rows,
            "",
        ]
    )
