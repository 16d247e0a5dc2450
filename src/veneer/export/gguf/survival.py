"""Share of an adapter's update that a GGUF file keeps, if the base's weights are also in the blocks of a GGUF file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from veneer.adapters.requantizing import Survival, SurvivalSums
from veneer.disk.mapped import MappedFile
from veneer.ops.ggml import dequantize_ggml
from veneer.ops.ggml_types import GGML_TYPES
from veneer.store.gguf.header import read_header
from veneer.store.gguf.rows import stored_rows
from veneer.store.gguf.writer import TensorSpec


class FileSurvival:
    """Comparison of the blocks of an exported file with those of the base, which is the GGUF file ``base``.

    Both files have the same layout.
    """

    def __init__(self, base: Path) -> None:
        self._source = MappedFile(base)
        self._tensors = {tensor.name: tensor for tensor in read_header(base).tensors}
        self._sums: dict[str, SurvivalSums] = {}

    def takes(self, spec: TensorSpec) -> bool:
        """Return True if a tensor has blocks in both files."""
        tensor = self._tensors.get(spec.name)
        kinds = (spec.kind, *([] if tensor is None else [tensor.type]))
        return tensor is not None and tensor.shape == spec.shape and all(GGML_TYPES[kind].block > 1 for kind in kinds)

    def watched(self, spec: TensorSpec, pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        """Yield the bytes of a tensor in order, and compare them with the base's. ``pairs``: merged rows (k, columns)
        and bytes.
        """
        tensor, sums, first = self._tensors[spec.name], SurvivalSums(), 0
        stored = stored_rows(tensor, self._source.path)
        blocks = self._source.tensor(stored.start, stored.nbytes).view(stored.shape)
        for rows, packed in pairs:
            before = dequantize_ggml(blocks[first : first + len(rows)], tensor.type)
            sums.add(before, rows.float(), dequantize_ggml(packed, spec.kind))
            first += len(rows)
            yield packed
        self._sums[spec.name] = sums

    def found(self) -> tuple[Survival, ...]:
        """Return for each tensor the share of the adapter's update that survives in the file."""
        return tuple(sums.survival(name) for name, sums in self._sums.items())
