"""Folder of blocks, from which adapters are mapped: a version that was loaded once is not read and packed again.

A file holds one block with its layout. It is written under another name, renamed into place, and never changed. It is
opened by a descriptor and checked before it is used. Whatever fails costs speed alone.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import stat
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from veneer.serve.block import Block, Blocks
from veneer.serve.block_layout import BlockLayout
from veneer.serve.latest import Latest

_LOG = logging.getLogger(__name__)
_MAGIC = b"veneer block 1\r\n"  # the number grows with what is packed, its panels, and the files themselves
_HEAD = struct.Struct("<16s32s32sQQI")  # magic, keys of the block and its layout, bytes of these two, CRC-32 of both
_SUFFIX = ".block"
_LAYOUTS = 512  # of which it is known whether their texts say all
_SCANS = 16  # of the folder, while as many bytes are written as it may hold


class BlockStore:
    """Blocks in a folder, in files of at most ``most_bytes`` together; those that were used last stay.

    ``base`` tells the model's weights and their dtype: blocks may depend on them. ``blocks`` knows layouts. For one
    thread.
    """

    def __init__(self, folder: Path, most_bytes: int, base: str, blocks: Blocks) -> None:
        self._folder, self._most, self._base, self._blocks = folder, most_bytes, base, blocks
        self._n_bytes, self._n_written = 0, most_bytes  # the folder is looked at before something is written
        self._parses: Latest[bytes, bool] = Latest(_LAYOUTS)
        self._has_warned = False

    @classmethod
    def open(cls, folder: Path, most_bytes: int, base: str, blocks: Blocks) -> BlockStore | None:
        """Return the blocks in a folder, which is made if it is missing; None, with a warning, if it cannot be used."""
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _require_own(folder.stat(), stat.S_ISDIR)
        except (OSError, ValueError) as error:
            _warn(folder, error)
            return None
        return cls(folder, most_bytes, base, blocks)

    def find(self, version: str) -> Block | None:
        """Return the block of a version, mapped; None if there is none that can be used."""
        try:
            with _opened(path := self._path(version)) as file:
                block = self._mapped(file, self._key(version))
            with suppress(OSError):  # of a folder that is read alone
                os.utime(path)
            return block
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            self._warn(error)
            return None

    def keep(self, version: str, block: Block) -> None:
        """Write a block, if there is room for it."""
        layout = block.layout
        if not self._says_all(layout):
            return
        start = _start(len(layout.text))
        n_bytes = start + block.memory.nbytes
        try:
            if n_bytes > self._most:
                return
            self._make_room(n_bytes)
            values = block.memory.numpy().data
            check = zlib.crc32(values, zlib.crc32(layout.text))
            head = _HEAD.pack(_MAGIC, self._key(version), layout.key, len(layout.text), len(values), check)
            self._write(self._path(version), (head, layout.text, bytes(start - len(head) - len(layout.text)), values))
        except OSError as error:
            self._warn(error)

    def _key(self, version: str) -> bytes:
        return hashlib.sha256(f"{self._base}\n{version}".encode()).digest()

    def _path(self, version: str) -> Path:
        return self._folder / f"{self._key(version).hex()}{_SUFFIX}"

    def _mapped(self, file: int, key: bytes) -> Block:
        """The block of an opened file. Raises ValueError for a file that is not of this key, or not whole."""
        n_bytes = os.fstat(file).st_size
        head = os.read(file, _HEAD.size)
        if len(head) < _HEAD.size:
            raise ValueError("it was cut off")
        magic, own, layout_key, n_text, n_values, check = _HEAD.unpack(head)
        start = _start(n_text)
        if magic != _MAGIC or own != key or start + n_values != n_bytes:
            raise ValueError("it is of another version, or was cut off")
        pages = mmap.mmap(file, n_bytes, access=mmap.ACCESS_COPY)
        values = memoryview(pages)[start:]
        text = pages[len(head) : len(head) + n_text]
        if zlib.crc32(values, zlib.crc32(text)) != check:
            raise ValueError("its values are not those that were written")
        layout = self._blocks.layout(layout_key) or self._blocks.shared(BlockLayout.parse(text))
        if layout.key != layout_key or layout.n_bytes != n_values:
            raise ValueError("its layout is not that which was written")
        return Block(layout, torch.frombuffer(values, dtype=torch.uint8))

    def _says_all(self, layout: BlockLayout) -> bool:
        """Return True if a layout can be read again from its text, and has a block."""
        if not layout.text or not layout.n_bytes:
            return False
        parses = self._parses.get(layout.key)
        if parses is None:
            try:
                parses = BlockLayout.parse(layout.text).n_bytes == layout.n_bytes
            except (ValueError, TypeError, KeyError):
                parses = False
            self._parses.put(layout.key, parses)
        return parses

    def _write(self, path: Path, parts: tuple[bytes | memoryview, ...]) -> None:
        handle, name = tempfile.mkstemp(prefix=".", suffix=_SUFFIX, dir=self._folder)
        try:
            with os.fdopen(handle, "wb", buffering=0) as file:
                for part in parts:
                    if file.write(part) != len(part):
                        raise OSError("the disk is full")
            Path(name).replace(path)
        except BaseException:
            with suppress(OSError):
                Path(name).unlink()
            raise

    def _make_room(self, n_bytes: int) -> None:
        """Remove the files that were used before all others, until there is room for so many bytes."""
        if self._n_written >= self._most // _SCANS or self._n_bytes + n_bytes > self._most:
            found = sorted(_files(self._folder))
            self._n_written, self._n_bytes = 0, sum(size for _, size, _ in found)
            for _, size, path in found:
                if self._n_bytes + n_bytes <= self._most:
                    break
                path.unlink(missing_ok=True)  # what is mapped stays until it is unmapped
                self._n_bytes -= size
        self._n_written += n_bytes
        self._n_bytes += n_bytes

    def _warn(self, error: Exception) -> None:
        """Say once that something is wrong."""
        if not self._has_warned:
            self._has_warned = True
            _warn(self._folder, error)


def _files(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """Yield when each file was used last, its bytes, and its path."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(_SUFFIX):
                with suppress(FileNotFoundError):
                    told = entry.stat(follow_symlinks=False)
                    yield told.st_mtime, told.st_size, Path(entry.path)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    file = os.open(path, flags)
    try:
        _require_own(os.fstat(file), stat.S_ISREG)
        yield file
    finally:
        os.close(file)


def _require_own(told: os.stat_result, is_kind: Callable[[int], bool]) -> None:
    """Raise ValueError for a file or folder that others can write to, or that is of another kind."""
    others = told.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not is_kind(told.st_mode) or (os.name == "posix" and (told.st_uid != os.geteuid() or others)):
        raise ValueError("it is not a file or folder to which this user alone can write")


def _start(n_text: int) -> int:
    """Where the values start behind a text: at a page."""
    return -(-(_HEAD.size + n_text) // mmap.PAGESIZE) * mmap.PAGESIZE


def _warn(folder: Path, error: Exception) -> None:
    _LOG.warning("adapters are read anew instead of from the folder %s: %s", folder, error)
