"""Outputs on an asyncio loop: what a reader gets that falls behind."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from veneer import LLM, SamplingParams
from veneer.serve.async_engine import AsyncEngine
from veneer.serve.schedule.outputs import RequestOutput
from veneer.serve.schedule.sampling_params import RequestOutputKind

SETTINGS = {"n": 2, "temperature": 1.0, "seed": 3, "max_tokens": 100, "ignore_eos": True, "logprobs": 1}


def test_a_reader_that_falls_behind_gets_more_at_once_and_loses_nothing(base_folder):
    llm = LLM(base_folder, disable_log_stats=False)
    engine, found = llm.engine, list[list[RequestOutput]]()

    async def read() -> None:
        running = AsyncEngine(engine)
        running.start()
        params = SamplingParams(**SETTINGS, output_kind=RequestOutputKind.DELTA)
        async with aclosing(running.batches([engine.asked(None, [7] * 5, params)])) as batches:
            async for batch in batches:
                found.append(batch)
                while engine._groups:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.05)
        await asyncio.to_thread(running.stop)

    asyncio.run(read())
    assert [len(batch) for batch in found[1:]] == [64]
    outputs = [output for batch in found for output in batch]
    [right] = llm.generate([{"prompt_token_ids": [7] * 5}], SamplingParams(**SETTINGS), use_tqdm=False)
    for index in (0, 1):
        parts = [part for output in outputs for part in output.outputs if part.index == index]
        assert "".join(part.text for part in parts) == right.outputs[index].text
        assert [id for part in parts for id in part.token_ids] == right.outputs[index].token_ids
        assert [p for part in parts for p in part.logprobs or []] == right.outputs[index].logprobs
        assert parts[-1].cumulative_logprob == right.outputs[index].cumulative_logprob
        assert parts[-1].finish_reason == "length"
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert outputs[-1].metrics is not None
    assert outputs[-1].metrics.num_generation_tokens == 200
