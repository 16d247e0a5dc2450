"""Shared part of trainers on preferences and rewards: TRL's counters in checkpoints, statistics of rows, dropout."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from veneer.adapters.peft_model import PeftModel
from veneer.data.sampler import EvenBatches, last_size
from veneer.errors import ConfigError, DataError, TrainingError
from veneer.train.config import Settings, as_settings
from veneer.train.processes import n_processes, summed
from veneer.train.run_trainer import RunTrainer

log = logging.getLogger(__name__)
_LARGEST = 2  # times the batch size: a last batch that is larger is not dealt evenly, since memory may not hold it


class PreferenceTrainer(RunTrainer):
    """Mixin for one of TRL's trainers on preferences or rewards.

    Each checkpoint holds TRL's averages since the last log line, so that a resumed run logs the same lines.
    """

    _metrics: dict[str, dict[str, list[float]]]
    _total_train_tokens: int

    @staticmethod
    def own_settings(args: Any, kind: type[Settings]) -> Settings:
        """Convert settings of TRL or transformers to veneer's settings of this ``kind``; new fields get their defaults.

        Raises ConfigError for the settings of another trainer.
        """
        theirs = next(base for base in kind.__mro__ if base.__module__.startswith("trl."))
        if args is not None and not isinstance(args, theirs) and type(args) is not TrainingArguments:
            raise ConfigError(
                f"args is a {type(args).__module__}.{type(args).__name__}: this trainer takes veneer.{kind.__name__}, "
                f"trl.{theirs.__name__} or transformers.TrainingArguments. Make one of them"
            )
        return as_settings(args, kind, "trainer_output")

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, name: str) -> Any:
        """Return TRL's encoded rows, and log the number of dropped ones. Raises DataError if none is left."""
        found = super()._prepare_dataset(dataset, processing_class, args, name)
        if not isinstance(found, Dataset) or "completion" in dataset.column_names or "label" in found.column_names:
            return found
        if not len(found):
            raise DataError(
                f"no row of the {name} data fits into max_length={args.max_length} tokens with some of its answer: "
                "set max_length higher, or give shorter prompts"
            )
        if len(found) < len(dataset):
            log.warning(
                "%s data: %d of %d rows are longer than max_length=%s allows, and are left out",
                name, len(dataset) - len(found), len(dataset), args.max_length,
            )  # fmt: skip
        return found

    def surround(self) -> None:
        """Hash the rows, warn of rows that are counted twice, then do as `RunTrainer.surround`."""
        if isinstance(self.train_dataset, Dataset):
            self.data_digest = _digest(self.train_dataset)
        self.tell_of_repeats()
        super().surround()

    def tell_of_repeats(self) -> None:
        """Warn if accelerate repeats rows in the last batch, so that all processes get equally many."""
        sizes = {"train": self.args.train_batch_size, "held-out": self.args.eval_batch_size}
        for (name, size), rows in zip(sizes.items(), (self.train_dataset, self.eval_dataset), strict=True):
            count = n_processes()
            left = len(rows) % (size * count) if isinstance(rows, Dataset) else 0
            if count > 1 and not self._is_dealt(left, size):
                log.warning(
                    "%s data: %d rows do not fill batches of %d × %d processes evenly, so the last batch repeats %d "
                    "of them; one process would repeat none",
                    name, len(rows), size, count, size * count - left,
                )  # fmt: skip

    def _is_dealt(self, left: int, size: int) -> bool:
        """Return True if the processes can share the ``left`` rows of the last batch so that each row counts equally
        often.
        """
        cut = self.args.accelerator_config
        if self.args.dataloader_drop_last or not left:
            return True
        return not (cut.split_batches or cut.dispatch_batches) and last_size(left, n_processes()) <= _LARGEST * size

    def _get_dataloader(self, dataset: Any, description: str, batch_size: int, *args: Any, **options: Any) -> Any:
        """Return Trainer's loader, changed so that every row of the last batch counts equally often over all processes.

        Otherwise accelerate would repeat some rows.
        """
        loader: DataLoader[Any] = super()._get_dataloader(dataset, description, batch_size, *args, **options)
        shard = loader.batch_sampler
        if n_processes() == 1 or not isinstance(shard, BatchSamplerShard) or shard.split_batches or shard.drop_last:
            return loader
        left = len(shard.batch_sampler.sampler) % (batch_size * n_processes())
        if left and self._is_dealt(left, batch_size):
            shard.batch_sampler = EvenBatches(shard.batch_sampler.sampler, batch_size, n_processes())
            shard.even_batches = False
        if options.get("is_training"):
            # Else accelerate cuts what is gathered in the last step to the rows left, numbers of processes among it,
            # and in an epoch that a resume goes on with it does not.
            loader._drop_last = True
        return loader

    @property
    def n_tokens_read(self) -> int:
        """The number of tokens read in the training so far, without padding."""
        return int(self._total_train_tokens or self.state.num_input_tokens_seen)

    def describe_rows(self, rows: Dataset) -> dict[str, Any]:
        """Return statistics of the rows of a data set, and a hash of them, for ``run.json``."""
        ids = [name for name in rows.column_names if name.endswith("_ids") and not name.startswith("KL_")]
        return {
            "rows": len(rows),
            **({"tokens": sum(len(row) for name in ids for row in rows[name])} if ids else {}),
            "blake2b": self.data_digest if rows is self.train_dataset and self.data_digest else _digest(rows),
        }

    def lengths_of(self, rows: Dataset) -> list[int]:
        """Return the number of tokens in each row, by which rows of similar length are grouped."""
        ids = [name for name in rows.column_names if name.endswith("_ids")]
        return [sum(map(len, row)) for row in zip(*(rows[name] for name in ids), strict=True)]

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> TrainOutput:
        """Train as `RunTrainer.train` does; with ``disable_dropout`` no adapter applies dropout."""
        with without_old_names(), self.dropout_as_set():
            return super().train(resume_from_checkpoint, **options)

    @contextmanager
    def dropout_as_set(self) -> Iterator[None]:
        """Enter a context in which adapters apply no dropout, if ``disable_dropout`` is set."""
        if self.args.disable_dropout and isinstance(self.model, PeftModel):
            with self.model.adapter_state.without_dropout():
                yield
        else:
            yield

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return TRL's loss. Raises TrainingError if it depends on no trained parameter."""
        before = self._total_train_tokens
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.model.training and self._total_train_tokens > before:
            self._total_train_tokens = before + (self._total_train_tokens - before) // self._copies()
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        loss: Tensor = found[0] if return_outputs else found
        if self.model.training and not loss.requires_grad:
            raise TrainingError(
                "the loss depends on no trainable parameter: nothing would be trained. Attach an adapter "
                "(peft_config), or unfreeze the model"
            )
        loss = self.with_penalty(loss, shared=bool(self.loss_is_scaled_for_ga))
        return (loss, found[1]) if return_outputs else loss

    def _copies(self) -> int:
        """Return how many times the processes together count each row of the current micro-batch."""
        state, size, n = self.accelerator.gradient_state, self.args.train_batch_size, n_processes()
        is_last = state.end_of_dataloader and state.sync_gradients  # it is fetched, and none of the step comes after it
        if n == 1 or not is_last or self.args.dataloader_drop_last or not isinstance(self.train_dataset, Dataset):
            return 1
        left = len(self.train_dataset) % (size * n)
        return last_size(left, n) * n // left if left and self._is_dealt(left, size) else 1

    def evaluation_loop(self, *args: Any, **options: Any) -> EvalLoopOutput:
        """Evaluate as `RunTrainer.evaluation_loop` does, and keep the training's counters for its next log line."""
        self._metrics["eval"].clear()
        with without_old_names():
            return super().evaluation_loop(*args, **options)

    def prediction_step(self, *args: Any, **options: Any) -> tuple[Tensor | None, Any, Any]:
        """Return TRL's result with the mean of the loss over all processes. In the last batch, Trainer alone would
        ignore the losses of some processes.
        """
        loss, logits, labels = super().prediction_step(*args, **options)
        if loss is not None and n_processes() > 1:
            (total,) = summed([loss.item()], loss.device)
            loss = loss.new_tensor(total / n_processes())
        return loss, logits, labels

    def counters(self) -> dict[str, Any]:
        """Return the counters for a checkpoint besides the losses: TRL's averages since the last log line, and its
        tokens.
        """
        return {"metrics": dict(self._metrics["train"]), "total_train_tokens": self._total_train_tokens}

    def restore_counters(self, counted: dict[str, Any], folder: Path) -> None:
        """Restore the counters of a checkpoint."""
        self._metrics["train"] = defaultdict(list, counted.get("metrics", {}))
        self._total_train_tokens = counted.get("total_train_tokens", 0)


@contextmanager
def without_old_names() -> Iterator[None]:
    """Enter a context that silences transformers' warning about a deprecated name of gradient checkpointing, which TRL
    uses at each step.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing", category=FutureWarning)
        yield


def _digest(rows: Dataset) -> str:
    state = hashlib.blake2b(digest_size=16)
    for row in rows:
        state.update(json.dumps(row, sort_keys=True, default=str).encode())
    return state.hexdigest()
