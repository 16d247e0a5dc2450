"""Engine on its own thread, for an asyncio loop: it passes outputs to the loop once a step, and takes aborts."""

from __future__ import annotations

import asyncio
import functools
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from typing import Any, TypeVar

from veneer.errors import ServingError
from veneer.serve.engine import Engine
from veneer.serve.requests.checked import CheckedRequest
from veneer.serve.schedule.outputs import RequestOutput
from veneer.serve.schedule.sampling_params import RequestOutputKind

Result = TypeVar("Result")
_IDLE_SECONDS = 0.5  # how soon a stop is noticed while there is nothing to do
_BEHIND = 64  # outputs that wait for a reader, each on its own


class _News:
    """Outputs that a reader has not taken yet.

    If the reader falls behind and outputs are deltas, a new output is added to the last waiting one of its request.
    """

    def __init__(self, asked: Sequence[CheckedRequest]) -> None:
        self._are_deltas = all(each.params.output_kind is RequestOutputKind.DELTA for each in asked)
        self._outputs: list[RequestOutput] = []
        self._last: dict[str, RequestOutput] = {}
        self._there = asyncio.Event()

    def put(self, output: RequestOutput) -> None:
        if self._are_deltas and len(self._outputs) >= _BEHIND and output.request_id in self._last:
            self._last[output.request_id].add(output)
        else:
            self._outputs.append(output)
            self._last[output.request_id] = output
            self._there.set()

    async def take(self) -> list[RequestOutput]:
        """Wait for outputs and return all of them; return an empty list if `wake` was called."""
        await self._there.wait()
        self._there.clear()
        self._last.clear()
        outputs, self._outputs = self._outputs, []
        return outputs

    def wake(self) -> None:
        self._there.set()


class AsyncEngine:
    """Engine that steps while there is work. Call `start` and `stop` from the event loop that awaits the outputs.

    If `stop` is never called, the engine steps until the interpreter exits.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.failure: BaseException | None = None
        self._ended = False
        self._news: dict[str, _News] = {}
        self._stopping = threading.Event()
        self._end_thread: Callable[[], object] = lambda: None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._over: asyncio.Future[None] | None = None  # done when the engine has failed, or ends all

    @property
    def is_running(self) -> bool:
        """True from `start` on, until the engine fails or all requests are ended."""
        return self._loop is not None and self.failure is None and not self._ended

    def start(self) -> None:
        """Begin to step, for the running event loop. Raises ServingError on a second call: create another engine."""
        if self._loop is not None:
            raise ServingError("this AsyncEngine was started before, and each can be started only once: create another")
        self._loop = asyncio.get_running_loop()
        self._over = self._loop.create_future()
        self.engine.collector.start()
        thread = threading.Thread(target=self._steps, name="veneer engine", daemon=True)
        thread.start()
        self._end_thread = weakref.finalize(self, _end_thread, self._stopping, thread)

    def stop(self) -> None:
        """Stop stepping, and wait until the last step is done."""
        self._end_thread()
        self.engine.close()
        self.engine.collector.stop()

    def end_all(self) -> int:
        """End all requests with a ServingError at once, and all later ones likewise. Return the number of requests
        ended now.

        Call it from the event loop.
        """
        self._ended = True
        self._wake_all()
        return len(self._news)

    async def outputs(self, asked: Sequence[CheckedRequest]) -> AsyncGenerator[RequestOutput, None]:
        """Yield the outputs of requests one by one; otherwise the same as `batches`."""
        async with aclosing(self.batches(asked)) as batches:
            async for batch in batches:
                for output in batch:
                    yield output

    async def batches(self, asked: Sequence[CheckedRequest]) -> AsyncGenerator[list[RequestOutput], None]:
        """Yield the outputs of requests as they arrive, all available ones together.

        Unfinished requests are aborted when the generator is closed. Raises ServingError if the engine has failed, and
        after `end_all`.
        """
        news, left = _News(asked), {each.id for each in asked}
        self._news |= dict.fromkeys(left, news)
        try:
            for each in asked:
                self.engine.submit(each)
            while left:
                self._require_running()
                outputs = await news.take()
                self._require_running()
                left.difference_update([output.request_id for output in outputs if output.finished])
                yield outputs
        finally:
            self.abandon(left)
            for each in asked:
                self._news.pop(each.id, None)

    def abandon(self, request_ids: Collection[str]) -> None:
        """End requests whose outputs are no longer awaited."""
        for id in request_ids:
            self.engine.abort(id)

    async def settled(self, result: Future[Result]) -> Result:
        """Wait for a future that the engine completes, and return its result.

        Raises the future's error. Raises ServingError if the engine has failed, and after `end_all`.
        """
        coming = asyncio.wrap_future(result)
        over: list[asyncio.Future[Any]] = [] if self._over is None else [self._over]
        await asyncio.wait([coming, *over], return_when=asyncio.FIRST_COMPLETED)
        if not coming.done():
            coming.cancel()
            self._require_running()
        return coming.result()

    def require_whole(self) -> None:
        """Raise ServingError if the engine has failed.

        The message gives only the kind of the engine's error, because its text may concern another client.
        """
        if self.failure is not None:
            raise ServingError(
                f"the engine has broken down: {type(self.failure).__name__}. Its log has the rest"
            ) from self.failure

    def _require_running(self) -> None:
        self.require_whole()
        if self._ended:
            raise ServingError("the server is being stopped, and this answer ends here: ask again when it runs")

    def _steps(self) -> None:
        try:
            while not self._stopping.is_set():
                if self.engine.has_work or self.engine.wait(_IDLE_SECONDS):
                    self._tell(self.engine.step())
                else:
                    self.engine.collector.rest()
        except BaseException as error:
            self.failure = error
            self._call(self._wake_all)
            raise

    def _tell(self, outputs: Sequence[RequestOutput]) -> None:
        """Hand the outputs of a step to the event loop by one call, so that it wakes once a step and not once a
        request.
        """
        if outputs:
            self._call(functools.partial(self._deliver, outputs))

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            news = self._news.get(output.request_id)
            if news is not None:
                news.put(output)

    def _wake_all(self) -> None:
        """Wake all waiting readers, so that they see that the engine has failed or ends."""
        if self._over is not None and not self._over.done():
            self._over.set_result(None)
        for news in self._news.values():
            news.wake()

    def _call(self, tell: Callable[[], None]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(tell)


def _end_thread(stopping: threading.Event, thread: threading.Thread) -> None:
    stopping.set()
    thread.join()
