"""Values of another type than a field's are refused in every config, by name, all at once."""

from __future__ import annotations

from collections import deque
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from veneer import (
    AdaLoraConfig,
    BottleneckConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
)
from veneer.contract import MethodConfig
from veneer.errors import ConfigError
from veneer.inits.eva import EvaConfig
from veneer.methods import all_methods

METHODS = sorted(all_methods().values(), key=lambda method: method.__name__)


class Alien:
    """Value of no type that a field has."""

    def __repr__(self) -> str:
        return "alien"


@pytest.mark.parametrize("method", METHODS)
def test_every_field_of_every_method_is_checked_in_one_error(method: type[MethodConfig]) -> None:
    names = [spec.name for spec in fields(method)]
    with pytest.raises(ConfigError) as caught:
        method(**{name: Alien() for name in names})
    said = str(caught.value).removeprefix(f"{method.__name__}: ").split("; ")
    assert [each.partition("=alien must be ")[0] for each in said] == names


@pytest.mark.parametrize(
    ("method", "values", "words"),
    [
        (LoraConfig, {"r": "8"}, "r='8' must be a whole number"),
        (LoraConfig, {"r": 8.0}, "r=8.0 must be a whole number"),
        (LoraConfig, {"r": np.float64(8)}, r"r=8.0 must be a whole number"),
        (LoraConfig, {"r": [np.int64(8)]}, r"r=\[np.int64\(8\)\] must be a whole number"),
        (LoraConfig, {"r": True}, "r=True must be a whole number"),
        (LoraConfig, {"lora_alpha": "x"}, "lora_alpha='x' must be a finite number"),
        (LoraConfig, {"lora_alpha": True}, "lora_alpha=True must be a finite number"),
        (LoraConfig, {"lora_dropout": "0.1"}, "lora_dropout='0.1' must be a finite number"),
        (LoraConfig, {"target_modules": 5}, "target_modules=5 must be a list of strings, a string or None"),
        (LoraConfig, {"target_modules": {"q", 1}}, "target_modules={.*} must be a list of strings, a string or None"),
        (LoraConfig, {"exclude_modules": b"q"}, "exclude_modules=b'q' must be a list of strings, a string or None"),
        (LoraConfig, {"modules_to_save": {"q": 1}}, "modules_to_save={'q': 1} must be a list of strings or None"),
        (LoraConfig, {"layers_to_transform": [0, 1.5]}, r"layers_to_transform=\[0, 1.5\] must be a list of whole"),
        (LoraConfig, {"use_rslora": "yes"}, "use_rslora='yes' must be True or False"),
        (LoraConfig, {"rank_pattern": {"q": "3", "v": 2}}, r"rank_pattern\['q'\]='3' must be a whole number$"),
        (LoraConfig, {"rank_pattern": ["q"]}, r"rank_pattern=\['q'\] must be a mapping of strings to whole numbers"),
        (LoraConfig, {"rank_pattern": None}, "rank_pattern=None must be a mapping of strings to whole numbers"),
        (
            LoraConfig,
            {"trainable_token_indices": 5},
            "must be a list of whole numbers, a mapping of strings to lists of whole numbers or None",
        ),
        (LoraConfig, {"eva_config": 5}, "eva_config=5 must be of type EvaConfig, a mapping of strings to anything or"),
        (IA3Config, {"feedforward_modules": 3}, "feedforward_modules=3 must be a list of strings, a string or None"),
        (AdaLoraConfig, {"beta1": "x"}, "beta1='x' must be a finite number"),
        (AdaLoraConfig, {"rank_pattern": {"a": 3}}, r"rank_pattern\['a'\]=3 must be a list of True or False"),
        (AdaLoraConfig, {"orth_reg_weight": float("nan")}, "orth_reg_weight=nan must be a finite number"),
        (VeraConfig, {"projection_prng_key": 2.5}, "projection_prng_key=2.5 must be a whole number"),
        (BottleneckConfig, {"placement": ["serial"]}, r"placement=\['serial'\] must be 'serial' or 'parallel'"),
        (BottleneckConfig, {"scaling": float("inf")}, "scaling=inf must be a finite number"),
        (PrefixTuningConfig, {"num_virtual_tokens": 2.5}, "num_virtual_tokens=2.5 must be a whole number"),
        (PrefixTuningConfig, {"num_virtual_tokens": None}, "num_virtual_tokens=None must be a whole number"),
        (PrefixTuningConfig, {"num_virtual_tokens": 5, "init_weights": "one"}, "init_weights='one' must be 'zero' or"),
        (PromptTuningConfig, {"num_virtual_tokens": 5, "tokenizer_kwargs": 5}, "tokenizer_kwargs=5 must be a mapping"),
        (PromptTuningConfig, {"num_virtual_tokens": 5, "prompt_tuning_init": "text"}, "must be 'RANDOM', 'SAMPLE_V"),
        (
            PromptEncoderConfig,
            {"num_virtual_tokens": 5, "encoder_reparameterization_type": 3},
            "encoder_reparameterization_type=3 must be 'MLP' or 'LSTM'",
        ),
        (EvaConfig, {"rho": "2", "tau": 3, "whiten": 1}, r"rho='2' .*; whiten=1 .*; tau=3 must lie in \[0, 1\]"),
    ],
)
def test_the_field_the_value_and_what_is_allowed_are_named(method: Any, values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        method(**values)


def test_types_and_values_are_told_in_one_error() -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig(r="8", lora_dropout=2, layers_to_transform="all", layers_pattern="h", bias="some")
    assert str(caught.value).split("; ") == [
        "LoraConfig: layers_to_transform='all' must be a list of whole numbers, a whole number or None",
        "r='8' must be a whole number",
        "bias='some' must be 'none', 'all' or 'lora_only'",
        "lora_dropout=2 must lie in [0, 1)",
    ]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"target_modules": "r("}, "is not a regular expression"),
        ({"target_modules": """it's r's "r" and \\'r ("""}, "is not a regular expression"),
        ({"rank_pattern": {"a r(": 3}}, "is not a regular expression"),
        ({"init_lora_weights": "bias r"}, "init_lora_weights='bias r' must be one of"),
        ({"layers_pattern": "r", "layers_to_transform": 1.5, "lora_dropout": 3}, "lora_dropout=3 must lie in"),
    ],
)
def test_only_sentences_about_a_field_of_another_type_are_left_out(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig(r="8", bias=0, **values)
    types, others = str(caught.value).split("bias=0 must be 'none', 'all' or 'lora_only'; ")
    assert "r='8' must be a whole number" in types
    assert words in others
    assert ";" not in others


@pytest.mark.parametrize(
    ("method", "given", "expected"),
    [
        (LoraConfig, {"r": np.int64(5), "lora_alpha": np.float32(2.5)}, {"r": 5, "lora_alpha": 2.5}),
        (LoraConfig, {"lora_alpha": 16, "lora_dropout": 0}, {"lora_alpha": 16, "lora_dropout": 0}),
        (LoraConfig, {"target_modules": {"v", "q"}}, {"target_modules": ("q", "v")}),
        (LoraConfig, {"target_modules": {"v": 1, "q": 2}.keys()}, {"target_modules": ("v", "q")}),
        (LoraConfig, {"modules_to_save": deque(["b", "a"])}, {"modules_to_save": ("b", "a")}),
        (LoraConfig, {"layers_to_transform": {11, 2}}, {"layers_to_transform": (2, 11)}),
        (LoraConfig, {"layers_to_transform": range(3)}, {"layers_to_transform": (0, 1, 2)}),
        (LoraConfig, {"layers_to_transform": np.arange(2)}, {"layers_to_transform": (0, 1)}),
        (LoraConfig, {"layers_to_transform": torch.tensor([1, 0])}, {"layers_to_transform": (1, 0)}),
        (LoraConfig, {"use_dora": np.bool_(True)}, {"use_dora": True}),
        (LoraConfig, {"layers_to_transform": np.int32(2)}, {"layers_to_transform": 2}),
        (LoraConfig, {"rank_pattern": {"q": np.int64(3)}}, {"rank_pattern": {"q": 3}}),
        (LoraConfig, {"trainable_token_indices": {"e": [np.int64(3)]}}, {"trainable_token_indices": {"e": (3,)}}),
        (LoraConfig, {"base_model_name_or_path": Path("a/b")}, {"base_model_name_or_path": "a/b"}),
        (BottleneckConfig, {"layers_to_transform": [1, 0]}, {"layers_to_transform": (1, 0)}),
        (VeraConfig, {"projection_prng_key": np.int64(7)}, {"projection_prng_key": 7}),
    ],
)
def test_what_means_the_same_is_taken_and_kept_as_plain_values(
    method: Any, given: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    config = method(**given)
    held = {name: getattr(config, name) for name in given}
    assert repr(held) == repr(expected)  # tells numpy's numbers from Python's
    config.save_pretrained(tmp_path)
    assert method.from_pretrained(tmp_path) == config


def test_settings_of_the_tokenizer_stay_as_they_were_given() -> None:
    given = {"additional_special_tokens": ["<a>"], "use_fast": False}
    config = PromptTuningConfig(
        num_virtual_tokens=5,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="a",
        tokenizer_name_or_path=Path("b"),
        tokenizer_kwargs=given,
    )
    assert (config.tokenizer_kwargs, config.tokenizer_name_or_path) == (given, "b")
