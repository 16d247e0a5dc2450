"""File of keys: the digest and the rights of each key. It is read again when it changes."""

from __future__ import annotations

import hashlib
import hmac
import logging
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from veneer.disk.stamp import stamp_of
from veneer.errors import ConfigError
from veneer.plain.refusals import allowed
from veneer.serve.http.key import Key
from veneer.serve.http.watcher import Watcher

_LOG = logging.getLogger("uvicorn.error")  # of the server, whose lines go to stderr
_TOLD = 10  # problems in a message
_Text = Annotated[str, Field(min_length=1, max_length=256)]


class KeyEntry(BaseModel):
    """Entry of the file. ``sha256`` is the digest of the key in hexadecimal; the key itself is not stored."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: _Text
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: list[Literal["infer", "admin"]] = Field(default=["infer"], min_length=1)
    adapters: list[_Text] = ["*"]
    weight: float = Field(default=1.0, ge=2**-10, le=2**10)
    max_requests: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)

    def key(self) -> Key:
        """Return the key of the entry."""
        return Key(
            name=self.name, scopes=frozenset(self.scopes), adapters=tuple(self.adapters), weight=self.weight,
            max_requests=self.max_requests, max_tokens=self.max_tokens,
        )  # fmt: skip


class Keys:
    """Keys of a file, which is read again when it changes. Any thread may call it.

    If a changed file is invalid, the old keys stay valid and the reason is logged. The constructor raises ConfigError
    if the file is invalid.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = _stamp(path)
        self._keys = read_keys(path)
        self._watcher = Watcher(path.parent, self.look)

    def start(self) -> None:
        """Watch the file from now on."""
        self._watcher.start()

    def stop(self) -> None:
        """Stop watching the file."""
        self._watcher.stop()

    def find(self, token: str) -> Key | None:
        """Return the key of a token that a client sent; None if it is unknown.

        All digests are compared, each in constant time, so that the time reveals nothing about them.
        """
        digest, found = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest(), None
        for known, key in self._keys:
            if hmac.compare_digest(known, digest):
                found = key
        return found

    def look(self, everything: bool = True) -> None:
        """Read the file again if it has changed. ``everything`` has no effect."""
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = read_keys(self._path)
        except ConfigError as error:
            _LOG.error("%s. The keys that were read before stay in use", error)
        else:
            _LOG.warning("--keys %s was read again: %d keys", self._path, len(self._keys))


def read_keys(path: Path) -> Sequence[tuple[bytes, Key]]:
    """Return the keys of a file with their digests. Raises ConfigError with all faults of the file.

    A file without keys is a fault: more often it is still being written than meant to refuse all clients. So is a file
    that every user may write or replace, since any user could then add keys.
    """
    entries = read_entries(path)
    _require_guarded(path)
    if not entries:
        raise ConfigError(
            f"--keys {path} is empty: it needs at least one key. Add one with `veneer add-key NAME --file {path}`"
        )
    return [(bytes.fromhex(entry.sha256), entry.key()) for entry in entries]


def _require_guarded(path: Path) -> None:
    """Raise ConfigError if every user may write the file, or replace it in its folder."""
    try:
        file, folder = (place.stat().st_mode for place in (path, path.resolve().parent))
    except OSError as error:
        raise _unread(path, error) from error
    if file & stat.S_IWOTH:
        raise ConfigError(f"--keys {path} can be written by everybody, so anybody can add keys: run `chmod o-w {path}`")
    if folder & stat.S_IWOTH and not folder & stat.S_ISVTX:
        raise ConfigError(
            f"--keys {path} can be replaced by everybody, because everybody can write its folder: run "
            f"`chmod o-w {path.resolve().parent}`"
        )


def read_entries(path: Path) -> list[KeyEntry]:
    """Return the entries of a file, which may have none. Raises ConfigError with all faults of the file."""
    try:
        entries = entries_of(path, path.read_bytes())
    except OSError as error:
        raise _unread(path, error) from error
    counts = Counter((field, getattr(entry, field)) for entry in entries for field in ("name", "sha256"))
    problems = [f"{field} {value!r} is given {n} times" for (field, value), n in counts.items() if n > 1]
    if problems:
        raise _wrong(path, problems)
    return entries


def entries_of(path: Path, content: bytes) -> list[KeyEntry]:
    """Return the entries in the content of a file. Raises ConfigError with the problems of each entry."""
    try:
        given = yaml.safe_load(content)  # JSON is YAML too
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # no UTF-8, a date that is none, a thousand brackets
        raise _wrong(path, [" ".join(str(error).split())]) from error
    try:
        return TypeAdapter(list[KeyEntry]).validate_python([] if given is None else given)
    except ValidationError as error:
        raise _wrong(path, [_told(problem) for problem in error.errors(include_input=False)]) from error


def _told(problem: ErrorDetails) -> str:
    entry, *field = problem["loc"] or ("",)
    return ": ".join([*([f"entry {int(entry) + 1}"] if entry != "" else []), *map(str, field[:1]), allowed([problem])])


def _unread(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"--keys {path} cannot be read: {error.strerror}. Give a file of keys")


def _wrong(path: Path, problems: Sequence[str]) -> ConfigError:
    more = f"; and {len(problems) - _TOLD} more" if len(problems) > _TOLD else ""
    return ConfigError(
        f"--keys {path} is no list of keys: {'; '.join(problems[:_TOLD])}{more}. Each entry has name and sha256, and "
        f"may have {', '.join(list(KeyEntry.model_fields)[2:])}"
    )


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        return stamp_of(path.stat())
    except OSError:
        return None
