"""Poly against mixtures of skills and PEFT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor

from methods_in_peft import TARGETS, TOKENS, assert_equals_peft, base, every_base, near, site
from veneer import LoraConfig, PeftModel, PolyConfig, convert_to_lora, get_peft_model, save_as_lora
from veneer.errors import AdapterNameError, CompositionError, ConfigError, ShapeError, TargetError
from veneer.records.linear import fold_linear
from veneer.store.adapter.records import read_records

SETTINGS = {"n_skills": 3, "n_splits": 2, "task_type": "CAUSAL_LM"}  # PEFT's model of no task takes no task_ids
PEFT_INPUTS = {"task_ids": [0, 0]}
FIELDS = {"r": 3, "n_tasks": 3, "n_skills": 5, "n_splits": 2, "init_weights": False, "task_type": "CAUSAL_LM"}
CONFIG = PolyConfig(target_modules=TARGETS, **FIELDS)
IDS = torch.tensor([2, 0])


def tasked(config: PolyConfig = CONFIG) -> PeftModel:
    """Whose tasks differ."""
    torch.manual_seed(11)
    model = get_peft_model(base(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += torch.randn_like(parameter) if name.endswith("module_logits") else 0
    return model.eval()


def logits(model: PeftModel, tokens: Tensor = TOKENS, **inputs: object) -> Tensor:
    with torch.no_grad():
        return model(tokens, **inputs).logits


def test_each_split_mixes_the_skills_by_the_weights_of_the_task():
    config, place = PolyConfig(r=3, n_tasks=2, n_skills=5, n_splits=2), site("q_proj", 6, 4)
    a, b, weights = torch.randn(2, 5, 2, 3), torch.randn(2, 5, 3, 3), torch.randn(2, 10)
    params = {"poly_lora_A": a, "poly_lora_B": b, "module_logits": weights}
    share = weights[1].sigmoid().view(2, 5)
    share = share / share.sum(dim=1, keepdim=True)
    first, second = ([sum(share[q, s] * skills[q, s] for s in range(5)) for q in range(2)] for skills in (a, b))
    change = (torch.cat(first) @ torch.cat(second, dim=1) / 3).T
    w = torch.randn(6, 4)
    torch.testing.assert_close(fold_linear(config.lower(place, config.of_task(params, 1)), w)[0], w + change)


@every_base
@pytest.mark.parametrize("task", [0, 2])
def test_it_equals_peft(task, on, tmp_path):
    assert_equals_peft(PolyConfig, "PolyConfig", tmp_path, on, moved=True, task=task, **FIELDS)


def test_rows_of_different_tasks_equal_peft(tmp_path):
    model = tasked()
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path, is_trainable=True).eval()
    wanted = theirs(input_ids=TOKENS, task_ids=IDS, labels=TOKENS)
    found = model(input_ids=TOKENS, task_ids=IDS, labels=TOKENS)
    near(found.logits.detach(), wanted.logits.detach())
    how = {"input_ids": TOKENS, "task_ids": IDS, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**how), theirs.generate(**how))
    for each in (wanted, found):
        each.loss.backward()
    gradients = [
        {name.replace("adapters.default.", ""): p.grad for name, p in each.named_parameters() if p.grad is not None}
        for each in (model, theirs)
    ]
    plain = {name.removeprefix("base_model.model.").replace(".default", ""): g for name, g in gradients[1].items()}
    assert len(gradients[0]) == len(plain) == 18
    for name, gradient in gradients[0].items():
        near(gradient, plain[name.replace("module_logits", "poly_router.module_logits")])


def test_in_training_a_row_draws_as_in_peft(tmp_path):
    """Its weights of skills are relaxed Bernoulli variables, drawn at each layer."""
    tasked().save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path, is_trainable=True).train()
    model = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True).train()
    found = []
    for each in (model, theirs):
        torch.manual_seed(7)
        found.append(logits(each, TOKENS[:1], task_ids=IDS[:1]))
    near(*found)
    assert (found[0] - logits(model, TOKENS[:1], task_ids=IDS[:1])).norm() > 1e-3 * found[0].norm()
    torch.manual_seed(7)
    again = logits(model, TOKENS[:1], task_ids=IDS[:1])
    assert torch.equal(again, found[0])


def test_checkpointed_blocks_draw_the_same_again(tmp_path):
    model, gradients = tasked().train(), []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(7)
        model(TOKENS, labels=TOKENS, task_ids=IDS).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for first, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, first)


def test_a_row_in_a_batch_of_tasks_is_the_row_alone():
    model = tasked()
    model.add_adapter("lora", LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    tokens = torch.cat([TOKENS, TOKENS, TOKENS[:1]])
    names = ["default", "lora", "default", "default", "__base__"]
    mixed = logits(model, tokens, adapter_names=names, task_ids=[1, 0, 2, 1, 0])
    for row, (name, task) in enumerate(zip(names, (1, None, 2, 1, None), strict=True)):
        alone = {} if task is None else {"task_ids": [task]}
        near(mixed[row], logits(model, tokens[row : row + 1], adapter_names=[name], **alone)[0])


@pytest.mark.parametrize("beams", [1, 2])
def test_it_generates_for_each_row_by_its_task(beams):
    model, how = tasked(), {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    alone = [model.generate(row[None], task_ids=[task], **how) for row, task in zip(TOKENS, IDS.tolist(), strict=True)]
    assert torch.equal(model.generate(TOKENS, task_ids=IDS, **how), torch.cat(alone))
    assert not torch.equal(model.generate(TOKENS, task_ids=[0, 2], **how), torch.cat(alone))


@pytest.mark.parametrize("task", [0, 2])
def test_a_chosen_task_is_the_one_that_acts_merges_and_is_written_as_lora(task, tmp_path):
    model = tasked()
    wanted = logits(model, task_ids=[task, task])
    assert (wanted - logits(model, task_ids=[1, 1])).norm() > 1e-3 * wanted.norm()
    model.set_task(task)
    torch.testing.assert_close(logits(model), wanted)
    near(logits(model, task_ids=[1, 1]), logits(tasked(), task_ids=[1, 1]))
    assert save_as_lora(tmp_path, model).error == 0
    near(logits(PeftModel.from_pretrained(base(), tmp_path)), wanted)
    model.rename_adapter("default", "other")
    near(logits(model.merge_and_unload()), wanted)


def test_one_task_needs_no_name(tmp_path):
    model = tasked(replace(CONFIG, n_tasks=1))
    torch.testing.assert_close(logits(model), logits(model, task_ids=[0, 0]))
    model.save_pretrained(tmp_path)
    assert {record.rank for record in read_records(tmp_path).updates.values()} == {3}


def test_what_it_refuses(tmp_path: Path):
    model = tasked()
    model.save_pretrained(tmp_path)
    unnamed = r"POLY: the adapter has 3 tasks, .*; of a folder, write one: veneer export as-lora --task N"
    with pytest.raises(ConfigError, match=unnamed):
        model(TOKENS)
    with pytest.raises(ConfigError, match=unnamed):
        model.merge_adapter()
    with pytest.raises(ConfigError, match=unnamed):
        convert_to_lora(model)
    with pytest.raises(ConfigError, match=unnamed):
        read_records(tmp_path)
    with pytest.raises(ConfigError, match=r"task=3 is no task of the adapter 'default': it has the tasks 0 to 2"):
        model.set_task(3)
    with pytest.raises(ConfigError, match="task_ids holds 3"):
        model(TOKENS, task_ids=[0, 3])
    with pytest.raises(ShapeError, match="task_ids holds 1 tasks for a batch of 2 rows"):
        model(TOKENS, task_ids=[0])
    model.set_task(1)
    model.merge_adapter()
    with pytest.raises(CompositionError, match="are merged into the weights"):
        model(TOKENS, task_ids=IDS)
    with pytest.raises(AdapterNameError, match="cannot choose a task"):
        model.set_task(None)
    plain = get_peft_model(base(), LoraConfig(target_modules=TARGETS))
    with pytest.raises(ConfigError, match=r"'default' \(LORA\) has no tasks"):
        plain.set_task(0)
    with pytest.raises(TargetError, match=r"n_splits=5 does not divide the 24 inputs and 24 outputs .*divisor of 24"):
        get_peft_model(base(), replace(CONFIG, n_splits=5))
    with pytest.raises(ConfigError, match=r"r=0 must .*n_tasks=0 must .*n_skills=0 must .*n_splits=0 must"):
        replace(CONFIG, r=0, n_tasks=0, n_skills=0, n_splits=0)
