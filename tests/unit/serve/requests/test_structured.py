"""Forms whose forced tokens take long to find, or whose grammar is given up: others wait for neither."""

from __future__ import annotations

import random
import re

import pytest
from tests.unit.serve.random_forms import random_form
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from veneer.errors import ConfigError
from veneer.serve.requests import structured
from veneer.serve.requests.structured import Forms, TextForm, grammar_of
from veneer.serve.schedule.forced_text import longest_forced
from veneer.serve.schedule.sampling_params import StructuredOutputsParams


@pytest.fixture
def forms(tokenizer):
    return Forms(tokenizer, 263, [256])


def form_of(forms: Forms, **asked: object) -> TextForm:
    return forms.form(StructuredOutputsParams(**asked)).begun()


def spelled(text: str, forms: Forms) -> list[int]:
    return forms._tokenizer(text, add_special_tokens=False)["input_ids"]


def test_forced_tokens_are_found_once_and_taken_one_by_one(forms):
    form = form_of(forms, regex="abcdefgh[xy]")
    expected = spelled("abcdefgh", forms)
    asked = []
    original = form._grammar.found_forced
    form._grammar = type("Counted", (), {"forces": True, "found_forced": lambda _, m: asked.append(m) or original(m)})()
    for i, token in enumerate(expected):
        assert form.forced() == expected[i:]
        form.take(token)
    assert len(asked) == 1
    assert form.forced() == []


def test_a_token_that_was_not_forced_first_drops_those_behind_it(forms):
    form = form_of(forms, regex="ab|cd")
    form._coming = spelled("ba", forms)  # "ab", the last one first
    form.take(spelled("c", forms)[0])
    assert form.forced() == spelled("d", forms)


@pytest.mark.parametrize(
    "asked",
    [
        {"regex": "a{20000}b"}, {"regex": "(a{300}b){40}"}, {"json": {"const": "a" * 10_000}},
        {"json": {"type": "array", "items": {"const": "abc"}, "minItems": 3000}},
    ],
)  # fmt: skip
def test_a_grammar_that_may_force_a_long_text_is_not_asked(forms, asked, monkeypatch):
    monkeypatch.setattr("veneer.serve.requests.structured._Grammar.found_forced", lambda *given: pytest.fail("asked"))
    assert form_of(forms, **asked).forced() == []


PERSON = {
    "type": "object", "required": ["name"], "additionalProperties": False,
    "properties": {"name": {"type": "string", "maxLength": 12}, "kind": {"const": "person"}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("schema", "least", "most"),
    [
        ({"type": "array", "minItems": 3000, "items": PERSON}, 0, 1000),
        ({"type": "array", "minItems": 3000, "items": {"$ref": "#/$defs/P"}, "$defs": {"P": PERSON}}, 0, 1000),
        ({"type": "array", "minItems": 3000, "items": {"type": "integer"}}, 0, 1000),
        ({"type": "array", "minItems": 3000, "items": {"const": "abc"}}, 9000, 10**6),
        ({"type": "array", "minItems": 3000, "items": {"type": "string", "pattern": "^abc$"}}, 9000, 10**6),
        ({"type": "array", "minItems": 3000, "items": PERSON | {"required": []}}, 3000, 10**7),
        ({"type": "array", "minItems": 30, "items": {"minItems": 100, "items": {"const": 1}}}, 3000, 10**6),
    ],
)
def test_items_that_hold_something_free_are_not_forced_in_one_run(schema, least, most):
    assert least <= longest_forced(grammar_of(StructuredOutputsParams(json=schema))) <= most


def test_a_grammar_that_took_long_is_asked_no_more(forms, monkeypatch):
    monkeypatch.setattr("veneer.serve.requests.structured._SLOW", 0.0)
    assert form_of(forms, regex="abc").forced() == []


def test_a_grammar_that_is_given_up_allows_nothing_and_is_compiled_anew(forms):
    asked = {"json": {"type": "object", "properties": {"p": {"type": "string"}}, "required": ["p"]}}
    form = form_of(forms, **asked)
    for token in spelled('{"p"', forms):
        form.take(token)
    form._matcher.consume_token(spelled("z", forms)[0])  # which the grammar does not have: it is in error
    assert form._matcher.is_error()
    assert not form.allowed().any()
    other = form_of(forms, **asked)
    assert other._grammar is not form._grammar
    assert other.allowed().any()


def test_a_tokenizer_of_whole_words_is_told():
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"yes": 0, "</s>": 1}, "yes")))
    with pytest.raises(ConfigError, match=r"not one that llguidance reads.*without structured outputs"):
        Forms(words, 2, [1]).form(StructuredOutputsParams(choice=["yes"]))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"regex": "("}, "unclosed group"),
        ({"regex": "\ud800"}, "surrogates not allowed"),
        ({"grammar": "start: ("}, "cannot be compiled"),
        ({"grammar": 'root ::= "a'}, "the grammar cannot be compiled: Unexpected end of input at line 1"),
        ({"grammar": "root ::= ("}, "Expected ')' at line 1"),
        ({"grammar": "root ::= thing"}, "Rule 'thing' not found"),
        ({"grammar": 'a ::= "b"'}, "No 'root' rule found"),
        ({"grammar": "nothing like it"}, "Expected ::= at line 1"),
        ({"grammar": "root ::= " + "(" * 3000}, "the grammar cannot be compiled: maximum recursion depth"),
        ({"grammar": 'start: "\ud800"'}, "surrogates not allowed"),
        ({"grammar": "root ::= (" + "a" * 9000}, "Expected ')' at line 1"),
        ({"regex": "(" + "a" * 9000}, "unclosed group"),
        ({"json": {"type": "x" * 9000}}, "cannot be compiled: Invalid type: xxx"),
        ({"json": {"type": "x"}}, "cannot be compiled"),
        ({"json": {"const": float("nan")}}, "cannot be compiled"),
        ({"json": "{"}, "cannot be compiled"),
        ({"json": {"const": {1, 2}}}, "is not a JSON schema"),
        ({"choice": ["\ud800"]}, "cannot be compiled"),
        ({"choice": []}, "must be a list of strings, none empty"),
        ({"choice": {"a": 1}}, "must be a list of strings, none empty"),
        ({"choice": 5}, "must be a list of strings, none empty"),
        ({"choice": ["a", ""]}, "must be a list of strings, none empty"),
        ({"json_object": "yes"}, "json_object='yes' must be True or None"),
    ],
)  # fmt: skip
def test_a_form_that_cannot_be_compiled_is_told_with_llguidances_words(forms, asked, said):
    with pytest.raises(ConfigError, match=re.escape(said)) as raised:
        form_of(forms, **asked)
    assert len(str(raised.value)) < 1000


def test_the_state_of_llguidance_is_no_reason():
    assert "compiled: Stopped. Correct" in str(
        structured._not_compiled("format", "Stopped\n<state>\nTokens: 0\n</state>")
    )


def test_random_forms_are_compiled_or_refused(forms):
    draw, n_made = random.Random(38), 0
    for _ in range(1000):
        asked = random_form(draw)
        try:
            form = form_of(forms, **asked)
        except ConfigError:
            continue
        n_made += 1
        for _ in range(4):
            form.forced()
            words = form.allowed()
            allowed = [id for id in range(263) if int(words[id // 32]) >> id % 32 & 1]
            if allowed:
                form.take(draw.choice(allowed))
    assert 100 < n_made < 500
