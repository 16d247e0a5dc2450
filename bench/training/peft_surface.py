"""PEFT's public names, config fields and arguments beside veneer's: present, departs, or absent.

``python -m bench.training.peft_surface > docs/peft.md`` (PEFT must be installed). A field is present if veneer's config
takes PEFT's default for it. Each of PEFT's configs is also saved with its defaults and read by veneer.
"""

from __future__ import annotations

import dataclasses
import inspect
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import peft

import veneer
from veneer.adapters import saving
from veneer.contract import source as adapter_source
from veneer.errors import VeneerError
from veneer.store.adapter.config import read_config

CONFIGS = ("LoraConfig", "AdaLoraConfig", "IA3Config", "VeraConfig", "PrefixTuningConfig", "PromptTuningConfig")
CONFIGS = (*CONFIGS, "PromptEncoderConfig", "LoHaConfig", "LoKrConfig", "HRAConfig", "OFTConfig", "FourierFTConfig")
CONFIGS = (*CONFIGS, "MissConfig", "HiraConfig", "RoadConfig", "C3AConfig", "DeloraConfig", "GraloraConfig")
CONFIGS = (*CONFIGS, "BOFTConfig", "BeftConfig", "ShiraConfig", "RandLoraConfig", "VBLoRAConfig", "PsoftConfig")
CONFIGS = (*CONFIGS, "LNTuningConfig", "TrainableTokensConfig", "DeftConfig", "MultitaskPromptTuningConfig")
CONFIGS = (*CONFIGS, "AdaptionPromptConfig", "CPTConfig")
CONFIGS = (*CONFIGS, "FrodConfig", "OSFConfig", "PeanutConfig", "TinyLoraConfig", "UniLoraConfig", "WaveFTConfig")
CONFIGS = (*CONFIGS, "PolyConfig", "LilyConfig", "SupertuningConfig", "AdamssConfig", "PveraConfig")
CONFIGS = (*CONFIGS, "GloraConfig", "CartridgeConfig")
CALLS = ("get_peft_model", "inject_adapter_in_model", "get_peft_model_state_dict", "set_peft_model_state_dict")
CALLS = (*CALLS, "prepare_model_for_kbit_training", "get_layer_status", "get_model_status")
METHODS = (
    "from_pretrained", "save_pretrained", "load_adapter", "add_adapter", "set_adapter", "delete_adapter",
    "disable_adapter", "set_requires_grad", "add_weighted_adapter", "merge_adapter", "unmerge_adapter",
    "merge_and_unload", "unload", "get_base_model", "get_layer_status", "get_model_status",
    "get_nb_trainable_parameters", "print_trainable_parameters", "push_to_hub", "active_adapter", "active_adapters",
    "peft_config", "generate", "forward", "create_or_update_model_card", "get_prompt", "get_prompt_embedding_to_save",
    "supports_lora_conversion", "subtract_mutated_init", "disable_adapter_layers", "enable_adapter_layers",
)  # fmt: skip
EXTRA = ("self", "cls", "kwargs", "args")
NO_CHOICE = {
    ("VBLoRAConfig", "save_only_topk_weights"): "`True` is refused",
    ("PromptEncoderConfig", "encoder_dropout"): "only 0 is accepted",
}
"""Fields that have one value."""
STATES = ("present", "departs", "absent")
HUB = (*adapter_source.HubOptions.__dataclass_fields__, *adapter_source.AS_IT_IS)
UPLOAD = (*saving.Upload.__dataclass_fields__, *saving.AS_IT_IS, "repo_id")
BY_KEYWORD = {"from_pretrained": HUB, "load_adapter": HUB, "save_pretrained": UPLOAD, "push_to_hub": UPLOAD}
INTRODUCTION = """Made by `bench/training/peft_surface.py`. *Departs* marks a name for which veneer
refuses some of PEFT's arguments or values; the tables name them. Tests compare numbers and files with PEFT's. Another
page counts [how many of PEFT's own tests pass](peft_tests.md).

Unknown arguments and fields are errors. A few arguments are accepted but have no effect: veneer always does what they
ask for, or they do not apply to an adapter's single safetensors file:
"""
NOTES = """Some names differ, because veneer changes the model in place and does not wrap it:

- `named_parameters` gives `….q_proj.adapters.default.lora_A`; PEFT gives
  `base_model.model.….q_proj.lora_A.default.weight`. Both contain `lora_A`, and files have PEFT's keys.
- `model.base_model` is that of transformers: the part without the head (for other modules, the model itself).
  `model.get_base_model()` returns the model itself. A layer of the base keeps its path: `model.model.layers[0]`, with
  no `base_model.model` in front and no `base_layer` inside.
- Configs are frozen. To change a field, make a new config: `dataclasses.replace(config, r=4)`.
- `set_adapter` freezes the other adapters, as PEFT does. An adapter that was loaded frozen stays frozen, unless
  `inference_mode` is False, PEFT's default.
- `PeftModelForCausalLM` and its siblings work in `isinstance`, and load and attach adapters. An adapted model keeps its
  own class.
- LoftQ initializes by `replace_lora_weights_loftq` on a quantized model. `loftq_config`, which changes the base, is
  absent.
"""
Row = tuple[str, str, str]


def main() -> None:
    """Print the page."""
    print(f"# PEFT {peft.__version__} beside veneer\n")
    print(INTRODUCTION)
    ignored_by = {"Attaching": ["mixed"], "Loading": adapter_source.AS_IT_IS, "Saving": saving.AS_IT_IS}
    for what, ignored in ignored_by.items():
        print(f"- {what}: {', '.join(f'`{argument}`' for argument in ignored)}.")
    print(f"\n{NOTES}")
    for title, found in {"Functions": functions(), "The adapted model": methods()}.items():
        rows = list(dict.fromkeys(found))
        print(f"## {title}: {counted(rows)}\n\n| PEFT | veneer | |\n| --- | --- | --- |")
        for name, state, note in rows:
            print(f"| `{name}` | {state} | {note} |")
        print()
    print("## Configs\n\nA file with an absent field is refused unless the field has PEFT's default.\n")
    print("| PEFT | PEFT's file of the default config | present | departs | absent |\n| --- | --- | --- | --- | --- |")
    for config in CONFIGS:
        print(f"| `{config}` | {read_back(config)} | {' | '.join(listed(fields(config)))} |")
    print(f"\n## Other names: {counted(list(names()))}\n")
    for state, found in zip(("Present", "Departs", "Absent"), listed(names()), strict=True):
        if found:
            print(f"{state}: {found}.\n")


def counted(rows: list[Row]) -> str:
    """Return the number of rows in each state, in words."""
    return ", ".join(f"{n} {state}" for state, n in Counter(row[1] for row in rows).most_common())


def listed(rows: Iterable[Row]) -> list[str]:
    """Return the names of the rows in each state, as text."""
    found = list(rows)
    return [
        ", ".join(f"`{name}`" + (f" ({note})" if note else "") for name, is_, note in found if is_ == state)
        for state in STATES
    ]


def read_back(config: str) -> str:
    """Return "read" if veneer reads the file that PEFT writes for a default config, otherwise the error."""
    given = {"total_step": 100} if config == "AdaLoraConfig" else {}
    given |= {"num_virtual_tokens": 3} if ("Pr" in config and "Adaption" not in config) or "Cart" in config else {}
    given |= {"task_type": "CAUSAL_LM"} if config == "CPTConfig" else {}
    given |= {"adapter_len": 3, "adapter_layers": 2} if config == "AdaptionPromptConfig" else {}
    given |= {"token_indices": [3]} if config == "TrainableTokensConfig" else {}
    with tempfile.TemporaryDirectory() as folder:
        getattr(peft, config)(**given).save_pretrained(folder)
        try:
            read_config(Path(folder))
        except VeneerError as error:
            return f"refused: {error}"
    return "read"


def functions() -> Iterator[Row]:
    """Yield a row for each function that both should have."""
    for name in CALLS:
        yield compared(name, getattr(peft, name), getattr(veneer, name, None))


def methods() -> Iterator[Row]:
    """Yield a row for each method and property of ``PeftModel``, and of the LoRA models that it forwards to."""
    for name in METHODS:
        theirs = getattr(peft.PeftModel, name, None) or getattr(peft.LoraModel, name, None)
        theirs = theirs or getattr(peft.tuners.tuners_utils.BaseTuner, name, None)
        ours = getattr(veneer.PeftModel, name, None)
        if ours is None and name in ("generate", "forward"):
            yield name, "present", "the transformers model's own: the model stays that object"
        elif theirs is not None:
            yield compared(name, theirs, ours)


def compared(name: str, theirs: Any, ours: Any) -> Row:
    """Return the row of a function: its name, its state, and the arguments of PEFT's that ours refuses."""
    if ours is None:
        return name, "absent", ""
    if not callable(theirs) or not callable(ours):
        return name, "present", ""
    taken = {*arguments(ours), *BY_KEYWORD.get(name, ())}
    lacking = [arg for arg in arguments(theirs) if arg not in taken]
    return name, *(("departs", "refused: " + ", ".join(f"`{arg}`" for arg in lacking)) if lacking else ("present", ""))


def arguments(call: Callable[..., Any]) -> list[str]:
    """Return the names of a call's arguments."""
    return [name for name in inspect.signature(call).parameters if name not in EXTRA and not name.endswith("kwargs")]


def fields(config: str) -> Iterator[Row]:
    """Yield a row for each field of a config of PEFT's, except those that PEFT fills in itself."""
    for field in dataclasses.fields(getattr(peft, config)):
        if field.name not in ("peft_type", "auto_mapping", "peft_version"):
            known = NO_CHOICE.get((config, field.name))
            yield field.name, *(("departs", known) if known else state_of(getattr(veneer, config), field))


def state_of(ours: Any, field: dataclasses.Field[Any]) -> tuple[str, str]:
    """Return the state of a field of PEFT's in our config, and a note if the default differs or is refused."""
    mine = {f.name: f for f in dataclasses.fields(ours)}.get(field.name)
    if mine is None:
        return "absent", ""
    if default(mine) == default(field) or (empty(default(mine)) and empty(default(field))):
        return "present", ""
    try:
        ours(**{field.name: default(field)})
    except (VeneerError, TypeError):
        return "departs", f"only PEFT's default, {default(field)!r}, is refused"
    return "present", f"default {default(mine)!r}, not {default(field)!r}"


def empty(value: Any) -> bool:
    """Return True if a default says nothing."""
    return value is None or value in ({}, [], ())


def default(field: dataclasses.Field[Any]) -> Any:
    """Return a field's default, or None if it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def names() -> Iterator[Row]:
    """Yield a row for each other name that PEFT exports."""
    for name in sorted(peft.__all__):
        if name not in CALLS:
            yield name, "present" if name in veneer.__all__ else "absent", ""


if __name__ == "__main__":
    main()
