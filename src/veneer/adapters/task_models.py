"""PEFT's task classes of adapted models, for ``isinstance``, ``from_pretrained``, and calls that attach an adapter.

These classes are never added to a model's own class. The task is read from the adapter's config.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from veneer.adapters.peft_model import PeftModel, get_peft_model
from veneer.contract import MethodConfig
from veneer.contract.source import of_hub
from veneer.errors import ConfigError
from veneer.plain.tasks import TaskType


class ByTask(type):
    """Metaclass of the task classes. An adapted model is an instance of a task class if its first adapter is for that
    task.
    """

    def __call__(
        cls, model: nn.Module, peft_config: MethodConfig, adapter_name: str = "default", **options: Any
    ) -> PeftModel:
        """Call `get_peft_model` with a config for this task. Raises ConfigError for a config of another task."""
        return get_peft_model(model, _for_task(cls, peft_config), adapter_name, **options)

    def __instancecheck__(cls, instance: object) -> bool:
        if not isinstance(instance, PeftModel):
            return False
        return next((config.task_type for config in instance.peft_config.values()), None) == _task(cls)


class TaskModel(PeftModel):
    """Base of the task classes."""

    task: ClassVar[TaskType]

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: MethodConfig | None = None,
        **options: Any,
    ) -> PeftModel:
        """Load as `PeftModel.from_pretrained` does. Raises ConfigError for an adapter of another task."""
        config = _for_task(cls, config or MethodConfig.from_pretrained(model_id, **of_hub(options)))
        return PeftModel.from_pretrained(model, model_id, adapter_name, is_trainable, config, **options)


def _task(cls: type) -> TaskType:
    task: TaskType = vars(cls)["task"]
    return task


def _for_task(cls: type, config: MethodConfig) -> MethodConfig:
    if config.task_type not in (None, _task(cls)):
        raise ConfigError(
            f"{cls.__name__} is for task_type={_task(cls).value!r}, this adapter for {config.task_type!r}: use "
            "PeftModel, which takes any, or the class of that task"
        )
    return replace(config, task_type=_task(cls).value)


class PeftModelForCausalLM(TaskModel, metaclass=ByTask):
    """Adapted model for ``CAUSAL_LM``."""

    task = TaskType.CAUSAL_LM


class PeftModelForSeq2SeqLM(TaskModel, metaclass=ByTask):
    """Adapted model for ``SEQ_2_SEQ_LM``."""

    task = TaskType.SEQ_2_SEQ_LM


class PeftModelForSequenceClassification(TaskModel, metaclass=ByTask):
    """Adapted model for ``SEQ_CLS``."""

    task = TaskType.SEQ_CLS


class PeftModelForTokenClassification(TaskModel, metaclass=ByTask):
    """Adapted model for ``TOKEN_CLS``."""

    task = TaskType.TOKEN_CLS


class PeftModelForQuestionAnswering(TaskModel, metaclass=ByTask):
    """Adapted model for ``QUESTION_ANS``."""

    task = TaskType.QUESTION_ANS


class PeftModelForFeatureExtraction(TaskModel, metaclass=ByTask):
    """Adapted model for ``FEATURE_EXTRACTION``."""

    task = TaskType.FEATURE_EXTRACTION
