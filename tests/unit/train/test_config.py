"""Settings of a run: values that do not fit, or do not go together, are told at once."""

import pytest
from tests.unit.train.test_trainer import config

from veneer.errors import ConfigError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_checkpointing": "some"}, "must be True, False or 'selective'"),
        (
            {"gradient_checkpointing": "selective", "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "every_n_layers and nothing else",
        ),
        ({"gradient_checkpointing_kwargs": {"selective": True}}, "gradient_checkpointing is off"),
        ({"activation_offloading": "tape"}, "must be False, 'host' or 'disk'"),
        ({"activation_offloading": True}, "use 'disk'"),
    ],
)
def test_settings_of_activations_that_do_not_fit(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing": True, "packing_strategy": "wrapped"}, "see one another"),
        ({"packing": True, "max_length": None}, "needs max_length"),
        ({"max_length": 1}, "leaves nothing to predict"),
        ({"loss_type": "mse"}, "must be 'nll' or 'dft'"),
        ({"max_steps": 0}, "max_steps=0 must be at least 1, or -1"),
        ({"num_train_epochs": -1}, "num_train_epochs=-1 must be at least 0"),
        ({"learning_rate": -0.1}, "learning_rate=-0.1 must be at least 0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be at least 0"),
        ({"label_smoothing_factor": 1.0}, "label_smoothing_factor=1.0 must be at least 0 and below 1"),
        ({"label_smoothing_factor": -0.1}, "label_smoothing_factor=-0.1 must be at least 0 and below 1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 must be at least 1"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size=0 must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0 must be at least 1"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **changes)


def test_all_problems_of_a_config_are_told_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)wrapped.*needs max_length"):
        config(tmp_path, packing=True, packing_strategy="wrapped", max_length=None)


def test_an_unknown_choice_of_path_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="fused='fast' must be 'auto' or 'off'"):
        config(tmp_path, fused="fast")


def test_an_unquoted_off_in_yaml_means_off(tmp_path):
    assert config(tmp_path, fused=False).fused == "off"
