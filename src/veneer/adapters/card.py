"""Model card of a saved adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from veneer.contract import MethodConfig
from veneer.disk.atomic import write_atomically
from veneer.store.named import is_portable

_PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification"}


def write_card(folder: Path, config: MethodConfig, tags: Sequence[str] = ()) -> None:
    """Write ``README.md`` with the hub's metadata, ``tags`` included. An existing card keeps its text and its tags."""
    path = folder / "README.md"
    card = ModelCard.load(path) if path.is_file() else ModelCard(_text(config))
    card.data = _data(config, card.data, tags)
    write_atomically(path, str(card).encode())


def tell_parent(folder: Path, parent: Mapping[str, str]) -> None:
    """Add to a saved adapter's model card the name and hash of the adapter from which training continued."""
    path = folder / "README.md"
    if path.is_file():
        card = ModelCard.load(path)
        card.text = (
            f"{card.text.rstrip()}\n\nTrained on from the adapter `{parent['from']}` (blake2b {parent['blake2b']}).\n"
        )
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
    """Return the base's id on the hub, or None for a local folder or file, which the hub does not allow in a card."""
    return None if base is None or Path(base).is_absolute() or Path(base).is_dir() or is_portable(base) else base


def _text(config: MethodConfig) -> str:
    name = config.base_model_name_or_path
    base = _id_of(name)
    called = base or (name if name and is_portable(name) else Path(name).name if name else "BASE_MODEL")
    rows = [f"| {key} | `{_shown(value)}` |" for key, value in config.told().items()]
    return "\n".join(
        [
            "---\nlibrary_name: peft\n---\n",
            f"# {config.peft_type} adapter of {called}\n",
            "The files are in PEFT's format: veneer loads them, and so do PEFT and vLLM if they have this method.\n",
            "```python",
            *_loading(name, base),
            "```\n",
            "| setting | value |\n| --- | --- |",
            *rows,
            "",
        ]
    )


def _loading(name: str | None, base: str | None) -> list[str]:
    """Return the lines of code that load the adapter. If the base has a name known to veneer, the code needs no id of
    the base.
    """
    if name is not None and is_portable(name):
        return [
            "from veneer import AutoPeftModelForCausalLM\n",
            f"# its base is {name}, by the name that veneer knows it by",
            'model = AutoPeftModelForCausalLM.from_pretrained("PATH_OR_ID_OF_THIS_ADAPTER")',
        ]
    return [
        "from transformers import AutoModelForCausalLM",
        "from veneer import PeftModel\n",
        f'base = AutoModelForCausalLM.from_pretrained("{base or "BASE_MODEL"}")',
        'model = PeftModel.from_pretrained(base, "PATH_OR_ID_OF_THIS_ADAPTER")',
    ]


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
