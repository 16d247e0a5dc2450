"""Versions of adapters: the current contents of folders, identified by a hash."""

from __future__ import annotations

import hashlib
import logging
import math
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from veneer.contract import MethodConfig
from veneer.contract.file import CONFIG_FILE, WEIGHTS_FILE
from veneer.contract.source import adapter_folder
from veneer.disk.stamp import stamp_of
from veneer.errors import CompositionError, ConfigError, FormatError
from veneer.model.blueprint.names import TASK_HEADS
from veneer.plain.lru import LruCache
from veneer.serve.program.heads import SERVED
from veneer.serve.schedule.adapter_version import AdapterVersion
from veneer.serve.schedule.lora_request import LoRARequest
from veneer.store.adapter.config import read_config
from veneer.store.adapter.files import read_headers
from veneer.store.merge_record import merged_adapters, require_not_merged
from veneer.store.named_base import GivenBase

_LOG = logging.getLogger(__name__)
_KEPT = 1 << 16  # folders, about a kilobyte each
_Stamp = tuple[tuple[int, ...], ...]


class Versions:
    """Adapter versions by folder; a folder is read again only if it has changed (by device, inode, times and size).

    Adapters of a rank above ``max_rank`` are refused; None allows any. ``value_bytes`` is the size of a value of a
    loaded adapter; if it is None, values keep their stored size. Adapters that were merged into ``base``, the model's
    folder, are refused. Adapters that name another base than ``served`` get a warning.

    Raises FormatError if the folder's list of merged adapters cannot be read.
    """

    def __init__(
        self,
        max_rank: int | None = None,
        value_bytes: int | None = None,
        base: Path | None = None,
        served: GivenBase | None = None,
    ) -> None:
        self._max_rank, self._value_bytes, self._base = max_rank, value_bytes, base
        self._served = served or GivenBase()
        self.n_warned = 0
        if base is not None:
            merged_adapters(base)
        self._seen: LruCache[str, tuple[_Stamp, AdapterVersion]] = LruCache(_KEPT)
        self._stamped: LruCache[_Stamp, AdapterVersion] = LruCache(_KEPT)  # links are the files that they lead to

    def of(self, request: LoRARequest) -> AdapterVersion:
        """Return the version of the adapter at a request's path. For a request of a mix, return the version of the mix.

        Raises FormatError if there is no adapter, ConfigError for too high a rank, and CompositionError if the adapter
        is merged into the base already. A mix raises the errors of each part, and CompositionError for a part that acts
        from its invocation tokens on.
        """
        if request.version is not None:
            return request.version
        if request.parts:
            return _mix([(self.of(part), weight) for part, weight in request.parts])
        folder = adapter_folder(request.lora_path)
        version = self._read(folder)
        if self._max_rank is not None and version.rank > self._max_rank:
            raise ConfigError(
                f"adapter {request.lora_name!r} has rank {version.rank} and max_lora_rank is {self._max_rank}: raise "
                "max_lora_rank, or leave it out: ranks need no limit here"
            )
        return version

    def seen(self, folder: Path) -> AdapterVersion | None:
        """Return the version that was last found in a folder; its files are not checked."""
        known = self._seen.get(str(folder))
        return None if known is None else known[1]

    def known(self, folder: Path) -> AdapterVersion | None:
        """Return the version in a folder if it was read before, there or by another path; None if its files are new.

        Raises FormatError if there is no adapter.
        """
        stamp = _stamp(folder)
        seen = self._seen.get(str(folder))
        return seen[1] if seen is not None and seen[0] == stamp else self._stamped.get(stamp)

    def require_unchanged(self, version: AdapterVersion) -> None:
        """Raise FormatError if the files no longer have the version's content."""
        if version.parts:
            for part, _ in version.parts:
                self.require_unchanged(part)
        elif self._read(Path(version.folder)).id != version.id:
            raise FormatError(
                f"the adapter in {version.folder} was replaced while a request waited for it: send the request again"
            )

    def _read(self, folder: Path) -> AdapterVersion:
        stamp, key = _stamp(folder), str(folder)
        known = self._seen.get(key)
        if known is not None and known[0] == stamp:
            return known[1]
        same = self._stamped.get(stamp)
        version = self._hashed(folder) if same is None else replace(same, folder=key)
        self._seen.put(key, (stamp, version))
        self._stamped.put(stamp, version)
        if version.warning:
            self.n_warned += 1
            _LOG.warning("%s: %s", folder, version.warning)
        return version

    def _hashed(self, folder: Path) -> AdapterVersion:
        if self._base is not None:
            require_not_merged(self._base, folder)
        digest = hashlib.sha256()
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            with (folder / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return replace(self.unread(folder), id=f"v{digest.hexdigest()[:32]}")

    def unread(self, folder: Path) -> AdapterVersion:
        """Return an adapter's version from its config and header. It has no ``id``, which needs the whole content.

        Raises FormatError, and CompositionError for an adapter that requests cannot use.
        """
        config = read_config(folder)
        return replace(
            version_of(config, f"the adapter in {folder}", stored_bytes(folder, self._value_bytes)),
            folder=str(folder),
            warning=self._served.warning(config.base_model_name_or_path),
        )


def version_of(config: MethodConfig, told: str, n_bytes: int, id: str = "") -> AdapterVersion:
    """Return the version of an adapter of ``n_bytes``; ``told`` names it in errors.

    Raises CompositionError for an adapter that requests cannot use.
    """
    if config.by_sequence:
        raise CompositionError(
            f"{told} ({config.peft_type}) depends on the whole of a sequence, which the engine computes in parts: "
            "generate with the model itself"
        )
    if config.task_type in TASK_HEADS and config.task_type != SERVED:
        raise CompositionError(
            f"{told} has its own head (task_type {config.task_type}), and requests are answered with tokens: load "
            "it on the model of its task (AutoPeftModel) and run that"
        )
    if config.n_tasks > 1:
        raise CompositionError(
            f"{told} has {config.n_tasks} tasks, and a request names none: write the task that is served as plain LoRA "
            "(veneer export as-lora --task N) if it changes weights"
        )
    return AdapterVersion(
        id=id,
        folder=told,
        kind=config.peft_type,
        rank=config.largest_rank,
        n_front=config.virtual_tokens,
        invocation=config.invocation_tokens,
        has_head=config.task_type == SERVED,
        n_bytes=n_bytes,
    )


def _mix(parts: Sequence[tuple[AdapterVersion, float]]) -> AdapterVersion:
    """Return the version of a weighted sum of adapters. Its id depends on their files and weights, but not on their
    order.

    The weights of adapters with equal files are added. Raises CompositionError for an adapter that has invocation
    tokens or a head of classes.
    """
    versions, weights = dict[str, AdapterVersion](), dict[str, float]()
    for version, weight in parts:
        if version.invocation:
            raise CompositionError(
                f"the adapter in {version.folder} acts from its invocation tokens on, so it cannot be summed with "
                "others: ask for this adapter by itself"
            )
        if version.has_head:
            raise CompositionError(
                f"the adapter in {version.folder} has a head of classes, so it cannot be summed with others: ask for "
                "this adapter by itself"
            )
        versions[version.id] = version
        weights[version.id] = weights.get(version.id, 0.0) + weight
    ids = sorted(versions)
    digest = hashlib.sha256(repr([(id, weights[id]) for id in ids]).encode())
    return AdapterVersion(
        id=f"v{digest.hexdigest()[:32]}",
        kind="mix",
        rank=sum(version.rank for version in versions.values()),
        n_front=sum(version.n_front for version in versions.values()),
        n_bytes=sum(version.n_bytes for version in versions.values()),
        warning="; ".join(dict.fromkeys(version.warning for version in versions.values() if version.warning)),
        parts=tuple((versions[id], weights[id]) for id in ids),
    )


def stored_bytes(folder: Path, value_bytes: int | None = None) -> int:
    """Return the size in bytes of an adapter's tensors, from its file's header. If ``value_bytes`` is given, it is used
    as the size of each value.

    Raises FormatError as `read_headers` does.
    """
    tensors = read_headers(folder).values()
    return sum(t.nbytes if value_bytes is None else value_bytes * math.prod(t.shape) for t in tensors)


def _stamp(folder: Path) -> _Stamp:
    found = []
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            told = (folder / name).stat()
            if not stat.S_ISREG(told.st_mode):  # a folder of that name, or a pipe, which would be waited for
                raise FileNotFoundError(name)
        except OSError as error:
            raise FormatError(
                f"{folder} holds no {name}, so it is not an adapter: give the folder it was saved to"
            ) from error
        found.append(stamp_of(told))
    return tuple(found)
