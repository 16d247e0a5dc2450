"""Many names, a long queue, a client that asks for too much, and prompts that arrive while others are answered.

    python -m bench.serving.serve_many [--parts step fair memory gaps many zipf cold] [--names 10000] [--waiting 10000]

Every part runs SmolLM2-135M in bfloat16, greedily, in one process, and prints its figures with their goals:

step    Two engines in turns: one knows 10 adapters and has 64 requests waiting, the other ``--names`` and
        ``--waiting``. The batch is the same. Timed is a step without the calls of C++ in it.
fair    Clients with one request at a time, alone, and beside one that asks for fifty times as much: their first tokens.
memory  Adapters of rank 8 on q and v are loaded under load: bytes of the process beside those that the engine counts,
        an adapter, and the longest pause of Python's collector.
gaps    Prompts of 2,000 tokens arrive while 16 answers are read as they grow: the gaps of these, p99 over the median,
        and the tokens a second of the whole load beside those of an engine that gives prompts all the time that they
        want. Told too are the tokens a second until the last prompt is answered, when the two have not done the same.
many    As many requests at once as ``--many``, each for an adapter of its own, of rank 16 on all layers: what a step
        takes beyond one of the base, beside the time in which the adapters' bytes are read from memory.
zipf    ``--zipf`` adapters of rank 8 on q and v, asked for by Zipf's law: all loaded, and with room for a tenth of
        them. Tokens a second, beside those of five adapters.
cold    An idle engine's first token for an adapter that is not loaded, beyond that for a loaded one: from its folder,
        and from a folder of packed adapters in another engine; both also when its files are seen for the first time.

The last three compare answers first: those of requests in one batch with those of each alone, and each token with the
likeliest one (`likeliest.py`).
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from bench.report import Rows, add_keep, ends_as_interrupted, keep, working
from bench.serving.asked import ask, engine_of, finish, prompt_of, write_adapters
from bench.serving.likeliest import Answered, require_likeliest
from bench.tiny_model import write_tiny
from veneer import LLM, LoraConfig, LoRARequest, SamplingParams
from veneer.serve.schedule.prefill_budget import PrefillBudget
from veneer.store.source import resolve

STEP, PAUSE, MEMORY, FIRST, GAPS, TOKENS = 1.1, 5e-3, 16e3, 2.0, 3.0, 0.95  # the goals
BYTES, RESIDENT, ROOM, FROM_FOLDER, FROM_BLOCK = 1.5, 0.95, 0.8, 40e-3, 8e-3
HOT, SEATS, FEW_WAIT, STREAMS, LONG = 10, 32, 64, 16, 2000
SMALL = LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
PARTS = ("step", "fair", "memory", "gaps", "many", "zipf", "cold")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model: its times mean nothing")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--names", type=int, default=10_000)
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=100, help="steps of each engine in a turn")
    parser.add_argument("--adapters", type=int, default=256, help="that are loaded for their memory")
    parser.add_argument("--many", type=int, default=256, help="adapters of rank 16 in one batch")
    parser.add_argument("--zipf", type=int, default=2000, help="adapters that are asked for by Zipf's law")
    parser.add_argument("--requests", type=int, default=192, help="for those, in a turn")
    parser.add_argument("--cold", type=int, default=24, help="adapters that are loaded one after the other")
    parser.add_argument("--prompts", type=int, default=6, help="long ones that arrive")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    add_keep(parser)
    args = parser.parse_args()
    ends_as_interrupted()
    torch.set_num_threads(args.threads)
    parts: dict[str, Callable[[Any, str, Path], dict[str, float]]] = {
        "step": step_times, "fair": first_tokens, "memory": memory, "gaps": gaps,
        "many": many, "zipf": zipf, "cold": cold,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        model = write_tiny(Path(scratch) / "base") if args.tiny else str(resolve(args.model))
        figures: dict[str, float] = {}
        for name in args.parts:
            figures |= parts[name](args, model, Path(scratch))
        keep(args.keep, figures)


def step_times(args: Any, model: str, scratch: Path) -> dict[str, float]:
    """The batch is one of the same ten adapters in both, whose requests are urgent; the rest of the queue waits."""
    working(f"{args.names} adapters are written")
    layer = LoraConfig(r=1, target_modules=["layers.0.self_attn.q_proj"])
    adapters = write_adapters(model, scratch / "names", args.names, layer)
    options = {"max_num_seqs": SEATS, "max_model_len": 256, "max_cpu_loras": HOT, "max_loras": HOT}
    few, many = (engine_of(model, **options) for _ in range(2))
    for llm in (few, many):
        for adapter in adapters[:HOT]:
            llm.llm_engine.add_lora(adapter)
            llm.llm_engine.pin_lora(adapter.adapter_id)
    for number in range(args.waiting):
        working(f"{number} wait") if number % 2000 == 0 else None
        ask(many, prompt_of(number), 8, adapters[HOT + number % (args.names - HOT)] if args.names > HOT else None)
    loads = [Urgent(llm, adapters[:HOT]) for llm in (few, many)]
    for load in loads:
        load.run(30)
    times = [list[float](), list[float]()]
    for turn in range(args.repeats):
        working(f"steps, turn {turn + 1} of {args.repeats}")
        for load, found in zip(loads, times, strict=True):
            found.append(load.run(args.steps))
    own = [statistics.median(each) for each in times]
    table = Rows(["10 names, 64 wait", f"{args.names} names, {args.waiting} wait"], ["ms a step beside C++"])
    table.add("10 names, 64 wait", f"{1e3 * own[0]:.3f}")
    table.add(f"{args.names} names, {args.waiting} wait", f"{1e3 * own[1]:.3f}")
    print(f"ratio {own[1] / own[0]:.2f} (goal at most {STEP})\n")
    return {"step": own[1] / own[0]}


class Urgent:
    """Requests for a few adapters that come before all others, so many that the batch is full and 64 of them wait."""

    def __init__(self, llm: LLM, adapters: Sequence[LoRARequest]) -> None:
        self.llm, self.adapters, self.n = llm, adapters, 0
        self.inside = 0.0
        native = llm.engine.runner.interpreter.native.program
        run = native.run

        def timed(*given: Any) -> None:
            start = time.perf_counter()
            run(*given)
            self.inside += time.perf_counter() - start

        native.run = timed

    def run(self, n_steps: int) -> float:
        """The median seconds of a step beside C++."""
        found = []
        for _ in range(n_steps):
            while self.n_urgent < FEW_WAIT + SEATS:
                ask(self.llm, prompt_of(self.n), 16, self.adapters[self.n % len(self.adapters)], priority=-1)
                self.n += 1
            self.llm.engine._take_all()  # messages cost as many as there are, and not what is there
            self.inside, start = 0.0, time.perf_counter()
            outputs = self.llm.engine.step()
            found.append(time.perf_counter() - start - self.inside)
            self.n_done += sum(output.finished for output in outputs)
        return statistics.median(found)

    n_done = 0

    @property
    def n_urgent(self) -> int:
        return self.n - self.n_done


def first_tokens(args: Any, model: str, scratch: Path) -> dict[str, float]:
    llm = engine_of(model, max_num_seqs=SEATS, max_model_len=256)
    found: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(args.repeats):
        for greedy in found:
            working(f"first tokens, turn {turn + 1} of {args.repeats}")
            found[greedy] += clients(llm, greedy=greedy)
    p95 = {greedy: statistics.quantiles(each, n=20)[18] for greedy, each in found.items()}
    table = Rows(["beside one that asks for 50 times as much"], ["p50 ms", "p95 ms"])
    for greedy, told in ((False, "alone"), (True, "beside one that asks for 50 times as much")):
        table.add(told, f"{1e3 * statistics.median(found[greedy]):.0f}", f"{1e3 * p95[greedy]:.0f}")
    print(f"p95 of first tokens {p95[True] / p95[False]:.2f} times alone (goal at most {FIRST})\n")
    return {"first": p95[True] / p95[False]}


def clients(llm: LLM, *, greedy: bool, n_clients: int = SEATS - 2, n_each: int = 3) -> list[float]:
    """Seconds to the first token of clients that ask again when they have their answer; the greedy one has 50 requests
    in flight for each of theirs.
    """
    began, owners, seconds, left = dict[str, float](), dict[str, str](), list[float](), dict[str, int]()

    def send(client: str) -> None:
        id = ask(llm, prompt_of(len(owners)), 16, client=client)
        began[id], owners[id] = time.perf_counter(), client

    for client in range(n_clients):
        left[f"client {client}"] = n_each
    hog = [ask(llm, prompt_of(i), 16, client="greedy") for i in range(50 if greedy else 0)]
    for client in left:
        send(client)
    while any(left.values()):
        for output in llm.engine.step():
            id = output.request_id
            if id in began and output.outputs[0].token_ids:
                seconds.append(time.perf_counter() - began.pop(id))
            if not output.finished:
                continue
            if id not in owners:
                hog.append(ask(llm, prompt_of(len(hog)), 16, client="greedy"))
            elif left[owners[id]]:
                left[owners[id]] -= 1
                send(owners[id]) if left[owners[id]] else None
    llm.engine.drop([*hog, *owners])
    return seconds


@contextmanager
def pauses() -> Iterator[list[float]]:
    """The seconds of the collector's pauses inside the block."""
    found, start = list[float](), 0.0

    def told(phase: str, info: dict[str, int]) -> None:
        nonlocal start
        if phase == "start":
            start = time.perf_counter()
        else:
            found.append(time.perf_counter() - start)

    gc.callbacks.append(told)
    try:
        yield found
    finally:
        gc.callbacks.remove(told)


def memory(args: Any, model: str, scratch: Path) -> dict[str, float]:
    adapters = write_adapters(model, scratch / "resident", args.adapters, SMALL)
    llm, own = engine_of(model, max_num_seqs=SEATS, max_model_len=256), psutil.Process()
    warm, adapters = adapters[:16], adapters[16:]
    for number in range(len(adapters)):  # a queue as long as that to come, and a full batch, have memory then
        ask(llm, prompt_of(number), 4, warm[number % len(warm)])
    finish(llm)
    llm.engine.collector.start()
    pages, before = llm.engine.scheduler.pages, own.memory_info().rss
    lent = pages.n_lent
    with pauses() as found:
        for adapter in adapters:
            ask(llm, prompt_of(adapter.adapter_id), 4, adapter)
        finish(llm)
    llm.engine.collector.stop()
    more = (own.memory_info().rss - before - (pages.n_lent - lent)) / len(adapters)
    table = Rows(["memory beside its bytes, kB an adapter"], ["here", "goal"])
    table.add("memory beside its bytes, kB an adapter", f"{1e-3 * more:.1f}", f"{1e-3 * MEMORY:.0f}")
    table.add("longest pause of the collector, ms", f"{1e3 * max(found, default=0.0):.1f}", f"{1e3 * PAUSE:.0f}")
    print()
    return {"memory": more, "pause": max(found, default=0.0)}


@dataclass(frozen=True, slots=True)
class Watched:
    """Seconds between two tokens of an answer while long prompts are read, and tokens a second, read and drawn: until
    the last of those prompts is answered, and of all requests.
    """

    gaps: list[float]
    rate: float
    whole_rate: float


def gaps(args: Any, model: str, scratch: Path) -> dict[str, float]:
    long = 300 if args.tiny else LONG
    llm = engine_of(model, max_num_seqs=SEATS, max_model_len=512 if args.tiny else 2048)
    found = {False: list[Watched](), True: list[Watched]()}
    for turn in range(args.repeats):
        for paced in found if turn % 2 else reversed(found):
            working(f"long prompts, turn {turn + 1} of {args.repeats}")
            llm.engine.scheduler.pace = PrefillBudget() if paced else PrefillBudget(stretch=1e9)
            found[paced].append(streams(llm, args.prompts, long))
    table = Rows(["steps without a limit"], ["p50 ms", "p99 ms", "p99/p50", "tok/s", "of all"])
    ratios = {}
    for paced, told in ((False, "steps without a limit"), (True, "steps with a limit")):
        all_gaps = [gap for each in found[paced] for gap in each.gaps]
        p50, p99 = statistics.median(all_gaps), statistics.quantiles(all_gaps, n=100)[98]
        ratios[paced] = p99 / p50
        rates = [statistics.median(getattr(each, name) for each in found[paced]) for name in ("rate", "whole_rate")]
        table.add(told, f"{1e3 * p50:.0f}", f"{1e3 * p99:.0f}", f"{p99 / p50:.1f}", *(f"{rate:.0f}" for rate in rates))
    turns = list(zip(found[True], found[False], strict=True))
    share = statistics.median(own.whole_rate / free.whole_rate for own, free in turns)
    early = statistics.median(own.rate / free.rate for own, free in turns)
    print(
        f"p99 {ratios[True]:.1f} times the median (goal at most {GAPS}), at {share:.2f} of the tokens (goal {TOKENS});"
    )
    print(f"{early:.2f} of them until the last long prompt is answered, of which the slower engine draws more\n")
    return {"gaps": ratios[True], "tokens of the whole load": share, "tokens until the last prompt": early}


def streams(llm: LLM, n_prompts: int, n_long: int) -> Watched:
    """Answers of 48 tokens, 16 at a time, while long prompts arrive, each of which draws four tokens. All of it is the
    same for every engine: a prompt arrives when so many tokens of answers have been drawn.
    """
    draw, n_each, last, found = random.Random(0), 48, dict[str, float](), list[float]()
    long, flying, n_tokens, n_drawn, n_asked = set[str](), set[str](), 0, 0, 0
    n_answers = STREAMS * (n_prompts // 2 + 1)  # the last prompts are read about as long as answers are drawn
    arrivals = sorted(STREAMS * draw.randrange(8, 24 * n_prompts) for _ in range(n_prompts))
    start, rate = time.perf_counter(), 0.0
    while n_asked < n_answers or flying or arrivals or long:
        while len(flying) < STREAMS and n_asked < n_answers:
            flying.add(ask(llm, prompt_of(n_asked), n_each))
            n_asked, n_tokens = n_asked + 1, n_tokens + 32
        while arrivals and arrivals[0] <= n_drawn:
            arrivals.pop(0)
            long.add(ask(llm, prompt_of(1000 + len(arrivals), n_long), 4, client="long"))
            n_tokens += n_long
        outputs = llm.engine.step()
        now = time.perf_counter()
        for output in outputs:
            id, n = output.request_id, len(output.outputs[0].token_ids)
            n_tokens += n
            if id in flying and n:
                n_drawn += n
                if id in last and not rate:
                    found.append(now - last[id])
                last[id] = now
            if output.finished:
                flying.discard(id), long.discard(id)
        if not (arrivals or long or rate):
            rate = n_tokens / (now - start)
    return Watched(found, rate, n_tokens / (time.perf_counter() - start))


def require_equal(llm: LLM, model: str, adapters: Sequence[LoRARequest]) -> None:
    """Stop unless answers in one batch are those of each adapter alone, with equal log-probabilities, which differ, and
    those of the model.
    """
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)

    def answers(asked: Sequence[LoRARequest]) -> list[tuple[tuple[int, float], ...]]:
        outputs = llm.generate([prompt_of(1)] * len(asked), params, lora_request=list(asked), use_tqdm=False)
        return [
            tuple((id, step[id].logprob) for id, step in zip(each.token_ids, each.logprobs or [], strict=True))
            for each in (output.outputs[0] for output in outputs)
        ]

    together = answers(adapters)
    if together != [answers([adapter])[0] for adapter in adapters] or len(set(together)) < len(adapters):
        raise SystemExit("adapters answer otherwise in a batch")
    told = [
        Answered(prompt_of(1), [id for id, _ in answer], adapter.lora_path)
        for adapter, answer in zip(adapters, together, strict=True)
    ]
    require_likeliest("adapters in a batch", model, told)


def many(args: Any, model: str, scratch: Path) -> dict[str, float]:
    n = args.many
    adapters = write_adapters(model, scratch / "many", n, LoraConfig(r=16, target_modules="all-linear"))
    llm = engine_of(model, max_num_seqs=n, max_model_len=64)
    require_equal(llm, model, adapters[:4])
    for adapter in adapters:
        llm.llm_engine.add_lora(adapter)
    times: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(args.repeats):
        for adapted in times:
            working(f"{n} requests, turn {turn + 1} of {args.repeats}")
            times[adapted].append(decoding(llm, n, adapters if adapted else None))
    base, own = (statistics.median(each) for each in times.values())
    n_bytes = llm.engine.scheduler.pages.n_lent
    read = seconds_to_read(n_bytes)
    table = Rows(["beyond that, for its adapters"], ["ms a step"])
    table.add("the base", f"{1e3 * base:.0f}")
    table.add("beyond that, for its adapters", f"{1e3 * (own - base):.0f}")
    table.add(f"their {1e-9 * n_bytes:.1f} GB are read in", f"{1e3 * read:.0f}")
    print(f"{(own - base) / read:.2f} times their bytes (goal at most {BYTES})\n")
    return {"many": (own - base) / read}


def decoding(llm: LLM, n: int, adapters: Sequence[LoRARequest] | None) -> float:
    """The median seconds of a step in which so many requests decode."""
    ids = [ask(llm, prompt_of(i, 8), 12, adapters[i] if adapters else None) for i in range(n)]
    found = []
    while llm.engine.has_work:
        start = time.perf_counter()
        outputs = llm.engine.step()
        if len(outputs) == n and not any(output.finished for output in outputs):
            found.append(time.perf_counter() - start)
    llm.engine.drop(ids)
    return statistics.median(found[1:])


def seconds_to_read(n_bytes: int) -> float:
    """The seconds in which all threads read so many bytes that are in no cache."""
    memory, times = torch.ones(1 << 26, dtype=torch.int64), []
    for _ in range(5):
        start = time.perf_counter()
        memory.sum()
        times.append(time.perf_counter() - start)
    return n_bytes / memory.nbytes * min(times)


def zipf(args: Any, model: str, scratch: Path) -> dict[str, float]:
    n = args.zipf
    working(f"{n} adapters are written")
    adapters = write_adapters(model, scratch / "zipf", n, SMALL)
    draw, weights = random.Random(0), [1 / (place + 1) for place in range(n)]
    asked = draw.choices(adapters, weights, k=args.requests)
    few = draw.choices(adapters[:5], k=args.requests)
    whole = engine_of(model, max_num_seqs=SEATS, max_model_len=128)
    room = engine_of(model, max_num_seqs=SEATS, max_model_len=128, max_cpu_loras=max(SEATS, n // 10))
    for llm in (whole, room):
        require_equal(llm, model, adapters[-8:])
    for number, adapter in enumerate(adapters):
        working(f"{number} are loaded") if number % 100 == 0 else None
        whole.llm_engine.add_lora(adapter)
    for adapter in reversed(adapters[: max(SEATS, n // 10)]):
        room.llm_engine.add_lora(adapter)
    loads: dict[str, tuple[LLM, Sequence[LoRARequest], float]] = {
        "5 adapters": (whole, few, 1.0),
        f"{n} by Zipf's law, all loaded": (whole, asked, RESIDENT),
        f"{n} by Zipf's law, room for {max(SEATS, n // 10)}": (room, asked, ROOM),
    }
    rates: dict[str, list[float]] = {told: [] for told in loads}
    for turn in range(args.repeats):
        for told, (llm, requests, _) in loads.items():
            working(f"{told}, turn {turn + 1} of {args.repeats}")
            rates[told].append(rate(llm, requests))
    table = Rows(list(loads), ["tok/s", "of 5", "goal"])
    shares = [statistics.median(rates[told]) / statistics.median(rates["5 adapters"]) for told in loads]
    for (told, (_, _, goal)), share in zip(loads.items(), shares, strict=True):
        table.add(told, f"{statistics.median(rates[told]):.0f}", f"{share:.2f}", f"{goal:.2f}")
    print()
    return {"zipf": shares[1], "zipf with room": shares[2]}


def rate(llm: LLM, asked: Sequence[LoRARequest]) -> float:
    """Tokens a second of requests that are all there from the start."""
    start, n_tokens = time.perf_counter(), 32
    for number, adapter in enumerate(asked):
        ask(llm, prompt_of(number), n_tokens, adapter)
    finish(llm)
    return len(asked) * n_tokens / (time.perf_counter() - start)


def cold(args: Any, model: str, scratch: Path) -> dict[str, float]:
    cache = scratch / "cache"
    adapters = write_adapters(model, scratch / "cold", args.cold + 1, SMALL)
    filling, own, packed = (
        engine_of(model, max_num_seqs=SEATS, max_model_len=128, adapter_cache_dir=each) for each in (cache, None, cache)
    )
    for adapter in adapters:
        filling.llm_engine.add_lora(adapter)
    filling.engine.close()
    engines = {"from its folder": (own, FROM_FOLDER), "from the block": (packed, FROM_BLOCK)}
    for llm, _ in engines.values():
        require_equal(llm, model, adapters[:4])
    new, known = ({name: list[float]() for name in engines} for _ in range(2))
    for adapter in adapters[1:]:
        for name, (llm, _) in engines.items():
            first, again, *loaded = first_tokens_of(llm, adapter)
            new[name].append(first - statistics.median(loaded))
            known[name].append(again - statistics.median(loaded))
    table = Rows(["from its folder, of files that are seen first"], ["ms beyond a loaded one", "goal"])
    for name, (_, goal) in engines.items():
        table.add(f"{name}, of files that are seen first", f"{1e3 * statistics.median(new[name]):.1f}", "")
        table.add(name, f"{1e3 * statistics.median(known[name]):.1f}", f"{1e3 * goal:.0f}")
    print()
    return {name: statistics.median(each) for name, each in known.items()}


def first_tokens_of(llm: LLM, adapter: LoRARequest) -> list[float]:
    """The seconds to the first token: of files that nobody has looked at, of known ones, and three times when it is
    loaded.
    """
    times = []
    for number in range(5):
        if number == 1:
            llm.llm_engine.remove_lora(adapter.adapter_id)
        start = time.perf_counter()
        ask(llm, prompt_of(1), 1, adapter)
        finish(llm)
        times.append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
