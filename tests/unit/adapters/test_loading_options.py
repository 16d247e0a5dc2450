"""Options of loading: other shapes, other names, a device; and configs on disk alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import veneer
from veneer import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_config,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from veneer.errors import ConfigError, DiskError, FormatError

CONFIG = LoraConfig(r=3, lora_alpha=7, target_modules=["0", "2"], init_lora_weights=False)
CONFIGS = [
    CONFIG,
    IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="SEQ_CLS"),
    VeraConfig(r=5, d_initial=0.3, save_projection=False),
    veneer.AdaLoraConfig(init_r=5, target_r=3, tinit=7, tfinal=11, total_step=101),
    PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=17),
    PromptTuningConfig(num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB"),
    PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=17),
]


def stack(n_out: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, n_out))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    get_peft_model(stack(), CONFIG).save_pretrained(tmp_path / "a")
    return tmp_path / "a"


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in get_peft_model_state_dict(model).items()}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.peft_type)
def test_a_config_is_written_and_read_alone(config: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path / "new" / "folder")
    assert type(config).from_pretrained(tmp_path / "new" / "folder") == config
    theirs = peft.PeftConfig.from_pretrained(str(tmp_path / "new" / "folder"))
    assert theirs.peft_type == config.peft_type
    assert theirs.inference_mode is config.inference_mode is False
    assert get_peft_config(config.to_dict()) == config
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = LoraConfig.from_pretrained(tmp_path / "theirs")  # whatever class is asked
    assert _unordered(again) == _unordered(config)


def _unordered(config: Any) -> dict[str, Any]:
    """The fields; PEFT keeps some lists as sets, and writes them in any order."""
    return {key: sorted(value) if isinstance(value, list) else value for key, value in config.to_dict().items()}


def test_a_config_that_cannot_be_written_or_understood_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot be made a folder"):
        CONFIG.save_pretrained(tmp_path / "file")
    with pytest.raises(FormatError, match=r"holds no adapter_config\.json"):
        LoraConfig.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"unknown arguments \['revison'\]"):
        LoraConfig.from_pretrained(tmp_path, revison="main")
    with pytest.raises(ConfigError, match=r"unknown key 'lora_alfa' .nearest: 'lora_alpha'"):
        get_peft_config({"peft_type": "LORA", "lora_alfa": 3})
    with pytest.raises(ConfigError, match="peft_type=None is not a known method"):
        get_peft_config({"r": 3})


def test_weights_without_a_model(folder: Path) -> None:
    held = load_peft_weights(folder, device="cpu")
    model = PeftModel.from_pretrained(stack(), folder)
    assert held.keys() == tensors(model).keys()
    assert all(torch.equal(held[key], value) for key, value in tensors(model).items())
    assert set(load_peft_weights(folder, device="meta")) == set(held)
    assert {value.device.type for value in load_peft_weights(folder, device="meta").values()} == {"meta"}
    renamed = load_peft_weights(folder, key_mapping={r"^0\.": "first.", "lora": "never reached"})
    assert "base_model.model.first.lora_A.weight" in renamed
    assert "base_model.model.2.never reached_A.weight" in renamed
    with pytest.raises(FormatError, match="gives two tensors the key"):
        load_peft_weights(folder, key_mapping={r"^\d": "x"})
    assert renamed.keys() == peft.load_peft_weights(
        str(folder), device="cpu", key_mapping={r"^0\.": "first.", "lora": "never reached"}
    ).keys()  # fmt: skip


def test_modules_under_other_names(folder: Path) -> None:
    base = nn.ModuleDict({"net": stack()})
    with pytest.raises(FormatError, match="unexpected"):
        PeftModel.from_pretrained(base, folder)
    model = PeftModel.from_pretrained(base, folder, key_mapping={"^": "net."})
    values = {key.replace("net.", ""): value for key, value in tensors(model).items()}
    assert all(torch.equal(values[key], value) for key, value in load_peft_weights(folder).items())
    model.load_adapter(folder, "second", key_mapping={"^": "net."})


def test_other_shapes_keep_what_was_there_where_that_is_asked(folder: Path) -> None:
    key, stored = "base_model.model.2.lora_B.weight", load_peft_weights(folder)
    with pytest.raises(FormatError, match=r"shape \(5, 3\), but the model needs \(13, 3\)"):
        PeftModel.from_pretrained(stack(13), folder)
    model = get_peft_model(stack(13), CONFIG)
    before = tensors(model)
    for result in (
        set_peft_model_state_dict(model, stored, ignore_mismatched_sizes=True),
        model.load_adapter(folder, "default", ignore_mismatched_sizes=True),
    ):
        assert result.missing_keys == [key]
        assert result.unexpected_keys == []
        after = tensors(model)
        assert torch.equal(after[key], before[key])
        assert all(torch.equal(after[other], stored[other]) for other in stored if other != key)
    with pytest.raises(FormatError, match="missing"):  # only shapes may differ
        set_peft_model_state_dict(model, {key: stored[key]}, ignore_mismatched_sizes=True)


def test_what_has_another_shape_starts_as_in_a_fresh_adapter(folder: Path) -> None:
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["0", "2"])
    model = PeftModel.from_pretrained(stack(13), folder, config=config, ignore_mismatched_sizes=True)
    assert not tensors(model)["base_model.model.2.lora_B.weight"].any()
    assert tensors(model)["base_model.model.0.lora_B.weight"].any()


@pytest.mark.parametrize("where", [None, "auto", "sequential", "cpu", torch.device("cpu"), {"": "cpu"}])
def test_an_adapter_goes_where_its_base_is(folder: Path, where: Any) -> None:
    model = PeftModel.from_pretrained(stack(), folder, device_map=where, torch_device="cpu", low_cpu_mem_usage=True)
    model.load_adapter(folder, "second", device_map=where)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("where", ["cuda:1", {"": "meta"}, {"0": "cpu", "2": "disk"}, "nowhere"])
def test_another_place_is_refused(folder: Path, where: Any) -> None:
    base = stack()
    with pytest.raises(ConfigError, match=r"differs from the base model's devices \['cpu'\]"):
        PeftModel.from_pretrained(base, folder, device_map=where)
    assert type(base) is nn.Sequential
    with pytest.raises(ConfigError, match="device_map"):
        get_peft_model(base, CONFIG).load_adapter(folder, "second", device_map=where)


def test_inference_mode_says_what_trains(folder: Path) -> None:
    def trained(model: nn.Module) -> set[str]:
        return {name.split("adapters.")[1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad}

    model = get_peft_model(stack(), CONFIG)
    model.add_adapter("second", CONFIG, low_cpu_mem_usage=True)
    model.set_adapter("second")
    assert trained(model) == {"second"}
    model.set_requires_grad("second", False)
    model.set_adapter("second")
    assert trained(model) == set()
    model.set_adapter("second", inference_mode=False)
    assert trained(model) == {"second"}
    model.set_adapter("default", inference_mode=True)
    assert trained(model) == set()
    assert model.active_adapters == ["default"]


def test_low_cpu_mem_usage_changes_nothing() -> None:
    made = []
    for low in (False, True):
        torch.manual_seed(3)
        model = get_peft_model(stack(), CONFIG, low_cpu_mem_usage=low)
        values = tensors(model)
        set_peft_model_state_dict(inject_adapter_in_model(CONFIG, stack(), low_cpu_mem_usage=low), values)
        made.append(values)
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])
