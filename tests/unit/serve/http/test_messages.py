"""Messages by anthropic's client: blocks, tools, streams of events, and errors in Anthropic's form."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import anthropic
import pytest
from tests.unit.serve.conftest import byte_tokenizer

from veneer import CompletionOutput, RequestOutput, SamplingParams
from veneer.errors import ConfigError
from veneer.serve.http.errors import RefusedError
from veneer.serve.http.message_blocks import messages_of
from veneer.serve.http.message_writer import MessageWriter
from veneer.serve.requests.calls import calls_of
from veneer.serve.requests.prompts import PromptReader
from veneer.serve.tool_calls.functions import Function, Tools

from .test_server import Server

BODY: Any = {"model": "lora", "max_tokens": 9, "temperature": 0}
ASKED: Any = {"model": "lora", "max_tokens": 9, "extra_body": {"temperature": 0}}  # the client has no such argument
TURN: Any = {"role": "user", "content": "x"}
SCHEMA = {"type": "object", "properties": {"a": {"enum": [17]}}, "required": ["a"], "additionalProperties": False}
TOOL: Any = {"name": "add", "description": "Adds.", "input_schema": SCHEMA}
USE = {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 17}}
RESULT = {"type": "tool_result", "tool_use_id": "c1", "content": "4"}


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


@pytest.fixture(scope="module")
def client(server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


def test_a_message_is_a_chat_completion(server, client):
    system = [{"type": "text", "text": "y", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "z"}]
    turns: Any = [TURN, {"role": "user", "content": [{"type": "text", "text": "w"}]}]
    message = client.messages.create(**ASKED, system=system, messages=turns, metadata={"user_id": "u"})
    told: Any = [{"role": "system", "content": "y\nz"}, {"role": "user", "content": "x\nw"}]
    chat = server.client.chat.completions.create(model="lora", messages=told, temperature=0, max_tokens=9)
    [block] = message.content
    assert (block.type, block.text) == ("text", chat.choices[0].message.content)
    assert (message.type, message.role, message.model) == ("message", "assistant", "lora")
    assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None)
    n_read = len("system: y\nz\nuser: x\nw\nassistant: ")
    assert (message.usage.input_tokens, message.usage.output_tokens) == (n_read, 9)
    with client.messages.stream(**ASKED, system="y\nz", messages=turns) as stream:
        events = list(stream)
    final = stream.get_final_message()
    assert final.content[0].text == block.text
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 9)
    assert (final.usage.input_tokens, final.usage.cache_read_input_tokens) == (n_read - 32, 32)  # two pages
    kinds = [event.type for event in events if event.type != "text"]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert len(kinds) > 9


def test_a_stop_sequence_ends_it(client):
    whole = client.messages.create(**ASKED, messages=[TURN]).content[0].text
    stop = whole[3:5]
    message = client.messages.create(**ASKED, messages=[TURN], stop_sequences=["no such", stop])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert message.content[0].text == whole[: whole.index(stop)]
    more = {"max_tokens": 500, "extra_body": {"ignore_eos": True, "top_k": 5}}
    full = client.messages.create(**ASKED | more, messages=[TURN])
    assert (full.stop_reason, full.usage.output_tokens) == ("model_context_window_exceeded", 127 - 19)


def test_a_last_turn_of_the_assistant_is_continued(server, client):
    turns: Any = [TURN, {"role": "assistant", "content": "so"}]
    message = client.messages.create(**ASKED, messages=turns)
    text = server.client.completions.create(model="lora", prompt="user: x\nassistant: so", temperature=0, max_tokens=9)
    assert message.content[0].text == text.choices[0].text
    assert client.messages.count_tokens(model="lora", messages=turns).input_tokens == len("user: x\nassistant: so")


def test_a_call_is_a_block_and_its_result_is_read(tooled):
    """Calls are JSON, and tools are described, on a template that shows no format."""
    client = anthropic.Anthropic(base_url=tooled.url, api_key="none", max_retries=0)
    asked: Any = {
        "model": "tiny", "max_tokens": 99, "messages": [TURN], "tools": [TOOL],
        "tool_choice": {"type": "tool", "name": "add", "disable_parallel_tool_use": True},
    }  # fmt: skip
    whole = client.messages.create(**asked)
    [call] = whole.content
    assert (call.type, call.name, call.input, whole.stop_reason) == ("tool_use", "add", {"a": 17}, "tool_use")
    with client.messages.stream(
        **asked | {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
    ) as stream:
        events = list(stream)
    [streamed] = stream.get_final_message().content
    assert (streamed.name, streamed.input, streamed.id) == ("add", {"a": 17}, events[1].content_block.id)
    parts = [event.partial_json for event in events if event.type == "input_json"]
    assert ("".join(parts), len(parts) > 1) == ('{"a": 17}', True)
    turns: Any = [
        TURN, {"role": "assistant", "content": [call.to_dict()]},
        {"role": "user", "content": [RESULT | {"tool_use_id": call.id}, {"type": "text", "text": "so"}]},
    ]  # fmt: skip
    answer = client.messages.create(model="tiny", max_tokens=9, messages=turns)
    said = '{"name": "add", "arguments": {"a": 17}}'
    told = f"user: x\nassistant: {said}\nuser: Result of add: 4\nso\nassistant: "
    assert answer.usage.input_tokens + answer.usage.cache_read_input_tokens == len(told)
    assert client.messages.count_tokens(model="tiny", messages=turns).input_tokens == len(told)
    again = client.messages.create(model="tiny", max_tokens=9, messages=turns, tools=[TOOL])
    described = client.messages.count_tokens(model="tiny", messages=turns, tools=[TOOL]).input_tokens
    assert again.usage.input_tokens + again.usage.cache_read_input_tokens == described > len(told) + 200


def test_answers_are_what_is_documented(server, tooled):
    server.documented("/v1/messages", BODY | {"messages": [TURN], "stop_sequences": ["e"]})
    forced = {"model": "tiny", "max_tokens": 99, "messages": [TURN], "tools": [TOOL], "tool_choice": {"type": "any"}}
    assert tooled.documented("/v1/messages", forced)["content"][0]["type"] == "tool_use"


def test_json_of_a_schema(client):
    form: Any = {"format": {"type": "json_schema", "schema": SCHEMA}}
    blanks = {str(ord(c)): -100 for c in " \t\n\r"}
    message = client.messages.create(
        model="tiny", max_tokens=40, messages=[TURN], output_config=form, extra_body={"logit_bias": blanks}
    )
    assert (message.content[0].text, message.stop_reason) == ('{"a":17}', "end_turn")


def test_blocks_are_turns():
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 17}'}}
    found = messages_of("i", [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "t"},
        {"role": "assistant", "content": [{"type": "text", "text": "u"}, USE]},
        {"role": "assistant", "content": [USE | {"id": "c2"}]},
        {"role": "assistant", "content": "v"},
        {"role": "user", "content": [RESULT, {**RESULT, "content": [{"type": "text", "text": "5"}], "is_error": True}]},
        {"role": "user", "content": [{**RESULT, "content": None}, {"type": "text", "text": "so"}]},
        {"role": "system", "content": "be brief"},
    ])  # fmt: skip
    tool = {"role": "tool", "tool_call_id": "c1", "name": "add"}
    assert found == [
        {"role": "system", "content": "i"},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "t\nu\nv", "tool_calls": [call, call | {"id": "c2"}]},
        tool | {"content": "4"}, tool | {"content": "5"}, tool | {"content": ""},
        {"role": "user", "content": "so"},
        {"role": "system", "content": "be brief"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    "message",
    [
        {"role": "x" * 999},
        {"role": "user", "x" * 999: 1},
        {"role": "user", "content": [{"type": "x" * 999}]},
        {"role": "user", "content": [RESULT | {"tool_use_id": "x" * 999}]},
    ],
)
def test_refusals_do_not_send_long_values_back(message):
    with pytest.raises(RefusedError) as refused:
        messages_of(None, [message])
    assert "x" * 50 in str(refused.value)
    assert "x" * 101 not in str(refused.value) + refused.value.param


def test_text_and_calls_are_blocks_in_their_order():
    """A call behind text ends its block; what is cut keeps the arguments that are there."""
    template = "{% for m in messages %}{% for c in m.tool_calls or [] %}[[{{ c.function.name }} <- "
    template += "{{ c.function.arguments | tojson }}]]{% endfor %}{{ m.content }}{% endfor %}{{ tools }}"
    reader = PromptReader(byte_tokenizer(), 99, (template,))
    calls = calls_of(Tools([Function(name="add", parameters=SCHEMA)]), reader)
    asked: Any = SimpleNamespace(params=SamplingParams(max_tokens=7), prompt_ids=(1, 2, 3))
    writer = MessageWriter("tiny", asked, calls)
    texts = ["so", " [[ad", 'd <- {"a"', ":1}]] and", ' then [[add <- {"a":', ' 2, "b": ']
    last = CompletionOutput(0, "tru", [1], finish_reason="length")
    outputs = [*(CompletionOutput(0, text, [1]) for text in texts), last]
    events = [
        json.loads(json.dumps(event))
        for output in outputs
        for event in writer.take(RequestOutput("0", None, [], None, [output], num_cached_tokens=2))
    ]
    content = writer.whole()["content"]
    assert [block["type"] for block in content] == ["text", "tool_use"] * 2
    assert [block.get("input") or block["text"].strip() for block in content] == ["so", {"a": 1}, "and then", {"a": 2}]
    started = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    assert [block.get("input", block.get("text")) for block in started] == ["", {}, "", {}]
    assert [event["index"] for event in events if event["type"] == "content_block_stop"] == [0, 1, 2, 3]
    assert events[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert (writer.whole()["usage"]["input_tokens"], writer.whole()["usage"]["output_tokens"]) == (1, 7)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"max_tokens": None}, "max_tokens: must be a whole number"),
        ({"messages": []}, "messages is empty: give at least one"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "messages.0.role='boss' is unknown: give one of user,"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.content.0.type='image' is not"),
        ({"messages": [{"role": "user", "content": [USE]}]}, "'tool_use' is not read here: give text or tool_result"),
        ({"messages": [{"role": "user", "content": [RESULT]}]}, "tool_use_id='c1' names no earlier tool_use"),
        ({"messages": [{"role": "user", "content": 3}]}, "content=3 is not a message's content: give text, or a list"),
        ({"messages": [{"role": "user", "name": "x"}]}, "unknown field 'messages.0.name': there are content, role"),
        (
            {"messages": [TURN, {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "n"}]}]},
            "messages.1.content.0.input=None is not an object: give the arguments",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content.0.text=None is not text: give a"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking: type='enabled' is not offered"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "ad"}}, "did you mean 'add'"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format must be"),
        ({"stop_sequence": ["x"]}, "unknown field 'stop_sequence'; did you mean 'stop_sequences'?"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(server, body, said):
    status, told = server.post("/v1/messages", BODY | {"messages": [TURN]} | body)
    assert (status, told["type"], told["error"]["type"]) == (400, "error", "invalid_request_error")
    assert said in told["error"]["message"]
    assert len(told["request_id"]) == 32


def test_errors_are_those_of_the_client(server, client, monkeypatch):
    with pytest.raises(anthropic.NotFoundError, match="no model 'nobody'") as missing:
        client.messages.create(**ASKED | {"model": "nobody"}, messages=[TURN])
    assert missing.value.body["error"]["type"] == "not_found_error"
    assert missing.value.request_id == missing.value.body["request_id"]
    with pytest.raises(anthropic.APIStatusError, match="no route 'GET /v1/messages'; use POST"):
        client.get("/v1/messages", cast_to=object)
    monkeypatch.setattr(server.engine.runner, "run", lambda plan: _raise())
    with pytest.raises(anthropic.BadRequestError, match="broken on purpose"):
        client.messages.create(**ASKED, messages=[TURN])
    with pytest.raises(anthropic.APIStatusError, match="broken on purpose"):
        list(client.messages.create(**ASKED, messages=[TURN], stream=True))


def _raise() -> Any:
    raise ConfigError("broken on purpose")
