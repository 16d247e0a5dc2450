"""Random requests: every one is answered, or refused with a status that says who is at fault."""

from __future__ import annotations

import http.client
import json
import random
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from tests.unit.serve.random_bodies import ROUTES, random_body

from patience import PATIENCE

from .test_server import Server


@pytest.fixture(scope="module")
def server(base_folder, adapters, tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(adapters["lora"].path, folder / "lora")
    running = Server(base_folder, folder)
    yield running
    running.stop()


def posted(server: Server, route: str, body: bytes) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    connection.request("POST", route, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    told = answer.read().decode()
    connection.close()
    return answer.status, told


def is_error(route: str, status: int, told: Any) -> bool:
    """Return True for an error in the form that the route's clients read."""
    error = told["error"]
    if route.startswith("/v1/messages"):
        return told["type"] == "error" and isinstance(error["message"], str) and error["type"].endswith("_error")
    return isinstance(error["message"], str) and error["code"] == status and {"type", "param"} <= error.keys()


def test_no_random_body_is_the_servers_fault(server):
    draw, answered = random.Random(38), dict.fromkeys(ROUTES, 0)
    for _ in range(1000):
        route, body = random_body(draw)
        status, told = posted(server, route, body)
        assert 200 <= status < 500, (route, body[:500], told)
        answered[route] += status == 200
        if status != 200:
            assert is_error(route, status, json.loads(told)), (route, body[:500], told)
            assert len(told) < 5000, (route, body[:500])
    assert all(n for route, n in answered.items() if "lora" not in route), answered
    server.wait(lambda: server.is_idle)
    assert posted(server, "/v1/completions", b'{"prompt": "x", "max_tokens": 2}')[0] == 200
