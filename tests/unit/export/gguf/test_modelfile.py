"""Ollama's folder: the template in Go renders what the model's own does, or is left out."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import jinja2
import pytest
from typer.testing import CliRunner

from veneer.cli.app import app
from veneer.errors import FormatError
from veneer.export.gguf.go_template import Messages, chat_shape
from veneer.export.gguf.model import GgufOptions
from veneer.export.gguf.modelfile import export_ollama

from .tiny import tiny_folder, tokenizer

LOOP = "{% for m in messages %}"
TEMPLATES = {
    "chatml": LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "chatml with a system message of its own": "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help."
    "<|im_end|>\n{% endif %}" + LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama 3": "<|begin|>" + LOOP + "<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}",
    "gemma 2": "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}<bos>" + LOOP
    + "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}",
    "gemma 3": "<bos>{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}" + LOOP
    + "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ first if loop.first else '' }}{{ m.content }}"
    "<end>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}",
    "llama 2": "{% if messages[0].role == 'system' %}"
    "{% set first = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}" + LOOP
    + "{% if m.role == 'user' %}<s>[INST] {{ first if loop.first else '' }}{{ m.content }} [/INST]{% else %} "
    "{{ m.content }} </s>{% endif %}{% endfor %}",
    "phi 3": LOOP + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "zephyr": LOOP + "<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "with braces": LOOP + "{{ '{{' }}{{ m.role }}}}{{ m.content }};{% endfor %}",
}  # fmt: skip


def renderer(template: str) -> Any:
    def fail(text: str) -> None:
        raise FormatError(text)

    compiled = jinja2.Environment().from_string(template)
    return lambda messages: compiled.render(messages=messages, add_generation_prompt=True, raise_exception=fail)


def run_go(template: str, messages: Messages) -> str:
    """The few words of Go's template language that are used, run as Go runs them."""
    pieces = [each for each in re.split(r"(\{\{.*?\}\})", template, flags=re.S) if each]
    system = next((m["content"] for m in messages if m["role"] == "system"), "")

    def holds(words: str, i: int, message: Any) -> bool:
        if words == "not .System":
            return not system
        if words == "and $.System (eq $i 1)":
            return bool(system) and i == 1
        found = re.fullmatch(r'eq \.Role "(\w+)"', words)
        assert found is not None, words
        return bool(message["role"] == found[1])

    def block(at: int, on: bool, i: int = 0, message: Any = None) -> tuple[str, int]:
        """The text up to the end or the else of a block, and where that stands."""
        text = ""
        while at < len(pieces):
            piece = pieces[at]
            words = piece[2:-2].strip() if piece.startswith("{{") else None
            if words is None:
                text += piece if on else ""
            elif words == "end" or words.startswith("else if "):
                return text, at
            elif words.startswith("if "):
                taken, condition = False, words[3:]
                while True:
                    now = on and not taken and holds(condition, i, message)
                    inner, at = block(at + 1, now, i, message)
                    text, taken = text + inner, taken or now
                    words = pieces[at][2:-2].strip()
                    if words == "end":
                        break
                    condition = words.removeprefix("else if ")
            elif words.startswith("range "):
                for number, each in enumerate(messages):
                    inner, end = block(at + 1, on, number, each)
                    text += inner
                at = end
            elif on:
                text += {".Content": message and message["content"], "$.System": system, '"{{"': "{{"}[words]
            at += 1
        return text, at

    return block(0, True)[0]


CHATS = [
    [("user", "Hi")],
    [("system", "Be kind."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "So: 1 + 1?")],
    [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_go_template_renders_what_the_model_s_own_does(name: str) -> None:
    render = renderer(TEMPLATES[name])
    shape = chat_shape(render)
    assert shape is not None
    for chat in CHATS:
        messages = [{"role": role, "content": content} for role, content in chat]
        if name in ("gemma 2",) and messages[0]["role"] == "system":
            continue
        assert shape.rendered(messages) == run_go(shape.go(), messages) == render(messages)


@pytest.mark.parametrize(
    "template",
    [
        LOOP + "{{ loop.index }}{{ m.content }}{% endfor %}",  # counts
        LOOP + "{{ m.content | upper }}{% endfor %}",
        "{{ messages[-1].content }}",
        LOOP + "{% if not loop.last %}({{ m.content }}){% else %}{{ m.content }}{% endif %}{% endfor %}?",
    ],
)
def test_a_template_that_is_more_than_texts_around_messages_has_no_shape(template: str) -> None:
    assert chat_shape(renderer(template)) is None


def test_the_folder_is_what_ollama_create_takes(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model", "llama")
    (tmp_path / "model" / "generation_config.json").write_text('{"temperature": 0.7, "repetition_penalty": 1.1}')
    report = export_ollama(tmp_path / "model", tmp_path / "out", GgufOptions(type="Q8_0"))
    assert report.has_template
    assert sorted(os.listdir(tmp_path / "out")) == ["Modelfile", "model.gguf"]
    text = (tmp_path / "out" / "Modelfile").read_text()
    template = re.search(r'^TEMPLATE """(.*?)"""$', text, re.S | re.M)
    assert template is not None
    chat = [{"role": "user", "content": "Hi"}]
    assert run_go(template[1], chat) == tokenizer().apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    assert text.startswith("FROM ./model.gguf\n")
    assert text.splitlines()[-5:] == [
        'PARAMETER stop "<|end|>"', 'PARAMETER stop "<|stop|>"', "PARAMETER temperature 0.7",
        "PARAMETER repeat_penalty 1.1", "PARAMETER num_ctx 128",
    ]  # fmt: skip


def test_only_such_a_folder_is_overwritten_and_a_missing_template_is_told(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model", "llama")
    (tmp_path / "model" / "chat_template.jinja").write_text(LOOP + "{{ loop.index }}{{ m.content }}{% endfor %}")
    order = ["export", "ollama", str(tmp_path / "model"), "-o", str(tmp_path / "out"), "-t", "Q8_0"]
    done = CliRunner().invoke(app, order)
    assert done.exit_code == 0
    assert "the Modelfile has no TEMPLATE" in done.stderr
    assert "TEMPLATE" not in (tmp_path / "out" / "Modelfile").read_text()
    assert "not empty" in CliRunner().invoke(app, order).stderr
    assert CliRunner().invoke(app, [*order, "--force"]).exit_code == 0
    (tmp_path / "out" / "mine.txt").touch()
    assert "holds 'mine.txt'" in CliRunner().invoke(app, [*order, "--force"]).stderr
