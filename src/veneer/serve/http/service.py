"""Engine, models and limits that all routes share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

from veneer.errors import ConfigError, FormatError
from veneer.serve.engine import Engine
from veneer.serve.http.errors import RefusedError, TooManyRequestsError
from veneer.serve.http.key_file import Keys
from veneer.serve.http.lanes import Lanes
from veneer.serve.http.models import Catalogue
from veneer.serve.http.protocol import ChatBody, CompletionBody, Named
from veneer.serve.http.quota import Quotas
from veneer.serve.http.request_record import RecordedEngine, current_record
from veneer.serve.http.server_limits import ServerLimits
from veneer.serve.requests.calls import Calls
from veneer.serve.requests.checked import CheckedRequest
from veneer.serve.requests.prompts import PromptReader
from veneer.serve.sandbox.sandbox import Sandbox
from veneer.serve.schedule.in_flight import InFlight
from veneer.serve.schedule.lora_request import LoRARequest
from veneer.serve.schedule.sampling_params import SamplingParams

Result = TypeVar("Result")


class Service:
    """Engine ``running``, with the models and limits that all routes share. It checks, counts and submits requests.

    The engine steps on its own thread.
    """

    def __init__(self, engine: Engine, catalogue: Catalogue, limits: ServerLimits, keys: Keys | None = None) -> None:
        self.engine, self.catalogue, self.limits, self.running = engine, catalogue, limits, RecordedEngine(engine)
        self.keys, self._quotas, self.lanes = keys, Quotas(), Lanes()
        self.sandboxes = Sandbox("templates"), Sandbox("grammars")
        self._choices = InFlight()  # of requests from their admission until their answers end

    async def read(self, body: object, work: Callable[[], Result]) -> Result:
        """Run work that reads a body on a thread of the body's lane. Raises as `Lane.run` does."""
        return await self.lanes.of(body).run(work)

    @contextmanager
    def admitted(self, n: int) -> Iterator[None]:
        """Count ``n`` choices of the server and of the caller's key as in flight while the context is open.

        Raises RefusedError if one request may never have so many, and TooManyRequestsError if too many are in flight.
        """
        most, taken = self.limits, self._choices.n
        if n > most.choices:
            raise RefusedError(
                f"{n} choices (prompts × n) are asked for, and this server takes {most.choices} in a request: ask for "
                "fewer at once, or raise its --max-choices",
                "n",
            )
        if taken + n > most.in_flight:
            seconds = self._choices.refused(n, most.in_flight)
            self.engine.backlog.note_refusal()
            raise TooManyRequestsError(
                f"{taken} choices wait or are being answered, and this server takes {most.in_flight} "
                f"(--max-in-flight): ask again in {seconds:.0f} s",
                retry_seconds=seconds,
            )
        with self._quotas.choices(self.catalogue.caller, n), self._choices.counted(n):
            yield

    def tokens(self, asked: Sequence[CheckedRequest]) -> AbstractContextManager[None]:
        """Return a context in which the tokens of prompts, and of answers at their largest length, count as in flight.

        Raises as `admitted` does.
        """
        return self._quotas.tokens(self.catalogue.caller, sum(each.most_tokens for each in asked))

    def require_trusted(self, template: str | None) -> None:
        """Raise RefusedError for a request's own chat template, unless the server trusts such templates."""
        if template is not None and not self.limits.trust_request_templates:
            raise RefusedError(
                "chat_template is refused: a template is a program, and this server runs no programs of its clients. "
                "Leave it out, or start the server with --trust-request-templates",
                "chat_template",
            )

    def ask(self, body: CompletionBody | ChatBody) -> tuple[list[CheckedRequest], Calls | None]:
        """Return the checked requests of a body, and the tool calls that answers may have; None if they may have none.

        Call it off the event loop: templates, tokens and grammars take time. Raises VeneerError for any error that can
        be found before a request runs.
        """
        params = body.to_params(self.engine.settings.generation_defaults)
        adapter = self.adapter(body)
        reader = self.engine.readers.of(adapter)
        calls = body.calls(reader)
        if calls is not None:
            params = calls.constrained(params)
        return self.asked(body.read(reader, calls), params, adapter, body.cache_salt), calls

    def asked(
        self,
        prompts: Sequence[tuple[str | None, list[int]]],
        params: SamplingParams,
        adapter: LoRARequest | None,
        cache_salt: str | None,
    ) -> list[CheckedRequest]:
        """Return checked requests of the caller's key for prompts, each as text and ids. Raises VeneerError."""
        key = self.catalogue.caller
        try:
            found = [
                self.engine.asked(text, ids, params, adapter, cache_salt=cache_salt, client=key.name, weight=key.weight)
                for text, ids in prompts
            ]
        except FormatError:
            if adapter is not None and not adapter.parts:
                self.catalogue.find(adapter.name)  # its files were there when it was found, and may have gone since
            raise
        self.engine.backlog.require_room(found)  # while there is a status to say it with
        return found

    def reader(self, body: Named) -> PromptReader:
        """Return the reader of prompts for the model that a body names. It reads files: call it off the event loop.

        Raises as `adapter` does.
        """
        return self.engine.readers.of(self.adapter(body))

    def adapter(self, body: Named) -> LoRARequest | None:
        """Return the adapter that a body names; None for the base.

        Raises ModelNotFoundError, and ConfigError if a mix is combined with an adapter's name.
        """
        named = self.catalogue.find(body.model)
        current_record().model = body.model or self.catalogue.base
        if body.adapter is None:
            return named
        if named is not None:
            raise ConfigError(
                f"model={body.model!r} is an adapter, but the field adapter gives a mix: name the adapter in the mix, "
                "with a weight"
            )
        return self.catalogue.mix(body.adapter)
