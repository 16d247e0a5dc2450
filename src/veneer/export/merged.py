"""A base checkpoint with an adapter folded in, written tensor by tensor: never the model in memory.

The model is built without storage; one module at a time gets its weights from the base, folds, and gives them up.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from veneer.contract import LinearMethod
from veneer.contract.file import WEIGHTS_FILE
from veneer.contract.keys import weight_keys
from veneer.errors import CompositionError
from veneer.export.base_weights import BaseWeights
from veneer.export.model_folder import copy_companions, local_folder
from veneer.model.adapted import Adapted
from veneer.model.allocation import Allocation
from veneer.model.attach import adapted_modules, attach, live_parameters
from veneer.model.embedding import input_embeddings
from veneer.model.linear import AdaptedSite
from veneer.model.state import AdapterState
from veneer.store.adapter.config import read_config
from veneer.store.adapter.files import read_tensors
from veneer.store.adapter.skeleton import without_storage
from veneer.store.adapter.tensors import assign
from veneer.store.checkpoint_writer import DEFAULT_SHARD_BYTES, CheckpointWriter
from veneer.store.source import parse_dtype

NAME = "merged"


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """``dtype`` of the result's floating tensors, None to keep the base's (16 bits where the base is quantized)."""

    dtype: str | torch.dtype | None = None
    overwrite: bool = False
    max_shard_bytes: int = DEFAULT_SHARD_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """The result of a merge: modules changed, tensors and bytes written, and True where tied embeddings were split."""

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
    """Fold an adapter into a base checkpoint and write the result as a model folder, tokenizer included.

    The values are those of ``merge_and_unload`` on the base in its own dtype, rounded to ``options.dtype`` at the end.
    An adapter that brings the embeddings and the head of a resized vocabulary whole gives the result that vocabulary.
    Raises FormatError where the files are damaged or do not fit each other, CompositionError for adapters that cannot
    be folded, and FormatError where ``output`` holds something and is not to be overwritten. Then nothing is written.
    """
    options = options or MergeOptions()
    folder, state = local_folder(base), AdapterState()
    config, tensors = _foldable(adapter), read_tensors(adapter)
    skeleton, n_rows = _skeleton(folder, tensors)
    weights = BaseWeights(folder, skeleton, [f"{path}.weight" for path, _ in _ends(skeleton)] if n_rows else [])
    _attach(skeleton, state, config, tensors, source=str(adapter / WEIGHTS_FILE), weights=weights)
    changed = {path: m for path, m in adapted_modules(skeleton).items() if m.holds(NAME)}
    plan = _plan(weights, changed, _wanted(options.dtype))
    with CheckpointWriter(
        output, plan.specs, max_shard_bytes=options.max_shard_bytes, overwrite=options.overwrite
    ) as writer:
        folded: dict[tuple[str, str], Tensor] = {}
        for done, name in enumerate(plan.specs):  # nothing here may hold on to a tensor while the next one is made
            writer.write(name, _result(name, weights, changed, plan, folded), convert=True)
            on_progress(done + 1, len(plan.specs))
        copy_companions([folder, adapter], writer.staging)
        _write_config(folder, writer.staging, plan, n_rows)
    n_bytes = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in plan.specs.values())
    return MergeReport(n_modules=len(changed), n_tensors=len(plan.specs), n_bytes=n_bytes, untied=plan.untied)


@dataclass(frozen=True, slots=True)
class _Plan:
    """``specs`` of the result by name; ``owners`` tells for a name of the result the module and parameter it is."""

    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    owners: dict[str, tuple[str, str]]
    untied: bool
    dtype: torch.dtype | None


def _wanted(dtype: str | torch.dtype | None) -> torch.dtype | None:
    parsed = None if dtype is None else parse_dtype(dtype)
    return None if isinstance(parsed, str) else parsed


def _foldable(adapter: Path) -> LinearMethod:
    config = read_config(adapter)
    if not isinstance(config, LinearMethod):
        raise CompositionError(
            f"the adapter {adapter} ({config.peft_type}) does not change weights, so it cannot be folded into them: "
            "keep it beside the model"
        )
    return config


def _skeleton(folder: Path, tensors: Mapping[str, Tensor]) -> tuple[PreTrainedModel, int | None]:
    """The model of a folder without storage, as if it were not quantized, and the size of the adapter's vocabulary,
    which it gets, where that is another.
    """
    config = AutoConfig.from_pretrained(folder)
    model = without_storage(config, tensors)
    n_rows = _vocabulary(model, tensors)
    if n_rows in (None, config.get_text_config().vocab_size):
        return model, None
    config.get_text_config().vocab_size = n_rows
    return without_storage(config, tensors), n_rows


def _vocabulary(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> int | None:
    """The rows of the embeddings and of the head, where an adapter brings both whole."""
    found = set()
    for path, _ in _ends(model):
        found.add(next((tensors[key].shape[0] for key in weight_keys(path) if key in tensors), None))
    return found.pop() if len(found) == 1 else None


def _attach(
    skeleton: PreTrainedModel,
    state: AdapterState,
    config: LinearMethod,
    tensors: Mapping[str, Tensor],
    *,
    source: str,
    weights: BaseWeights,
) -> None:
    """The adapter on the skeleton: its own tensors are real."""
    attach(skeleton, config, NAME, state, allocation=Allocation(values=False))
    for module in adapted_modules(skeleton).values():
        for held in (module.adapters, module.copies):
            if NAME in held:
                held[NAME].to_empty(device="cpu")
    ends = _ends(skeleton) if set(tensors) - set(live_parameters(skeleton, state, NAME)) else []
    with _filled(ends, weights):  # whole embeddings that came along are compared with the base's
        assign(skeleton, state, NAME, tensors, source=source)


def _ends(skeleton: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    ends = (input_embeddings(skeleton), skeleton.get_output_embeddings())
    return [(path, m) for path, m in skeleton.named_modules() if any(m is end for end in ends)]


def _plan(weights: BaseWeights, changed: dict[str, Adapted], dtype: torch.dtype | None) -> _Plan:
    """A tied tensor of which one name changes, or its names change in different ways, is written under each of them."""
    owners = {f"{path}.{key}": (path, key) for path, m in changed.items() for key in weights.own(m)}
    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
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
    return _Plan(specs, placed, untied, dtype)


def _stay_one(changed: list[Adapted], n_names: int) -> bool:
    """Return True if a tensor under several names stays one, given the modules among them that the adapter changes."""
    alike = (len(changed) == n_names) and all(module.changes_as(changed[0], (NAME,)) for module in changed)
    return not changed or alike


def _result(
    name: str,
    weights: BaseWeights,
    changed: dict[str, Adapted],
    plan: _Plan,
    folded: dict[tuple[str, str], Tensor],
) -> Tensor:
    """A tensor of the result; ``folded`` keeps what folding a module made of its other tensors until they are due."""
    if name not in plan.owners:
        return weights.read_stored(name)
    path, key = plan.owners[name]
    if (path, key) not in folded:
        folded |= {(path, k): value for k, value in _fold(path, changed[path], weights).items()}
    return folded.pop((path, key))


@torch.no_grad()
def _fold(path: str, module: Adapted, weights: BaseWeights) -> dict[str, Tensor]:
    with _filled([(path, module)], weights):
        values = module.folded((NAME,))
        own = {key: cast(Tensor, module._parameters[key]).detach() for key in weights.own(module)}
    added = sorted(set(values) - set(own))
    if added:
        raise CompositionError(f"the adapter adds {added} to {path}, which the model's architecture has no place for")
    return own | values


@contextmanager
def _filled(modules: list[tuple[str, nn.Module]], weights: BaseWeights) -> Iterator[None]:
    """Inside the block these modules have the base's parameters."""
    before = [(module, dict(module._parameters)) for _, module in modules]
    for path, module in modules:
        for key in weights.own(module):
            module._parameters[key] = nn.Parameter(weights.read(f"{path}.{key}"), requires_grad=False)
    try:
        yield
    finally:
        for module, parameters in before:
            module._parameters.update(parameters)
            if isinstance(module, AdaptedSite):
                module.forget()


def _write_config(base: Path, into: Path, plan: _Plan, n_rows: int | None) -> None:
    text = (base / "config.json").read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)
    config.pop("quantization_config", None)
    if n_rows:
        config.get("text_config", config)["vocab_size"] = n_rows
    floating = {dtype for dtype, _ in plan.specs.values() if dtype.is_floating_point}
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if plan.untied and "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
        for key in ("dtype", "torch_dtype"):
            if key in part and len(floating) == 1:
                part[key] = str(next(iter(floating))).removeprefix("torch.")
    if plan.untied:
        config["tie_word_embeddings"] = False
    (into / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
