"""Finds the problems of a recipe that its values alone reveal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from veneer.plain.refusals import allowed, unfit
from veneer.recipe.adapter import FULL, adapter_problems, method_of
from veneer.recipe.advice import belongs, meant_quantization
from veneer.recipe.distill_checks import distill_problems
from veneer.recipe.distributed_part import DistributedPart, layout_problems
from veneer.recipe.key_checks import perhaps, typed
from veneer.recipe.known import KnownKeys
from veneer.recipe.metric_part import MetricPart, metric_problems
from veneer.recipe.parts import DataPart, DistillPart, ModelPart, RolloutsPart, Written
from veneer.recipe.ranges import out_of_range
from veneer.recipe.source_part import SourcePart, source_problems, streaming_problems
from veneer.recipe.tasks import OF_ANSWERS, task_of, task_problems, training_problems
from veneer.recipe.values import section

ELSEWHERE = {
    "output_dir": "at the top, as output",
    "seed": "at the top, as seed",
    "resume_from_checkpoint": "as veneer train --resume, which goes on from the last one",
    "assistant_only_loss": "as data.train_on (answers or everything)",
    "completion_only_loss": "as data.train_on (answers or everything)",
    "reward_weights": "in rewards, as weight of each function",
    "teacher": "in distill, as teacher",
    "teacher_prompt": "in distill, as teacher_prompt (a file)",
    "rollout_engine": "in rollouts, as engine",
    "rollout_journal": "in rollouts, as journal",
    "rollout_memory": "in rollouts, as memory",
}

NOWHERE = {
    "trust_remote_code": "no code that lies beside a model is run",
    "label_names": "a task's rows name their labels",
    "length_column_name": "lengths are counted from the rows",
    "logging_nan_inf_filter": "a run ends at the first loss that is not finite",
    "debug": "a run ends at the first loss or gradient that is not finite",
    "dataset_kwargs": "data says how rows become tokens",
    "do_train": "veneer train trains",
    "do_predict": "veneer generate answers",
}
"""Fields of the trainers' configs that would change nothing in a run, and the reason of each."""


def problems_of(values: Mapping[str, Any], known: KnownKeys) -> list[str]:
    """Return all problems that the values and the keys of methods and trainers reveal."""
    return [*_shape_problems(values), *_adapter_problems(values, known), *_training_problems(values, known)]


def _shape_problems(values: Mapping[str, Any]) -> list[str]:
    """Return the problems of keys and values in all parts of a recipe except ``adapter`` and ``training``."""
    found = []
    try:
        Written.model_validate(values)
    except ValidationError as error:
        found = [_told(dict(e)) for e in error.errors()]
    return [
        *found,
        *_model_problems(values),
        *_data_problems(values),
        *_reward_problems(values),
        *task_problems(values),
        *metric_problems(values),
        *distill_problems(values),
        *layout_problems(values),
    ]


def _model_problems(values: Mapping[str, Any]) -> list[str]:
    model = section(values, "model")
    quantization = model.get("quantization", "none")
    found = []
    if "float32_rest" in model and quantization == "none":
        found = ["model.float32_rest: it applies only to a quantized base, and model.quantization is none; drop it"]
    if "double_quantization" not in model or quantization in ("nf4", "fp4"):
        return found
    return [
        *found,
        f"model.double_quantization: it applies only to nf4 and fp4, and model.quantization is {quantization}; drop it",
    ]


def _adapter_problems(values: Mapping[str, Any], known: KnownKeys) -> list[str]:
    given = section(values, "adapter")
    found = adapter_problems(given, known.methods)
    quantization = section(values, "model").get("quantization", "none")
    if method_of(given) == FULL and quantization != "none":
        found.append(f"model.quantization: {quantization} weights are frozen, and method full trains them; use none")
    return found


def _training_problems(values: Mapping[str, Any], known: KnownKeys) -> list[str]:
    given, task = section(values, "training"), task_of(values)
    found = [f"training.{key}: set it {where}" for key, where in ELSEWHERE.items() if key in given]
    found += [f"training.{key}: has no effect: {reason}; drop it" for key, reason in NOWHERE.items() if key in given]
    rest = {key: value for key, value in given.items() if key not in ELSEWHERE | NOWHERE}
    others = training_problems(task, rest, known.settings)
    found += others.values()
    own = {key: value for key, value in rest.items() if key not in others}
    read = typed(known.settings(task), own, found, "training.", _from_elsewhere)
    return found + [f"training.{key}: {read[key]!r} must be {wanted}" for key, wanted in out_of_range(read).items()]


def _from_elsewhere(key: str) -> str:
    return belongs(key, "training")


def _reward_problems(values: Mapping[str, Any]) -> list[str]:
    given = values.get("rewards")
    found = []
    for number, each in enumerate(given if isinstance(given, list) else [], start=1):
        if isinstance(each, dict) and not isinstance(each.get("function"), str):
            found.append(f"rewards, entry {number}: its function is missing, such as exact-match or module:function")
        if isinstance(each, dict) and not isinstance(each.get("weight", 1.0), int | float):
            found.append(f"rewards, entry {number}: weight {each['weight']!r} must be a number")
    return found


def _data_problems(values: Mapping[str, Any]) -> list[str]:
    data = section(values, "data")
    found = []
    if task_of(values) in OF_ANSWERS and (data.get("prompt") is None) != (data.get("completion") is None):
        found.append("data: prompt and completion are templates that belong together; give both or neither")
    if data.get("eval") is not None and data.get("eval_fraction"):
        found.append("data: give eval (a file) or eval_fraction (a part of train), not both")
    if data.get("eval_limit") is not None and data.get("eval") is None:
        found.append("data.eval_limit: limits the rows of data.eval (a file), and there is none; drop it")
    return [*found, *source_problems(values), *streaming_problems(values)]


def _told(error: dict[str, Any]) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        parts: dict[str, type[BaseModel]] = {
            "model": ModelPart,
            "data": DataPart,
            "metric": MetricPart,
            "distributed": DistributedPart,
            "rollouts": RolloutsPart,
            "distill": DistillPart,
        }
        known = Written.model_fields if len(error["loc"]) == 1 else parts[str(error["loc"][0])].model_fields
        known = SourcePart.model_fields if "more" in error["loc"] else known
        part, key = "" if len(error["loc"]) != 2 else str(error["loc"][0]), str(error["loc"][-1])
        return f"{path}: unknown key{belongs(key, part) or perhaps(key, known)}"
    if error["type"] == "missing":
        return f"{path}: {allowed([error])}"
    meant = meant_quantization(error["input"]) if path == "model.quantization" else ""
    return f"{path}: {unfit(error['input'], [error])}{meant}"
