"""A server that stops, and an engine that breaks down: who waits is told."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from fastapi.responses import StreamingResponse

from veneer.serve.http import server as http_server

from .test_server import Server


@pytest.fixture
def folder(adapters, tmp_path) -> Path:
    shutil.copytree(adapters["lora"].path, tmp_path / "lora")
    return tmp_path


def test_an_engine_that_breaks_down_says_so(base_folder, folder):
    server = Server(base_folder, folder)
    assert urllib.request.urlopen(f"{server.url}/health").status == 200

    def broken() -> Any:
        raise RuntimeError("a defect")

    server.engine.step = broken
    threading.excepthook, kept = (lambda args: None), threading.excepthook
    try:
        status, answer = server.post("/v1/completions", {"prompt": "x"})
        assert (status, answer["error"]["type"]) == (500, "InternalServerError")
        kind = "the engine has broken down: RuntimeError. Its log has the rest"
        assert answer["error"]["message"] == kind  # the text may name another client's adapter
        for route, code in (("/health", 500), ("/ready", 503)):
            with pytest.raises(urllib.error.HTTPError) as told:
                urllib.request.urlopen(f"{server.url}{route}")
            assert told.value.code == code
            assert json.load(told.value)["error"]["message"].startswith(kind)
    finally:
        threading.excepthook = kept
        server.stop()


def test_a_server_that_is_stopped_tells_who_waits(base_folder, folder, monkeypatch, capfd):
    server = Server(base_folder, folder)
    server.hold(monkeypatch)
    body, found = {"prompt": "x", "max_tokens": 120, "ignore_eos": True}, []
    whole = threading.Thread(target=lambda: found.append(server.post("/v1/completions", body)))
    whole.start()
    data = json.dumps(body | {"stream": True}).encode()
    asked = urllib.request.Request(f"{server.url}/v1/completions", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked) as stream:
        first = stream.readline()
        server.wait(lambda: len(server.engine.scheduler.running) == 2)
        server.stop()
        rest = [line for line in stream.read().decode().splitlines() if line]
    whole.join()
    assert json.loads(first.removeprefix(b"data: "))["choices"]
    told = json.loads(rest[-2].removeprefix("data: "))["error"]
    assert (told["code"], rest[-1]) == (500, "data: [DONE]")
    assert "is being stopped" in told["message"]
    assert found == [(500, {"error": told})]
    said = capfd.readouterr().err
    assert (
        " ".join(said.split()) == "WARNING: stopping: requests in flight (2) ended with an error that gives this reason"
    )


def test_a_client_that_does_not_read_is_cut_off_when_the_server_stops(base_folder, folder, monkeypatch, capfd):
    monkeypatch.setattr(http_server, "_CUT_OFF_SECONDS", 0.1)
    server = Server(base_folder, folder)

    async def much() -> Any:
        for _ in range(67):
            yield b"x" * 2**20

    server.app.get("/much")(lambda: StreamingResponse(much()))
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"GET /much HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(7)
        server.stop()
    assert capfd.readouterr().err == ""
