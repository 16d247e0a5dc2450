"""Supervised fine-tuning: TRL's trainer with exact packing, an exact loss, and exact resume."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import trl
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput

from veneer.adapters.peft_model import PeftModel
from veneer.adapters.token_scores import has_own_loss
from veneer.contract import MethodConfig
from veneer.data.collating import Collator
from veneer.data.dataset import columns_of, digest, encode_all, filled, pack_all, require_answers
from veneer.data.encoding import IGNORED, Encoder, kind_of
from veneer.data.sampler import FilledSampler
from veneer.data.task_column import TASK
from veneer.errors import ConfigError, TrainingError
from veneer.model.memory.heap import freed_memory_returned
from veneer.train.config import SFTConfig, as_settings
from veneer.train.loss import TokenLoss, model_loss, token_loss
from veneer.train.packing_layout import packing_layout
from veneer.train.processes import n_processes, summed
from veneer.train.resume import random_state_kept
from veneer.train.run_trainer import RunTrainer
from veneer.train.task_metric import TaskMetric


class SFTTrainer(RunTrainer, trl.SFTTrainer):  # type: ignore[misc]
    """TRL's ``SFTTrainer``, with its arguments. ``peft_config`` is one of veneer's configs.

    The loss of an optimizer step is the mean over all its trained tokens, however they are spread over micro-batches.
    Packed sequences never see one another. Trained weights are float32. A resumed run repeats the uninterrupted run,
    bit for bit. Nothing is reported to any service by default.

    Raises ConfigError, DataError or TrainingError if the run is impossible as configured.
    """

    task_metric: TaskMetric | None = None  # measured whenever the held-out loss is
    _signature_columns: list[str] | None  # Trainer's

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SFTConfig | TrainingArguments | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_loss_func: Callable[..., torch.Tensor] | None = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., torch.Tensor] | None = None,
        quantization_config: Any = None,
        peft_config: MethodConfig | None = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
    ) -> None:
        self._evaluated: list[torch.Tensor] = []
        args = as_settings(args, SFTConfig, "trainer_output")
        self._assistant_only = args.assistant_only_loss
        ready = self.made_ready(model, args, processing_class, quantization_config, peft_config, optimizers)
        with self.building(ready) as made:
            super().__init__(
                **made,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                compute_loss_func=compute_loss_func,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                formatting_func=formatting_func,
            )
        # The loss below is normalized by the tokens of the whole step, whatever the model's own forward accepts.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        if data_collator is None and not self._is_vision_dataset:
            self.data_collator = self._collator()
        if isinstance(self.train_dataset, Dataset) and "labels" in self.train_dataset.column_names:
            self.data_digest = digest(self.train_dataset)
        self.surround()

    def _collator(self) -> Collator:
        packed = self.padding_free or bool(self.args.eval_packing)
        return Collator(
            pad_token_id=self._tokenizer.pad_token_id,
            layout=packing_layout(self.model) if packed else "padded",
            padding_free=self.padding_free and not self.args.packing,
            pad_to_multiple_of=self.args.pad_to_multiple_of,
        )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns or []
        if not self._is_vision_dataset and TASK not in columns:
            self._signature_columns = [*columns, TASK]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return a micro-batch's summed cross-entropy, divided by ``num_items_in_batch``, the trained tokens of the
        step.

        Without that number, it is divided by the micro-batch's own trained tokens.
        """
        if self.compute_loss_func is not None or "labels" not in inputs:
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        counted = self.token_loss(model, inputs)
        loss = self._normalized(counted, num_items_in_batch)
        self._count(counted, inputs)
        if self.model.training and not loss.requires_grad:
            raise TrainingError(
                "the loss depends on no trainable parameter: nothing would be trained. Attach an adapter "
                "(peft_config), or unfreeze the model"
            )
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**{key: value for key, value in inputs.items() if key != "labels"}, use_cache=False)

    def token_loss(self, model: nn.Module, inputs: dict[str, Any]) -> TokenLoss:
        """Return the loss of a micro-batch before it is normalized.

        If the adapter has a loss of its own, that loss has no auxiliary part of a router. Raises ConfigError if the
        settings then ask for label smoothing, another ``loss_type`` or a router's loss.
        """
        own = has_own_loss(self.model)
        inputs = {**inputs, **({"output_router_logits": not own} if self.aux_loss_enabled else {})}
        if own:
            if self.args.label_smoothing_factor or self.args.loss_type == "dft" or self.args.router_aux_loss_coef:
                raise ConfigError(
                    "this adapter has a loss of its own: leave label_smoothing_factor, loss_type and "
                    "router_aux_loss_coef out"
                )
            return model_loss(model, inputs)
        return token_loss(
            model,
            inputs,
            label_smoothing=self.args.label_smoothing_factor,
            weigh_by_probability=self.args.loss_type == "dft",
        )

    def _normalized(self, counted: TokenLoss, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
        n_tokens = counted.n_tokens if num_items_in_batch is None else num_items_in_batch
        loss = counted.total / torch.as_tensor(n_tokens).to(counted.total.device).clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # their gradients are averaged
        if counted.aux is not None and self.aux_loss_enabled:
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * counted.aux.to(loss.device) / steps
        return self.with_penalty(loss, shared=num_items_in_batch is not None)

    def _count(self, counted: TokenLoss, inputs: dict[str, Any]) -> None:
        if self.model.training:
            real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
            if n_processes() > 1:  # rows that only make the processes' batches equally many
                real = real[(inputs["labels"] != IGNORED).any(dim=1)]
            self.tokens_of_step = (int(real.sum()), int(counted.n_tokens), int(counted.n_right))
        else:
            sums = torch.stack([counted.total, counted.n_tokens, counted.n_right])
            self._evaluated.append(sums.double().cpu())

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **options: Any) -> EvalLoopOutput:
        """Evaluate; the loss is the mean over all trained tokens."""
        self._evaluated = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **options)
        if self._evaluated:
            sums = torch.stack(self._evaluated).sum(dim=0)
            total, n_tokens, n_right = summed(sums.tolist(), self.args.device)
            output.metrics[f"{metric_key_prefix}_loss"] = total / max(n_tokens, 1)
            output.metrics[f"{metric_key_prefix}_mean_token_accuracy"] = n_right / max(n_tokens, 1)
        if self.task_metric is not None:
            with random_state_kept(), freed_memory_returned():
                value = self.task_metric.value(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))
            output.metrics[f"{metric_key_prefix}_{self.task_metric.part.key}"] = value
        return output

    def describe_rows(self, rows: Dataset | IterableDataset) -> dict[str, Any]:
        """Return statistics of the rows of a data set, and a hash of them, for ``run.json``. Streamed rows are only
        marked so.
        """
        if isinstance(rows, IterableDataset):
            return {"streamed": True}
        return {
            "rows": len(rows),
            "tokens": sum(len(ids) for ids in rows["input_ids"]),
            "trained_tokens": sum(label != IGNORED for labels in rows["labels"] for label in labels),
            "blake2b": self.data_digest if rows is self.train_dataset and self.data_digest else digest(rows),
        }

    def encoder(self, args: SFTConfig, **settings: Any) -> Encoder:
        """Return the encoder of rows, with the settings of `Encoder`."""
        return Encoder(**settings)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: SFTConfig, packing: bool, formatting_func: Any, name: str
    ) -> Any:
        if formatting_func is not None and "input_ids" not in columns_of(dataset):
            dataset = dataset.map(lambda row: {args.dataset_text_field: formatting_func(row)})
            dataset = dataset.select_columns([args.dataset_text_field])
        columns = columns_of(dataset)
        kind = kind_of(columns, args.dataset_text_field)
        require_answers(kind, dataset, name, assistant=self._assistant_only, completion=bool(args.completion_only_loss))
        split = packing and args.packing_strategy == "bfd_split"
        encoder = self.encoder(
            args,
            tokenizer=self._tokenizer,
            kind=kind,
            text_field=args.dataset_text_field,
            completion_only=self.completion_only_loss,
            assistant_only=self._assistant_only,
            max_length=None if split else args.max_length,
            keep_end=args.truncation_mode == "keep_end",
        )
        if "seq_lengths" not in columns:
            dataset = encode_all(dataset, encoder, name, args.dataset_num_proc)
            dataset = pack_all(dataset, args.max_length, split=split) if packing else dataset
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, sampler_fn: Any = None, *args: Any, **options: Any
    ) -> Any:
        """Return Trainer's loader. With several processes, rows are added up to whole batches for all of them, because
        accelerate would repeat real rows instead.
        """
        total = batch_size * n_processes()
        if n_processes() > 1 and isinstance(dataset, Dataset) and "labels" in dataset.column_names:
            own, sampler_of = dataset, sampler_fn
            dataset = filled(own, -len(own) % total)
            sampler = None if sampler_of is None else sampler_of(own)
            sampler_fn = None if sampler is None else lambda _: FilledSampler(sampler, len(own), len(dataset))
        return super()._get_dataloader(dataset, description, batch_size, sampler_fn, *args, **options)
