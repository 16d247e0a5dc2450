"""Checks that an adapter fits a base, and that several share one base: by config and headers, for every method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from veneer.contract import MethodConfig
from veneer.contract.file import WEIGHTS_FILE
from veneer.contract.keys import copies_of, is_rows, is_shared, place_of, usual_key
from veneer.contract.known import Known
from veneer.contract.places import Placed
from veneer.errors import FormatError, NoStorageError, TargetError
from veneer.model.sites.places import placed_on
from veneer.records.sites import AttentionSite, LinearSite
from veneer.store.adapter.config import read_config
from veneer.store.adapter.files import read_headers
from veneer.store.adapter.folder import require_adapter
from veneer.store.adapter.misfit import Shaped, misfit
from veneer.store.adapter.skeleton import without_storage
from veneer.store.model_config import model_config
from veneer.store.named_base import GivenBase, is_one_model


def require_undamaged(adapter: Path) -> None:
    """Raise ConfigError if there is no such adapter, FormatError if its files are damaged."""
    require_adapter(adapter)
    read_config(adapter)
    read_headers(adapter)


def require_fit(adapter: Path, base: Path, n_tokens: int = 0, called: str | None = None) -> None:
    """Raise FormatError if an adapter does not fit the model described by a base's config. No weight is read.

    ``n_tokens``: the minimum size of the vocabulary. ``called``: the base's name in the error.
    """
    config = model_config(base)
    text = config.get_text_config()
    text.vocab_size = max(text.vocab_size, n_tokens)
    with fitting(adapter, called or str(base)):
        require_fit_on(adapter, without_storage(config, ()))


def require_fit_on(adapter: Path, model: PreTrainedModel) -> None:
    """Raise FormatError if an adapter's tensors do not fit a model without adapters. Raise TargetError if the model
    lacks a module that the adapter changes.

    The model may be on the meta device. If only a forward pass can show which modules the adapter changes, the adapter
    is then assumed to fit.
    """
    config = read_config(adapter)
    stored = {usual_key(key): tensor for key, tensor in read_headers(adapter).items()}
    given = {key: tensor for key, tensor in stored.items() if not any(own in stored for own in copies_of(key))}
    try:
        places = placed_on(model, config)
    except NoStorageError:
        return
    keys = [key for placed in places.values() for key in placed.keys.values()]
    missing = [key for key in keys if key not in given]
    expected = {} if missing else _expected(config, places, given)
    expected |= _whole_parameters(model, {key: tensor for key, tensor in given.items() if key not in keys})
    problems = [f"missing: {key}" for key in missing]
    problems += [f"unexpected: {key}" for key in _homeless(model, config, [key for key in given if key not in keys])]
    problems += [
        f"shape {tuple(given[key].shape)}, but the model needs {tuple(own.shape)}: {key}"
        for key, own in expected.items()
        if tuple(given[key].shape) != tuple(own.shape)
    ]
    if problems:
        raise misfit(str(adapter / WEIGHTS_FILE), model, problems, config, given)


def _expected(config: MethodConfig, places: Mapping[str, Placed], given: Mapping[str, Shaped]) -> dict[str, Shaped]:
    """Return the shapes that an adapter's parameters must have at the modules ``places``, by key of the file."""
    if places:
        stored = {
            path: {name: tuple(given[key].shape) for name, key in placed.keys.items()}
            for path, placed in places.items()
        }
        config = config.for_sites([placed.site for placed in places.values()], Known(shapes=stored))
    return {
        placed.keys[name]: SimpleNamespace(shape=shape)
        for placed in places.values()
        for name, shape in config.shapes(placed.site).items()
    }


def _homeless(model: nn.Module, config: MethodConfig, keys: Sequence[str]) -> list[str]:
    """Return the keys whose module the model lacks. If an adapter adds the module to a block, it is enough that the
    model has the block.
    """
    modules = {path for path, _ in model.named_modules()}
    shared = () if config.shared is None else config.shared.names
    paths = {key: place_of(key, ()).path for key in keys if not is_shared(key, shared)}
    return [key for key, path in paths.items() if not {path, path.rpartition(".")[0]} & modules]


def _whole_parameters(model: nn.Module, given: Mapping[str, Shaped]) -> dict[str, Shaped]:
    """Return the shapes that a file's tensors must have, by key, if they replace the model's own parameters or rows of
    its embeddings.
    """
    found: dict[str, Shaped] = {}
    own = dict(model.named_parameters(remove_duplicate=False))
    for key, tensor in given.items():
        place = place_of(key, ())
        parameter = own.get(f"{place.path}.{'weight' if is_rows(key) else place.end}")
        if parameter is not None:
            shape = (tensor.shape[0], *parameter.shape[1:]) if is_rows(key) else parameter.shape
            found[key] = SimpleNamespace(shape=shape)
    return found


def require_one_base(adapters: Sequence[Path]) -> list[str]:
    """Return a sentence "FOLDER was trained on NAME" for each base that the adapters name, if the names may mean
    different models; otherwise an empty list.

    Raises ConfigError and FormatError if a folder is not an adapter. Raises FormatError if the layers of two adapters
    differ in size. Sizes that a file does not hold are not compared.
    """
    for folder in adapters:
        require_undamaged(folder)
    seen: dict[tuple[str, str], tuple[Path, int]] = {}
    for folder in adapters:
        for (path, unit), size in _sizes(folder).items():
            other, before = seen.setdefault((path, unit), (folder, size))
            if before != size:
                named = [base_named_by(each) or "a base that it does not name" for each in (other, folder)]
                raise FormatError(
                    f"{other} and {folder} are adapters of two bases: {path} has {before} {unit} in {other}, "
                    f"which was trained on {named[0]}, and {size} in {folder}, which was trained on {named[1]}"
                )
    bases = {name: folder for folder in reversed(adapters) if (name := base_named_by(folder)) is not None}
    first, *others = reversed(bases) if bases else ("",)
    if all(is_one_model(first, name) for name in others):
        return []
    return [f"{folder} was trained on {name}" for name, folder in reversed(bases.items())]


def _sizes(adapter: Path) -> dict[tuple[str, str], int]:
    """Infer the widths of a base's modules from the shapes in an adapter's file. Keys are (module path, name of the
    width).
    """
    file = adapter / WEIGHTS_FILE
    shapes = {key: tuple(tensor.shape) for key, tensor in read_headers(adapter).items()}
    places = read_config(adapter).places_in(shapes, str(file)) or {}
    return {
        (path, unit): size
        for path, placed in places.items()
        for site in (placed.site if isinstance(placed.site, tuple) else (placed.site,))
        for unit, size in _widths(site).items()
    }


def _widths(site: Any) -> dict[str, int]:
    if isinstance(site, LinearSite):
        return {"inputs": site.in_features, "outputs": site.out_features}
    if isinstance(site, AttentionSite):
        return {f"key/value heads in {site.name}": site.kv_heads, f"features a head in {site.name}": site.head_dim}
    return {"features": site.features}


def base_named_by(adapter: Path) -> str | None:
    """Return the base that an adapter's config names; None if it names none."""
    return read_config(adapter).base_model_name_or_path or None


def base_warnings(adapters: Sequence[Path], base: str, place: Path | str) -> list[str]:
    """Return a warning for each adapter that seems to belong to another base, by the names of the bases and their
    files.

    ``base`` is the name that was given, ``place`` its folder or its id on the hub. This is no error, because one model
    may have many names.
    """
    given = GivenBase(base, (str(place),), place if isinstance(place, Path) else None)
    said = [(folder, given.warning(base_named_by(folder))) for folder in adapters]
    return [f"{folder}: {warning}" for folder, warning in said if warning]


@contextmanager
def fitting(adapter: Path, base: str) -> Iterator[None]:
    """Turn an error within the context into a FormatError that says: the (undamaged) adapter does not fit the base."""
    try:
        yield
    except (FormatError, TargetError) as error:
        known = base_named_by(adapter)
        other = known is not None and Path(known).expanduser() != Path(base).expanduser()
        advice = f"it was trained on {known}: give {known} as the model. " if other else ""
        raise FormatError(f"the adapter {adapter} does not fit the model {base}: {advice}{error}") from error
