"""Values of a recipe's file, with overrides on top; `problems` checks them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel

from veneer.errors import ConfigError
from veneer.recipe.parts import DataPart, DistillPart, ModelPart, Written

PLACES = (
    ("data", "train"),
    ("data", "eval"),
    ("data", "chat_template"),
    ("data", "response_template"),
    ("model", "source"),
    ("adapter", "from"),
    ("distill", "teacher"),
    ("distill", "teacher_prompt"),
)  # keys that may name a file
_KEYS_OF_PLACES = frozenset(map(".".join, PLACES))
_MEANT = {
    "mapping values": "': ' has no place here. Quote the value, or correct the indentation",
    "expected <block end>, but found '<scalar>'": "text follows a closing quote or bracket. Take it out, or put "
    "the whole value in quotes of the other kind",
    "expected <block end>": "the indentation fits no line above. Align the keys of a part",
    "expected ',' or": "a comma or a closing bracket is missing. Add it",
    "found unexpected end": "a quotation mark is not closed. Close it",
    r"found character '\t'": "a tab is not allowed. Indent with spaces",
    "found character": "no value begins with this sign. Quote the value",
    "found undefined alias": "no anchor (&) has this name. Quote the value if it is text",
    "could not determine": "a tag (!) is not allowed. Quote the value if it is text",
    "but found another document": "a second document is not allowed. Keep one",
}  # by the beginning of PyYAML's reason, which speaks of tokens and blocks; the first that fits


def read_values(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the unchecked values of a recipe's file, with overrides on top, as `load_recipe` reads it."""
    try:
        values = _load_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ConfigError(
            f"the recipe {path} cannot be read: {error.strerror}. Give a file, or write one with `veneer train "
            "--print-recipe`"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text in UTF-8 ({error}): save it as UTF-8") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values; `veneer train --print-recipe` shows one")
    for part, key in PLACES:
        section = values.get(part)
        if isinstance(section, dict) and key in section and is_place(f"{part}.{key}", section[key]):
            section[key] = beside(path, section[key])
    if isinstance(values.get("rewards"), list):
        values["rewards"] = [_function_beside(path, each) for each in values["rewards"]]
    if isinstance(values.get("tools"), list):
        values["tools"] = [_function_beside(path, each) for each in values["tools"]]
    if "environment" in values:
        values["environment"] = _function_beside(path, values["environment"])
    _more_beside(path, values)
    for override in overrides:
        apply_override(values, override)
    return values


def _function_beside(path: Path, reward: Any) -> Any:
    """Resolve the path in a reward's ``file.py:function`` relative to the recipe. Return any other value unchanged."""
    if isinstance(reward, dict) and "function" in reward:
        return {**reward, "function": _function_beside(path, reward["function"])}
    if not isinstance(reward, str) or ".py:" not in reward:
        return reward
    file, _, name = reward.rpartition(":")
    return f"{beside(path, file)}:{name}"


def _more_beside(path: Path, values: Mapping[str, Any]) -> None:
    """Resolve the files of ``data.more`` relative to the recipe."""
    more = section(values, "data").get("more")
    for each in more if isinstance(more, list) else []:
        if isinstance(each, dict) and "source" in each:
            each["source"] = beside(path, each["source"])


class _UniqueKeys(yaml.SafeLoader):
    """YAML loader that refuses a repeated key, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise ConfigError(
                    f"{self.name}, line {key.start_mark.line + 1}: the key {key.value} is there twice in one part; "
                    "keep one of the two"
                )
            seen |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
        return super().construct_mapping(node, deep)


def _load_yaml(text: str, name: str) -> Any:
    loader = None
    try:
        loader = _UniqueKeys(text)
        loader.name = name
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not YAML at {_where_and_why(error, text)}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _where_and_why(error: yaml.YAMLError, text: str) -> str:
    """Return an error's line, column, reason and remedy in one line."""
    if isinstance(error, yaml.reader.ReaderError):  # of a character, in a text that PyYAML has not begun to read
        before = text[: error.position].split("\n")
        reason = f"the character U+{error.character:04X} is not allowed. Take it out"
        return f"line {len(before)}, column {len(before[-1]) + 1}: {reason}"
    marked = cast("yaml.MarkedYAMLError", error)  # all others are
    mark, reason = cast("yaml.Mark", marked.problem_mark), str(marked.problem)
    meant = next((told for begin, told in _MEANT.items() if reason.startswith(begin)), f"{reason}. Correct it")
    return f"line {mark.line + 1}, column {mark.column + 1}: {meant}"


def is_place(key: str, value: Any) -> bool:
    """Return True if a value of ``key`` may name a file. The value "base" of ``distill.teacher`` never does, even if
    there is a folder "base".
    """
    return key in _KEYS_OF_PLACES and (key, value) != ("distill.teacher", "base")


def beside(path: Path, value: Any) -> Any:
    """Return ``value`` as a path in the recipe's folder if such a file exists there; otherwise return it unchanged."""
    return str(path.parent / value) if isinstance(value, str) and (path.parent / value).exists() else value


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one ``key=value`` in the values of a recipe, or remove a key by ``~key``. Raises ConfigError for another
    form, and for a key that cannot be set or removed.
    """
    key, equals, text = override.partition("=")
    removes = override.startswith("~") and not equals
    if not key.strip("~") or not (equals or removes):
        raise ConfigError(
            f"--set {override!r} must have the form key=value, such as training.learning_rate=1e-4, or ~key, which "
            "removes a key"
        )
    try:
        if removes:
            take_out(values, override[1:])
            return
        put(values, key, text if _is_text(key, text) else _load_yaml(text, "the value"))
    except ConfigError as error:
        raise ConfigError(f"--set {override!r}: {error}") from error


def _is_text(key: str, text: str) -> bool:
    """Return True if a value is used as text: its key takes text, and the value is neither quoted nor null."""
    part, _, name = key.rpartition(".")
    parts: dict[str, type[BaseModel]] = {"": Written, "model": ModelPart, "data": DataPart, "distill": DistillPart}
    field = parts[part].model_fields.get(name) if part in parts else None
    is_yaml = re.match(r"\s*(['\"]|(null|~)?\s*$)", text)
    return field is not None and field.annotation in (str, str | None) and not is_yaml


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set ``part.key`` in the values of a recipe. Raises ConfigError if the part is no mapping."""
    *parents, last = key.split(".")
    section = values
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise ConfigError(f"{parent} is a value, not a section: set {parent} itself, or write it as a section")
    section[last] = value


def take_out(values: dict[str, Any], key: str) -> None:
    """Remove ``part.key`` from the values of a recipe. Raises ConfigError if it is not there."""
    *parents, last = key.split(".")
    part: Any = values
    for parent in parents:
        part = part.get(parent) if isinstance(part, dict) else None
    if not isinstance(part, dict) or last not in part:
        there = ", ".join(str(name) for name in part) if isinstance(part, dict) else ""
        raise ConfigError(f"{key} is not in the recipe" + (f"; here are {there}" if there else ""))
    del part[last]


def section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a part of a recipe's values, or an empty dict if it is missing or not a mapping."""
    found = values.get(name)
    return found if isinstance(found, dict) else {}
