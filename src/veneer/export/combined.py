"""Combination of whole checkpoints of one base, tensor by tensor: no model is ever in memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from veneer.combine.sparsify import draw_of
from veneer.combine.task_vectors import TaskVectors, merge_task_vectors
from veneer.errors import CompositionError, FormatError, listed
from veneer.export.model_folder import copy_companions, local_folder
from veneer.store.checkpoint import Checkpoint
from veneer.store.checkpoint_writer import DEFAULT_SHARD_BYTES, CheckpointWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class CombineOptions:
    """Settings of the written files."""

    overwrite: bool = False
    max_shard_bytes: int = DEFAULT_SHARD_BYTES


def combine_checkpoints(
    base: str | os.PathLike[str],
    models: Mapping[str | os.PathLike[str], float] | Sequence[tuple[str | os.PathLike[str], float]],
    output: Path,
    plan: TaskVectors,
    *,
    options: CombineOptions | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write the base plus the weighted task vectors of fine-tuned models. Return the number of bytes of the base's
    tensors.

    Tensors keep the base's dtypes; config and tokenizer are the base's. DARE's random choice for a tensor depends only
    on the seed and the tensor's name.

    Raises FormatError if files are damaged, if weights are quantized, or if the models' tensors and shapes differ from
    the base's. Raises FormatError if ``output`` holds something and must not be overwritten. In all these cases nothing
    is written.
    """
    options = options or CombineOptions()
    pairs = list(models.items() if isinstance(models, Mapping) else models)
    if not pairs:
        raise CompositionError("there is no model to combine with the base: name at least one")
    weights = [weight for _, weight in pairs]
    folder = local_folder(base)
    root, tuned = Checkpoint.open(folder), [Checkpoint.open(local_folder(model)) for model, _ in pairs]
    for (model, _), checkpoint in zip(pairs, tuned, strict=True):
        _require_alike(root, checkpoint, os.fspath(model))
    specs = {name: (stored.dtype, stored.shape) for name, stored in root.tensors.items()}
    writer = CheckpointWriter(output, specs, max_shard_bytes=options.max_shard_bytes, overwrite=options.overwrite)
    with writer:
        for done, name in enumerate(specs):
            writer.write(name, _combined(name, root, tuned, weights, plan))
            on_progress(done + 1, len(specs))
        copy_companions([folder], writer.staging)
        shutil.copyfile(folder / "config.json", writer.staging / "config.json")
    return root.nbytes


def _combined(
    name: str, root: Checkpoint, tuned: Sequence[Checkpoint], weights: Sequence[float], plan: TaskVectors
) -> Tensor:
    base, others = root.read(name), [checkpoint.read(name) for checkpoint in tuned]
    if all(torch.equal(base, other) for other in others):
        return base
    if not base.is_floating_point():
        raise FormatError(f"tensor {name!r} is {base.dtype} and differs between the models: combine dense weights")
    generator = draw_of(plan.seed, name)
    return merge_task_vectors(base, others, weights, plan, generator)


def _require_alike(base: Checkpoint, tuned: Checkpoint, model: str) -> None:
    problems = [f"tensor {name!r} is missing" for name in base.tensors if name not in tuned.tensors]
    problems += [f"tensor {name!r} is not in the base" for name in tuned.tensors if name not in base.tensors]
    problems += [
        f"tensor {name!r} has shape {tuned.tensors[name].shape} instead of {stored.shape}"
        for name, stored in base.tensors.items()
        if name in tuned.tensors and tuned.tensors[name].shape != stored.shape
    ]
    if problems:
        told = f"{model} is not a fine-tuned form of the base"
        raise FormatError(listed(problems, told, 20, "Give models trained from it"))
