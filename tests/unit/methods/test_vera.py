"""VeRA equals PEFT's: outputs, gradients, and the file both ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from models import llama_config
from veneer.adapters.peft_model import PeftModel, get_peft_model
from veneer.errors import ConfigError, FormatError
from veneer.methods.vera import VeraConfig
from veneer.model.attach.attach import live_parameters
from veneer.ops.traced import Traced, tracing
from veneer.records.sites import LinearSite

IDS = torch.tensor([[5, 8, 13, 21, 34]])
FIELDS = {"r": 7, "d_initial": 0.3, "projection_prng_key": 11, "target_modules": ["q_proj", "down_proj", "k_proj"]}


def base() -> PreTrainedModel:
    torch.manual_seed(0)
    config = llama_config()
    return AutoModelForCausalLM.from_config(config).eval()


def theirs() -> torch.nn.Module:
    model = peft.get_peft_model(base(), peft.VeraConfig(**FIELDS)).eval()
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "vera_lambda" in name:
            parameter.data = torch.randn(parameter.shape)
    return model


@pytest.mark.parametrize("save_projection", [True, False])
def test_equals_peft_in_outputs_gradients_and_on_disk(save_projection: bool, tmp_path: Path):
    reference = theirs()
    reference.peft_config["default"].save_projection = save_projection
    expected = reference(input_ids=IDS, labels=IDS)
    expected.loss.backward()
    reference.save_pretrained(tmp_path / "theirs")
    model = PeftModel.from_pretrained(base(), tmp_path / "theirs", is_trainable=True)
    found = model(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    found.loss.backward()
    gradients = {n.replace(".default", ""): p.grad for n, p in reference.named_parameters() if p.grad is not None}
    live = live_parameters(model, model.adapter_state, "default")
    assert live.keys() == gradients.keys()
    for key, value in live.items():
        torch.testing.assert_close(value.grad, gradients[key], rtol=1e-4, atol=1e-6)
    model.save_pretrained(tmp_path / "ours")
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    back = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    torch.testing.assert_close(back(input_ids=IDS).logits, expected.logits, rtol=1e-5, atol=1e-5)


def test_matrices_that_peft_has_rounded_to_the_dtype_of_its_base_are_taken(tmp_path: Path):
    reference = peft.get_peft_model(base().bfloat16(), peft.VeraConfig(**FIELDS)).eval()
    torch.manual_seed(4)
    for name, parameter in reference.named_parameters():
        if "vera_lambda" in name:
            parameter.data = torch.randn(parameter.shape)
    reference.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(base().bfloat16(), tmp_path)
    found, expected = (each(input_ids=IDS).logits.float() for each in (model, reference))
    assert (found - expected).norm() <= 0.02 * expected.norm()


def test_all_layers_share_one_pair_of_matrices_and_the_start_is_the_base():
    model = get_peft_model(base(), VeraConfig(**FIELDS))
    assert torch.equal(model(input_ids=IDS).logits, base()(input_ids=IDS).logits)
    assert model.get_nb_trainable_parameters()[0] == 2 * ((24 + 7) + (24 + 7) + (8 + 7))


def test_matrices_that_the_key_does_not_give_are_an_error(tmp_path: Path):
    get_peft_model(base(), VeraConfig(**FIELDS)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.vera_A"] = tensors["base_model.vera_A"] + 1
    save_file(tensors, file)
    with pytest.raises(FormatError, match=r"differs from what projection_prng_key=11 draws: base_model\.vera_A$"):
        PeftModel.from_pretrained(base(), tmp_path)
    tensors["base_model.vera_A"] = tensors["base_model.vera_A"][:, 1:].contiguous()
    save_file(tensors, file)
    with pytest.raises(FormatError, match=r"shape \(7, 36\), but the model needs \(7, 37\): base_model\.vera_A$"):
        PeftModel.from_pretrained(base(), tmp_path)


@pytest.mark.parametrize("change", [lambda a: a + 1, lambda a: a[:, 1:]], ids=["values", "shape"])
def test_matrices_beside_a_config_that_does_not_keep_them(change: Callable[[Tensor], Tensor], tmp_path: Path):
    """PEFT warns and takes those that the key gives; so it is here where they are the same. Others are an error."""
    get_peft_model(base(), VeraConfig(**FIELDS)).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"save_projection": true', '"save_projection": false'))
    with pytest.warns(UserWarning, match="Specified to not load vera_A"):
        reference = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    model = PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(model(input_ids=IDS).logits, reference(input_ids=IDS).logits)
    model.save_pretrained(tmp_path / "again")
    assert not any("vera_A" in key for key in load_file(tmp_path / "again" / "adapter_model.safetensors"))

    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "base_model.vera_A": change(tensors["base_model.vera_A"]).contiguous()}, file)
    with pytest.raises(FormatError, match=r"differs from what projection_prng_key=11 draws: base_model\.vera_A$"):
        PeftModel.from_pretrained(base(), tmp_path)


def test_a_file_that_should_hold_the_matrices_and_does_not_is_an_error_as_in_peft(tmp_path: Path):
    get_peft_model(base(), VeraConfig(**FIELDS, save_projection=False)).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"save_projection": false', '"save_projection": true'))
    with pytest.raises(ValueError, match="were not present"):
        peft.PeftModel.from_pretrained(base(), tmp_path)
    with pytest.raises(FormatError, match=r"missing: base_model\.vera_A\n  missing: base_model\.vera_B$"):
        PeftModel.from_pretrained(base(), tmp_path)


def test_adapters_with_other_keys_act_side_by_side():
    """PEFT, which keeps one pair of matrices for the model, refuses the second."""
    other = {**FIELDS, "projection_prng_key": 5}
    reference = peft.get_peft_model(base(), peft.VeraConfig(**FIELDS))
    with pytest.raises(ValueError, match="PRNG initialisation key must be the same"):
        reference.add_adapter("b", peft.VeraConfig(**other))
    model, alone = (get_peft_model(base(), VeraConfig(**FIELDS)), get_peft_model(base(), VeraConfig(**other), "b"))
    model.add_adapter("b", VeraConfig(**other))
    for each in (model, alone):
        each.set_adapter("b")
        for layer in each.modules():
            if hasattr(layer, "adapters"):
                layer.adapters["b"]["vera_lambda_b"].data.fill_(0.7)
    assert torch.equal(model(input_ids=IDS).logits, alone(input_ids=IDS).logits)
    model.set_adapter("default")
    assert torch.equal(model(input_ids=IDS).logits, base()(input_ids=IDS).logits)


def test_all_wrong_values_are_named_at_once():
    with pytest.raises(ConfigError, match=r"bias='some' .*r=0 .*vera_dropout=1.*d_initial=0"):
        VeraConfig(r=0, vera_dropout=1, d_initial=0, bias="some")


def test_a_first_pass_in_inference_mode_leaves_training_possible():
    model = get_peft_model(base(), VeraConfig(**FIELDS | {"projection_prng_key": 29}))
    with torch.inference_mode():
        model(input_ids=IDS)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "vera_lambda_b" in name)


def test_a_traced_step_leaves_no_projections_without_values():
    """A plan before a run, in one process."""
    config, params = VeraConfig(r=3, projection_prng_key=4242), {"vera_lambda_b": torch.ones(7)}
    params["vera_lambda_d"] = torch.ones(3)
    site = LinearSite(name="q_proj", in_features=5, out_features=7)
    with tracing():
        assert isinstance(config.lower(site, params).low_rank.a, Traced)
    assert type(config.lower(site, params).low_rank.a) is torch.Tensor
