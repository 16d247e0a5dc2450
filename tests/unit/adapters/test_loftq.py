"""LoftQ: on a base in 4 bits the factors start as the best approximation of what quantization lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from veneer import BitsAndBytesConfig, LoraConfig, PeftModel, get_peft_model, replace_lora_weights_loftq
from veneer.errors import ConfigError, FormatError
from veneer.model.attach.attach import adapted_layers

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
TARGETS = {"llama": ["q_proj", "up_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}


@pytest.fixture(params=TARGETS)
def quantized(request: Any, tiny: Any, tmp_path: Path) -> tuple[PreTrainedModel, PreTrainedModel, list[str], Path]:
    """The model in float32 and in NF4, what to adapt, and the folder."""
    base = tiny(request.param)
    base.save_pretrained(tmp_path)
    coded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**NF4)).eval()
    return base, coded, TARGETS[request.param], tmp_path


def lora(targets: list[str] | str, **settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 5, "lora_alpha": 13, "target_modules": targets} | settings)


def lost_of(base: PreTrainedModel, model: PeftModel, path: str) -> torch.Tensor:
    weight = base.get_submodule(path).weight.detach()
    quantized = adapted_layers(model)[path].site(()).weight.dense()
    return (weight.T if weight.shape != quantized.shape or "c_" in path else weight) - quantized


def test_the_factors_are_the_best_approximation_of_what_was_lost(quantized: Any) -> None:
    base, coded, targets, _ = quantized
    codes = {name: value.clone() for name, value in coded.state_dict().items()}
    model = get_peft_model(coded, lora(targets, rank_pattern={targets[1]: 3}))
    replace_lora_weights_loftq(model)
    for path, layer in adapted_layers(model).items():
        record = layer.record("default")
        u, s, vt = torch.linalg.svd(lost_of(base, model, path))
        r = record.rank
        torch.testing.assert_close(
            record.added(),
            (u[:, :r] * s[:r]) @ vt[:r],
            rtol=1e-4,
            atol=1e-6,
        )
    after = model.unload().state_dict()
    assert all(torch.equal(after[name], value) for name, value in codes.items())


def test_the_model_comes_nearer_to_the_one_before_quantization(quantized: Any, ids: Any, tmp_path: Path) -> None:
    base, coded, _, _ = quantized
    model = get_peft_model(coded, lora("all-linear", r=17))  # what is left alone stays as far off as it was
    with torch.no_grad():
        wanted, before = base(ids).logits, model(ids).logits
        replace_lora_weights_loftq(model)
        after = model(ids).logits
        assert (after - wanted).norm() < 0.9 * (before - wanted).norm()
        model.save_pretrained(tmp_path / "adapter")
        config = BitsAndBytesConfig(**NF4)
        again = AutoModelForCausalLM.from_pretrained(quantized[3], quantization_config=config).eval()
        assert torch.equal(PeftModel.from_pretrained(again, tmp_path / "adapter")(ids).logits, after)


def test_peft_decomposes_alike_where_the_scale_is_one(quantized: Any) -> None:
    """PEFT's alpha / r is not in its start: the two agree where it is 1."""
    from peft.utils.loftq_utils import _low_rank_decomposition

    base, coded, targets, _ = quantized
    model = get_peft_model(coded, lora(targets, lora_alpha=5))
    replace_lora_weights_loftq(model)
    for path, layer in adapted_layers(model).items():
        theirs = _low_rank_decomposition(lost_of(base, model, path), reduced_rank=5)
        record = layer.record("default")
        torch.testing.assert_close(
            record.added() / record.low_rank.scale, theirs["L"] @ theirs["R"], rtol=1e-4, atol=1e-6
        )
    assert peft.__version__


def test_a_callback_may_refuse_a_layer(quantized: Any) -> None:
    _, coded, targets, folder = quantized
    model, seen = get_peft_model(coded, lora(targets)), list[str]()
    first = next(iter(adapted_layers(model)))

    def keep(asked: torch.nn.Module, path: str) -> bool:
        assert asked is model
        seen.append(path)
        return path != first

    replace_lora_weights_loftq(model, folder, callback=keep)
    assert seen == list(adapted_layers(model))
    moved = {path: bool(layer.adapters["default"]["lora_B"].any()) for path, layer in adapted_layers(model).items()}
    assert moved == {path: path != first for path in seen}


def test_a_layer_that_lost_nothing_starts_without_an_update(quantized: Any, tmp_path: Path) -> None:
    base, coded, targets, _ = quantized
    model = get_peft_model(coded, lora(targets, init_lora_weights=False))
    layers = adapted_layers(model)
    exact = next(iter(layers))
    written = written_with_codes_of(base, model, [exact], tmp_path / "one")
    before = layers[exact].adapters["default"]["lora_A"].clone()
    replace_lora_weights_loftq(model, written)
    assert {path: bool(layer.record("default").added().any()) for path, layer in layers.items()} == {
        path: path != exact for path in layers
    }
    assert torch.equal(layers[exact].adapters["default"]["lora_A"], before)  # at zero, B would have no gradient


def test_an_error_at_any_layer_leaves_the_adapter_as_it_was(quantized: Any, tmp_path: Path) -> None:
    base, coded, targets, folder = quantized
    model = get_peft_model(coded, lora(targets, init_lora_weights=False))
    paths = list(adapted_layers(model))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole = load_file(folder / "model.safetensors")
    [last] = [name for name in whole if f"{paths[-1]}.weight".endswith(name)]
    no_last = {name: value for name, value in whole.items() if name != last}
    for name, tensors in {"codes": {**no_last, last: whole[last].char()}, "less": no_last}.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    wrong = {
        written_with_codes_of(base, model, paths, tmp_path / "all"): r"every layer of 'default': the files hold",
        tmp_path / "codes": rf"{paths[-1]}: the files hold the quantized weight itself.*model_path the folder",
        tmp_path / "less": last.rpartition(".")[0],
    }
    for place, told in wrong.items():
        with pytest.raises((ConfigError, FormatError), match=told):
            replace_lora_weights_loftq(model, place)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def written_with_codes_of(base: PreTrainedModel, model: PeftModel, paths: list[str], folder: Path) -> Path:
    """The folder of the base, in which the weights of some layers are exactly those that the codes stand for."""
    for path in paths:
        coded = adapted_layers(model)[path].site(()).weight.dense()
        base.get_submodule(path).weight.data = (coded.T if "c_" in path else coded).contiguous()
    base.save_pretrained(folder)
    return folder


def test_what_loftq_cannot_start_says_why(quantized: Any, tmp_path: Path) -> None:
    base, coded, targets, _ = quantized
    with pytest.raises(ConfigError, match="is quantized, so nothing was lost"):
        replace_lora_weights_loftq(get_peft_model(base, lora(targets)))
    model = get_peft_model(coded, lora(targets, use_dora=True))
    with pytest.raises(ConfigError, match="plain LoRA"):
        replace_lora_weights_loftq(model)
    wide = get_peft_model(model.unload(), lora(targets, r=3, rank_pattern={targets[0]: 41}))
    with pytest.raises(ConfigError, match=r"LoftQ: r=41 is more than the rank of a weight of shape"):
        replace_lora_weights_loftq(wide)
    plain = get_peft_model(wide.unload(), lora(targets))
    with pytest.raises(FormatError, match=r"neither model\.safetensors"):
        replace_lora_weights_loftq(plain, tmp_path / "nowhere")
