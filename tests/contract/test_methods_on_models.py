"""The laws on whole models: what is saved is what is loaded, sizes are what was declared, merging changes nothing."""

import functools
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import veneer
from models import gpt2_config, llama_config
from veneer.errors import CompositionError
from veneer.model.attach.attach import adapted_layers, live_parameters
from veneer.model.sites.places import placed_on

LLAMA = llama_config(hidden_size=28, num_attention_heads=7, attention_bias=True)
GPT2 = gpt2_config(n_embd=28, n_head=7, n_positions=32)  # its layers store Wᵀ
BASES = {"llama": LLAMA, "gpt2": GPT2}
every_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())
TOKENS = torch.tensor([[5, 61, 2, 33, 17], [8, 8, 40, 1, 66]])


def make_base(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(41)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model


def trained(base: PreTrainedConfig, config) -> PreTrainedModel:
    """A model with an adapter that is away from its start."""
    model = veneer.get_peft_model(make_base(base), config)
    torch.manual_seed(43)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def logits(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, **inputs).logits


@functools.cache
def plain_logits(name: str) -> Tensor:
    return logits(make_base(BASES[name]))


@dataclass(frozen=True)
class Saved:
    """A model with a trained adapter, which no test changes, its logits, and the folder that it was saved in."""

    model: PreTrainedModel
    logits: Tensor
    folder: Path


KEPT: dict[tuple[str, int], Saved] = {}


@pytest.fixture
def saved(base, config, tmp_path_factory) -> Saved:
    """Made of each base and method once, for all laws."""
    key = base.model_type, id(config)
    if key not in KEPT:
        model, folder = trained(base, config), tmp_path_factory.mktemp("saved")
        model.save_pretrained(folder)
        KEPT[key] = Saved(model, logits(model), folder)
    return KEPT[key]


@every_base
def test_saved_and_loaded_is_bit_equal(base, saved, tmp_path):
    loaded = veneer.PeftModel.from_pretrained(make_base(base), saved.folder)
    loaded.save_pretrained(tmp_path)
    first, again = ((folder / "adapter_model.safetensors").read_bytes() for folder in (saved.folder, tmp_path))
    assert first == again
    torch.testing.assert_close(logits(loaded), saved.logits, rtol=1e-12, atol=1e-12)
    assert (saved.logits - plain_logits(base.model_type)).abs().max() > 1e-3


@pytest.mark.in_turn(0, BASES)
def test_training_goes_on_from_what_was_saved(base, config, saved):
    """The trained form comes back bit for bit, whatever form the file has."""
    other = veneer.get_peft_model(make_base(base), config)
    other.load_adapter(saved.folder, "default", is_trainable=True)
    before, after = (live_parameters(m, m.adapter_state, "default") for m in (saved.model, other))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.in_turn(1, BASES)
def test_declared_shapes_are_the_real_bytes(base, saved):
    resolved = saved.model.peft_config["default"].packed()
    places = placed_on(make_base(base), resolved).values()
    declared = {place.keys[n]: shape for place in places for n, shape in resolved.shapes(place.site).items()}
    with safe_open(saved.folder / "adapter_model.safetensors", framework="pt") as file:
        tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118 - not a mapping
    shared = [] if resolved.shared is None else list(resolved.shared.draw().values())
    if shared and resolved.shared.is_repeated:
        shared *= 1 + len(places)
    assert sorted(tuple(value.shape) for value in tensors) == sorted(
        [*declared.values(), *(tuple(value.shape) for value in shared)]
    )
    n_declared = sum(torch.Size(shape).numel() for shape in declared.values())
    n_whole = sum(value.numel() for value in tensors if value.dtype == torch.int32)  # half as long as the others
    n_bytes = sum(value.nbytes for value in tensors)
    assert n_bytes == 8 * n_declared - 4 * n_whole + sum(value.nbytes for value in shared)


@every_base
def test_merged_equals_adapted(base, config, saved):
    if not config.changes_weights:
        with pytest.raises(CompositionError, match="no fixed weight has its effect"):
            trained(base, config).merge_and_unload()
        return
    merged = trained(base, config).merge_and_unload()
    assert not adapted_layers(merged)
    torch.testing.assert_close(logits(merged), saved.logits, rtol=1e-10, atol=1e-10)


@pytest.mark.in_turn(2, BASES)
def test_unloading_gives_back_the_base(base, config):
    assert torch.equal(logits(trained(base, config).unload()), plain_logits(base.model_type))


@every_base
def test_peft_computes_the_same_from_what_is_saved(base, config, peft_error, peft_inputs, saved):
    """Also from a start that PEFT would bake into the weight: what is written is plain LoRA."""
    if config.peft_type not in peft.PeftType.__members__:
        pytest.skip(f"PEFT has no {config.peft_type}")
    try:
        theirs = peft.PeftModel.from_pretrained(make_base(base), saved.folder, autocast_adapter_dtype=False).eval()
    except (TypeError, ValueError, NotImplementedError) as error:
        if not any(words in str(error) for words in ("Conv1D", "requires float32", "under float32")):
            raise
        pytest.skip(f"PEFT's {config.peft_type} does not adapt the layers of GPT-2, or no layers in float64")
    if not any(isinstance(module, BaseTunerLayer) for module in theirs.modules()):
        pytest.skip(f"PEFT's {config.peft_type} passes over the layers of GPT-2")
    found = logits(theirs, **peft_inputs)
    if config.by_sequence:  # in PEFT a row depends on the rows beside it
        with torch.no_grad():
            found = torch.cat([theirs(row[None]).logits for row in TOKENS])
    torch.testing.assert_close(found, saved.logits, rtol=peft_error, atol=peft_error)
