"""The settings that a run may go on with: what no weight depends on, and nothing else."""

from dataclasses import fields
from pathlib import Path

import pytest

from veneer.errors import ConfigError
from veneer.recipe.changes import (
    HARMLESS,
    LENGTH,
    WITHOUT_CHOICE,
    ChangedSetting,
    changes,
    is_longer,
    places_of,
    refuse,
)
from veneer.recipe.parts import DataPart, ModelPart
from veneer.recipe.recipe import Recipe, parse_recipe
from veneer.recipe.sweep_part import _located
from veneer.recipe.values import put, read_values
from veneer.train.config import SFTConfig


def recipe(**parts):
    values = {"model": {"source": "base"}, "data": {"train": "rows.jsonl"}, "output": "run", **parts}
    return parse_recipe(values)


def keys(before, now, places=None):
    return [change.key for change in changes(before, now, places)]


TRAINING = {
    "learning_rate": 3e-4, "lr_scheduler_type": "linear", "warmup_steps": 5, "max_steps": 7, "num_train_epochs": 3,
    "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_grad_norm": 0.7, "max_length": 71,
    "packing": True, "optim": "adamw_8bit", "weight_decay": 0.1, "data_seed": 5, "fused": "off", "bf16": False,
    "lora_plus": 7.0, "neftune_noise_alpha": 3.0, "eos_token": "<e>",
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 3),
        ("model.source", "other"),
        ("model.quantization", "nf4"),
        ("model.dtype", "bfloat16"),
        ("model.attention", "eager"),
        ("data.limit", 7),
        ("data.train_on", "everything"),
        ("adapter.lora_dropout", 0.2),
        *((f"training.{key}", value) for key, value in TRAINING.items()),
    ],
)
def test_what_the_weights_depend_on_is_a_change_with_both_values(key, value):
    values = {"model": {"source": "base"}, "data": {"train": "rows.jsonl"}, "output": "run"}
    put(values, key, value)
    (found,) = changes(recipe(), parse_recipe(values))
    assert (found.key, found.now) == (key, value)
    assert found.before != value
    assert changes(parse_recipe(values), parse_recipe(values)) == []


def test_a_default_that_is_written_out_is_no_change():
    assert keys(recipe(), recipe(training={"learning_rate": 2e-4, "max_grad_norm": 0.3})) == []


def test_the_default_rate_of_another_method_is_a_change_too():
    found = {change.key: change for change in changes(recipe(), recipe(adapter={"method": "full"}))}
    assert found["training.learning_rate"].now == 2e-5
    assert found["adapter.method"] == ChangedSetting("adapter.method", "lora", "full")


def test_when_it_is_evaluated_and_saved_counts_where_evaluations_choose():
    chosen = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 4, "save_steps": 8}
    data = {"train": "rows.jsonl", "eval_fraction": 0.2}
    assert keys(recipe(data=data), recipe(data=data, training={"eval_steps": 3, "save_steps": 5})) == []
    assert keys(
        recipe(data=data, training=chosen), recipe(data=data, training={**chosen, "eval_steps": 2, "save_steps": 4})
    ) == ["training.eval_steps", "training.save_steps"]
    patient = {"early_stopping_patience": 3}
    assert keys(recipe(data=data, training=patient), recipe(data=data, training={**patient, "eval_steps": 3})) == [
        "training.eval_steps"
    ]


def test_a_longer_run_is_the_same_run_where_no_rate_depends_on_its_length():
    short, long = ({"lr_scheduler_type": "constant", "max_steps": n} for n in (5, 11))
    assert keys(recipe(training=short), recipe(training=long)) == []
    assert is_longer(recipe(training=short), recipe(training=long))
    assert not is_longer(recipe(training=long), recipe(training=short))
    assert not is_longer(recipe(training=short), recipe(training={**short, "logging_steps": 3}))
    by_steps = [recipe(training={"max_steps": n, "num_train_epochs": 9 - n}) for n in (3, 4)]
    assert is_longer(*by_steps)
    assert not is_longer(*reversed(by_steps))
    assert is_longer(by_steps[0], recipe(training=short))
    ada = {"method": "adalora", "target_modules": "all-linear", "tinit": 2, "tfinal": 1}  # total_step is the length
    assert keys(recipe(training=short, adapter=ada), recipe(training=long, adapter=ada)) == ["training.max_steps"]
    coft = {"method": "oft", "target_modules": "all-linear", "coft": True}
    for free in (coft, ada | {"total_step": 20}):
        assert keys(recipe(training=short, adapter=free), recipe(training=long, adapter=free)) == []
        assert is_longer(recipe(training=short, adapter=free), recipe(training=long, adapter=free))


def test_the_same_place_by_another_name_is_no_change(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    before, places = recipe(), places_of(recipe().model_dump())
    assert places["model.source"] == str(tmp_path / "base")
    assert places["data.train"] == "rows.jsonl"
    monkeypatch.chdir(tmp_path / "elsewhere")
    moved = recipe(model={"source": "../base"})
    assert keys(before, moved, places) == []
    assert keys(before, moved) == ["model.source"]
    assert keys(before, recipe(model={"source": "base"}), places) == ["model.source"]


def test_every_key_that_is_called_harmless_exists():
    known = {f"training.{field.name}" for field in fields(SFTConfig)} | set(Recipe.model_fields)
    known |= {f"model.{key}" for key in ModelPart.model_fields} | {f"data.{key}" for key in DataPart.model_fields}
    assert known >= (HARMLESS | WITHOUT_CHOICE | LENGTH)


def test_all_changes_are_refused_together():
    refuse([], Path("run"))
    both = r"begun with different settings: 2 problems\n +a: 1 before, 2 now\n +b: x before, y now\n.*--allow-changes"
    with pytest.raises(ConfigError, match=both):
        refuse([ChangedSetting("a", 1, 2), ChangedSetting("b", "x", "y")], Path("run"))


def test_another_task_is_refused_alone():
    found = changes(recipe(), recipe(task="dpo"))
    with pytest.raises(ConfigError, match=r"^run holds a run of task sft, and this recipe is of task dpo: ") as told:
        refuse(found, Path("run"))
    assert "before" not in str(told.value)


def taught(teacher=None):
    given = {"teacher_prompt": "told.txt", **({} if teacher is None else {"teacher": teacher})}
    return recipe(task="distill", distill=given)


def test_a_teacher_is_compared_by_its_place_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("told.txt").write_text("b")
    Path("other").mkdir()
    before = places_of(taught().model_dump())
    assert "distill.teacher" not in before
    assert not keys(taught(), taught("base"), before)  # a run of a version without the key has no place of it
    assert not keys(taught("other"), taught("./other"), places_of(taught("other").model_dump()))
    assert keys(taught(), taught("other"), before) == ["distill.teacher"]


def test_the_teacher_base_is_no_folder_of_that_name(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "other").mkdir()
    file = tmp_path / "recipe.yaml"
    for name, meant in (("base", "base"), ("other", str(tmp_path / "other"))):
        file.write_text(f"distill: {{teacher: {name}}}")
        assert read_values(file)["distill"]["teacher"] == meant
        assert _located({"distill.teacher": name}, file) == {"distill.teacher": meant}
