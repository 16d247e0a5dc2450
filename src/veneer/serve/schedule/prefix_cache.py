"""Cache of pages by the tokens that lead to them: keys, a tree of blocks, and the next block to evict. No torch.

A block is a full page of computed positions. Its key is a hash of its tokens and of its parent's key, so that two
blocks of equal keys have equal tokens from the sequence's start on. The first block's parent is the root, a hash of the
adapter's version (or of the base) and of the request's salt. Virtual tokens follow from the version: their positions
add no tokens to a key. If an adapter acts only from a later token on, the sequence begins at the base's root. The keys
from that token on then also hash an owner: the adapter's version.
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
    """Return the root key of all sequences of an adapter version and a salt; of the base if ``version`` is None."""
    return hashlib.sha256(repr((version, salt)).encode()).digest()


def require_salt(salt: str | None) -> None:
    """Raise ConfigError for a salt that is not a text of 1 to `MAX_SALT` characters.

    None is allowed: it means no salt.
    """
    if salt is not None and not (isinstance(salt, str) and 1 <= len(salt) <= MAX_SALT):
        given = f"has {len(salt)} characters" if isinstance(salt, str) else f"is a {type(salt).__name__}"
        raise ConfigError(
            f"cache_salt {given}: it must be text of 1 to {MAX_SALT} characters. Give such a text, or none."
        )


def key_of(parent: bytes, tokens: Sequence[int], owner: bytes = b"") -> bytes:
    """Return the key of the block that holds ``tokens`` after the block with the key ``parent``.

    ``owner`` is given if an adapter acts on some of these tokens, but not on all tokens of the sequence.
    """
    return hashlib.sha256(parent + array("q", tokens).tobytes() + owner).digest()


class Tail(NamedTuple):
    """Last, partly filled page of a sequence, after ``n_full`` full pages: virtual tokens first, if any, then
    ``tokens``.

    ``parent`` is the key of the last full page, or the root if there is none; ``owner`` is that of `key_of`.
    """

    parent: bytes
    n_full: int
    n_virtual: int
    tokens: tuple[int, ...]
    owner: bytes = b""

    @property
    def key(self) -> bytes:
        """Key of this page in a cache that keeps one tail for each parent and owner."""
        return hashlib.sha256(self.parent + b"tail" + self.owner).digest()

    @property
    def keys(self) -> list[bytes]:
        """Keys of the first 0, 1, … tokens in a cache that takes tails whole; the last one is this page's."""
        hashed = hashlib.sha256(self.parent + b"tail" + self.owner)
        found = [hashed.digest()]
        for token in self.tokens:
            hashed.update(array("q", (token,)).tobytes())
            found.append(hashed.digest())
        return found

    @property
    def n_positions(self) -> int:
        """Number of positions in the page."""
        return self.n_virtual + len(self.tokens)

    def n_common(self, other: Tail) -> int:
        """Return the number of leading positions of this page that are equal in another tail of the same parent."""
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
    """Blocks of computed pages by key. Pages are numbers. `hold` and `idle` report whether requests hold a page.
    Invariants:

    - A key has one page, and a page at most one key.
    - A block's parent is in the cache.
    - A block that is held is never evicted, and any other is evicted before its parent.
    - For each parent and owner, at most one tail (partly filled page) is kept. If ``whole_tails``, it is one for each
      content. No request holds it: a request that continues it takes it out of the cache and writes to it.
    """

    def __init__(self, worth: Eviction, block: int, page_bytes: int, *, whole_tails: bool = False) -> None:
        self._worth, self._block, self._page_bytes, self._whole_tails = worth, block, page_bytes, whole_tails
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
        """Return the pages of the first keys, up to the first key that is not in the cache."""
        known = itertools.takewhile(lambda block: block is not None, map(self._blocks.get, keys))
        return [block.page for block in known if block is not None]

    def add(self, key: bytes, page: int, parent: bytes | None, version: str | None = None) -> None:
        """Add a held page under a new key, after the cached block ``parent``, or as a first block if it is None.

        ``version`` is the adapter version that acted on the page; None for the base.
        """
        behind = None if parent is None else self._blocks[parent]
        if behind is not None:
            behind.n_children += 1
        block = self._blocks[key] = self._of_page[page] = _Block(key, page, behind, version)
        if version is not None:
            self._of_version.setdefault(version, {})[block] = None

    def hold(self, page: int) -> None:
        """Mark a page as held, so that it is not evicted. No request must have held it before."""
        block = self._of_page[page]
        block.is_idle = False
        self.n_idle -= 1

    def use(self, pages: Sequence[int]) -> None:
        """Count one more use of each page."""
        for page in pages:
            self._of_page[page].n_uses += 1

    def idle(self, page: int) -> None:
        """Mark a page that no request holds any more: it may be evicted from now on."""
        block = self._of_page[page]
        block.is_idle, block.worth, block.number = True, self._worth_of(block), next(self._numbers)
        self.n_idle += 1
        self._leaves.put(block)

    def least(self) -> float | None:
        """Return the value of the next block to evict; None if all blocks are held."""
        block = self._leaves.first()
        return None if block is None else block.worth

    def evict(self) -> int:
        """Evict the least valuable block that no request holds; return its page. There must be one."""
        block = cast(_Block, self._leaves.first())
        self._worth.went(block.worth)
        return self._drop(block)

    def forget(self, version: str) -> list[int]:
        """Drop a version's blocks that no request holds; return their pages."""
        found = reversed(list(self._of_version.get(version, ())))
        return [self._drop(block) for block in found if block.rank is not None]

    def keep_tail(self, tail: Tail, page: int, version: str | None = None) -> int | None:
        """Cache a partly filled page after its parent block; return the page of the tail that it replaces, if there is
        one.
        """
        key = tail.keys[-1] if self._whole_tails else tail.key
        before = self._blocks.get(key)
        replaced = None if before is None else self._drop(before)
        self.add(key, page, tail.parent if tail.n_full else None, version)
        self._of_page[page].tail = tail
        self.idle(page)
        return replaced

    def take_tail(self, wanted: Tail) -> tuple[int, int] | None:
        """Take a cached tail (partly filled page) with the parent and owner of ``wanted`` out of the cache.

        Return its page, and the number of its leading positions that equal those of ``wanted``. If there is no tail of
        which some do, or if none of which all do when tails are taken whole, return None and leave the cache as it is.
        """
        if self._whole_tails:
            known = (self._blocks.get(key) for key in reversed(wanted.keys))
            block = next((block for block in known if block is not None), None)
        else:
            block = self._blocks.get(wanted.key)
        n = 0 if block is None or block.tail is None else block.tail.n_common(wanted)
        return None if block is None or not n else (self._drop(block), n)

    def clear(self) -> list[int]:
        """Drop all keys; return the pages that no request holds."""
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
