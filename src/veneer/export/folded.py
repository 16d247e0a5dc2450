"""Tensors of a base with a merged adapter, computed one at a time on request.

The model is built without storage. One module at a time gets its weights from the base, merges, and frees them.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.adapters.merging import require_everywhere
from veneer.contract import MethodConfig
from veneer.contract.file import WEIGHTS_FILE
from veneer.contract.keys import is_of_wrapped, weight_keys
from veneer.disk.safetensors import StoredTensor
from veneer.errors import CompositionError
from veneer.export.base_weights import BaseWeights, Spec, in_blocks, is_copy
from veneer.model.adapted.allocation import Allocation
from veneer.model.adapted.embedding import input_embeddings
from veneer.model.adapted.site import Adapted, forget_weight
from veneer.model.adapted.state import AdapterState
from veneer.model.attach.attach import adapted_modules, attach, live_parameters
from veneer.store.adapter.config import read_config
from veneer.store.adapter.files import read_headers
from veneer.store.adapter.fit import fitting
from veneer.store.adapter.skeleton import without_storage
from veneer.store.adapter.tensors import assign
from veneer.store.merge_record import require_not_merged
from veneer.store.model_config import model_config

NAME = "merged"


class FoldedCheckpoint:
    """Checkpoint of the dense base in ``folder`` with an adapter merged in. If ``adapter`` is None, it is the base
    alone.

    ``specs``: dtype and shape of every tensor of the result, by its name in files. ``untied``: tied embeddings have
    become two tensors. ``prefix``: the start of names in the model without its head. ``n_modules``: the number of
    modules that the adapter changes. ``dtype``: that of the result's floating-point tensors; if it is None, the base's.
    ``wide``: merged weights are float32 sums, never rounded to the base's dtype. ``called``: the base's name in errors.

    Raises FormatError if the files are damaged or do not fit each other. Raises CompositionError for adapters that
    cannot be merged or are already in the base.
    """

    def __init__(
        self,
        folder: Path,
        adapter: Path | None,
        dtype: torch.dtype | None = None,
        *,
        wide: bool = False,
        called: str | os.PathLike[str] | None = None,
    ) -> None:
        self._folder, self._wide = folder, wide
        config = _foldable(adapter) if adapter else None
        self._reads_weight = config is not None and config.reads_weight
        stored = read_headers(adapter) if adapter else {}
        if adapter:
            require_not_merged(folder, adapter)
        skeleton, self._n_rows = _skeleton(folder, stored)
        resized = [f"{path}.weight" for path, _ in _ends(skeleton)] if self._n_rows else []
        self._weights = BaseWeights(folder, skeleton, resized)
        self.prefix = skeleton.base_model_prefix
        self._changed: dict[str, Adapted] = {}
        if adapter and config:
            left_out = _came_along(stored, skeleton, self._weights)
            tensors = {key: tensor.read() for key, tensor in stored.items() if key not in left_out}
            source = str(adapter / WEIGHTS_FILE)
            with fitting(adapter, os.fspath(called or folder)):
                _attach(skeleton, AdapterState(), config, tensors, source=source, weights=self._weights)
            self._changed = {path: m for path, m in adapted_modules(skeleton).items() if m.holds(NAME)}
        self._plan = _plan(self._weights, self._changed, dtype)
        self._pending: dict[tuple[str, str], Tensor] = {}  # what folding a module made besides, until it is due
        self.specs: Mapping[str, Spec] = self._plan.specs
        self.untied = self._plan.untied
        self.n_modules = len(self._changed)

    def read(self, name: str) -> Tensor:
        """Return a tensor of ``specs``, before it is rounded to its dtype."""
        if name not in self._plan.owners:
            return self._weights.read_stored(name)
        path, key = self._plan.owners[name]
        if (path, key) not in self._pending:
            folded = _fold(path, self._changed[path], self._weights, self._wide)
            self._pending |= {(path, k): value for k, value in folded.items()}
        return self._pending.pop((path, key))

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield the rows (k, …) of the tensor that `read` returns, in order, a few of them in memory at a time.

        Fully trained modules, and adapters whose factors depend on the weight itself, are read whole.
        """
        if name not in self._plan.owners:
            yield from self._weights.blocks(name)
            return
        path, key = self._plan.owners[name]
        if (path, key) not in self._pending:
            module = self._changed[path]
            own = self._weights.blocks(self._weights.stored_name(f"{path}.{key}", own=True))
            first = next(own)
            dtype = torch.float32 if self._wide else first.dtype
            # factors that come of the weight come of a wide one; others do not ask for its values
            with filled([(path, module)], self._weights, self._wide, vectors=not self._reads_weight), torch.no_grad():
                rows = module.folded_rows(key, (NAME,), itertools.chain((first,), own), dtype)
                if rows is not None:
                    yield from rows
                    return
        yield from in_blocks(self.read(name))

    def changes(self, name: str) -> bool:
        """Return True if a tensor of ``specs`` belongs to a module that the adapter changes."""
        return name in self._plan.owners

    def model_name(self, name: str) -> str | None:
        """Return the model's own name for a tensor of ``specs``; None if it is not a parameter."""
        return self._weights.model_name(name)

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json`` of the result."""
        config: dict[str, Any] = json.loads((self._folder / "config.json").read_text(encoding="utf-8"))
        config.pop("quantization_config", None)
        if self._n_rows:
            config.get("text_config", config)["vocab_size"] = self._n_rows
        floating = {dtype for dtype, _ in self.specs.values() if dtype.is_floating_point}
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            if self.untied and "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
            for key in ("dtype", "torch_dtype"):
                if key in part and len(floating) == 1:
                    part[key] = str(next(iter(floating))).removeprefix("torch.")
        if self.untied:
            config["tie_word_embeddings"] = False
        return config


@dataclass(frozen=True, slots=True)
class _Plan:
    """Tensors to write: ``specs`` by name, and in ``owners`` the module and the parameter of each tensor that
    changes.
    """

    specs: dict[str, Spec]
    owners: dict[str, tuple[str, str]]
    untied: bool


def _foldable(adapter: Path) -> MethodConfig:
    config = read_config(adapter)
    if not config.changes_weights:
        raise CompositionError(
            f"the adapter {adapter} ({config.peft_type}) does not change weights, so it cannot be folded into them: "
            "keep it beside the model"
        )
    require_everywhere(adapter, config)
    return config


def _skeleton(folder: Path, tensors: Mapping[str, StoredTensor]) -> tuple[PreTrainedModel, int | None]:
    """Build a folder's model without storage, as if it were not quantized; resize its vocabulary to the adapter's.

    Return the model, and the adapter's vocabulary size if it differs from the base's, else None.
    """
    config = model_config(folder)
    model = without_storage(config, tensors)
    n_rows = _vocabulary(model, tensors)
    if n_rows in (None, config.get_text_config().vocab_size):
        return model, None
    config.get_text_config().vocab_size = n_rows
    return without_storage(config, tensors), n_rows


def _vocabulary(model: PreTrainedModel, tensors: Mapping[str, StoredTensor]) -> int | None:
    """Return the vocabulary size of an adapter that stores full embeddings and a full head; otherwise None."""
    found = set()
    for path, _ in _ends(model):
        found.add(next((tensors[key].shape[0] for key in weight_keys(path) if key in tensors), None))
    return found.pop() if len(found) == 1 else None


def _came_along(stored: Mapping[str, StoredTensor], skeleton: PreTrainedModel, weights: BaseWeights) -> set[str]:
    """Return the keys of embeddings that equal the base's.

    PEFT saves such a copy with the low-rank factors of embeddings.
    """
    ends = {key: f"{path}.weight" for path, _ in _ends(skeleton) for key in weight_keys(path) if is_of_wrapped(key)}
    return {
        key
        for key, name in ends.items()
        if key in stored
        and stored[key].shape == weights.spec(name, None)[1]
        and is_copy(stored[key], weights.blocks(weights.stored_name(name, own=True)))
    }


def _attach(
    skeleton: PreTrainedModel,
    state: AdapterState,
    config: MethodConfig,
    tensors: Mapping[str, Tensor],
    *,
    source: str,
    weights: BaseWeights,
) -> None:
    """Attach the adapter to the skeleton. Only the adapter's tensors have storage."""
    attach(skeleton, config, NAME, state, allocation=Allocation(values=False))
    for module in adapted_modules(skeleton).values():
        for held in (module.adapters, module.copies):
            if NAME in held:
                held[NAME].to_empty(device="cpu")
    ends = _ends(skeleton) if set(tensors) - set(live_parameters(skeleton, state, NAME)) else []
    with filled(ends, weights):  # whole embeddings that came along are compared with the base's
        assign(skeleton, state, NAME, tensors, source=source)


def _ends(skeleton: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    ends = (input_embeddings(skeleton), skeleton.get_output_embeddings())
    return [(path, m) for path, m in skeleton.named_modules() if any(m is end for end in ends)]


def _plan(weights: BaseWeights, changed: Mapping[str, Adapted], dtype: torch.dtype | None) -> _Plan:
    """Plan the tensors of the folded model's file.

    Tied modules share one tensor. If the adapter does not change them all alike, each gets a tensor of its own.
    """
    owners = {f"{path}.{key}": (path, key) for path, m in changed.items() for key in weights.own(m)}
    specs: dict[str, Spec] = {}
    placed: dict[str, tuple[str, str]] = {}
    untied = False
    for names in weights.groups():
        modules = [changed[owners[name][0]] for name in names if name in owners]
        apart = len(names) > 1 and not _stay_one(modules, len(names))
        untied |= apart
        for name in names if apart else names[:1]:
            stored = weights.stored_name(name, own=not apart)
            specs[stored] = weights.spec(name, dtype)
            placed |= {stored: owners[name]} if name in owners else {}
    specs |= {name: weights.passed_spec(name, dtype) for name in weights.others()}
    return _Plan(specs, placed, untied)


def _stay_one(changed: list[Adapted], n_names: int) -> bool:
    """Return True if the ``n_names`` modules that share a tensor can still share one tensor after folding.

    They can if the adapter changes none of them, or all of them alike. ``changed`` are the modules that it changes.
    """
    alike = (len(changed) == n_names) and all(module.changes_as(changed[0], (NAME,)) for module in changed)
    return not changed or alike


@torch.no_grad()
def _fold(path: str, module: Adapted, weights: BaseWeights, wide: bool) -> dict[str, Tensor]:
    with filled([(path, module)], weights, wide):
        values = module.folded((NAME,))
        own = {key: cast(Tensor, module._parameters[key]).detach() for key in weights.own(module)}
    added = sorted(set(values) - set(own))
    if added:
        raise CompositionError(
            f"the adapter adds {added} to {path}, and the model's architecture has no place for it: keep the adapter "
            "beside the model"
        )
    return own | values


@contextmanager
def filled(
    modules: list[tuple[str, nn.Module]], weights: BaseWeights, wide: bool = False, *, vectors: bool = False
) -> Iterator[None]:
    """Enter a context in which modules have the base's parameters, in float32 if ``wide``.

    If ``vectors``, only parameters of one dimension are set.
    """
    before = [(module, dict(module._parameters)) for _, module in modules]
    filled: dict[int, nn.Parameter] = {}  # by the parameter without storage: a tied one is read once
    for path, module in modules:
        for key in weights.own(module):
            empty = id(module._parameters[key])
            if vectors and cast(Tensor, module._parameters[key]).ndim > 1:
                continue
            if empty not in filled:
                value = (weights.read_wide if wide else weights.read)(f"{path}.{key}")
                filled[empty] = nn.Parameter(value, requires_grad=False)
            module._parameters[key] = filled[empty]
    try:
        yield
    finally:
        for module, parameters in before:
            module._parameters.update(parameters)
            forget_weight(module)
