"""Responses by openai's client: items, forms, streams of events, and what needs a store."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from pydantic import BaseModel
from tests.unit.serve.conftest import byte_tokenizer

from veneer import CompletionOutput, RequestOutput, SamplingParams
from veneer.errors import ConfigError
from veneer.serve.http.errors import RefusedError
from veneer.serve.http.response_body import ResponsesBody
from veneer.serve.http.response_items import messages_of
from veneer.serve.http.response_writer import ResponseWriter
from veneer.serve.requests.calls import calls_of
from veneer.serve.requests.prompts import PromptReader
from veneer.serve.tool_calls.functions import Function, Tools

from .test_server import Server

ASKED = {"model": "lora", "temperature": 0, "max_output_tokens": 9}
SCHEMA = {"type": "object", "properties": {"a": {"enum": [17]}}, "required": ["a"], "additionalProperties": False}
BLANKS = {str(ord(c)): -100 for c in " \t\n\r"}
TOOL: Any = {"type": "function", "name": "add", "parameters": SCHEMA, "strict": True}
CALL = {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}'}


class Seventeen(BaseModel):
    """Type that `SCHEMA` describes."""

    a: int


@pytest.fixture(scope="module")
def tooled(long_folder) -> Iterator[Server]:
    running = Server(long_folder, long_folder / "none")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def server(base_folder, adapters, tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(adapters["lora"].path, folder / "lora")
    running = Server(base_folder, folder)
    yield running
    running.stop()


def chat(server: Server, *turns: tuple[str, str]) -> str:
    messages: Any = [{"role": role, "content": content} for role, content in turns]
    answer = server.client.chat.completions.create(
        model="lora", messages=messages, temperature=0, max_completion_tokens=9
    )
    return str(answer.choices[0].message.content)


def test_a_response_is_a_chat_completion(server):
    response = server.client.responses.create(**ASKED, input="x", instructions="y", metadata={"k": "v"}, user="u")
    assert response.output_text == chat(server, ("system", "y"), ("user", "x"))
    assert (response.object, response.status, response.model) == ("response", "incomplete", "lora")
    assert response.incomplete_details.reason == "max_output_tokens"
    [item] = response.output
    assert (item.type, item.role, item.status) == ("message", "assistant", "incomplete")
    assert (response.instructions, response.metadata, response.user) == ("y", {"k": "v"}, "u")
    assert (response.temperature, response.max_output_tokens, response.error) == (0, 9, None)
    assert response.to_dict()["store"] is False
    n_read = len("system: y\nuser: x\nassistant: ")
    usage = response.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (n_read, 9, n_read + 9)
    again = server.client.responses.create(**ASKED, input="x", instructions="y")
    assert again.usage.input_tokens_details.cached_tokens == 16  # a page, full with the beginning
    assert again.id != response.id


def test_items_are_turns(server):
    earlier = server.client.responses.create(**ASKED, input="x")
    items: list[Any] = [
        {"role": "developer", "content": "y"},
        {"role": "user", "content": [{"type": "input_text", "text": "x"}, {"type": "input_text", "text": "z"}]},
        *[each.to_dict() for each in earlier.output],
        {"type": "message", "role": "user", "content": "w"},
    ]
    response = server.client.responses.create(**ASKED, input=items)
    turns = (("system", "y"), ("user", "x\nz"), ("assistant", earlier.output_text), ("user", "w"))
    assert response.output_text == chat(server, *turns)


def test_calls_are_of_the_assistants_turn():
    found = messages_of("i", [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "t"}, {"type": "refusal", "refusal": "no"}]},
        CALL, CALL | {"call_id": "c2", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "3"}]},
        {"type": "function_call_output", "call_id": "c1", "output": "4", "id": "o", "status": None},
        CALL,
    ])  # fmt: skip
    calls = [
        {"id": id, "type": "function", "function": {"name": "add", "arguments": arguments}}
        for id, arguments in (("c1", '{"a": 1}'), ("c2", "{}"))
    ]
    assert found == [
        {"role": "system", "content": "i"},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "t\nno", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c2", "name": "add", "content": "3"},
        {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "4"},
        {"role": "assistant", "content": "", "tool_calls": calls[:1]},
    ]


@pytest.mark.parametrize(
    ("item", "said", "param"),
    [
        ({"type": "reasoning"}, "input.0.type='reasoning' is not read: message, function_call and", "input.0.type"),
        ({"content": "x"}, "input.0.type=None is not read", "input.0.type"),
        ({"role": "tool", "content": "x"}, "input.0.role='tool' must be one of user, assistant", "input.0.role"),
        ({"role": "user", "content": 3}, "input.0.content must be text or a list of parts", "input.0.content"),
        ({"role": "user", "content": ["x"]}, "input.0.content.0.type=None is not", "input.0.content.0.type"),
        ({"role": "user", "content": [{"type": "input_image"}]}, "='input_image' is not", "input.0.content.0.type"),
        ({"role": "user", "content": [{"type": "text"}]}, "content.0.text must be text", "input.0.content.0.text"),
        ({"role": "user", "contents": "x", "name": None}, "unknown field 'input.0.contents'", "input.0.contents"),
        ({"type": "function_call", "call_id": "x"}, "input.0.name must be text", "input.0.name"),
        ({"type": "function_call_output", "call_id": "x"}, "'x' names no earlier function_call", "input.0.call_id"),
    ],
)  # fmt: skip
def test_an_item_that_is_not_read_is_told(item, said, param):
    with pytest.raises(ConfigError) as refused:
        messages_of(None, [item])
    assert isinstance(refused.value, RefusedError)
    assert said in str(refused.value)
    assert refused.value.param == param


def test_a_form(server):
    form: Any = {"format": {"type": "json_schema", "name": "s", "schema": SCHEMA}}
    asked: Any = {"model": "tiny", "input": "x", "extra_body": {"logit_bias": BLANKS}}
    response = server.client.responses.create(**asked, text=form)
    assert (response.output_text, response.status, response.incomplete_details) == ('{"a":17}', "completed", None)
    assert response.output[0].status == "completed"
    assert response.text.format.type == "json_schema"
    parsed = server.client.responses.parse(**asked, text_format=Seventeen).output_parsed
    assert isinstance(parsed.a, int)


@pytest.mark.parametrize("asked", [{}, {"top_logprobs": 2, "include": ["message.output_text.logprobs"]}])
def test_a_stream_tells_the_response(server, asked):
    asked = ASKED | {"input": "x"} | asked
    whole = server.client.responses.create(**asked)
    with server.client.responses.stream(**asked) as stream:
        events = list(stream)
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert len(kinds) > 12
    assert [event.sequence_number for event in events] == list(range(len(events)))
    texts = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in texts) == texts[-1].snapshot == events[-4].text == whole.output_text
    last = events[-1].response
    assert {event.item_id for event in texts} == {last.output[0].id}
    assert last.output[0].content == whole.output[0].content
    assert last.usage == whole.usage.model_copy(update={"input_tokens_details": last.usage.input_tokens_details})
    assert (events[0].response.status, events[0].response.output, events[0].response.usage) == ("in_progress", [], None)
    scores = [score for event in texts for score in event.logprobs]
    assert [score.logprob for score in scores] == [score.logprob for score in last.output[0].content[0].logprobs]
    assert [len(score.top_logprobs) for score in scores] == ([2] * 9 if "top_logprobs" in asked else [])


def test_answers_are_what_is_documented(server, tooled):
    scored = {"top_logprobs": 2, "instructions": "y", "metadata": {"k": "v"}, "user": "u"}
    assert server.documented("/v1/responses", ASKED | {"input": "x"} | scored)["output"][0]["content"][0]["logprobs"]
    forced = {"model": "tiny", "input": "x", "tools": [TOOL], "tool_choice": {"type": "function", "name": "add"}}
    assert tooled.documented("/v1/responses", forced)["output"][0]["type"] == "function_call"


def test_a_call_is_an_item(tooled):
    """Calls are JSON, and tools are described, on a template that shows no format."""
    server = tooled
    asked: Any = {
        "model": "tiny", "input": "x", "tools": [TOOL], "tool_choice": {"type": "function", "name": "add"},
        "parallel_tool_calls": False,
    }  # fmt: skip
    whole = server.client.responses.create(**asked)
    [call] = whole.output
    assert (call.type, call.name, call.arguments, call.status) == ("function_call", "add", '{"a": 17}', "completed")
    assert (whole.status, whole.output_text, whole.parallel_tool_calls) == ("completed", "", False)
    assert (whole.tools[0].name, whole.tools[0].parameters, whole.tool_choice.name) == ("add", SCHEMA, "add")
    with server.client.responses.stream(**asked) as stream:
        events = list(stream)
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:3] == ["created", "in_progress", "output_item.added"]
    assert kinds[-3:] == ["function_call_arguments.done", "output_item.done", "completed"]
    assert set(kinds[3:-3]) == {"function_call_arguments.delta"}
    assert "".join(event.delta for event in events[3:-3]) == events[-3].arguments == '{"a": 17}'
    [told] = stream.get_final_response().output
    assert (told.name, told.arguments, told.status, told.id) == ("add", '{"a": 17}', "completed", events[-3].item_id)
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "4"}
    turns = [{"role": "user", "content": "x"}, call.to_dict(), output]
    answer = server.client.responses.create(**ASKED | {"model": "tiny"}, input=turns)
    said = '{"name": "add", "arguments": {"a": 17}}'
    assert answer.usage.input_tokens == len(f"user: x\nassistant: {said}\nuser: Result of add: 4\nassistant: ")


def test_text_and_calls_are_items_in_their_order():
    """A call behind text ends the message, text behind a call begins another, and what is cut is incomplete."""
    writer = writer_of_calls()
    texts = ["so", " [[ad", 'd <- {"a"', ":1}]] and", ' then [[add <- {"a":']
    events = [event for text in texts for event in copied(writer.take(told(text)))]
    events += copied(writer.take(told("2", finish_reason="length")))
    assert [each["type"] for each in writer.whole()["output"]] == ["message", "function_call"] * 2
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert [item["status"] for item in done] == ["completed"] * 3 + ["incomplete"]
    assert [item.get("arguments") or item["content"][0]["text"].strip() for item in done] == [
        "so", '{"a":1}', "and then", '{"a":2',
    ]  # fmt: skip
    assert done == writer.whole()["output"]
    assert [event["output_index"] for event in events if "item" in event] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert writer.whole()["incomplete_details"] == {"reason": "max_output_tokens"}


def writer_of_calls() -> ResponseWriter:
    """A writer for a model that writes calls as ``[[add <- {"a": 1}]]``."""
    template = "{% for m in messages %}{% for c in m.tool_calls or [] %}[[{{ c.function.name }} <- "
    template += "{{ c.function.arguments | tojson }}]]{% endfor %}{{ m.content }}{% endfor %}{{ tools }}"
    reader = PromptReader(byte_tokenizer(), 99, (template,))
    calls = calls_of(Tools([Function(name="add", parameters=SCHEMA)]), reader)
    asked: Any = SimpleNamespace(params=SamplingParams(), prompt_ids=(1, 2, 3))
    return ResponseWriter(ResponsesBody(input="x"), "tiny", asked, calls)


def told(text: str, **more: Any) -> RequestOutput:
    return RequestOutput("0", None, [], None, [CompletionOutput(0, text, [1], **more)])


def copied(events: Any) -> list[Any]:
    """Events as they are when they come."""
    return [json.loads(json.dumps(event)) for event in events]


def test_an_answer_without_text_is_a_message_too(server):
    asked: Any = ASKED | {"input": "x", "extra_body": {"logit_bias": {"256": 100}}}
    with server.client.responses.stream(**asked) as stream:
        events = list(stream)
    assert len(events) == 8
    last = stream.get_final_response()
    assert (last.output_text, last.status, last.usage.output_tokens) == ("", "completed", 1)


def test_a_stream_that_fails_tells_why(server, monkeypatch):
    def breaks(plan: Any) -> Any:
        raise ConfigError("broken on purpose")

    monkeypatch.setattr(server.engine.runner, "run", breaks)
    *_, last = server.client.responses.create(**ASKED, input="x", stream=True)
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert (last.response.error.code, last.response.error.message) == ("invalid_prompt", "broken on purpose")
    with pytest.raises(openai.BadRequestError, match="broken on purpose"):
        server.client.responses.create(**ASKED, input="x")


def test_events_have_names(server):
    body = json.dumps(ASKED | {"input": "x", "stream": True}).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{server.url}/v1/responses", body, headers)) as answer:
        blocks = answer.read().decode().strip().split("\n\n")
    for block in blocks:
        name, data = block.split("\n")
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"


@pytest.mark.parametrize(
    ("body", "said", "param"),
    [
        ({"previous_response_id": "resp_1"}, "no response is stored: send the earlier turns", "previous_response_id"),
        ({"conversation": {"id": "c"}}, "conversation: no conversation is stored", "conversation"),
        ({"background": True}, "background: no response is stored: wait for it", "background"),
        ({"truncation": "auto"}, "truncation: input is never truncated", "truncation"),
        ({"prompt": {"id": "p"}}, "no prompt is stored: send instructions and input", "prompt"),
        ({"reasoning": {"effort": "low", "mode": 1}}, "unknown field 'reasoning.mode'", "reasoning.mode"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type='xml' must be one of", "text.format"),
        ({"text": {"format": {"type": "json_schema"}}}, "json_schema needs a schema", "text.format.schema"),
        ({"text": {"verbose": "low"}}, "unknown field 'text.verbose'", "text.verbose"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type: must be 'function'", "tools.0.name"),
        ({"tools": [TOOL | {"async": True}]}, "unknown field 'tools.0.async'", "tools.0.async"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "ad"}}, "did you mean 'add'", "tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "'function'", "tool_choice.type"),
        ({"max_output_tokens": 0}, "must be at least 1", "max_output_tokens"),
        ({"max_tokens": 5}, "unknown field 'max_tokens'; did you mean 'max_output_tokens'", "max_tokens"),
        ({"messages": []}, "unknown field 'messages'; did you mean 'input'", "messages"),
        ({"max_output": 5}, "unknown field 'max_output'; did you mean 'max_output_tokens'", "max_output"),
        ({"input": [{"role": "user"}]}, "input.0.content must be text", "input.0.content"),
        ({"input": []}, "input is empty: give text", "input"),
        ({"temperature": 3}, "temperature=3.0 must be between 0 and 2", "temperature"),
        ({"include": ["file_search_call.results"]}, "include.0: must be", "include.0"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(server, body, said, param):
    status, answer = server.post("/v1/responses", {"input": "x", **body})
    assert (status, answer["error"]["param"]) == (400, param)
    assert said in answer["error"]["message"]


def test_what_means_nothing_here_is_accepted(server):
    body = {
        "input": "x", "max_output_tokens": 1, "store": True, "background": False, "truncation": "disabled",
        "reasoning": None, "previous_response_id": None, "prompt_cache_key": "k", "safety_identifier": "s",
        "include": ["reasoning.encrypted_content"], "stream_options": {"include_obfuscation": False},
    }  # fmt: skip
    status, answer = server.post("/v1/responses", body)
    assert (status, answer["store"], answer["output"][0]["content"][0]["logprobs"]) == (200, False, [])


@pytest.mark.parametrize("stream", [False, True])
def test_half_of_a_surrogate_pair_that_a_client_sent_comes_back(server, stream):
    body = {**ASKED, "input": "x", "metadata": {"\ud800": "v"}, "stream": stream}
    asked = urllib.request.Request(
        f"{server.url}/v1/responses", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked) as answer:
        told = answer.read().decode()
    whole = json.loads(told.rpartition("data: ")[2])
    assert (whole["response"] if stream else whole)["metadata"] == {"\ud800": "v"}


def test_half_of_a_surrogate_pair_in_an_error_is_told(server):
    status, told = server.post("/v1/responses", {"input": [{"role": "user", "content": "x", "\ud800": 1}]})
    assert (status, told["error"]["param"]) == (400, "input.0.\\ud800")
