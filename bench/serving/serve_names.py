"""A request's own cost over HTTP with 1 and with many adapters in the folder.

    python -m bench.serving.serve_names [--many 10000] [--requests 200] [--rounds 5]

Each side is a server of a tiny random model in this process. Requests ask for one token of one adapter, one after the
other over one connection, in turns. The loop's time is the CPU time of the thread that runs it. Adapters have equal
content, as links to the same files: names cost what is measured here, and no weights. Before anything is timed, each
side must score a prompt under its last adapter as transformers and PEFT do.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import statistics
import tempfile
import threading
import time
from pathlib import Path

from bench.report import Rows, add_keep, done, ends_as_interrupted, keep, working
from bench.same import stir
from bench.serving.asked import prompt_of
from bench.serving.likeliest import require_scores, scores_in, scoring
from bench.tiny_model import write_tiny

MOST_TIMES, MOST_LOOP_MS = 1.1, 2.0


class Side:
    """A server with a number of adapters, and its figures."""

    def __init__(self, base: str, folder: Path) -> None:
        from veneer.serve.http.app import make_app
        from veneer.serve.http.models import Catalogue
        from veneer.serve.http.server import Server
        from veneer.serve.start import EngineOptions, start_engine

        self.engine = start_engine(base, EngineOptions(disable_log_stats=False))
        catalogue = Catalogue(self.engine, ["base"], base, folder)
        listening = socket.create_server(("127.0.0.1", 0))
        self.server = Server(make_app(self.engine, catalogue))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listening]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.connection = http.client.HTTPConnection("127.0.0.1", listening.getsockname()[1])
        self.walls, self.loops = list[float](), list[float]()

    def ask(self, n: int, keep: bool) -> None:
        """Ask ``n`` times, and keep the seconds of each request and of the loop for all."""
        clock = time.pthread_getcpuclockid(self.thread.ident or 0)
        begun = time.clock_gettime(clock)
        for _ in range(n):
            start = time.perf_counter()
            self.request("POST", "/v1/completions", {"model": "adapter-0", "prompt": "w7 w9", "max_tokens": 1})
            self.walls += [time.perf_counter() - start] if keep else []
        self.loops += [(time.clock_gettime(clock) - begun) / n] if keep else []

    def listed(self) -> float:
        """The seconds of the loop for a list of all models."""
        clock = time.pthread_getcpuclockid(self.thread.ident or 0)
        begun = time.clock_gettime(clock)
        self.request("GET", "/v1/models")
        return time.clock_gettime(clock) - begun

    def require_right(self, base: str, folder: Path, name: str) -> None:
        """PartedError if an adapter scores a prompt otherwise than the model under it."""
        answer = json.loads(self.request("POST", "/v1/completions", scoring(name, prompt := prompt_of(1))))
        require_scores(f"{folder.name} adapters, {name}", base, prompt, scores_in(answer, prompt), str(folder / name))

    def request(self, method: str, path: str, body: object = None) -> bytes:
        self.connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
        answer = self.connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise SystemExit(f"{path}: {answer.status} {text[:500]!r}")
        return text

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()


def adapters(base: str, folder: Path, n: int) -> Path:
    """A folder with an adapter under so many names."""
    from veneer import LoraConfig, get_peft_model
    from veneer.store.source import load_model

    folder.mkdir()
    model = get_peft_model(load_model(base), LoraConfig(r=3, target_modules=["q_proj"]))
    stir(model).save_pretrained(folder / "adapter-0")
    files = ("adapter_config.json", "adapter_model.safetensors")
    for number in range(1, n):
        (folder / f"adapter-{number}").mkdir()
        for file in files:
            os.link(folder / "adapter-0" / file, folder / f"adapter-{number}" / file)
    return folder


def main() -> None:
    ends_as_interrupted()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--many", type=int, default=10_000)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    add_keep(parser)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        base = write_tiny(Path(scratch) / "base")
        sizes = (1, given.many)
        folders = {n: adapters(base, Path(scratch) / str(n), n) for n in sizes}
        sides = {n: Side(base, folder) for n, folder in folders.items()}
        try:
            for n, side in sides.items():
                side.require_right(base, folders[n], f"adapter-{n - 1}")
            keep(given.keep, compared(sides, given))
        finally:
            for side in sides.values():
                side.stop()


def compared(sides: dict[int, Side], given: argparse.Namespace) -> dict[str, float]:
    """Ask the sides in turns and print their times; return the figures that have goals."""
    for turn in range(given.rounds + 1):
        for n, side in sides.items():
            working(f"turn {turn} of {given.rounds}, {n} adapters")
            side.ask(given.requests, keep=turn > 0)
    done()
    print(f"{given.rounds} turns of {given.requests} requests, load {os.getloadavg()[0]:.1f}; medians in ms")
    rows = Rows([f"{n:,} adapters" for n in sides], ["request", "p99", "loop", "list (loop)"])
    for n, side in sides.items():
        walls = sorted(side.walls)
        cells = (statistics.median(walls), walls[int(0.99 * len(walls))], statistics.median(side.loops), side.listed())
        rows.add(f"{n:,} adapters", *(f"{1e3 * seconds:.2f}" for seconds in cells))
    one, many = sides.values()
    times = statistics.median(many.walls) / statistics.median(one.walls)
    loop_ms = 1e3 * statistics.median(many.loops)
    print(
        f"\nrequest with {given.many:,} beside 1: {times:.3f} (at most {MOST_TIMES}); "
        f"loop {loop_ms:.2f} ms (at most {MOST_LOOP_MS})"
    )
    return {"times": times, "loop_ms": loop_ms}


if __name__ == "__main__":
    main()
