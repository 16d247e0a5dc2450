"""Summary of a GGUF file's tensors: equal layers in one row, and the number of tensors of each type."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from veneer.store.gguf.writer import TensorSpec


def rows(specs: Sequence[TensorSpec]) -> dict[tuple[str, str, tuple[int, ...]], list[TensorSpec]]:
    """Group tensors by name (without the layer), type and shape. Tensors of several layers that agree in all three
    share a list.
    """
    order = {leaf: place for place, leaf in enumerate(dict.fromkeys(_leaf(spec.name) for spec in specs))}
    found: dict[tuple[str, str, tuple[int, ...]], list[TensorSpec]] = {}
    for spec in sorted(specs, key=lambda spec: order[_leaf(spec.name)]):
        found.setdefault((_leaf(spec.name), spec.kind, spec.shape), []).append(spec)
    return found


def ranges(numbers: Iterable[int]) -> str:
    """Return numbers as text with ranges: ``0-3, 7`` for 0, 1, 2, 3 and 7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def summary(specs: Sequence[TensorSpec]) -> str:
    """Return a summary such as ``272 tensors (180 Q5_0, 61 F32, …), 6.17 bits a weight``."""
    kinds = Counter(spec.kind for spec in specs)
    n_weights = sum(math.prod(spec.shape) for spec in specs)
    bits = 8 * sum(spec.nbytes for spec in specs) / n_weights
    listed = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
    return f"{len(specs)} tensors ({listed}), {bits:.2f} bits a weight"


def layers_of(specs: Iterable[TensorSpec]) -> list[int]:
    """Return the layer numbers of these tensors."""
    return [int(spec.name.split(".")[1]) for spec in specs if spec.name.startswith("blk.")]


def _leaf(name: str) -> str:
    """Return a tensor's name without its layer."""
    return name.split(".", 2)[-1] if name.startswith("blk.") else name
