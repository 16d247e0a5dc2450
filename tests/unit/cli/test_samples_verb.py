"""``veneer samples`` reads the journal of a run, without torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from veneer.data.files import numbered_rows
from veneer.learn.journal import Journal, journal_path, packed

from .conftest import told_early


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of three draws; a tool was called in the second one."""
    journal = Journal(journal_path(tmp_path), keeps=False)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 3}}}
    for draw in range(3):
        said = [{"role": "assistant", "content": f"it is {draw}"}]
        if draw == 1:
            said = [
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "10"},
                *said,
            ]
        line = {
            "step": draw, "row": 0, "prompt": [{"role": "user", "content": "[red]sum"}], "completion": said,
            "functions": ["right", "short"], "rewards": [draw / 4, None], "reward": draw / 4, "advantage": -0.5,
            "adapter": "a", "ids": [5] * 7, "logprobs": packed([-1.0] * 7), "mask": [7], "finish": "stop",
            "calls": int(draw == 1), "failures": 0,
        }  # fmt: skip
        journal.write(draw, [line])
    return tmp_path


def test_rollouts_are_shown_chosen_and_printed_as_rows(run: Path) -> None:
    def asked(*options: str, place: Path = run) -> tuple[str, ...]:
        return ("samples", str(place), *options)

    (run / "empty").mkdir()
    cases = [
        (asked(), 0, "step 2, row 0 · reward 0.5 (right 0.5, short none) · advantage -0.5 · 7 tokens, stop user: "),
        (asked("--step", "1"), 0, 'sum assistant: {"name": "add", "arguments": {"a": 3}} tool: 10'),
        (asked("--step", "1"), 0, "1 calls, 0 failed user"),
        (asked("--below", "0.2", "--json", "--limit", "1"), 0, '{"draw": 0, "step": 0'),
        (asked("--step", "9"), 2, "no rollout in"),
        (asked("--limit", "0"), 2, "--limit 0 must be at least 1"),
        (asked("--json", "--as-rows"), 2, "are two forms of the same"),
        (asked(place=run / "empty"), 2, "holds no journal of rollouts"),
        (asked(place=run / "none"), 2, "is no folder"),
        (("report", str(run), "--answers", "2"), 0, "written: "),
        (("report", str(run), "--answers", "0"), 2, "--answers 0 must be at least 1"),
        (("report", str(run / "none")), 2, "is no folder"),
        (("report", str(run / "empty")), 2, "holds no journal of rollouts"),
        (asked("--as-rows"), 0, '"completion": [{"role": "assistant", "content": "it is 0"}]}'),
    ]  # fmt: skip
    found = told_early([command for command, _, _ in cases])
    for (command, code, text), (own_code, told) in zip(cases, found, strict=True):
        assert own_code == code, command
        assert text in told, command
    rows = found[-1][1].replace('} {"prompt', '}\n{"prompt').splitlines()
    (run / "rows.jsonl").write_text("\n".join(rows))
    assert [row["completion"][-1]["content"] for _, row in numbered_rows(run / "rows.jsonl", [])] == [
        f"it is {draw}" for draw in range(3)
    ]
    assert json.loads(rows[1])["completion"][1]["role"] == "tool"
