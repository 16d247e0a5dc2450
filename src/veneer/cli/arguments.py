"""Checks of arguments that several verbs take, made before torch is imported: paths, weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from veneer.data.named_files import missing_told
from veneer.errors import CompositionError, ConfigError, DataError
from veneer.plan.presets import require_weights
from veneer.store.adapter.folder import NEEDS_BASE, needs_base
from veneer.store.found import require_found


def require_file(option: str, path: Path, ending: str = "", *, replaces: bool = True) -> None:
    """Raise ConfigError if no file can be written at ``path``, or if it lacks the suffix.

    Unless the verb ``replaces`` it, a file that is there is refused too.
    """
    if path.suffix != ending and ending:
        raise ConfigError(f"{option} {path} must end in {ending}")
    if path.is_dir():
        raise ConfigError(f"{option} {path} is a folder: give the file to write")
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no folder {path.parent}; make it, or choose another place")
    if path.exists() and not replaces:
        raise ConfigError(f"{option} {path} is there already: choose another name, or overwrite it (--force)")


def require_folder(option: str, path: Path, *, replaces: bool = True) -> None:
    """Raise ConfigError if ``path`` cannot become a folder because a file is in the way.

    Unless the verb ``replaces`` it, a folder that holds anything is refused too.
    """
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise ConfigError(f"{option} {path}: {part} is a file, not a folder; choose another place")
    if not replaces and path.is_dir() and any(path.iterdir()):
        raise ConfigError(f"{option} {path} is not empty: choose another folder, or overwrite it (--force)")


def weights_of(weights: str | None, n: int) -> list[float]:
    """Return the numbers of ``--weights``, by default all 1. Raises ConfigError unless each input has one."""
    given = [1.0] * n if weights is None else weights.replace(",", " ").split()
    try:
        numbers = [float(w) for w in given]
    except ValueError as error:
        raise ConfigError(f"--weights {weights!r} must be numbers separated by spaces or commas") from error
    if len(numbers) != n:
        raise ConfigError(f"--weights has {len(numbers)} numbers for {n} inputs: give one for each")
    return numbers


def require_rows(file: Path | None) -> None:
    """Raise DataError for a file of rows that does not exist."""
    if file is not None and not file.exists():
        raise DataError(missing_told(file))


def require_model(*models: str | None) -> None:
    """Raise ConfigError for a preset, which has no weights, and for a model that is nowhere. None is allowed."""
    for model in models:
        if model is not None:
            require_weights(model)
            require_found(model)


def require_bases(adapters: Sequence[Path], base: str | None) -> None:
    """Raise CompositionError for an adapter that needs its base, if none is given and none that is named is found."""
    configs = {} if base is not None else {adapter: _fields(adapter) for adapter in adapters}
    needy = [folder for folder, of in configs.items() if of.get("peft_type") in NEEDS_BASE or of.get("use_dora")]
    named = dict.fromkeys(str(of.get("base_model_name_or_path") or "") for of in configs.values())
    if needy and not any(map(is_found, filter(None, named))):
        lacking = ", ".join(filter(None, named))
        more = f". The base that is named, {lacking}, is not found" if lacking else ". No config names it"
        raise CompositionError(needs_base(needy[0]) + more)


def _fields(adapter: Path) -> dict[str, str | bool]:
    """Texts and truth values of an adapter's config; none if it cannot be read.

    Other values are not looked at here: whoever parses the config refuses those that are wrong.
    """
    try:
        fields = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    values = fields.items() if isinstance(fields, dict) else ()
    return {key: value for key, value in values if isinstance(value, str | bool)}


def is_found(model: str) -> bool:
    """Return True for a model that `require_found` accepts."""
    try:
        require_found(model)
    except ConfigError:
        return False
    return True
