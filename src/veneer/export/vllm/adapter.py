"""Adapter as plain LoRA of one rank, which vLLM and LoRAX load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from veneer.combine.plain import Plain, padded, plain_of, whole_error
from veneer.combine.update import Update
from veneer.contract.file import CONFIG_FILE, WEIGHTS_FILE
from veneer.contract.places import placed
from veneer.disk.folder import new_folder
from veneer.disk.safetensors import tensors_to_bytes
from veneer.errors import ConfigError, FormatError
from veneer.export.model_folder import copy_companions
from veneer.export.vllm.lora_config import config_of, is_plain, refusals
from veneer.export.vllm.ranks import RANKS, holding, require_rank
from veneer.export.vllm.source import AdapterSource, refused
from veneer.methods.lora import LoraConfig
from veneer.plain.progress import Tell
from veneer.records.sites import LinearSite
from veneer.store.adapter.records import StoredAdapter


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmOptions:
    """Options of an export.

    ``base`` is the base's name; if it is None, the name in the adapter's config is taken. ``rank`` is the largest rank
    to write, one of `RANKS`. It is needed for updates that are not low-rank factors, and factors of a larger rank are
    truncated to it. ``ends`` permits updates of embeddings and head.
    """

    base: str | None = None
    rank: int | None = None
    ends: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        require_rank(self.rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmReport:
    """Result of an export: the adapter's ``method``, the base that it names, and the rank, layers and bytes that were
    written.

    If ``copied``, the tensors are those of the input, bit for bit. ``error`` is the relative error of all updates
    together, and ``worst`` that of the layer ``worst_layer``. Both errors are 0 for an exact export.
    """

    method: str
    base: str | None
    rank: int
    n_layers: int
    n_bytes: int
    copied: bool
    error: float
    worst: float
    worst_layer: str


def export_vllm(
    adapter: Path,
    output: Path,
    options: VllmOptions | None = None,
    on_progress: Tell = lambda done, total: None,
) -> VllmReport:
    """Write an adapter as a folder of plain LoRA, in float32. All layers have one rank and a scale of 1. If a kind of
    layer is adapted in one block, it has factors in every block.

    An update that is a low-rank pair is exact. Any other change of weights becomes the nearest one of ``options.rank``
    (Eckart and Young 1936). A tokenizer and a chat template in the folder are copied.

    Raises CompositionError, with advice, for an adapter that cannot be plain LoRA: scales alone, bottlenecks, virtual
    tokens, biases, whole modules and rows. Raises ConfigError if ``output`` holds something. In all these cases nothing
    is written.
    """
    options = options or VllmOptions()
    _require_free(adapter, output, options.overwrite)
    source = AdapterSource.read(adapter, options.base)
    problems = refusals(source.stored, source.snapshot, options.ends)
    problems = problems or _ranks_missing(source.stored, options.rank)
    if problems:
        raise refused(adapter, "; ".join(problems))
    filled = source.siblings()
    if _is_as_it_is(source, options.rank) and not filled:
        layers: dict[str, Plain] = {}
        rank, alpha = source.fields["r"], source.fields["lora_alpha"]
        weights = (adapter / WEIGHTS_FILE).read_bytes()
    else:
        layers = _layers(source.stored, options.rank, on_progress)
        alpha = rank = holding(max(layer.rank for layer in layers.values()))
        weights = tensors_to_bytes(_tensors(source, layers, filled, rank))
    base = source.method.base_model_name_or_path or options.base
    config = config_of(source.fields, base, source.targets(filled), rank, alpha)
    with new_folder(output.absolute()) as staging:
        copy_companions([adapter], staging)
        (staging / WEIGHTS_FILE).write_bytes(weights)
        (staging / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    worst = max(layers, key=lambda path: layers[path].error, default="")
    return VllmReport(
        method=source.method.peft_type, base=base, rank=rank, n_layers=len(source.stored.updates), n_bytes=len(weights),
        copied=not layers, error=whole_error(layers.values()), worst=layers[worst].error if worst else 0.0,
        worst_layer=worst,
    )  # fmt: skip


def _ranks_missing(stored: StoredAdapter, rank: int | None) -> list[str]:
    if rank is not None:
        return []
    whole = [path for path, record in stored.updates.items() if not record.is_low_rank]
    if whole:
        return [f"its change of {whole[0]} has full rank: give the rank to write (--rank N), which shows what is lost"]
    most = max(record.rank for record in stored.updates.values())
    return [f"its rank {most} is above vLLM's {RANKS[-1]}: give the rank to write (--rank N)"] * (most > RANKS[-1])


def _is_as_it_is(source: AdapterSource, rank: int | None) -> bool:
    r = source.fields.get("r", 0)
    return is_plain(source.fields) and not source.stored.others and r <= (rank or RANKS[-1])


def _layers(stored: StoredAdapter, rank: int | None, on_progress: Tell) -> dict[str, Plain]:
    found: dict[str, Plain] = {}
    for done, (path, record) in enumerate(stored.updates.items(), start=1):
        found[path] = plain_of(Update(record, cast(LinearSite, stored.places[path].site).weight), rank)
        on_progress(done, len(stored.updates))
    return found


def _tensors(
    source: AdapterSource, layers: Mapping[str, Plain], filled: Mapping[str, LinearSite], rank: int
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path, layer in layers.items():
        site = cast(LinearSite, source.stored.places[path].site)
        found |= _named(path, site, *padded(layer, rank))
    for path, site in filled.items():
        found |= _named(path, site, torch.zeros(rank, site.in_features), torch.zeros(site.out_features, rank))
    return found


def _named(path: str, site: LinearSite, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    config = LoraConfig(r=len(a))
    keys, named = placed(config, site, path).keys, config.late_start
    return {keys[named.a]: a, keys[named.b]: b}


def _require_free(adapter: Path, output: Path, overwrite: bool) -> None:
    if output.resolve() == adapter.resolve():
        raise ConfigError(f"{output} is the adapter itself: choose another folder")
    held = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if held and not overwrite:
        raise ConfigError(f"{output} is not empty: choose another folder, or overwrite it (--force)")
    if held and CONFIG_FILE not in held:
        raise FormatError(f"{output} is not empty and no adapter: only the folder of an adapter is overwritten")
