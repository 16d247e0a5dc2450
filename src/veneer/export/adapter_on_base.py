"""Adapter beside the files of its base: the base's weights for methods that read them, and tensors that are no
copies."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

from transformers import PreTrainedModel

from veneer.contract.places import Placed
from veneer.export.base_weights import BaseWeights, WeightInFile, is_copy
from veneer.export.folded import filled
from veneer.model.adapted.linear import row_squares
from veneer.model.modules.snapshot import look_at
from veneer.records.frozen import FrozenWeight
from veneer.records.linear import BLOCK_VALUES
from veneer.records.sites import LinearSite
from veneer.store.adapter.files import read_headers
from veneer.store.adapter.records import StoredAdapter
from veneer.store.checkpoint import Checkpoint


def with_weights(places: Mapping[str, Placed], skeleton: PreTrainedModel, base: Path) -> dict[str, Placed]:
    """Give the linear layers among the adapted modules their weights from a base's files, each read when it is
    needed."""
    weights, kinds, modules = BaseWeights(base, skeleton), look_at(skeleton).kinds, dict(skeleton.named_modules())

    def read(path: str) -> FrozenWeight:
        with filled([(path, modules[path])], weights, wide=True):
            return kinds[path].weight(modules[path])

    def with_weight(path: str, placed: Placed) -> Placed:
        site = cast(LinearSite, placed.site)
        weight = WeightInFile((site.out_features, site.in_features), functools.partial(read, path))
        return replace(placed, site=replace(site, weight=weight, row_sq=lambda: row_squares(weight.dense())))

    return {path: with_weight(path, placed) for path, placed in places.items()}


def changed_tensors(stored: StoredAdapter, adapter: Path, base: Path) -> Iterator[str]:
    """Yield the keys of an adapter's tensors that are no part of its updates, such as trained copies of modules.

    A copy of a base's weight is left out if its values equal the base's.
    """
    copies = {f"{path}.base_layer.weight": f"{path}.weight" for path in stored.updates}
    weights, files = Checkpoint.open(base), read_headers(adapter)
    for key in stored.others:
        name = next((own for end, own in copies.items() if key.endswith(end)), "")
        alike = name in weights.tensors and weights.tensors[name].shape == files[key].shape
        if not alike or not is_copy(files[key], weights.blocks(name, BLOCK_VALUES)):
            yield key
