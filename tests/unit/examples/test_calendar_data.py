"""The demo's data: what is shipped is what the script writes; the held-out part shares nothing with the rest."""

import importlib
import json
import random
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[3] / "examples" / "calendar"


@pytest.fixture
def make_data(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("make_data")


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / name).read_text().splitlines()]


def test_the_shipped_files_are_what_the_script_writes(make_data, tmp_path, monkeypatch):
    monkeypatch.setattr(make_data, "HERE", tmp_path)
    make_data.main()
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


@pytest.mark.parametrize("slot", ["titles", "people", "places", "dates", "starts", "minutes", "templates"])
def test_the_parts_share_no_slot_value(make_data, slot):
    train, held_out = make_data.parts(random.Random(7))
    assert not set(getattr(train, slot)) & set(getattr(held_out, slot))


@pytest.mark.parametrize("key", ["title", "date", "start", "minutes", "with", "place"])
def test_the_entries_share_no_value(key):
    def values(name: str) -> set:
        return {json.loads(r["messages"][-1]["content"])[key] for r in rows(name)} - {None}

    seen, new = values("train.jsonl"), values("heldout.jsonl")
    assert new
    assert not seen & new
