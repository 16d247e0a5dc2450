"""Folder of packed adapters: if a version was loaded once, its packed block of memory is read from there.

A file holds one block with its layout. It is written under another name and renamed into place. Reading copies it into
memory and checks it there, so that no descriptor stays open. A failure only costs speed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import stat
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version as version_of
from io import FileIO
from pathlib import Path

from veneer.plain.lru import LruCache
from veneer.serve.program.block import Blocks, VersionBlock
from veneer.serve.program.block_layout import BlockLayout

_LOG = logging.getLogger(__name__)
_MAGIC = b"veneer block 4\r\n"  # the number grows with what is packed, its panels, and the files themselves
_VENEER = version_of("veneer")
_HEAD = struct.Struct("<16s32s32sQQI")  # magic, keys of the block and its layout, bytes of these two, CRC-32 of both
_SUFFIX = ".block"
_OWN_NAME = re.compile(r"[0-9a-f]{64}\.block|\.[0-9a-f]{64}\.\w+\.block")  # the second until it is whole
_LAYOUTS = 512  # of which it is known whether their texts say all
_SCANS = 16  # of the folder, while as many bytes are written as it may hold


class BlockStore:
    """Packed blocks of adapters in a folder, in files of at most ``most_bytes`` in all.

    If there is too little room, the least recently used files are deleted. ``base`` identifies the model's weights and
    their dtype, on which blocks may depend. ``blocks`` caches layouts. The object is for one thread.
    """

    def __init__(self, folder: Path, most_bytes: int, base: str, blocks: Blocks) -> None:
        self._folder, self._most, self._base, self._blocks = folder, most_bytes, base, blocks
        self._n_bytes, self._n_written = 0, most_bytes  # the folder is looked at before something is written
        self._parses: LruCache[bytes, bool] = LruCache(_LAYOUTS)
        self._has_warned = False

    @classmethod
    def open(cls, folder: Path, most_bytes: int, base: str, blocks: Blocks) -> BlockStore | None:
        """Return the store in a folder, which is created if it is missing.

        Return None, with a warning, if the folder cannot be used.
        """
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _require_own(folder.stat(), stat.S_ISDIR)
        except (OSError, ValueError) as error:
            _LOG.warning(
                "packed adapters are not kept in %s: %s. Let this user alone write to it, or give another "
                "adapter_cache_dir", folder, error,
            )  # fmt: skip
            return None
        return cls(folder, most_bytes, base, blocks)

    def find(self, version: str) -> VersionBlock | None:
        """Return the packed block of an adapter version. Return None if the folder has no file of the version that can
        be used.
        """
        path = self._path(version)
        try:
            with _opened(path) as file:
                block = self._read(file, self._key(version))
            with suppress(OSError):  # of a folder that is read alone
                os.utime(path)
            return block
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self._warn(
                path, error, "The adapter is read from its own folder. Delete the file if this warning comes again"
            )
            return None

    def keep(self, version: str, block: VersionBlock) -> None:
        """Write a version's block to a file, deleting the least recently used files if needed.

        Nothing is written if the block is larger than the store, or if its layout cannot be restored from text.
        """
        layout = block.layout
        if not self._says_all(layout):
            return
        path, n_bytes = self._path(version), _HEAD.size + len(layout.text) + block.memory.nbytes
        try:
            if n_bytes > self._most:
                return
            self._make_room(n_bytes)
            values = block.memory.numpy().data
            check = zlib.crc32(values, zlib.crc32(layout.text))
            head = _HEAD.pack(_MAGIC, self._key(version), layout.key, len(layout.text), len(values), check)
            self._write(path, (head, layout.text, values))
        except OSError as error:
            self._warn(path, error, "It was not written. Make room for it, or give another adapter_cache_dir")

    def _key(self, version: str) -> bytes:
        return hashlib.sha256(f"{_VENEER}\n{self._base}\n{version}".encode()).digest()

    def _path(self, version: str) -> Path:
        return self._folder / f"{self._key(version).hex()}{_SUFFIX}"

    def _read(self, file: FileIO, key: bytes) -> VersionBlock:
        """Read a packed adapter from an open file.

        Raises ValueError if the file was written for a key other than ``key``, or if it is truncated or damaged.
        """
        n_bytes = os.fstat(file.fileno()).st_size
        head = file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            raise ValueError("it was cut off")
        magic, own, layout_key, n_text, n_values, check = _HEAD.unpack(head)
        if magic != _MAGIC or own != key or len(head) + n_text + n_values != n_bytes:
            raise ValueError("it is of another version, or was cut off")
        text = file.read(n_text)
        if hashlib.sha256(text).digest() != layout_key:
            raise ValueError("its layout is not that which was written")
        layout = self._blocks.layout(layout_key) or self._blocks.shared(BlockLayout.parse(text))
        if layout.n_bytes != n_values:
            raise ValueError("its layout is of another block")
        block = VersionBlock(layout, layout.room())
        values = block.memory.numpy().data
        _fill(values, file)
        if zlib.crc32(values, zlib.crc32(text)) != check:
            raise ValueError("its values are not those that were written")
        return block

    def _says_all(self, layout: BlockLayout) -> bool:
        """Return True if the whole layout can be restored from its text."""
        if not layout.text or not layout.n_bytes:
            return False
        parses = self._parses.get(layout.key)
        if parses is None:
            try:
                parses = BlockLayout.parse(layout.text).n_bytes == layout.n_bytes
            except ValueError:
                parses = False
            self._parses.put(layout.key, parses)
        return parses

    def _write(self, path: Path, parts: tuple[bytes | memoryview, ...]) -> None:
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=_SUFFIX, dir=self._folder)
        try:
            with os.fdopen(handle, "wb", buffering=0) as file:
                for part in parts:
                    _write_all(part, file)
            Path(name).replace(path)
        except BaseException:
            with suppress(OSError):
                Path(name).unlink()
            raise

    def _make_room(self, n_bytes: int) -> None:
        """Remove the least recently used files until there is room for ``n_bytes``."""
        if self._n_written >= self._most // _SCANS or self._n_bytes + n_bytes > self._most:
            found = sorted(_files(self._folder))
            self._n_written, self._n_bytes = 0, sum(size for _, size, _ in found)
            for _, size, path in found:
                if self._n_bytes + n_bytes <= self._most:
                    break
                path.unlink(missing_ok=True)
                self._n_bytes -= size
        self._n_written += n_bytes
        self._n_bytes += n_bytes

    def _warn(self, path: Path, error: Exception, advice: str) -> None:
        """Log a warning that a packed adapter's file is not used. Only the first call logs one."""
        if not self._has_warned:
            self._has_warned = True
            _LOG.warning("the packed adapter %s is not used: %s. %s", path, error, advice)


def _files(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """Yield each file of a store: time of last use, bytes and path."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if _OWN_NAME.fullmatch(entry.name):
                with suppress(FileNotFoundError):
                    told = entry.stat(follow_symlinks=False)
                    yield told.st_mtime, told.st_size, Path(entry.path)


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    with open(path, "rb", buffering=0, opener=_open) as file:
        _require_own(os.fstat(file.fileno()), stat.S_ISREG)
        yield file


def _open(path: str, flags: int) -> int:
    """Open a file and return its descriptor. Links are refused, and a pipe does not block."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def _fill(memory: memoryview, file: FileIO) -> None:
    """Fill a memory from a file; one system call moves less than 2 GiB. Raises ValueError if the file ends early."""
    while memory:
        if not (n := file.readinto(memory)):
            raise ValueError("it was cut off")
        memory = memory[n:]


def _write_all(part: bytes | memoryview, file: FileIO) -> None:
    """Write a memory to a file; one system call moves less than 2 GiB. Raises OSError if the disk is full."""
    left = memoryview(part)
    while left:
        if not (n := file.write(left)):
            raise OSError("the disk is full")
        left = left[n:]


def _require_own(told: os.stat_result, is_kind: Callable[[int], bool]) -> None:
    """Raise ValueError for a file or folder that others can write to, or that is of the wrong kind."""
    others = told.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not is_kind(told.st_mode) or (os.name == "posix" and (told.st_uid != os.geteuid() or others)):
        raise ValueError("it is not a file or folder to which this user alone can write")
