"""A server and its client in processes of their own, which answer loads that `bench/serving/serve_http.py` names.

    python -m bench.serving.serve_http_side veneer|vllm|held JOB.json

The sides veneer and vllm start a server of the job's ``model`` and ``adapters`` (of veneer all folders in ``folder``)
and answer as `serve_side.py` does, with ``texts`` for tokens: each prompt is a stream on a connection of its own.
vllm is run by the Python that has it. The side held prints its port, and then serves ``/held`` besides: the longest
time, in seconds, in which the loop took no turn since that was last asked.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from bench.serving.serve_side import ANSWER, Names, Prompts, resident_mb

_TICK = 0.001


def veneer(job: dict[str, Any], port: int) -> list[str]:
    """The command of veneer's server."""
    start = "from veneer.cli.app import main; main()"
    command = [sys.executable, "-c", start, "serve", job["model"], "--port", str(port), "--dtype"]
    return [*command, job["dtype"], *(("--adapters", job["folder"]) if job["adapters"] else ())]


def vllm(job: dict[str, Any], port: int) -> list[str]:
    """The command of vLLM's server, in the settings of `serve_side.vllm_options`."""
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    command = [str(Path(sys.executable).with_name("vllm")), "serve", job["model"], "--port", str(port)]
    command += ["--dtype", job["dtype"], "--max-model-len", "2048", "--no-enable-log-requests"]
    if job["adapters"]:
        n = str(len(job["adapters"]))
        command += ["--enable-lora", "--max-loras", n, "--max-cpu-loras", n, "--max-num-batched-tokens", "256"]
        command += ["--lora-modules", *(f"{name}={path}" for name, path in job["adapters"].items())]
    return command


async def texts(port: int, model: str, load: dict[str, Any]) -> list[str]:
    """The texts of all prompts, asked at once."""
    prompts: Prompts = load["prompts"]
    names: Names = load["adapters"]
    settings = {"temperature": 0.0, **load.get("settings", {}), "max_tokens": load["n_tokens"]}
    settings |= {"ignore_eos": True, "stream": True}
    bodies = [
        {"model": name or model, "prompt": ids, **settings} for ids, name in zip(prompts, names, strict=True)
    ]  # fmt: skip
    return list(await asyncio.gather(*(_text(port, body) for body in bodies)))


async def _text(port: int, body: dict[str, Any]) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body).encode()
    fields = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Connection: close"]
    head = "\r\n".join([*fields, f"Content-Length: {len(data)}", "", ""])
    writer.write(head.encode() + data)
    found = []
    async for line in reader:
        if line.startswith(b"data: {"):
            event = json.loads(line.removeprefix(b"data: "))
            found.append(event["choices"][0]["text"])
    writer.close()
    return "".join(found)


def served(side: str, job: dict[str, Any]) -> None:
    """Answer loads by a server of the side."""
    start, port = time.perf_counter(), free_port()
    server = subprocess.Popen(
        {"veneer": veneer, "vllm": vllm}[side](job, port), stdin=subprocess.DEVNULL, stdout=sys.stderr
    )
    try:
        answers_at(port, server)
        print(ANSWER + json.dumps({"seconds": time.perf_counter() - start}), flush=True)
        for line in sys.stdin:
            start = time.perf_counter()
            found = asyncio.run(texts(port, job["model"], json.loads(line)))
            seconds = time.perf_counter() - start
            print(ANSWER + json.dumps({"texts": found, "seconds": seconds, "resident_mb": resident_mb()}), flush=True)
    finally:
        server.terminate()


def held(job: dict[str, Any]) -> None:
    """Serve, and watch the loop."""
    from veneer.serve.http.app import make_app
    from veneer.serve.http.models import Catalogue
    from veneer.serve.http.server import Server
    from veneer.serve.start import EngineOptions, start_engine

    engine = start_engine(job["model"], EngineOptions(dtype=job["dtype"], disable_log_stats=False))
    app = make_app(engine, Catalogue(engine, [job["model"]], job["model"], Path(job["folder"])))
    worst = 0.0

    async def ticks() -> None:
        nonlocal worst
        while True:
            start = time.perf_counter()
            await asyncio.sleep(_TICK)
            worst = max(worst, time.perf_counter() - start - _TICK)

    async def longest() -> float:
        nonlocal worst
        found, worst = worst, 0.0
        return found

    app.get("/held")(longest)
    port = free_port()

    async def run() -> None:
        watching = asyncio.create_task(ticks())
        await Server(app, host="127.0.0.1", port=port).serve()
        watching.cancel()

    print(ANSWER + json.dumps({"port": port, "seconds": 0.0}), flush=True)
    asyncio.run(run())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def answers_at(port: int, server: subprocess.Popen[bytes]) -> None:
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
            return
        except OSError:
            if server.poll() is not None:
                raise SystemExit(f"the server ended with code {server.returncode}") from None
            time.sleep(0.1)


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[2]).read_text())
    held(given) if sys.argv[1] == "held" else served(sys.argv[1], given)
