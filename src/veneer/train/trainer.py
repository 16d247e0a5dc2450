"""Supervised fine-tuning: TRL's trainer with exact packing, an exact loss, and exact resume."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from torch import nn
from torch.utils.data import Sampler
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from veneer.adapters.peft_model import PeftModel
from veneer.adapters.schedules import penalty
from veneer.contract import MethodConfig
from veneer.data.collating import Collator
from veneer.data.dataset import columns_of, digest, encode_all, filled, pack_all, require_answers
from veneer.data.encoding import IGNORED, Encoder, kind_of
from veneer.data.sampler import EpochSampler, FilledSampler
from veneer.errors import TrainingError
from veneer.model.fused.decoder import fused
from veneer.model.offload import ActivationOffload
from veneer.optim import LayerwiseGaLoreAdamW
from veneer.train.callbacks import callbacks_of
from veneer.train.config import SFTConfig, as_sft_config
from veneer.train.guards import require_finite, require_free_groups, require_special_tokens, require_whole_models
from veneer.train.loss import TokenLoss, token_loss
from veneer.train.optimizer import Choice, choose_optimizer, lora_plus_optimizer
from veneer.train.packing_layout import packing_layout
from veneer.train.processes import n_processes, summed
from veneer.train.progress import Progress
from veneer.train.resume import ResumableTrainer, random_state_kept
from veneer.train.schedule import AdapterSchedule
from veneer.train.show.display import show_run
from veneer.train.show.trained import describe_trained, require_trainable
from veneer.train.trained_model import adapted, loaded
from veneer.train.undone import model_kept, settings_kept, unwrap_forward


class SFTTrainer(ResumableTrainer):
    """TRL's ``SFTTrainer``, with its arguments. ``peft_config`` is one of veneer's configs.

    The loss of an optimizer step is the mean over all its trained tokens, however they are spread over micro-batches.
    Packed sequences never see one another. Trained weights are float32. A resumed run repeats the run that was not
    interrupted, bit for bit. Nothing is reported to anybody.

    Raises ConfigError, DataError or TrainingError where the run could not do what was asked.
    """

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
        args = copy.copy(as_sft_config(args, "trainer_output"))
        require_free_groups(args, optimizers)
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # all that is trained takes part in every step
        self.progress, self.data_digest = Progress(), None
        self._evaluated: list[torch.Tensor] = []
        self._trained = (0, 0, 0)  # tokens of the last micro-batch: all but padding, trained, predicted right
        self._assistant_only = args.assistant_only_loss
        set_seed(args.seed)
        name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", None)
        model = adapted(loaded(model, args, quantization_config), peft_config)
        processing_class = processing_class or AutoTokenizer.from_pretrained(name)
        require_special_tokens(getattr(processing_class, "tokenizer", processing_class), args)
        with model_kept(model), settings_kept(args):
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_loss_func=compute_loss_func,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                formatting_func=formatting_func,
            )
        require_whole_models(self)
        # The loss below is normalized by the tokens of the whole step, whatever the model's own forward accepts.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        if data_collator is None and not self._is_vision_dataset:
            self.data_collator = self._collator()
        if isinstance(self.train_dataset, Dataset) and "labels" in self.train_dataset.column_names:
            self.data_digest = digest(self.train_dataset)
        self._surround()

    def _surround(self) -> None:
        """Make what acts around the steps: offload of activations, the display, adapters' schedules and callbacks."""
        self._offload = self._offloading()
        self._display = show_run(self, lambda: self.progress.n_tokens)
        self.schedule = AdapterSchedule()
        for callback in (self.schedule, *callbacks_of(self.args)):
            self.add_callback(callback)

    def _offloading(self) -> ActivationOffload | None:
        """The context that TRL enters around each forward pass, where activations are to wait elsewhere."""
        if not self.args.activation_offloading:
            return None
        offload = ActivationOffload(self.model, self.args.activation_offloading, Path(self.args.output_dir))
        self.maybe_activation_offload_context = offload
        return offload

    def _collator(self) -> Collator:
        packed = self.padding_free or bool(self.args.eval_packing)
        return Collator(
            pad_token_id=self._tokenizer.pad_token_id,
            layout=packing_layout(self.model) if packed else "padded",
            padding_free=self.padding_free and not self.args.packing,
            pad_to_multiple_of=self.args.pad_to_multiple_of,
        )

    def describe(self) -> str:
        """One line on what this run trains."""
        return describe_trained(self.model)

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> TrainOutput:
        """Train to the end, from the start or from a checkpoint (True: the latest complete one).

        Raises TrainingError where nothing is trainable, where the loss or a gradient is not finite, or where the
        checkpoint is not one of this run.
        """
        require_trainable(self.model)
        if _reentrant(self.args):
            # Reentrant checkpointing gives no gradient to a block whose input needs none: all of them, under adapters.
            self.model.enable_input_require_grads()
        try:
            with self._fusing():
                output = super().train(resume_from_checkpoint=self.resolve_resume(resume_from_checkpoint), **options)
        finally:
            if self._display is not None:
                self._display.close()
            self._unwrap_forward()
            self._stop_updates()
            if self._offload is not None:
                self._offload.close()
        return TrainOutput(output.global_step, output.metrics["train_loss"], output.metrics)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of one micro-batch. Raises TrainingError for a loss that is not finite."""
        self._trained = (0, 0, 0)
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        value, *counts = summed([loss.item(), *self._trained], self.args.device)
        value /= n_processes()  # their gradients are averaged
        require_finite(value, self.state.global_step + 1)
        self.progress.add_loss(value)
        self.progress.add_tokens(*map(int, counts))
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The summed cross-entropy of a micro-batch over ``num_items_in_batch``, the trained tokens of the whole step.

        Without that number, over its own trained tokens.
        """
        if self.compute_loss_func is not None or "labels" not in inputs:
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        counted = self.token_loss(model, inputs)
        loss = self._normalized(counted, num_items_in_batch)
        self._count(counted, inputs)
        if self.model.training and not loss.requires_grad:
            raise TrainingError("the loss depends on no trainable parameter: nothing would be trained")
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**{key: value for key, value in inputs.items() if key != "labels"}, use_cache=False)

    def token_loss(self, model: nn.Module, inputs: dict[str, Any]) -> TokenLoss:
        """The loss of a micro-batch before it is normalized."""
        return token_loss(
            model,
            {**inputs, **({"output_router_logits": True} if self.aux_loss_enabled else {})},
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
        if self.model.training and isinstance(self.model, PeftModel):
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            term = penalty(self.model, self.model.adapter_state)
            loss = loss if term is None else loss + term.to(loss.device) / steps
        return loss

    def _count(self, counted: TokenLoss, inputs: dict[str, Any]) -> None:
        if self.model.training:
            real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
            if n_processes() > 1:  # rows that only make the processes' batches equally many
                real = real[(inputs["labels"] != IGNORED).any(dim=1)]
            self._trained = (int(real.sum()), int(counted.n_tokens), int(counted.n_right))
        else:
            sums = torch.stack([counted.total, counted.n_tokens, counted.n_right])
            self._evaluated.append(sums.double().cpu())

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **options: Any) -> EvalLoopOutput:
        """Evaluate; the loss is the mean over all trained tokens, and no random number of the training is used up.

        After training the arithmetic is that of an evaluation within it: the fused path, under autocast.
        """
        self._evaluated = []
        with ExitStack() as stack:
            stack.enter_context(random_state_kept())
            if not self.is_in_train:
                stack.enter_context(self._fusing())
                stack.enter_context(self.accelerator.autocast())
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **options)
        if self._evaluated:
            sums = torch.stack(self._evaluated).sum(dim=0)
            total, n_tokens, n_right = summed(sums.tolist(), self.args.device)
            output.metrics[f"{metric_key_prefix}_loss"] = total / max(n_tokens, 1)
            output.metrics[f"{metric_key_prefix}_mean_token_accuracy"] = n_right / max(n_tokens, 1)
        if not self.is_in_train:
            self._unwrap_forward()
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a line; losses come from counters that a checkpoint holds, so that a resumed run logs the same ones."""
        if "loss" in logs and self.model.training:
            logs.update(self.progress.close_window(self.state.global_step))
        if "train_loss" in logs:
            logs["train_loss"] = self.progress.loss / max(self.state.global_step, 1)
        super().log(logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """The optimizer, over LoRA+'s groups where ``lora_plus`` is set."""
        if self.optimizer is None and self.args.lora_plus is not None:
            trained = self.model if model is None else model
            choice = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, trained)
            self.optimizer = lora_plus_optimizer(self.args, trained, self.args.lora_plus, choice)
        return super().create_optimizer(model)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: nn.Module | None = None) -> Choice:
        """The optimizer that ``args.optim`` names, from `train.optimizer`."""
        return choose_optimizer(args, model)

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
        encoder = Encoder(
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

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        data = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        if not isinstance(data, Dataset) or strategy not in ("random", "group_by_length"):
            return cast("Sampler[int] | None", super()._get_train_sampler(train_dataset))
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        lengths = [len(ids) for ids in data["input_ids"]] if strategy == "group_by_length" else [1] * len(data)
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * n_processes()
        self.order = EpochSampler(lengths, seed, step if strategy == "group_by_length" else None)
        return self.order

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, sampler_fn: Any = None, *args: Any, **options: Any
    ) -> Any:
        """Trainer's, over as many rows as give every process as many batches: accelerate would repeat rows."""
        total = batch_size * n_processes()
        if n_processes() > 1 and isinstance(dataset, Dataset) and "labels" in dataset.column_names:
            own, sampler_of = dataset, sampler_fn
            dataset = filled(own, -len(own) % total)
            sampler = None if sampler_of is None else sampler_of(own)
            sampler_fn = None if sampler is None else lambda _: FilledSampler(sampler, len(own), len(dataset))
        return super()._get_dataloader(dataset, description, batch_size, sampler_fn, *args, **options)

    def _fusing(self) -> AbstractContextManager[object]:
        return fused(self.model) if self.args.fused == "auto" else nullcontext()

    def _unwrap_forward(self) -> None:
        """Take accelerate's autocast off the model's forward: after training the model is what it was before."""
        if self.accelerator.num_processes == 1 and not self.is_deepspeed_enabled and not self.is_fsdp_enabled:
            unwrap_forward(self.model)
            self.accelerator.free_memory()

    def _stop_updates(self) -> None:
        """After training no backward pass moves a weight."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate's wrapper around it
        if isinstance(optimizer, LayerwiseGaLoreAdamW):
            optimizer.close()

    def _send_telemetry(self) -> None:
        """Nothing is sent."""


def _reentrant(args: SFTConfig) -> bool:
    """Return True if blocks are recomputed the reentrant way, under the setting's old name or its new one."""
    settings = [args.gradient_checkpointing_kwargs, getattr(args, "activation_checkpointing_kwargs", None)]
    on = args.gradient_checkpointing or getattr(args, "activation_checkpointing", False)
    return bool(on) and any((given or {}).get("use_reentrant") for given in settings)
