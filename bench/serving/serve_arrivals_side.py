"""One engine in a process of its own, which streams answers to requests that arrive one by one.

    python -m bench.serving.serve_arrivals_side SIDE JOB.json

Any Python that has the engine runs it; `bench/serving/serve_arrivals.py` says what the job is. Each line of standard
input is a load: for each request ``prompts`` (token ids), ``adapters`` (a name or null), ``n_tokens`` and ``arrivals``
(seconds). Each is answered with one line of JSON behind `ANSWER`: for each request its ``tokens``, and when each of
them came, ``times``. An engine is asked as its own server asks it, from an asyncio loop.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from bench.serving.serve_side import ANSWER, resident_mb, vllm_options

Stream = Callable[[list[int], "str | None", int], AsyncIterator[Sequence[int]]]


async def veneer(job: dict[str, Any]) -> Stream:
    import veneer as library
    from veneer.serve.async_engine import AsyncEngine
    from veneer.serve.schedule.sampling_params import RequestOutputKind

    engine = library.LLM(job["model"], dtype=job["dtype"], enable_prefix_caching=False).engine
    adapters = lora_requests(library.LoRARequest, job)
    steps = AsyncEngine(engine)
    steps.start()

    async def stream(prompt: list[int], adapter: str | None, n_tokens: int) -> AsyncIterator[Sequence[int]]:
        params = library.SamplingParams(
            temperature=0.0, max_tokens=n_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        asked = engine.asked(None, prompt, params, adapters[adapter])
        async for output in steps.outputs([asked]):
            yield output.outputs[0].token_ids

    return stream


async def vllm(job: dict[str, Any]) -> Stream:
    options = vllm_options(job)  # its environment has to be there when vLLM is imported
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=job["model"], dtype=job["dtype"], seed=0, **options))
    adapters = lora_requests(LoRARequest, job)
    ids = itertools.count()

    async def stream(prompt: list[int], adapter: str | None, n_tokens: int) -> AsyncIterator[Sequence[int]]:
        params = SamplingParams(
            temperature=0.0, max_tokens=n_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        asked = {"prompt_token_ids": prompt}
        async for output in engine.generate(asked, params, str(next(ids)), lora_request=adapters[adapter]):
            yield output.outputs[0].token_ids

    return stream


def lora_requests(make: Callable[[str, int, str], Any], job: dict[str, Any]) -> dict[str | None, Any]:
    """By name; None, the base, has none."""
    return {None: None} | {
        name: make(name, number, path) for number, (name, path) in enumerate(job["adapters"].items(), start=1)
    }


async def answer(stream: Stream, load: dict[str, Any]) -> dict[str, Any]:
    """Ask for each request when it arrives, and take down when its tokens come."""
    start = time.perf_counter()

    async def one(prompt: list[int], adapter: str | None, n_tokens: int, arrival: float) -> tuple[list[int], Any]:
        await asyncio.sleep(arrival)
        tokens, times = list[int](), list[float]()
        async for new in stream(prompt, adapter, n_tokens):
            tokens += new
            times += [time.perf_counter() - start] * len(new)
        return tokens, times

    columns = (load["prompts"], load["adapters"], load["n_tokens"], load["arrivals"])
    found = await asyncio.gather(*(one(*request) for request in zip(*columns, strict=True)))
    tokens, times = zip(*found, strict=True)
    return {"tokens": tokens, "times": times, "resident_mb": resident_mb()}


def main() -> None:
    start = time.perf_counter()
    with asyncio.Runner() as loop:
        stream = loop.run({"veneer": veneer, "vllm": vllm}[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text())))
        print(ANSWER + json.dumps({"seconds": time.perf_counter() - start}), flush=True)
        for line in sys.stdin:
            print(ANSWER + json.dumps(loop.run(answer(stream, json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
