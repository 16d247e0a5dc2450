"""Access: the client of a request, and its rights. It is checked before the body of a request is read."""

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
_OF_PROXIES = frozenset({
    "forwarded", "via", "x-real-ip", "x-client-ip", "x-cluster-client-ip", "x-original-host",
    "x-original-forwarded-for", "true-client-ip", "cf-connecting-ip", "fastly-client-ip",
})  # fmt: skip
_OLD = "the request is one of HTTP/1.0, as proxies send them"  # and old clients, which may infer
_LONGEST_HOST = 100  # characters that are told
_VISITOR = replace(ANYBODY, scopes=frozenset({INFER}))


class Access:
    """Middleware that sets `CALLER` to the key of each request, and refuses requests that the key does not allow.

    Without ``keys``, clients on this machine may do everything. Remote clients may only infer if ``is_open``;
    otherwise they are refused. A client counts as remote if it comes through a proxy, or if it is a web page of
    another site in this machine's browser.
    """

    def __init__(self, app: ASGIApp, keys: Keys | None, is_open: bool = False) -> None:
        self._app, self._keys, self._is_open = app, keys, is_open

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
            told = (
                ""
                if self._keys is not None
                else f": without keys, only requests from this machine have it, but {_why_far(scope)}"
            )
            raise ForbiddenError(
                f"{scope['method']} {scope['path']!r} needs a key with the scope {ADMIN if ADMIN in needed else INFER}"
                + (told and f"{told}. Start the server with --keys")
            )
        return key

    def _key(self, scope: Scope) -> Key:
        if self._keys is None:
            return self._key_of_place(scope)
        token = _token(Headers(scope=scope))
        if not token:
            raise UnauthorizedError(
                "this server needs a key: send the header 'Authorization: Bearer KEY', or 'x-api-key: KEY'"
            )
        found = self._keys.find(token)
        if found is None:
            raise UnauthorizedError("the key is unknown here: ask who runs this server for one")
        return found

    def _key_of_place(self, scope: Scope) -> Key:
        """Return the rights of a client that sends no key. Clients on this machine have all rights, others may only
        infer.

        Raises ForbiddenError for a client that is not on this machine, unless the server is open to all.
        """
        reason = _why_far(scope)
        if not reason:
            return ANYBODY
        if not self._is_open and reason != _OLD:
            raise ForbiddenError(
                f"this server has no keys and answers this machine alone, but {reason}. Start it with --keys FILE, or "
                "with --open if anybody may ask"
            )
        return _VISITOR


def _token(headers: Headers) -> str:
    """Return the key in OpenAI's or in Anthropic's header; "" if there is none, or if one header is sent twice."""
    given, plain = headers.getlist("authorization"), headers.getlist("x-api-key")
    if not given:
        return plain[0].strip() if len(plain) == 1 else ""
    kind, _, token = given[0].partition(" ")
    return token.strip() if len(given) == 1 and kind.lower() == "bearer" else ""


def scopes_of(method: str, path: str) -> frozenset[str]:
    """Return the scopes that allow a route: any one of them suffices. Empty if the route is open to all."""
    if path in _OPEN:
        return frozenset()
    if _is_below(path, _ADMINS):
        return frozenset({ADMIN})
    if _is_below(path, _LISTS):
        return frozenset({ADMIN, INFER}) if method in ("GET", "HEAD") else frozenset({ADMIN})
    return frozenset({INFER})


def _is_below(path: str, places: tuple[str, ...]) -> bool:
    return any(path == place or path.startswith(f"{place}/") for place in places)


def _why_far(scope: Scope) -> str:
    """Return the reason why a request does not come from this machine; empty if it does."""
    headers = Headers(scope=scope)
    host = headers.get("host", "")
    if not _is_near(scope.get("client")):
        return "the request comes from another machine"
    if (sign := next(filter(_is_of_proxy, headers), None)) is not None:
        return f"the request comes through a proxy, as its header {sign} shows"
    if not _is_local(host):
        return f"the request names the server {host[:_LONGEST_HOST]!r}, not localhost"
    if _is_of_another_site(headers.get("origin"), host):
        return "the request comes from a web page of another site"
    return _OLD if scope.get("http_version") == "1.0" else ""


def _is_near(client: tuple[str, int] | None) -> bool:
    """Return True if a client's address is on this machine, or is None because the client uses a socket file."""
    try:
        return client is None or ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        return False


def _is_of_proxy(header: str) -> bool:
    return header in _OF_PROXIES or header.startswith(("x-forwarded", "x-envoy-"))


def _is_local(host: str) -> bool:
    """Return True if a host is localhost, a loopback address or an unspecified one.

    Other names are not accepted, even if they resolve to this machine, because another site can make its own name do so
    (DNS rebinding).
    """
    try:
        name = urlsplit(f"//{host}").hostname or "localhost"
        if name == "localhost":
            return True
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _is_of_another_site(origin: str | None, host: str) -> bool:
    try:
        return origin is not None and urlsplit(origin).netloc != host
    except ValueError:
        return True
