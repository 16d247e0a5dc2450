"""Engine on its own thread, for an asyncio loop: it passes outputs to the loop once a step, and takes aborts."""

from __future__ import annotations

import asyncio
import functools
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence

from veneer.errors import ServingError
from veneer.serve.asked import Asked
from veneer.serve.engine import Engine
from veneer.serve.outputs import RequestOutput

_Outputs = asyncio.Queue[RequestOutput]
_IDLE_SECONDS = 0.5  # how soon a stop is noticed while there is nothing to do


class AsyncEngine:
    """Engine that steps while there is work. Call `start` and `stop` from the loop that awaits the outputs.

    An engine that is never stopped steps until the interpreter exits, and no longer.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.failure: BaseException | None = None
        self._ended = False
        self._queues: dict[str, _Outputs] = {}
        self._stopping = threading.Event()
        self._end_thread: Callable[[], object] = lambda: None
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin to step, for the running loop. Raises ServingError on a second call: make another engine."""
        if self._loop is not None:
            raise ServingError("this engine was started before, and one is started once: make another AsyncEngine")
        self._loop = asyncio.get_running_loop()
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
        """End all requests, and all later ones, with a ServingError at once; return their number.

        Call it from the loop.
        """
        self._ended = True
        self._wake_all()
        return len(self._queues)

    async def outputs(self, asked: Sequence[Asked]) -> AsyncGenerator[RequestOutput, None]:
        """Yield the outputs of requests as they come. Unfinished requests are aborted when the generator is closed.

        Raises ServingError if the engine has failed, and after `end_all`.
        """
        queue: _Outputs = asyncio.Queue()
        left = {each.id for each in asked}
        self._queues |= dict.fromkeys(left, queue)
        try:
            for each in asked:
                self.engine.submit(each)
            while left:
                self._require_whole()
                output = await queue.get()
                self._require_whole()
                if output.finished:
                    left.discard(output.request_id)
                yield output
        finally:
            for id in left:
                self.engine.abort(id)
            for each in asked:
                self._queues.pop(each.id, None)

    def _require_whole(self) -> None:
        if self.failure is not None:
            raise ServingError(f"the engine has broken down: {self.failure!r}") from self.failure
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
        """One wake-up of the loop a step, however many requests have news."""
        if outputs:
            self._call(functools.partial(self._deliver, outputs))

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            queue = self._queues.get(output.request_id)
            if queue is not None:
                queue.put_nowait(output)

    def _wake_all(self) -> None:
        """Let everybody who waits see that the engine has failed, or ends."""
        for queue in self._queues.values():
            queue.put_nowait(RequestOutput("", None, [], None))

    def _call(self, tell: Callable[[], None]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(tell)


def _end_thread(stopping: threading.Event, thread: threading.Thread) -> None:
    stopping.set()
    thread.join()
