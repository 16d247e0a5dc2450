"""Files of prompts: whose adapter answers a row, what is asked, and what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models import byte_tokenizer
from veneer.answer.files import adapters_of, asked_of, write_answers
from veneer.answer.prompts import PromptRows, encode_chat, encode_prompt
from veneer.errors import ConfigError, DataError

TOKENIZER = byte_tokenizer()


def text(ids: Any) -> str:
    return TOKENIZER.decode(list(ids))


def test_a_row_names_its_adapter_or_none_and_others_take_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("data/mine", "here/mine", "here/other"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    rows = [{"prompt": "a"}, {"adapter": "mine"}, {"adapter": "other"}, {"adapter": ""}, {"adapter": None}]
    found = adapters_of(rows, tmp_path / "data" / "ask.jsonl", Path("x"))
    assert found == [Path("x"), tmp_path / "data" / "mine", Path("other"), None, None]
    with pytest.raises(DataError, match="row 2: no adapter 'nowhere'"):
        adapters_of([rows[0], {"adapter": "nowhere"}], tmp_path / "ask.jsonl", None)


def test_a_prompt_is_a_turn_a_conversation_or_a_text() -> None:
    chat = PromptRows(system="be")
    assert text(chat.read({"prompt": "hi"}, TOKENIZER)) == "<|system|>be<|end|><|user|>hi<|end|><|assistant|>"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "known"}]
    for row in ({"messages": turns}, {"prompt": turns}):
        assert text(PromptRows().read(row, TOKENIZER)) == "<|user|>a<|end|><|assistant|>"
    assert text(PromptRows(prompt="Of {n}?", raw=True).read({"n": 7, "messages": turns}, TOKENIZER)) == "Of 7?"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"x": 1}, r"row 1: its fields are \['x'\]"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no turn"),
    ],
)
def test_a_row_that_asks_nothing_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        asked_of([row], [None], TOKENIZER, PromptRows(), Path("ask.jsonl"))


def test_a_tokenizer_without_a_template_takes_plain_text_alone() -> None:
    plain = byte_tokenizer()
    plain.chat_template = None
    assert text(encode_prompt(plain, "hi")) == "hi"
    with pytest.raises(ConfigError, match="no chat template"):
        encode_chat(plain, [{"role": "user", "content": "hi"}])
    with pytest.raises(ConfigError, match="needs a chat template"):
        encode_prompt(plain, "hi", system="be")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content ", "damaged chat template: .*, line 1. Mend its chat_template.jinja"),
        ("{{ raise_exception('no users') }}", "refuses a conversation with the roles user: no users"),
    ],
)
def test_a_damaged_template_and_one_that_refuses_are_told(template: str, message: str) -> None:
    wrong = byte_tokenizer()
    wrong.chat_template = template
    with pytest.raises(DataError, match=message):
        encode_chat(wrong, [{"role": "user", "content": "hi"}])


def test_answers_are_written_beside_the_rows_fields(tmp_path: Path) -> None:
    rows = [{"prompt": "ä", "id": 3}, {"prompt": "b"}]
    asked = asked_of(rows, [None, None], TOKENIZER, PromptRows(raw=True), Path("ask.jsonl"))
    write_answers(tmp_path / "out.jsonl", asked, ["é", "x"])
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{**rows[0], "answer": "é"}, {**rows[1], "answer": "x"}]
    assert "ä" in lines[0]
