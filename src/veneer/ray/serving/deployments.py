"""Deployments on Ray Serve: engines with all routes of a server, and the ingress in front of them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing

from fastapi import FastAPI
from prometheus_client.metrics_core import Metric as Family
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from veneer.ray.serving.arguments import RayArguments
from veneer.serve.http.app import make_app
from veneer.serve.http.call import Call, answered
from veneer.serve.http.ingress import RETRY_SECONDS, ReplicaLostError, make_ingress, without_id
from veneer.serve.http.key import ANYBODY, NOBODY
from veneer.serve.http.key_file import Keys
from veneer.serve.http.metrics import EngineCollector
from veneer.serve.http.models import Catalogue
from veneer.serve.http.request_record import log_requests
from veneer.serve.start import start_engine

ROUTER = "veneer.ray.serving.router.AdapterRouter"
_MORE = 1024  # requests beside those that are answered: they get their 429 from a replica, and lists their answer


def application(given: RayArguments, router: str | type) -> Application:
    """Return the application, whose replicas a request router of Ray Serve chooses."""
    n_at_once = given.limits.in_flight + _MORE
    engine = serve.deployment(
        EngineReplica, name="engine", num_replicas=given.replicas, max_ongoing_requests=n_at_once,
        ray_actor_options={"num_cpus": given.cpus},
        request_router_config=RequestRouterConfig(request_router_class=router),
    )  # fmt: skip
    ingress = serve.deployment(
        serve.ingress()(Ingress), name="ingress", max_ongoing_requests=n_at_once * given.replicas,
        ray_actor_options={"num_cpus": 0},  # it waits for replicas
    )  # fmt: skip
    found: Application = ingress.bind(given, engine.bind(given))
    return found


class EngineReplica:
    """Deployment of an engine with all routes, which Ray restarts when the engine has broken down."""

    async def __init__(self, given: RayArguments) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        engine = start_engine(given.model, given.engine_options())
        keys = None if given.keys is None else Keys(given.keys)
        otherwise = ANYBODY if keys is None else NOBODY
        catalogue = Catalogue(engine, [given.base], given.model, given.adapters, otherwise)
        self._app = make_app(
            engine, catalogue, given.limits, keys=keys, is_open=True, metrics_prefix=given.metrics_prefix
        )
        self._collector = EngineCollector(engine, given.base, given.metrics_prefix, _id())
        if given.log_requests:
            log_requests()
        self._life = AsyncExitStack()  # until the process ends
        await self._life.enter_async_context(self._app.router.lifespan_context(self._app))

    async def answer(self, call: Call) -> AsyncGenerator[Message, None]:
        """Yield the messages of a response."""
        async with aclosing(answered(self._app, call)) as messages:
            async for message in messages:
                yield message

    def metrics(self) -> Sequence[Family]:
        """Return the engine's metrics."""
        return list(self._collector.collect())

    def check_health(self) -> None:
        """Raise ServingError once the engine has broken down."""
        self._app.state.engine.require_whole()


class Ingress:
    """Deployment in front of the engines."""

    def __init__(self, given: RayArguments, engines: DeploymentHandle[EngineReplica]) -> None:
        self._given, self._replicas = given, RayReplicas(engines)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application, which Ray Serve asks for."""
        keys = None if self._given.keys is None else Keys(self._given.keys)
        made = make_ingress(self._replicas, [self._given.base], self._given.limits, keys)
        made.add_middleware(_WithoutId)
        return made


class _WithoutId:
    """Middleware that removes the response's ``X-Request-Id``, which Ray sets on every response itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the application, and remove the header from the response."""

        async def told(message: Message) -> None:
            await send(without_id(message))

        await self._app(scope, receive, told)


class RayReplicas:
    """Replicas of a deployment of `EngineReplica`."""

    def __init__(self, engines: DeploymentHandle[EngineReplica]) -> None:
        self._engines, self._streaming = engines, engines.options(stream=True)

    async def answer(self, call: Call) -> AsyncGenerator[Message, None]:
        """Yield the messages of one replica's response. Raises ReplicaLostError if that replica ends."""
        messages, is_whole = self._streaming.answer.remote(call), False
        try:
            async for message in messages:
                yield message
            is_whole = True
        except (RayActorError, RayServeException) as error:
            raise ReplicaLostError(
                f"the replica that answered has ended or takes no requests: ask again in {RETRY_SECONDS} s",
                retry_seconds=RETRY_SECONDS,
            ) from error
        finally:
            if not is_whole:  # its client has left, or nobody took it
                messages.cancel()

    async def metrics(self) -> Sequence[Sequence[Family]]:
        """Return the metrics of each replica that runs."""
        found: list[Sequence[Family]] = await self._engines.broadcast("metrics").results_async(return_exceptions=True)
        return [each for each in found if not isinstance(each, BaseException)]


def _id() -> str:
    id: str = serve.get_replica_context().replica_tag
    return id
