"""Write the demo's data: requests in plain English with the calendar entry each one means, as chat rows.

The held-out part shares no sentence template and no slot value (title, person, place, date, time, length) with the
training part, so a right answer there is understood and not remembered. Everything follows from the seed:

    python examples/calendar/make_data.py
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
INSTRUCTION = (
    "Answer with one calendar entry as JSON: title, date (MM-DD), start (HH:MM, 24 hours), minutes (a number), "
    "with (a name or null), place (a name or null)."
)
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
    "November", "December",
)  # fmt: skip


@dataclass(frozen=True)
class Slots:
    """The values that one part of the data draws from, and the sentences it puts them in."""

    titles: tuple[str, ...]
    people: tuple[str, ...]
    places: tuple[str, ...]
    dates: tuple[tuple[int, int], ...]
    starts: tuple[tuple[int, int], ...]
    minutes: tuple[int, ...]
    templates: tuple[str, ...]


ALL_DATES = [(month, day) for month in range(1, 13) for day in range(1, 29)]
ALL_STARTS = [(hour, minute) for hour in range(7, 21) for minute in (0, 10, 15, 20, 30, 40, 45, 50)]

TRAIN_TITLES = (
    "dentist appointment", "project review", "team lunch", "piano lesson", "budget meeting", "job interview",
    "haircut", "parents' evening", "yoga class", "code review", "board meeting", "coffee", "car service",
    "birthday dinner", "book club", "doctor's appointment", "planning session", "design workshop",
    "football practice", "house viewing", "tax consultation", "client call", "sales training", "wine tasting",
    "choir rehearsal", "flat inspection", "language exchange", "vet visit", "product demo", "science lecture",
)  # fmt: skip
TRAIN_PEOPLE = (
    "Anna", "Mr. Brown", "Priya", "Dr. Chen", "Lukas", "Maria", "the design team", "Tom and Ella",
    "Professor Okafor", "Yuki", "Ms. Novak", "David", "Dr. Patel", "the new intern", "Sofia", "Grandma",
    "Mrs. Keller", "Hassan", "Ingrid", "Carlos", "the auditors", "Rosa", "Dr. Weiss", "Noah", "my landlord",
)  # fmt: skip
TRAIN_PLACES = (
    "Main Street Clinic", "room 204", "Cafe Luna", "the city library", "Harbour Office", "the Blue Room",
    "Hotel Astoria", "the town hall", "Greenfield School", "Studio 5", "the north gym", "Rosewood Restaurant",
    "Elm Park", "the showroom", "Bridge Street Bakery", "lab 3", "the old theatre", "Terminal B",
    "the boathouse", "Riverside Garage",
)  # fmt: skip
TRAIN_MINUTES = (15, 20, 30, 45, 60, 70, 90, 105, 120, 150, 180)
TRAIN_TEMPLATES = (
    "Book a {title} {with_} on {date} at {start} {place} for {minutes}.",
    "Please schedule {title} for {date}, {start}, {minutes}, {place} {with_}.",
    "I have a {title} {with_} {place} on {date}. It starts at {start} and takes {minutes}.",
    "Can you put {title} in my calendar? {date}, {start}, {minutes} {with_} {place}.",
    "Add {title} {place} on {date} at {start} {with_}, {minutes} long.",
    "{date} at {start}: {title} {with_} {place}, {minutes}.",
    "Set up a {title} {with_} for {minutes} on {date} starting at {start} {place}.",
    "Remind me of the {title} {place} on {date} at {start}. It will last {minutes} {with_}.",
    "We agreed on {date} for the {title} {with_}: {start} {place}, {minutes}.",
    "New entry: {title} on {date} from {start} for {minutes} {place} {with_}.",
    "Block {minutes} on {date} at {start} for {title} {with_} {place}.",
    "There is a {title} {place} at {start} on {date} {with_}, {minutes}.",
)
EVAL_TITLES = (
    "guitar lesson", "eye test", "quarterly report", "picnic", "passport renewal", "chess tournament",
    "museum tour", "fire drill", "salary talk", "swimming class", "garden party", "blood test",
)  # fmt: skip
EVAL_PEOPLE = (
    "Oliver", "Dr. Singh", "Mrs. Lindqvist", "Amara", "the finance team", "Uncle Pete", "Ms. Tanaka", "Felix",
    "Captain Reyes", "Zoe",
)  # fmt: skip
EVAL_PLACES = (
    "the west pavilion", "room 317", "Sunset Cafe", "Market Hall", "the observatory", "Oak Lane Surgery",
    "Pier 9", "the embassy", "Maple House", "the skating rink",
)  # fmt: skip
EVAL_MINUTES = (25, 35, 40, 50, 55, 75, 80, 100, 110)
EVAL_TEMPLATES = (
    "I need {minutes} for a {title} {place} {with_}; let's say {start} on {date}.",
    "Could you note down the {title}? It is on {date}, begins at {start}, needs {minutes} {with_} {place}.",
    "Let's do the {title} {with_} on {date} {place}, {minutes} from {start}.",
    "My {title} {with_} is at {start} on {date} {place} and runs for {minutes}.",
    "Save this: {title} {place}, {minutes}, {date}, {start} {with_}.",
)


def parts(rng: random.Random) -> tuple[Slots, Slots]:
    """The slots of the training part and of the held-out part, disjoint in every value."""
    dates, starts = rng.sample(ALL_DATES, len(ALL_DATES)), rng.sample(ALL_STARTS, len(ALL_STARTS))
    train = Slots(
        TRAIN_TITLES, TRAIN_PEOPLE, TRAIN_PLACES, tuple(dates[:270]), tuple(starts[:90]), TRAIN_MINUTES, TRAIN_TEMPLATES
    )
    held_out = Slots(
        EVAL_TITLES, EVAL_PEOPLE, EVAL_PLACES, tuple(dates[270:]), tuple(starts[90:]), EVAL_MINUTES, EVAL_TEMPLATES
    )
    return train, held_out


def row(slots: Slots, rng: random.Random) -> dict[str, list[dict[str, str]]]:
    """One request and its entry, as a chat."""
    date, start, minutes = rng.choice(slots.dates), rng.choice(slots.starts), rng.choice(slots.minutes)
    title = rng.choice(slots.titles)
    person = rng.choice(slots.people) if rng.random() < 0.75 else None
    place = rng.choice(slots.places) if rng.random() < 0.75 else None
    text = rng.choice(slots.templates).format(
        title=title,
        date=spoken_date(*date, rng),
        start=spoken_time(*start, rng),
        minutes=spoken_minutes(minutes, rng),
        with_=f"with {person}" if person else "",
        place=f"at {place}" if place else "",
    )
    entry = {
        "title": title,
        "date": f"{date[0]:02}-{date[1]:02}",
        "start": f"{start[0]:02}:{start[1]:02}",
        "minutes": minutes,
        "with": person,
        "place": place,
    }
    return {
        "messages": [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": tidy(text)},
            {"role": "assistant", "content": json.dumps(entry)},
        ]
    }


def spoken_date(month: int, day: int, rng: random.Random) -> str:
    """3, 14 → "March 14", "14 March" or "the 14th of March"."""
    ending = "th" if 11 <= day <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    name = MONTHS[month - 1]
    return rng.choice((f"{name} {day}", f"{day} {name}", f"the {day}{ending} of {name}"))


def spoken_time(hour: int, minute: int, rng: random.Random) -> str:
    """15, 30 → "3:30 pm", "3.30pm" or "15:30"."""
    half, hour12 = ("am" if hour < 12 else "pm"), (hour - 1) % 12 + 1
    if minute == 0:
        return rng.choice((f"{hour12} {half}", f"{hour12}{half}", f"{hour:02}:00"))
    return rng.choice((f"{hour12}:{minute:02} {half}", f"{hour12}.{minute:02}{half}", f"{hour:02}:{minute:02}"))


def spoken_minutes(minutes: int, rng: random.Random) -> str:
    """90 → "90 minutes" or, where there is a round way to say it, "an hour and a half"."""
    words = {30: "half an hour", 60: "an hour", 90: "an hour and a half", 120: "two hours", 180: "three hours"}
    return rng.choice((f"{minutes} minutes", f"{minutes} min", words.get(minutes, f"{minutes} minutes")))


def tidy(text: str) -> str:
    """One space between words and none in front of punctuation, where an optional slot was left empty."""
    text = " ".join(text.split())
    for mark in ",.;:?":
        text = text.replace(f" {mark}", mark)
    return text[0].upper() + text[1:]


def write(path: Path, rows: list[dict[str, list[dict[str, str]]]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def main() -> None:
    rng = random.Random(7)
    train, held_out = parts(rng)
    write(HERE / "train.jsonl", [row(train, rng) for _ in range(320)])
    write(HERE / "heldout.jsonl", [row(held_out, rng) for _ in range(40)])


if __name__ == "__main__":
    main()
