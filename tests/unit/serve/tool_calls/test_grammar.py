"""Forced calls: every text of the grammar parses, and its arguments fit their schemas."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tests.unit.serve.conftest import END, VOCAB
from tests.unit.serve.tool_templates import TEMPLATES, as_calls, read, tokenizer_of

from veneer.errors import ConfigError
from veneer.serve.requests.calls import Calls
from veneer.serve.requests.structured import Forms
from veneer.serve.schedule.sampling_params import SamplingParams, StructuredOutputsParams
from veneer.serve.tool_calls.functions import Function, Tools
from veneer.serve.tool_calls.grammar import MOST_CALLS, grammar_of
from veneer.serve.tool_calls.known import PLAIN
from veneer.serve.tool_calls.parser import Parser
from veneer.serve.tool_calls.read import format_of, with_tokens

COLOURS, UNITS = ["red", 'a "b"', "<"], ["a", None, 1.5]
FUNCTIONS = [
    Function(
        name="paint",
        parameters={
            "properties": {
                "colour": {"type": "string", "enum": COLOURS},
                "n": {"type": "integer", "minimum": 0, "maximum": 99},
                "units": {"$ref": "#/$defs/units"},
            },
            "required": ["n"],
            "$defs": {"units": {"type": "array", "items": {"enum": UNITS}, "maxItems": 2}},
        },
    ),
    Function(name="stop_it"),
    Function(name="set", parameters={"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}),
]


def fits(name: str, arguments: Any) -> bool:
    if name == "paint":
        return (
            {"n"} <= set(arguments) <= {"colour", "n", "units"}
            and 0 <= arguments["n"] <= 99
            and arguments.get("colour", "red") in COLOURS
            and all(unit in UNITS for unit in arguments.get("units", []))
        )
    return arguments == {} if name == "stop_it" else set(arguments) == {"on"} and isinstance(arguments["on"], bool)


def drawn(forms: Forms, tokenizer: Any, grammar: str, seed: int) -> str:
    """A text that the grammar allows, which ends as soon as it may in every second case."""
    form = forms.form(StructuredOutputsParams(grammar=grammar)).begun()
    chance, ids = random.Random(seed), list[int]()
    while len(ids) < 4000:
        words = form.allowed().tolist()
        allowed = [i for i in range(VOCAB) if words[i // 32] >> (i % 32) & 1]
        token = END if END in allowed and chance.random() < 0.5 else chance.choice(allowed)
        if token == END:
            return str(tokenizer.decode(ids))
        ids.append(token)
        form.take(token)
    raise AssertionError(tokenizer.decode(ids))


@pytest.mark.parametrize("name", [*TEMPLATES, "plain"])
def test_forced_calls_parse_and_fit_their_schemas(name):
    tokenizer = tokenizer_of(TEMPLATES.get(name, TEMPLATES["list"]))
    form = with_tokens(PLAIN, tokenizer) if name == "plain" else format_of(tokenizer)
    forms = Forms(tokenizer, VOCAB, [END])
    seen, most = set(), 0
    for tools in (
        Tools(FUNCTIONS, "required"),
        Tools(FUNCTIONS, named="set"),
        Tools(FUNCTIONS, "required", None, False),
    ):
        grammar = grammar_of(tools, form)
        for seed in range(8):
            text = drawn(forms, tokenizer, grammar, seed)
            parser = Parser(form, {function.name: function.schema for function in tools.callable})
            content, calls = read(parser.feed(text) + parser.finish())
            assert content == "", text
            assert 1 <= len(calls) <= (MOST_CALLS if tools.parallel else 1), text
            assert all(fits(*call) for call in as_calls(calls)), text
            seen |= {call[0] for call in calls}
            most = max(most, len(calls))
    assert seen == {"paint", "stop_it", "set"}
    assert most > 1


def test_an_answer_may_be_json_of_a_schema_instead():
    tokenizer = tokenizer_of(TEMPLATES["brackets"])
    calls = Calls(Tools(FUNCTIONS), format_of(tokenizer))
    form = StructuredOutputsParams(json={"const": 17})
    params = calls.constrained(SamplingParams(structured_outputs=form))
    forms = Forms(tokenizer, VOCAB, [END])
    texts = {drawn(forms, tokenizer, params.structured_outputs.grammar, seed) for seed in range(9)}
    assert "17" in texts
    assert any(text.startswith("[[") for text in texts)
    assert calls.constrained(SamplingParams(temperature=0.5)) == SamplingParams(temperature=0.5)
    assert calls.constrained(SamplingParams(structured_outputs=StructuredOutputsParams(json_object=True)))


def test_special_tokens_of_a_format_stay_in_the_text():
    listed = Calls(Tools(FUNCTIONS), format_of(tokenizer_of(TEMPLATES["list"])))
    assert listed.constrained(SamplingParams()).skip_special_tokens is False
    brackets = Calls(Tools(FUNCTIONS), format_of(tokenizer_of(TEMPLATES["brackets"])))
    assert brackets.constrained(SamplingParams()).skip_special_tokens is True


def test_strings_of_fields_end_at_their_end():
    """A free string may hold anything else, and one with a pattern is refused."""
    tokenizer = tokenizer_of(TEMPLATES["fields"])
    form, forms = format_of(tokenizer), Forms(tokenizer, VOCAB, [END])

    def tools(**more: Any) -> Tools:
        schema = {"properties": {"t": {"type": "string", **more}}, "required": ["t"]}
        return Tools([Function(name="say", parameters=schema)], "required", None, False)

    matching = forms.form(StructuredOutputsParams(grammar=grammar_of(tools(), form))).begun()
    text = '<invoke fn="say">\n  <arg k="t">a </b> "é"\n</arg>\n</invoke>'
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        assert matching.allowed().tolist()[token // 32] >> (token % 32) & 1
        matching.take(token)
    assert matching.allowed().tolist()[END // 32] >> (END % 32) & 1
    for wrong, said in (
        ({"pattern": "a", "maxLength": 3}, "say.t has pattern, maxLength"),
        ({"enum": ["a", "</arg>"]}, "say.t has '</arg>'"),
        ({"anyOf": [{"type": "string", "pattern": "a"}]}, "say.t has anyOf"),
    ):
        with pytest.raises(ConfigError, match=said):
            grammar_of(tools(**wrong), form)
    schemas = ({"$ref": "#"}, {"required": ["x"]}, {"properties": {'a"b': {}}})
    for schema, said in zip(schemas, ("ref", "the required 'x'", "the name 'a\"b'"), strict=True):
        with pytest.raises(ConfigError, match=said):
            grammar_of(Tools([Function(name="say", parameters=schema)], "required"), form)


@pytest.mark.parametrize(
    ("mode", "given", "said"),
    [
        ("required", {"stop": ["x"]}, "which stop could cut"),
        ("required", {"stop_token_ids": [3]}, "which stop_token_ids could cut"),
        (
            "required",
            {"structured_outputs": StructuredOutputsParams(json_object=True)},
            "constrains the answer otherwise",
        ),
        ("auto", {"structured_outputs": StructuredOutputsParams(regex="a")}, "leaves no room for calls"),
    ],
)
def test_what_contradicts_calls_is_told(mode, given, said):
    with pytest.raises(ConfigError, match=said):
        Calls(Tools(FUNCTIONS, mode), PLAIN).constrained(SamplingParams(**given))


def taken(forms: Forms, tokenizer: Any, grammar: str, text: str) -> int:
    """The number of characters of a text that a grammar allows; one more if it may end there."""
    form = forms.form(StructuredOutputsParams(grammar=grammar)).begun()
    for n, token in enumerate([*tokenizer(text, add_special_tokens=False)["input_ids"], END]):
        if not form.allowed().tolist()[token // 32] >> (token % 32) & 1:
            return n
        form.take(token)
    return n + 1


CALLS = {
    "brackets": ("[[set <- ", {'{"on":true}]]': True, '{"on":1}]]': 6}),
    "list": (
        '<|calls|>[{"id": "abcdefghi", "tool": "set", "input": ',
        {'{"on": true}}]<|/calls|>': True, '{"on": 1}': 7},
    ),
    "fields": ('<invoke fn="set">', {'\n  <arg k="on">true</arg>\n</invoke>': True, '\n  <arg k="off': 12}),
    "plain": ('{"name":"set" ,\n"arguments": ', {'{"on": false}}': True, '{"off"': 3}),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_of_strict_functions_fit_their_schemas_wherever_they_stand_in_a_text(name):
    tokenizer = tokenizer_of(TEMPLATES.get(name, TEMPLATES["list"]))
    format = with_tokens(PLAIN, tokenizer) if name == "plain" else format_of(tokenizer)
    forms = Forms(tokenizer, VOCAB, [END])
    tools = Tools(
        [Function(name="now"), Function(name=FUNCTIONS[2].name, parameters=FUNCTIONS[2].parameters, strict=True)]
    )
    [asked] = [Calls(tools, format).constrained(SamplingParams()).structured_outputs]
    front, ways = CALLS[name]
    for before in ("", "Some text, {braces} [[ and é.\n"):
        for arguments, right in ways.items():
            for behind in ("", " More, { [[ and so on."):
                text = before + front + arguments + behind
                n = taken(forms, tokenizer, asked.grammar, text)
                n_ids = len(tokenizer(text, add_special_tokens=False)["input_ids"])
                n_front = len(tokenizer(before + front, add_special_tokens=False)["input_ids"])
                assert n == (n_ids + 1 if right is True else n_front + right), text
    for text in ("", "no call", "[[sets <- {", '{"name": "sets", "arguments": 7'):
        assert (
            taken(forms, tokenizer, asked.grammar, text)
            == len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1
        )
    free = Calls(Tools(FUNCTIONS), format).constrained(SamplingParams())
    assert free.structured_outputs is None
