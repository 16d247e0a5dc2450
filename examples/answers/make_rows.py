"""Write the rows of four recipes that learn from drawn answers: labels, json, calculator and game.

Held-out rows share no row with the training rows: labels and orders have other sentences and other words there, and
sums and hidden numbers have other numbers. Everything follows from the seed:

    python examples/answers/make_rows.py
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
Row = dict[str, Any]

LABELS = "Is the review of a film positive or negative? Answer with one word."
SHOWN = {"positive": "I liked every minute of it.", "negative": "I want my money back."}
ADJECTIVES = {
    "positive": (
        ("wonderful", "moving", "clever", "funny", "beautiful", "gripping", "charming", "warm"),
        ("brilliant", "touching", "delightful", "superb", "lovely", "fresh"),
    ),
    "negative": (
        ("dull", "boring", "clumsy", "tedious", "ugly", "noisy", "silly", "weak"),
        ("awful", "lifeless", "confusing", "dreadful", "stale", "shallow"),
    ),
}
ASPECTS = (
    ("the plot", "the cast", "the music", "the ending", "the camera work", "the first hour"),
    ("the dialogue", "the story", "the lead actor", "the last scene"),
)
REVIEWS = (
    ("I found {aspect} {adjective}.", "From beginning to end, {aspect} is {adjective}.",
     "We went on a rainy Sunday, and {aspect} was {adjective}.", "Whatever others say, {aspect} was {adjective}."),
    ("My friends and I agree that {aspect} is {adjective}.", "On a small screen too, {aspect} is {adjective}.",
     "If you ask me, {aspect} is {adjective}."),
)  # fmt: skip

GOODS = (
    ("pencils", "lamps", "notebooks", "cables", "cups", "chairs", "candles", "towels", "batteries", "folders"),
    ("plates", "staplers", "blankets", "screws", "vases", "posters"),
)
CITIES = (("Oslo", "Lisbon", "Dublin", "Vienna", "Prague", "Athens", "Geneva"),
          ("Turin", "Bergen", "Lyon", "Graz", "Porto", "Malmo", "Ghent", "Basel"))  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
ORDERS = (
    ("Please send {count} {item} to {city} on {day}.", "We need {count} {item} in {city} by {day}.",
     "On {day}, bring {count} {item} to our shop in {city}.", "{city} is out of {item}: send {count} on {day}."),
    ("Could {count} {item} be in {city} this {day}?", "For {day} we order {count} {item}, to be sent to {city}."),
)  # fmt: skip
ORDER = {"item": "lamps", "count": 7, "city": "Oslo", "day": "Friday"}
JSON = (
    'Write the order as JSON with the keys "item", "count", "city" and "day".',
    "Seven lamps to Oslo on Friday, please.", json.dumps(ORDER),
)  # fmt: skip

CALL = "Answer with a call of the calculator, such as calculator: expression=58 + 247. Then answer with the number."
GUESS = "Find a hidden number. Answer with a call of guess, such as guess: number=5."
RANGE = "The number is from {} to {}."


def message(text: str) -> list[Row]:
    return [{"role": "user", "content": text}]


def asked(task: tuple[str, str, str], text: str) -> list[Row]:
    """Return a prompt: the task in words, one question with its answer, and the question ``text``."""
    system, question, answer = task
    example = [*message(question), {"role": "assistant", "content": answer}]
    return [{"role": "system", "content": system}, *example, *message(text)]


def called(name: str, arguments: Row) -> Row:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def replied(name: str, content: str) -> Row:
    return {"role": "tool", "name": name, "content": content}


def labels(part: int, rng: random.Random) -> list[Row]:
    """Return reviews behind an example of a random label, so that no label is likelier from the start."""
    rows: list[Row] = []
    for label, adjectives in ADJECTIVES.items():
        for review, aspect, adjective in itertools.product(REVIEWS[part], ASPECTS[part], adjectives[part]):
            shown = rng.choice(list(SHOWN))
            prompt = asked((LABELS, SHOWN[shown], shown), review.format(aspect=aspect, adjective=adjective))
            rows.append({"prompt": prompt, "answer": label})
    return rows


def orders(part: int, rng: random.Random) -> list[Row]:
    rows: list[Row] = []
    for sentence in ORDERS[part]:
        for item in GOODS[part]:
            for city in CITIES[part]:
                entry = {"item": item, "count": rng.randint(2, 60), "city": city, "day": rng.choice(DAYS)}
                rows.append({"prompt": asked(JSON, sentence.format(**entry)), "answer": json.dumps(entry)})
    return rows


def sums(rng: random.Random, n: int, seen: set[tuple[int, int]]) -> list[Row]:
    """Return ``n`` sums of a number of two digits and one of three that are not in ``seen``, behind an example."""
    system = {"role": "system", "content": CALL}
    call, answer = called("calculator", {"expression": "58 + 247"}), {"role": "assistant", "content": "305"}
    example = [*message("What is 58 + 247?"), call, replied("calculator", "= 305"), answer]
    rows: list[Row] = []
    while len(rows) < n:
        pair = rng.randint(11, 99), rng.randint(101, 999)
        if pair not in seen:
            seen.add(pair)
            a, b = pair if rng.random() < 0.5 else pair[::-1]
            rows.append({"prompt": [system, *example, *message(f"What is {a} + {b}?")], "answer": str(a + b)})
    return rows


def hidden(numbers: Sequence[int]) -> list[Row]:
    """Return a game for each number, behind another game of one guess."""
    system = {"role": "system", "content": GUESS}
    other = [*message(RANGE.format(1, 10)), called("guess", {"number": 5}), replied("guess", "Found.")]
    return [{"prompt": [system, *other, *message(RANGE.format(1, 64))], "number": number} for number in numbers]


def write(name: str, rows: Sequence[Row]) -> None:
    (HERE / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    for name, make, n, n_heldout in (("labels", labels, 360, 120), ("orders", orders, 280, 96)):
        rng = random.Random(f"7 {name}")
        for part, more, size in ((0, "", n), (1, "_heldout", n_heldout)):
            write(f"{name}{more}", rng.sample(make(part, rng), size))
    rng = random.Random("7 sums")
    seen: set[tuple[int, int]] = {(58, 247)}
    write("sums", sums(rng, 400, seen))
    write("sums_heldout", sums(rng, 100, seen))
    numbers = random.Random("7 games").sample(range(1, 65), 64)
    write("games", hidden(numbers[:44]))
    write("games_heldout", hidden(numbers[44:]))


if __name__ == "__main__":
    main()
