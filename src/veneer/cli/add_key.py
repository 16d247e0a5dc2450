"""Implementation of ``veneer add-key``."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
import yaml

from veneer.cli.pages.add_key import AddKeyArguments
from veneer.disk.atomic import write_atomically
from veneer.errors import ConfigError
from veneer.serve.http.key_file import entries_of, read_entries

_PREFIX = "veneer-"  # by which scanners of leaked secrets find it
_BYTES = 32


def add_key(args: AddKeyArguments) -> None:
    """Add an entry to the file, and print the key."""
    if not args.file.parent.is_dir():
        raise ConfigError(f"--file {args.file} is in no folder: {args.file.parent} must be there. Make it first")
    token = _PREFIX + secrets.token_urlsafe(_BYTES)
    given = {
        "scopes": args.scope, "adapters": args.sees, "weight": args.weight, "max_requests": args.max_requests,
        "max_tokens": args.max_tokens,
    }  # fmt: skip
    entry: dict[str, Any] = {"name": args.name, "sha256": hashlib.sha256(token.encode()).hexdigest()}
    entry |= {name: value for name, value in given.items() if value is not None}
    with _alone_in(args.file.parent):
        _add(args.file, entry)
    typer.echo(token)


def _add(file: Path, entry: dict[str, Any]) -> None:
    if file.exists() and any(known.name == entry["name"] for known in read_entries(file)):
        raise ConfigError(
            f"{file} has a key of the name {entry['name']!r} already: remove that entry, or give another name"
        )
    content = _with(file, entry)
    entries_of(file, content)
    mode = stat.S_IMODE(file.stat().st_mode) if file.exists() else 0o600
    write_atomically(file, content, mode)  # a server of another user may read it by its group


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Lock a folder, so that no two processes add keys to it at once."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _with(file: Path, entry: dict[str, Any]) -> bytes:
    """Return the file's content with one more entry; comments of a YAML file stay."""
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    if before.lstrip().startswith("["):
        return (json.dumps([*yaml.safe_load(before), entry], indent=2, ensure_ascii=False) + "\n").encode()
    front = before if not before or before.endswith("\n") else before + "\n"
    return (front + yaml.safe_dump([entry], sort_keys=False, allow_unicode=True)).encode()
