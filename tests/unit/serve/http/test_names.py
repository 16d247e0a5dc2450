"""The names that a server knows: a table that a watcher keeps, and two files for the one that is asked for."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from patience import PATIENCE, wait_until
from veneer.contract.file import CONFIG_FILE, WEIGHTS_FILE
from veneer.errors import ConfigError
from veneer.serve.adapters.versions import Versions
from veneer.serve.http import folder as folder_file
from veneer.serve.http import watcher
from veneer.serve.http.folder import AdapterFolder
from veneer.serve.http.models import Catalogue
from veneer.serve.http.watcher import Watcher


def add(folder: Path, name: str) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        (folder / name / file).touch()


@pytest.fixture
def gone() -> list[str]:
    return []


@pytest.fixture
def table(tmp_path: Path, gone: list[str]) -> Iterator[AdapterFolder]:
    add(tmp_path / "served", "old")
    made = AdapterFolder(tmp_path / "served", ["tiny"], gone.extend)
    yield made
    made.stop()


@pytest.mark.parametrize("tells", [True, False], ids=["told", "not told"])
def test_adapters_that_nobody_asks_for_come_and_go(table, gone, tmp_path, monkeypatch, tells):
    monkeypatch.setattr(watcher, "_SECONDS", 30.0 if tells else 0.02)
    if not tells:

        def no_watches(*folders: Path, **how: Any) -> Any:
            raise OSError(28, "OS file watch limit reached")

        monkeypatch.setattr(watcher, "watch", no_watches)
    table.start()
    for name in ("new", "tiny"):  # the second is the base's name
        add(tmp_path / "other", name)
    time.sleep(0.3 if tells else 0)  # until the system watches
    for name in ("new", "tiny"):
        (tmp_path / "other" / name).rename(tmp_path / "served" / name)
    wait_until(lambda: table.names == ("new", "old"))
    assert gone == []
    shutil.rmtree(tmp_path / "served" / "old")
    wait_until(lambda: table.names == ("new",))
    assert gone == ["old"]


def test_another_folder_of_the_same_name_is_watched(table, gone, tmp_path, monkeypatch):
    monkeypatch.setattr(watcher, "_SECONDS", 0.1)
    table.start()
    shutil.rmtree(tmp_path / "served")
    wait_until(lambda: table.names == () and gone == ["old"])
    add(tmp_path / "served", "new")
    wait_until(lambda: table.names == ("new",))


def test_a_file_that_is_missing_is_seen_without_a_word_of_the_system(table, tmp_path):
    (tmp_path / "served" / "old" / WEIGHTS_FILE).unlink()
    table.look(everything=False)
    assert table.names == ("old",)
    table.look()
    assert table.names == ()


def test_one_that_is_asked_for_is_there_and_gone_at_once(table, gone, tmp_path):
    assert not table.has("new")
    add(tmp_path / "served", "new")
    assert table.has("new")
    assert table.names == ("new", "old")
    (tmp_path / "served" / "new" / CONFIG_FILE).unlink()
    assert not table.has("new")
    assert (table.names, gone) == (("old",), ["new"])


@pytest.mark.parametrize(
    ("files", "lacks"),
    [
        ((CONFIG_FILE,), "it holds adapter_config.json and no adapter_model.safetensors. Copy that there"),
        ((WEIGHTS_FILE,), "it holds adapter_model.safetensors and no adapter_config.json. Copy that there"),
        ((CONFIG_FILE, "adapter_model.bin"), "its weights are a pickle (adapter_model.bin), which is not read"),
    ],
)
def test_a_folder_with_some_files_of_an_adapter_is_told_until_it_is_whole(table, tmp_path, files, lacks):
    half = tmp_path / "served" / "half"
    half.mkdir()
    for file in ("README.md", *files):
        (half / file).touch()
    (tmp_path / "served" / "other").mkdir()
    assert not table.has("half")
    assert lacks in table.why_not("half")
    assert [table.why_not(name) for name in ("other", "old", "none", "tiny", "../served/half")] == [None] * 5
    table.look()
    assert {name: lacks in told for name, told in table.incomplete.items()} == {"half": True}
    add(tmp_path / "served", "half")
    assert table.has("half")
    assert (table.incomplete, table.why_not("half")) == ({}, None)


def test_one_that_comes_while_the_folder_is_listed_stays(table, gone, tmp_path, monkeypatch):
    listed = folder_file._entries

    def comes(folder: Path) -> set[str]:
        found = listed(folder)
        add(folder, "new")
        assert table.has("new")
        return found

    monkeypatch.setattr(folder_file, "_entries", comes)
    known = table.names
    table.look()
    assert (known, table.names, gone) == (("old",), ("new", "old"), [])


def test_a_request_looks_at_its_own_adapter_alone(tmp_path, monkeypatch):
    engine: Any = object()
    for number in range(31):
        add(tmp_path, f"tenant-{number:02}")
    catalogue = Catalogue(engine, ["tiny"], "", tmp_path)
    looked: list[Path] = []
    own, listed = folder_file.is_adapter, folder_file.os.listdir
    monkeypatch.setattr(folder_file, "is_adapter", lambda path: looked.append(path) or own(path))
    monkeypatch.setattr(folder_file.os, "listdir", lambda path: looked.append(path) or listed(path))
    numbers = [catalogue.find(name).adapter_id for name in ("tenant-07", "tenant-30", "tenant-07")]
    with pytest.raises(ConfigError, match=r"Known: tiny, tenant-00, .* and 22 more"):
        catalogue.find("zz")
    assert numbers == [1, 2, 1]
    assert [path.name for path in looked] == ["tenant-07", "tenant-30", "tenant-07", "zz"]


def test_looks_take_a_share_of_the_time(tmp_path, monkeypatch):
    """A look takes two seconds, and there is always news: 40 seconds lie between, and 200 between whole ones."""
    now, looks = 100.0, list[tuple[float, bool]]()

    class Stopping(threading.Event):
        def wait(self, seconds: float | None = None) -> bool:
            nonlocal now
            now += seconds or 0.0
            return False

    def changes(*folders: Path, **how: Any) -> Iterator[set[Any]]:
        nonlocal now
        while len(looks) < 9:
            now += 1.0
            yield {(1, "x")}
        watching._stopping.set()

    def look(everything: bool) -> None:
        nonlocal now
        looks.append((now, everything))
        now += 2.0

    monkeypatch.setattr(watcher, "monotonic", lambda: now)
    monkeypatch.setattr(watcher, "watch", changes)
    watching = Watcher(tmp_path, look)
    watching._stopping = Stopping()
    watching._work()
    starts, whole = [at for at, _ in looks], [at for at, everything in looks if everything]
    assert [b - a for a, b in itertools.pairwise(starts)] == [43.0] * 8
    assert [b - a for a, b in itertools.pairwise(whole)] == [215.0]


def test_all_models_are_listed_once(tmp_path):
    engine: Any = type("Engine", (), {"scheduler": type("S", (), {"limits": type("L", (), {"max_model_len": 7})})})
    engine.versions = Versions()
    add(tmp_path, "é")
    catalogue = Catalogue(engine, ["tiny"], "base", tmp_path)
    told = catalogue.cards()
    cards = json.loads(told)["data"]
    assert [(card["id"], card["root"], card["parent"]) for card in cards] == [
        ("tiny", "base", None), ("é", str(tmp_path / "é"), "tiny"),
    ]  # fmt: skip
    assert catalogue.cards() is told
    add(tmp_path, "b")
    assert catalogue.find("b") is not None
    assert [card["id"] for card in json.loads(catalogue.cards())["data"]] == ["tiny", "b", "é"]


def test_the_folder_is_looked_at_by_one_thread_at_a_time(adapters, tmp_path):
    """Two that find an adapter gone, one while the other forgets it."""

    class Forgetting:
        others: ClassVar[list[threading.Thread]] = []

        def forget(self, name: str, up_to: int) -> None:
            if not self.others:
                self.others.append(threading.Thread(target=catalogue.adapters, daemon=True))
                self.others[0].start()
                self.others[0].join(0.3)

    engine: Any = Forgetting()
    catalogue = Catalogue(engine, ["tiny"], "", tmp_path)
    shutil.copytree(adapters["lora"].path, tmp_path / "gone")
    assert catalogue.find("gone") is not None
    shutil.rmtree(tmp_path / "gone")
    assert catalogue.adapters() == {}
    engine.others[0].join(PATIENCE)
    assert not engine.others[0].is_alive()
