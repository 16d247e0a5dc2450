"""The page of a run that learned from answers: its curves, its remarks, and the answers chosen from its journal."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pictures import check_picture
from veneer.errors import FormatError
from veneer.learn.journal import Journal, journal_path
from veneer.learn.report import choose, figure_of, log_of, panels, remarks, write_run_page

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": "<b>"}}}


def line(step: int, reward: float | None, **changes: Any) -> dict[str, Any]:
    said = [{"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "10 & more"}]
    return {
        "step": step, "row": step % 3, "prompt": "sum <it>", "completion": said, "functions": ["right", "short"],
        "rewards": [reward, None], "reward": reward, "advantage": -0.5, "ids": [5] * 7, "finish": "length",
        "calls": 1, "failures": 0, **changes,
    }  # fmt: skip


def logged(n: int = 12, **last: float) -> list[dict[str, float]]:
    own = {"reward": 0.2, "completions/mean_length": 31.0, "entropy": 1.3, "completions/clipped_ratio": 0.1}
    named = {
        f"rewards/{name}/{what}": v
        for name, v in (("right", 0.3), ("short", 0.1))
        for what, v in (("mean", v), ("std", 0.1))
    }
    return [{"step": step, "loss": 0.1, **own, **named, **(last if step > 8 else {})} for step in range(1, n + 1)]


def test_the_best_the_worst_and_some_answers_are_chosen():
    found = choose(iter([line(i, None if i % 11 == 0 else (i % 5) / 4, prompt=f"sum {i}") for i in range(97)]), 3)
    assert [(each["step"], each["reward"]) for each in found.best] == [(94, 1.0), (89, 1.0), (84, 1.0)]
    assert [(each["step"], each["reward"]) for each in found.worst] == [(95, 0.0), (90, 0.0), (85, 0.0)]
    steps = [each["step"] for each in found.some]
    assert steps == sorted(steps)
    assert len(set(steps)) == 3
    assert len(choose(iter([line(0, None)]), 3).best) == 0


def test_an_answer_that_was_drawn_several_times_is_chosen_once():
    lines = [line(i, 1.0 if i % 2 else 0.0, prompt=f"sum {i % 4}") for i in range(29)]
    found = choose(iter(lines), 2)
    assert [each["step"] for each in found.best] == [27, 25]
    assert [each["step"] for each in found.worst] == [28, 26]
    other = [*lines, line(29, 1.0, prompt="sum 1", completion="7")]
    assert [each["step"] for each in choose(iter(other), 3).best] == [29, 27, 25]


def test_rewards_of_held_out_rows_are_curves():
    held_out = [{"step": 12, "eval_rewards/right/mean": 0.5}]
    names = [curve.name for curve in panels([*logged(), *held_out])["reward by function"]]
    assert names == ["right", "short", "right, held out"]


def test_the_pictures_are_those_of_the_keys_that_are_there():
    drawn = panels(logged())
    assert list(drawn) == [
        "reward",
        "reward by function",
        "tokens of an answer",
        "share",
        "entropy (nats a token)",
        "loss",
    ]
    assert [curve.name for curve in drawn["reward by function"]] == ["right", "short"]
    figure = figure_of(logged())
    check_picture(figure)
    assert len(figure.axes) == 6
    band = figure.axes[1].collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.2, 0.4))
    assert list(panels([{"step": 1, "loss": 0.3}])) == ["loss"]


@pytest.mark.parametrize(
    ("last", "told"),
    [
        ({}, None),
        ({"completions/mean_length": 60.0}, r"Answers grow \(31 to 60 tokens\) while the reward does not"),
        ({"completions/mean_length": 60.0, "reward": 0.3}, None),
        ({"completions/clipped_ratio": 0.75}, "75% of the answers are cut: raise max_completion_length"),
        ({"frac_reward_zero_std": 0.9}, "90% of the groups have equal rewards"),
        ({"tools/failure_frequency": 0.6}, "60% of the calls of tools fail"),
        ({"entropy": 0.02}, "Entropy fell from 1.30 to 0.02 nats"),
    ],
)
def test_remarks(last: dict[str, float], told: str | None):
    found = remarks(logged(**last))
    assert (len(found) == 1 and re.match(told, found[0])) if told else not found


def test_the_page_of_a_run(tmp_path: Path):
    with pytest.raises(FormatError, match="holds no journal of rollouts"):
        write_run_page(tmp_path)
    journal = Journal(journal_path(tmp_path), keeps=False)
    for step in range(5):
        journal.write(step, [line(step, step / 4)])
    page = write_run_page(tmp_path, 2).read_text(encoding="utf-8")
    assert "No log is saved yet" in page
    state = tmp_path / "checkpoint-3" / "trainer_state.json"
    state.parent.mkdir()
    state.write_text(json.dumps({"log_history": logged(3)}))
    assert len(log_of(tmp_path)) == 3
    record = {"status": "finished", "recipe": {}, "log": logged(**{"completions/clipped_ratio": 0.75})}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert len(log_of(tmp_path)) == 12
    page = write_run_page(tmp_path, 2).read_text(encoding="utf-8")
    assert page.count("<svg") == 1
    assert page.count("<tr><td") == 6
    assert "<h2>Best</h2>" in page
    assert "<b>1</b><br>right 1<br>short none<br>advantage -0.50<br>step 4, row 1<br>7 tokens, cut" in page
    assert "<pre>sum &lt;it&gt;</pre>" in page
    assert "&quot;a&quot;: &quot;&lt;b&gt;&quot;" in page
    assert "<div class='tool'><i>tool</i><pre>10 &amp; more</pre></div>" in page
    assert "75% of the answers are cut" in page
    assert not re.search(
        r"https?://(?!www\.w3\.org|matplotlib\.org|purl\.org|creativecommons\.org)", page
    )  # self-contained


def test_a_run_without_a_journal_has_curves(tmp_path: Path):
    (tmp_path / "run.json").write_text(json.dumps({"status": "finished", "recipe": {}, "log": logged()}))
    page = write_run_page(tmp_path).read_text(encoding="utf-8")
    assert "<svg" in page
    assert "<table" not in page
    journal_path(tmp_path).parent.mkdir()
    journal_path(tmp_path).write_text("rubbish\n")
    with pytest.raises(FormatError, match="it is no rollout"):
        write_run_page(tmp_path)
