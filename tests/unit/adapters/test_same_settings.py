"""Values loaded under a name that is there: refused where they would mean something else there."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from veneer import AdaLoraConfig, BottleneckConfig, IA3Config, LoraConfig, VeraConfig, get_peft_model
from veneer.contract import MethodConfig
from veneer.errors import AdapterNameError, ConfigError
from veneer.methods import all_methods

from .conftest import make_tiny

ROWS = LoraConfig(r=3, target_modules=["q_proj"], trainable_token_indices=[5, 11])
VERA = VeraConfig(r=5, target_modules=["q_proj"], projection_prng_key=2, save_projection=False)


@pytest.mark.parametrize(
    ("stored", "changes"),
    [
        (ROWS, {"trainable_token_indices": [6, 12]}),
        (VERA, {"projection_prng_key": 3}),
        (BottleneckConfig(), {"non_linearity": "tanh"}),
        (BottleneckConfig(), {"placement": "parallel"}),
        (LoraConfig(r=3, target_modules=["q_proj"]), {"lora_alpha": 5}),
        (LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"]), {"modules_to_save": None}),
        (LoraConfig(r=3, target_modules=["q_proj"]), {"modules_to_save": ["embed_tokens"]}),
        (IA3Config(target_modules=["k_proj", "up_proj"], feedforward_modules=[]), {"feedforward_modules": ["up_proj"]}),
    ],
    ids=["rows", "draw", "non-linearity", "placement", "alpha", "head", "embeddings", "side"],
)
def test_other_settings_under_the_same_name_are_refused(
    stored: MethodConfig, changes: dict[str, object], tmp_path: Path
) -> None:
    get_peft_model(make_tiny(), stored).save_pretrained(tmp_path)
    model = get_peft_model(make_tiny(), replace(stored, **changes))  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=rf"other settings than the files have \({next(iter(changes))}=.* here, .* there\)"
    ):
        model.load_adapter(tmp_path, "default")
    same = get_peft_model(make_tiny(), stored)
    same.load_adapter(tmp_path, "default")


def test_another_strength_of_a_method_that_nobody_listed_is_refused(toy: type[MethodConfig], tmp_path: Path) -> None:
    get_peft_model(make_tiny(), toy(strength=3.0)).save_pretrained(tmp_path)
    model = get_peft_model(make_tiny(), toy(strength=0.5))
    with pytest.raises(ConfigError, match=r"strength=0\.5 here, 3\.0 there"):
        model.load_adapter(tmp_path, "default")


@pytest.mark.parametrize("method", all_methods().values(), ids=all_methods())
def test_every_field_that_is_not_compared_is_one_of_the_method(method: type[MethodConfig]) -> None:
    names = {spec.name for spec in fields(method)}
    inert = [vars(cls)["inert"] for cls in method.__mro__ if "inert" in vars(cls)]
    assert frozenset().union(*inert) <= names


@pytest.mark.parametrize(
    ("stored", "changes"),
    [
        (ROWS, {"lora_dropout": 0.3, "base_model_name_or_path": "x", "revision": "y"}),
        (VERA, {"vera_dropout": 0.3, "d_initial": 0.7}),
        (
            LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"]),
            {"modules_to_save": ["head", "lm_head"]},  # the same modules
        ),
        (BottleneckConfig(), {"dropout": 0.2, "init_weights": "mam_adapter"}),
        (AdaLoraConfig(target_modules=["q_proj"], init_r=5, target_r=2), {"beta1": 0.5, "total_step": 31}),
    ],
    ids=["rows", "vera", "head", "bottleneck", "adalora"],
)
def test_settings_that_act_in_training_alone_may_differ(
    stored: MethodConfig, changes: dict[str, object], tmp_path: Path
) -> None:
    get_peft_model(make_tiny(), stored).save_pretrained(tmp_path)
    model = get_peft_model(make_tiny(), replace(stored, **changes))  # type: ignore[arg-type]
    model.load_adapter(tmp_path, "default")


def test_one_name_may_be_given_as_it_is_and_no_name_twice(tmp_path: Path) -> None:
    model = get_peft_model(make_tiny(), LoraConfig(r=3, target_modules=["q_proj"]), "ada")
    with pytest.raises(AdapterNameError, match="more than once"):
        model.set_adapter(["ada", "ada"])
    model.save_pretrained(tmp_path, selected_adapters="ada")
    assert (tmp_path / "ada" / "adapter_config.json").is_file()
    model.merge_adapter("ada")
    assert model.get_model_status().merged_adapters == ["ada"]


def test_a_key_mapping_that_is_no_regular_expression_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(make_tiny(), LoraConfig(r=3, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="must map regular expressions"):
        model.load_adapter(tmp_path, "b", key_mapping={"(": "x"})
    assert list(model.peft_config) == ["default"]
