"""A program that ends with engines in use: it leaves at once and says nothing."""

import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any, cast

from patience import PATIENCE
from veneer.serve.async_engine import AsyncEngine
from veneer.serve.gc_freeze import GcFreeze

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import asyncio, threading, time, torch
from contextlib import suppress
torch.set_num_threads(1)
from tests.unit.serve.conftest import byte_tokenizer, make_model
from veneer import LLM, SamplingParams
from veneer.errors import ServingError
from veneer.serve.async_engine import AsyncEngine

async def main(running):
    running.start()
    with suppress(ServingError):
        running.start()
        print("a second thread steps")
    asked = [llm.engine.asked(None, [7] * 11, SamplingParams(max_tokens=99, ignore_eos=True)) for _ in range(3)]
    async for output in running.outputs(asked):
        return

llm, other = (LLM(make_model(), tokenizer=byte_tokenizer()) for _ in range(2))
asyncio.run(main(AsyncEngine(llm.engine)))
threading.Thread(target=lambda held: time.sleep(9999), args=(other,), daemon=True).start()
print("the end")
"""


def test_a_program_ends_without_a_word():
    """One engine steps on its thread, which nobody stops; another is held by a thread that nobody ends."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "the end\n", "")


def test_an_engine_that_was_never_started_goes_with_its_last_holder():
    class Engine:
        closed, collector = False, GcFreeze()

        def close(self) -> None:
            self.closed = True

    engine = Engine()
    running = AsyncEngine(cast(Any, engine))
    running.stop()
    assert engine.closed
    told = weakref.ref(running)
    del running
    assert told() is None
