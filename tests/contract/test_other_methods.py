"""The laws on the methods that are not linear maps, found by walking the folder as for the linear ones."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import veneer
from models import gpt2_config
from veneer.contract import LinearMethod, MethodConfig, PrefixMethod, VirtualTokenMethod
from veneer.errors import CompositionError
from veneer.methods import all_methods
from veneer.model.attach.attach import live_parameters, stored_tensors

# Settings that make a method another one; any that a method does not have is left out.
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "after-attention": {"after_attention": True, "non_linearity": "swish", "size": 3},
    "parallel": {"placement": "parallel", "scaling": 4.0, "init_weights": "mam_adapter"},
    "made-by-an-mlp": {"prefix_projection": True, "encoder_hidden_size": 11},
    "made-by-an-lstm": {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 5},
    "from-the-vocabulary": {"prompt_tuning_init": "SAMPLE_VOCAB"},
    "of-a-higher-rank": {"num_ranks": 3, "num_tasks": 1},
}
NEEDED = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM", "reduction_factor": 4, "token_indices": [5, 8]}
NEEDED |= {"adapter_len": 3, "adapter_layers": 2, "cpt_token_ids": [5, 61, 2], "cpt_tokens_type_mask": [1, 2, 3]}
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 37, "num_hidden_layers": 2, "vocab_size": 67}
BASES: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2),
    "gpt2": gpt2_config(n_embd=64, n_head=4, n_positions=32, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0),
}
TOKENS = torch.tensor([[5, 61, 2, 33, 17], [8, 8, 40, 1, 66]])


def other_configs() -> dict[str, MethodConfig]:
    """Each method that is not linear, with each of the settings that it has."""
    found: dict[str, MethodConfig] = {}
    for name, cls in all_methods().items():
        accepted = inspect.signature(cls).parameters
        for label, settings in SETTINGS.items():
            if not issubclass(cls, LinearMethod) and settings.keys() <= accepted.keys():
                needed = {key: value for key, value in NEEDED.items() if key in accepted}
                found[f"{name}-{label}"] = cls(**needed, **settings)
    return found


CONFIGS = other_configs()
every_config = pytest.mark.parametrize("other", CONFIGS.values(), ids=CONFIGS)
every_base = pytest.mark.parametrize("base", BASES)


def make_base(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    torch.manual_seed(41)
    return AutoModelForCausalLM.from_config(BASES[name], dtype=dtype).eval()


def move(model: torch.nn.Module, seed: int = 43) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def trained(base: PreTrainedModel, config: MethodConfig) -> Any:
    torch.manual_seed(42)
    model = veneer.get_peft_model(base, config)
    move(model)
    return model.eval()


def logits(model: Any, tokens: Tensor = TOKENS, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, **options).logits


@every_base
@every_config
def test_saved_and_loaded_is_bit_equal(base: str, other: MethodConfig, tmp_path: Path) -> None:
    model = trained(make_base(base), other)
    model.save_pretrained(tmp_path)
    loaded = veneer.PeftModel.from_pretrained(make_base(base), tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    first, again = ((tmp_path / sub / "adapter_model.safetensors").read_bytes() for sub in ("", "again"))
    assert first == again
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-12, atol=1e-12)
    assert (logits(model) - logits(make_base(base))).abs().max() > 1e-3


@every_config
def test_declared_shapes_are_the_real_bytes(other: MethodConfig, tmp_path: Path) -> None:
    model = trained(make_base("llama"), other)
    model.save_pretrained(tmp_path)
    expected = {k: tuple(v.shape) for k, v in stored_tensors(model, model.adapter_state, "default").items()}
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        real = {key: tuple(file.get_tensor(key).shape) for key in file.keys()}  # noqa: SIM118 - not a mapping
        n_bytes = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    assert real == expected
    assert n_bytes == 8 * sum(torch.Size(shape).numel() for shape in real.values())


@every_config
def test_a_start_that_claims_identity_is_the_base(other: MethodConfig) -> None:
    model = veneer.get_peft_model(make_base("llama"), other).eval()
    claimed = other.identity_at_start or getattr(other, "init_weights", None) == "mam_adapter"
    assert torch.equal(logits(model), logits(make_base("llama"))) == claimed


@every_base
@every_config
def test_a_row_of_a_mixed_batch_equals_the_row_alone(base: str, other: MethodConfig) -> None:
    model = trained(make_base(base), other)
    alone, plain = logits(model), logits(make_base(base))
    mixed = logits(model, adapter_names=["default", "__base__"])
    torch.testing.assert_close(mixed[0], alone[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mixed[1], plain[1], rtol=1e-10, atol=1e-10)


@every_config
def test_gradients_are_those_of_the_forward_pass(other: MethodConfig) -> None:
    """A numeric derivative along a random direction of all parameters, in float64 throughout."""
    model = trained(make_base("gpt2"), other)
    values = {name: p for name, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(7)
    along = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in values.items()}
    readout = torch.randn(*TOKENS.shape, 67, generator=generator, dtype=torch.float64)
    (model(input_ids=TOKENS).logits * readout).sum().backward()
    wanted = sum(float((p.grad * along[n]).sum()) for n, p in values.items() if p.grad is not None)
    sides = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            for name, parameter in values.items():
                parameter += step * along[name]
        sides.append(float((logits(model) * readout).sum()))
    assert (sides[0] - sides[1]) / 2e-6 == pytest.approx(wanted, rel=1e-5)


@every_base
@every_config
def test_every_parameter_is_trained_and_the_base_is_not(base: str, other: MethodConfig) -> None:
    model = trained(make_base(base), other).train()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    live = live_parameters(model, model.adapter_state, "default").values()
    moving = [value for value in live if value.requires_grad]
    assert len(moving) == len(live) - len(other.packing.fixed)
    assert all(value.grad is not None and value.grad.abs().max() > 0 for value in moving)
    assert sum(p.grad is not None for p in model.parameters()) == len(moving)


@every_base
@every_config
def test_unloading_gives_back_the_base(base: str, other: MethodConfig) -> None:
    plain = make_base(base)
    keys = list(plain.state_dict())
    unloaded = trained(plain, other).unload()
    assert type(unloaded) is type(make_base(base))
    assert list(unloaded.state_dict()) == keys
    assert torch.equal(logits(unloaded), logits(make_base(base)))


@every_config
def test_it_is_merged_or_says_that_it_cannot_be(other: MethodConfig) -> None:
    model = trained(make_base("llama"), other)
    if other.changes_weights:
        expected = logits(model)
        torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-10, atol=1e-10)
        return
    with pytest.raises(CompositionError, match="cannot be"):
        model.merge_and_unload()


@every_config
def test_a_base_in_four_bits_is_the_dense_matrix_that_its_codes_stand_for(other: MethodConfig, tmp_path: Path) -> None:
    make_base("llama", torch.float32).save_pretrained(tmp_path)
    quantize = veneer.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    coded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantize).eval()
    dense = make_base("llama", torch.float32)
    with torch.no_grad():
        for path, layer in coded.named_modules():
            if hasattr(layer, "frozen_format"):
                dense.get_submodule(path).weight.copy_(layer.frozen_format().dense())
    results = [logits(trained(model, other)) for model in (coded, dense)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@every_config
def test_training_goes_on_from_a_checkpoint(other: MethodConfig, tmp_path: Path) -> None:
    """The parameters themselves come back bit for bit, those of a network too."""
    model = trained(make_base("llama"), other)
    model.save_pretrained(tmp_path / "checkpoint-5")
    other = veneer.PeftModel.from_pretrained(make_base("llama"), tmp_path / "checkpoint-5", is_trainable=True)
    before, after = (live_parameters(m, m.adapter_state, "default") for m in (model, other))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_all_kinds_of_method_are_walked() -> None:
    kinds = [PrefixMethod, VirtualTokenMethod]
    assert all(any(isinstance(config, kind) for config in CONFIGS.values()) for kind in kinds)
    assert {name.partition("-")[0] for name in CONFIGS} == {
        name for name, cls in all_methods().items() if not issubclass(cls, LinearMethod)
    }
