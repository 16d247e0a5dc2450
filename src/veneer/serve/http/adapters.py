"""Routes that load, unload, pin and list adapters; loading and unloading have vLLM's fields and answers."""

from __future__ import annotations

import asyncio
import bisect
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Literal, TypeVar

from fastapi import FastAPI, Query
from fastapi.responses import PlainTextResponse, Response
from pydantic import BaseModel, model_validator
from pydantic_core import PydanticCustomError

from veneer.contract.source import hub_folder
from veneer.errors import CompositionError, FormatError, ServingError, VeneerError
from veneer.serve.async_engine import AsyncEngine
from veneer.serve.http.documented import documented
from veneer.serve.http.errors import ConflictError, ForbiddenError, ModelNotFoundError, RefusedError
from veneer.serve.http.models import MIX, Catalogue, Loaded
from veneer.serve.http.protocol import Few, Strict
from veneer.serve.http.request_record import current_record
from veneer.serve.http.roots import Roots
from veneer.serve.schedule.adapter_version import AdapterUsage
from veneer.serve.schedule.lora_request import LoRARequest

_LONGEST_NAME = 256
_DOWNLOADS = 2  # at once
_LOOKS = 2  # at files of adapters at once: others wait for the same threads
_MOST_LISTED = 1000
_MOST_INCOMPLETE = 100
Result = TypeVar("Result")


class LoadBody(Strict):
    """Body of ``/v1/load_lora_adapter``: a folder, an id on the hub, or a mix (adapter names to weights).

    ``load_inplace``: replace an adapter that already has the name; requests in flight keep the old one.
    """

    lora_name: str
    lora_path: str | None = None
    adapter: Few[str] | None = None
    load_inplace: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> LoadBody:
        if (self.lora_path is None) == (self.adapter is None):
            raise PydanticCustomError("one_of", "give either lora_path or adapter")
        return self


class UnloadBody(Strict):
    """Body of ``/v1/unload_lora_adapter``. ``lora_int_id`` is accepted and ignored."""

    lora_name: str
    lora_int_id: int | None = None


class AdapterCard(BaseModel):
    """Adapter: its source, method, largest rank (null without low-rank parts), size and use.

    ``requests`` counts the requests for the adapter's current version. ``hits`` counts those of them that found the
    version loaded. ``error``: the reason why its files cannot be read. ``warning``: a note that it may have been
    trained on another base.
    """

    id: str
    object: Literal["adapter"] = "adapter"
    source: str
    root: str
    method: str | None = None
    rank: int | None = None
    bytes: int | None = None
    residency: str = "absent"
    pinned: bool = False
    requests: int = 0
    hits: int = 0
    error: str | None = None
    warning: str | None = None


class AdapterList(BaseModel):
    """Adapters in the order of their names; ``has_more`` is true if more adapters follow.

    ``incomplete``: up to 100 folders that lack a file of an adapter: folder name to reason.
    """

    object: Literal["list"] = "list"
    data: list[AdapterCard]
    has_more: bool
    incomplete: dict[str, str] = {}


class AdapterRoutes:
    """Routes for the adapters of a catalogue.

    ``running`` is the engine that uses the adapters. They are loaded only from places that ``roots`` allows.
    """

    def __init__(self, running: AsyncEngine, catalogue: Catalogue, roots: Roots) -> None:
        self._running, self._engine, self._catalogue, self._roots = running, running.engine, catalogue, roots
        self._changing: set[str] = set()  # names
        self._downloads, self._looks = asyncio.Semaphore(_DOWNLOADS), asyncio.Semaphore(_LOOKS)

    def add_to(self, app: FastAPI) -> None:
        """Add the routes to an application."""
        app.post("/v1/load_lora_adapter", **documented(text=True))(self.load)
        app.post("/v1/unload_lora_adapter", **documented(text=True))(self.unload)
        app.get("/v1/adapters", **documented(AdapterList))(self.listed)
        app.post("/v1/adapters/{name:path}/pin", **documented(AdapterCard))(self.pin)
        app.post("/v1/adapters/{name:path}/unpin", **documented(AdapterCard))(self.unpin)
        app.get("/v1/adapters/{name:path}", **documented(AdapterCard, body=False))(self.one)

    async def load(self, body: LoadBody) -> PlainTextResponse:
        """Read an adapter, and serve it under a name once it is loaded."""
        name = body.lora_name
        with self._changes(name):
            await asyncio.to_thread(self._require_free, body)
            loaded = await self._place(body)
            request = await asyncio.to_thread(self._request, name, loaded)
            warning = (await asyncio.to_thread(self._engine.versions.of, request)).warning
            await self._running.settled(await asyncio.to_thread(self._engine.preload, request))
            await asyncio.to_thread(self._catalogue.load, name, loaded)
        told = f" Warning: {warning}." if warning else ""
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.{told}")

    async def unload(self, body: UnloadBody) -> PlainTextResponse:
        """Drop the name of an adapter; its memory is freed when no request needs it."""
        name = body.lora_name
        with self._changes(name):
            await asyncio.to_thread(self._catalogue.unload, name)
            current_record().model = name
            await self._running.settled(self._engine.between_steps(lambda: None))  # behind the message that forgets it
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def listed(self, limit: Annotated[int, Query(ge=1, le=_MOST_LISTED)] = 100, after: str = "") -> Response:
        """Return the adapters whose names follow ``after``, in alphabetical order: size, method, rank and use."""
        names = await asyncio.to_thread(self._catalogue.names)
        first = bisect.bisect_right(names, after)
        told = await self._told(names[first : first + limit])
        incomplete = dict(itertools.islice(self._catalogue.incomplete().items(), _MOST_INCOMPLETE))
        return _json(AdapterList(data=told, has_more=first + limit < len(names), incomplete=incomplete))

    async def one(self, name: str) -> Response:
        """Return an adapter."""
        await asyncio.to_thread(self._adapter, name)
        return _json((await self._told([name]))[0])

    async def pin(self, name: str) -> Response:
        """Load an adapter and keep it loaded. If its files are replaced, the next request pins the new version."""
        adapter = await asyncio.to_thread(self._adapter, name)
        await self._running.settled(await asyncio.to_thread(partial(self._engine.preload, adapter, pins=True)))
        return _json((await self._told([name]))[0])

    async def unpin(self, name: str) -> Response:
        """Let an adapter be evicted again."""
        await asyncio.to_thread(self._adapter, name)
        await self._running.settled(self._engine.between_steps(partial(self._unpin, name)))
        return _json((await self._told([name]))[0])

    def _unpin(self, name: str) -> None:
        if self._engine.pool.state(name) is not None:  # otherwise it was never loaded
            self._engine.pool.unpin(name)

    @contextmanager
    def _changes(self, name: str) -> Iterator[None]:
        others = name in self._changing
        if others and self._catalogue.caller.sees(name):  # what it does not see is refused in other words
            raise ConflictError(
                f"the LoRA adapter {name[:_LONGEST_NAME]!r} is being loaded or unloaded: ask again when that has ended",
                "lora_name",
            )
        self._changing.add(name)
        try:
            yield
        finally:
            if not others:
                self._changing.discard(name)

    def _adapter(self, name: str) -> LoRARequest:
        found = self._catalogue.find(name)
        if found is None:
            raise ModelNotFoundError(f"{name!r} is the base: give the name of an adapter", "name")
        current_record().model = name
        return found

    def _require_free(self, body: LoadBody) -> None:
        """Raise RefusedError if a name is not valid for an adapter, or is taken."""
        name, catalogue = body.lora_name, self._catalogue
        if not name.isprintable() or not 0 < len(name) <= _LONGEST_NAME or name.startswith(MIX):
            raise RefusedError(
                f"lora_name={name[:_LONGEST_NAME]!r} is no name: give 1 to {_LONGEST_NAME} printable characters, not "
                f"beginning with {MIX}",
                "lora_name",
            )
        if not catalogue.sees(name):
            raise ForbiddenError(f"this key may not load an adapter of the name {name!r}", "lora_name")
        current_record().model = name
        if not catalogue.has(name):
            return
        if not body.load_inplace and catalogue.in_folder(name):
            raise _is_own(name)
        if not body.load_inplace or name in catalogue.base_names:
            raise RefusedError(
                f"The lora adapter {name!r} has already been loaded. If you want to load the LoRA adapter in place, "
                "set 'load_inplace' to True.",
                "lora_name",
            )

    def _request(self, name: str, loaded: Loaded) -> LoRARequest:
        if self._catalogue.in_folder(name) and not self._catalogue.owns(name, loaded):
            raise _is_own(name)
        return self._catalogue.request(name, loaded)

    async def _place(self, body: LoadBody) -> Loaded:
        if body.adapter is not None:
            return Loaded(weights=body.adapter)
        given = body.lora_path or ""
        id = self._roots.hub_id(given)
        if id is None:
            return Loaded(folder=await asyncio.to_thread(self._roots.folder, given, self._catalogue.hides))
        async with self._downloads:
            return Loaded(folder=await self._running.settled(_beside(partial(hub_folder, id))), hub=id)

    async def _told(self, names: Sequence[str]) -> list[AdapterCard]:
        async with self._looks:
            return await self._looked_up(names)

    async def _looked_up(self, names: Sequence[str]) -> list[AdapterCard]:
        """Return the cards of adapters, from the pool and from their files."""
        pool, ids = self._engine.pool, await asyncio.to_thread(lambda: [self._id(name) for name in names])
        states = await self._running.settled(
            self._engine.between_steps(
                lambda: [pool.state(name) or pool.state_of(id) for name, id in zip(names, ids, strict=True)]
            )
        )
        return await asyncio.to_thread(lambda: [self._card(*each) for each in zip(names, states, strict=True)])

    def _id(self, name: str) -> str:
        """Return the id of an adapter's version if its files were read before, under another name; otherwise an empty
        text.
        """
        loaded = self._catalogue.loaded(name)
        if loaded is not None and loaded.weights is not None:
            return ""
        try:
            version = self._engine.versions.known(self._catalogue.folder(name))
        except FormatError:
            return ""
        return "" if version is None else version.id

    def _card(self, name: str, state: AdapterUsage | None) -> AdapterCard:
        loaded = self._catalogue.loaded(name)
        card = AdapterCard(
            id=name, source="folder" if loaded is None else loaded.source, root=self._catalogue.place(name)
        )
        if state is not None:
            version = state.version
            return card.model_copy(update={
                "method": version.kind, "rank": version.rank or None, "bytes": state.n_bytes, "pinned": state.pinned,
                "residency": state.residency.value, "requests": state.n_requests, "hits": state.n_hits,
                "warning": version.warning or None,
            })  # fmt: skip
        if loaded is not None and loaded.weights is not None:
            return card.model_copy(update={"method": "mix"})
        try:
            version = self._engine.versions.unread(self._catalogue.folder(name))
        except (FormatError, CompositionError) as error:
            return card.model_copy(update={"error": str(error)})
        told = {"method": version.kind, "rank": version.rank or None, "bytes": version.n_bytes}
        return card.model_copy(update={**told, "warning": version.warning or None})


def _is_own(name: str) -> RefusedError:
    return RefusedError(
        f"The lora adapter {name!r} has already been loaded, from the server's own folder. Replace its files there: "
        "the next request uses them. For an adapter from elsewhere unload it first, or load that under another name.",
        "lora_name",
    )


def _json(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")


def _beside(work: Callable[[], Result]) -> Future[Result]:
    """Start work on a separate thread. A server that stops does not wait for it."""
    told: Future[Result] = Future()

    def run() -> None:
        if told.set_running_or_notify_cancel():
            try:
                told.set_result(work())
            except (VeneerError, OSError) as error:
                told.set_exception(error if isinstance(error, VeneerError) else FormatError(str(error)))
            finally:
                if not told.done():  # of what is a defect, the log has the traceback
                    told.set_exception(ServingError("the download failed because of a defect in the server"))

    threading.Thread(target=run, name="veneer download", daemon=True).start()
    return told
