"""A training run written down: a YAML file, checked as a whole before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from veneer.errors import ConfigError
from veneer.recipe.adapter import (
    FROM,
    FULL,
    adapter_config,
    adapter_problems,
    method_of,
    name_of,
    usual_learning_rate,
)
from veneer.recipe.advice import belongs, in_recipe_words, meant_quantization, value_problems
from veneer.recipe.keys import perhaps, typed
from veneer.recipe.metric_part import MetricPart, metric_problems
from veneer.recipe.optimizers import steps_in_backward
from veneer.recipe.source_part import SourcePart, source_problems, streaming_problems
from veneer.recipe.tasks import KEYS, Task, settings_of, task_of, task_problems, training_problems

# What needs torch or transformers is imported where it is used: a wrong recipe is told before seconds of imports.
if TYPE_CHECKING:
    from veneer.contract import MethodConfig

PLACES = (
    ("data", "train"),
    ("data", "eval"),
    ("data", "chat_template"),
    ("model", "source"),
    ("adapter", "from"),
)  # keys that may name a file
# What transformers, TRL and torch raise for settings that they do not take.
LIBRARY_ERRORS = (
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    ImportError,
    RuntimeError,
    OSError,
)
_ELSEWHERE = {
    "output_dir": "at the top, as output",
    "seed": "at the top, as seed",
    "resume_from_checkpoint": "as veneer train --resume, which goes on from the last one",
    "assistant_only_loss": "as data.train_on (answers or everything)",
    "completion_only_loss": "as data.train_on (answers or everything)",
    "reward_weights": "in rewards, as weight of each function",
}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelPart(_Part):
    """The base, and the storage of its frozen weights."""

    source: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["none", "nf4", "fp4", "int8"] = "none"
    double_quantization: bool = True
    float32_rest: bool = False
    attention: Literal["eager", "sdpa", "flash_attention_2"] | None = None


class DataPart(_Part):
    """The rows: their source, their reading, and the part of them that is trained."""

    train: str
    more: list[SourcePart] = []
    chat_template: str | None = None
    eval: str | None = None
    eval_fraction: float = Field(default=0.0, ge=0, lt=1)
    prompt: str | None = None
    completion: str | None = None
    chat: bool = False
    system: str | None = None
    train_on: Literal["answers", "everything"] = "answers"
    streaming: bool = False
    limit: int | None = Field(default=None, ge=1)
    eval_limit: int | None = Field(default=None, ge=1)

    @property
    def holds_out(self) -> bool:
        """True where rows are held out, in a file of their own or of the training rows."""
        return self.eval is not None or self.eval_fraction > 0

    @property
    def sources(self) -> dict[str, str]:
        """All sources of rows, by their keys in a recipe."""
        held_out = {} if self.eval is None else {"data.eval": self.eval}
        more = {f"data.more, entry {number}": each.source for number, each in enumerate(self.more, start=1)}
        return {"data.train": self.train, **more, **held_out}

    @property
    def missing_files(self) -> list[str]:
        """In words, the sources that are meant as files and are not there."""
        from veneer.data.files import is_missing, missing_told

        missing = {key: Path(source) for key, source in self.sources.items() if is_missing(source)}
        return [f"{key}: {missing_told(path)}" for key, path in missing.items()]


class Recipe(_Part):
    """All of a run. ``adapter`` holds ``method`` and fields of its config, or ``from``, the place of a saved adapter
    that is trained on; ``training`` holds fields of the task's config (`tasks.KEYS`), ``rewards`` reward functions.
    """

    task: Task = "sft"
    model: ModelPart
    data: DataPart
    adapter: dict[str, Any] = {"method": "lora"}
    training: dict[str, Any] = {}
    rewards: list[str | dict[str, Any]] = []
    metric: MetricPart | None = None
    output: str
    seed: int = 0

    @property
    def method(self) -> str:
        """The name of the method."""
        config = self.adapter_config() if FROM in self.adapter else None
        return method_of(self.adapter) if config is None else name_of(config)

    def adapter_config(self) -> MethodConfig | None:
        """The config of the adapter; None where the whole model is trained."""
        return adapter_config(self.adapter)

    def training_config(self, **changes: Any) -> Any:
        """The settings of the task's trainer, the recipe's defaults filled in."""
        kind = settings_of(self.task)
        given = typed(kind, self.training, [])
        return kind(output_dir=self.output, seed=self.seed, **{**_defaults(self), **given, **changes})

    def reward_functions(self) -> tuple[list[Any], list[float]]:
        """The functions of ``rewards`` with their weights. Raises ConfigError for those that cannot be found."""
        from veneer.recipe.rewards import reward_function

        named = [{"function": each} if isinstance(each, str) else dict(each) for each in self.rewards]
        weights = [float(each.pop("weight", 1.0)) for each in named]
        return [reward_function(each.pop("function"), each) for each in named], weights


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from YAML, with ``key.key=value`` overrides on top.

    Files that the recipe names are looked for beside it; files in overrides, and the output, in the working directory.
    Raises ConfigError with all problems at once; an unknown key is one, and names the nearest key that there is.
    """
    return parse_recipe(read_values(path, overrides), str(path))


def read_values(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The values of a recipe's file, with overrides on top, as `load_recipe` reads it; no value is checked yet."""
    try:
        values = _load_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ConfigError(f"the recipe {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values; `veneer train --print-recipe` shows one")
    for part, key in PLACES:
        section = values.get(part)
        if isinstance(section, dict) and key in section:
            section[key] = beside(path, section[key])
    if isinstance(values.get("rewards"), list):
        values["rewards"] = [_reward_beside(path, each) for each in values["rewards"]]
    _more_beside(path, values)
    for override in overrides:
        apply_override(values, override)
    return values


def _reward_beside(path: Path, reward: Any) -> Any:
    """The reward function of a file that lies beside the recipe, found from here; anything else as it is."""
    if isinstance(reward, dict) and "function" in reward:
        return {**reward, "function": _reward_beside(path, reward["function"])}
    if not isinstance(reward, str) or ".py:" not in reward:
        return reward
    file, _, name = reward.rpartition(":")
    return f"{beside(path, file)}:{name}"


def _more_beside(path: Path, values: Mapping[str, Any]) -> None:
    """Find the files of ``data.more`` beside the recipe."""
    more = _section(values, "data").get("more")
    for each in more if isinstance(more, list) else []:
        if isinstance(each, dict) and "source" in each:
            each["source"] = beside(path, each["source"])


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise ConfigError(
                    f"{self.name}, line {key.start_mark.line + 1}: the key {key.value} is there twice in one part; "
                    "keep one of the two"
                )
            seen |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
        return super().construct_mapping(node, deep)


def _load_yaml(text: str, name: str) -> Any:
    loader = _UniqueKeys(text)
    loader.name = name
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def beside(path: Path, value: Any) -> Any:
    """The name of a file that lies beside the recipe, found from here; anything else as it is."""
    return str(path.parent / value) if isinstance(value, str) and (path.parent / value).exists() else value


def parse_recipe(values: Mapping[str, Any], name: str = "recipe") -> Recipe:
    """A recipe from plain values. Raises ConfigError with all problems at once."""
    problems = [*_shape_problems(values), *_adapter_problems(values), *_training_problems(values)]
    if problems:
        raise ConfigError(f"{name}: " + "; ".join(problems))
    recipe, problems = Recipe.model_validate(values), value_problems(values)
    for build in (recipe.adapter_config, recipe.training_config, recipe.reward_functions):
        try:
            build()
        except ConfigError as error:
            problems.append(str(error))
        except LIBRARY_ERRORS as error:  # of transformers and TRL, about arguments
            problems.append(f"training: {in_recipe_words(str(error))}")
    if problems:
        raise ConfigError(f"{name}: " + "; ".join(dict.fromkeys(problems)))
    return recipe


def refuse_early(values: Mapping[str, Any], name: str = "recipe") -> None:
    """Raise what `parse_recipe` would, where that can be known without importing torch and transformers.

    Something is wrong outside of ``adapter`` and ``training``, and these hold nothing but keys of the commented recipe
    with values of its types, so that all problems are known.
    """
    problems = _shape_problems(values)
    if problems and _is_usual(values):
        raise ConfigError(f"{name}: " + "; ".join(problems))


def _is_usual(values: Mapping[str, Any]) -> bool:
    text = (resources.files("veneer.recipe") / "recipe.yaml").read_text(encoding="utf-8")
    usual = yaml.safe_load(re.sub(r"^( +)# (\w+: )", r"\1\2", text, flags=re.M))  # keys that are commented out too
    return method_of(_section(values, "adapter")) == "lora" and all(
        key in usual[part] and type(value) is type(usual[part][key])
        for part in ("adapter", "training")
        for key, value in _section(values, part).items()
    )


def _shape_problems(values: Mapping[str, Any]) -> list[str]:
    """All that is wrong but in ``adapter`` and ``training``."""
    found = []
    try:
        Recipe.model_validate(values)
    except ValidationError as error:
        found = [_told(dict(e)) for e in error.errors()]
    return [
        *found,
        *_model_problems(values),
        *_data_problems(values),
        *_reward_problems(values),
        *task_problems(values),
        *metric_problems(values),
    ]


def _section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name)
    return section if isinstance(section, dict) else {}


def _model_problems(values: Mapping[str, Any]) -> list[str]:
    model = _section(values, "model")
    quantization = model.get("quantization", "none")
    found = []
    if "float32_rest" in model and quantization == "none":
        found = ["model.float32_rest: read for a quantized base alone, and model.quantization is none; drop it"]
    if "double_quantization" not in model or quantization in ("nf4", "fp4"):
        return found
    return [
        *found,
        f"model.double_quantization: read for nf4 and fp4 alone, and model.quantization is {quantization}; drop it",
    ]


def _adapter_problems(values: Mapping[str, Any]) -> list[str]:
    given = _section(values, "adapter")
    found = adapter_problems(given)
    quantization = _section(values, "model").get("quantization", "none")
    if method_of(given) == FULL and quantization != "none":
        found.append(f"model.quantization: {quantization} weights are frozen, and method full trains them; use none")
    return found


def _training_problems(values: Mapping[str, Any]) -> list[str]:
    given, task = _section(values, "training"), task_of(values)
    found = [f"training.{key}: say it {where}" for key, where in _ELSEWHERE.items() if key in given]
    rest = {key: value for key, value in given.items() if key not in _ELSEWHERE}
    others = training_problems(task, rest)
    found += others.values()
    typed(
        settings_of(task),
        {key: value for key, value in rest.items() if key not in others},
        found,
        "training.",
        _from_elsewhere,
    )
    return found


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
    data = _section(values, "data")
    found = []
    if task_of(values) == "sft" and (data.get("prompt") is None) != (data.get("completion") is None):
        found.append("data: prompt and completion are templates that belong together; give both or neither")
    if data.get("eval") is not None and data.get("eval_fraction"):
        found.append("data: give eval (a file) or eval_fraction (a part of train), not both")
    if data.get("eval_limit") is not None and data.get("eval") is None:
        found.append("data.eval_limit: limits the rows of data.eval (a file), and there is none; drop it")
    return [*found, *source_problems(values), *streaming_problems(values)]


def _defaults(recipe: Recipe) -> dict[str, Any]:
    evaluates = recipe.data.holds_out
    return {
        "bf16": False if recipe.model.dtype == "float32" else None,  # None: under autocast, as TRL trains
        "learning_rate": usual_learning_rate(recipe.adapter) * KEYS[recipe.task].rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "max_grad_norm": 0.0 if steps_in_backward(recipe.training.get("optim")) else 0.3,
        "num_train_epochs": 1.0,
        "per_device_train_batch_size": 8,
        "logging_steps": 10,
        "save_steps": 200,
        "save_total_limit": 2,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": 200 if evaluates else None,
        "eval_on_start": evaluates and recipe.task == "sft",
        "gradient_checkpointing": False,
        "report_to": ["tensorboard"],
        **({"reward_weights": recipe.reward_functions()[1]} if recipe.rewards else {}),
    }


def _told(error: dict[str, Any]) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        parts: dict[str, type[BaseModel]] = {"model": ModelPart, "data": DataPart, "metric": MetricPart}
        known = Recipe.model_fields if len(error["loc"]) == 1 else parts[str(error["loc"][0])].model_fields
        known = SourcePart.model_fields if "more" in error["loc"] else known
        part, key = "" if len(error["loc"]) != 2 else str(error["loc"][0]), str(error["loc"][-1])
        return f"{path}: unknown key{belongs(key, part) or perhaps(key, known)}"
    if error["type"] == "missing":
        return f"{path}: is missing"
    meant = meant_quantization(error["input"]) if path == "model.quantization" else ""
    return f"{path}: {error['input']!r} does not fit ({error['msg']}){meant}"


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one ``key=value`` in the values of a recipe. Raises ConfigError."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r} must have the form key=value, such as training.learning_rate=1e-4")
    try:
        put(values, key, text if _is_text(key, text) else _load_yaml(text, "the value"))
    except ConfigError as error:
        raise ConfigError(f"--set {override!r}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML ({error})") from error


def _is_text(key: str, text: str) -> bool:
    """Return True if a value is taken as it stands: a key whose type is text, and neither quotes nor null around it."""
    part, _, name = key.rpartition(".")
    parts: dict[str, type[_Part]] = {"": Recipe, "model": ModelPart, "data": DataPart}
    field = parts[part].model_fields.get(name) if part in parts else None
    is_yaml = re.match(r"\s*(['\"]|(null|~)?\s*$)", text)
    return field is not None and field.annotation in (str, str | None) and not is_yaml


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set ``part.key`` in the values of a recipe. Raises ConfigError where the part is no part."""
    *parents, last = key.split(".")
    section = values
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise ConfigError(f"{parent} is a value, not a section")
    section[last] = value
