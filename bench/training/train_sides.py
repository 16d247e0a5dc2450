"""Veneer and its peer as `train.py` runs them: one model, the same factors, rows and settings, one small interface."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

import veneer
from bench.lora_step import RATE, adapted, base_of, optimizer_of, require_fused, step
from bench.same import course, gradients
from bench.turns import Timing, timed
from veneer.train.show.display import RunDisplay

BATCH = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of the table: the base's storage, whether a Trainer drives the steps, whether blocks are checkpointed.

    ``dtype`` is that of the base (or of what its codes are computed in) and of the stream of both sides; ``settings``
    are LoRA's where they are not those of `adapted`.
    """

    base: str
    trainer: bool
    checkpointing: bool = False
    peer: str
    dtype: torch.dtype = torch.bfloat16
    settings: Mapping[str, Any] = field(default_factory=dict)


ROWS = {
    "dense": Row(base="dense", trainer=False, peer="PEFT + transformers"),
    "nf4": Row(base="nf4", trainer=False, peer="PEFT + bitsandbytes"),
    "trainer": Row(base="dense", trainer=True, peer="TRL's SFTTrainer + PEFT"),
    "checkpointing": Row(base="dense", trainer=True, checkpointing=True, peer="TRL's SFTTrainer + PEFT"),
}


@dataclass(frozen=True, slots=True)
class Side:
    """``losses`` trains over rows of a packed set, one loss a step; ``timed`` runs one warm step over some of them.

    ``checked`` trains too, and returns the losses and the gradients of the first step, by the keys of the saved file.
    """

    model: Any
    losses: Callable[[Dataset], list[float]]
    timed: Callable[[Dataset], Timing]
    checked: Callable[[Dataset], tuple[list[float], dict[str, Tensor]]]


def side_of(name: str, row: Row, place: str) -> Side:
    """One side of a row, its adapter at the start that `same_start` can copy."""
    model = adapted(name, base_of(name, row.base, place, row.dtype), **row.settings)
    return _trainer_side(name, row, model, place) if row.trainer else _step_side(name, model)


def same_start(ours: Any, peer: Any) -> None:
    """Copy what the peer's model trains."""
    from peft import get_peft_model_state_dict

    veneer.set_peft_model_state_dict(ours, get_peft_model_state_dict(peer))


def _step_side(name: str, model: Any) -> Side:
    """A loop of its own: forward, backward, AdamW, over whole rows."""
    if name == "veneer":
        require_fused(model)
    optimizer = optimizer_of(model)

    def last(rows: Dataset) -> Timing:
        return timed(lambda: step(name, model, optimizer, _batches(rows)[-1]))

    def checked(rows: Dataset) -> tuple[list[float], dict[str, Tensor]]:
        found = course(name, model, _batches(rows)[0])
        return found.losses, found.gradients

    return Side(model, lambda rows: [step(name, model, optimizer, ids) for ids in _batches(rows)], last, checked)


def _batches(rows: Dataset) -> list[Tensor]:
    """The tokens of a packed set end to end, cut into whole batches."""
    length = max(len(ids) for ids in rows["input_ids"])
    flat = torch.tensor([token for ids in rows["input_ids"] for token in ids])
    return list(flat[: len(flat) // (BATCH * length) * BATCH * length].view(-1, BATCH, length))


class Gradients(TrainerCallback):
    """The gradients of a trainer's first step, by the keys of the saved file; none is clipped."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
        self.found = self.found or gradients(model)


class _Watch(TrainerCallback):
    """The time at the end of each step, and every loss that is logged."""

    def __init__(self) -> None:
        self.ends: list[Timing] = []
        self.losses: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(Timing.now())

    def on_log(self, *args: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def _trainer_side(name: str, row: Row, model: Any, place: str) -> Side:
    """``trainer.train()`` over the same packed rows in the same order; a step runs from one step's end to the next."""
    import trl

    library = veneer if name == "veneer" else trl
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)

    def run(rows: Dataset, *more: TrainerCallback) -> _Watch:
        watch = _Watch()
        with tempfile.TemporaryDirectory() as folder:
            settings = library.SFTConfig(
                output_dir=folder, max_steps=len(rows) // BATCH, per_device_train_batch_size=BATCH, learning_rate=RATE,
                lr_scheduler_type="constant", packing=True, max_length=512,
                dataset_kwargs={"skip_prepare_dataset": True}, train_sampling_strategy="sequential",
                gradient_checkpointing=row.checkpointing, bf16=row.dtype == torch.bfloat16, use_cpu=True,
                logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
            )  # fmt: skip
            trainer = library.SFTTrainer(
                model=model, args=settings, train_dataset=rows, processing_class=tokenizer, callbacks=[watch, *more]
            )
            for shown in (PrinterCallback, RunDisplay):
                trainer.remove_callback(shown)
            trainer.train()
        return watch

    def second(rows: Dataset) -> Timing:
        ends = run(rows).ends[-2:]
        return ends[1].since(ends[0])

    def checked(rows: Dataset) -> tuple[list[float], dict[str, Tensor]]:
        first = Gradients()
        return run(rows, first).losses, first.found

    return Side(model, lambda rows: run(rows).losses, second, checked)


def timed_tokens(row: Row, rows: Dataset) -> tuple[int, int]:
    """Tokens of the step that `Side.timed` times over ``rows``, and how many of them predict a trained token."""
    if not row.trainer:
        batch = _batches(rows)[-1]
        return batch.numel(), batch.numel() - len(batch)
    second = rows.select(range(BATCH, 2 * BATCH))
    n = sum(map(len, second["input_ids"]))
    return n, n - sum(map(len, second["seq_lengths"]))


def products_of(row: Row, model: Any, rows: Dataset) -> float:
    """Floating-point operations in the products with weights of the step that `Side.timed` times over ``rows``.

    They are counted from shapes. A frozen layer W (o, i) costs 2 n o i each way (q, k, v of the first block have no way
    back: nothing below them trains), a factor three times that; the head counts rows that predict a trained token.
    Attention is left out. With checkpointing the blocks run forward twice.
    """
    n, n_predicting = timed_tokens(row, rows)
    head = model.get_output_embeddings()
    total = 4.0 * n_predicting * head.in_features * head.out_features
    passes = 2 if row.checkpointing else 1
    first = {"q_proj", "k_proj", "v_proj"}
    for name, module in model.named_modules():
        if module is head or not hasattr(module, "in_features") or not isinstance(module.in_features, int):
            continue
        if ".lora_" in name:  # of PEFT's model; ours holds the factors in the layer itself
            continue
        size = module.in_features * module.out_features
        back = 0 if ".layers.0." in name and name.rsplit(".", 1)[-1] in first else 1
        total += 2.0 * n * (size * (passes + back) + 16 * (module.in_features + module.out_features) * (passes + 2))
    return total


def packed_rows(texts: list[list[int]], length: int) -> Dataset:
    """Token ids packed by TRL into rows of ``length``, in the columns that both trainers read."""
    from trl import pack_dataset

    fitting = Dataset.from_list([{"input_ids": ids[:length]} for ids in texts])
    packed = pack_dataset(fitting.with_format("arrow"), length, "bfd")
    return packed.with_format(None)


def cycled(rows: Dataset, n: int) -> Dataset:
    """The first n rows, from the start again where there are fewer."""
    return rows.select([i % len(rows) for i in range(n)])
