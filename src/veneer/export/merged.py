"""Base checkpoint with a merged adapter, written tensor by tensor: the model is never in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from veneer.export.folded import FoldedCheckpoint
from veneer.export.model_folder import copy_companions, local_folder
from veneer.store.checkpoint_writer import DEFAULT_SHARD_BYTES, CheckpointWriter
from veneer.store.merge_record import write_record
from veneer.store.source import parse_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """Options of a merge.

    ``dtype`` is that of the result's floating-point tensors. If it is None, they have the base's dtype (16 bits for a
    quantized base).
    """

    dtype: str | torch.dtype | None = None
    overwrite: bool = False
    max_shard_bytes: int = DEFAULT_SHARD_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """Result of a merge: modules changed, tensors and bytes written, and True if tied embeddings were split."""

    n_modules: int
    n_tensors: int
    n_bytes: int
    untied: bool


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapter: Path,
    output: Path,
    options: MergeOptions | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> MergeReport:
    """Merge an adapter into a base checkpoint and write the result as a model folder, tokenizer included.

    The values are those of ``merge_and_unload`` on the base in its own dtype, rounded to ``options.dtype`` at the end.
    If the adapter holds the embeddings and head of a resized vocabulary, the result has that vocabulary.

    Raises FormatError if the files are damaged or do not fit each other. Raises CompositionError for adapters that
    cannot be merged or are in the base's merge record. Raises FormatError if ``output`` holds something and must not be
    overwritten. In all these cases nothing is written.
    """
    options = options or MergeOptions()
    folder = local_folder(base)
    source = FoldedCheckpoint(folder, adapter, floating_dtype(options.dtype), called=base)
    with CheckpointWriter(
        output, source.specs, max_shard_bytes=options.max_shard_bytes, overwrite=options.overwrite
    ) as writer:
        for done, name in enumerate(source.specs):  # nothing here may hold on to a tensor while the next one is made
            writer.write(name, source.read(name), convert=True)
            on_progress(done + 1, len(source.specs))
        copy_companions([folder, adapter], writer.staging)
        write_record(folder, adapter, writer.staging)
        text = json.dumps(source.config, indent=2) + "\n"
        (writer.staging / "config.json").write_text(text, encoding="utf-8")
    n_bytes = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in source.specs.values())
    return MergeReport(n_modules=source.n_modules, n_tensors=len(source.specs), n_bytes=n_bytes, untied=source.untied)


def floating_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return the torch dtype of a user's name for it; None for None or ``"auto"``, which mean the base's."""
    parsed = None if dtype is None else parse_dtype(dtype)
    return None if isinstance(parsed, str) else parsed
