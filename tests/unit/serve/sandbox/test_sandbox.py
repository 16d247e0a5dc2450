"""Programs of strangers run in processes of their own, which their limits end, and nobody else waits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from llguidance import LLMatcher
from tests.unit.serve.conftest import END, VOCAB, byte_tokenizer
from tests.unit.serve.tool_templates import TEMPLATES

from veneer.errors import ConfigError, QueueFullError
from veneer.serve.requests.structured import Forms
from veneer.serve.sandbox.plain_template import is_plain
from veneer.serve.sandbox.sandbox import Sandbox, SandboxError
from veneer.serve.schedule.sampling_params import StructuredOutputsParams
from veneer.serve.tool_calls.conversation import Rendering, chat_text
from veneer.serve.tool_calls.read import format_of

POWER = "{% set x = 7 ** 30000000 %}"
LONG = "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x' * 99 }}{% endfor %}{% endfor %}"
LARGE = "{{ 'x' * 10 ** 10 }}"
CHAIN = "start: r0\n" + "".join(f'r{i}: "a" r{i + 1} | "b"\n' for i in range(9000)) + 'r9000: "z"'
ABOUT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi \ud800"}], "how": {}, "most": 1000}


@pytest.fixture(scope="module")
def templates() -> Iterator[Sandbox]:
    sandbox = Sandbox("templates", seconds=1.5)
    yield sandbox
    sandbox.close()


@pytest.fixture(scope="module")
def grammars() -> Iterator[Sandbox]:
    sandbox = Sandbox("grammars", seconds=3.0)
    yield sandbox
    sandbox.close()


@pytest.mark.parametrize("template", [POWER, LONG, LARGE], ids=["one long call", "many short ones", "much memory"])
def test_a_template_beyond_its_limits_is_ended_and_the_next_is_run(templates, template):
    with pytest.raises(SandboxError, match=r"takes more than 1.5 s or 512 MiB"):
        templates.ask(template, ABOUT)
    assert templates.ask("{{ messages[0].content }}!", ABOUT) == {"text": "hi \ud800!"}


def test_other_threads_go_on_beside_a_template_of_one_long_call(templates):
    n_turns, ended = 0, threading.Event()

    def asks() -> None:
        with pytest.raises(SandboxError):
            templates.ask(POWER + " ", ABOUT)
        ended.set()

    asking = threading.Thread(target=asks)
    asking.start()
    while not ended.wait(0.01):
        n_turns += 1
    asking.join()
    assert n_turns > 20


def test_of_programs_that_were_ended_one_runs_at_a_time(templates):
    said: list[type[Exception]] = []

    def asks() -> None:
        try:
            templates.ask(POWER, ABOUT)
        except (SandboxError, QueueFullError) as error:
            said.append(type(error))

    with pytest.raises(SandboxError):
        templates.ask(POWER, ABOUT)
    asking = [threading.Thread(target=asks) for _ in range(5)]
    [each.start() for each in asking]
    assert templates.ask("{{ 1 }}", ABOUT) == {"text": "1"}
    [each.join() for each in asking]
    assert QueueFullError in said
    assert SandboxError in said


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 1 / 0 }}", "division by zero"), ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ raise_exception('no tools') }}", "no tools"), ("{% if %}", "Expected an expression"),
        ("{{ 'x' * 1001 }}", "1001 characters, and at most 1000"), ("{{ ''.__class__.mro() }}", "unsafe"),
    ],
)  # fmt: skip
def test_a_fault_of_a_template_is_told(templates, template, said):
    assert said in templates.ask(template, ABOUT)["refused"]


def test_no_key_of_the_server_is_in_the_process(templates, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    process = Sandbox("templates")
    process.warm()
    [made] = process._free
    with open(f"/proc/{made._process.pid}/environ", "rb") as variables:
        assert b"secret" not in variables.read()
    process.close()


def test_a_process_that_was_ended_from_outside_is_replaced():
    sandbox = Sandbox("grammars")
    sandbox.warm()
    sandbox._free[0]._process.kill()
    sandbox._free[0]._process.wait()
    grammar = str(LLMatcher.grammar_from_regex("a"))
    assert sandbox.ask(grammar, {}) == {}
    sandbox.close()


def test_a_program_that_was_slow_about_one_conversation_is_not_about_others(templates):
    power = "{{ (7 ** messages[0].n) % 10 }}"
    about = [{**ABOUT, "messages": [{"n": n}]} for n in (30_000_000, 2)]
    with pytest.raises(SandboxError):
        templates.ask(power, about[0])
    assert templates.ask(power, about[1]) == {"text": "9"}
    with templates._slow_lock:
        assert templates.ask(power, about[1]) == {"text": "9"}


def test_a_process_is_ended_if_it_cannot_be_asked_or_the_sandbox_is_closed():
    sandbox = Sandbox("grammars")
    sandbox.warm()
    [first] = sandbox._free
    with pytest.raises(TypeError):
        sandbox.ask("x", {"about": object()})
    assert first.is_over
    grammar = str(LLMatcher.grammar_from_regex("a"))
    sandbox.close()
    assert sandbox.ask(grammar, {}) == {}
    assert sandbox._free == []


def test_a_grammar_that_ends_its_process_is_refused(grammars):
    forms = Forms(byte_tokenizer(), VOCAB, [END])
    forms.sandbox = grammars
    with pytest.raises(ConfigError, match=r"structured_outputs cannot be compiled: it takes more than 3 s .* Simplify"):
        forms.form(StructuredOutputsParams(grammar=CHAIN))
    with pytest.raises(ConfigError, match=r"(?s)cannot be compiled: .*unclosed group"):
        forms.form(StructuredOutputsParams(regex="("))
    assert forms.form(StructuredOutputsParams(choice=["a", "b"])).allowed().any()


def test_a_form_whose_tokens_take_long_is_given_up(monkeypatch):
    forms = Forms(byte_tokenizer(), VOCAB, [END])
    form = forms.form(StructuredOutputsParams(choice=["a", "b"])).begun()
    other = form.begun()
    monkeypatch.setattr("veneer.serve.requests.structured._SLOW_MASK", -1.0)
    assert not form.allowed().any()
    with pytest.raises(ConfigError, match="takes more than -1 s for the first token"):
        forms.form(StructuredOutputsParams(choice=["a", "c"]))
    monkeypatch.undo()
    assert not form.allowed().any()
    assert other.allowed().any()
    assert forms.form(StructuredOutputsParams(choice=["a", "b"])).allowed().any()


def outcome(*given: Any) -> str:
    try:
        return chat_text(*given)
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_process_writes_what_this_program_writes(templates, name):
    tokenizer = byte_tokenizer()
    confined = Rendering(tokenizer)
    confined.sandbox = templates
    messages = [
        {"role": "system", "content": "s\u00e9"}, {"role": "user", "content": "x", "name": None},
        {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"},
    ]  # fmt: skip
    for more in ({"add_generation_prompt": True}, {"continue_final_message": True, "enable_thinking": False}):
        how = {"chat_template": TEMPLATES[name], **more}
        assert outcome(tokenizer, messages, how, confined) == outcome(tokenizer, messages, how)
    assert format_of(tokenizer, TEMPLATES[name], confined) == format_of(tokenizer, TEMPLATES[name])


def test_the_models_own_plain_template_is_rendered_here_and_no_other(monkeypatch):
    tokenizer = byte_tokenizer()
    rendering = Rendering(tokenizer)
    asked: list[str] = []

    class Records:
        def ask(self, program: str, about: Any) -> Any:
            asked.append(program)
            return {"text": "there"}

    rendering.sandbox = Records()  # type: ignore[assignment]
    messages = [{"role": "user", "content": "x"}]
    assert chat_text(tokenizer, messages, {}, rendering) == "user: x\n"
    assert asked == []
    assert chat_text(tokenizer, messages, {"chat_template": "{{ 1 }}"}, rendering) == "there"
    assert asked == ["{{ 1 }}"]
    tokenizer.chat_template = POWER
    powers = Rendering(tokenizer)
    powers.sandbox = rendering.sandbox
    assert chat_text(tokenizer, messages, {}, powers) == "there"
    assert asked[1:] == [POWER]


def test_a_format_of_calls_is_not_looked_for_again_and_again(templates):
    rendering = Rendering(byte_tokenizer())
    rendering.sandbox = templates
    with pytest.raises(SandboxError, match="the chat template was not run to its end: it takes more than"):
        format_of(byte_tokenizer(), POWER + "  ", rendering)


@pytest.mark.parametrize(
    "template",
    [
        POWER, LARGE, "{{ '%9999999d' % 1 }}", "{% for i in range(9) %}{% endfor %}", "{{ 'x'.zfill(10 ** 9) }}",
        "{{ 'x'.center(99999999) }}", "{{ 'x' | center(99999999) }}", "{{ lipsum(n=99999) }}", "{{ f(1) }}",
        "{{ '{:>99999999}'.format(1) }}", "{{ x['a'](1) }}", "{% if %}", "{{ 'x' | replace('x', 'yy') }}",
        "{{ 'a'.join(x) }}", "{% generation %}{% endgeneration %}",
    ],
)  # fmt: skip
def test_what_may_take_long_is_not_plain(template):
    assert not is_plain(template)


def test_usual_templates_are_plain():
    assert is_plain(byte_tokenizer().chat_template)
    assert is_plain("{% macro f(x) %}{{ x | tojson }}{% endmacro %}{{ f(messages[-1].content.strip()) }}{% break %}")
    assert sum(map(is_plain, TEMPLATES.values())) >= 0.7 * len(TEMPLATES)
