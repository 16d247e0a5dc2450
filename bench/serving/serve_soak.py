"""A server under everything at once: many adapters of mixed methods, clients that leave, files that change, bad bodies.

    python -m bench.serving.serve_soak [--minutes 30] [--adapters 60] [--clients 24] [--disconnects 1000]
        [--overload-minutes 5] [--tiny]

``veneer serve`` has room for a third of the adapters. Clients ask for them by Zipf's law: chats and completions,
streamed and whole, greedy and drawn, with and without a schema; one in ten leaves in the middle, one in twenty sends
a bad body. An operator loads, replaces, unloads and deletes adapters in use. A judge asks the same greedy questions
all the time: each answer must be that of the beginning, when adapters must have answered otherwise than the base.

Then ``--disconnects`` clients leave, and ten times as many choices as may be in flight are asked for during
``--overload-minutes``. For each 429 it is counted whether the time that it tells was right within a factor of two.

Printed each minute, and kept: resident memory, open files, answers, and statuses by kind. The end fails if an answer
changed, if a body got a status of 500 and above, if a stream failed or did not end, if memory grew, or if a page of
keys and values is held by nobody.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Container
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx  # comes with openai
import torch
from transformers import AutoModelForCausalLM

from bench.lora_step import adapted_by
from bench.report import Rows, add_keep, ends_as_interrupted, keep, working
from bench.same import require_heard, stir
from bench.serving.asked import prompt_of
from bench.serving.likeliest import require_scores, scores_in, scoring
from bench.serving.serve_http_side import answers_at, free_port
from bench.tiny_model import write_tiny
from bench.training.methods import MEMBERS, METHODS
from veneer.store.source import resolve

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
BAD: tuple[dict[str, Any], ...] = (
    {"messages": []}, {"messages": [{"role": "user", "content": 3}]}, {"messages": "hello"}, {"prompt": "x"},
    {"messages": [{"role": "user", "content": "x"}], "temperature": -1},
    {"messages": [{"role": "user", "content": "x"}], "n": 10**6},
    {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": -1},
    {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema"}},
)  # fmt: skip
PLACES, N = 48, 16  # choices in flight of the server, and of one request of the overload
HELD = re.compile(r"^veneer:kv_cache_usage_perc\{.*\} (\S+)$", re.MULTILINE)
RESIDENT = re.compile(r"^process_resident_memory_bytes (\S+)$", re.MULTILINE)
FILES = re.compile(r"^process_open_fds (\S+)$", re.MULTILINE)
FLAT = 1.02  # resident memory of the last third of the minutes over that of the second: caches are full by then
Body = dict[str, Any]


@dataclass
class Soak:
    """One run: its client, its adapters, and everything that was seen."""

    client: httpx.AsyncClient
    folder: Path
    model: str
    names: list[str]
    stable: list[str]  # that the operator leaves alone
    seen: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    until: float = 0.0
    draw: random.Random = field(default_factory=lambda: random.Random(0))

    @property
    def going(self) -> bool:
        return time.monotonic() < self.until

    async def send(self, route: str, body: Body, expected: Container[int] = (200,)) -> httpx.Response | None:
        """The answer; None if it could not be had. A status of 500 and above is wrong, whatever was sent."""
        try:
            answer = await self.client.post(route, json=body)
        except httpx.HTTPError as error:
            self.wrong.append(f"{route}: {error!r}")
            return None
        self.seen[str(answer.status_code)] += 1
        unfinished = answer.status_code == 200 and body.get("stream") and not answer.text.endswith("data: [DONE]\n\n")
        failed = answer.status_code == 200 and body.get("stream") and '"error":' in answer.text
        allowed = answer.status_code in expected or answer.status_code == 429
        if not allowed or answer.status_code >= 500 or unfinished or failed:
            self.wrong.append(f"{route} {json.dumps(body)[:200]}: {answer.status_code} {answer.text[-200:]}")
        return answer


def main() -> None:
    args = arguments()
    ends_as_interrupted()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        args.place = write_tiny(place / "model") if args.tiny else str(resolve(args.model))
        if args.tiny:
            (place / "model" / "chat_template.jinja").write_text(
                "{% for m in messages %}{{ m['content'] }}{% endfor %}"
            )
        folder = place / "adapters"
        write_adapters(args, folder)
        port = free_port()
        command = [sys.executable, "-c", "from veneer.cli.app import main; main()"]
        command += ["serve", args.place, "--served-model-name", "base", "--adapters", str(folder), "--port", str(port)]
        command += ["--dtype", "bfloat16", "--max-loras", str(max(args.adapters // 3, 2)), "--kv-gib", "1"]
        command += ["--max-in-flight", str(PLACES), "--max-choices", "16", "--adapter-root", str(place)]
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
        try:
            answers_at(port, server)
            figures = asyncio.run(soak(args, folder, f"http://127.0.0.1:{port}"))
        finally:
            server.terminate()
            server.wait()
    keep(args.keep, figures)
    if figures["wrong"]:
        raise SystemExit(f"{figures['wrong']:.0f} things went wrong")
    if figures["growth"] > FLAT:
        raise SystemExit("memory grew: run it for longer, or look for what keeps it")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--adapters", type=int, default=60)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--disconnects", type=int, default=1000)
    parser.add_argument("--overload-minutes", type=float, default=5)
    add_keep(parser)
    return parser.parse_args()


def write_adapters(args: argparse.Namespace, folder: Path) -> None:
    """Adapters of eight methods, of LoRA in four ranks; nothing is neutral."""
    base = AutoModelForCausalLM.from_pretrained(args.place, dtype=torch.bfloat16)
    for number, method in zip(range(args.adapters), itertools.cycle(MEMBERS), strict=False):
        working(f"{number} adapters of {args.adapters} are written")
        kind, settings = METHODS[method]
        if "r" in settings and method != "vera":
            settings = settings | {"r": (4, 8, 11, 16)[number // len(MEMBERS) % 4]}
        torch.manual_seed(number)
        model = adapted_by("veneer", base, kind, settings)
        stir(model).save_pretrained(folder / f"a{number:03}-{method}")
        base = model.unload()


async def soak(args: argparse.Namespace, folder: Path, url: str) -> dict[str, float]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    names = sorted(each.name for each in folder.iterdir())
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        run = Soak(client, folder, "base", names, names[: len(names) // 2])
        at_first = await heard_at_first(run)
        await require_right(run, args.place)
        memory = await mixed(args, run, at_first)
        await disconnects(run, args.disconnects)
        right = await overload(args, run)
        run.until = time.monotonic() + 1
        await judge(run, at_first)
        held = await idle(run)
    if held:
        run.wrong.append(f"{held} of the pages are held by nobody")
    for each in run.wrong[:20]:
        print("wrong:", each)
    third = max(len(memory) // 3, 1)
    growth = statistics.median(memory[-third:]) / statistics.median(memory[third : 2 * third] or memory)
    print(f"memory, last third over the second: {growth:.3f} (goal at most {FLAT})")
    return {"wrong": float(len(run.wrong)), "growth": growth, "right": right, "answers": float(run.seen["200"])}


async def mixed(args: argparse.Namespace, run: Soak, at_first: dict[str, str]) -> list[float]:
    """Resident megabytes, each minute."""
    run.until = time.monotonic() + 60 * args.minutes
    table = Rows(["minute 00"], ["resident MB", "open files", "answers", "statuses"])
    memory: list[float] = []

    async def report() -> None:
        for minute in itertools.count(1):
            await asyncio.sleep(min(60, 60 * args.minutes / 3))
            if not run.going:
                return
            text = (await run.client.get("/metrics")).text
            memory.append(found(RESIDENT, text) / 2**20)
            statuses = " ".join(f"{status}: {n}" for status, n in sorted(run.seen.items()))
            cells = f"{memory[-1]:.0f}", f"{found(FILES, text):.0f}", f"{run.seen['200']}", statuses
            table.add(f"minute {minute:02}", *cells)

    clients = [asker(run, number, not args.tiny) for number in range(args.clients)]
    await asyncio.gather(report(), operator(run), judge(run, at_first), *clients)
    return memory or [1.0]


async def asker(run: Soak, number: int, schemas: bool) -> None:
    draw = random.Random(number)
    weights = [1 / (rank + 1) for rank in range(len(run.names))]
    while run.going:
        name = draw.choices(run.names, weights)[0]
        chance = draw.random()
        if chance < 0.05:
            await run.send("/v1/chat/completions", {"model": "base", **draw.choice(BAD)}, range(400, 500))
        elif chance < 0.15:
            await leave(run, body_of(draw, name), draw.random())
        else:
            body = body_of(draw, name)
            if schemas and draw.random() < 0.1:
                body["response_format"] = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
            # the operator may have taken the name away, which is 404
            answer = await run.send("/v1/chat/completions", body, (200, 404))
            if answer is not None and answer.status_code == 429:
                await asyncio.sleep(float(answer.headers["retry-after"]))


def body_of(draw: random.Random, name: str) -> Body:
    text = " ".join(f"{draw.randrange(10**6)}" for _ in range(draw.choice((3, 30, 120))))
    body: Body = {"model": name, "messages": [{"role": "user", "content": text}], "max_tokens": draw.randrange(4, 40)}
    if draw.random() < 0.5:
        body |= {"stream": True}
    if draw.random() < 0.7:
        body |= {"temperature": 0.8, "top_p": 0.9, "seed": draw.randrange(1000), "n": draw.choice((1, 1, 1, 3))}
    return body


async def leave(run: Soak, body: Body, share: float) -> None:
    """Ask for a stream, and close the connection within a second."""
    with suppress(TimeoutError, httpx.HTTPError):
        async with (
            asyncio.timeout(share),
            run.client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as answer,
        ):
            run.seen["left"] += 1
            if answer.status_code not in (200, 404, 429):
                run.wrong.append(f"{json.dumps(body)[:200]}: {answer.status_code}")
            async for _ in answer.aiter_lines():
                pass


async def heard_at_first(run: Soak) -> dict[str, str]:
    """The judge's answers by name. PartedError if adapters answer as the base does: it would not miss them."""
    names = run.stable[:6]
    found = {name: await judged(run, name, name) for name in names}
    require_heard("the judge's questions", found.values(), [await judged(run, "base", name) for name in names])
    return {"base": await judged(run, "base", "base"), **found}


async def require_right(run: Soak, place: str) -> None:
    """PartedError if the judge's adapters score a prompt otherwise than the model under them."""
    for name in run.stable[:6]:
        answer = await run.send("/v1/completions", scoring(name, prompt := prompt_of(1)))
        scores = [] if answer is None else scores_in(answer.json(), prompt)
        require_scores(name, place, prompt, scores, str(run.folder / name))


async def judged(run: Soak, name: str, asked: str) -> str:
    """Return the answer of ``name`` to the question to ``asked``."""
    body = {"model": name, "prompt": f"{asked} says that", "max_tokens": 12, "temperature": 0, "logprobs": 1}
    while True:
        answer = await run.send("/v1/completions", body)
        if answer is None or answer.status_code != 429:
            return "" if answer is None else json.dumps(answer.json()["choices"])
        await asyncio.sleep(float(answer.headers["retry-after"]))


async def judge(run: Soak, at_first: dict[str, str]) -> None:
    while run.going:
        for name, expected in at_first.items():
            if (answer := await judged(run, name, name)) != expected:
                run.wrong.append(f"{name} answers otherwise: {answer[:300]} and not {expected[:300]}")
            run.seen["judged"] += 1
        await asyncio.sleep(2)


async def operator(run: Soak) -> None:
    """Unload, delete, copy anew and load again what others are just asking for."""
    away = run.folder.parent / "away"
    away.mkdir()
    volatile = [name for name in run.names if name not in run.stable]
    while run.going:
        name = run.draw.choice(volatile)
        way = run.draw.randrange(3)
        if way == 0:
            await run.send("/v1/unload_lora_adapter", {"lora_name": name}, (200, 404))
            path = str(run.folder / name)
            await run.send("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path}, (200, 404))
        elif way == 1:
            shutil.move(run.folder / name, away / name)
            await asyncio.sleep(1)
            shutil.move(away / name, run.folder / name)
        else:
            shutil.copytree(run.folder / name, away / name)
            shutil.rmtree(run.folder / name)
            shutil.move(away / name, run.folder / name)
        run.seen["changes"] += 1
        await asyncio.sleep(1)


async def disconnects(run: Soak, n: int) -> None:
    working(f"{n} clients leave")
    for _ in range(0, n, 40):
        await asyncio.gather(*(leave(run, body_of(run.draw, "base"), 0.3 * run.draw.random()) for _ in range(40)))


async def overload(args: argparse.Namespace, run: Soak) -> float:
    """Share of the refusals whose time was right within a factor of two, until a request of as many choices ended.

    A told time is at least a second, so an earlier end counts as one second.
    """
    working(f"{10 * PLACES} choices are asked for at once")
    run.until = time.monotonic() + 60 * args.overload_minutes
    ended: list[float] = []
    told: list[tuple[float, float]] = []  # when, and the time that was said

    async def one(number: int) -> None:
        draw = random.Random(number)
        while run.going:
            body = body_of(draw, "base") | {"n": N, "temperature": 0.8}
            while run.going and (answer := await run.send("/v1/chat/completions", body)) is not None:
                if answer.status_code != 429:
                    ended.append(time.monotonic())
                    break
                told.append((time.monotonic(), float(answer.headers["retry-after"])))
                await asyncio.sleep(told[-1][1])

    await asyncio.gather(*map(one, range(10 * PLACES // N)))
    known = [(said, min(when for when in ended if when > at) - at) for at, said in told if ended and at < ended[-1]]
    right = sum(0.5 <= said / max(after, 1.0) <= 2 for said, after in known)
    print(f"{len(told)} refusals, {N * len(ended)} choices; of {len(known)} times told {right} were right within 2")
    print("said, and after:", [(said, round(after, 1)) for said, after in known[:: max(len(known) // 12, 1)]])
    return right / len(known) if known else 1.0


async def idle(run: Soak) -> float:
    """Share of the pages that are held once everybody has gone."""
    for _ in range(60):
        await asyncio.sleep(0.5)
        held = found(HELD, (await run.client.get("/metrics")).text)
        if not held:
            return 0.0
    return held


def found(pattern: re.Pattern[str], text: str) -> float:
    match = pattern.search(text)
    if match is None:
        raise SystemExit(f"/metrics has no line like {pattern.pattern}")
    return float(match[1])


if __name__ == "__main__":
    main()
