"""Write pairs.jsonl beside this file: calendar requests with the right entry (chosen) and one with a wrong field."""

from __future__ import annotations

import json
import random
from pathlib import Path

HERE = Path(__file__).parent
ROWS = HERE.parent / "calendar" / "train.jsonl"


def pair(messages: list[dict[str, str]], draw: random.Random) -> dict[str, object]:
    """A request, its entry, and the entry with another day, time or length."""
    entry = json.loads(messages[-1]["content"])
    wrong = dict(entry)
    field = draw.choice(["date", "start", "minutes"])
    wrong[field] = {
        "date": f"{draw.randint(1, 12):02}-{draw.randint(1, 28):02}",
        "start": f"{draw.randint(0, 23):02}:{draw.choice(('05', '25', '55'))}",
        "minutes": entry["minutes"] + draw.choice((5, 15, 35)),
    }[field]
    answers = {"chosen": messages[-1], "rejected": {"role": "assistant", "content": json.dumps(wrong)}}
    return {"prompt": messages[:-1], **{key: [turn] for key, turn in answers.items()}}


def main() -> None:
    """Write the pairs, the same ones each time."""
    draw = random.Random(7)
    rows = [json.loads(line)["messages"] for line in ROWS.read_text(encoding="utf-8").splitlines()]
    pairs = [made for made in (pair(row, draw) for row in rows) if made["chosen"] != made["rejected"]]
    (HERE / "pairs.jsonl").write_text("".join(json.dumps(made) + "\n" for made in pairs), encoding="utf-8")


if __name__ == "__main__":
    main()
