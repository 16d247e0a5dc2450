"""Calls of openai's client, as users make them. All but the refused behave as with the original.

The model's text is noise, so that a call shows the form of answers, and grammars their content.
"""

from __future__ import annotations

import asyncio
import json
import math
import socket
from typing import Any

import openai
import pytest

from .calls import (
    BLANKS,
    CHAT,
    FORM,
    FUNCTION,
    NAMED,
    PICTURE,
    TOOL,
    TURN,
    Calls,
    Paint,
)

CALLS = Calls()
alike, refused = CALLS.alike, CALLS.refused


@alike("chat")
def _(c):
    answer = c.chat()
    choice = answer.choices[0]
    assert (answer.object, answer.model, answer.id[:9]) == ("chat.completion", "tiny", "chatcmpl-")
    assert (choice.message.role, choice.finish_reason, choice.index) == ("assistant", "length", 0)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.completion_tokens == 5
    assert isinstance(answer.created, int)


@alike("chat: developer, system and parts of text")
def _(c):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    turns = [
        {"role": "developer", "content": "y"},
        {"role": "system", "content": "z"},
        {"role": "user", "content": parts},
    ]
    assert c.chat(messages=turns).choices[0].message.content is not None


@alike("chat: earlier turns")
def _(c):
    assert c.chat(messages=[TURN, {"role": "assistant", "content": "y"}, TURN]).usage.prompt_tokens > 20


@alike("chat: max_completion_tokens")
def _(c):
    answer = c.openai.chat.completions.create(model="tiny", messages=[TURN], max_completion_tokens=3)
    assert answer.usage.completion_tokens == 3


@alike("chat: n")
def _(c):
    assert [choice.index for choice in c.chat(n=3, temperature=1).choices] == [0, 1, 2]


@alike("chat: stop, one")
def _(c):
    whole = c.chat(temperature=0, logit_bias={"97": 60, "98": 60}, max_tokens=9).choices[0].message.content
    stop = whole[2:4]
    cut = c.chat(temperature=0, logit_bias={"97": 60, "98": 60}, max_tokens=9, stop=stop).choices[0]
    assert (cut.finish_reason, cut.message.content) == ("stop", whole[: whole.index(stop)])


@alike("chat: stop, several")
def _(c):
    assert c.chat(stop=["no such", "text"]).choices[0].finish_reason == "length"


@alike("chat: seed")
def _(c):
    found = [c.chat(seed=seed, temperature=1, max_tokens=9).choices[0].message.content for seed in (7, 7, 8)]
    assert found[0] == found[1] != found[2]


@alike("chat: temperature, top_p and penalties")
def _(c):
    assert c.chat(temperature=0.7, top_p=0.9, presence_penalty=0.5, frequency_penalty=-0.5)


@alike("chat: logit_bias")
def _(c):
    assert c.chat(temperature=0, logit_bias={"97": 100}).choices[0].message.content == "aaaaa"


@alike("chat: logprobs")
def _(c):
    [first, *_] = content = c.chat(logprobs=True, top_logprobs=3, temperature=0).choices[0].logprobs.content
    assert (len(content), len(first.top_logprobs)) == (5, 3)
    assert first.logprob == first.top_logprobs[0].logprob
    assert bytes(first.bytes).decode() == first.token


@alike("chat: stream")
def _(c):
    parts = list(c.chat(stream=True))
    assert (parts[0].object, parts[0].choices[0].delta.role) == ("chat.completion.chunk", "assistant")
    assert parts[-1].choices[0].finish_reason == "length"
    assert len({part.id for part in parts}) == 1


@alike("chat: stream with usage")
def _(c):
    *rest, last = c.chat(stream=True, stream_options={"include_usage": True})
    assert (last.choices, last.usage.completion_tokens) == ([], 5)
    assert all(part.usage is None for part in rest)


@alike("chat: the client's own stream")
def _(c):
    asked = {"temperature": 0, "logit_bias": {"97": 100}, "stop": "aaa"}  # it raises on an answer that is cut
    with c.openai.chat.completions.stream(**CHAT | asked) as stream:
        kinds = {event.type for event in stream}
    assert "chunk" in kinds
    final = stream.get_final_completion().choices[0]
    assert (final.finish_reason, final.message.content or "") == ("stop", "")


@alike("chat: json_object")
def _(c):
    asked = {"response_format": {"type": "json_object"}, "max_tokens": 60, "logit_bias": {"125": 50}}
    answer = c.chat(**asked).choices[0]
    assert answer.finish_reason == "length" or isinstance(json.loads(answer.message.content), dict)


@alike("chat: json_schema")
def _(c):
    answer = c.chat(response_format=FORM, max_tokens=60, logit_bias=BLANKS).choices[0]
    assert answer.finish_reason == "stop"
    assert json.loads(answer.message.content)["colour"] in ("red", "blue")


@alike("chat: parse")
def _(c):
    answer = c.openai.chat.completions.parse(**CHAT | {"max_tokens": 60, "logit_bias": BLANKS}, response_format=Paint)
    assert answer.choices[0].message.parsed.colour in ("red", "blue")


@alike("chat: parse in a stream")
def _(c):
    asked = CHAT | {"max_tokens": 60, "logit_bias": BLANKS}
    with c.openai.chat.completions.stream(**asked, response_format=Paint) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed.colour in ("red", "blue")


@alike("chat: tools, auto")
def _(c):
    message = c.chat(tools=[TOOL], tool_choice="auto").choices[0].message
    assert (message.tool_calls, message.content is None) == (None, False)


@alike("chat: tools, required")
def _(c):
    choice = c.chat(tools=[TOOL], tool_choice="required", max_tokens=900).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert all(json.loads(call.function.arguments)["colour"] in ("red", "blue") for call in choice.message.tool_calls)


@alike("chat: tools, one by name, not parallel")
def _(c):
    choice = c.chat(tools=[TOOL], tool_choice=NAMED, parallel_tool_calls=False, max_tokens=90).choices[0]
    [call] = choice.message.tool_calls
    assert (call.type, call.function.name, bool(call.id)) == ("function", "Paint", True)


@alike("chat: tools, none")
def _(c):
    assert c.chat(tools=[TOOL], tool_choice="none").choices[0].message.tool_calls is None


@alike("chat: strict tools by pydantic, parsed")
def _(c):
    tool = openai.pydantic_function_tool(Paint)
    asked = CHAT | {"tools": [tool], "tool_choice": NAMED, "parallel_tool_calls": False, "max_tokens": 90}
    [call] = c.openai.chat.completions.parse(**asked).choices[0].message.tool_calls
    assert call.function.parsed_arguments.colour in ("red", "blue")


@alike("chat: strict tools, auto")
def _(c):
    tool = openai.pydantic_function_tool(Paint)
    front = '{"name": "Paint", "arguments": '
    turns = [TURN, {"role": "assistant", "content": front}]
    extra = {"add_generation_prompt": False, "continue_final_message": True}
    assert c.chat(messages=turns, tools=[tool], extra_body=extra).choices[0].finish_reason == "length"


@alike("chat: an agent's second turn")
def _(c):
    asked = {"tools": [TOOL], "parallel_tool_calls": False, "max_tokens": 90}
    message = c.chat(**asked, tool_choice="required").choices[0].message
    [call] = message.tool_calls
    turns = [TURN, message, {"role": "tool", "tool_call_id": call.id, "content": "done"}]
    for choice in ("auto", "none"):
        assert c.chat(tools=[TOOL], messages=turns, tool_choice=choice).choices[0].message.content is not None
    assert c.chat(messages=turns).choices[0].message.content is not None


@alike("chat: calls in a stream")
def _(c):
    asked = {"tools": [TOOL], "tool_choice": NAMED, "parallel_tool_calls": False, "max_tokens": 90}
    deltas = [each for part in c.chat(**asked, stream=True) for each in part.choices[0].delta.tool_calls or []]
    assert (deltas[0].function.name, {delta.index for delta in deltas}) == ("Paint", {0})
    assert json.loads("".join(delta.function.arguments or "" for delta in deltas))["colour"]


@alike("chat: hints")
def _(c):
    hints = {
        "user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "reasoning_effort": "low", "store": True,
        "metadata": {"a": "b"}, "service_tier": "auto", "verbosity": "low", "prompt_cache_retention": "24h",
        "modalities": ["text"], "prediction": {"type": "content", "content": "x"},
    }  # fmt: skip
    raw = c.openai.chat.completions.with_raw_response.create(**CHAT | hints)
    assert "safety_identifier" in raw.headers["x-ignored-fields"]


@alike("chat: raw response")
def _(c):
    raw = c.openai.chat.completions.with_raw_response.create(**CHAT, extra_headers={"X-Request-Id": "mine"})
    assert (raw.headers["x-request-id"], raw.status_code) == ("mine", 200)
    assert raw.parse().choices[0].message.content is not None


@alike("chat: streaming response")
def _(c):
    with c.openai.chat.completions.with_streaming_response.create(**CHAT | {"stream": True}) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"


@alike("chat: a timeout by with_options")
def _(c):
    with c.held() as long, pytest.raises(openai.APITimeoutError):
        c.openai.with_options(timeout=0.05).chat.completions.create(**CHAT | long)


@alike("chat: async")
def _(c):
    answer = asyncio.run(c.openai_async.chat.completions.create(**CHAT))
    assert answer.choices[0].message.role == "assistant"


@alike("chat: async stream")
def _(c):
    async def parts() -> list[Any]:
        return [part async for part in await c.openai_async.chat.completions.create(**CHAT, stream=True)]

    assert asyncio.run(parts())[-1].choices[0].finish_reason == "length"


@alike("chat: many at once, async")
def _(c):
    async def all_() -> list[Any]:
        client = c.openai_async
        return await asyncio.gather(*(client.chat.completions.create(**CHAT) for _ in range(5)))

    assert len({answer.id for answer in asyncio.run(all_())}) == 5


@alike("openai: an unknown model")
def _(c):
    with pytest.raises(openai.NotFoundError) as told:
        c.chat(model="nobody")
    assert (told.value.status_code, told.value.param) == (404, "model")


@alike("openai: a wrong value")
def _(c):
    with pytest.raises(openai.BadRequestError) as told:
        c.chat(temperature=3)
    assert (told.value.param, told.value.status_code) == ("temperature", 400)


@alike("openai: a server that is not there, with retries")
def _(c):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(openai.APIConnectionError):
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}", api_key="x", max_retries=1).models.list()


@alike("models: list")
def _(c):
    assert [(card.id, card.object) for card in c.openai.models.list()] == [("tiny", "model"), ("alias", "model")]


@alike("models: retrieve")
def _(c):
    assert c.openai.models.retrieve("alias").id == "alias"


@alike("completions")
def _(c):
    answer = c.text()
    assert (answer.object, answer.choices[0].finish_reason, answer.usage.prompt_tokens) == (
        "text_completion",
        "length",
        3,
    )


@alike("completions: stream")
def _(c):
    parts = list(c.text(stream=True, temperature=0))
    assert "".join(part.choices[0].text for part in parts) == c.text(temperature=0).choices[0].text


@alike("completions: several prompts")
def _(c):
    assert [choice.index for choice in c.text(prompt=["a", "b"]).choices] == [0, 1]


@alike("completions: ids")
def _(c):
    assert c.text(prompt=[97, 98, 99], temperature=0).choices[0].text == c.text(temperature=0).choices[0].text


@alike("completions: echo")
def _(c):
    assert c.text(echo=True).choices[0].text.startswith("abc")


@alike("completions: the prompt's log-probabilities")
def _(c):
    found = c.text(echo=True, logprobs=1, max_tokens=0).choices[0]
    assert (found.text, found.logprobs.tokens, found.logprobs.text_offset) == ("abc", ["a", "b", "c"], [0, 1, 2])
    assert found.logprobs.token_logprobs[0] is None
    assert all(math.isfinite(each) for each in found.logprobs.token_logprobs[1:])


@alike("completions: logprobs")
def _(c):
    found = c.text(logprobs=2).choices[0].logprobs
    assert [len(found.tokens), len(found.token_logprobs), len(found.top_logprobs)] == [5, 5, 5]


@alike("completions: n, seed and stop")
def _(c):
    asked = {"n": 2, "seed": 3, "temperature": 1, "stop": ["no such"]}
    assert [x.text for x in c.text(**asked).choices] == [x.text for x in c.text(**asked).choices]


@alike("embeddings")
def _(c):
    [found] = c.openai.embeddings.create(model="tiny", input="abc").data
    assert sum(each * each for each in found.embedding) == pytest.approx(1, abs=1e-3)


@alike("embeddings: several, as numbers")
def _(c):
    found = c.openai.embeddings.create(model="tiny", input=["a", "b"], encoding_format="float", user="u")
    assert [each.index for each in found.data] == [0, 1]


@alike("responses")
def _(c):
    response = c.respond()
    assert (response.object, response.status, response.incomplete_details.reason) == (
        "response", "incomplete", "max_output_tokens",
    )  # fmt: skip
    assert response.output_text == response.output[0].content[0].text


@alike("responses: instructions and items")
def _(c):
    items = [{"role": "developer", "content": "y"}, {"role": "user", "content": [{"type": "input_text", "text": "x"}]}]
    assert c.respond(instructions="z", input=items).usage.input_tokens > 20


@alike("responses: stream")
def _(c):
    kinds = [event.type for event in c.respond(stream=True)]
    assert (kinds[0], kinds[-1]) == ("response.created", "response.incomplete")


@alike("responses: the client's own stream, parsed")
def _(c):
    asked = {"model": "tiny", "input": "x", "max_output_tokens": 60, "extra_body": {"logit_bias": BLANKS}}
    with c.openai.responses.stream(**asked, text_format=Paint) as stream:
        final = stream.get_final_response()
    assert final.output_parsed.colour in ("red", "blue")


@alike("responses: parse")
def _(c):
    asked = {"model": "tiny", "input": "x", "max_output_tokens": 60, "extra_body": {"logit_bias": BLANKS}}
    assert c.openai.responses.parse(**asked, text_format=Paint).output_parsed.colour in ("red", "blue")


@alike("responses: an agent's loop")
def _(c):
    asked = {"tools": [FUNCTION], "parallel_tool_calls": False, "max_output_tokens": 90}
    [call] = c.respond(**asked, tool_choice={"type": "function", "name": "Paint"}).output
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    items = [TURN, call, output]
    assert c.respond(tools=[FUNCTION], input=items).output[0].type == "message"


@alike("responses: hints")
def _(c):
    hints = {"reasoning": {"effort": "low"}, "store": False, "prompt_cache_key": "k", "truncation": "disabled"}
    assert c.respond(**hints, include=["reasoning.encrypted_content"], metadata={"a": "b"}).metadata == {"a": "b"}


_PICTURED = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": PICTURE}}]}
refused("chat: an image", "only parts of the type text", lambda c: c.chat(messages=[_PICTURED]))
refused("chat: sound", "modalities", lambda c: c.chat(modalities=["text", "audio"]))
refused("completions: suffix", "'suffix'", lambda c: c.text(suffix="z"))
refused(
    "embeddings: dimensions", "dimensions", lambda c: c.openai.embeddings.create(model="tiny", input="x", dimensions=4)
)
refused("responses: a stored response", "previous_response_id", lambda c: c.respond(previous_response_id="resp_1"))
refused("responses: a tool of the server", "tools.0.type", lambda c: c.respond(tools=[{"type": "web_search"}]))


@pytest.mark.parametrize("name", CALLS.alike_by_name)
def test_a_call_behaves_as_with_the_original(clients, name):
    CALLS.alike_by_name[name](clients)


@pytest.mark.parametrize("name", CALLS.refused_by_name)
def test_a_call_that_is_not_offered_is_refused_by_name(clients, name):
    CALLS.require_refused(name, clients)


def test_so_many_calls_are_made():
    assert (len(CALLS.alike_by_name), len(CALLS.refused_by_name)) == (55, 6)
