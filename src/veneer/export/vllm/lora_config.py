"""Limits of vLLM 0.32 and LoRAX: the configs that both read, and the parts of an adapter that they refuse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from veneer.model.blueprint.names import CLASSIFIERS, MODEL_ENDS
from veneer.model.modules.snapshot import Snapshot
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite
from veneer.store.adapter.records import StoredAdapter
from veneer.store.gguf.names import text_name

_CHANGING = (  # fields of PEFT's LoRA that one of the two refuses, or does not read, if they are on
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "kasa_config", "layer_replication", "lora_bias",
    "modules_to_save", "monteclora_config", "rank_pattern", "target_parameters", "trainable_token_indices",
    "use_bdlora", "use_dora", "use_qalora", "use_rslora", "velora_config",
)  # fmt: skip
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


def is_plain(fields: Mapping[str, Any]) -> bool:
    """Return True if vLLM and LoRAX read an adapter with these fields of ``adapter_config.json`` as it was trained."""
    return (
        fields.get("peft_type") == "LORA"
        and {"r", "lora_alpha"} <= fields.keys()
        and not any(fields.get(name) for name in _CHANGING)
        and fields.get("bias", "none") == "none"
        and fields.get("init_lora_weights", True) in _PLAIN_STARTS
    )


def config_of(
    fields: Mapping[str, Any], base: str | None, targets: Sequence[str], r: int, alpha: float
) -> dict[str, Any]:
    """Return the fields to write: only those that every release of PEFT reads, since LoRAX ships an old one."""
    return {
        "peft_type": "LORA", "task_type": fields.get("task_type"), "base_model_name_or_path": base,
        "target_modules": list(targets), "r": r, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": bool(fields.get("fan_in_fan_out")), "inference_mode": True, "init_lora_weights": True,
        "modules_to_save": None,
    }  # fmt: skip


def refusals(stored: StoredAdapter, snapshot: Snapshot | None, ends: bool) -> list[str]:
    """Return a sentence for each reason why an adapter cannot be plain LoRA on linear layers.

    ``snapshot`` describes the adapter's base, or is None if the base is unknown. ``ends`` permits updates of embeddings
    and head.
    """
    found: dict[str, list[str]] = {}
    for path, record in stored.updates.items():
        for reason in _reasons(path, record, cast(LinearSite, stored.places[path].site), snapshot, ends):
            found.setdefault(reason, []).append(path)
    whole = [f"it trains whole modules, biases or rows: {_first(stored.others)}"] if stored.others else []
    return whole + [f"{_first(paths)} {reason}" for reason, paths in found.items()]


def _reasons(path: str, record: LinearDelta, site: LinearSite, snapshot: Snapshot | None, ends: bool) -> Iterator[str]:
    name = path.rpartition(".")[2]
    pair = record.low_rank
    if record.only_scales:
        yield "is scaled or shifted, without a change of its weight"
    if record.bias is not None and not record.only_scales:
        yield "trains a bias"
    if pair is not None and pair.is_stacked:
        yield "holds the experts of a layer in one parameter"
    if site.kind == "convolution" or site.repeats > 1:
        yield "is a convolution or an attention of torch, where vLLM adapts linear layers alone"
    if text_name(path) is None:
        yield "belongs to a tower of images or sound, whose updates vLLM leaves out in silence"
    if name in CLASSIFIERS:
        yield "is a classifier, which vLLM and LoRAX take whole or not at all"
    if name in MODEL_ENDS or site.kind == "embedding" or (snapshot is not None and path in snapshot.heads):
        if snapshot is not None and len(snapshot.tied) > 1 and path in snapshot.tied:
            yield "is tied (embeddings and head are one), so that an update of one would reach both"
        elif not ends:
            yield "is the embeddings or the head, which only some models of vLLM adapt: --ends keeps it for those"


def _first(paths: Sequence[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} (and {len(paths) - 1} more)"
