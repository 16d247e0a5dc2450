"""Calls of anthropic's client, as users make them. All but the refused behave as with the original.

The model's text is noise, so that a call shows the form of answers, and grammars their content.
"""

from __future__ import annotations

import asyncio

import anthropic
import pytest

from .calls import (
    BLANKS,
    MESSAGE,
    TURN,
    USED,
    Calls,
    Paint,
)

CALLS = Calls()
alike, refused = CALLS.alike, CALLS.refused


@alike("messages")
def _(c):
    message = c.message()
    assert (message.type, message.role, message.stop_reason) == ("message", "assistant", "max_tokens")
    assert (message.content[0].type, message.usage.output_tokens) == ("text", 5)


@alike("messages: system as blocks, cache_control")
def _(c):
    cached = {"cache_control": {"type": "ephemeral"}}
    blocks = [{"type": "text", "text": "y"}, {"type": "text", "text": "z"} | cached]
    content = [{"type": "text", "text": "x"} | cached]
    assert c.message(system=blocks, messages=[{"role": "user", "content": content}], metadata={"user_id": "u"})


@alike("messages: stop_sequences, temperature, top_k")
def _(c):
    extra = {"temperature": 0, "top_k": 3, "logit_bias": {"97": 100}}
    message = c.message(stop_sequences=["aa"], extra_body=extra)
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "aa")


@alike("messages: the client's own stream")
def _(c):
    with c.anthropic.messages.stream(**MESSAGE) as stream:
        text = "".join(stream.text_stream)
    assert stream.get_final_message().content[0].text == text


@alike("messages: stream")
def _(c):
    kinds = [event.type for event in c.message(stream=True)]
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")


@alike("messages: a last turn that is continued")
def _(c):
    assert c.message(messages=[TURN, {"role": "assistant", "content": "so"}]).content[0].type == "text"


@alike("messages: an agent's loop")
def _(c):
    choice = {"type": "any", "disable_parallel_tool_use": True}
    message = c.message(tools=[USED], tool_choice=choice, max_tokens=90)
    [block] = message.content
    assert (block.name, block.input["colour"] in ("red", "blue"), message.stop_reason) == ("Paint", True, "tool_use")
    result = {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "done"}]}
    turns = [TURN, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    assert c.message(tools=[USED], messages=turns).content[0].type == "text"


@alike("messages: parse")
def _(c):
    answer = c.anthropic.messages.parse(
        **MESSAGE | {"max_tokens": 60}, output_format=Paint, extra_body={"logit_bias": BLANKS}
    )
    assert answer.parsed_output.colour in ("red", "blue")


@alike("messages: count_tokens")
def _(c):
    assert c.anthropic.messages.count_tokens(model="tiny", messages=[TURN], system="y", tools=[USED]).input_tokens > 99


@alike("messages: an unknown model")
def _(c):
    with pytest.raises(anthropic.NotFoundError) as told:
        c.message(model="nobody")
    assert told.value.body["error"]["type"] == "not_found_error"


@alike("messages: raw responses, beta headers, timeouts, async, and thinking that is off")
def _(c):
    raw = c.anthropic.messages.with_raw_response.create(**MESSAGE, thinking={"type": "disabled"})
    assert raw.parse().type == "message"
    assert c.anthropic.beta.messages.create(**MESSAGE, betas=["token-efficient-tools-2025-02-19"]).type == "message"
    with c.held() as long, pytest.raises(anthropic.APITimeoutError):
        c.anthropic.with_options(timeout=0.05).messages.create(**MESSAGE | long)
    assert asyncio.run(c.anthropic_async.messages.create(**MESSAGE)).role == "assistant"


_SOURCE = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
_SEEN = {"role": "user", "content": [{"type": "image", "source": _SOURCE}]}
refused("messages: an image", "messages.0.content.0.type='image'", lambda c: c.message(messages=[_SEEN]))
refused(
    "messages: thinking", "thinking: type='enabled'",
    lambda c: c.message(thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=1025),
)  # fmt: skip


@pytest.mark.parametrize("name", CALLS.alike_by_name)
def test_a_call_behaves_as_with_the_original(clients, name):
    CALLS.alike_by_name[name](clients)


@pytest.mark.parametrize("name", CALLS.refused_by_name)
def test_a_call_that_is_not_offered_is_refused_by_name(clients, name):
    CALLS.require_refused(name, clients)


def test_so_many_calls_are_made():
    assert (len(CALLS.alike_by_name), len(CALLS.refused_by_name)) == (11, 2)
