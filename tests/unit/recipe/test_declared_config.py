"""Configs of adapter folders as the source of their methods declares them: those that the classes read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from veneer.contract import MethodConfig
from veneer.contract.config import config_in
from veneer.contract.places import modules_in
from veneer.errors import ConfigError
from veneer.methods import all_methods
from veneer.recipe.declared_config import declared_config, modules_named
from veneer.recipe.methods import name_of

SETTINGS: dict[str, Any] = {
    "r": 3, "target_modules": ["v_proj", "q_proj"], "num_virtual_tokens": 5, "task_type": "CAUSAL_LM",
    "total_step": 12, "modules_to_save": ["score"], "lora_dropout": 0.25, "base_model_name_or_path": "org/base",
}  # fmt: skip
LORA: list[dict[str, Any]] = [{}, {"use_dora": True}, {"use_dora": True, "use_rslora": True}, {"bias": "all"}]


def configs() -> list[MethodConfig]:
    """One of every method that these settings make, and variants of LoRA."""
    found = []
    for name, cls in all_methods().items():
        given = {each.name: SETTINGS[each.name] for each in dataclasses.fields(cls) if each.name in SETTINGS}
        for more in LORA if name == "LORA" else [{}]:
            try:
                found.append(cls(**given, **more))
            except (ConfigError, TypeError):
                continue
    return found


def test_the_source_tells_what_the_class_tells(tmp_path: Path) -> None:
    read = list[str]()
    for config in configs():
        config.save_pretrained(tmp_path)
        declared, own = declared_config(tmp_path), config_in(tmp_path)
        if declared is None:
            continue
        read.append(declared.method)
        assert declared.method == name_of(own)
        assert list(declared.told) == list(own.told()), declared.method
        plain = json.loads(json.dumps([own.told(), dataclasses.asdict(own)]))
        assert json.loads(json.dumps([declared.told, declared.values])) == plain, declared.method
    assert len(read) > len(all_methods()) / 2
    assert {"lora", "dora", "dora + rslora", "ia3", "vera", "prefix_tuning", "prompt_tuning"} <= set(read), read


def test_modules_are_named_as_the_class_names_them_or_not_at_all(tmp_path: Path) -> None:
    config = all_methods()["LORA"](target_modules=["q_proj", "mlp.up_proj"], modules_to_save=["score"])
    config.save_pretrained(tmp_path)
    declared = declared_config(tmp_path)
    assert declared is not None
    known = [f"base_model.model.model.layers.{i}.{end}" for i in (0, 1) for end in ("attn.q_proj", "mlp.up_proj")]
    keys = [f"{path}.lora_{factor}.weight" for path in known for factor in "AB"]
    assert modules_named(declared, keys) == tuple(modules_in(config, keys)) != ()
    for strange in ("score.modules_to_save.weight", "model.layers.0.mlp.up_proj.base_layer.bias", "model.norm.weight"):
        assert modules_named(declared, [*keys, f"base_model.model.{strange}"]) is None


def test_values_that_a_method_may_refuse_are_left_to_its_class(tmp_path: Path) -> None:
    all_methods()["LORA"](target_modules=["q_proj"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    sound = json.loads(file.read_text())
    for change in (
        {"r": 0}, {"r": -1}, {"r": "8"}, {"lora_alhpa": 3}, {"megatron_config": {}, "arrow_config": {"a": 1}},
        {"lora_dropout": 1.5}, {"bias": "most"}, {"peft_type": "LOAR"}, {"target_modules": ".*(q_proj"},
        {"rank_pattern": {"q": 2}}, {"task_type": ["x"]}, {"r": True}, {"use_dora": 1}, {"bias": 3},
    ):  # fmt: skip
        file.write_text(json.dumps(sound | change))
        assert declared_config(tmp_path) is None, change
