"""Shared part of all trainers: fused kernels, optimizers, checks of each step, and setup around a run."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from datasets import Dataset
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler
from transformers import AutoTokenizer, PreTrainedModel, TrainingArguments, set_seed
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from veneer.adapters.peft_model import PeftModel
from veneer.adapters.schedules import penalty
from veneer.contract import MethodConfig
from veneer.data.sampler import EpochSampler
from veneer.model.fused.decoder import fused
from veneer.model.memory.heap import blocks_mapped, freed_memory_kept, freed_memory_returned
from veneer.model.memory.offload import ActivationOffload
from veneer.model.sharded.sharding import is_cut
from veneer.optim import LayerwiseGaLoreAdamW
from veneer.train.callbacks import callbacks_of
from veneer.train.config import RunSettings
from veneer.train.gradients import average, leave_apart
from veneer.train.guards import (
    require_finite,
    require_free_groups,
    require_settings_of_cut_base,
    require_special_tokens,
    require_whole_models,
)
from veneer.train.optimizer import Choice, choose_optimizer, lora_plus_optimizer
from veneer.train.processes import n_processes, summed
from veneer.train.progress import Progress
from veneer.train.resume import EpochEnds, ResumableTrainer, random_state_kept
from veneer.train.schedule import AdapterSchedule
from veneer.train.show.display import show_run
from veneer.train.show.trained import describe_trained, require_trainable
from veneer.train.trained_model import Kind, adapted, loaded
from veneer.train.undone import model_kept, settings_kept, unwrap_forward


@dataclass(frozen=True, slots=True)
class Ready:
    """Settings, model with its adapter, and tokenizer, for the constructor of a trainer."""

    args: Any
    model: PreTrainedModel
    processing_class: Any


class RunTrainer(ResumableTrainer):
    """Mixin for TRL's trainers, shared by `veneer.SFTTrainer` and those of preferences and rewards.

    A subclass lists it before TRL's class. Its ``__init__`` calls `made_ready`, calls TRL's ``__init__`` inside
    `building`, and ends with `surround`.
    """

    kind: ClassVar[Kind] = "causal"
    args: Any
    tokens_of_step: tuple[int, int, int] = (0, 0, 0)  # of the last micro-batch: not padding, trained, predicted right

    def made_ready(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: RunSettings,
        processing_class: Any,
        quantization_config: Any,
        peft_config: MethodConfig | None,
        optimizers: tuple[Any, Any],
    ) -> Ready:
        """Return a copy of the settings, the model with a fresh adapter if a config is given, and the tokenizer.

        Raises ConfigError for arguments that exclude each other.
        """
        args = copy.copy(args)
        require_free_groups(args, optimizers)
        if args.n_gpu > 1:
            args._n_gpu = 1  # as transformers does for a model on several devices: a process trains on one, undivided
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # `gradients.average` takes what has none
        if args.ddp_broadcast_buffers is None:
            args.ddp_broadcast_buffers = False  # they hold a quantized base's codes, which are the same everywhere
        self.progress, self.data_digest = Progress(), None
        set_seed(args.seed)
        name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", None)
        base = loaded(model, args, quantization_config, self.kind)
        processing_class = processing_class or AutoTokenizer.from_pretrained(name)
        self.take_base(base, args, processing_class, peft_config)
        model = adapted(base, peft_config)
        require_special_tokens(getattr(processing_class, "tokenizer", processing_class), args)
        return Ready(args, model, processing_class)

    def take_base(
        self, base: PreTrainedModel, args: Any, processing_class: Any, peft_config: MethodConfig | None
    ) -> None:
        """Prepare the loaded base before the trainer attaches a fresh adapter, or, if ``peft_config`` is None, before
        it trains without one. Subclasses override this; here it does nothing.
        """

    @contextmanager
    def building(self, ready: Ready) -> Iterator[dict[str, Any]]:
        """Enter a context for TRL's constructor, which leaves the model and the settings unchanged. Yields its
        arguments.
        """
        with model_kept(ready.model), settings_kept(ready.args):
            yield {"model": ready.model, "args": ready.args, "processing_class": ready.processing_class}

    def surround(self) -> None:
        """Set up activation offloading, the display, adapters' schedules and callbacks.

        Raises ConfigError if several processes shard the model otherwise than by `shard_base`.
        """
        require_whole_models(self)
        if is_cut(self.model):
            require_settings_of_cut_base(_reentrant(self.args), self.args)
        self._offload = self._offloading()
        self._display = show_run(self, lambda: self.n_tokens_read, lambda step: self.progress.loss_of_window(step))
        self.schedule = AdapterSchedule()
        for callback in (self.schedule, EpochEnds(self), *callbacks_of(self.args)):
            self.add_callback(callback)

    @property
    def n_tokens_read(self) -> int:
        """The number of tokens read in the training so far, without padding."""
        return self.progress.n_tokens

    def _offloading(self) -> ActivationOffload | None:
        """Return the context for offloading activations, which TRL enters around each forward pass."""
        if not self.args.activation_offloading:
            return None
        offload = ActivationOffload(self.model, self.args.activation_offloading, Path(self.args.output_dir))
        self.maybe_activation_offload_context = offload
        return offload

    def describe(self) -> str:
        """Return one line on the parameters that this run trains."""
        return describe_trained(self.model)

    def describe_rows(self, rows: Dataset) -> dict[str, Any]:
        """Return statistics of the rows of a data set, and a hash of them, for ``run.json``."""
        raise NotImplementedError

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> TrainOutput:
        """Train to the end, from the start or from a checkpoint (True: the latest complete one).

        Raises TrainingError if nothing is trainable, if the loss or a gradient is not finite, or if the
        checkpoint is not one of this run.
        """
        require_trainable(self.model)
        if _reentrant(self.args):
            # Reentrant checkpointing gives no gradient to a block whose input needs none: all of them, under adapters.
            self.model.enable_input_require_grads()
        self.began = time.perf_counter()
        try:
            kept = blocks_mapped if is_cut(self.model) else freed_memory_kept
            with self.fusing(), kept() if self.args.device.type == "cpu" else nullcontext():
                output = super().train(resume_from_checkpoint=self.resolve_resume(resume_from_checkpoint), **options)
        finally:
            if self._display is not None:
                self._display.close()
            self._unwrap_forward()
            self._stop_updates()
            if self._offload is not None:
                self._offload.close()
        return TrainOutput(output.global_step, output.metrics["train_loss"], output.metrics)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """Wrap the model as Trainer does.

        A sharded base is wrapped in DDP here, because accelerate refuses to wrap such a model on GPUs.
        """
        if not (training and model is self.model and is_cut(model)):
            return cast(nn.Module, super()._wrap_model(model, training, dataloader))
        prepared = self.accelerator.prepare_model(model, evaluation_mode=True)
        return DistributedDataParallel(prepared, broadcast_buffers=False)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Run forward and backward of one micro-batch. Raises TrainingError for a loss that is not finite."""
        self.tokens_of_step = (0, 0, 0)
        leave_apart(model, share_buffers=bool(self.args.ddp_broadcast_buffers))
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            average(self.model)
        value, *counts = summed([loss.item(), *self.tokens_of_step], self.args.device)
        value /= n_processes()  # their gradients are averaged
        require_finite(value, self.state.global_step + 1)
        self.progress.add_loss(value)
        self.progress.add_tokens(*map(int, counts))
        return loss

    def with_penalty(self, loss: torch.Tensor, *, shared: bool) -> torch.Tensor:
        """Return the loss of a micro-batch plus the training penalties of the active adapters.

        ``shared``: the loss is already this micro-batch's share of its step, so the penalty is divided in the same way.
        """
        term = penalty(self.model, self.model.adapter_state) if self._is_penalized() else None
        if term is None:
            return loss
        return loss + term.to(loss.device) / (self.current_gradient_accumulation_steps if shared else 1)

    def _is_penalized(self) -> bool:
        return self.model.training and isinstance(self.model, PeftModel)

    def evaluation_loop(self, *args: Any, **options: Any) -> EvalLoopOutput:
        """Evaluate without consuming a random number of the training.

        An evaluation after training computes as one during training does: with the fused kernels, under autocast.
        """
        with ExitStack() as stack:
            stack.enter_context(random_state_kept())
            stack.enter_context(freed_memory_returned())
            if not self.is_in_train:
                stack.enter_context(self.fusing())
                stack.enter_context(self.accelerator.autocast())
            output = super().evaluation_loop(*args, **options)
        if not self.is_in_train:
            self._unwrap_forward()
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a line. Losses come from counters that checkpoints hold, so that a resumed run logs the same values."""
        if "loss" in logs and self.model.training:
            logs.update(self.progress.close_window(self.state.global_step))
        if "train_loss" in logs:
            logs["train_loss"] = self.progress.loss / max(self.state.global_step, 1)
        super().log(logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Return the optimizer. If ``lora_plus`` is set, it has LoRA+'s parameter groups."""
        if self.optimizer is None and self.args.lora_plus is not None:
            trained = self.model if model is None else model
            choice = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, trained)
            self.optimizer = lora_plus_optimizer(self.args, trained, self.args.lora_plus, choice)
        return super().create_optimizer(model)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: nn.Module | None = None) -> Choice:
        """Return the optimizer that ``args.optim`` names, from `train.optimizer`."""
        return choose_optimizer(args, model)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        data = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        if not isinstance(data, Dataset) or strategy not in ("random", "group_by_length"):
            return cast("Sampler[int] | None", super()._get_train_sampler(train_dataset))
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        lengths = self.lengths_of(data) if strategy == "group_by_length" else [1] * len(data)
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * n_processes()
        order = EpochSampler(lengths, seed, step if strategy == "group_by_length" else None)
        self.order = order
        return order

    def lengths_of(self, rows: Dataset) -> list[int]:
        """Return the number of tokens in each row, by which rows of similar length are grouped."""
        return [len(ids) for ids in rows["input_ids"]]

    def fusing(self) -> AbstractContextManager[object]:
        """Return a context in which the model runs on fused kernels, if it can and ``fused`` allows it."""
        return fused(self.model) if self.args.fused == "auto" else nullcontext()

    def _unwrap_forward(self) -> None:
        """Remove accelerate's autocast from the model's forward, so that training leaves the model as it was."""
        if self.accelerator.num_processes == 1 and not self.is_deepspeed_enabled and not self.is_fsdp_enabled:
            unwrap_forward(self.model)
            self.accelerator.free_memory()

    def _stop_updates(self) -> None:
        """After training, switch off an optimizer that updates weights within the backward pass, so that later backward
        passes change nothing.
        """
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate's wrapper around it
        if isinstance(optimizer, LayerwiseGaLoreAdamW):
            optimizer.close()

    def _send_telemetry(self) -> None:
        """Send nothing."""


def _reentrant(args: RunSettings) -> bool:
    """Return True if gradient checkpointing is reentrant, by the setting's old or new name."""
    settings = [args.gradient_checkpointing_kwargs, getattr(args, "activation_checkpointing_kwargs", None)]
    on = args.gradient_checkpointing or getattr(args, "activation_checkpointing", False)
    return bool(on) and any((given or {}).get("use_reentrant") for given in settings)
