"""Model with a merged adapter as a GGUF file: merged, laid out, quantized and written tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from veneer.adapters.requantizing import Survival
from veneer.errors import NonFiniteError
from veneer.export.folded import FoldedCheckpoint
from veneer.export.gguf.metadata import name_of
from veneer.export.gguf.mix import MixOptions
from veneer.export.gguf.mixes import mix_of
from veneer.export.gguf.plan import FilePlan, assembled_blocks, describe_checkpoint, family_of, plan_file
from veneer.export.gguf.survival import FileSurvival
from veneer.export.gguf.tokenizer import read_tokenizer
from veneer.export.merged import floating_dtype
from veneer.export.model_folder import local_folder
from veneer.ops.ggml import FLOATS, quantize_ggml
from veneer.store.gguf.blocks import described_file
from veneer.store.gguf.importance import read_importance
from veneer.store.gguf.writer import GgufFileWriter, TensorSpec
from veneer.store.model_config import model_config

PIECE_VALUES = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufOptions:
    """Options of a GGUF file: its ``type``, with ``mix`` for exceptions.

    Values are rounded to ``dtype`` before they are quantized; if it is None, to the base's dtype. The bytes equal those
    that llama.cpp makes from a file of that dtype. With float32, the default for the file type F32, an adapter's update
    is never rounded. ``importance`` is the file of an importance matrix.
    """

    type: str
    mix: MixOptions = field(default_factory=MixOptions)
    dtype: str | torch.dtype | None = None
    name: str | None = None
    overwrite: bool = False
    max_part_bytes: int | None = None
    importance: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufReport:
    """Files written, their bytes, their plan, and the modules changed by the adapter.

    ``survival``: what is left of the adapter's update in tensors that the base's file also stores in blocks.
    """

    paths: tuple[Path, ...]
    n_bytes: int
    plan: FilePlan
    n_modules: int
    survival: tuple[Survival, ...] = ()


class GgufExport:
    """Planned export. Everything is checked at construction, and nothing is written before `write`.

    ``folder``: the base's folder. ``tokenizer``: the tokenizer to write. ``plan``: the whole file without its data.

    Raises FormatError, with every reason, if the format cannot hold the model, its tokenizer or the adapter. Raises
    CompositionError for adapters that cannot be merged.
    """

    def __init__(self, base: str | os.PathLike[str], adapter: Path | None, options: GgufOptions) -> None:
        mix = mix_of(options.type)
        self.folder = folder = local_folder(base)
        self._options = options
        self._importance = read_importance(options.importance) if options.importance else None
        family_of(model_config(folder).get_text_config())  # before a tensor is looked for: what it is comes first
        dtype = floating_dtype(options.dtype)
        self._wide = dtype == torch.float32 or (dtype is None and mix.default == "F32")
        self._source = FoldedCheckpoint(folder, adapter, dtype, wide=self._wide, called=base)
        described = describe_checkpoint(self._source, folder)
        self.tokenizer = read_tokenizer([adapter, folder] if adapter else [folder])
        name = options.name or name_of(adapter or base)
        self.plan = plan_file(
            described, mix, options.mix, self.tokenizer, folder=folder, name=name, importance=self._importance
        )

    def write(self, output: Path, on_progress: Callable[[int, int], None] = lambda done, total: None) -> GgufReport:
        """Write the file.

        Raises DiskError if the disk is full. Raises NonFiniteError or FormatError, with the tensor's name, for values
        that no block can hold. After an error nothing is left on disk.
        """
        plan = self.plan
        writer = GgufFileWriter(
            output,
            plan.pairs,
            plan.specs,
            max_part_bytes=self._options.max_part_bytes,
            overwrite=self._options.overwrite,
        )
        held = described_file(self.folder)
        compared = FileSurvival(held.path) if held else None
        with writer:
            for done, spec in enumerate(plan.specs):  # nothing here may hold on to a tensor while the next is made
                pairs = coded_rows(spec, self._blocks(spec.name), self._weights_of(spec))
                watch = compared if compared and self._is_changed(spec.name) and compared.takes(spec) else None
                writer.write(spec.name, watch.watched(spec, pairs) if watch else (packed for _, packed in pairs))
                on_progress(done + 1, len(plan.specs))
        return GgufReport(
            paths=tuple(writer.paths),
            n_bytes=writer.nbytes,
            plan=plan,
            n_modules=self._source.n_modules,
            survival=compared.found() if compared else (),
        )

    @property
    def adds_bos(self) -> bool:
        """Return True if the runtime starts every text with a BOS."""
        return any(pair.key == "tokenizer.ggml.add_bos_token" and pair.value for pair in self.plan.pairs)

    def _is_changed(self, name: str) -> bool:
        return any(self._source.changes(source.name) for source in self.plan.sources.get(name, ()))

    def _blocks(self, name: str) -> Iterator[Tensor]:
        """Return an iterator over blocks of rows of the file's tensor ``name``."""
        if name in self.plan.factors:
            return iter((self.plan.factors[name],))
        return assembled_blocks(self.plan, name, self._read, self._read_blocks)

    def _weights_of(self, spec: TensorSpec) -> Tensor | None:
        if self._importance is None:
            return None
        n_experts = spec.shape[0] if len(spec.shape) == 3 else 1
        return self._importance.of(spec.name, spec.shape[-1], n_experts)

    def _read(self, stored: str) -> Tensor:
        tensor = self._source.read(stored)
        return tensor if self._wide else tensor.to(self._source.specs[stored][0])

    def _read_blocks(self, stored: str) -> Iterator[Tensor]:
        dtype = self._source.specs[stored][0]
        return (block if self._wide else block.to(dtype) for block in self._source.blocks(stored))


def export_gguf(
    base: str | os.PathLike[str],
    output: Path,
    options: GgufOptions,
    *,
    adapter: Path | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> GgufReport:
    """Write a model, with a merged adapter, as a GGUF file. Raises the errors of `GgufExport` and its `write`."""
    return GgufExport(base, adapter, options).write(output, on_progress)


def encoded(spec: TensorSpec, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the bytes of a tensor in its type, in pieces of whole rows. They are those that `coded_rows` yields."""
    return (packed for _, packed in coded_rows(spec, blocks))


def coded_rows(
    spec: TensorSpec, blocks: Iterable[Tensor], importance: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows (k, columns) of a tensor and their bytes in its type.

    The tensor comes in blocks of rows (k, columns) or of experts (k, rows, columns), or is a vector. ``importance`` is
    (experts, columns).
    """
    columns, expert, first = spec.shape[-1], 0, 0
    try:
        for block in blocks:
            matrices = block.detach() if block.ndim == 3 else block.detach().reshape(1, -1, columns)
            for matrix in matrices:
                rows = matrix if matrix.dtype in FLOATS else matrix.float()
                weights = None if importance is None else importance[expert].contiguous()
                expert += block.ndim == 3
                for piece in torch.split(rows, max(1, PIECE_VALUES // columns)):
                    yield piece, quantize_ggml(piece, spec.kind, weights)
                    first += len(piece)
    except NonFiniteError as error:
        raise NonFiniteError(f"tensor {spec.name}, from its row {first} on: {error}") from error
