"""Lanes: work that takes too long is refused and counted, and nothing else waits for it."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import pytest

from patience import PATIENCE
from veneer.serve.http.errors import BusyError, RefusedError
from veneer.serve.http.lanes import Lane, Lanes
from veneer.serve.http.message_body import CountTokensBody
from veneer.serve.http.protocol import ChatBody, CompletionBody
from veneer.serve.http.response_body import ResponsesBody
from veneer.serve.http.server_limits import ServerLimits
from veneer.serve.requests import prompts
from veneer.serve.requests.structured import Forms

from .test_server import TURN, Server

_MARK: ContextVar[str] = ContextVar("mark", default="none")


def test_work_has_its_result_its_error_and_the_callers_context():
    async def asks() -> None:
        lane = Lane("things", 2)
        _MARK.set("mine")
        assert await lane.run(_MARK.get) == "mine"
        with pytest.raises(ZeroDivisionError):
            await lane.run(lambda: 1 // 0)
        assert await asyncio.gather(*(lane.run(lambda i=i: i * i) for i in range(20))) == [i * i for i in range(20)]

    asyncio.run(asks())


def test_work_that_takes_too_long_is_refused_and_stuck_until_it_ends():
    async def asks() -> None:
        lane, may_end = Lane("things", 2, seconds=1), threading.Event()
        with pytest.raises(RefusedError, match="longer than 1 s to read"):
            await lane.run(lambda: may_end.wait(PATIENCE))
        assert (lane.n_stuck, lane.is_blocked) == (1, False)
        assert await lane.run(lambda: "beside") == "beside"
        with pytest.raises(RefusedError):
            await lane.run(lambda: may_end.wait(PATIENCE) and 1 // 0)
        assert lane.is_blocked
        with pytest.raises(BusyError, match=r"all 2 threads that read things are busy, 2 of them .* ask again"):
            await lane.run(lambda: "later")
        may_end.set()
        while lane.n_stuck:
            await asyncio.sleep(0.01)
        assert await lane.run(lambda: "again") == "again"

    asyncio.run(asks())


def test_work_that_cannot_begin_in_time_is_told_to_come_again():
    async def asks() -> None:
        lane, may_end, ran = Lane("things", 1, seconds=0.3), threading.Event(), list[int]()
        first = asyncio.ensure_future(lane.run(lambda: may_end.wait(PATIENCE)))
        await asyncio.sleep(0)
        with pytest.raises(BusyError) as told:
            await lane.run(lambda: ran.append(1))
        assert (told.value.status, told.value.retry_seconds) == (503, 0.3)
        with pytest.raises(BusyError, match="ask again in 1 s") as behind:
            await lane.run(lambda: ran.append(2))
        assert behind.value.retry_seconds == 0.6
        with pytest.raises(RefusedError):
            await first
        may_end.set()
        while lane.n_stuck:
            await asyncio.sleep(0.01)
        await lane.run(lambda: None)
        assert ran == []

    asyncio.run(asks())


def test_bodies_with_a_form_have_a_lane_of_their_own():
    lanes, tool = Lanes(), {"type": "function", "function": {"name": "f"}}
    schema = {"type": "object"}
    for plain in (CompletionBody(prompt="x"), ChatBody(messages=[TURN]), ResponsesBody(input="x")):
        assert lanes.of(plain) is lanes.prompts
    for formed in (
        CompletionBody(prompt="x", structured_outputs={"regex": "a"}), ChatBody(messages=[TURN], tools=[tool]),
        ChatBody(messages=[TURN], response_format={"type": "json_object"}),
        ResponsesBody(input="x", text={"format": {"type": "json_schema", "schema": schema}}),
        CountTokensBody(messages=[TURN], output_config={"format": {"type": "json_schema", "schema": schema}}),
    ):  # fmt: skip
        assert lanes.of(formed) is lanes.forms


@pytest.fixture(scope="module")
def server(base_folder, adapters, tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("laned")
    shutil.copytree(adapters["lora"].path, folder / "lora")
    running = Server(base_folder, folder, ServerLimits(trust_request_templates=True))
    yield running
    running.stop()


def ready(server: Server) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(f"{server.url}/ready") as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_stuck_threads_are_shown_and_hold_nobody_else(server, monkeypatch):
    may_end = threading.Event()
    monkeypatch.setattr(Forms, "form", lambda self, asked: may_end.wait(PATIENCE) and 1 // 0)
    monkeypatch.setattr(server.app.state.lanes.forms, "_seconds", 0.2)
    body = {"prompt": "x", "max_tokens": 1, "structured_outputs": {"choice": ["a"]}}
    told = [server.post("/v1/completions", body) for _ in range(5)]
    assert [status for status, _ in told] == [400, 400, 400, 400, 503]
    assert ready(server) == (200, {"ready": True, "stuck": {"forms": 4}})
    metrics = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
    assert 'veneer:stuck_threads{engine="0",lane="forms",model_name="tiny"} 4.0' in metrics
    assert server.client.completions.create(model="lora", prompt="x", max_tokens=1).choices
    assert server.client.models.list().data
    with urllib.request.urlopen(f"{server.url}/v1/adapters") as answer:
        assert [card["id"] for card in json.load(answer)["data"]] == ["lora"]
    may_end.set()
    server.wait(lambda: not server.app.state.lanes.stuck)
    monkeypatch.undo()
    assert server.post("/v1/completions", body)[0] == 200


def test_a_server_whose_threads_of_prompts_are_stuck_is_not_ready(server, monkeypatch):
    may_end = threading.Event()
    monkeypatch.setattr(prompts.PromptReader, "read", lambda self, prompt: may_end.wait(PATIENCE) and 1 // 0)
    monkeypatch.setattr(server.app.state.lanes.prompts, "_seconds", 0.2)
    for _ in range(6):
        assert server.post("/v1/completions", {"prompt": "x"})[0] == 400
    status, told = ready(server)
    assert (status, "all 6 threads that read prompts are stuck" in told["error"]["message"]) == (503, True)
    assert server.client.models.list().data
    may_end.set()
    server.wait(lambda: not server.app.state.lanes.stuck)
    assert ready(server)[0] == 200


def test_a_large_body_that_is_not_read_in_time_is_told_to_come_again(server, monkeypatch):
    monkeypatch.setattr(server.app.state.lanes.bodies, "n_threads", 0)
    sent = urllib.request.Request(
        f"{server.url}/v1/completions", b'{"prompt": "%s"}' % (b"x" * 70_000), {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(sent)
    assert (refused.value.code, refused.value.headers["Retry-After"]) == (503, "60")
    assert "all 0 threads that read bodies are busy" in json.load(refused.value)["error"]["message"]
    assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 1})[0] == 200


def test_a_template_of_one_long_call_is_an_error_of_who_asked(server, monkeypatch):
    monkeypatch.setattr(server.app.state.sandboxes[0], "seconds", 1.5)
    body = {"messages": [TURN], "chat_template": "{% set x = 7 ** 30000000 %}", "max_tokens": 1}
    status, told = server.post("/v1/chat/completions", body)
    assert (status, "the chat template was not run to its end" in told["error"]["message"]) == (400, True)


def test_fields_that_are_far_too_large_are_refused(server):
    for field in ({"structured_outputs": {"choice": ["ab"] * 200_000}}, {"bad_words": ["ab"] * 300_000}):
        status, told = server.post("/v1/completions", {"prompt": "x", **field})
        assert (status, told["error"]["param"]) == (400, next(iter(field)))
