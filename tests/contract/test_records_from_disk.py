"""The records read from a folder without a model are those of the adapter attached, bit for bit, for every method."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, PreTrainedModel

import veneer
from veneer.contract import LinearMethod, MethodConfig
from veneer.errors import CompositionError, FormatError
from veneer.model.adapted.parameters import AdaptedParameters
from veneer.model.attach.attach import adapted_layers, adapted_places
from veneer.model.sites.attended import AttendedPrompts
from veneer.model.sites.places import placed_on
from veneer.model.sites.prefix import PrefixAdapters
from veneer.model.sites.prompt import PromptAdapters
from veneer.model.sites.residual import ResidualAdapters
from veneer.records.deltas import LinearDelta
from veneer.store.adapter.config import read_config
from veneer.store.adapter.folder import NEEDS_BASE
from veneer.store.adapter.records import NeedsBaseError, Record, read_records, read_updates
from veneer.store.adapter.skeleton import places_in_base, without_storage

from .test_other_methods import CONFIGS as OTHERS

SIZES: dict[str, Any] = {"hidden_size": 28, "intermediate_size": 37, "num_hidden_layers": 2, "vocab_size": 67}
HEADS: dict[str, Any] = {"num_attention_heads": 7, "num_key_value_heads": 1}
BASES: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, **HEADS, attention_bias=True, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=67, n_embd=28, n_layer=2, n_head=7, n_positions=32),  # its layers store Wᵀ
    "mixtral": MixtralConfig(**SIZES, **HEADS, num_local_experts=3, num_experts_per_tok=2),
}


def make_base(name: str) -> PreTrainedModel:
    torch.manual_seed(41)
    model = AutoModelForCausalLM.from_config(BASES[name], dtype=torch.float64).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=0.3)
    return model


def saved(model: nn.Module, config: MethodConfig, folder: Path) -> Any:
    """A model with an adapter away from its start, which is written into the folder."""
    adapted = veneer.get_peft_model(model, config)
    torch.manual_seed(43)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    adapted.eval().save_pretrained(folder)
    return adapted


def attached_records(model: nn.Module) -> dict[str, Record]:
    """The adapter's meaning on the model, by the paths of `placed_on`."""
    found: dict[str, Record] = {}
    for path, place in adapted_places(model).items():
        if isinstance(place, AdaptedParameters):
            found |= {f"{path}.{key}": place.record(key, ("default",)) for key in place.changed("default")}
        elif isinstance(place, PrefixAdapters):
            found["input"] = place.records("default")
        elif isinstance(place, (ResidualAdapters, AttendedPrompts, PromptAdapters)):
            found[place.site.name] = place.record("default")
        elif "default" in place.adapters:
            found[path] = place.record("default")
    return found


def same(ours: Any, theirs: Any) -> None:
    """Equal bit for bit, part by part."""
    if isinstance(theirs, tuple):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            same(mine, other)
        return
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs)
        return
    assert type(ours) is type(theirs)
    if dataclasses.is_dataclass(theirs):
        for field in dataclasses.fields(theirs):
            same(getattr(ours, field.name), getattr(theirs, field.name))
    else:
        assert ours == theirs


def assert_the_law(base: str, config: MethodConfig, folder: Path) -> None:
    expected = attached_records(saved(make_base(base), config, folder))
    got = read_records(folder, placed_on(make_base(base), read_config(folder))).records
    assert expected or not config.samples
    assert got.keys() == expected.keys()
    with torch.no_grad():
        for path, record in expected.items():
            same(got[path], record)


@pytest.mark.in_turn(1, {"llama": "llama", "gpt2": "gpt2"})
def test_of_every_linear_method(base: str, config: MethodConfig, tmp_path: Path) -> None:
    assert_the_law(base, config, tmp_path)


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("base", ["gpt2"])
def test_of_every_other_method(base: str, other: MethodConfig, tmp_path: Path) -> None:
    assert_the_law(base, other, tmp_path)


def test_of_the_toy_method(toy: Any, tmp_path: Path) -> None:
    assert_the_law("llama", toy(strength=3.0), tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "bias": "all"},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 11]},
    ],
    ids=["tied", "embeddings", "biases", "rows"],
)
def test_of_lora_at_other_places(settings: dict[str, Any], tmp_path: Path) -> None:
    config = veneer.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **settings)
    model = saved(make_base("llama"), config, tmp_path)
    expected = attached_records(model)
    got = read_records(tmp_path, placed_on(make_base("llama"), read_config(tmp_path)))
    assert got.records.keys() == expected.keys()
    assert set(got.others) == set(load_file(tmp_path / "adapter_model.safetensors")) - {
        key for placed in got.places.values() for key in placed.keys.values()
    }
    for path, record in expected.items():
        same(got.records[path], record)


def test_of_experts_in_one_tensor(tmp_path: Path) -> None:
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = veneer.LoraConfig(r=3, target_modules=[], target_parameters=targets, init_lora_weights=False)
    assert_the_law("mixtral", config, tmp_path)
    with pytest.raises(CompositionError, match="does not tell the sizes"):
        read_records(tmp_path)


def test_shapes_that_a_base_does_not_have_are_told_of_the_base(tmp_path: Path) -> None:
    saved(make_base("llama"), veneer.LoraConfig(r=3, target_modules=["q_proj"]), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 7}))
    with pytest.raises(FormatError, match=r"does not fit the base: .* where its config on this base needs \(7, "):
        read_records(tmp_path, placed_on(make_base("llama"), read_config(tmp_path)))
    with pytest.raises(FormatError, match=r"does not fit adapter_config.json: .* where the config says \(7, "):
        read_records(tmp_path)


class Attending(nn.Module):
    """torch's own attention and a convolution, in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3)
        self.convolution = nn.Conv2d(6, 10, (2, 3), groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x)[0]


def test_of_attention_and_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(3)
    base = Attending().double()
    config = veneer.LoraConfig(r=4, lora_alpha=7, target_modules=["attention", "convolution"], init_lora_weights=False)
    state = {key: value.clone() for key, value in base.state_dict().items()}
    expected = attached_records(saved(base, config, tmp_path))
    again = Attending().double()
    again.load_state_dict(state)
    got = read_records(tmp_path, placed_on(again, read_config(tmp_path))).records
    assert got.keys() == expected.keys() == {"attention", "attention.out_proj", "convolution"}
    told = read_records(tmp_path).records
    for path, record in expected.items():
        same(got[path], record)
        same(told[path], record)


def test_what_a_file_tells_by_itself_is_the_same_but_for_the_bias(config: MethodConfig, tmp_path: Path) -> None:
    expected = attached_records(saved(make_base("gpt2"), config, tmp_path))
    if not config.changes_weights:
        with pytest.raises(CompositionError, match="is no update of linear layers"):
            read_updates(tmp_path)
        return
    tells_no_sizes = getattr(type(config), "site_of", None) is LinearMethod.site_of
    needs_base = config.peft_type in NEEDS_BASE
    if needs_base or getattr(read_config(tmp_path), "reads_weight", False) or tells_no_sizes:
        with pytest.raises(NeedsBaseError, match="give the base too"):
            read_updates(tmp_path)
        return
    got = read_updates(tmp_path).updates
    layers = adapted_layers(veneer.PeftModel.from_pretrained(make_base("gpt2"), tmp_path))
    assert got.keys() == expected.keys()
    for path, record in expected.items():
        assert isinstance(record, LinearDelta)
        assert torch.equal(got[path].added(), record.added())
        if record.bias is not None:
            torch.testing.assert_close(got[path].bias + layers[path].site(()).bias, record.bias)


def test_the_base_that_the_config_names_tells_the_shapes(toy: Any, tmp_path: Path) -> None:
    """Only its config is read: VeRA's update and a toy's need the widths of layers and no weight."""
    make_base("llama").save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    for name, config in {"vera": veneer.VeraConfig(r=5, target_modules=["q_proj"]), "toy": toy()}.items():
        base = make_base("llama")
        base.config._name_or_path = base.name_or_path = str(tmp_path / "base")
        expected = attached_records(saved(base, config, tmp_path / name))
        got = read_updates(tmp_path / name, places_in_base(tmp_path / name)).updates
        assert got.keys() == expected.keys()
        for path, record in expected.items():
            if record.low_rank is not None:
                assert torch.equal(got[path].low_rank.a, record.low_rank.a)
                assert torch.equal(got[path].low_rank.b, record.low_rank.b)


def test_a_model_without_storage_tells_the_places(config: MethodConfig) -> None:
    models = (without_storage(BASES["llama"], ()), make_base("llama"))
    meta, real = ({path: placed.keys for path, placed in placed_on(model, config).items()} for model in models)
    assert meta == real
    assert all(placed.site.weight is None for placed in placed_on(models[0], config).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [("drop", "lacks "), ("cut", r"does not fit the base: .* where its config on this base needs")],
)
def test_a_file_that_does_not_fit_the_places(change: str, message: str, tmp_path: Path) -> None:
    saved(make_base("llama"), veneer.LoraConfig(r=3, target_modules=["q_proj"]), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "lora_B" in key)
    value = tensors.pop(key)
    save_file(tensors if change == "drop" else {**tensors, key: value[1:].contiguous()}, file)
    with pytest.raises(FormatError, match=message):
        read_records(tmp_path, placed_on(make_base("llama"), read_config(tmp_path)))


def test_parameters_of_two_dtypes_meet_in_the_wider(tmp_path: Path) -> None:
    base = make_base("llama").float()
    model = saved(base, veneer.LoraConfig(r=3, target_modules=["q_proj"], use_dora=True), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: v.bfloat16() if "lora_A" in k else v for k, v in load_file(file).items()}, file)
    model.load_adapter(tmp_path, "default")
    places = placed_on(make_base("llama").float(), read_config(tmp_path))
    found = read_records(tmp_path, places).records
    expected = attached_records(model)
    assert found.keys() == expected.keys() != set()
    for path, record in found.items():
        same(record, expected[path])


def test_what_is_no_update_of_layers_says_so(tmp_path: Path) -> None:
    saved(make_base("llama"), veneer.BottleneckConfig(), tmp_path)
    with pytest.raises(CompositionError, match=r"\(BOTTLENECK\) is no update of linear layers"):
        read_updates(tmp_path)


def test_updates_beside_whole_parameters_need_the_base(tmp_path: Path) -> None:
    config = veneer.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])
    saved(make_base("llama"), config, tmp_path)
    told = (
        r"holds \S+ and 5 more, which are no pair of low-rank factors, and acts only together with its base\. Merge it"
    )
    with pytest.raises(CompositionError, match=told):
        read_updates(tmp_path)
