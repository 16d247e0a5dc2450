"""Files of a checkpoint, one or shards with an index; a given function reads their headers, without torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol, TypeVar

from veneer.errors import FormatError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class OnDisk(Protocol):
    """Tensor with the ``path`` of the file that holds it."""

    @property
    def path(self) -> Path: ...


T = TypeVar("T", bound=OnDisk)
Reader = Callable[[Path], tuple[Mapping[str, T], list[str]]]


def tensors_in(path: Path, read: Reader[T]) -> dict[str, T]:
    """Return the tensors of the checkpoint in a folder, or in one file, by name.

    ``read`` returns those of one file, and its problems. Raises FormatError that lists the problems of all files.
    """
    if path.is_file():
        return tensors_of([path], read)
    index = path / INDEX_NAME
    if index.is_file():
        return _from_index(index, read)
    if (path / SINGLE_NAME).is_file():
        return tensors_of([path / SINGLE_NAME], read)
    raise FormatError(
        f"{path} holds neither {SINGLE_NAME} nor {INDEX_NAME}: give the folder of a model saved as safetensors"
    )


def tensors_of(paths: Sequence[Path], read: Reader[T]) -> dict[str, T]:
    """Return the tensors of these files by name. Raises FormatError as `tensors_in` does."""
    tensors, problems = _read_headers(paths, read)
    raise_problems(problems, paths[0].parent if paths else None)
    return tensors


def _from_index(index: Path, read: Reader[T]) -> dict[str, T]:
    weight_map, problems = _read_index(index)
    files = sorted(set(weight_map.values()))
    outside = [f for f in files if not _is_inside(f)]
    problems += [f"{index.name} names {f!r}, which lies outside the folder" for f in outside]
    present = [index.parent / f for f in files if f not in outside and (index.parent / f).is_file()]
    missing = [f for f in files if f not in outside and not (index.parent / f).is_file()]
    problems += [f"shard {f!r} is missing" for f in missing]
    tensors, found = _read_headers(present, read)
    problems += found
    unread = {index.parent / f for f in outside + missing} | ({index.parent / f for f in files} if found else set())
    for name, file in weight_map.items():
        held_by = tensors[name].path if name in tensors else None
        if index.parent / file not in unread and held_by != index.parent / file:
            problems.append(f"tensor {name!r} is not in {file!r}, where {index.name} says it is")
    raise_problems(problems, index.parent)
    return tensors


def _read_headers(files: Iterable[Path], read: Reader[T]) -> tuple[dict[str, T], list[str]]:
    tensors: dict[str, T] = {}
    problems: list[str] = []
    for file in files:
        if not file.is_file():
            problems.append(f"{file} does not exist")
            continue
        found, wrong = read(file)
        problems += [f"{file.name}: {problem}" for problem in wrong]
        problems += [f"tensor {n!r} is in {tensors[n].path.name} and in {file.name}" for n in found if n in tensors]
        tensors |= found
    return tensors, problems


def _read_index(index: Path) -> tuple[dict[str, str], list[str]]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FormatError(f"{index} is not JSON ({error}): save or download it again") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index} has no weight_map from tensor names to files: save or download it again")
    wrong = [name for name, file in weight_map.items() if not isinstance(file, str)]
    return {n: f for n, f in weight_map.items() if n not in wrong}, [
        f"{index.name} maps {n!r} to something that is no file name" for n in wrong
    ]


def _is_inside(file: str) -> bool:
    """Return True if a file name in an index stays inside the folder. Links are allowed: the hub's cache uses them."""
    parts = PurePosixPath(file.replace("\\", "/"))
    return not parts.is_absolute() and ".." not in parts.parts and ":" not in file


def raise_problems(problems: list[str], folder: Path | None = None) -> None:
    """Raise FormatError with these problems of a checkpoint, if there are any."""
    if problems:
        where, advice = (f" in {folder}", "; save or fetch it again") if folder else ("", "")
        raise FormatError(f"the checkpoint{where} cannot be used: {'; '.join(problems)}{advice}")
