import json
import os
import re
from pathlib import Path

import pytest
from datasets import Dataset

from veneer.data.chat import render
from veneer.data.column_templates import fields_of
from veneer.data.encoding import Encoder
from veneer.data.preference import PreferenceReader
from veneer.data.reader import RowReader
from veneer.data.rows import load_rows, split_off, stream_rows
from veneer.errors import ConfigError, DataError

PAIR = {"messages": [{"role": "user", "content": "what"}, {"role": "assistant", "content": "yes"}]}


@pytest.fixture
def jsonl(tmp_path):
    def write(*rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        return path

    return write


@pytest.mark.parametrize(
    ("row", "reader", "expected"),
    [
        (PAIR, RowReader(), PAIR),
        (
            {"conversations": [{"from": "human", "value": "what"}, {"from": "gpt", "value": "yes"}], "id": 3},
            RowReader(),
            PAIR,
        ),
        ({"prompt": "what", "completion": "yes"}, RowReader(), {"prompt": "what", "completion": "yes"}),
        ({"prompt": "what", "completion": "yes"}, RowReader(chat=True), PAIR),
        ({"prompt": PAIR["messages"][:1], "completion": PAIR["messages"][1:]}, RowReader(), PAIR),
        (
            {"instruction": "say", "input": "it", "output": "yes"},
            RowReader(),
            {"prompt": "say\n\nit", "completion": "yes"},
        ),
        ({"instruction": "what", "input": "", "response": "yes"}, RowReader(chat=True), PAIR),
        ({"text": "yes", "label": 1}, RowReader(), {"text": "yes"}),
        (
            {"q": "what", "label": 4},
            RowReader(prompt="Q: {q}", completion="{label}"),
            {"prompt": "Q: what", "completion": "4"},
        ),
        (
            {"prompt": "what", "completion": "yes"},
            RowReader(chat=True, system="be brief"),
            {"messages": [{"role": "system", "content": "be brief"}, *PAIR["messages"]]},
        ),
    ],
)
def test_every_form(jsonl, row, reader, expected):
    assert load_rows(jsonl(row, "", row), reader).to_list() == [expected, expected]


def test_json_and_parquet_hold_the_same_rows(jsonl, tmp_path):
    rows = [{"text": f"row {i}"} for i in range(3)]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    sources = [jsonl(json.dumps(rows), name="rows.json"), tmp_path / "rows.parquet", jsonl(*rows)]
    assert [load_rows(source, RowReader()).to_list() for source in sources] == [rows] * 3


def test_bad_rows_are_gathered_by_number(jsonl):
    good = {"prompt": "a", "completion": "b"}
    bad = [good, "{", good, "[1]", {"prompt": 3, "completion": "b"}, {"prompt": "a"}]
    with pytest.raises(DataError) as error:
        load_rows(jsonl(*bad), RowReader())
    told = str(error.value)
    for part in ("row 2: not JSON", "row 4: must be an object, not list", "row 5: 'prompt' must be a string, not int",
                 "row 6: 'completion' must be a string, not missing"):  # fmt: skip
        assert part in told
    assert "row 1:" not in told


def test_a_row_that_is_cut_off_or_of_another_form_is_shown(jsonl):
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(DataError) as error:
        load_rows(jsonl(chat, '{"messages": [{"role": "us', {"question": "a", "answer": "b"}), RowReader())
    told = str(error.value)
    assert """row 2: not JSON (Unterminated string starting at, character 24 of '{"messages": [{"role": "us')""" in told
    assert "row 3: messages are missing; the row has the fields ['answer', 'question']" in told


def test_many_bad_rows_are_counted(jsonl):
    rows = ({"prompt": "a", f"column{i}": "b"} for i in range(9))
    with pytest.raises(DataError, match=r"(?s)9 problems\n  row 1: .*\n  row 5: .*\n  and 4 more$"):
        load_rows(jsonl(*rows), RowReader(prompt="{x}", completion="b"))


def test_what_rows_have_in_common_is_said_once(jsonl):
    rows = [*[{"q": "a"}] * 9, "{"]
    with pytest.raises(DataError) as error:
        load_rows(jsonl(*rows), RowReader(prompt="{x}", completion="b"))
    assert str(error.value).count("asks for the field") == 1
    assert "rows 1, 2, 3, 4, 5 and 4 more: the template" in str(error.value)
    assert "\n  row 10: not JSON" in str(error.value)


@pytest.mark.parametrize("name", ["rows.jsnl", "folder/rows.jsonll", "rows.jsonl"])
def test_a_misspelt_file_is_told_at_once_with_the_nearest(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("veneer.data.rows.load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "rows1.jsonl", tmp_path / "folder" / "rows1.jsonl"):
        place.write_text("{}")
    nearest = Path(name).parent / "rows1.jsonl"
    with pytest.raises(DataError, match=rf"there is no file {name}; the nearest is {nearest}"):
        load_rows(name, RowReader())


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "a list that is not empty"),
        ([3], "must be an object with role and content"),
        ([{"content": "a"}], "has no role"),
        ([{"role": "user", "content": 3}], "'content' must be a string, not int"),
        ([{"from": "narrator", "value": "a"}], "is from 'narrator'"),
    ],
)
def test_messages_that_do_not_fit(jsonl, turns, message):
    with pytest.raises(DataError, match=message):
        load_rows(jsonl({"messages": turns}), RowReader())


def test_unknown_columns_say_what_there_is(jsonl):
    with pytest.raises(DataError, match=r"\['answer', 'question'\].*data\.prompt and data\.completion"):
        load_rows(jsonl({"question": "a", "answer": "b"}), RowReader())


def test_a_template_that_does_not_fit(jsonl):
    with pytest.raises(DataError, match=r"row 1: the template '\{nothing\}' asks for the field 'nothing', .*\['q'\]"):
        load_rows(jsonl({"q": "a"}), RowReader(prompt="{nothing}", completion="{q}"))
    with pytest.raises(ConfigError, match=r"'\{q' does not fit"):
        load_rows(jsonl({"q": "a"}), RowReader(prompt="{q", completion="{q}"))


def test_a_template_writes_no_null(jsonl):
    rows = jsonl({"q": "a", "at": {"x": "b"}}, {"q": None, "at": {"x": "b"}}, {"q": "a", "at": {"x": None}})
    with pytest.raises(DataError, match=r"row 2: the field 'q' .* is empty \(null\).*\n  row 3: the field 'at\[x\]'"):
        load_rows(rows, RowReader(prompt="{q}", completion="{at[x]}"))


def test_tools_that_the_first_row_lacks_are_kept(jsonl):
    tools = [{"type": "function", "function": {"name": "look"}}]
    rows = load_rows(jsonl(PAIR, {**PAIR, "tools": tools}), RowReader())
    assert rows[0]["tools"] is None
    assert json.loads(rows[1]["tools"]) == tools


@pytest.mark.parametrize("conversational", [False, True])
def test_what_rows_give_their_templates_is_kept(jsonl, tokenizer, conversational):
    tokenizer.chat_template = "{% if say %}{{ say }}{% else %}no{% endif %}{{ ' ' }}{{ tools | length }}"
    turns = PAIR["messages"]
    chat = {"prompt": turns[:1], "completion": turns[1:]} if conversational else PAIR
    settings = [{"say": "cat"}, {"loud": 7, "say": None}, {"say": ["a", "dog"]}]  # no table has a type for all three
    given = [
        {**chat, "chat_template_kwargs": each, "tools": '[{"name": "look"}, {"name": "see"}]'} for each in settings
    ]
    encode = Encoder(tokenizer=tokenizer, kind="messages")
    rows = [encode(row, 0)["input_ids"] for row in load_rows(jsonl(*given), RowReader())]
    assert rows == [render(tokenizer, turns, {**each, "tools": [{}, {}]}) for each in settings]


def test_braces_of_a_template(jsonl):
    rows = load_rows(jsonl({"q": "a"}), RowReader(prompt="{{{q}}}", completion="b"))
    assert rows[0]["prompt"] == "{a}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", "{", "is not JSON .*name it .jsonl"),
        ("rows.json", "{}", "must hold a list of objects, not dict"),
        ("rows.xlsx", "a,b", "must end in .jsonl, .json, .csv, .tsv, .parquet or .txt"),
        ("rows.jsonl", "", "holds no rows"),
        ("rows.parquet", "no", "is not a parquet file"),
    ],
)
def test_files_that_cannot_be_read(jsonl, name, content, message):
    with pytest.raises(DataError, match=message):
        load_rows(jsonl(content, name=name), RowReader())


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="there is no file"):
        load_rows(tmp_path / "none.jsonl", RowReader())
    with pytest.raises(DataError, match=r"is a folder: give a file with rows"):
        load_rows(tmp_path, RowReader())
    with pytest.raises(DataError, match=rf"{os.devnull} is no regular file: give a file with rows"):
        load_rows(os.devnull, RowReader())


def test_limit_and_split(jsonl):
    rows = load_rows(jsonl(*[{"text": str(i)} for i in range(13)]), RowReader(), limit=11)
    assert rows["text"] == [str(i) for i in range(11)]
    train, held_out = split_off(rows, 0.3, seed=2)
    assert (len(train), len(held_out)) == (8, 3)
    assert sorted(int(t) for t in [*train["text"], *held_out["text"]]) == list(range(11))
    assert split_off(rows, 0.3, seed=2)[1]["text"] == held_out["text"] != split_off(rows, 0.3, seed=3)[1]["text"]
    with pytest.raises(DataError, match="leaves no rows to train on"):
        split_off(rows, 0.01, seed=2)


@pytest.mark.parametrize(
    ("row", "reader", "told"),
    [
        ({"prompt": "a", "completion": "b"}, RowReader(system="be brief"), "system .* set chat to make turns"),
        ({"text": "a"}, RowReader(system="be brief", chat=True), "chat and system .* plain text"),
        ({"text": "a"}, RowReader(chat=True), "chat is for conversations"),
    ],
)
def test_settings_of_chats_are_refused_for_rows_that_are_none(jsonl, row, reader, told):
    with pytest.raises(ConfigError, match=told):
        load_rows(jsonl(row), reader)


@pytest.mark.parametrize(
    ("columns", "advice"),
    [
        (["question", "answer"], 'data.prompt and data.completion, such as "{question}" and "{answer}"'),
        (["label", "ticket"], 'such as "{ticket}" and "{label}"'),
        (["id", "label", "text_de", "question"], 'such as "{question}" and "{label}"'),
        (["a", "b"], 'such as "{a}" and "{b}"'),
        (["ticket"], "of 'ticket' alone make a column"),
    ],
)
def test_columns_of_no_form_get_templates_over_them(columns, advice):
    with pytest.raises(DataError, match=re.escape(advice)):
        RowReader().form(columns)
    with pytest.raises(DataError, match="read them: --prompt"):
        RowReader(advice="--prompt").form(columns)


def test_rows_of_two_forms_are_refused_by_number(jsonl):
    turns = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    mixed = [{"prompt": "a", "completion": "b"}, {"prompt": turns[0], "completion": turns[1]}]
    with pytest.raises(DataError, match="row 2 is of the form messages, and row 1 of the form prompt-completion"):
        load_rows(jsonl(*mixed), RowReader())


@pytest.mark.parametrize(
    ("row", "reader", "unused"),
    [
        ({"text": "yes", "label": 1}, RowReader(), "not used: column label. The rows are plain text"),
        ({**PAIR, "id": 3, "tools": [], "source": "x"}, RowReader(), "not used: columns id, source"),
        ({"q": {"en": "what"}, "a": 4, "b": 5}, RowReader(prompt="{q[en]}", completion="{a}"), "not used: column b"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "n": 1}, PreferenceReader(task="dpo"), "not used: column n"),
        ({"text": "yes", "task_ids": 1}, RowReader(), None),
        ({"q": "what", "chosen": "a", "rejected": "b"}, PreferenceReader(task="dpo", prompt="{q}"), None),
        ({"prompt": "what", "answer": "4"}, PreferenceReader(task="grpo"), None),
    ],
)
def test_columns_that_nothing_reads_are_told(jsonl, caplog, row, reader, unused):
    path = jsonl(row, row)
    load_rows(path, reader)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (unused is not None)
    assert all(line.startswith(f"{path}: {unused}") for line in told)


def test_rows_that_keep_their_own_system_message_are_told(jsonl, caplog):
    asked = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    own = [{"role": "system", "content": "own"}, *asked]
    path = jsonl({"messages": own}, {"messages": asked})
    load_rows(path, RowReader(system="given"))
    assert f"{path}: 1 of 2 rows have a system message of their own" in caplog.text
    caplog.clear()
    load_rows(path, RowReader())
    assert not caplog.text


def test_streamed_rows_tell_of_unused_columns_too(jsonl, caplog):
    rows = stream_rows(jsonl({"text": "yes", "label": 1}, {"text": "no", "label": 0}), RowReader())
    assert [row["text"] for row in rows] == ["yes", "no"]
    assert caplog.text.count("not used: column label") == 1


def test_a_template_names_its_columns():
    assert fields_of("{a} {b.c} {d[0]:>3} {{e}} {}") == {"a", "b", "d"}
    assert fields_of("{") == set()
