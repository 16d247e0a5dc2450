"""Adapter as a GGUF file for llama.cpp: low-rank factors, with each module's scaling multiplied in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFValueType
from torch import Tensor

from veneer.contract import MethodConfig
from veneer.errors import CompositionError, ConfigError
from veneer.export.adapter_on_base import changed_tensors, with_weights
from veneer.export.gguf.metadata import name_of
from veneer.export.gguf.mix import quantize_order
from veneer.export.gguf.mixes import adapter_mix_of
from veneer.export.gguf.model import encoded
from veneer.export.gguf.plan import family_of, laid_out_rows
from veneer.export.model_folder import local_folder
from veneer.model.sites.places import placed_on
from veneer.records.deltas import LinearDelta
from veneer.store.adapter.config import read_config
from veneer.store.adapter.files import read_headers
from veneer.store.adapter.records import StoredAdapter, read_records
from veneer.store.adapter.skeleton import without_storage
from veneer.store.gguf.family import GgufFamily
from veneer.store.gguf.keys import KeyValue
from veneer.store.gguf.names import leaf_of, places_of, text_name
from veneer.store.gguf.writer import GgufFileWriter, TensorSpec
from veneer.store.model_config import model_config

Part = Callable[[Tensor], Tensor]
_EMBEDDINGS, _HEAD = "token_embd.weight", "output.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraReport:
    """Modules and bytes of a written file."""

    n_modules: int
    n_bytes: int


def export_lora(
    adapter: Path, output: Path, *, base: str | None = None, type: str = "F32", overwrite: bool = False
) -> LoraReport:
    """Write an adapter as a GGUF file. If ``base`` is None, it is the one that the config names.

    Each module's own scaling (rsLoRA, rank and alpha patterns) is multiplied into B, and no alpha is written. A
    runtime's scale of 1 is then the adapter as trained.

    Raises CompositionError, with merging as advice, for adapters that the format cannot hold. These are methods without
    low-rank updates, DoRA, biases, whole modules, and embeddings and heads on tied bases. Raises ConfigError if the
    base is unknown.
    """
    kind = adapter_mix_of(type)
    named, family, config, stored = _read(adapter, base)
    found, problems = _tensors(stored, family, config)
    if problems:
        raise CompositionError(
            f"a GGUF file cannot hold the adapter {adapter}: {'; '.join(problems)}. {_way(named, adapter)}"
        )
    specs = [TensorSpec(name, kind.default, tuple(found[name].shape)) for name in quantize_order(list(found))]
    pairs = _pairs(adapter, family, named, kind.number) + _invocation(stored.config)
    writer = GgufFileWriter(output, pairs, specs, overwrite=overwrite)
    with writer:
        for spec in specs:
            writer.write(spec.name, encoded(spec, [found[spec.name]]))
    return LoraReport(n_modules=len(found) // 2, n_bytes=writer.nbytes)


def _read(adapter: Path, base: str | None) -> tuple[str, GgufFamily, Any, StoredAdapter]:
    method = read_config(adapter)
    named = base or method.base_model_name_or_path
    if not named:
        raise ConfigError(f"the adapter {adapter} does not name its base: give it (--base MODEL)")
    if not method.changes_weights:
        raise CompositionError(
            f"a GGUF file cannot hold the adapter {adapter}: {method.peft_type} does not change weights, and no merge "
            "can fold it: serve it with `veneer serve`"
        )
    folder = local_folder(named)
    config = model_config(folder)
    family = family_of(config.get_text_config())
    skeleton = without_storage(config, read_headers(adapter))
    places = placed_on(skeleton, method)
    stored = read_records(adapter, with_weights(places, skeleton, folder) if method.reads_weight else places)
    if method.reads_weight and not all(record.only_adds for record in stored.updates.values()):
        raise CompositionError(
            f"a GGUF file cannot hold the adapter {adapter}: its update depends on the weights of the base, and the "
            f"format has low-rank factors alone. {_way(named, adapter)}"
        )
    stored = replace(stored, others=tuple(changed_tensors(stored, adapter, folder)))
    return named, family, config.get_text_config(), stored


def _way(base: str, adapter: Path) -> str:
    return f"Merge it instead: veneer export gguf {base} --adapter {adapter} -o FILE"


def _tensors(stored: StoredAdapter, family: GgufFamily, config: Any) -> tuple[dict[str, Tensor], list[str]]:
    found: dict[str, Tensor] = {}
    refused: dict[str, list[str]] = {}
    for path, record in stored.updates.items():
        places = _places(path, family, config)
        reasons = list(_reasons([name for name, _ in places], record, config))
        for reason in reasons:
            refused.setdefault(reason, []).append(path)
        for name, part in places if not reasons else ():
            found |= dict(_factors(name, part, record, family, config))
    problems = [f"{_first(paths)} {reason}" for reason, paths in refused.items()]
    return found, ([f"it trains whole modules or rows: {_first(stored.others)}"] if stored.others else []) + problems


def _places(path: str, family: GgufFamily, config: Any) -> list[tuple[str, Part]]:
    """Return the file's tensors that a record of a module or a parameter changes, and the function that selects each
    one's rows of B. Gate and up of experts are two tensors there.
    """
    texts = (text_name(name) for name in (f"{path}.weight", path))
    return next((found for text in texts if text and (found := places_of(family, config, text, "model"))), [])


def _first(paths: Sequence[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} (and {len(paths) - 1} more)"


def _reasons(names: Sequence[str], record: LinearDelta, config: Any) -> Iterator[str]:
    if not names:
        yield "has no name in the format"
    pair = record.low_rank
    if record.changes:
        yield "is changed as a whole"
    elif pair is None and record.only_scales:
        yield "is scaled or shifted without low-rank factors"
    if not record.only_adds:
        yield "scales or rotates inputs or outputs"
    if record.bias is not None:
        yield "trains a bias"
    if {_EMBEDDINGS, _HEAD}.intersection(names) and config.tie_word_embeddings:
        yield "is tied (embeddings and head are one), on which llama.cpp aborts at the first token"


def _factors(
    name: str, part: Part, record: LinearDelta, family: GgufFamily, config: Any
) -> Iterator[tuple[str, Tensor]]:
    """Yield A, and the tensor's part of B with all scales folded in. A of an embedding is transposed. Factors of
    experts are stacks.
    """
    a, b = record.factors(torch.float32)
    rows = part(b.mT).mT if b.ndim == 3 and leaf_of(name) in family.turned else part(b)  # as the parameter lies
    yield f"{name}.lora_a", (a.T if name == _EMBEDDINGS else a).contiguous()
    yield f"{name}.lora_b", laid_out_rows(family, config, name, rows).contiguous()


def _invocation(method: MethodConfig) -> list[KeyValue]:
    """Return the metadata of aLoRA's invocation tokens, or an empty list if there are none. llama.cpp applies the
    adapter from these tokens on.
    """
    tokens, number = list(method.invocation_tokens), GGUFValueType.UINT32
    return [KeyValue("adapter.alora.invocation_tokens", tokens, GGUFValueType.ARRAY, number)] if tokens else []


def _pairs(adapter: Path, family: GgufFamily, base: str, number: int) -> list[KeyValue]:
    text = GGUFValueType.STRING
    return [
        KeyValue("general.architecture", family.architecture, text),
        KeyValue("general.type", "adapter", text),
        KeyValue("adapter.type", "lora", text),
        KeyValue("general.name", name_of(adapter), text),
        KeyValue("general.base_model.count", 1, GGUFValueType.UINT32),
        KeyValue("general.base_model.0.name", Path(base).name, text),
        KeyValue("adapter.lora.alpha", 0.0, GGUFValueType.FLOAT32),  # none: the scale that is asked for, alone
        KeyValue("general.quantization_version", 2, GGUFValueType.UINT32),
        KeyValue("general.file_type", number, GGUFValueType.UINT32),
    ]
