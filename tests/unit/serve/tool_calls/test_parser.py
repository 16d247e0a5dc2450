"""Calls out of text: forty answers in three formats, whole and in pieces, and texts that only look like calls."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.serve.tool_templates import CASES, SCHEMAS, TEMPLATES, as_calls, read, tokenizer_of, written

from veneer.serve.http.chat import shape
from veneer.serve.requests.calls import Calls
from veneer.serve.requests.checked import CheckedRequest
from veneer.serve.schedule.outputs import CompletionOutput
from veneer.serve.schedule.sampling_params import SamplingParams
from veneer.serve.tool_calls.arguments import ObjectArguments
from veneer.serve.tool_calls.format import CallFormat
from veneer.serve.tool_calls.functions import Function, Tools
from veneer.serve.tool_calls.known import PLAIN, known_format
from veneer.serve.tool_calls.parser import Arguments, Parser, Text
from veneer.serve.tool_calls.read import format_of

FUNCTIONS = [Function(name=name, parameters=schema) for name, schema in SCHEMAS.items()]


@functools.cache
def tokenizer(name: str):
    return tokenizer_of(TEMPLATES[name])


@functools.cache
def form(name: str) -> CallFormat:
    found = format_of(tokenizer(name))
    assert found is not None
    return found


def parsed(format: CallFormat, text: str, cuts=(), most=None):
    parser, events, at = Parser(format, SCHEMAS, most=most), [], 0
    for cut in (*sorted(cuts), len(text)):
        events += parser.feed(text[at:cut])
        at = cut
    return read(events + parser.finish())


@pytest.mark.parametrize("name", TEMPLATES)
def test_forty_answers_parse_whole_and_letter_by_letter(name):
    assert len(CASES) == 40
    for front, calls, back in CASES:
        text = front + written(tokenizer(name), calls) + back
        whole = parsed(form(name), text)
        assert parsed(form(name), text, range(1, len(text))) == whole
        assert as_calls(whole[1]) == calls, text
        assert whole[0].split() == (front + back).split()


@pytest.mark.parametrize("name", TEMPLATES)
def test_messages_and_streams_are_equal(name):
    """In OpenAI's shape, with events as long as a step's."""
    calls, asked = Calls(Tools(FUNCTIONS), form(name)), None
    asked = CheckedRequest(id="1", prompt=None, prompt_ids=(), params=SamplingParams(), reader=None)  # type: ignore[arg-type]
    for front, made, back in CASES:
        text = front + written(tokenizer(name), made) + back
        whole = shape(calls).choice(CompletionOutput(0, text, [], finish_reason="stop"), 0, asked, None)
        streamed, content, found = shape(calls), "", []
        for at in range(0, len(text), 3):
            reason = "stop" if at + 3 >= len(text) else None
            delta = streamed.delta(CompletionOutput(0, text[at : at + 3], [], finish_reason=reason), 0, asked, None)
            content += delta["delta"].get("content", "")
            for call in delta["delta"].get("tool_calls", []):
                assert call["index"] <= len(found)
                if call["index"] == len(found):
                    found.append({"id": call["id"], "type": call["type"], "function": {**call["function"]}})
                else:
                    found[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        message = whole["message"]
        assert (message["content"] or "") == content
        assert [c["function"] for c in message["tool_calls"]] == [c["function"] for c in found]
        assert {len(c["id"]) for c in (*message["tool_calls"], *found)} == {9}
        assert (whole["finish_reason"], delta["finish_reason"]) == ("tool_calls", "tool_calls")


PIECES = st.sampled_from(
    [
        "[[", "weather", "weather_now", " <- ", "{", "}", '"city": "x', '"', "]]", "\n", "  ", "<|calls|>", "[{",
        "<end>", '"tool": "', '", "input": ', "}]", "<|/calls|>", '<invoke fn="', '">\n  <arg k="city">', "</arg>",
        '<arg k="days', "\n</invoke>", "[[weather <- {}]]", '[[file <- {"a": {', '<invoke fn="weather', '">\n</invoke>',
        "é🌧", "a <", "\\",
        '<|calls|>[{"id": "abc", "tool": "weather", "input": {', '}, {"tool": "file", "input": {}',
    ]
)  # fmt: skip


@given(st.sampled_from(sorted(TEMPLATES)), st.lists(PIECES, max_size=12), st.data())
@settings(max_examples=150)
def test_what_is_read_does_not_depend_on_cuts(name, pieces, data):
    text = "".join(pieces)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    most = data.draw(st.sampled_from([None, 1]))
    whole = parsed(form(name), text, most=most)
    assert parsed(form(name), text, cuts, most=most) == whole
    assert parsed(form(name), text, range(1, len(text)), most=most) == whole
    if not whole[1] and name != "list":  # whose special tokens are hidden
        assert whole[0] == text


@pytest.mark.parametrize(
    "text",
    [
        "[[other <- {}]]",  # no function
        "[[weather <- []]]",  # no object
        "[[weather_no <- {}]]",
        "[[weather - {}]]",
        "[[weather <-",
        "[[ [[weather",
        "  \n [[weather <- ",
        f"[[weather{' ' * 99}<- {{}}]]",
    ],
)
def test_what_is_no_call_is_text(text):
    assert parsed(form("brackets"), text) == (text, [])


def test_what_may_be_a_call_is_held_back_and_nothing_else():
    parser = Parser(form("brackets"), SCHEMAS)
    assert parser.feed("Look: [") == [Text("Look:")]
    assert parser.feed("[weat") == []
    assert parser.feed("er <- {") == [Text(" [[weater <- {")]
    parser.feed("[[weather <- {")
    assert parser.feed('"city": "O')[-1] == Arguments(0, '"city": "O')
    assert parser.feed("slo") == [Arguments(0, "slo")]


def test_strings_of_fields_come_in_pieces_and_other_values_whole():
    parser = Parser(form("fields"), SCHEMAS)
    assert parser.feed('<invoke fn="weather">\n  <arg k="city">')[-1] == Arguments(0, '{"city": ')
    assert parser.feed('Os"l') == [Arguments(0, '"Os\\"l')]
    assert parser.feed('o</arg>\n  <arg k="days">1') == [Arguments(0, 'o", "days": ')]
    assert parser.feed("2") == []
    assert parser.feed("</arg>\n</invoke>")[0] == Arguments(0, "12}")


def test_a_long_value_is_looked_through_once(monkeypatch):
    read_of, own = list[int](), ObjectArguments.read
    monkeypatch.setattr(
        ObjectArguments, "read", lambda self, text, **how: read_of.append(len(text)) or own(self, text, **how)
    )
    end = form("fields").fields.end
    value = f'["{(end + "x") * 700}"]'
    parser = Parser(form("fields"), {"f": {"properties": {"v": {"type": "array"}}}})
    parser.feed(f'<invoke fn="f">\n  <arg k="v">{value}')
    assert 700 * len(end) <= sum(read_of) <= len(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("True", "true"), ("None", '"None"'), ("NaN", '"NaN"'), ("[" * 9999, f'"{"[" * 9999}"'), ("7.5", "7.5")],
)  # fmt: skip
def test_values_of_fields_are_what_their_schema_takes(value, expected):
    schema = {"f": {"properties": {"v": {"type": ["boolean", "number", "string"]}}}}
    parser = Parser(form("fields"), schema)
    events = parser.feed(f'<invoke fn="f">\n  <arg k="v">{value}</arg>\n</invoke>') + parser.finish()
    assert read(events) == ("", [["f", f'{{"v": {expected}}}', True]])


def test_a_field_that_is_json_ends_behind_its_strings():
    text = '<invoke fn="file">\n  <arg k="lines">["</arg>", "b"]</arg>\n  <arg k="path">["</arg>\n</invoke>'
    right = ("", [["file", '{"lines": ["</arg>", "b"], "path": "[\\""}', True]])
    assert parsed(form("fields"), text) == right == parsed(form("fields"), text, range(1, len(text)))


@pytest.mark.parametrize(
    "schema", [{"type": [{}]}, {"type": 3}, {"enum": 3}, {"anyOf": {"a": 1}}, {"anyOf": [[[]]]}, {"const": None}, 7]
)
def test_schemas_may_be_anything(schema):
    parser = Parser(form("fields"), {"f": {"properties": {"v": schema}}})
    events = parser.feed('<invoke fn="f">\n  <arg k="v">null</arg>\n</invoke>') + parser.finish()
    assert read(events) == ("", [["f", '{"v": null}', True]])


def test_models_that_write_other_white_space_or_no_id_are_read():
    text = '<|calls|> [ {"tool":"weather" ,\n "input" :{"city":"x"}} , { "id": "q", "tool": "file","input": {}} ]'
    assert parsed(form("list"), text) == ("", [["weather", '{"city":"x"}', True], ["file", "{}", True]])


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("<tool_call>", '<tool_call>\n{"name": "weather_now", "arguments": {}}\n</tool_call>'),
        ("[AVAILABLE_TOOLS]", '[TOOL_CALLS] [{"name": "weather_now", "arguments": {}}]'),
        ("<|tool|>", '<|tool_call|>[{"name": "weather_now", "arguments": {}}]<|/tool_call|>'),
        ('{"name": function name, "parameters":', '{"name": "weather_now", "parameters": {}}'),
    ],
)
def test_formats_of_the_table(prompt, text):
    found = known_format(f"a {prompt} b")
    assert found is not None
    assert parsed(found, f"x {text}") == ("x", [["weather_now", "{}", True]])


def test_a_call_that_is_cut_keeps_its_arguments():
    assert parsed(form("brackets"), '[[weather <- {"city": "Os') == ("", [["weather", '{"city": "Os', False]])
    assert parsed(form("fields"), '<invoke fn="weather">\n  <arg k="city">Os') == (
        "", [["weather", '{"city": "Os"', False]],
    )  # fmt: skip
    assert parsed(form("brackets"), '[[weather <- {"city": "Oslo"}]') == ("", [["weather", '{"city": "Oslo"}', True]])


def test_calls_beyond_the_most_are_text():
    call = "[[weather_now <- {}]]"
    assert parsed(form("brackets"), f"{call}\n{call}", most=1) == (call, [["weather_now", "{}", True]])


def test_special_tokens_between_texts_are_left_out():
    assert parsed(form("list"), "a<end>b <|calls|>c") == ("ab <|calls|>c", [])


def test_a_stop_string_within_a_call_is_no_call_that_was_asked_for():
    asked = CheckedRequest(id="1", prompt=None, prompt_ids=(), params=SamplingParams(), reader=None)  # type: ignore[arg-type]
    made = shape(Calls(Tools([Function(name="weather")]), PLAIN))
    cut = CompletionOutput(0, '{"name": "weather", "arguments": {"a', [], finish_reason="stop", stop_reason="b")
    choice = made.choice(cut, 0, asked, None)
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"a'
    text = made.choice(CompletionOutput(0, "", [], finish_reason="stop"), 0, asked, None)
    assert text["message"] == {"role": "assistant", "content": ""}
