"""Any recipe: wrong types, absurd values and unknown names end in one of veneer's errors, or in a run."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from veneer.errors import VeneerError
from veneer.recipe.adapter import names_of
from veneer.recipe.methods import imported, named_methods
from veneer.recipe.metric_part import MetricPart
from veneer.recipe.parts import DataPart, ModelPart
from veneer.recipe.recipe import parse_recipe
from veneer.recipe.tasks import Task, settings_of
from veneer.train.run import run_recipe

# Values of which a test would wait for ever, or that leave the machine: their checks have tests of their own.
LEFT_OUT = {
    *("max_steps", "push_to_hub", "hub_model_id", "deepspeed", "fsdp", "fsdp_config", "torch_compile"),
    *("dataloader_num_workers", "dataset_num_proc", "use_cpu", "disable_tqdm", "logging_dir", "output_dir", "seed"),
    *("torch_compile_backend", "torch_compile_mode", "ddp_backend", "ddp_timeout", "local_rank", "data_seed"),
    *("accelerator_config", "parallelism_config", "full_determinism"),
    *("auto_find_batch_size", "max_completion_length", "num_iterations", "steps_per_generation"),
    "generation_batch_size",
}  # fmt: skip
ABSURD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([-(10**9), 2**63, 10**400]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from(["", "no", "off", "auto", "steps", "epoch", "1e-4", "nope", "all_linear", "q_proj", "(", "\x00"]),
    st.lists(st.sampled_from(["q_proj", "nope", 3, None]), max_size=2),
    st.dictionaries(st.sampled_from(["a", "min_lr", "use_reentrant"]), st.integers(-1, 2), max_size=2),
)  # fmt: skip
PARTS = ["learning_rate", "adapter", "training", "data", "metric", "rewards"]
METHODS = st.sampled_from([*names_of(imported().methods), "qlora", "nope"])


def keys_of(task: Task) -> list[str]:
    """The keys of a task's part ``training``."""
    return sorted({field.name for field in fields(settings_of(task)) if field.init} - LEFT_OUT)


@st.composite
def changes(draw: Any, task: Task = "sft") -> dict[str, Any]:
    """One to three keys with other values, an adapter's fields by its own method."""
    found: dict[str, Any] = {}
    method = draw(METHODS)
    own = [f.name for f in fields(named_methods()[method].config)] if method in named_methods() else ["r"]
    for _ in range(draw(st.integers(1, 3))):
        part, key = draw(
            st.one_of(
                st.tuples(st.just("training"), st.sampled_from([*keys_of(task), "lerning_rate"])),
                st.tuples(st.just("adapter"), st.sampled_from([*own, "path", "nope"])),
                st.tuples(st.just("model"), st.sampled_from([*ModelPart.model_fields, "nope"])),
                st.tuples(st.just("data"), st.sampled_from([*DataPart.model_fields, "nope"])),
                st.tuples(st.just("metric"), st.sampled_from([*MetricPart.model_fields, "nope"])),
                st.tuples(st.just(""), st.sampled_from(PARTS)),
            )
        )
        found[f"{part}.{key}"] = draw(ABSURD)
    return {**found, "adapter.method": method}


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    values = copy.deepcopy(values)
    for place, value in changes.items():
        part, _, key = place.rpartition(".")
        section = values if not part else values.setdefault(part, {})
        if isinstance(section, dict):
            section[key] = value
    return values


@pytest.fixture
def values(tmp_path: Path, make_model: Callable[..., Any], tokenizer: Any) -> dict[str, Any]:
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [
        {"prompt": f"the cat sat {n}", "completion": f" {c}"} for n, c in zip(("one", "two", "on"), "aba", strict=True)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "model": {"source": str(tmp_path / "base")},
        "adapter": {"method": "lora"},
        "data": {"train": str(tmp_path / "rows.jsonl"), "eval_fraction": 0.4},
        "training": {"max_steps": 1, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"},
        "output": str(tmp_path / "run"),
    }


@settings(max_examples=300, derandomize=True)
@given(changes())
def test_any_recipe_is_read_or_refused(values: dict[str, Any], changes: dict[str, Any]) -> None:
    with suppress(VeneerError):
        parse_recipe(changed(values, changes))


@settings(max_examples=60, derandomize=True)
@given(changes())
def test_any_recipe_that_is_read_runs_or_is_refused(values: dict[str, Any], changes: dict[str, Any]) -> None:
    assume(changes.keys().isdisjoint({".training", ".data"}))
    shutil.rmtree(values["output"], ignore_errors=True)
    with suppress(VeneerError):
        run_recipe(parse_recipe(changed(values, changes)))


ROWS: dict[Task, list[dict[str, Any]]] = {
    "dpo": [{"prompt": f"the cat {n}", "chosen": " on", "rejected": " two"} for n in ("one", "two", "on", "sat")],
    "kto": [{"prompt": "the cat", "completion": f" {n}", "label": n == "on"} for n in ("one", "two", "on", "sat")],
    "reward": [{"chosen": f"the cat {n}", "rejected": "the two"} for n in ("one", "two", "on", "sat")],
    "grpo": [{"prompt": f"the cat {n}", "answer": n} for n in ("one", "two", "on", "sat")],
}
OF_TASK: dict[Task, dict[str, Any]] = {
    "grpo": {"max_completion_length": 3, "num_generations": 2, "per_device_eval_batch_size": 2}
}


@pytest.mark.parametrize("task", ["dpo", "kto", "reward", "grpo"])
def test_any_recipe_of_another_task_runs_or_is_refused(values: dict[str, Any], task: Task, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS[task])))
    training = {**values["training"], "per_device_train_batch_size": 2, **OF_TASK.get(task, {})}
    recipe = {**values, "task": task, "training": training, **({"rewards": ["exact-match"]} if task == "grpo" else {})}
    run_recipe(parse_recipe(recipe))

    @settings(max_examples=12, derandomize=True)
    @given(changes(task))
    def runs_or_is_refused(changes: dict[str, Any]) -> None:
        assume(changes.keys().isdisjoint({".training", ".data"}))
        shutil.rmtree(values["output"], ignore_errors=True)
        with suppress(VeneerError):
            run_recipe(parse_recipe(changed(recipe, changes)))

    runs_or_is_refused()
