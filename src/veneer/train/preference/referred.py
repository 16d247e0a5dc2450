"""Trainers that compare the model in training with a reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl.trainer.utils import hash_module

from veneer.adapters.peft_model import PeftModel
from veneer.adapters.token_scores import PreferenceScoring
from veneer.contract import MethodConfig
from veneer.data.preference import Task, checked_rows
from veneer.errors import ConfigError
from veneer.train.config import RunSettings
from veneer.train.preference.reference import Placeholder, Reference
from veneer.train.preference.scores import ScoredModel
from veneer.train.preference.trainer import PreferenceTrainer
from veneer.train.run_trainer import Ready


class ReferredTrainer(PreferenceTrainer):
    """Mixin for TRL's DPO and KTO trainers, with their arguments.

    The reference is the model in its state before training. If the adapter is new, that is the model with the adapter
    off. If it was trained before, the reference has a frozen copy of it. If the whole model is trained, the reference
    is a copy of the model. No other model is loaded.
    """

    task: ClassVar[Task]
    settings: ClassVar[type[Any]]
    ref_model: nn.Module | None
    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: RunSettings | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: MethodConfig | None = None,
    ) -> None:
        checked_rows(train_dataset, "train", self.task)
        checked_rows(eval_dataset, "eval", self.task)
        args = self.own_settings(args, self.settings)
        ready = self.made_ready(model, args, processing_class, quantization_config, peft_config, optimizers)
        with self.building(ready) as made:
            super().__init__(
                **made,
                ref_model=self.placeholder(ready, ref_model),
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
            )
        self.refer(ref_model, fresh=peft_config is not None)
        self.surround()

    def scoring(self) -> PreferenceScoring:
        """Return the settings by which log-probabilities of the model in training are computed."""
        return PreferenceScoring(collision=bool(getattr(self.args, "use_weighting", False)))

    @contextmanager
    def building(self, ready: Ready) -> Iterator[dict[str, Any]]:
        """Switch off the precomputation of the reference's scores while TRL's constructor runs: the reference does not
        exist yet.
        """
        precompute, ready.args.precompute_ref_log_probs = ready.args.precompute_ref_log_probs, False
        try:
            with super().building(ready) as made:
                yield made
        finally:
            ready.args.precompute_ref_log_probs = precompute

    def placeholder(self, ready: Ready, ref_model: PreTrainedModel | None) -> nn.Module:
        """Return the object that TRL's constructor gets as the reference. Raises ConfigError if ``ref_model`` is the
        model itself.
        """
        if ref_model is ready.model:
            raise ConfigError(
                "ref_model is the model in training: leave it out, and the reference is that model as it is now"
            )
        return Placeholder(ready.model) if ref_model is None else ref_model

    def refer(self, ref_model: PreTrainedModel | None, *, fresh: bool) -> None:
        """Set the reference. If ``precompute_ref_log_probs`` is set, let it score all rows once."""
        if ref_model is None:
            self.ref_model = Reference(self.model, PreferenceScoring(details=False), fresh=fresh)
        if not self.args.precompute_ref_log_probs:
            return
        self.precompute_ref_logps = True
        self._precompute_model_hash = _hash_of(self.ref_model)
        with self.fusing():
            self.train_dataset = self._precomputed(self.train_dataset, "train")
            if self.eval_dataset is not None:
                self.eval_dataset = self._precomputed(self.eval_dataset, "eval")

    def _precomputed(self, rows: Any, name: str) -> Any:
        if isinstance(rows, dict):
            return {key: self._precomputed(part, key) for key, part in rows.items()}
        if isinstance(rows, IterableDataset):
            raise ConfigError(
                "precompute_ref_log_probs=True needs rows that are not streamed: load them, or set it off"
            )
        own = self.args.per_device_train_batch_size if name == "train" else self.args.per_device_eval_batch_size
        found: Dataset = self._precompute_ref_logps(rows, name, self.args.precompute_ref_batch_size or own)
        return found

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a micro-batch, from the log-probabilities of its completions."""
        scored: Any = ScoredModel(model, self.scoring())
        return super().compute_loss(scored, inputs, return_outputs, num_items_in_batch)


def _hash_of(reference: nn.Module | None) -> str:
    model = reference.model if isinstance(reference, Reference) else reference
    kind = "adapted" if isinstance(model, PeftModel) else "whole"
    return f"{kind}-{hash_module(model)}"
