"""Several sources as one set: weights, counts, readings of their own, and what is refused."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from models import byte_tokenizer
from veneer.data import dataset as data_sets
from veneer.data import encoded_cache
from veneer.data.chat import render, with_template
from veneer.data.dataset import encode_all
from veneer.data.encoding import Encoder
from veneer.data.reader import RowReader
from veneer.data.rows import load_rows
from veneer.data.sources import Source, load_sources
from veneer.errors import ConfigError, DataError


def written(folder: Path, name: str, *rows: Any) -> str:
    path = folder / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    first = written(tmp_path, "a.jsonl", *({"prompt": f"a{i}", "completion": " x"} for i in range(7)))
    second = written(tmp_path, "b.csv", "q,label", *(f"b{i},y" for i in range(5)))
    return [first, second]


READERS = [RowReader(), RowReader(prompt="Q: {q}", completion=" {label}")]


def counts(rows: Dataset) -> Counter[str]:
    return Counter(row["prompt"].removeprefix("Q: ")[0] for row in rows)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, {"a": 7, "b": 5}),
        ({"weight": 2.5}, {"a": 7, "b": 12}),
        ({"weight": 0.6}, {"a": 7, "b": 3}),
        ({"count": 11}, {"a": 7, "b": 11}),
        ({"count": 2}, {"a": 7, "b": 2}),
    ],
)
def test_rows_are_taken_as_they_weigh(sources: list[str], more: dict[str, Any], expected: dict[str, int]) -> None:
    given = [Source(name=sources[0], reader=READERS[0]), Source(name=sources[1], reader=READERS[1], **more)]
    rows = load_sources(given, seed=3)
    assert counts(rows) == expected
    assert rows.to_list() == load_sources(given, seed=3).to_list()
    each = Counter(row["prompt"] for row in rows)
    assert max(each.values()) - min(n for name, n in each.items() if name[0] == "Q") <= 2 if more else True
    assert rows[8]["prompt"].startswith("Q: b")


def test_forms_that_differ_are_refused_and_chat_joins_them(sources: list[str], tmp_path: Path) -> None:
    chats = written(tmp_path, "c.jsonl", {"messages": [{"role": "user", "content": "c"}]})
    given = [Source(name=sources[0], reader=READERS[0]), Source(name=chats, reader=RowReader())]
    with pytest.raises(DataError, match=r"c\.jsonl holds rows of the form messages, and .*a\.jsonl of the form prompt"):
        load_sources(given, seed=0)
    given[0] = Source(name=sources[0], reader=RowReader(chat=True))
    assert len(load_sources(given, seed=0)) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 0}, "weight=0 must be above 0"),
        ({"weight": -1.5}, "weight=-1.5 must be above 0"),
        ({"weight": float("nan")}, "must be above 0"),
        ({"count": 0}, "count=0 must be at least 1"),
        ({"count": 3, "weight": 2}, "give weight or count, not both"),
    ],
)
def test_weights_that_mean_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Source(name="a.jsonl", reader=RowReader(), **options)


def test_a_weight_that_takes_nothing(sources: list[str]) -> None:
    with pytest.raises(DataError, match="takes none of 7 rows"):
        load_sources([Source(name=sources[0], reader=RowReader(), weight=0.01)], seed=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"", "is empty: its first line must name the columns"),
        ("x.csv", b"question,answer\nwhy,so\n", r"rows have the columns \['answer', 'question'\]"),
        ("x.csv", b"prompt,completion\nwhy,so\nonly\n", "row 3: 1 cells, and the first line names 2 columns"),
        ("x.csv", b"prompt,completion\n", "holds no rows"),
        ("x.txt", b"\n\n", "holds no rows"),
        ("x.txt", b"\xff\xfe\xfa", "is not text in UTF-8"),
        ("x.jsonl", b"", "holds no rows"),
        (
            "x.jsonl",
            b'{"text": "a"}\n{"prompt": "b", "completion": "c"}',
            "row 2: 'text' must be a string, not missing",
        ),
    ],
)
def test_bad_files_are_one_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_sources([Source(name=str(tmp_path / name), reader=RowReader())], seed=0)


def test_text_and_csv_are_read(tmp_path: Path) -> None:
    text = written(tmp_path, "t.txt", "first line", "", "  second ")
    assert load_rows(text, RowReader()).to_list() == [{"text": "first line"}, {"text": "  second "}]
    (tmp_path / "u.csv").write_bytes(b'\xef\xbb\xbfprompt, completion\r\n"a, ""b""\nc", d\r\n')
    assert load_rows(tmp_path / "u.csv", RowReader()).to_list() == [{"prompt": 'a, "b"\nc', "completion": " d"}]
    (tmp_path / "u.tsv").write_text("prompt\tcompletion\na, b\tc\n")
    assert load_rows(tmp_path / "u.tsv", RowReader()).to_list() == [{"prompt": "a, b", "completion": "c"}]


def test_a_chat_template_from_a_file(tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m.role }}]{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    file = written(tmp_path, "chat.jinja", template)
    tokenizer = with_template(byte_tokenizer(), file)
    ids = render(tokenizer, [{"role": "user", "content": "hi"}])
    assert tokenizer.decode(ids) == "[user]hi"
    with pytest.raises(DataError, match="cannot be read"):
        with_template(tokenizer, str(tmp_path / "nowhere.jinja"))
    with pytest.raises(DataError, match="is no chat template"):
        with_template(tokenizer, written(tmp_path, "bad.jinja", "{% for m in %}"))


def test_a_response_template_from_a_file(tmp_path: Path) -> None:
    template = {
        "start_anchor": "<a>",
        "fields": {"tool_calls": {"open": "!", "close": ".", "content": "json"}, "content": {"content": "text"}},
    }
    tokenizer = with_template(byte_tokenizer(), None, written(tmp_path, "calls.json", json.dumps(template)))
    assert tokenizer.parse_response("!7.", prefix="<a>") == {"tool_calls": 7}
    with pytest.raises(DataError, match=r"cannot be read: .* Give a file"):
        with_template(tokenizer, None, str(tmp_path / "nowhere.json"))
    for bad in ("{", "[7]", '{"fields": {}}', '{"fields": {"content": {"qq": 7}}}'):
        with pytest.raises(DataError, match=r"is no response template: .* Write one as"):
            with_template(tokenizer, None, written(tmp_path, "bad.json", bad))


def test_a_role_that_nobody_knows_is_named() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(DataError, match="the role 'robot', which the chat template does not know; roles are assistant"):
        render(tokenizer, [{"role": "robot", "content": "hi"}])
    tokenizer.chat_template += "{# robot #}"
    assert render(tokenizer, [{"role": "robot", "content": "hi"}])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(encoded_cache, "FEWEST_ROWS", 3)
    return tmp_path / "cache" / encoded_cache.FOLDER


def test_rows_are_encoded_once_for_equal_content(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    own = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, row, at: calls.append(row["text"]) or own(self, row, at))
    rows = [{"text": f"row {i}"} for i in range(5)]
    encoder = Encoder(tokenizer=byte_tokenizer(), kind="text", max_length=6)
    first = encode_all(Dataset.from_list(rows), encoder, "train")
    assert len(calls) == 5
    again = encode_all(Dataset.from_list(rows), Encoder(tokenizer=byte_tokenizer(), kind="text", max_length=6), "train")
    assert (len(calls), again.to_list()) == (5, first.to_list())
    others = [
        (rows[:4], encoder),
        (rows, Encoder(tokenizer=byte_tokenizer(), kind="text", max_length=7)),
        (rows, Encoder(tokenizer=byte_tokenizer(["<|user|>"]), kind="text", max_length=6)),
    ]
    for given, other in others:
        before = len(calls)
        encode_all(Dataset.from_list(given), other, "train")
        assert len(calls) == before + len(given)
    assert sum(each.is_dir() for each in cache.iterdir()) == 4


def test_two_at_once_encode_once(cache: Path) -> None:
    rows, found = Dataset.from_list([{"text": f"row {i}"} for i in range(50)]), []
    encoder = Encoder(tokenizer=byte_tokenizer(), kind="text")

    def work() -> None:
        found.append(encode_all(rows, encoder, "train").to_list())

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == found[2]
    assert [each.name for each in cache.iterdir() if each.is_dir() and each.name.startswith(".")] == []


def test_an_empty_set_is_one_error() -> None:
    encoder = Encoder(tokenizer=byte_tokenizer(), kind="text")
    with pytest.raises(DataError, match="the train data has no rows"):
        encode_all(Dataset.from_list([]), encoder, "train")
    with pytest.raises(DataError, match="has no rows"):
        data_sets.columns_of(Dataset.from_list([]))
