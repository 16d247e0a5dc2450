"""Two replicas on Ray Serve (B6): requests that find their adapter loaded, beside random choice; a replica is killed.

    python -m bench.serving.serve_ray [--adapters 40] [--room 25] [--requests 1500] [--streams 16]

Needs `pip install 'veneer[ray]'`. A tiny random model in two replicas of this machine, each with room for 25 of 40
adapters. Clients send one request after the other, each for an adapter by Zipf's law; then one adapter, rare before,
has half of all requests. Both kinds of choice get the same requests, in turn, and each begins with nothing loaded.
Before, an adapter must score a prompt as it does in transformers and PEFT. The share is that of ``adapter_hits`` in
``/metrics``. At last a replica is killed while all clients wait for answers. A request that failed must have begun
before, and may fail with 503 alone.
"""

from __future__ import annotations

import argparse
import http.client
import json
import logging
import os
import random
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from prometheus_client.parser import text_string_to_metric_families as parsed
from ray import serve
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from bench.report import Rows, add_keep, done, ends_as_interrupted, keep, working
from bench.serving.asked import prompt_of
from bench.serving.likeliest import require_scores, scores_in, scoring
from bench.tiny_model import write_tiny
from veneer import LoraConfig, get_peft_model
from veneer.ray.serving.arguments import arguments_of
from veneer.ray.serving.deployments import ROUTER, application
from veneer.store.source import load_model

PORT = 8642
URL = f"http://127.0.0.1:{PORT}"
LEAST_FOUND = 0.9
KILLED_AFTER = 3.0  # seconds of requests, and as many follow


class RandomRouter(RequestRouter):
    """The opponent: any replica."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        return [[replica] for replica in random.sample(candidate_replicas, len(candidate_replicas))]


@dataclass(frozen=True)
class Asked:
    """A request: when it began and ended, and its status."""

    begun: float
    ended: float
    status: int


def main() -> None:
    ends_as_interrupted()
    args = parse()
    names = [f"adapter-{n}" for n in range(args.adapters)]
    weights = [1 / (1 + n) for n in range(args.adapters)]
    draw = random.Random(5)
    zipf = draw.choices(names, weights, k=args.requests)
    hot = names[args.adapters // 2]
    halved = [hot if draw.random() < 0.5 else name for name in draw.choices(names, weights, k=args.requests)]
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        base = write_tiny(Path(scratch) / "base")
        folder = distinct(base, Path(scratch) / "adapters", args.adapters)
        given = {"model": base, "served_model_name": "base", "adapters": str(folder), "replicas": 2}
        given |= {"engine_kwargs": {"max_loras": args.room, "dtype": "float32"}}
        print(
            f"2 replicas with room for {args.room} of {args.adapters} adapters each, {args.streams} streams; "
            f"load {os.getloadavg()[0]:.1f}"
        )
        rows = Rows(["random, half of all for one"], ["requests", "found", "of hot on each", "ms"])
        with ray_serve():
            for title, router in (("homes", ROUTER), ("random", RandomRouter)):
                working(f"{title}: two replicas start")
                serve.run(application(arguments_of(given), router))
                wait_for_two()
                require_right(base, folder, names[-1])
                for case, wanted in (("by Zipf", zipf), ("half of all for one", halved)):
                    working(f"{title}, {case}")
                    before, start = metrics(), time.perf_counter()
                    asked = ask_all(wanted, args.streams)
                    seconds = time.perf_counter() - start
                    require_answered(asked)
                    found = share(before, metrics())
                    of_hot = per_replica(before, metrics(), hot)
                    figures[f"{title}, {case}"] = found
                    told = "/".join(f"{n:.0f}" for n in of_hot)
                    ms = 1000 * seconds / len(wanted)
                    rows.add(f"{title}, {case}", str(len(wanted)), f"{found:.3f}", told, f"{ms:.1f}")
                if title == "homes":
                    figures["served by the second"] = min(of_hot) / sum(of_hot)
                    killed = kill_one(args.streams, names)
                serve.delete("default")
    done()
    print(killed)
    print(f"\nfound loaded, both cases: at least {LEAST_FOUND} is accepted")
    keep(args.keep, figures)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=40)
    parser.add_argument("--room", type=int, default=25)
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--streams", type=int, default=16)
    add_keep(parser)
    return parser.parse_args()


def distinct(base: str, folder: Path, n: int) -> Path:
    """A folder of adapters, each with values of its own: equal ones would be loaded once."""
    model = get_peft_model(load_model(base), LoraConfig(r=3, target_modules=["q_proj"]))
    for number in range(n):
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in (each for each in model.parameters() if each.requires_grad):
                parameter.normal_()
        model.save_pretrained(folder / f"adapter-{number}")
    return folder


@contextmanager
def ray_serve() -> Iterator[None]:
    """Ray on this machine, with Serve on a port."""
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    try:
        serve.start(http_options={"port": PORT})
        yield
        serve.shutdown()
    finally:
        ray.shutdown()


def ask(name: str, n_tokens: int = 8) -> Asked:
    """One request over HTTP."""
    body = json.dumps({"model": name, "prompt": "w7 w9", "max_tokens": n_tokens, "temperature": 0, "ignore_eos": True})
    headers = {"Content-Type": "application/json"}
    begun = time.perf_counter()
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{URL}/v1/completions", body.encode(), headers)) as answer:
            answer.read()
            status = answer.status
    except urllib.error.HTTPError as error:
        status = error.code
    except (OSError, http.client.HTTPException):
        status = 0  # cut off
    return Asked(begun, time.perf_counter(), status)


def ask_all(wanted: Sequence[str], n_streams: int, n_tokens: int = 8) -> list[Asked]:
    """Requests of so many clients, each with one at a time."""
    left, found = list(reversed(wanted)), list[Asked]()

    def client() -> None:
        while left:
            try:
                name = left.pop()
            except IndexError:
                return
            found.append(ask(name, n_tokens))

    clients = [threading.Thread(target=client) for _ in range(n_streams)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    return found


def require_answered(asked: Sequence[Asked]) -> None:
    wrong = Counter(each.status for each in asked if each.status != 200)
    if wrong:
        raise SystemExit(f"statuses: {dict(wrong)}")


def require_right(base: str, folder: Path, name: str) -> None:
    """PartedError if an adapter scores a prompt otherwise than the model under it."""
    body = json.dumps(scoring(name, prompt := prompt_of(1))).encode()
    request = urllib.request.Request(f"{URL}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        require_scores(name, base, prompt, scores_in(json.load(answer), prompt), str(folder / name))


def metrics() -> dict[tuple[str, str, str], float]:
    """Values by name, replica and adapter."""
    with urllib.request.urlopen(f"{URL}/metrics") as answer:
        text = answer.read().decode()
    return {
        (sample.name.partition(":")[2], sample.labels["engine"], sample.labels.get("adapter", "")): sample.value
        for family in parsed(text)
        for sample in family.samples
    }


def wait_for_two() -> None:
    while len({engine for _, engine, _ in metrics()}) < 2:
        time.sleep(0.2)


def share(before: dict[Any, float], after: dict[Any, float]) -> float:
    """The share of an adapter's requests that found it loaded, over all replicas."""

    def grown(wanted: str) -> float:
        return sum(value - before.get(key, 0) for key, value in after.items() if key[0] == wanted)

    return grown("adapter_hits_total") / grown("adapter_requests_total")


def per_replica(before: dict[Any, float], after: dict[Any, float], adapter: str) -> list[float]:
    return [
        value - before.get(key, 0)
        for key, value in sorted(after.items())
        if key[::2] == ("adapter_requests_total", adapter)
    ]


def kill_one(n_streams: int, names: Sequence[str]) -> str:
    """Kill a replica under load; what happened to the requests."""
    working("a replica is killed")
    gone = sorted({engine for _, engine, _ in metrics()})[0]
    actor = ray.get_actor(f"SERVE_REPLICA::default#engine#{gone}", namespace="serve")
    found, over = list[Asked](), time.perf_counter() + 2 * KILLED_AFTER
    draw = random.Random(7)

    def client() -> None:
        while time.perf_counter() < over:
            found.append(ask(draw.choice(names), 64))

    clients = [threading.Thread(target=client) for _ in range(n_streams)]
    for each in clients:
        each.start()
    time.sleep(KILLED_AFTER)
    killed = time.perf_counter()
    ray.kill(actor)
    for each in clients:
        each.join()
    open_then = [each for each in found if each.begun < killed < each.ended]
    failed = [each for each in found if each.status != 200]
    statuses = dict(Counter(each.status for each in failed))
    later = [each for each in failed if each.begun > killed]
    if later or statuses.keys() - {503}:
        raise SystemExit(f"{statuses} of requests; {len(later)} of them began after the replica was killed")
    return (
        f"a replica killed: {len(failed)} of the {len(open_then)} requests in flight failed, all with 503; "
        f"{len([each for each in found if each.begun > killed])} that began later were answered"
    )


if __name__ == "__main__":
    main()
