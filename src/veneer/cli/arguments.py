"""Checks of arguments that several verbs take, made before torch is imported: paths, weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from veneer.contract.file import WEIGHTS_FILE
from veneer.data.named_files import missing_told
from veneer.disk.safetensors_header import read_entries
from veneer.errors import CompositionError, ConfigError, DataError
from veneer.plan.presets import require_weights
from veneer.recipe.declared_config import declared_config, modules_named
from veneer.store.adapter.folder import NEEDS_BASE, entries_in, is_alone, needs_base, require_whole
from veneer.store.found import require_found


def require_file(option: str, path: Path, ending: str = "", *, replaces: bool = True) -> None:
    """Raise ConfigError if no file can be written at ``path``, or if its suffix is wrong.

    An existing file is refused too, unless the verb ``replaces`` it.
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

    A folder that holds anything is refused too, unless the verb ``replaces`` it.
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
    """Raise an error for a model that cannot be loaded; None is allowed.

    ConfigError: it is a preset, which has no weights, or was not found. FormatError: it is a damaged adapter.
    """
    for model in models:
        if model is not None:
            require_weights(model)
            require_found(model)
            if is_alone(Path(model).expanduser()):
                require_whole(Path(model).expanduser())


def require_bases(adapters: Sequence[Path], base: str | None) -> None:
    """Raise CompositionError for an adapter that needs its base, if none is given and the base that it names is not
    found.
    """
    configs = {} if base is not None else {adapter: _fields(adapter) for adapter in adapters}
    needy = [folder for folder, of in configs.items() if of.get("peft_type") in NEEDS_BASE or of.get("use_dora")]
    named = dict.fromkeys(str(of.get("base_model_name_or_path") or "") for of in configs.values())
    if needy and not any(map(is_found, filter(None, named))):
        lacking = ", ".join(filter(None, named))
        more = f". The base that is named, {lacking}, is not found" if lacking else ". No config names it"
        raise CompositionError(needs_base(needy[0]) + more)


def require_one_kind(adapters: Sequence[Path]) -> None:
    """Raise CompositionError if an adapter that only rescales (IA3) changes a layer that no other kind of adapter among
    the given ones changes.

    Nothing is checked if the names of tensors do not show the modules of each adapter, or if all adapters are of one
    kind.
    """
    modules = {adapter: _modules(adapter) for adapter in dict.fromkeys(adapters)}
    scales = [adapter for adapter in modules if _fields(adapter).get("peft_type") == "IA3"]
    others = [adapter for adapter in modules if adapter not in scales]
    elsewhere = {path for adapter in others for path in modules[adapter]}
    for adapter in scales:
        alone = sorted(set(modules[adapter]) - elsewhere)
        if alone and all(modules[other] for other in others) and others:
            raise CompositionError(
                f"{adapter} rescales {alone[0]} (IA3), which {others[0]} does not change: no method writes both "
                "kinds into one adapter. Combine adapters of one method"
            )


def _modules(adapter: Path) -> tuple[str, ...]:
    """Return the modules that an adapter changes; none if the names of its tensors do not show them."""
    config = declared_config(adapter)
    keys = entries_in(adapter, WEIGHTS_FILE, read_entries)
    return () if config is None else modules_named(config, keys) or ()


def _fields(adapter: Path) -> dict[str, str | bool]:
    """Return the texts and truth values of an adapter's config; none if it cannot be read.

    Other values are not checked here: the config's parser refuses wrong ones.
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
