"""Keys over HTTP: what each may do and see, tried against each other's adapters, routes and paths."""

from __future__ import annotations

import http.client
import json
import logging
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from patience import PATIENCE
from veneer.serve.http.access import Access, scopes_of
from veneer.serve.http.key import CALLER
from veneer.serve.http.key_file import Keys
from veneer.serve.http.request_record import LOG
from veneer.serve.http.roots import Roots

from .test_key_file import write
from .test_server import PROMPT, TURN, Server

ASK = {"prompt": PROMPT, "temperature": 0, "max_tokens": 3}


@pytest.fixture(scope="module")
def served(adapters, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    for name, of in (("a-lora", "lora"), ("a-rs", "rslora"), ("b-lora", "lora"), ("b-vera", "vera")):
        shutil.copytree(adapters[of].path, folder / name)
    return folder


@pytest.fixture(scope="module")
def server(base_folder, served, tmp_path_factory) -> Iterator[Server]:
    file = write(
        tmp_path_factory.mktemp("keys") / "keys.json",
        {"name": "a", "adapters": ["a-*"], "weight": 3},
        {"name": "b", "adapters": ["b-*"], "max_requests": 3, "max_tokens": 200},
        {"name": "admin", "scopes": ["admin"]},
        {"name": "all", "scopes": ["infer", "admin"]},
        {"name": "admin-of-a", "scopes": ["admin"], "adapters": ["a-*"]},
    )
    running = Server(base_folder, served, keys=Keys(file), roots=Roots([served]))
    yield running
    running.stop()


def ask(server: Server, key: str | None, method: str, path: str, body: Any = None, **headers: str) -> Any:
    """The response to a request, with its text and its JSON, if it is JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    given = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
    connection.request(method, path, None if body is None else json.dumps(body), given | headers)
    answer = connection.getresponse()
    answer.text = answer.read().decode()
    answer.json = json.loads(answer.text) if answer.text.startswith("{") else None
    connection.close()
    return answer


def test_every_route_needs_a_key_but_those_that_tell_nothing(server):
    routes = [(route.path, method) for route in server.app.routes for method in getattr(route, "methods", None) or ()]
    assert ("/openapi.json", "GET") in routes
    for path, method in routes:
        answer = ask(server, None, method, path.replace("{name:path}", "x").replace("{id:path}", "x"))
        is_open = path in {"/", "/health", "/ready", "/version"}
        assert (answer.status != 401) == is_open, path
        assert is_open == (not scopes_of(method, path))
        if not is_open:
            assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert ask(server, None, "GET", "/nowhere").status == 401


@pytest.mark.parametrize(
    "given", ["a", "Basic a", "Bearer", "Bearer ", "Bearer  ", "Bearer x", "Bearer a b", "bearer a"]
)
def test_a_header_that_is_no_key(server, given):
    answer = ask(server, None, "GET", "/v1/models", Authorization=given)
    assert answer.status == (200 if given == "bearer a" else 401)
    if answer.status == 401:
        assert (answer.json["error"]["type"], answer.json["error"]["code"]) == ("AuthenticationError", 401)
        assert "a-lora" not in answer.text


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ({"x-api-key": "a"}, 200), ({"x-api-key": "x"}, 401), ({"x-api-key": ""}, 401),
        ({"x-api-key": "a", "Authorization": "Bearer x"}, 401), ({"x-api-key": "x", "Authorization": "Bearer a"}, 200),
    ],
)  # fmt: skip
def test_anthropics_header_is_a_key(server, given, status):
    assert ask(server, None, "GET", "/v1/models", **given).status == status
    refused = ask(server, None, "POST", "/v1/messages", {}, **given)
    told = refused.json["error"]["type"]
    assert (refused.status, told) == (
        (400, "invalid_request_error") if status == 200 else (401, "authentication_error")
    )


def test_two_headers_are_no_key(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.putrequest("GET", "/v1/models")
    for key in ("a", "b"):
        connection.putheader("Authorization", f"Bearer {key}")
    connection.endheaders()
    assert connection.getresponse().status == 401
    connection.close()


def test_a_key_is_asked_for_before_a_body_is_read(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Length", "1000")
    connection.endheaders()  # and no body
    assert connection.getresponse().status == 401
    connection.close()


@pytest.mark.parametrize(
    ("key", "method", "path", "status"),
    [
        ("a", "GET", "/metrics", 403),
        ("a", "POST", "/v1/load_lora_adapter", 403),
        ("a", "POST", "/v1/unload_lora_adapter", 403),
        ("a", "POST", "/v1/adapters/a-lora/pin", 403),
        ("a", "GET", "/v1/adapters", 200),
        ("admin", "GET", "/v1/adapters", 200),
        ("admin", "GET", "/v1/models", 200),
        ("admin", "POST", "/v1/completions", 403),
        ("admin", "POST", "/v1/chat/completions", 403),
        ("admin", "POST", "/tokenize", 403),
        ("all", "POST", "/v1/load_lora_adapter", 400),
    ],
)
def test_scopes(server, key, method, path, status):
    answer = ask(server, key, method, path, {} if method == "POST" else None)
    assert answer.status == status
    if status == 403:
        assert answer.json["error"]["type"] == "PermissionDeniedError"


def hidden_of(answer: Any) -> str:
    return answer.text.replace("b-lora", "NAME").replace("c-lora", "NAME")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/completions", {**ASK, "model": "NAME"}),
        ("POST", "/v1/completions", {**ASK, "model": "NAME", "stream": True}),
        ("POST", "/v1/completions", {**ASK, "adapter": {"a-lora": 0.5, "NAME": 0.5}}),
        ("POST", "/v1/chat/completions", {"messages": [TURN], "model": "NAME"}),
        ("POST", "/v1/responses", {"input": "x", "model": "NAME"}),
        ("POST", "/v1/embeddings", {"input": "x", "model": "NAME"}),
        ("POST", "/tokenize", {"prompt": "x", "model": "NAME"}),
        ("POST", "/detokenize", {"tokens": [97], "model": "NAME"}),
        ("GET", "/v1/models/NAME", None),
        ("GET", "/v1/adapters/NAME", None),
    ],
)
def test_an_adapter_of_another_key_is_as_if_it_were_not_there(server, method, path, body):
    def answer(name: str) -> Any:
        own = None if body is None else json.loads(json.dumps(body).replace("NAME", name))
        return ask(server, "a", method, path.replace("NAME", name), own)

    hidden, nobody, seen = answer("b-lora"), answer("c-lora"), answer("a-lora")
    assert (hidden.status, hidden_of(hidden)) == (404, hidden_of(nobody))
    assert seen.status == 200
    assert not {"b-vera", "b-lora"} & set(nobody.text.replace('"', " ").replace(",", " ").split())


def test_names_in_messages_are_those_that_a_key_sees(server):
    told = ask(server, "a", "POST", "/v1/completions", {**ASK, "model": "b-ver"}).json["error"]["message"]
    assert "b-vera" not in told
    assert told.endswith("nown: tiny, alias, a-lora, a-rs")
    told = ask(server, "a", "POST", "/v1/completions", {**ASK, "adapter": {"b-vera": 1}}).json["error"]["message"]
    assert told.startswith("no adapter 'b-vera'. ")
    assert told.endswith("nown: a-lora, a-rs")
    told = ask(server, "all", "POST", "/v1/completions", {**ASK, "model": "b-ver"}).json["error"]["message"]
    assert "Did you mean 'b-vera'?" in told


def test_lists_have_what_a_key_sees(server):
    def names(key: str, path: str) -> list[str]:
        return [each["id"] for each in ask(server, key, "GET", path).json["data"]]

    own = {"a": ["a-lora", "a-rs"], "b": ["b-lora", "b-vera"], "all": ["a-lora", "a-rs", "b-lora", "b-vera"]}
    for key, adapters in own.items():
        assert names(key, "/v1/models") == ["tiny", "alias", *adapters]
        assert names(key, "/v1/adapters") == adapters
    assert names("admin-of-a", "/v1/adapters") == own["a"]


def test_an_admin_of_some_adapters_changes_no_others(server):
    def status(verb: str, **body: Any) -> int:
        return ask(server, "admin-of-a", "POST", f"/v1/{verb}_lora_adapter", body).status

    assert status("unload", lora_name="b-lora") == 404
    assert status("load", lora_name="b-lora", lora_path="b-lora", load_inplace=True) == 403
    assert status("load", lora_name="b-new", lora_path="b-lora") == 403
    assert status("load", lora_name="a-both", adapter={"a-lora": 0.5, "b-lora": 0.5}) == 404
    assert status("load", lora_name="a-new", lora_path="b-lora") == 404
    assert status("load", lora_name="a-new", lora_path="a-lora") == 200
    assert status("unload", lora_name="a-new") == 200
    assert ask(server, "admin-of-a", "POST", "/v1/adapters/b-lora/pin").status == 404
    assert status("load", lora_name="a-both", adapter={"a-lora": 0.5, "a-rs": 0.5}) == 200
    assert ask(server, "a", "POST", "/v1/completions", {**ASK, "model": "a-both"}).status == 200
    assert status("unload", lora_name="a-both") == 200


def test_a_mix_with_a_hidden_part_is_hidden_and_not_replaced(server):
    load = {"lora_name": "a-mixed", "adapter": {"a-lora": 0.5, "b-lora": 0.5}}
    assert ask(server, "all", "POST", "/v1/load_lora_adapter", load).status == 200
    assert ask(server, "a", "POST", "/v1/completions", {**ASK, "model": "a-mixed"}).status == 404
    for over in ({"lora_path": "a-lora"}, {"lora_path": "a-lora", "load_inplace": True}, {"adapter": {"a-lora": 1.0}}):
        refused = ask(server, "admin-of-a", "POST", "/v1/load_lora_adapter", {"lora_name": "a-mixed", **over})
        assert (refused.status, "b-" in refused.text) == (403, False)
    assert ask(server, "all", "POST", "/v1/completions", {**ASK, "model": "a-mixed"}).status == 200
    ask(server, "all", "POST", "/v1/unload_lora_adapter", {"lora_name": "a-mixed"})


def test_a_change_of_a_hidden_name_is_not_told(server, monkeypatch):
    begun, may_end = threading.Event(), threading.Event()
    folder = Roots.folder

    def slow(self: Roots, given: str, hides: Any) -> Path:
        begun.set()
        assert may_end.wait(PATIENCE)
        return folder(self, given, hides)

    def statuses(key: str) -> list[int]:
        load = {"lora_name": "b-secret", "lora_path": "a-lora"}
        bodies = {"load": load, "unload": {"lora_name": "b-secret"}}
        return [ask(server, key, "POST", f"/v1/{way}_lora_adapter", body).status for way, body in bodies.items()]

    assert statuses("admin-of-a") == [403, 404]
    monkeypatch.setattr(Roots, "folder", slow)
    load = {"lora_name": "b-secret", "lora_path": "b-lora"}
    loading = threading.Thread(target=ask, args=(server, "all", "POST", "/v1/load_lora_adapter", load))
    loading.start()
    assert begun.wait(PATIENCE)
    assert statuses("admin-of-a") == [403, 404]
    assert statuses("all") == [409, 409]
    may_end.set()
    loading.join()
    assert ask(server, "all", "POST", "/v1/unload_lora_adapter", {"lora_name": "b-secret"}).status == 200


def test_a_key_is_a_client_with_its_weight(server, monkeypatch):
    seen = []
    submit = server.engine.submit
    monkeypatch.setattr(
        server.engine, "submit", lambda asked: seen.append((asked.client, asked.weight)) or submit(asked)
    )
    for key in ("a", "b"):
        for body in ({**ASK, "model": f"{key}-lora"}, ASK):
            assert ask(server, key, "POST", "/v1/completions", body).status == 200
    assert ask(server, "a", "POST", "/v1/embeddings", {"input": "x"}).status == 200
    assert ask(server, "a", "POST", "/v1/responses", {"input": "x", "max_output_tokens": 1}).status == 200
    a, b = (("client", "a"), 3.0), (("client", "b"), 1.0)
    assert seen == [a, a, b, b, a, a]


def test_the_log_names_the_key_of_a_refused_request_and_where_an_unknown_one_came_from(server, caplog):
    caplog.set_level(logging.INFO, LOG.name)
    refused, unknown = ask(server, "a", "GET", "/metrics"), ask(server, "nobody", "GET", "/metrics")
    assert (refused.status, unknown.status) == (403, 401)
    server.wait(lambda: len(caplog.records) >= 2)
    said = [json.loads(record.getMessage()) for record in caplog.records if record.name == LOG.name]
    told = [[line[name] for name in ("status", "client", "peer")] for line in said]
    assert told == [[403, "a", "127.0.0.1"], [401, None, "127.0.0.1"]]


def test_a_key_has_limits_of_its_own(server, monkeypatch):
    server.hold(monkeypatch)
    body = {**ASK, "n": 2, "temperature": 1, "max_tokens": 60, "ignore_eos": True, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    head = {"Content-Type": "application/json", "Authorization": "Bearer b"}
    connection.request("POST", "/v1/completions", json.dumps(body), head)
    stream = connection.getresponse()
    stream.readline()
    too_many = ask(server, "b", "POST", "/v1/completions", {**ASK, "n": 2, "temperature": 1})
    assert (too_many.status, too_many.headers["Retry-After"]) == (429, "1")
    assert "2 choices (prompts × n) of this key are in flight, and it may have 3" in too_many.text
    for route, more in (
        ("/v1/completions", {**ASK, "max_tokens": 60}),
        ("/v1/chat/completions", {"messages": [TURN], "max_tokens": 60}),
        ("/v1/responses", {"input": "x", "max_output_tokens": 60}),
        ("/v1/embeddings", {"input": "x" * 60}),
    ):
        too_long = ask(server, "b", "POST", route, more)
        assert (too_long.status, "tokens (prompts and longest answers) of this key" in too_long.text) == (429, True), (
            route
        )
    assert ask(server, "b", "POST", "/v1/completions", {**ASK, "max_tokens": 1}).status == 200
    assert ask(server, "a", "POST", "/v1/completions", {**ASK, "n": 5, "temperature": 1, "max_tokens": 1}).status == 200
    never = ask(server, "b", "POST", "/v1/completions", {**ASK, "n": 4, "temperature": 1})
    assert (never.status, "this key may have 3" in never.text) == (400, True)
    stream.close()
    connection.close()
    monkeypatch.undo()
    server.wait(lambda: server.is_idle)
    assert ask(server, "b", "POST", "/v1/completions", {**ASK, "n": 3, "temperature": 1}).status == 200


@pytest.mark.parametrize(("client", "path", "status", "closed"), [
    ("127.0.0.1", "/metrics", 200, 200), ("10.0.0.7", "/metrics", 403, 403),
    ("127.0.0.1", "/v1/load_lora_adapter", 200, 200), ("10.0.0.7", "/v1/load_lora_adapter", 403, 403),
    ("127.0.0.1", "/v1/completions", 200, 200), ("10.0.0.7", "/v1/completions", 200, 403),
    ("10.0.0.7", "/v1/messages", 200, 403), ("10.0.0.7", "/health", 200, 200),
])  # fmt: skip
def test_without_keys_others_may_infer_of_an_open_server(client, path, status, closed):
    assert status_of(client, path) == status
    assert status_of(client, path, is_open=False) == closed


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200), ({"host": "localhost:8000"}, 200), ({"host": "localhost"}, 200), ({"host": "127.0.0.1:8000"}, 200),
        ({"host": "0.0.0.0:8000"}, 200), ({"host": "[::1]:8000", "origin": "http://[::1]:8000"}, 200),
        ({"host": "localhost:8000", "x-request-id": "7", "user-agent": "curl"}, 200),
        ({"host": "127.0.0.1:8000", "origin": "https://evil.example"}, 403),
        ({"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8001"}, 403),
        ({"host": "127.0.0.1:8000", "origin": "null"}, 403), ({"host": "127.0.0.1:8000", "origin": "http://[::1"}, 403),
        ({"host": "evil.example:8000"}, 403), ({"host": "evil.example", "origin": "http://evil.example"}, 403),
        ({"host": "[::1"}, 403), ({"host": "localhost.evil.example"}, 403), ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "evil.example@localhost", "origin": "http://evil.example"}, 403),
        ({"host": "203.0.113.5"}, 403), ({"host": "models.example.org"}, 403),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/completions", "/v1/messages", "/tokenize"])
def test_without_keys_no_name_or_page_of_another_site_has_what_this_machine_has(headers, status, path):
    assert status_of("127.0.0.1", path, headers, is_open=False) == status
    assert status_of("127.0.0.1", path, headers) == (status if path == "/v1/load_lora_adapter" else 200)


@pytest.mark.parametrize(
    "header",
    [
        "forwarded", "via", "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "x-forwarded", "x-real-ip",
        "x-client-ip", "x-envoy-external-address", "cf-connecting-ip", "true-client-ip",
    ],
)  # fmt: skip
def test_without_keys_a_proxy_on_this_machine_is_not_this_machine(header):
    headers = {"host": "127.0.0.1:8000", header: "127.0.0.1"}
    for path in ("/v1/load_lora_adapter", "/metrics", "/v1/completions"):
        assert status_of("127.0.0.1", path, headers, is_open=False) == 403
        assert status_of("127.0.0.1", path, headers) == (200 if path == "/v1/completions" else 403)


def test_without_keys_http_1_0_infers_alone():
    """nginx asks so unless it is told otherwise, with no header that tells it."""
    for is_open in (True, False):
        statuses = [
            status_of("127.0.0.1", path, {"host": "127.0.0.1:8000"}, is_open=is_open, version="1.0")
            for path in ("/metrics", "/v1/load_lora_adapter", "/v1/completions")
        ]
        assert statuses == [403, 403, 200]


def test_what_is_refused_without_keys_is_told(tmp_path):
    sent = answered("127.0.0.1", "/v1/models", {"host": "evil.example"}, is_open=False)
    told = json.loads(sent[1]["body"])["error"]
    assert (told["type"], told["code"]) == ("PermissionDeniedError", 403)
    assert told["message"] == (
        "this server has no keys and answers this machine alone, but the request names the server 'evil.example', not "
        "localhost. Start it with --keys FILE, or with --open if anybody may ask"
    )
    sent = answered("127.0.0.1", "/metrics", {"via": "1.1 x"}, is_open=True)
    assert json.loads(sent[1]["body"])["error"]["message"] == (
        "POST '/metrics' needs a key with the scope admin: without keys, only requests from this machine have it, but "
        "the request comes through a proxy, as its header via shows. Start the server with --keys"
    )


def status_of(
    client: str, path: str, headers: dict[str, str] | None = None, is_open: bool = True, version: str = "1.1"
) -> int:
    """The status that a server without keys gives a client's request."""
    sent = answered(client, path, headers, is_open, version)
    return sent[0]["status"] if sent else 200


def answered(
    client: str, path: str, headers: dict[str, str] | None = None, is_open: bool = True, version: str = "1.1"
) -> list[Any]:
    """The messages of a refusal; the key of a request that is admitted sees everything."""
    sent, seen = list[Any](), list[Any]()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(CALLER.get().sees("anything"))

    async def send(message: Any) -> None:
        sent.append(message)

    given = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {
        "type": "http", "method": "POST", "path": path, "headers": given, "client": (client, 7), "http_version": version
    }  # fmt: skip
    handled = Access(app, None, is_open)(scope, None, send)  # type: ignore[arg-type]
    with pytest.raises(StopIteration):
        handled.send(None)
    assert seen == ([] if sent else [True])
    return sent


def test_over_a_socket_a_foreign_host_gets_nothing(base_folder, served):
    running = Server(base_folder, served)
    try:
        for path in ("/v1/models", "/v1/adapters", "/metrics", "/openapi.json", "/nowhere"):
            refused = ask(running, None, "GET", path, Host="evil.example")
            assert (refused.status, "a-lora" in refused.text, str(served) in refused.text) == (403, False, False)
            assert ask(running, None, "GET", path).status == (404 if path == "/nowhere" else 200)
        assert ask(running, None, "GET", "/docs").status == 404
    finally:
        running.stop()


def test_metrics_name_the_adapters_that_a_key_sees_alone(server):
    for key in ("a", "b"):
        names = [f"{key}-lora", "b-vera" if key == "b" else "a-rs"]
        for name in names:
            assert ask(server, key, "POST", "/v1/completions", {**ASK, "model": name}).status == 200
    limited, everything = (ask(server, key, "GET", "/metrics").text for key in ("admin-of-a", "all"))
    assert 'adapter="b-vera"' in everything
    assert 'adapter="a-rs"' in limited
    assert "b-" not in limited
    assert "process_resident_memory_bytes" in limited
    assert limited.count('adapter="a-lora"') == everything.count('adapter="a-lora"') > 5
    assert limited.count('adapter="other"') == everything.count('adapter="other"') > 5


def test_a_mix_is_seen_by_keys_that_see_all_its_parts(server):
    mix = {"lora_name": "a-mix", "adapter": {"a-lora": 0.5, "b-vera": 0.5}}
    assert ask(server, "all", "POST", "/v1/load_lora_adapter", mix).status == 200
    for path in ("/v1/models", "/v1/adapters", "/v1/models/a-mix"):
        assert "b-vera" not in ask(server, "a", "GET", path).text
        assert "b-vera" in ask(server, "all", "GET", path).text
    unload = {"lora_name": "a-mix"}
    assert ask(server, "admin-of-a", "POST", "/v1/unload_lora_adapter", unload).status == 404
    assert ask(server, "all", "POST", "/v1/unload_lora_adapter", unload).status == 200
