"""What an adapter folder means, layer by layer, without its base model: records from the tensors alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from veneer.core.method import DISK_PREFIX, LinearMethod, MethodConfig
from veneer.core.records import LinearDelta
from veneer.core.sites import LinearSite
from veneer.disk.atomic import write_together
from veneer.disk.safetensors import tensors_to_bytes
from veneer.errors import CompositionError, FormatError
from veneer.methods.lora import LoraConfig
from veneer.model.multihead import ON_DISK, REPEATS
from veneer.store.adapter_config import CONFIG_FILE, for_use, read_config, to_json
from veneer.store.adapter_files import WEIGHTS_FILE, read_tensors, unusable

_FACTORS: tuple[tuple[str, str, Literal["linear", "embedding"]], ...] = (
    ("lora_A.weight", "lora_B.weight", "linear"),
    ("lora_embedding_A", "lora_embedding_B", "embedding"),
)


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter's config and, by module path, its sites and records."""

    config: MethodConfig
    sites: Mapping[str, LinearSite]
    records: Mapping[str, LinearDelta]


def needs_base(config: MethodConfig) -> bool:
    """Whether what an adapter does to a weight depends on that weight (DoRA, IA3)."""
    return not isinstance(config, LoraConfig) or config.use_dora


def read_records(folder: Path) -> StoredAdapter:
    """The records of a low-rank adapter. Low-rank records carry in ``bias`` what they add to the layer's own.

    Raises CompositionError for an adapter whose update depends on the base or that trains whole parameters, FormatError
    for a damaged one.
    """
    config = read_config(folder)
    if not isinstance(config, LoraConfig) or needs_base(config):
        raise CompositionError(
            f"the adapter {folder} scales the weights of its base (DoRA, IA3): give the base too (--base MODEL)"
        )
    if config.adapted_parameters:
        raise CompositionError(
            f"the adapter {folder} changes parameters {list(config.adapted_parameters)}, experts' among them: it can "
            "only be read with its base, and is no sum of layers"
        )
    tensors = read_tensors(folder)
    broken = [f"{why}: {key}" for key, why in unusable(tensors).items()]
    if broken:
        raise FormatError(f"{folder / WEIGHTS_FILE}: {'; '.join(broken[:3])}")
    sites = _sites(tensors)
    keys = {
        path: {n: f"{DISK_PREFIX}{path}.{end}" for n, end in config.disk_names(s).items()} for path, s in sites.items()
    }
    stray = sorted(set(tensors) - {key for names in keys.values() for key in names.values()})
    missing = sorted(key for names in keys.values() for key in names.values() if key not in tensors)
    if missing:
        raise FormatError(f"{folder / WEIGHTS_FILE} lacks {', '.join(missing[:3])}")
    if stray:
        raise CompositionError(
            f"the adapter {folder} holds {stray[0]} and {len(stray) - 1} more that are not low-rank factors: "
            "such an adapter can only be read with its base"
        )
    params = {path: {name: tensors[key] for name, key in names.items()} for path, names in keys.items()}
    wrong = [
        f"{keys[path][name]} is {tuple(params[path][name].shape)} where the config says {shape}"
        for path, site in sites.items()
        for name, shape in config.shapes(site).items()
        if tuple(params[path][name].shape) != tuple(shape)
    ]
    if wrong:
        raise FormatError(f"{folder / WEIGHTS_FILE} does not fit {CONFIG_FILE}: {'; '.join(wrong[:3])}")
    return StoredAdapter(config, sites, {path: config.lower(sites[path], params[path]) for path in sites})


def write_records(
    folder: Path, config: LinearMethod, params: Mapping[str, Mapping[str, Tensor]], sites: Mapping[str, LinearSite]
) -> None:
    """Write an adapter folder from parameters by module path. Raises DiskError where writing fails."""
    tensors = {
        f"{DISK_PREFIX}{path}.{end}": params[path][name].reshape(config.shapes(site)[name])
        for path, site in sites.items()
        for name, end in config.disk_names(site).items()
    }
    written = to_json(for_use(config), {}).encode()
    write_together(folder, {WEIGHTS_FILE: tensors_to_bytes(tensors), CONFIG_FILE: written})


def _sites(tensors: Mapping[str, Tensor]) -> dict[str, LinearSite]:
    found = {}
    for a_end, b_end, kind in _FACTORS:
        for key, a in tensors.items():
            path = key.removeprefix(DISK_PREFIX).removesuffix(f".{a_end}")
            b = tensors.get(f"{DISK_PREFIX}{path}.{b_end}")
            if key.endswith(f".{a_end}") and b is not None:
                found[path] = LinearSite(
                    name=path.removesuffix(ON_DISK),
                    in_features=a[0].numel(),
                    out_features=b.shape[0],
                    kind="convolution" if a.ndim > 2 else kind,
                    window=tuple(a.shape[2:]),
                    repeats=REPEATS if path.endswith(ON_DISK) else 1,
                    groups=a.shape[0] // b.shape[1] if a.ndim > 2 else 1,
                )
    return found
