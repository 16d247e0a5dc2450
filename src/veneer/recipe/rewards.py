"""Reward functions of GRPO and RLOO by name: built-in ones or the user's own."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError, DataError, listed
from veneer.evaluate import accuracy
from veneer.plain.unused_packages import show_unused
from veneer.recipe.key_checks import perhaps

Reward = Callable[..., Any]


def exact_match(
    completions: Sequence[Any], *, column: str = "answer", pattern: str | None = None, **row: Any
) -> list[float]:
    """Return 1 for a completion equal to the row's ``column``, except for white space at its ends, else 0.

    ``veneer eval`` judges in the same way. If ``pattern``, a regular expression, is given, its last match (its group,
    if it has one) is compared instead. It is searched in the completion and, if found there, in the column. Raises
    DataError if the rows have no such column.
    """
    if column not in row:
        raise DataError(f"exact-match compares with the column {column!r}, and the rows have {sorted(_columns(row))}")
    judge = accuracy.exact_match() if pattern is None else accuracy.regex_match(pattern)
    return [
        float(judge(text_of(completion), [str(answer)]))
        for completion, answer in zip(completions, row[column], strict=True)
    ]


def regex(completions: Sequence[Any], *, pattern: str, **row: Any) -> list[float]:
    """Return 1 for a completion in which the regular expression is found, else 0."""
    return [float(re.search(pattern, text_of(completion), re.DOTALL) is not None) for completion in completions]


def length(
    completions: Sequence[Any], *, target: int, completion_ids: Sequence[Sequence[int]], **row: Any
) -> list[float]:
    """Return 1 for a completion of ``target`` tokens. Other lengths get less, by their relative deviation, but at least
    0.
    """
    return [max(0.0, 1.0 - abs(len(ids) - target) / target) for ids in completion_ids]


BUILT_IN: Mapping[str, Reward] = {"exact-match": exact_match, "regex": regex, "length": length}
_TOLD = "GRPO and RLOO call a reward function with prompts, completions, completion_ids and the columns of the rows"


def text_of(completion: Any) -> str:
    """Return the text of a completion, or of its last message if it is a conversation."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def reward_function(name: str, settings: Mapping[str, Any], folder: Path = Path()) -> Reward:
    """Return the reward function of a name: built in, ``module:function``, or ``file.py:function`` (in ``folder``).

    ``settings`` are its keyword arguments. Raises ConfigError if it cannot be found or takes no such settings.
    """
    found = BUILT_IN.get(name) or _imported(name, folder)
    _require_settings(name, found, settings)
    if not settings:
        return found
    bound = functools.partial(found, **settings)
    functools.update_wrapper(bound, found)
    return bound


def named_function(name: str, key: str, folder: Path = Path()) -> Any:
    """Return the function or class that ``module:function`` or ``file.py:function`` (in ``folder``) names.

    ``key`` is the recipe's key, for messages. Raises ConfigError if it cannot be found or called.
    """
    place, _, attribute = name.partition(":")
    if not place or not attribute:
        raise ConfigError(f"{key}: {name!r} names no function: write module:function or file.py:function")
    return _attribute(name, folder)


def _imported(name: str, folder: Path) -> Reward:
    place, _, attribute = name.partition(":")
    if not place or not attribute:
        known = ", ".join(BUILT_IN)
        raise ConfigError(
            f"{name!r} is no reward function: use one that is built in ({known}), or one of your own as "
            f"module:function or file.py:function{perhaps(name, BUILT_IN)}"
        )
    return _attribute(name, folder)


def _attribute(name: str, folder: Path) -> Reward:
    """Return the function that ``module:name`` or ``file:name`` refers to."""
    place, _, attribute = name.partition(":")
    module = _module(place, folder, name)
    found = getattr(module, attribute, None)
    if not callable(found):
        functions = sorted(key for key, value in vars(module).items() if inspect.isfunction(value))
        raise ConfigError(f"{name!r}: {place} has no function {attribute!r}; it has {', '.join(functions) or 'none'}")
    return found  # type: ignore[no-any-return]


def _module(place: str, folder: Path, name: str) -> Any:
    show_unused()  # a user's code may use them
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = next((p for p in (folder / place, Path(place)) if p.is_file()), None)
        if path is None:
            raise ConfigError(f"{name!r}: there is no file {folder / place}. Give a path from the recipe's folder")
        return _run_file(path.resolve(), name)
    except ConfigError:
        raise
    except Exception as error:  # whatever the user's own code raises
        raise ConfigError(
            f"{name!r}: {place} cannot be imported ({type(error).__name__}: {error}). A file beside the recipe is "
            "named file.py:function"
        ) from error


def _run_file(path: Path, name: str) -> Any:
    """Import a Python file as a module whose name includes a hash of its path. If the import fails, the name is removed
    from ``sys.modules``.
    """
    own = hashlib.blake2b(str(path).encode(), digest_size=8).hexdigest()
    spec = importlib.util.spec_from_file_location(f"veneer_rewards_{path.stem}_{own}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{name!r}: {path} cannot be imported. Give a file with Python code that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # before it runs: dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def _require_settings(name: str, function: Reward, settings: Mapping[str, Any]) -> None:
    parameters = inspect.signature(function).parameters.values()
    named = {p.name: p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    if name in BUILT_IN:
        own = {key: p for key, p in named.items() if key not in ("completions", "completion_ids")}
        problems = [f"{key}: unknown key{perhaps(key, own)}" for key in settings if key not in own]
        problems += [f"{key}: is missing" for key, p in own.items() if p.default is p.empty and key not in settings]
        problems += _value_problems(settings)
    else:
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        problems = [f"{key}: it takes no such argument" for key in settings if key not in named and not takes_all]
        if not takes_all:
            problems += [f"it must take **row, for {_TOLD}"]
    if problems:
        raise ConfigError(listed(problems, f"the reward function {name}"))


def _value_problems(settings: Mapping[str, Any]) -> list[str]:
    found = []
    if settings.get("pattern") is not None:
        try:
            re.compile(settings["pattern"])
        except (re.error, TypeError) as error:
            found.append(f"pattern: {settings['pattern']!r} is no regular expression ({error}): correct it")
    target = settings.get("target")
    if target is not None and (not isinstance(target, int) or isinstance(target, bool) or target < 1):
        found.append(f"target: {target!r} must be a number of tokens, at least 1")
    if "column" in settings and not isinstance(settings["column"], str):
        found.append(f"column: {settings['column']!r} must be the name of a column")
    return found


def _columns(row: Mapping[str, Any]) -> list[str]:
    given = ("prompts", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
    return ["prompt", *(key for key in row if key not in given)]
