"""Keys that are read from source, held against those of the imported classes."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest

from veneer.recipe.declared_in_source import UnreadableError, classes_with, declared_keys, file_of, literal
from veneer.recipe.key_checks import AllowedKeys
from veneer.recipe.known import declared
from veneer.recipe.methods import imported
from veneer.recipe.tasks import TASKS, Task


def simple(kind: Any) -> Any:
    """A type with enumerations as their words, and what is only known once imported as Any."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return Literal[tuple(member.value for member in kind)]
    if get_origin(kind) is not None and get_origin(kind) is not Literal and Literal not in get_args(kind):
        origin = Union if get_origin(kind).__name__ in ("Union", "UnionType") else get_origin(kind)
        inner = tuple(simple(each) for each in get_args(kind))
        return origin[inner] if Ellipsis not in inner else kind
    return Any if dataclasses.is_dataclass(kind) else kind


def told(keys: AllowedKeys) -> dict[str, str]:
    return {key: str(simple(kind)) for key, kind in keys.types.items()}


@pytest.mark.parametrize("task", TASKS)
def test_settings_of_trainers_are_read_as_they_are_imported(task: Task) -> None:
    found, meant = declared().settings(task), imported().settings(task)
    assert told(found) == told(meant)
    assert found.required == meant.required
    assert len(found.types) > 100


def test_methods_variants_and_presets_are_read_as_they_are_imported() -> None:
    found, meant = declared().methods, imported().methods
    of_files = {name: each for name, each in meant.items() if name in found}
    assert {"lora", "dora", "houlsby", "vera"} <= found.keys()
    for name, method in of_files.items():
        assert told(found[name].keys) == told(method.keys), name
        assert (found[name].keys.required, found[name].switches, found[name].is_own) == (
            method.keys.required, dict(method.switches), method.is_own,
        ), name  # fmt: skip
    assert found.keys() == meant.keys()


SOURCE = """
from __future__ import annotations
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal
from {package}.words import Word, Text as T
import {package}.words as words
if TYPE_CHECKING:
    from {package}.words import Far as _Base
else:
    _Base = object
NAMES = {{"a": 1}}
MADE = dict(a=1)
Alias = list[T] | None
@dataclass
class Own(words.Far, _Base):
    kind: ClassVar[str] = "x"
    label = "OWN"
    a: int
    b: Word | Alias = None
    c: list[int] = field(default_factory=list)
    d: int = field(init=False)
    e: Literal["yes"] = field(metadata={{}})
    f: Unknown[3] = 3
"""
WORDS = """
from dataclasses import dataclass
from enum import Enum
from .deep import *
class Word(str, Enum):
    NO = "no"
    @property
    def x(self): ...
Text = str
@dataclass
class Far:
    a: str = "far"
    g: bool
    h: float = 0.5
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    folder = tmp_path / "declared_words"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('is not to be imported')")
    (folder / "words.py").write_text(WORDS)
    (folder / "own.py").write_text(SOURCE.format(package=folder.name))
    (folder / "broken.py").write_text("class :")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder.name
    assert folder.name not in sys.modules


def test_fields_bases_aliases_and_enumerations(package: str) -> None:
    found = declared_keys(f"{package}.own", "Own")
    assert found.types == {
        "a": int, "b": Literal["no"] | list[str] | None, "c": list[int], "e": Literal["yes"], "f": Any, "g": bool,
        "h": float,
    }  # fmt: skip
    assert found.required == {"a", "e", "g"}


def test_literals_of_modules_and_classes(package: str) -> None:
    assert literal(f"{package}.own", "NAMES") == {"a": 1}
    assert literal(f"{package}.own", "OTHER", 7) == 7
    assert list(classes_with(f"{package}.own", "label")) == [("Own", "OWN")]


@pytest.mark.parametrize(
    "read",
    [
        lambda package: declared_keys(f"{package}.own", "Other"),
        lambda package: declared_keys(f"{package}.none", "Own"),
        lambda package: declared_keys(f"{package}.broken", "Own"),
        lambda package: literal(f"{package}.own", "MADE"),
        lambda package: file_of("no_such_package.at_all"),
        lambda package: file_of("itertools"),
    ],
)
def test_what_source_does_not_tell_is_an_error(package: str, read: Callable[[str], object]) -> None:
    with pytest.raises(UnreadableError):
        read(package)
