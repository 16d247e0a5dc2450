"""AdaLoRA equals PEFT's: outputs, the file, the budget and what it cuts, step by step."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from methods_in_peft import assert_convolutions_equal_peft
from models import llama_config
from veneer.adapters import schedules
from veneer.adapters.peft_model import PeftModel, get_peft_model
from veneer.errors import ConfigError, TargetError
from veneer.methods.adalora import AdaLoraConfig, orthogonality
from veneer.methods.lora import LoraConfig
from veneer.model.attach.attach import adapted_layers, live_parameters

IDS = torch.tensor([[5, 8, 13, 21, 34, 55]])
FIELDS = {
    "init_r": 5, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": 12, "lora_alpha": 7,
    "orth_reg_weight": 0.3, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM",
}  # fmt: skip


def base() -> PreTrainedModel:
    torch.manual_seed(0)
    config = llama_config(num_key_value_heads=3)
    return AutoModelForCausalLM.from_config(config).eval()


def pair() -> tuple[torch.nn.Module, PeftModel, dict[str, torch.nn.Parameter]]:
    """PEFT's model, ours with its values, and PEFT's parameters by our keys."""
    theirs = peft.get_peft_model(base(), peft.AdaLoraConfig(**FIELDS)).eval()
    torch.manual_seed(4)
    named = {n: p for n, p in theirs.named_parameters() if "lora_" in n}
    for parameter in named.values():
        parameter.data = 0.3 * torch.randn(parameter.shape)
    ours = get_peft_model(base(), AdaLoraConfig(**FIELDS)).eval()
    by_key = {n.removesuffix(".default"): p for n, p in named.items()}
    for key, value in live_parameters(ours, ours.adapter_state, "default").items():
        value.data.copy_(by_key[key].data)
    return theirs, ours, by_key


def layers_of(model: PeftModel) -> dict[str, dict[str, torch.Tensor]]:
    return {path: dict(layer.adapters["default"].named_parameters()) for path, layer in adapted_layers(model).items()}


def test_the_budget_cuts_the_same_triplets_as_pefts_at_every_step():
    theirs, ours, by_key = pair()
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.2) for m in (theirs, ours)]
    for step in range(1, 13):
        expected = theirs(input_ids=IDS, labels=IDS).loss
        found = ours.train()(input_ids=IDS, labels=IDS).loss
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        for loss, optimizer in zip((expected, found), optimizers, strict=True):
            loss.backward()
            optimizer.step()
        theirs.base_model.update_and_allocate(step)
        ours.update_and_allocate(step)
        for key, value in live_parameters(ours, ours.adapter_state, "default").items():
            torch.testing.assert_close(value, by_key[key], rtol=1e-4, atol=1e-6)
        for optimizer in optimizers:
            optimizer.zero_grad()
    kept = ours.adapter_state.schedules["default"].kept
    assert sum(int(value.sum()) for value in kept.values()) == 2 * 4
    assert sum(int((p["lora_E"] != 0).sum()) for p in layers_of(ours).values()) == 2 * 4


def test_what_peft_cut_is_read_and_trained_on(tmp_path: Path):
    """PEFT leaves cut triplets out of its file; the scale stays that of the rank at the start."""
    theirs, _, _ = pair()
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.2)
    for step in range(1, 13):
        theirs(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(base(), tmp_path / "theirs", is_trainable=True)
    sizes = [p["lora_E"].shape[0] for p in layers_of(ours).values()]
    assert sum(sizes) == 8
    assert len(set(sizes)) > 1
    expected = theirs(input_ids=IDS).logits
    torch.testing.assert_close(ours.eval()(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-6)
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    torch.testing.assert_close(back(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-6)
    ours.train()(input_ids=IDS, labels=IDS).loss.backward()
    ours.update_and_allocate(1)
    assert ours.adapter_state.schedules["default"].start == 8


def test_the_loss_in_evaluation_is_that_of_the_model_alone():
    """PEFT adds the penalty there too."""
    _, ours, _ = pair()
    plain = ours.eval()(input_ids=IDS, labels=IDS).loss
    pull = 0.3 * orthogonality(list(layers_of(ours).values()))
    torch.testing.assert_close(ours.train()(input_ids=IDS, labels=IDS).loss, plain + pull)


def test_a_budget_needs_a_number_of_steps():
    fields = {k: v for k, v in FIELDS.items() if k != "total_step"}
    model = get_peft_model(base(), AdaLoraConfig(**fields))
    with pytest.raises(ConfigError, match="total_step"):
        model.update_and_allocate(1)
    assert AdaLoraConfig(**fields).training.fields_for(31) == {"total_step": 31}
    with pytest.raises(ConfigError, match="leave none of total_step=4"):
        schedules.begin(model, model.adapter_state, n_steps=4)


def test_the_largest_rank_is_that_of_the_triplets_kept():
    kept = {"model.layers.0.self_attn.q_proj.lora_E": [True, False, True, True], "b.lora_E": [False, True, False, True]}
    assert AdaLoraConfig(**FIELDS).largest_rank == FIELDS["init_r"]
    assert AdaLoraConfig(**FIELDS, rank_pattern=kept).largest_rank == 3


def test_methods_without_a_schedule_say_so():
    model = get_peft_model(base(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="has a schedule, as AdaLoRA has"):
        model.update_and_allocate(1)


def test_outputs_and_file_equal_pefts(tmp_path: Path):
    theirs, ours, _ = pair()
    expected = theirs(input_ids=IDS).logits
    torch.testing.assert_close(ours(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-6)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "theirs")
    torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-6)
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    torch.testing.assert_close(back(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-6)


def test_all_wrong_values_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        AdaLoraConfig(
            init_r=0, beta1=1.0, orth_reg_weight=-1, lora_alpha=0, lora_dropout=1, bias="x", tinit=9, tfinal=3,
            total_step=12, rank_pattern={"q_proj.lora_E": 3},
        )  # fmt: skip
    for word in (
        "init_r=0",
        "beta1",
        "orth_reg",
        "lora_alpha=0",
        "lora_dropout=1",
        "'x'",
        "total_step=12",
        "rank_pattern",
    ):
        assert word in str(caught.value)


@pytest.mark.parametrize("init_r", [2, 1])
def test_a_budget_that_cuts_nothing_is_refused_where_it_would_begin(init_r: int, tmp_path: Path) -> None:
    """PEFT stops there too, with torch's words; an adapter of these settings can be used."""
    settings = FIELDS | {"init_r": init_r}
    model = get_peft_model(base(), AdaLoraConfig(**settings)).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    with pytest.raises(ConfigError, match=rf"init_r={init_r} must be above target_r=2, .* remove no rank"):
        model.update_and_allocate(3)
    theirs = peft.get_peft_model(base(), peft.AdaLoraConfig(**settings)).train()
    theirs(input_ids=IDS, labels=IDS).loss.backward()
    with pytest.raises(RuntimeError, match="out of range"):
        theirs.base_model.update_and_allocate(4)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path)(IDS).logits, model.eval()(IDS).logits)


def test_a_file_of_peft_that_holds_lora_s_own_rank_is_read(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="`r` is not used in AdaLora"):
        theirs = peft.get_peft_model(base(), peft.AdaLoraConfig(**FIELDS, r=16)).eval()
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if "lora_" in name:
                value.normal_(std=0.3)
    theirs.save_pretrained(tmp_path)
    assert '"r": 16' in (tmp_path / "adapter_config.json").read_text()
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(loaded(IDS).logits, theirs(IDS).logits)


def test_convolutions_equal_peft(tmp_path: Path) -> None:
    assert_convolutions_equal_peft(
        "AdaLoraConfig", tmp_path, init_r=3, lora_alpha=70, total_step=9, init_lora_weights=False
    )


def test_convolutions_in_groups_are_refused() -> None:
    with pytest.raises(TargetError, match="0 is a convolution in 2 groups, which this method cannot change"):
        get_peft_model(torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, groups=2)), AdaLoraConfig(target_modules=["0"]))
