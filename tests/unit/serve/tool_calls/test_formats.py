"""Formats of calls are read off chat templates: of three that no table has, and of those that TRL brings."""

from __future__ import annotations

from pathlib import Path

import pytest
import trl
from tests.unit.serve.tool_templates import MARKS, TEMPLATES, tokenizer_of

from veneer.errors import ConfigError
from veneer.serve.requests.prompts import PromptReader
from veneer.serve.tool_calls.format import Fields
from veneer.serve.tool_calls.functions import Function, Tools
from veneer.serve.tool_calls.known import PLAIN
from veneer.serve.tool_calls.match import Slot
from veneer.serve.tool_calls.messages import with_calls
from veneer.serve.tool_calls.read import format_of

NAME, ID = Slot.NAME, Slot.ID
OF_TRL = Path(trl.__file__).parent / "chat_templates"


def test_what_is_around_known_calls_is_the_format():
    brackets = format_of(tokenizer_of(TEMPLATES["brackets"]))
    assert (brackets.before, brackets.between, brackets.after) == (
        ("[[", NAME, " <- "), ("]]\n[[", NAME, " <- "), ("]]",),
    )  # fmt: skip
    assert (brackets.separators, brackets.added, brackets.skips) == ((",", ":"), {}, False)
    tokenizer = tokenizer_of(TEMPLATES["list"])
    listed = format_of(tokenizer)
    assert listed.before == ('<|calls|>[{"id": "', ID, '", "tool": "', NAME, '", "input": ')
    assert (listed.between, listed.after) == (
        ('}, {"id": "', ID, '", "tool": "', NAME, '", "input": '), ("}]<|/calls|>",),
    )  # fmt: skip
    assert listed.added == {mark: tokenizer.convert_tokens_to_ids(mark) for mark in MARKS}
    assert (listed.skips, listed.hidden) == (True, ("<end>",))
    fields = format_of(tokenizer_of(TEMPLATES["fields"]))
    assert (fields.before, fields.after) == (('<invoke fn="', NAME), (">\n</invoke>",))
    assert fields.fields == Fields(
        first='">\n  <arg k="', middle='">', next='</arg>\n  <arg k="', last="</arg", none='"'
    )


@pytest.mark.parametrize(
    ("name", "before", "several", "fields", "as_text"),
    [
        ("qwen3", ('<tool_call>\n{"name": "', NAME, '", "arguments": '), True, False, False),
        ("qwen3_5_think", ("<tool_call>\n<function=", NAME), True, True, False),
        ("glm4moe", ("<tool_call>", NAME), True, True, False),
        ("llama3_1", ('{"name": "', NAME, '", "parameters": '), False, False, False),
        ("gptoss", ("to=functions.", NAME, "<|channel|>commentary json<|message|>"), False, False, False),
        (
            "deepseekv3", ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>", NAME, "\n```json\n"),
            True, False, True,
        ),
    ],
)  # fmt: skip
def test_templates_of_models(name, before, several, fields, as_text):
    found = format_of(tokenizer_of((OF_TRL / f"{name}.jinja").read_text()))
    assert (found.before, found.between is not None, found.fields is not None, found.as_text) == (
        before, several, fields, as_text,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["llama3", "lfm2_2_5", "gemma4"])
def test_a_template_without_calls_or_with_a_dialect_for_values_tells_none(name):
    assert format_of(tokenizer_of((OF_TRL / f"{name}.jinja").read_text())) is None


def test_a_template_that_tells_the_model_alone_is_found_in_the_table():
    told = "{% if tools %}return a JSON object within <tool_call></tool_call> tags\n{% endif %}"
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    found = format_of(tokenizer_of(told + plain))
    assert found.before[0].startswith("<tool_call>")
    assert format_of(tokenizer_of(plain)) is None


def test_the_format_of_the_template_that_is_used_is_kept(monkeypatch):
    reader = PromptReader(tokenizer_of(TEMPLATES["list"]), 99, (TEMPLATES["brackets"],))
    first = reader.call_format()
    assert first.before[0] == "[["
    monkeypatch.setattr("veneer.serve.requests.prompts.format_of", lambda *given: pytest.fail("asked again"))
    assert reader.call_format() is first


def test_arguments_reach_a_template_as_it_reads_them():
    text = '{"a": [1, "é"]}'
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": text}}
    asked = [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "r"}]
    mapped = with_calls(asked, PLAIN)
    assert mapped[0]["tool_calls"][0]["function"]["arguments"] == {"a": [1, "é"]}
    assert (mapped[0]["content"], mapped[1]) == ("", asked[1])
    deepseek = format_of(tokenizer_of((OF_TRL / "deepseekv3.jinja").read_text()))
    assert with_calls(asked, deepseek)[0]["tool_calls"][0]["function"]["arguments"] == text
    broken = call | {"function": {"name": "f", "arguments": '{"a": '}}
    kept = with_calls([{"role": "assistant", "tool_calls": [broken]}], PLAIN)
    assert kept[0]["tool_calls"][0]["function"]["arguments"] == '{"a": '
    none = call | {"function": {"name": "f", "arguments": ""}}
    assert with_calls([{"role": "assistant", "tool_calls": [none]}], None)[0]["tool_calls"][0]["function"] == {
        "name": "f", "arguments": {},
    }  # fmt: skip
    for wrong in ([{"id": "x"}], "text", [{"function": {"name": "f", "arguments": 3}}]):
        with pytest.raises(ConfigError, match=r"messages\[0\].tool_calls"):
            with_calls([{"role": "assistant", "tool_calls": wrong}], PLAIN)


def test_content_beside_calls_is_what_the_template_takes():
    template = (
        "{% for m in messages %}{{ m.role + ':' }}{% if m.content is defined %}{{ m.content }}{% else %}"
        "{% for c in m.tool_calls %}{{ '@' + c.function.name + ' ' + c.function.arguments + '@' }}{% endfor %}"
        "{% endif %}{% endfor %}"
    )
    found = format_of(tokenizer_of(template))
    assert (found.before, found.between, found.after) == (("@", NAME, " "), ("@@", NAME, " "), ("@",))
    assert (found.content, found.as_text) == (None, True)
    call = {"function": {"name": "f", "arguments": "{}"}}
    assert with_calls([{"role": "assistant", "tool_calls": [call]}], found)[0]["content"] is None


def nested(levels: int) -> dict:
    schema: dict = {}
    for level in range(levels):
        schema = {"items": [schema]} if level % 2 else {"items": schema}
    return schema


def test_schemas_may_be_nested():
    assert Function(name="f", parameters=nested(40)).schema["type"] == "object"


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: Function(name="a b"), "1 to 64 letters"),
        (lambda: Function(name="x" * 65), "1 to 64 letters"),
        (lambda: Function(name="f", parameters={"type": "array"}), "type 'array'"),
        (lambda: Function(name="f", parameters={"properties": [1]}), "properties must be an object"),
        (lambda: Function(name="f", parameters={"required": [{}]}), "required must be a list"),
        (lambda: Function(name="f", parameters=nested(65)), "at most 64 levels"),
        (lambda: Tools([Function(name="f"), Function(name="f")]), "two tools have the name 'f'"),
        (lambda: Tools([Function(name=f"f{i}") for i in range(129)]), "129 tools are too many: at most 128"),
        (lambda: Tools([], "required"), "tools is empty"),
        (lambda: Tools([Function(name="weather")], named="wether"), "did you mean 'weather'"),
    ],
)
def test_wrong_functions_are_told(made, said):
    with pytest.raises(ConfigError, match=said):
        made()
