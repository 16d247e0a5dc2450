"""Checks of arguments that several verbs take, made before the work starts: output paths, weights."""

from __future__ import annotations

from pathlib import Path

from veneer.errors import ConfigError


def require_file(option: str, path: Path, ending: str = "") -> None:
    """Raise ConfigError if no file can be written at ``path``, or if it lacks the suffix."""
    if path.suffix != ending and ending:
        raise ConfigError(f"{option} {path} must end in {ending}")
    if path.is_dir():
        raise ConfigError(f"{option} {path} is a folder: give the file to write")
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no folder {path.parent}; make it, or choose another place")


def require_folder(option: str, path: Path) -> None:
    """Raise ConfigError if ``path`` cannot become a folder because a file is in the way."""
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise ConfigError(f"{option} {path}: {part} is a file, not a folder; choose another place")


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


def require_adapter(adapter: Path | None) -> None:
    """Raise ConfigError for an adapter whose folder does not exist."""
    if adapter is not None and not adapter.is_dir():
        raise ConfigError(
            f"no adapter {str(adapter)!r}: there is no such folder. Give one that holds adapter_config.json"
        )
