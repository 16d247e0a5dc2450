"""Tools over HTTP, asked by the openai client, on a model whose text is noise."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import transformers
from tests.unit.serve.conftest import SHAPE
from tests.unit.serve.tool_templates import TEMPLATES, tokenizer_of
from transformers import AutoModelForCausalLM

from veneer.serve.http.protocol import ChatBody
from veneer.serve.http.server_limits import ServerLimits

from .test_server import TURN, Server

SCHEMA = {
    "type": "object",
    "properties": {"unit": {"enum": ["C", "F"]}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["unit", "days"],
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("base of tools")
    config = transformers.LlamaConfig(**SHAPE | {"max_position_embeddings": 2048})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer_of(TEMPLATES["list"]).save_pretrained(folder)
    running = Server(folder, folder / "none", ServerLimits(trust_request_templates=True))
    yield running
    running.stop()


def ask(server: Server, name: str = "list", **given):
    body = {"model": "tiny", "messages": [TURN], "tools": TOOLS, "max_tokens": 700, **given}
    extra = {"chat_template": TEMPLATES[name]} | body.pop("extra_body", {})
    return server.client.chat.completions.create(**body, extra_body=extra)


def made(message) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in message.tool_calls or []]


def fits(name: str, arguments: str) -> bool:
    told = json.loads(arguments)
    return told == {} if name == "now" else told["unit"] in "CF" and 1 <= told["days"] <= 7 and len(told) == 2


@pytest.mark.parametrize("name", TEMPLATES)
def test_forced_calls_are_equal_whole_and_streamed(server, name):
    for seed in range(2):
        asked = {"tool_choice": "required", "seed": seed, "temperature": 1.0}
        whole = ask(server, name, **asked).choices[0]
        assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
        calls = made(whole.message)
        assert calls
        assert all(fits(*call) for call in calls)
        extra = {"chat_template": TEMPLATES[name]}
        with server.client.chat.completions.stream(
            model="tiny", messages=[TURN], tools=TOOLS, max_tokens=700, extra_body=extra, **asked
        ) as stream:
            final = stream.get_final_completion().choices[0]
        assert (made(final.message), final.finish_reason) == (calls, "tool_calls")
        assert not final.message.content
    one = ask(server, name, tool_choice=tool(name="weather"), seed=1)
    assert {call for call, _ in made(one.choices[0].message)} == {"weather"}


def test_calls_are_what_is_documented(server):
    body = {"messages": [TURN], "tools": TOOLS, "max_tokens": 700, "tool_choice": "required", "seed": 2}
    answer = server.documented("/v1/chat/completions", body | {"chat_template": TEMPLATES["list"]})
    assert answer["choices"][0]["message"]["tool_calls"]


def test_calls_come_in_pieces(server):
    choice = {"type": "function", "function": {"name": "weather"}}
    parts = list(ask(server, tool_choice=choice, parallel_tool_calls=False, seed=3, stream=True))
    deltas = [call for part in parts for call in part.choices[0].delta.tool_calls or []]
    assert deltas[0].id
    assert deltas[0].function.name
    assert [delta.index for delta in deltas] == [0] * len(deltas)
    assert all(delta.id is None for delta in deltas[1:])
    assert len(deltas) >= 2
    assert fits("weather", "".join(delta.function.arguments for delta in deltas))


def test_several_choices_each_have_their_calls(server):
    asked = {"tool_choice": "required", "n": 3, "seed": 5, "temperature": 1.0}
    whole = [made(choice.message) for choice in ask(server, **asked).choices]
    assert all(fits(*call) for calls in whole for call in calls)
    found: dict[int, dict[int, list[str]]] = {}
    for part in ask(server, stream=True, **asked):
        choice = part.choices[0]
        for call in choice.delta.tool_calls or []:
            each = found.setdefault(choice.index, {}).setdefault(call.index, ["", ""])
            each[0] += call.function.name or ""
            each[1] += call.function.arguments or ""
    assert [[tuple(call) for call in found[i].values()] for i in range(3)] == whole


def test_log_probabilities_are_those_of_all_tokens(server):
    answer = ask(server, "brackets", tool_choice="required", parallel_tool_calls=False, logprobs=True)
    tokens = [each.token for each in answer.choices[0].logprobs.content]
    assert "".join(tokens).startswith("[[")
    assert len(tokens) == answer.usage.completion_tokens


def test_an_answer_without_calls_is_text(server):
    answer = ask(server, "brackets", temperature=0.0, max_tokens=9, extra_body={"allowed_token_ids": [97, 98]})
    message = answer.choices[0].message
    assert (message.tool_calls, len(message.content), answer.choices[0].finish_reason) == (None, 9, "length")


def test_an_answer_is_calls_or_json_of_a_schema(server):
    schema = {"type": "object", "properties": {"a": {"enum": [17]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    blank = {str(ord(c)): -100 for c in " \t\n\r"}  # brackets need none in calls of now
    found = set()
    for seed in range(6):
        answer = ask(server, "brackets", tools=TOOLS[1:], response_format=form, seed=seed, logit_bias=blank).choices[0]
        found.add(answer.finish_reason)
        assert made(answer.message) or answer.message.content == '{"a":17}'
    assert found == {"stop", "tool_calls"}


def test_the_openapi_has_the_tools(server):
    schemas = server.client.get("../openapi.json", cast_to=object)["components"]["schemas"]
    assert schemas["FunctionBody"]["required"] == ["name"]
    assert "tool_choice" in schemas["ChatBody"]["properties"]


def test_a_call_that_is_cut_has_the_reason(server):
    choice = {"type": "function", "function": {"name": "weather"}}
    cut = ask(server, "brackets", tool_choice=choice, max_tokens=len("[[weather <- {")).choices[0]
    assert (cut.finish_reason, made(cut.message)) == ("length", [("weather", "{")])


def test_the_conversation_and_the_tools_reach_the_template(server):
    def turns(content, arguments) -> list:
        call = {"id": "abcdefghi", "type": "function", "function": {"name": "now", "arguments": arguments}}
        answer = {"role": "assistant", "content": content, "tool_calls": [call]}
        return [TURN, answer, {"role": "tool", "tool_call_id": "abcdefghi", "content": "noon"}]

    reader = server.engine.readers.base
    for more in ({"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "none"}, {}):
        body = {"messages": turns(None, '{"a":1}'), "max_tokens": 1, **more}
        status, answer = server.post("/v1/chat/completions", body)
        assert status == 200
        shown = {"tools": TOOLS} if more == {"tools": TOOLS} else {}
        _, ids = reader.chat(turns("", {"a": 1}), {"add_generation_prompt": True, **shown})
        assert answer["usage"]["prompt_tokens"] == len(ids)


@pytest.mark.parametrize("levels", [300, 900, 3000])
def test_what_is_nested_too_deep_is_the_clients_fault(server, levels):
    text = '{"a":' * levels + "1" + "}" * levels
    body = json.dumps({"messages": [TURN], "max_tokens": 1, "tools": [tool(parameters="SCHEMA")]})
    status, _ = server.post("/v1/chat/completions", body.replace('"SCHEMA"', text).encode())
    assert status == 400
    call = {"id": "x", "type": "function", "function": {"name": "now", "arguments": text}}
    turns = [TURN, {"role": "assistant", "tool_calls": [call]}]
    status, _ = server.post("/v1/chat/completions", {"messages": turns, "max_tokens": 1})
    assert status in (200, 400)


def tool(**function) -> dict:
    return {"type": "function", "function": {"name": "f", **function}}


@pytest.mark.parametrize(
    ("given", "said", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools.0.function: is missing", "tools.0.function"),
        ({"tools": [{"type": "retrieval"}]}, "tools.0.type", "tools.0.type"),
        ({"tools": [TOOLS[1] | {"extra": 1}]}, "unknown field 'tools.0.extra'", "tools.0.extra"),
        ({"tools": [tool(name="a b")]}, "'a b' is invalid: 1 to 64", "tools"),
        ({"tools": [TOOLS[1], TOOLS[1]]}, "two tools have the name 'now'", "tools"),
        ({"tools": [tool(parameters={"type": "array"})]}, "type 'array'", "tools"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "'none', 'auto' or 'required'", "tool_choice"),
        ({"tools": TOOLS, "tool_choice": tool(name="wether")}, "did you mean 'weather'", "tools"),
        ({"tool_choice": "required"}, "tools is empty", "tools"),
        ({"tools": TOOLS, "tool_choice": "required", "stop": "x"}, "which stop could cut", None),
        (
            {"tools": [tool(parameters={"properties": {"a": {"type": "x"}}})], "tool_choice": "required"},
            "tools (or a schema beside them) cannot be compiled", None,
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(server, given, said, param):
    status, answer = server.post("/v1/chat/completions", {"messages": [TURN], "max_tokens": 1, **given})
    assert status == 400
    assert said in answer["error"]["message"]
    assert answer["error"]["param"] == param


BARE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"


def test_a_template_without_a_format_is_forced_to_json(server):
    body = {"messages": [TURN], "tools": TOOLS, "max_tokens": 700, "chat_template": BARE}
    status, answer = server.post("/v1/chat/completions", body | {"tool_choice": "required"})
    assert status == 200
    status, _ = server.post("/v1/chat/completions", body | {"tool_choice": "none", "max_tokens": 1})
    assert status == 200
    calls = answer["choices"][0]["message"]["tool_calls"]
    assert all(fits(call["function"]["name"], call["function"]["arguments"]) for call in calls)


def test_calls_of_a_template_without_a_format_are_read_in_a_text(server):
    calls = ChatBody(messages=[TURN], tools=TOOLS, chat_template=BARE).calls(server.engine.readers.base)
    events = calls.parser().feed('Let me see.\n```json\n{"name": "now", "arguments": {}}\n```')
    assert [type(event).__name__ for event in events] == ["Text", "Begun", "Arguments", "Ended", "Text"]


CALL = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": '{"a": 1}'}}
TURNS = [
    {"role": "system", "content": "Be brief."}, TURN,
    {"role": "assistant", "content": [{"type": "text", "text": "Wait."}], "tool_calls": [CALL, CALL | {"id": "c2"}]},
    {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "one"}]},
    {"role": "user", "content": "y"},
]  # fmt: skip
SAID = 'assistant: Wait.\n{"name": "now", "arguments": {"a": 1}}\n{"name": "now", "arguments": {"a": 1}}\n'
RESULTS = "user: Result of now: noon\nResult of now: one\ny\n"
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
DROPS = BARE.replace("%}{{", "if m.role != 'system' %}{{", 1)


@pytest.mark.parametrize("template", [BARE, REFUSES + BARE, DROPS])
def test_functions_calls_and_results_are_words_for_a_template_without_them(server, template):
    reader = server.engine.readers.base
    turns = TURNS[1:] if template != BARE else TURNS
    body = ChatBody(messages=turns, tools=TOOLS, chat_template=template)
    [(text, _)] = body.read(reader, body.calls(reader))
    front, _, rest = text.partition("assistant: ")
    assert "assistant: " + rest == SAID + RESULTS
    assert front.startswith("system: Be brief.\n\nYou may call" if template == BARE else "user: You may call")
    assert front.endswith("user: x\n" if template == BARE else "\n\nx\n")
    assert [json.loads(line) for line in front.splitlines() if line.startswith('{"name": "weather"')] == [
        TOOLS[0]["function"]
    ]
    [(text, _)] = ChatBody(messages=turns, chat_template=template).read(reader)
    assert text.endswith("user: x\n" + SAID + RESULTS)
    assert "You may call" not in text


def test_no_messages_are_told_beside_tools(server):
    status, answer = server.post("/v1/chat/completions", {"messages": [], "tools": TOOLS, "chat_template": BARE})
    assert (status, "messages is empty" in answer["error"]["message"]) == (400, True)
