"""Sources from which adapters may be loaded over HTTP: folders, and ids on the hub by patterns."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath

from veneer.serve.http.errors import ModelNotFoundError, RefusedError
from veneer.serve.http.folder import is_adapter

_PARAM = "lora_path"
_LONGEST = 4096  # characters of a path
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


class Roots:
    """Folders that may contain adapters, and shell patterns (``me/*``) of allowed ids on the hub.

    A symbolic link may lead from one of these folders into another, but not out of them.
    """

    def __init__(self, folders: Sequence[Path] = (), hub: Sequence[str] = ()) -> None:
        self._folders = tuple(Path(os.path.realpath(folder)) for folder in folders)
        self._hub = tuple(hub)

    def hub_id(self, given: str) -> str | None:
        """Return ``given`` if it is an id on the hub that may be loaded; otherwise None."""
        allowed = any(fnmatch.fnmatchcase(given, pattern) for pattern in self._hub)
        return given if allowed and ".." not in given and _HUB_ID.fullmatch(given) else None

    def folder(self, given: str, hides: Callable[[Path], bool] = lambda folder: False) -> Path:
        """Return the folder of an adapter, with symbolic links resolved.

        A relative path may start at the working directory or at one of the allowed folders. Raises RefusedError for a
        path outside of the allowed folders. Raises ModelNotFoundError if the path holds no adapter, or if the caller
        may not see it (``hides``).
        """
        self._require_path(given)
        starts = [Path(), *self._folders]
        places = [Path(os.path.realpath(start / given)) for start in starts]  # an absolute path is the same for all
        allowed = [place for place in places if self._root_of(place) is not None]
        if not allowed:
            raise RefusedError(f"{_PARAM}={given!r} is not allowed: {self._told()}", _PARAM)
        found = next((place for place in allowed if is_adapter(place) and not hides(place)), None)
        if found is None:
            raise ModelNotFoundError(
                f"there is no adapter at {_PARAM}={given!r}: an adapter is a folder with adapter_config.json and "
                "adapter_model.safetensors",
                _PARAM,
            )
        self._require_no_link_out(given, found)
        return found

    def _require_path(self, given: str) -> None:
        if not given.isprintable() or not 0 < len(given) <= _LONGEST:  # a zero byte, half of a character
            raise RefusedError(f"{_PARAM}={given[:100]!r} is no path: {self._told()}", _PARAM)
        if ".." in PurePath(given).parts:
            raise RefusedError(f"{_PARAM}={given!r} holds '..', which is not allowed: {self._told()}", _PARAM)

    def _root_of(self, place: Path) -> Path | None:
        return next((root for root in self._folders if place.is_relative_to(root)), None)

    def _require_no_link_out(self, given: str, folder: Path) -> None:
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise RefusedError(
                f"{_PARAM}={given!r} cannot be listed: {error.strerror}. Let it be read", _PARAM
            ) from error
        for entry in entries:
            if entry.is_symlink() and self._root_of(Path(os.path.realpath(entry.path))) is None:
                raise RefusedError(
                    f"{_PARAM}={given!r} is not allowed: {entry.name} there is a link that leads out. {self._told()}",
                    _PARAM,
                )

    def _told(self) -> str:
        places = [f"a folder below {', '.join(map(str, self._folders))}"] if self._folders else []
        places += [f"an id on the hub that fits {', '.join(self._hub)}"] if self._hub else []
        if not places:
            return "this server loads adapters from nowhere. Start it with --adapters, --adapter-root or --allow-hub"
        return f"give {' or '.join(places)} (--adapters, --adapter-root, --allow-hub)"
