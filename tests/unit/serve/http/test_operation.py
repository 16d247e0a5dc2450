"""A server in operation: ids of requests, the log, readiness, and the end after SIGTERM, also of a real process."""

from __future__ import annotations

import http.client
import importlib.metadata
import json
import logging
import os
import shutil
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch import started
from patience import PATIENCE
from veneer.serve.http import lifecycle
from veneer.serve.http.lifecycle import Lifecycle, NotReadyError
from veneer.serve.http.request_record import GONE, LOG

from .test_server import PROMPT, Server

STREAM = {"prompt": PROMPT, "max_tokens": 40, "ignore_eos": True, "temperature": 0, "stream": True}
PROGRAM = """
import sys
from pathlib import Path
import torch
from veneer.serve.http.app import make_app
from veneer.serve.http.models import Catalogue
from veneer.serve.http.server import run
from veneer.serve.start import EngineOptions, start_engine

torch.set_num_threads(1)
folder, port, drain_seconds, may_end = sys.argv[1:]
engine = start_engine(folder, EngineOptions())
step = engine.step

def held():
    while not (Path(may_end).exists() or engine.wait(0.05)):
        pass
    return step()

engine.step = held
run(make_app(engine, Catalogue(engine, ["tiny"], folder, None)), "127.0.0.1", int(port), float(drain_seconds))
"""


@pytest.fixture(scope="module")
def server(base_folder, adapters, tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("operated")
    shutil.copytree(adapters["lora"].path, folder / "lora")
    running = Server(base_folder, folder)

    def breaks() -> None:
        raise RuntimeError("a defect")

    running.app.get("/broken")(breaks)
    yield running
    running.stop()


class Asking:
    """A request whose answer is read piece by piece."""

    def __init__(self, port: int, route: str, body: Any = None, **headers: str) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        data = None if body is None else json.dumps(body)
        self.connection.request(
            "GET" if body is None else "POST", route, data, {"Content-Type": "application/json", **headers}
        )
        self.answer = self.connection.getresponse()

    @property
    def id(self) -> str | None:
        return self.answer.headers["X-Request-Id"]

    def events(self) -> list[Any]:
        """The events that are left, but for the last, which must be the end."""
        *events, end = [line for line in self.answer.read().decode().splitlines() if line]
        assert end == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.mark.parametrize("given", ["abc-1.2:3/4_5+6=7@8~9", "x" * 128])
def test_a_clients_id_comes_back(server, given):
    for route, body in (("/v1/models", None), ("/v1/completions", STREAM), ("/nowhere", None), ("/broken", None)):
        asking = Asking(server.port, route, body, **{"X-Request-Id": given})
        assert asking.id == given
        asking.answer.read()


@pytest.mark.parametrize("given", [None, "", "x" * 129, "a b", "a'b", "a\xe9b"])
def test_an_id_is_made_where_none_is_given_that_can_be_kept(server, given):
    bodies = [None, {"prompt": "x", "nonsense": 1}, {"prompt": "x", "max_tokens": 1}, {"prompt": "x" * 5 * 2**20}]
    headers = {} if given is None else {"X-Request-Id": given}
    answers = [Asking(server.port, "/v1/completions", body, **headers) for body in bodies]
    assert [each.answer.status for each in answers] == [405, 400, 200, 413]
    ids = [each.id for each in answers]
    assert len(set(ids)) == len(ids)
    assert all(id is not None and len(bytes.fromhex(id)) == 16 for id in ids)


def test_a_defect_is_told_as_json_and_logged(server, caplog):
    log = logging.getLogger("uvicorn.error")
    log.addHandler(caplog.handler)
    try:
        broken = Asking(server.port, "/broken")
        told = json.loads(broken.answer.read())["error"]
        assert (broken.answer.status, told["code"]) == (500, 500)
        assert "RuntimeError" in told["message"]
        server.wait(lambda: "a defect" in caplog.text)
    finally:
        log.removeHandler(caplog.handler)


def lines(caplog: pytest.LogCaptureFixture, server: Server, n: int) -> list[dict[str, Any]]:
    server.wait(lambda: len([record for record in caplog.records if record.name == LOG.name]) == n)
    return [json.loads(record.getMessage()) for record in caplog.records if record.name == LOG.name]


def test_each_request_is_one_line_of_the_log(server, caplog):
    caplog.set_level(logging.INFO, LOG.name)
    whole = {"model": "lora", "prompt": [PROMPT * 4] * 2, "max_tokens": 7, "ignore_eos": True, "temperature": 0}
    asked = [
        Asking(server.port, "/v1/completions", whole), Asking(server.port, "/v1/completions", STREAM),
        Asking(server.port, "/v1/completions", {"model": "no such", "prompt": PROMPT}), Asking(server.port, "/gone"),
    ]  # fmt: skip
    for each in asked:
        each.answer.read()
    found = {line["id"]: line for line in lines(caplog, server, 4)}
    first, second, third, fourth = (found[each.id] for each in asked)
    assert PROMPT not in caplog.text
    assert {line["peer"] for line in found.values()} == {"127.0.0.1"}
    told = ("method", "route", "model", "client", "status", "finish_reasons", "tokens_in", "tokens_out")
    assert [first[name] for name in told] == ["POST", "/v1/completions", "lora", None, 200, ["length"], 88, 14]
    assert [second[name] for name in told] == ["POST", "/v1/completions", "tiny", None, 200, ["length"], 11, 40]
    assert [third[name] for name in told] == ["POST", "/v1/completions", None, None, 404, [], 0, 0]
    assert [fourth[name] for name in told] == ["GET", "/gone", None, None, 404, [], 0, 0]
    assert first["tokens_cached"] == 32  # the second prompt finds the first's full pages
    for line in (first, second):
        assert 0 < line["seconds_waited"] < line["seconds_to_first_token"] < line["seconds"] < 60
    assert (third["seconds_waited"], third["seconds_to_first_token"]) == (None, None)


def test_changes_of_an_adapter_name_it_in_the_log_and_probes_are_left_out(server, caplog):
    caplog.set_level(logging.INFO, LOG.name)
    asked = [
        Asking(server.port, "/ready"), Asking(server.port, "/health"), Asking(server.port, "/"),
        Asking(server.port, "/v1/adapters/lora/pin", {}), Asking(server.port, "/v1/adapters/lora/unpin", {}),
        Asking(server.port, "/v1/load_lora_adapter", {"lora_name": "lora", "lora_path": "lora", "load_inplace": True}),
        Asking(server.port, "/v1/unload_lora_adapter", {"lora_name": "none"}), Asking(server.port, "/version"),
        Asking(server.port, "/v1/adapters?limit=7"), Asking(server.port, "/v1/models"),
        Asking(server.port, "/v1/adapters?limit=0"), Asking(server.port, "/v1/adapters/lora"),
    ]  # fmt: skip
    for each in asked:
        each.answer.read()
    found = {line["id"]: line["model"] for line in lines(caplog, server, 7)}
    assert [found.get(each.id, "-") for each in asked[3:]] == [
        "lora", "lora", "lora", None, None, "-", "-", None, "lora",
    ]  # fmt: skip


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_told_in_the_log(server, caplog, stream):
    caplog.set_level(logging.INFO, LOG.name)
    body = json.dumps({"prompt": "x", "max_tokens": 120, "ignore_eos": True, "stream": stream}).encode()
    fields = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    head = "\r\n".join([*fields, f"Content-Length: {len(body)}", "", ""])
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + body)
        server.wait(lambda: [r for r in server.engine.scheduler.running if len(r.output) > 2])
    [line] = lines(caplog, server, 1)
    assert (line["status"], line["finish_reasons"], line["tokens_in"]) == (GONE, ["abort"], 1)
    assert 2 < line["tokens_out"] < 120


def test_the_events_of_a_step_are_one_write(server, monkeypatch):
    monkeypatch.setattr("veneer.serve.async_engine._BEHIND", 1000)  # a busy machine reads late: they are joined
    body = json.dumps(STREAM | {"prompt": [PROMPT, "another"], "n": 2, "temperature": 1, "seed": 2}).encode()
    fields = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Connection: close"]
    asked = "\r\n".join([*fields, f"Content-Length: {len(body)}", "", ""]).encode() + body
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(asked)
        answer = b"".join(iter(lambda: connection.recv(2**16), b""))
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert b"x-accel-buffering: no" in head.lower()
    chunks = []
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        chunks.append(rest[: int(size, 16)])
        rest = rest[int(size, 16) + 2 :]
    assert b"".join(chunks).count(b"data: ") == 4 * 40 + 1
    assert sum(chunk.count(b"data: ") >= 4 for chunk in chunks) >= 20  # all choices, when prompts are read


def test_a_server_that_runs_is_ready_and_tells_its_version(server):
    assert Asking(server.port, "/ready").answer.status == 200
    assert Asking(server.port, "/health").answer.status == 200
    told = json.loads(Asking(server.port, "/version").answer.read())
    assert told == {"version": importlib.metadata.version("veneer")}


class Engine:
    failure: Exception | None = None
    is_running = False


def test_a_server_is_ready_while_it_takes_requests(monkeypatch):
    now = 100.0
    monkeypatch.setattr(lifecycle, "monotonic", lambda: now)
    engine: Any = Engine()
    life = Lifecycle(engine)
    with pytest.raises(NotReadyError, match="does not run yet"):
        life.require_ready()
    engine.is_running = True
    life.require_ready()
    engine.failure = OSError("/srv/adapters/bob-secret is gone")
    with pytest.raises(NotReadyError, match=r"broken down: OSError\. Its log has the rest\. Restart"):
        life.require_ready()
    engine.failure = None
    life.n_in_flight = 1
    assert (life.is_draining, life.is_drained) == (False, False)
    life.drain(7.5)
    for refuses in (life.require_open, life.require_ready):
        with pytest.raises(NotReadyError, match=r"is stopping.* in 8 s") as told:
            refuses()
        assert (told.value.status, told.value.retry_seconds) == (503, 8)
    assert (life.is_draining, life.is_drained) == (True, False)
    life.n_in_flight = 0
    assert life.is_drained
    life.n_in_flight, now = 1, 107.5
    assert life.is_drained


def test_what_has_not_ended_when_the_time_is_over_ends_with_an_error(base_folder, tmp_path, monkeypatch, capfd):
    server = Server(base_folder, tmp_path)
    server.hold(monkeypatch)
    stream = Asking(server.port, "/v1/completions", STREAM)
    server.app.state.lifecycle.drain(0.4)
    assert "is being stopped" in stream.events()[-1]["error"]["message"]
    server.thread.join(PATIENCE)
    said = capfd.readouterr().err
    assert "stopping: requests in flight (1) have 0 s to end; a second signal ends them at once" in said
    assert "stopping: requests in flight (1) ended with an error that gives this reason" in said


def test_a_second_signal_ends_all(base_folder, tmp_path, monkeypatch):
    server = Server(base_folder, tmp_path)
    server.hold(monkeypatch)
    server.server._drain_seconds = PATIENCE
    stream = Asking(server.port, "/v1/completions", STREAM)
    for _ in range(2):
        assert server.thread.is_alive()
        server.server.handle_exit(signal.SIGTERM, None)
    assert "is being stopped" in stream.events()[-1]["error"]["message"]
    server.thread.join(PATIENCE)
    assert not server.thread.is_alive()


def test_a_process_that_is_told_to_stop_ends_its_streams(base_folder, tmp_path):
    """It refuses what is new meanwhile. A stream goes on when the test says so."""
    drain_seconds, may_end = int(2 * PATIENCE), tmp_path / "may end"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path / "log"
    process = started(PROGRAM, base_folder, port, drain_seconds, may_end, stdout=log)
    assert process.pid is not None
    try:
        _wait_for_status(port, 200, log)
        stream = Asking(port, "/v1/completions", STREAM)
        assert stream.answer.readline().startswith(b"data: ")
        assert stream.answer.readline() == b"\n"
        os.kill(process.pid, signal.SIGTERM)
        _wait_for_status(port, 503, log)
        refused = Asking(port, "/v1/completions", STREAM)
        told = json.loads(refused.answer.read())["error"]
        assert (refused.answer.status, told["type"]) == (503, "ServiceUnavailableError")
        assert PATIENCE < int(refused.answer.headers["Retry-After"]) <= drain_seconds
        assert refused.id
        assert Asking(port, "/metrics").answer.status == 400  # this engine keeps none
        may_end.touch()
        *_, last = stream.events()
        process.join(PATIENCE)
    finally:
        process.kill()
    assert last["choices"][0]["finish_reason"] == "length"
    assert process.exitcode == -signal.SIGTERM
    assert "Traceback" not in log.read_text()


def _wait_for_status(port: int, wanted: int, log: Path) -> None:
    """Wait until ``/ready`` has a status."""
    end, found = time.monotonic() + PATIENCE, 0
    while found != wanted:
        assert time.monotonic() < end, log.read_text()
        try:
            found = urllib.request.urlopen(f"http://127.0.0.1:{port}/ready").status
        except urllib.error.HTTPError as error:
            found = error.code
        except OSError:
            time.sleep(0.05)
