"""Reading and writing of ``adapter_config.json``: PEFT's fields as values."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from veneer.contract.peft_fields import COMMON, PeftFields
from veneer.errors import FormatError
from veneer.plain.nearest import nearest

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"  # beside it
PEFT_VERSION = "0.21.2"
_AGAIN = "save or download the adapter again"


def text_of(values: Mapping[str, object], peft_fields: PeftFields) -> str:
    """Return the text of the file as PEFT writes it: sorted, indented by 2, with fields of PEFT that are
    not used here.
    """
    written = {**COMMON.neutral, **peft_fields.neutral, **{key: _plain(value) for key, value in values.items()}}
    for key in peft_fields.quiet:
        if written.get(key) is None:
            written.pop(key, None)
    return json.dumps(written | {"peft_version": PEFT_VERSION}, indent=2, sort_keys=True)


def read_fields(folder: Path) -> dict[str, Any]:
    """Read the config file in an adapter's folder. Raises FormatError if there is none or it is damaged."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        inside = folder / "adapter"  # where a training run saves it
        advice = f"give a folder with {CONFIG_FILE} and its weights"
        if (inside / CONFIG_FILE).is_file():
            advice = f"{inside} holds one, give that folder"
        raise FormatError(f"{folder} holds no {CONFIG_FILE}: it is not the folder of an adapter; {advice}")
    return read_values(path)


def read_values(path: Path) -> dict[str, Any]:
    """Read a file like ``adapter_config.json``. Raises FormatError if there is none or it is damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        advice = f"give the path of a readable {path.name}"
        raise FormatError(f"{path} cannot be read ({error.strerror}): {advice}") from error
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not text in UTF-8 ({error}): {_AGAIN}") from error
    except ValueError as error:  # no JSON, or a number of more digits than Python reads
        raise FormatError(f"{path} is not valid JSON ({error}): {_AGAIN}") from error
    except RecursionError as error:
        raise FormatError(f"{path} is nested too deeply to be read: it is damaged, or no config; {_AGAIN}") from error
    if not isinstance(values, dict):
        raise FormatError(f"{path} must hold a JSON object, it holds a {type(values).__name__}: {_AGAIN}")
    return values


def problems_of(values: Mapping[str, object], known: Collection[str], peft_fields: PeftFields) -> list[str]:
    """Return a problem for every key that is not among the ``known`` ones.

    Such a key is unknown, for which the nearest known key is named, or it asks for an unsupported feature.
    """
    neutral = {**COMMON.neutral, **peft_fields.neutral}
    unread = (*COMMON.unread, *peft_fields.unread)
    return [
        _problem(key, value, known, neutral)
        for key, value in values.items()
        if key not in known and key not in unread and not (key in neutral and _is_neutral(value, neutral[key]))
    ]


def _problem(key: str, value: object, known: Collection[str], neutral: Mapping[str, object]) -> str:
    if key in neutral:
        return (
            f"{key}={value!r} asks for a feature of PEFT that is not supported here (allowed: {neutral[key]!r}): set "
            "it to that"
        )
    close = nearest(key, {*known, *neutral}, n=1)
    return f"unknown key {key!r}" + (f" (nearest: {close[0]!r})" if close else "")


def _is_neutral(value: object, neutral: object) -> bool:
    return value == neutral or (not value and not neutral)


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value
