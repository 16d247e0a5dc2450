"""Reward models, on TRL's trainer: a sequence classifier with one output, adapted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import trl
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from veneer.adapters.peft_model import PeftModel
from veneer.contract import MethodConfig
from veneer.data.preference import checked_rows
from veneer.errors import ConfigError
from veneer.plain.tasks import TaskType
from veneer.train.config import RunSettings
from veneer.train.preference.config import RewardConfig
from veneer.train.preference.trainer import PreferenceTrainer


class RewardTrainer(PreferenceTrainer, trl.RewardTrainer):  # type: ignore[misc]
    """TRL's ``RewardTrainer``, with its arguments. ``peft_config`` is one of veneer's configs.

    Rows hold chosen and rejected, with or without a prompt. The head ``score`` is new, so it is trained and saved
    completely with the adapter, whose task is SEQ_CLS. ``accuracy`` in the log is the share of pairs whose chosen
    answer scores higher. Checkpoints, resume and optimizers are those of `veneer.SFTTrainer`.
    Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155. Raises ConfigError, DataError or TrainingError if the
    run is impossible as configured.
    """

    kind = "reward"

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: RunSettings | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Any], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        quantization_config: Any = None,
        peft_config: MethodConfig | None = None,
    ) -> None:
        checked_rows(train_dataset, "train", "reward")
        checked_rows(eval_dataset, "eval", "reward")
        _require_one_output(model)
        args = self.own_settings(args, RewardConfig)
        peft_config = for_scores(peft_config)
        ready = self.made_ready(model, args, processing_class, quantization_config, peft_config, optimizers)
        with self.building(ready) as made:
            super().__init__(
                **made,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            )
        self.surround()


def _require_one_output(model: Any) -> None:
    config = getattr(model, "config", None)
    if config is None:
        return
    if getattr(config, "num_labels", None) != 1 or not hasattr(model, "score"):
        raise ConfigError(
            f"a reward model gives each sequence one score, and {type(model).__name__} does not: give the model's "
            "name, or load it with AutoModelForSequenceClassification.from_pretrained(…, num_labels=1)"
        )


def for_scores(config: MethodConfig | None) -> MethodConfig | None:
    """Return the adapter's config with the task SEQ_CLS, by which the new head is trained and saved whole. Raises
    ConfigError if the config names another task.
    """
    if not isinstance(config, MethodConfig) or config.task_type == TaskType.SEQ_CLS.value:
        return config
    if config.task_type is not None:
        raise ConfigError(
            f"task_type={config.task_type!r} is not that of a reward model: leave it out, or set it to SEQ_CLS"
        )
    return replace(config, task_type=TaskType.SEQ_CLS.value)
