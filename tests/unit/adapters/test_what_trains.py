"""The parameters that train and their dtypes; gradients reach them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from veneer import (
    IA3Config,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from veneer.errors import ConfigError, TrainingError

from .conftest import close, exactly, logits

CONFIG = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
OTHER = LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
PEFTS = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"])


def test_only_the_adapter_trains(tiny: Any, ids: Tensor) -> None:
    model = get_peft_model(tiny(), CONFIG)
    model.train()
    model(ids, labels=ids).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name in model.state_dict() if ".adapters." in name}
    assert model.get_nb_trainable_parameters()[0] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_two_adapters_trained_together_each_drop_their_own_inputs(tiny: Any, ids: Tensor) -> None:
    model = get_peft_model(tiny(), LoraConfig(r=3, lora_dropout=0.5, init_lora_weights=False))
    model.add_adapter("b", LoraConfig(r=2, lora_dropout=0.25, init_lora_weights=False))
    model.set_adapter(["default", "b"])
    model.train()
    assert not torch.equal(logits(model, ids), logits(model, ids))
    model.eval()
    exactly(logits(model, ids), logits(model, ids))


def trains(model: Any) -> set[str]:
    """The adapters of which every parameter trains."""
    status = model.get_model_status().requires_grad
    assert "irregular" not in status.values()
    return {name for name, whether in status.items() if whether}


def test_the_active_adapter_trains_alone_as_in_peft(tiny: Any, ids: Tensor) -> None:
    ours, theirs = get_peft_model(tiny(), CONFIG, "a"), peft.get_peft_model(tiny(), PEFTS, "a")
    ours.add_adapter("b", OTHER)
    theirs.add_adapter("b", peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert trains(ours) == trains(theirs) == {"a"}
    for name in ("b", "a", "b"):
        ours.set_adapter(name)
        theirs.set_adapter(name)
        assert trains(ours) == trains(theirs) == {name}
    before = {name: p.clone() for name, p in ours.named_parameters()}
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.5)
    ours(ids, labels=ids).loss.backward()
    optimizer.step()
    moved = {name for name, p in ours.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".adapters.b." in name}
    ours.set_adapter(["a", "b"])
    assert trains(ours) == {"a", "b"}
    ours.delete_adapter("a")
    ours.rename_adapter("b", "c")
    ours.add_adapter("d", CONFIG)
    ours.delete_adapter("c")
    assert (trains(ours), ours.active_adapters) == ({"d"}, ["d"])


def test_what_was_loaded_frozen_stays_so(tiny: Any, tmp_path: Path) -> None:
    """Unless it is asked for: PEFT's set_adapter lets it train."""
    get_peft_model(tiny(), CONFIG).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny(), tmp_path)
    model.load_adapter(tmp_path, "trained", is_trainable=True)
    for active, expected in (("default", set()), ("trained", {"trained"}), ("default", set())):
        model.set_adapter(active)
        assert trains(model) == expected
    model.set_requires_grad(["default", "trained"])  # whether active or not
    assert trains(model) == {"default", "trained"}
    model.load_adapter(tmp_path, "default")
    assert trains(model) == {"default", "trained"}
    model.set_adapter("trained")
    model.set_requires_grad("default", False)
    model.set_adapter("default")
    assert trains(model) == set()


def test_what_was_frozen_by_hand_stays_so_while_it_is_active(tiny: Any) -> None:
    model = get_peft_model(tiny(), CONFIG)
    model.model.layers[0].self_attn.q_proj.adapters["default"]["lora_A"].requires_grad_(False)
    model.set_adapter("default")
    assert model.get_model_status().requires_grad == {"default": "irregular"}


def test_rows_of_a_batch_train_adapters_that_are_not_active_only_when_asked(tiny: Any, ids: Tensor) -> None:
    model = get_peft_model(tiny(), CONFIG, "a").train()
    model.add_adapter("b", IA3Config())
    rows = {"labels": ids, "adapter_names": ["a", "b"]}
    with pytest.raises(ConfigError, match=r"rows name \['b'\], which are frozen because they are not active"):
        model(ids, **rows)
    with torch.no_grad():
        model(ids, **rows)
    model.set_requires_grad(["a", "b"])
    model(ids, **rows).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_adapter_dtype(tiny: Any, tmp_path: Path) -> None:
    def dtypes(model: Any) -> set[torch.dtype]:
        return {p.dtype for p in model.parameters() if p.requires_grad}

    config = LoraConfig(r=3, modules_to_save=["lm_head"], bias="lora_only", target_modules=["embed_tokens", "q_proj"])
    wide = get_peft_model(tiny(dtype=torch.bfloat16), config)
    assert dtypes(wide) == {torch.float32}
    wide.save_pretrained(tmp_path)
    narrow = get_peft_model(tiny(dtype=torch.bfloat16), config, autocast_adapter_dtype=False)
    assert dtypes(narrow) == {torch.bfloat16}
    narrow.add_adapter("b", config, autocast_adapter_dtype=False)
    assert dtypes(narrow) == {torch.bfloat16}
    loaded = PeftModel.from_pretrained(
        tiny(dtype=torch.float16), tmp_path, is_trainable=True, autocast_adapter_dtype=False
    )
    assert dtypes(loaded) == {torch.float16}
    assert dtypes(get_peft_model(tiny(dtype=torch.float64), config)) == {torch.float64}


def test_a_step_that_would_train_nothing_is_an_error(tiny: Any, ids: Tensor, tmp_path: Path) -> None:
    get_peft_model(tiny(), CONFIG).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny(), tmp_path)
    assert not model.training
    model.train()
    with pytest.raises(TrainingError, match="every parameter of this model is frozen"):
        model(ids, labels=ids)
    with torch.no_grad():
        model(ids, labels=ids)
    model.set_requires_grad("default")
    model(ids, labels=ids).loss.backward()
    base = model.unload()
    base.train()
    base(ids, labels=ids)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_pass_checkpoints(before: bool, reentrant: bool, tiny: Any, ids: Tensor) -> None:
    def gradients(checkpoint: bool) -> dict[str, Tensor]:
        base = tiny()
        options = {"use_reentrant": reentrant}
        if checkpoint and before:
            base.gradient_checkpointing_enable(options)
        torch.manual_seed(4)
        model = get_peft_model(base, CONFIG)
        if checkpoint and not before:
            model.gradient_checkpointing_enable(options)
        model.train()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    for name, grad in plain.items():
        close(checkpointed[name], grad)
        assert grad.abs().max() > 0
