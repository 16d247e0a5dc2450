"""The most common complaints of users (docs/pains.md), as far as adapters, merging and the disk go."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, MixtralConfig, PreTrainedModel

import veneer
from veneer import (
    BitsAndBytesConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from veneer.errors import FormatError, TargetError
from veneer.ops.four_bit import FourBitLayout
from veneer.quant.four_bit import FourBitSpec

Make = Callable[..., PreTrainedModel]
Fill = Callable[..., None]
CONFIG = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"])


@pytest.fixture
def nf4(tiny: Make, tmp_path: Path) -> Callable[[], PreTrainedModel]:
    """A loader of the same model in NF4."""
    tiny().save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return lambda: AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=config, dtype=torch.bfloat16
    )


def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_pain_01_merging_into_a_4bit_base_keeps_the_update(nf4: Callable[[], PreTrainedModel]) -> None:
    """An update of a hundredth of the weight survives; rounding the sum to NF4 again would erase it."""
    model = get_peft_model(nf4(), LoraConfig(r=3, target_modules=["down_proj"], init_lora_weights=False))
    layer = model.model.layers[1].mlp.down_proj
    base = layer.frozen_format().dense(torch.float32)
    factors = layer.adapters["default"]
    with torch.no_grad():
        product = factors["lora_B"] @ factors["lora_A"] * (8 / 3)
        factors["lora_B"].mul_(0.01 * base.norm() / product.norm())
    update = (factors["lora_B"] @ factors["lora_A"] * (8 / 3)).detach()
    change = model.merge_and_unload().model.layers[1].mlp.down_proj.weight.float() - base
    spec = FourBitSpec(FourBitLayout(tuple(base.shape), "nf4", 64, torch.float32))
    rounded_again = spec.bind(spec.quantize(base + update)).dense(torch.float32) - base
    assert torch.cosine_similarity(change.flatten(), update.flatten(), dim=0) > 0.98
    assert torch.cosine_similarity(rounded_again.flatten(), update.flatten(), dim=0) < 0.5


def test_pain_02_tied_embeddings_stay_tied_and_off_the_disk(
    tiny: Make, ids: Tensor, randomize: Fill, tmp_path: Path
) -> None:
    model = get_peft_model(tiny("llama-tied"), CONFIG)
    randomize(model)
    wanted = logits(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    table = model.get_input_embeddings().weight
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not any("embed" in key or "head" in key for key in stored)
    merged = model.merge_and_unload()
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight is table
    merged.save_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), ids), wanted, atol=1e-5)


def test_pain_03_keys_that_do_not_load_are_counted_and_named(tiny: Make, tmp_path: Path) -> None:
    get_peft_model(tiny(), CONFIG).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    moved = [key for key in tensors if "layers.1.self_attn" in key]
    tensors |= {key.replace("self_attn", "attention"): tensors.pop(key) for key in moved}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FormatError) as told:
        PeftModel.from_pretrained(tiny(), tmp_path)
    for key in moved:
        assert key in str(told.value)
        assert key.replace("self_attn", "attention") in str(told.value)


def test_pain_04_targets_that_match_nothing_are_an_error_and_those_that_match_are_shown(
    tiny: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TargetError, match="q_prog"):
        get_peft_model(tiny(), LoraConfig(target_modules=["q_prog", "v_proj"]))
    sizes = {"hidden_size": 24, "intermediate_size": 13, "num_attention_heads": 3, "num_key_value_heads": 1}
    experts = MixtralConfig(vocab_size=31, num_hidden_layers=1, num_local_experts=2, **sizes)
    with pytest.raises(TargetError, match="gate_up_proj"):  # a 3-D parameter of the experts, not a module
        get_peft_model(AutoModelForCausalLM.from_config(experts), LoraConfig(target_modules=["q_proj", "gate_up_proj"]))
    stacked = LoraConfig(r=3, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    trained = gradients(get_peft_model(AutoModelForCausalLM.from_config(experts), stacked), torch.tensor([[3, 7, 11]]))
    assert any("experts" in name and gradient.any() for name, gradient in trained.items())
    get_peft_model(tiny(), CONFIG).print_trainable_parameters()
    shown = capsys.readouterr().out
    assert "q_proj" in shown
    assert "down_proj" in shown


WITHOUT = """
import sys
sys.modules["bitsandbytes"] = None
import torch
from veneer.ops.four_bit import FourBitLayout
from veneer.optim import AdamW8bit
from veneer.quant.four_bit import FourBitSpec
torch.manual_seed(0)
w = torch.randn(67, 71)
spec = FourBitSpec(FourBitLayout((67, 71), "nf4", 64, torch.float32), double_quant=True)
dense = spec.bind(spec.quantize(w)).dense(torch.float32)
assert (dense - w).norm() / w.norm() < 0.12, "quantized"
p = torch.nn.Parameter(w.clone())
optimizer = AdamW8bit([p], lr=1e-3)
for step in range(30):
    p.grad = torch.randn_like(p) * 10.0 ** (-step)
    optimizer.step()
assert p.isfinite().all() and not torch.equal(p, w), "trained"

from transformers import AutoModelForCausalLM
from veneer import BitsAndBytesConfig, LoraConfig, get_peft_model
options = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}
model = get_peft_model(AutoModelForCausalLM.from_pretrained(sys.argv[1], **options), LoraConfig(r=3)).train()
ids = torch.arange(10)[None]
optimizer, losses = AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-2), []
for _ in range(3):
    losses.append(model(ids, labels=ids).loss)
    losses[-1].backward()
    optimizer.step()
    optimizer.zero_grad()
assert losses[2] < losses[1] < losses[0], "trained in 4 bits"
assert sum(hasattr(m, "frozen_format") for m in model.modules()) == 2 * 7, "in 4 bits"
"""


def test_pain_07_four_bits_and_8bit_adamw_need_no_other_package(tiny: Make, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    script = [sys.executable, "-c", WITHOUT, str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_pain_08_adapters_on_a_4bit_base_are_float32_and_saved_whole(
    nf4: Callable[[], PreTrainedModel], ids: Tensor, tmp_path: Path
) -> None:
    model = get_peft_model(prepare_model_for_kbit_training(nf4()), CONFIG)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(model, ids).values())
    model.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(stored) == 2 * 2 * 2
    assert all(tensor.numel() for tensor in stored.values())
    key = next(iter(stored))
    save_file({**stored, key: stored[key].new_empty(0)}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(FormatError, match="shape"):
        PeftModel.from_pretrained(nf4(), tmp_path / "adapter")


@pytest.mark.parametrize(
    "config", [CONFIG, PromptTuningConfig(num_virtual_tokens=3), PrefixTuningConfig(num_virtual_tokens=3)]
)
def test_pain_09_what_was_saved_trains_on(
    config: Any, tiny: Make, ids: Tensor, randomize: Fill, tmp_path: Path
) -> None:
    model = get_peft_model(tiny(), config)
    randomize(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(), tmp_path, is_trainable=True)
    ours, theirs = gradients(again, ids), gradients(model, ids)
    assert sorted(ours) == sorted(theirs)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) and ours[name].any() for name in theirs)


def saved_bytes(model: Any, ids: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, without the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}  # the tensors too, so that no address is given out twice

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids, labels=ids)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_pain_10_dora_adds_less_than_half_of_pefts_memory_to_lora(tiny: Make, ids: Tensor) -> None:
    added = {}
    for library in (veneer, peft):
        used = []
        for use_dora in (False, True):
            config = library.LoraConfig(r=3, use_dora=use_dora, target_modules=["q_proj", "down_proj", "up_proj"])
            used.append(saved_bytes(library.get_peft_model(tiny(), config).train(), ids.repeat(1, 5)))
        added[library] = used[1] - used[0]
    assert added[veneer] < added[peft] / 2
    n_tokens, widths = 5 * ids.numel(), 2 * (40 + 40 + 53)
    outputs, scales = 4 * n_tokens * widths, 2 * 4 * widths  # what each layer gives before it is scaled; m and the norm
    assert added[veneer] <= outputs + scales


def test_pain_11_prefixes_take_checkpointing_4bit_bases_and_caches(
    nf4: Callable[[], PreTrainedModel], ids: Tensor, randomize: Fill
) -> None:
    model = get_peft_model(nf4(), PrefixTuningConfig(num_virtual_tokens=3))
    randomize(model)
    plain = gradients(model.train(), ids)
    model.gradient_checkpointing_enable()
    checkpointed = gradients(model, ids)
    assert all(torch.equal(checkpointed[name], gradient) and gradient.any() for name, gradient in plain.items())
    model.gradient_checkpointing_disable()
    answers = [
        model.eval().generate(
            ids, generation_config=GenerationConfig(max_new_tokens=4, pad_token_id=0, cache_implementation=cache)
        )
        for cache in (None, "static")
    ]
    assert torch.equal(*answers)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_pain_12_gradients_pass_checkpoints_under_a_frozen_input(
    reentrant: bool, before: bool, tiny: Make, ids: Tensor
) -> None:
    """Also where checkpointing is on before there is an adapter, and nobody lets gradients through the embeddings."""
    base, config = tiny(), LoraConfig(r=3, target_modules=["q_proj"])
    if before:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        base.disable_input_require_grads()  # which new versions of transformers enable along with it
    model = get_peft_model(base, config).train()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.fill_(0.1)
    if not before:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = gradients(model, ids)
    model.gradient_checkpointing_disable()
    wanted = gradients(model, ids)
    assert len(wanted) == 4
    assert all(torch.allclose(found[name], gradient, atol=1e-6) for name, gradient in wanted.items())


def test_pain_14_a_start_from_the_weight_leaves_the_base_alone(tiny: Make, ids: Tensor, randomize: Fill) -> None:
    base = tiny()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj"]), "plain")
    randomize(model)
    wanted = logits(model, ids)
    model.add_adapter("pissa", LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights="pissa"))
    assert torch.equal(logits(model, ids), wanted)
    after = model.unload().state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("variant", [{"use_rslora": True}, {"lora_bias": True}])
def test_pain_14_combining_is_the_sum_for_every_variant(variant: Any, tiny: Make, randomize: Fill) -> None:
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["up_proj"], **variant)
    model = get_peft_model(tiny(), config, "a")
    model.add_adapter("b", config)
    randomize(model)
    model.add_weighted_adapter(["a", "b"], [0.7, -0.3], "sum", "cat")
    base = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    change = {}
    for name in ("a", "b", "sum"):
        model.merge_adapter([name])
        change[name] = model.model.layers[0].mlp.up_proj.weight.detach() - base
        model.unmerge_adapter()
    assert change["a"].norm() > 0.01
    assert torch.allclose(change["sum"], 0.7 * change["a"] - 0.3 * change["b"], atol=1e-5)


def test_pain_15_adapters_train_together(tiny: Make, ids: Tensor, randomize: Fill) -> None:
    model = get_peft_model(tiny(), CONFIG, "a")
    model.add_adapter("b", LoraConfig(r=5, lora_alpha=3, target_modules=["q_proj"]))
    randomize(model)
    model.set_adapter(["a", "b"])
    found = gradients(model, ids)
    assert {name.split(".adapters.")[1].split(".")[0] for name, gradient in found.items() if gradient.any()} == {
        "a",
        "b",
    }
