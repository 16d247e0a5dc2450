"""Cache of pages by the tokens that lead to them: keys, the tree of blocks, and the next to go out. No torch.

A block is a full page of computed positions. Its key is a hash of its tokens and of its parent's key, so that equal
keys have equal tokens from the first. The key before the first block, the root, is a hash of the adapter's version, or
of the base, and of the request's salt. Virtual tokens follow from the version: their positions add no tokens to a key.
A sequence that an adapter acts on from some token on begins at the base's root. Keys from that token on name an owner.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

from veneer.errors import ConfigError
from veneer.serve.schedule.eviction import Eviction
from veneer.serve.schedule.lazy_heap import LazyHeap

MAX_SALT = 1024  # characters


def root_of(version: str | None, salt: str | None = None) -> bytes:
    """Return the key in front of the first block of all sequences of a version (None: the base) and a salt."""
    return hashlib.sha256(repr((version, salt)).encode()).digest()


def require_salt(salt: str | None) -> None:
    """Raise ConfigError for a salt that is no text of 1 to `MAX_SALT` characters; None is no salt."""
    if salt is not None and not (isinstance(salt, str) and 1 <= len(salt) <= MAX_SALT):
        given = f"has {len(salt)} characters" if isinstance(salt, str) else f"is a {type(salt).__name__}"
        raise ConfigError(
            f"cache_salt {given}: it must be text of 1 to {MAX_SALT} characters. Give such a text, or none."
        )


def key_of(parent: bytes, tokens: Sequence[int], owner: bytes = b"") -> bytes:
    """Return the key of the block that holds ``tokens`` after the block with the key ``parent``.

    ``owner`` is given for a block with tokens that an adapter acts on, if it does not act on all before.
    """
    return hashlib.sha256(parent + array("q", tokens).tobytes() + owner).digest()


class Tail(NamedTuple):
    """End of a sequence in the page behind its ``n_full`` full ones: virtual tokens first, if any, and then ``tokens``.

    ``parent`` is the key of the last full page, or the root if there is none; ``owner`` is that of `key_of`.
    """

    parent: bytes
    n_full: int
    n_virtual: int
    tokens: tuple[int, ...]
    owner: bytes = b""

    @property
    def key(self) -> bytes:
        """Key of the one tail of its owner that is kept behind a block."""
        return hashlib.sha256(self.parent + b"tail" + self.owner).digest()

    @property
    def n_positions(self) -> int:
        """Number of positions in the page."""
        return self.n_virtual + len(self.tokens)

    def n_common(self, other: Tail) -> int:
        """Return the number of first positions that are equal in another tail behind the same block."""
        differing = (i for i, (own, its) in enumerate(zip(self.tokens, other.tokens, strict=False)) if own != its)
        return self.n_virtual + next(differing, min(len(self.tokens), len(other.tokens)))


@dataclass(eq=False, slots=True)
class _Block:
    key: bytes
    page: int
    parent: _Block | None
    version: str | None = None
    tail: Tail | None = None
    n_children: int = 0
    n_uses: int = 1
    worth: float = 0.0
    number: int = 0  # of equal worth, who was let go of first goes out first
    is_idle: bool = False

    @property
    def rank(self) -> tuple[float, int] | None:
        """Return the block's rank among those that may be evicted; None if it may not."""
        return (self.worth, self.number) if self.is_idle and not self.n_children else None


class PrefixCache:
    """Blocks by key. Pages are numbers; who holds them is told by `hold` and `idle`. Invariants:

    - A key has one page, and a page at most one key.
    - A block's parent is in the cache.
    - A block without holders goes out before its parent, and none with holders goes out.
    - At most one tail of an owner is kept behind a block. Nobody holds it: who continues it takes it out, and writes on
      in it.
    """

    def __init__(self, worth: Eviction, block: int, page_bytes: int) -> None:
        self._worth, self._block, self._page_bytes = worth, block, page_bytes
        self.n_idle = 0
        """Number of blocks that nobody holds."""
        self._blocks: dict[bytes, _Block] = {}
        self._of_page: dict[int, _Block] = {}
        self._of_version: dict[str, dict[_Block, None]] = {}  # parents before their children, as they came
        self._leaves = self._no_leaves()
        self._numbers = itertools.count()

    def __contains__(self, page: int) -> bool:
        return page in self._of_page

    def page(self, key: bytes) -> int | None:
        """Return the page of a key."""
        block = self._blocks.get(key)
        return None if block is None else block.page

    def found(self, keys: Sequence[bytes]) -> list[int]:
        """Return the pages of the first keys, up to the first that is missing."""
        known = itertools.takewhile(lambda block: block is not None, map(self._blocks.get, keys))
        return [block.page for block in known if block is not None]

    def add(self, key: bytes, page: int, parent: bytes | None, version: str | None = None) -> None:
        """Add a held page under a new key, behind a block that is in the cache, or as a first block.

        ``version`` is the adapter's that acted on it, None for the base's.
        """
        behind = None if parent is None else self._blocks[parent]
        if behind is not None:
            behind.n_children += 1
        block = self._blocks[key] = self._of_page[page] = _Block(key, page, behind, version)
        if version is not None:
            self._of_version.setdefault(version, {})[block] = None

    def hold(self, page: int) -> None:
        """Keep a page that nobody held."""
        block = self._of_page[page]
        block.is_idle = False
        self.n_idle -= 1

    def use(self, pages: Sequence[int]) -> None:
        """Count a use of pages."""
        for page in pages:
            self._of_page[page].n_uses += 1

    def idle(self, page: int) -> None:
        """Let a page go out from now on, as nobody holds it any more."""
        block = self._of_page[page]
        block.is_idle, block.worth, block.number = True, self._worth_of(block), next(self._numbers)
        self.n_idle += 1
        self._leaves.put(block)

    def least(self) -> float | None:
        """Return the worth of the next block to go out; None if all have holders."""
        block = self._leaves.first()
        return None if block is None else block.worth

    def evict(self) -> int:
        """Drop the block of the least worth that nobody holds; return its page. There must be one."""
        block = cast(_Block, self._leaves.first())
        self._worth.went(block.worth)
        return self._drop(block)

    def forget(self, version: str) -> list[int]:
        """Drop the blocks of a version that nobody holds; return their pages."""
        found = reversed(list(self._of_version.get(version, ())))
        return [self._drop(block) for block in found if block.rank is not None]

    def keep_tail(self, tail: Tail, page: int, version: str | None = None) -> int | None:
        """Keep a page that is filled in part behind a block that is in the cache; return the page that it replaces."""
        before = self._blocks.get(tail.key)
        replaced = None if before is None else self._drop(before)
        self.add(tail.key, page, tail.parent if tail.n_full else None, version)
        self._of_page[page].tail = tail
        self.idle(page)
        return replaced

    def take_tail(self, wanted: Tail) -> tuple[int, int] | None:
        """Take out the tail behind a block; return its page, and how many positions there are as wanted, if any is."""
        block = self._blocks.get(wanted.key)
        n = 0 if block is None or block.tail is None else block.tail.n_common(wanted)
        return None if block is None or not n else (self._drop(block), n)

    def clear(self) -> list[int]:
        """Drop all keys; return the pages that nobody holds."""
        pages = [block.page for block in self._blocks.values() if block.is_idle]
        self._blocks, self._of_page, self._of_version = {}, {}, {}
        self._leaves, self.n_idle = self._no_leaves(), 0
        return pages

    def _drop(self, block: _Block) -> int:
        """Remove a block that no request holds; return its page."""
        self._leaves.discard(block)
        del self._blocks[block.key], self._of_page[block.page]
        if block.version is not None:
            own = self._of_version[block.version]
            del own[block]
            if not own:
                del self._of_version[block.version]
        self.n_idle -= 1
        if block.parent is not None:
            block.parent.n_children -= 1
            self._leaves.put(block.parent)
        return block.page

    def _worth_of(self, block: _Block) -> float:
        n_positions = self._block if block.tail is None else block.tail.n_positions
        return self._worth.of(block.n_uses, n_positions * self._worth.token_seconds, self._page_bytes)

    @staticmethod
    def _no_leaves() -> LazyHeap[_Block]:
        return LazyHeap(lambda block: block.rank)
