"""Values loaded under a name that is there: refused where they would mean something else there."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from veneer import BottleneckConfig, LoraConfig, VeraConfig, get_peft_model
from veneer.adapters.lifecycle import _MEANING
from veneer.core.method import MethodConfig
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
    ],
    ids=["rows", "draw", "non-linearity", "placement"],
)
def test_other_settings_under_the_same_name_are_refused(
    stored: MethodConfig, changes: dict[str, object], tmp_path: Path
) -> None:
    get_peft_model(make_tiny(), stored).save_pretrained(tmp_path)
    model = get_peft_model(make_tiny(), replace(stored, **changes))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"the files hold {next(iter(changes))}="):
        model.load_adapter(tmp_path, "default")
    same = get_peft_model(make_tiny(), stored)
    same.load_adapter(tmp_path, "default")


def test_every_setting_that_is_compared_is_one_of_a_method() -> None:
    assert set(_MEANING) <= {spec.name for method in all_methods().values() for spec in fields(method)}


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
