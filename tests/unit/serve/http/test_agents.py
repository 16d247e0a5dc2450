"""Agents' loops on SmolLM2-135M-Instruct, whose chat template knows no tools, by openai's and anthropic's clients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from veneer.serve.start import EngineOptions
from veneer.store.known import model_folder

from .test_server import Server

pytestmark = pytest.mark.model
SCHEMA: Any = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
NAMES = ("get_weather", "get_time")
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "description": f"{name} of a city.", "parameters": SCHEMA}}
    for name in NAMES
]
QUESTION: Any = {"role": "user", "content": "What is the weather in Paris?"}
ASKED: Any = {"model": "smol", "tools": TOOLS, "temperature": 0, "max_tokens": 64}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    folder = model_folder("smollm2-135m-instruct")
    options = EngineOptions(dtype="float32")  # in bfloat16 some tokens are tied
    running = Server(folder, folder / "none", names=("smol",), options=options)
    yield running
    running.stop()


def told(calls: Any) -> list[tuple[str, str]]:
    return [(call.function.name, json.loads(call.function.arguments)["city"]) for call in calls or []]


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_loop_of_openais_client(server, parallel, stream):
    def ask(turns: list[Any], **given: Any) -> Any:
        asked = ASKED | {"messages": turns, "parallel_tool_calls": parallel} | given
        if not stream:
            return server.client.chat.completions.create(**asked).choices[0]
        with server.client.chat.completions.stream(**asked) as events:
            return events.get_final_completion().choices[0]

    turns = [QUESTION]
    first = ask(turns, tool_choice="required")
    assert (first.finish_reason, first.message.content or None) == ("tool_calls", None)
    calls = told(first.message.tool_calls)
    assert calls[0] == ("get_weather", "Paris")
    assert len(calls) == 1 or parallel
    turns += [first.message.model_dump(exclude_none=True, exclude={"parsed"})]
    for call in first.message.tool_calls:
        turns.append({"role": "tool", "tool_call_id": call.id, "content": "17 degrees, sunny"})
    second = ask(turns, tool_choice="auto")  # this model calls once more, and its call is read
    assert second.finish_reason == "tool_calls"
    assert told(second.message.tool_calls)[0] in [(name, "Paris") for name in NAMES]
    named = ask(turns, tool_choice={"type": "function", "function": {"name": "get_time"}})
    assert {name for name, _ in told(named.message.tool_calls)} == {"get_time"}
    last = ask(turns, tool_choice="none", stop=["."])
    assert (last.message.tool_calls or None, bool(last.message.content)) == (None, True)


def test_text_that_is_no_call_is_text(server):
    answer = server.client.chat.completions.create(**ASKED | {"messages": [QUESTION]}).choices[0]
    assert (answer.message.tool_calls, bool(answer.message.content)) == (None, True)


def test_a_loop_of_anthropics_client(server):
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    tools: Any = [{"name": name, "description": f"{name} of a city.", "input_schema": SCHEMA} for name in NAMES]
    asked: Any = {"model": "smol", "max_tokens": 64, "tools": tools, "extra_body": {"temperature": 0}}
    turns: list[Any] = [QUESTION]
    for choice in ("any", "auto"):
        with client.messages.stream(**asked, messages=turns, tool_choice={"type": choice}) as stream:
            message = stream.get_final_message()
        uses = [block for block in message.content if block.type == "tool_use"]
        assert message.stop_reason == "tool_use"
        assert (uses[0].name in NAMES, uses[0].input) == (True, {"city": "Paris"})
        results = [{"type": "tool_result", "tool_use_id": use.id, "content": "17 degrees, sunny"} for use in uses]
        turns += [{"role": "assistant", "content": message.content}, {"role": "user", "content": results}]
    last = client.messages.create(**asked, messages=turns, tool_choice={"type": "none"})
    assert [block.type for block in last.content] == ["text"]
