"""Rows of the recipes that learn from answers: shipped as the script writes them, with held-out rows of their own."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from models import byte_tokenizer
from veneer.data.chat import with_template

FOLDER = Path(__file__).parents[3] / "examples" / "answers"
NAMES = ("labels", "orders", "sums", "games")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)

    def imported(name: str) -> ModuleType:
        return importlib.reload(importlib.import_module(name))

    return imported


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]


def test_the_shipped_files_are_what_the_script_writes(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_rows = module("make_rows")
    monkeypatch.setattr(make_rows, "HERE", tmp_path)
    make_rows.main()
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in FOLDER.glob("*.jsonl")}
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (FOLDER / path.name).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_no_held_out_question_is_trained(name: str) -> None:
    def asked(rows: list[dict[str, Any]]) -> set[Any]:
        return {row.get("number", row["prompt"][-1]["content"]) for row in rows}

    seen, new = asked(rows(name)), asked(rows(f"{name}_heldout"))
    assert len(new) == len(rows(f"{name}_heldout"))
    assert not seen & new


def test_a_call_is_read_as_the_template_writes_it() -> None:
    tokenizer = with_template(byte_tokenizer(), str(FOLDER / "tools.jinja"), str(FOLDER / "tools.json"))
    for name in ("sums", "games"):
        messages = rows(name)[0]["prompt"][:3]
        before, text = (
            tokenizer.apply_chat_template(messages[:n], tokenize=False, add_generation_prompt=n == 2) for n in (2, 3)
        )
        given = messages[2]["tool_calls"][0]["function"]
        read = tokenizer.parse_response(text.removeprefix(before), prefix=before)["tool_calls"][0]["function"]
        assert read == {**given, "arguments": {key: str(value) for key, value in given["arguments"].items()}}


def test_rewards_of_labels_and_orders(module: Any) -> None:
    rewards = module("rewards")
    texts, answers = ["positive ", "negative", "Positive.", "fine"], ["positive"] * 4
    assert rewards.label(texts, answers) == [1.0, 0.1, 0.0, 0.0]
    assert rewards.right(texts, answers) == [1.0, 0.0, 0.0, 0.0]
    wanted = json.dumps({"item": "cups", "count": 7, "city": "Oslo", "day": "Friday"})
    half = json.dumps({"item": "cups", "count": 7, "city": "Rome", "day": "Sunday"})
    texts = [wanted, half, "{}", "[7]", "cups"]
    assert rewards.fields(texts, [wanted] * 5) == pytest.approx([1.0, 0.6, 0.2, 0.0, 0.0])
    assert rewards.whole(texts, [wanted] * 5) == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_rewards_of_sums(module: Any) -> None:
    tools = module("tools")
    assert tools.calculator("58 + 247") == "= 305"
    with pytest.raises(ValueError, match="write numbers with"):
        tools.calculator("2**9**9")
    call, said = {"role": "assistant", "content": ""}, {"role": "assistant", "content": " 305"}
    told, other = {"role": "tool", "content": "= 305"}, {"role": "tool", "content": "= 7"}
    within, another = {"role": "assistant", "content": "It is 305."}, {"role": "assistant", "content": "1305"}
    conversations = [[call, told, said], [said], [call, told, call], [call, other, call, told, said], [call, other]]
    conversations += [[call, told, within], [within], [call, told, another]]
    assert tools.sums(conversations, ["305"] * 8) == pytest.approx([1.0, 1.0, 0.3, 0.9, 0.0, 0.6, 0.6, 0.3])


def test_six_halvings_find_a_number(module: Any) -> None:
    games = module("games")
    game = games.Higher()
    for number in range(1, games.LAST):
        game.reset(number=number)
        low, high = 1, games.LAST - 1
        while not game.is_found:
            middle = (low + high) // 2
            told = game.guess(middle)
            low, high = (middle + 1, high) if told.startswith("Higher") else (low, middle - 1)
        assert game.get_reward() == 1
        assert games.found([[]], [game]) == [1.0]


def test_a_game_rewards_what_is_known(module: Any) -> None:
    games = module("games")
    game = games.Higher()
    game.reset(number=64)
    assert game.get_reward() == 0
    assert game.guess(32) == "Higher. The number is from 33 to 64."
    assert game.get_reward() == pytest.approx(0.5 / 6)
    with pytest.raises(ValueError, match="five is no whole number: guess one from 33 to 64"):
        game.guess("five")
    assert game.guess(32).startswith("Outside")
    assert game.get_reward() == pytest.approx(0.5 / 6 - 0.05)
    for number in (48, 56, 60, 62):
        game.guess(number)
    assert game.guess(64) == "The game is over."
    assert games.found([[]], [game]) == [0.0]
