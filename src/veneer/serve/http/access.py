"""Access: who asks, and whether it may. It stands before the body of a request is read."""

from __future__ import annotations

import ipaddress
from dataclasses import replace
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from veneer.serve.http.errors import ForbiddenError, RefusedError, UnauthorizedError, error_response
from veneer.serve.http.key import ADMIN, ANYBODY, CALLER, INFER, NOBODY, Key
from veneer.serve.http.key_file import Keys
from veneer.serve.http.request_record import current_record

_OPEN = frozenset({"/", "/health", "/ready", "/version"})
_ADMINS = ("/metrics", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_LISTS = ("/v1/models", "/v1/adapters")  # of what a key sees; whatever changes an adapter is an admin's
_VISITOR = replace(ANYBODY, scopes=frozenset({INFER}))


class Access:
    """Middleware that finds the key of each request, which is then `CALLER`, and refuses what the key may not do.

    Without ``keys``, this machine may do everything, and others may infer. A web page of another site is one of those
    others in this machine's browser: it reaches the server across sites, or by a name that points here.
    """

    def __init__(self, app: ASGIApp, keys: Keys | None) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            key = self._admitted(scope)
        except RefusedError as error:
            told = {"WWW-Authenticate": "Bearer"} if error.status == UnauthorizedError.status else None
            await error_response(error, told)(scope, receive, send)
            return
        before = CALLER.set(key)
        try:
            await self._app(scope, receive, send)
        finally:
            CALLER.reset(before)

    def _admitted(self, scope: Scope) -> Key:
        needed = scopes_of(scope["method"], scope["path"])
        if not needed:
            return ANYBODY if self._keys is None else NOBODY
        key = self._key(scope)
        current_record().client = key.name  # of a refused request too
        if key.scopes.isdisjoint(needed):
            raise ForbiddenError(
                f"{scope['method']} {scope['path']!r} needs a key with the scope {ADMIN if ADMIN in needed else INFER}"
                + (
                    ""
                    if self._keys is not None
                    else ": without keys, only this machine has it, by an address or localhost. Start with --keys"
                )
            )
        return key

    def _key(self, scope: Scope) -> Key:
        if self._keys is None:
            return ANYBODY if _is_near(scope) and not _is_for_another_site(Headers(scope=scope)) else _VISITOR
        token = _token(Headers(scope=scope))
        if not token:
            raise UnauthorizedError(
                "this server needs a key: send the header 'Authorization: Bearer KEY', or 'x-api-key: KEY'"
            )
        found = self._keys.find(token)
        if found is None:
            raise UnauthorizedError("the key is unknown here: ask who runs this server for one")
        return found


def _token(headers: Headers) -> str:
    """The key that a client sends, in OpenAI's header or in Anthropic's; "" if there is none, or two of one kind."""
    given, plain = headers.getlist("authorization"), headers.getlist("x-api-key")
    if not given:
        return plain[0].strip() if len(plain) == 1 else ""
    kind, _, token = given[0].partition(" ")
    return token.strip() if len(given) == 1 and kind.lower() == "bearer" else ""


def scopes_of(method: str, path: str) -> frozenset[str]:
    """Return the scopes of which one is needed for a route; none for those that are open to all."""
    if path in _OPEN:
        return frozenset()
    if _is_below(path, _ADMINS):
        return frozenset({ADMIN})
    if _is_below(path, _LISTS):
        return frozenset({ADMIN, INFER}) if method in ("GET", "HEAD") else frozenset({ADMIN})
    return frozenset({INFER})


def _is_below(path: str, places: tuple[str, ...]) -> bool:
    return any(path == place or path.startswith(f"{place}/") for place in places)


def _is_near(scope: Scope) -> bool:
    """True for a client on this machine; one through a socket file has no address."""
    client = scope.get("client")
    try:
        return client is None or ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        return False


def _is_for_another_site(headers: Headers) -> bool:
    """True for a request by a name other than localhost, and for one of a page that another site sent."""
    host, origin = headers.get("host", ""), headers.get("origin")
    try:
        name = urlsplit(f"//{host}").hostname or "localhost"
        if name != "localhost":
            ipaddress.ip_address(name)
        return origin is not None and urlsplit(origin).netloc != host
    except ValueError:
        return True
