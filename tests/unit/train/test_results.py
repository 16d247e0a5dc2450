"""The last lines of a run: rewards, and the command that asks what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from veneer.recipe.recipe import Recipe, parse_recipe
from veneer.train.results import next_command, result_lines


def made(tmp_path: Path, row: dict[str, Any], method: str = "lora", **more: Any) -> Recipe:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(row))
    data = {"train": str(rows), **more.pop("data", {})}
    values = {"model": {"source": "base"}, "data": data, "adapter": {"method": method}, "output": "my runs/a"}
    return parse_recipe(values | more)


CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


@pytest.mark.parametrize(
    ("row", "more", "command"),
    [
        (CHAT, {}, "veneer chat 'my runs/a/adapter' (or: veneer merge --base base --adapter 'my runs/a/adapter' -o "),
        ({"prompt": "q", "completion": "a"}, {}, "veneer generate 'my runs/a/adapter' --raw -p TEXT (or: "),
        ({"prompt": "q", "completion": "a"}, {"data": {"chat": True}}, "veneer chat 'my runs/a/adapter'"),
        ({"text": "q"}, {"data": {"eval_fraction": 0.1}}, "veneer eval --recipe 'my runs/a' -m perplexity; veneer m"),
        ({"text": "q"}, {"method": "full"}, "veneer generate 'my runs/a/adapter' --raw -p TEXT"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"task": "reward"}, "veneer info 'my runs/a'"),
    ],
)
def test_a_run_names_the_command_that_asks_it_as_its_rows_did(
    tmp_path: Path, row: dict[str, Any], more: dict[str, Any], command: str
) -> None:
    assert command in next_command(made(tmp_path, row, **more), "my runs/a/adapter")


def asked(system: str | None, question: str = "q") -> dict[str, Any]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return {"messages": [*first, *({**turn, "content": question} for turn in CHAT["messages"])]}


def conversation(system: str) -> dict[str, Any]:
    return {"conversations": [{"from": "system", "value": system}, {"from": "human", "value": "q"}]}


PAIR = {
    "prompt": asked("Be brief.")["messages"][:2],
    "chosen": CHAT["messages"][1:],
    "rejected": [{"role": "assistant", "content": "b"}],
}


@pytest.mark.parametrize(
    ("rows", "more", "command"),
    [
        (
            [asked('It\'s "one" word.'), asked('It\'s "one" word.', "other")],
            {},
            """ --system 'It'"'"'s "one" word.' """,
        ),
        ([asked(None)] * 2, {"data": {"system": "Be brief."}}, " --system 'Be brief.' "),
        ([asked(None), asked("Be brief.")], {}, " "),
        ([asked("Be long."), asked("Be brief.")], {}, " --system TEXT "),
        ([asked("Be brief.\n\nAnd kind.")] * 2, {}, " --system TEXT "),
        ([conversation("Be brief.")], {}, " --system 'Be brief.' "),
        ([PAIR], {"task": "dpo"}, " --system 'Be brief.' "),
        ([asked("Be brief."), {"messages": 3}, asked("Be long.")], {}, " --system 'Be brief.' "),  # the run ends well
    ],
)
def test_the_command_asks_with_the_system_message_of_all_rows(
    tmp_path: Path, rows: list[dict[str, Any]], more: dict[str, Any], command: str
) -> None:
    recipe = made(tmp_path, {}, **more)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert next_command(recipe, "a").startswith(f"veneer chat a{command}(or: ")


def test_a_long_system_message_is_told_with_its_place(tmp_path: Path) -> None:
    record = {"results": {"train_loss": 0.01, "steps": 7, "seconds": 3.0}, "saved": "a"}
    *_, last = result_lines(made(tmp_path, asked("Be brief. " * 40)), record)
    assert last.startswith(f"its rows were asked with the system message of {tmp_path / 'rows.jsonl'}: give it with --")
    *_, last = result_lines(made(tmp_path, asked(None), data={"system": "Be brief. " * 40}), record)
    assert last.startswith("its rows were asked with the system message of data.system: give it with --system")
    *_, last = result_lines(made(tmp_path, asked("Be brief.")), record)
    assert last.startswith("next: ")


def test_rewards_come_before_the_loss(tmp_path: Path) -> None:
    results = {"train_loss": 0.01, "steps": 7, "seconds": 3.0, "eval_reward": 0.5, "eval_rewards/accuracies": 0.25}
    log = [{"step": 1, "reward": 0.125}, {"step": 7, "reward": 0.75}, {"step": 7, "eval_reward": 0.5}]
    record = {"results": results, "saved": "runs/a/adapter", "log": log}
    first, saved, _ = result_lines(made(tmp_path, CHAT), record)
    assert first.startswith(
        "reward 0.7500, at first 0.1250, held-out reward 0.5000, training loss 0.0100, held-out acc"
    )
    assert saved == "saved in runs/a/adapter; the run is written down in my runs/a/run.json"
