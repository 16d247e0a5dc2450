"""Eviction from the memory of serving: by worth against least recently used, on simulated requests.

    python -m bench.serving.eviction [--requests 6000] [--gib 1.0] [--token-ms 2.0]

Requests name the base or one of 500 adapters by Zipf's law. Each begins with one of the headers of its adapter, of 8 to
96 pages, and goes on with 2 to 16 pages of its own. Keys, values and adapters share one budget. Pages, adapters and
what goes out are those of the engine (`Pages`, `AdapterPool`). Computing and loading are seconds that are added up, of
SmolLM2-135M on two cores: 2 ms for a token (--token-ms), 5 ms and 4 ns a byte for an adapter. In the second half of a
trace that drifts, other adapters and headers are popular. The result is the same on every machine.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.report import Rows
from veneer.serve.schedule.adapter_pool import AdapterPool
from veneer.serve.schedule.adapter_version import AdapterVersion
from veneer.serve.schedule.eviction import Eviction
from veneer.serve.schedule.pages import Pages
from veneer.serve.schedule.prefix_cache import key_of, root_of

BLOCK, PAGE_BYTES = 16, 368_640
N_ADAPTERS, N_HEADERS = 500, 3  # the base has as many headers as ten adapters


class Recency(Eviction):
    """Least recently used: what is used now is worth more than all before."""

    def __init__(self, token_seconds: float) -> None:
        super().__init__(token_seconds)
        self._clock = itertools.count(1)

    def of(self, n_uses: int, seconds: float, n_bytes: int) -> float:
        return float(next(self._clock))


@dataclass(frozen=True)
class Request:
    """A request: its adapter, if any, and the names of its pages."""

    adapter: int | None
    pages: tuple[int, ...]


def trace(n: int, exponent: float, drifts: bool) -> Iterator[Request]:
    """Requests by Zipf's law of an exponent."""
    draw = random.Random(7)
    subjects: list[int | None] = [*[None] * 10, *range(N_ADAPTERS)]
    draw.shuffle(subjects)
    weights = [1 / (rank + 1) ** exponent for rank in range(len(subjects))]
    lengths = {(s, h): int(2 ** draw.uniform(3, 6.6)) for s in range(len(subjects)) for h in range(N_HEADERS)}
    own = itertools.count(1 << 40)
    for number in range(n):
        if drifts and number == n // 2:
            draw.shuffle(weights)
        subject = draw.choices(range(len(subjects)), weights)[0]
        header = draw.choices(range(N_HEADERS), (6, 3, 2))[0]
        first = (subject * N_HEADERS + header) << 10
        header_pages = range(first, first + lengths[subject, header])
        yield Request(subjects[subject], (*header_pages, *(next(own) for _ in range(draw.randint(2, 16)))))


def adapter_bytes(adapter: int) -> int:
    """Ranks 4, 16 and 64 on all linear layers, and 200 kB of IA3."""
    return (200_000, 2_460_000, 9_830_000, 39_300_000)[adapter % 4]


def load_seconds(adapter: int) -> float:
    return 5e-3 + 4e-9 * adapter_bytes(adapter)


@dataclass
class Cost:
    """Work that requests had to do again."""

    n_requests: int = 0
    n_tokens: int = 0
    n_read: int = 0
    n_loads: int = 0
    seconds: float = 0.0


def run(requests: Sequence[Request], worth: Eviction, n_bytes: int) -> Cost:
    """The cost of all requests, one after the other."""
    pages = Pages(n_bytes // PAGE_BYTES, BLOCK, page_bytes=PAGE_BYTES, n_bytes=n_bytes, worth=worth)
    pool, cost = AdapterPool(memory=pages), Cost()
    for adapter in range(N_ADAPTERS):
        pool.bind(str(adapter), AdapterVersion(id=str(adapter), n_bytes=adapter_bytes(adapter)))
    for number, request in enumerate(requests):
        version = None if request.adapter is None else str(request.adapter)
        if version is not None:
            enter(pool, version, cost)
        read(pages, pool, request, (number, version), cost)
        if version is not None:
            pool.release(version), pool.leave(version)
        pool.going.clear(), pages.shed.clear(), pool.moved.clear()
    return cost


def enter(pool: AdapterPool, version: str, cost: Cost) -> None:
    pool.enter(version)
    if not pool.is_resident(version):
        assert pool.begin_load([version]) == version
        seconds = load_seconds(int(version))
        pool.loaded(version, seconds)
        cost.n_loads += 1
        cost.seconds += seconds
    pool.acquire(version)


def read(pages: Pages, pool: AdapterPool, request: Request, who: tuple[int, str | None], cost: Cost) -> None:
    keys, parent = list[bytes](), root_of(who[1])
    for page in request.pages:
        keys.append(parent := key_of(parent, [page]))
    n_found = pages.share(who, keys)
    assert pool.make_room(who, len(keys) * BLOCK)
    assert pages.grow(who, len(keys) * BLOCK)
    pages.count_use(who)
    pages.publish(who, keys, n_found)
    pages.release(who)
    n_read = (len(keys) - n_found) * BLOCK
    cost.n_requests += 1
    cost.n_tokens += len(keys) * BLOCK
    cost.n_read += n_read
    cost.seconds += n_read * pages.worth.token_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=6000)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--token-ms", type=float, default=2.0)
    args = parser.parse_args()
    policies = {"least recently used": Recency, "worth": Eviction}
    traces = {f"Zipf {a}{', drifting' * d}": (a, bool(d)) for a in (0.8, 1.0, 1.2) for d in (0, 1)}
    rows = Rows((f"{t}, {p}" for t in traces for p in policies), ["tokens read", "loads", "s/request", "of LRU"])
    for title, (exponent, drifts) in traces.items():
        requests, first = list(trace(args.requests, exponent, drifts)), None
        for policy, make in policies.items():
            cost = run(requests, make(1e-3 * args.token_ms), int(args.gib * 2**30))
            first = first or cost.seconds
            told = (f"{cost.n_read / cost.n_tokens:.1%}", f"{cost.n_loads / cost.n_requests:.3f}")
            rows.add(
                f"{title}, {policy}", *told, f"{cost.seconds / cost.n_requests:.3f}", f"{cost.seconds / first:.2f}"
            )


if __name__ == "__main__":
    main()
