"""Source of an adapter: a local folder, or an id on the Hugging Face hub."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from veneer.errors import ConfigError, FormatError

# PEFT's arguments that say what is so anyway: values go from the file to where the model is, without a copy on the way.
AS_IT_IS = ("low_cpu_mem_usage", "torch_device")
Options = TypeVar("Options")
_FILES = ("adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json")


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """Options of a download from the hub, in the hub's own terms. ``subfolder`` also applies to a local folder."""

    subfolder: str | None = None
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    force_download: bool = False


def hub_options(values: Mapping[str, Any]) -> HubOptions:
    """Return `HubOptions` from keyword arguments. Raises ConfigError that names the unknown ones and the
    allowed ones.
    """
    return from_keywords(HubOptions, values, AS_IT_IS)


def from_keywords(kind: Callable[..., Options], values: Mapping[str, Any], as_it_is: Sequence[str]) -> Options:
    """Return an instance of the dataclass ``kind`` made from keyword arguments. Arguments in ``as_it_is`` have no
    effect and are left out.

    Raises ConfigError for an unknown argument.
    """
    allowed = set(inspect.signature(kind).parameters)
    given = {key: value for key, value in values.items() if key not in as_it_is}
    unknown = sorted(set(given) - allowed)
    if unknown:
        raise ConfigError(
            f"unknown arguments {unknown}; allowed besides the named ones: {sorted(allowed)}. Leave the unknown ones "
            "out"
        )
    return kind(**given)


def of_hub(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments that are fields of `HubOptions`."""
    return {key: value for key, value in values.items() if key in HubOptions.__dataclass_fields__}


def adapter_folder(model_id: str | os.PathLike[str], options: HubOptions | None = None) -> Path:
    """Return the local folder of an adapter, fetched from the hub if ``model_id`` is not a folder.

    Raises FormatError if there is no such folder or id, or if the subfolder leads out of it.
    """
    options = options or HubOptions()
    subfolder = _inside(options.subfolder)
    local = Path(model_id)
    if local.is_dir():
        return local / subfolder
    if local.exists() or len(local.parts) > 2 or local.is_absolute() or str(model_id).startswith("."):
        what = "is not a folder" if local.exists() else "does not exist"
        raise FormatError(f"{model_id} {what}: give the folder that holds adapter_config.json, or a hub id")
    if len(local.parts) == 2 and local.parent.is_dir():
        raise FormatError(f"there is no folder {model_id}: the folder {local.parent} exists, but has no {local.name!r}")
    return Path(_download(str(model_id), subfolder, options)) / subfolder


def hub_folder(repo: str) -> Path:
    """Return the local folder of an adapter on the hub, fetched if needed. A local folder with the name of ``repo`` is
    ignored.

    Raises FormatError if the hub has no such adapter.
    """
    return Path(_download(repo, PurePosixPath(), HubOptions()))


def _inside(subfolder: str | None) -> PurePosixPath:
    path = PurePosixPath(subfolder or "")
    if path.is_absolute() or ".." in path.parts:
        raise FormatError(f"subfolder {subfolder!r} leads out of the adapter's folder: give a path inside it")
    return path


def _download(repo: str, subfolder: PurePosixPath, options: HubOptions) -> str:
    try:
        return snapshot_download(
            repo,
            revision=options.revision,
            token=options.token,
            cache_dir=options.cache_dir,
            local_files_only=options.local_files_only,
            force_download=options.force_download,
            allow_patterns=[str(subfolder / name) for name in _FILES],
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FormatError(
            f"no adapter {repo!r}: no such folder, and not on the hub: {_reason(error)}. Give the folder that "
            "training saved, or a hub id"
        ) from error


def _reason(error: Exception) -> str:
    """Return the hub's reason in one line, without the addresses and advice that its client's messages append."""
    if isinstance(error, RepositoryNotFoundError):
        return "there is no repository of that name, or it is private"
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return first.removeprefix("Got: ")
