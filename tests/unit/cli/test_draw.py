"""`veneer draw`: several answers to each row, their log-probabilities and rewards, and the best as rows to train on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import Result

from veneer import AutoPeftModelForCausalLM
from veneer.answer.prompts import PromptRows
from veneer.data.reader import RowReader
from veneer.learn.drawn_rows import kept_rows
from veneer.learn.journal import unpacked

from .conftest import told_early

Veneer = Callable[..., Result]
REWARDS = """
def letters(completions, answer, weightless=1.0, **row):
    return [len(set(text)) / 100 * weightless for text in completions]

def vowels(completions, prompts, completion_ids, **row):
    return [None if p == "three" else float(len(ids)) for p, ids in zip(prompts, completion_ids, strict=True)]
"""
ROWS = [{"prompt": "one", "answer": "x"}, {"prompt": "two two", "answer": "y"}, {"prompt": "three", "answer": "z"}]


@pytest.fixture
def drawn(veneer: Veneer, adapter_folder: Path, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))

    def run(*options: object, n: int = 3) -> list[dict[str, Any]]:
        output = tmp_path / "drawn.jsonl"
        given = ("-i", tmp_path / "rows.jsonl", "-o", output, "--force", "--n", n, "--max-new-tokens", 9, "--seed", 5)
        found = veneer("draw", adapter_folder, *given, *options)
        assert found.exit_code == 0, found.output
        return [json.loads(line) for line in output.read_text().splitlines()]

    return run


def test_answers_have_the_log_probabilities_of_the_model(drawn: Any, adapter_folder: Path, model_folder: Path) -> None:
    lines = drawn("--temperature", 0.7)
    assert [line["prompt"] for line in lines] == [row["prompt"] for row in ROWS for _ in range(3)]
    assert [line["answer"] for line in lines] == [row["answer"] for row in ROWS for _ in range(3)]
    assert len({tuple(line["ids"]) for line in lines}) == 9
    model = AutoPeftModelForCausalLM.from_pretrained(adapter_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    for line in lines:
        prompt, ids = PromptRows().read(line, tokenizer), line["ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double()
        own = (logits / 0.7).log_softmax(dim=-1)[torch.arange(len(ids)), ids]
        assert unpacked(line["logprobs"]) == pytest.approx(own.tolist(), abs=1e-4)
        assert "kept" not in line
        assert line["completion"] == tokenizer.decode(ids, skip_special_tokens=True)
    assert drawn("--temperature", 0.7, "--limit", 1, "--batch-size", 1) == lines[:3]  # whatever else is drawn
    assert all(max(unpacked(line["kept"])) < 0 for line in drawn("--top-p", 0.5, "--limit", 1))


def test_rewards_choose(drawn: Any, tmp_path: Path) -> None:
    letters = f"{{function: {tmp_path}/rewards.py:letters, weight: 2, weightless: 1.0}}"
    rewarded = ("-r", letters, "-r", f"{tmp_path}/rewards.py:vowels")
    lines = drawn(*rewarded)
    for line in lines:
        first, second = len(set(line["completion"])) / 100, None if line["prompt"] == "three" else len(line["ids"])
        assert line["functions"] == ["letters", "vowels"]
        assert line["rewards"] == [first, second]
        assert line["reward"] == pytest.approx(2 * first + (second or 0))
    best = drawn(*rewarded, "--keep", "best")
    groups = [lines[start : start + 3] for start in (0, 3, 6)]
    wanted = [max(group, key=lambda line: line["reward"]) for group in groups]
    assert best == [{key: line[key] for key in ("prompt", "completion")} for line in wanted]
    most = sorted(line["reward"] for line in lines)[4]
    assert drawn(*rewarded, "--above", most) == [line for line in lines if line["reward"] > most]


def test_conversations_are_answered_by_messages(drawn: Any, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "three"}, {"role": "assistant", "content": "known"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns, "answer": "z"}))
    lines = drawn(n=2)
    assert [line["prompt"] for line in lines] == [turns[:1]] * 2
    assert all(line["completion"][0]["role"] == "assistant" for line in lines)
    assert "messages" not in lines[0]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "why", "answer": "z"}))
    assert drawn("-p", "Q: {question}", n=1)[0]["prompt"] == "Q: why"


def test_rows_that_were_drawn_before_keep_no_facts_of_their_old_answers(drawn: Any, tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(
        "async def later(completions, mark, reward, **row):\n"
        "    return [len(text) / 100 + m + own for text, m, own in zip(completions, mark, reward, strict=True)]\n"
    )
    old = {"kept": "AAAA", "functions": ["old"], "rewards": [0.5], "reward": 0.5, "completions": "row's", "mark": 3}
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0] | old))
    [line] = drawn(n=1)
    assert line.keys() == {"answer", "mark", "prompt", "completion", "completions", "ids", "logprobs", "finish"}
    [line] = drawn("-r", f"{tmp_path}/rewards.py:later", n=1)  # an asynchronous one, which reads the row's columns
    assert line["functions"] == ["later"]
    assert line["reward"] == pytest.approx(len(line["completion"]) / 100 + 3.5)


def test_answers_without_an_opinion_are_not_kept() -> None:
    group = [{"prompt": "p", "completion": str(reward), "reward": reward} for reward in (None, 0.0, 1.0, 1.0, 0.5)]
    assert kept_rows([group], best=False, above=None) == group
    assert kept_rows([group], best=False, above=0.2) == group[2:]
    assert kept_rows([group, group[:1]], best=True, above=None) == [{"prompt": "p", "completion": "1.0"}]
    assert kept_rows([group], best=True, above=1.0) == []


def test_wrong_settings_are_refused_before_torch_is_imported(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]))
    given = ("draw", str(model_folder), "-i", str(tmp_path / "rows.jsonl"), "-o", str(tmp_path / "out.jsonl"))
    cases = [
        ((*given, "--temperature", "0"), "--temperature 0.0 must be above 0"),
        ((*given, "--keep", "most"), "--keep 'most' must be all or best"),
        ((*given, "--keep", "best"), "--keep best and --above compare rewards: add --reward ENTRY"),
        ((*given, "--reward-on-error", "skip"), "--reward-on-error 'skip' must be stop or none"),
        ((*given, "-r", "{function: [}"), "is not an entry of a recipe"),
        ((*given, "-r", "{weight: 2}"), "names no function"),
        ((*given, "-r", "{function: regex, weight: a}"), "weight 'a' must be a number"),
        ((*given[:-1], str(tmp_path / "out.txt")), "must end in .jsonl"),
        ((*given[:-1], str(tmp_path / "rows.jsonl"), "--force"), "is the input: choose another file"),
        ((*given[:3], str(tmp_path / "none.jsonl"), *given[4:]), "none.jsonl"),
    ]
    for (command, told), (code, found) in zip(cases, told_early([command for command, _ in cases]), strict=True):
        assert code == 2, (command, found)
        assert told in found, command


def test_an_interrupt_while_rewards_are_computed_names_the_file_of_answers(
    veneer: Veneer, adapter_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "rewards.py").write_text(
        "import _thread, time\n\n"
        "def waits(completions, **row):\n"
        "    _thread.interrupt_main()\n    time.sleep(5)\n    return [1.0] * len(completions)\n"
    )
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]))
    given = ("draw", adapter_folder, "-i", tmp_path / "rows.jsonl", "-o", tmp_path / "out.jsonl", "--n", 2)
    found = veneer(*given, "--max-new-tokens", 3, "-r", f"{tmp_path}/rewards.py:waits")
    kept = tmp_path / "out.drawn.jsonl"
    assert found.exit_code == 130
    assert f"interrupted: all answers are in {kept}, without rewards" in found.output.replace("\n", "")
    assert len(kept.read_text().splitlines()) == 2


def test_answers_stay_on_disk_whatever_a_reward_does(veneer: Veneer, adapter_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(
        "import time\n\n"
        "def nan(completions, **row):\n    return [float('nan'), *[1.0] * (len(completions) - 1)]\n\n"
        "def hangs(completions, **row):\n    yield time.sleep(600)\n"
    )
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    output, kept = tmp_path / "out.jsonl", tmp_path / "out.drawn.jsonl"
    given = ("draw", adapter_folder, "-i", tmp_path / "rows.jsonl", "-o", output, "--n", 2, "--max-new-tokens", 3)
    given = (*given, "--seed", 5)
    wrong = (*given, "-r", f"{tmp_path}/rewards.py:nan")
    found = veneer(*wrong)
    assert "the reward function nan returned nan for completion 1" in found.output
    assert str(kept) in found.output.replace("\n", "")
    assert not output.exists()
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["one", "one", "two two", "two two", "three", "three"]
    assert "is there already" in veneer(*wrong).output  # they are not replaced
    assert (
        "within 0.2 seconds"
        in veneer(*given, "--force", "-r", f"{tmp_path}/rewards.py:hangs", "--reward-timeout", 0.2).output
    )
    assert [json.loads(line) for line in kept.read_text().splitlines()] == lines
    failing = ("--force", "--reward-on-error", "none", "--reward-most-failed")
    assert "reward_most_failed" in veneer(*wrong, *failing, 0.1).output
    assert veneer(*wrong, *failing, 0.5).exit_code == 0
    assert [json.loads(line)["reward"] for line in output.read_text().splitlines()] == [None, 1.0] * 3
    assert not kept.exists()
    assert "no reward function" in veneer(*given, "--force", "-r", "exact").output


def test_the_best_have_the_system_message_that_drew_them(model_folder: Path, veneer: Veneer, tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "two"}]
    own = [{"role": "system", "content": "own"}, *asked]
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(map(json.dumps, [{"prompt": "one"}, {"messages": asked}, {"prompt": own}]))
    )
    output = tmp_path / "best.jsonl"
    given = ("-i", tmp_path / "rows.jsonl", "-o", output, "--n", 2, "--max-new-tokens", 3, "--system", "be kind")
    reward = "{function: length, target: 3}"
    found = veneer("draw", model_folder, *given, "-r", reward, "--keep", "best")
    assert found.exit_code == 0, found.output
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    kind = {"role": "system", "content": "be kind"}
    assert [row["prompt"] for row in rows] == [[kind, {"role": "user", "content": "one"}], [kind, *asked], own]
    assert all(row["completion"][0]["role"] == "assistant" for row in rows)
    trained = RowReader().read(rows[0], "prompt-completion")
    assert [turn["role"] for turn in trained["messages"]] == ["system", "user", "assistant"]
