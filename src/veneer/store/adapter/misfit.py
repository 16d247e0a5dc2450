"""Message for an adapter that does not fit a model: missing or misshapen tensors, and the two sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

from veneer.contract import MethodConfig
from veneer.errors import FormatError
from veneer.model.blueprint.names import ELSEWHERE
from veneer.records.sites import LinearSite
from veneer.store.adapter.skeleton import config_of_base
from veneer.store.model_config import model_config

_READERS = {name for role in ("q", "k", "v", "qkv", "gate", "up") for name in ELSEWHERE[role]}  # of the hidden state
_SHOWN = 5  # of the tensors of one kind that do not fit; one if the two sizes are the reason


class Shaped(Protocol):
    """Tensor, or its entry in a file's header."""

    @property
    def shape(self) -> Sequence[int]: ...


class _Size(NamedTuple):
    """Size of a model: its number of blocks and the width of its hidden state. A number is 0 if it is unknown."""

    layers: int
    width: int


def misfit(
    source: str, model: Any, problems: Sequence[str], config: MethodConfig, given: Mapping[str, Shaped]
) -> FormatError:
    """Return the error for tensors of ``source`` that do not fit a ``model``: the first problems of each kind.

    Each problem begins with the name of its kind. ``config`` and ``given``, by key, are the adapter's.
    """
    sizes = _other_size(config, given, model)
    told = "\n  ".join(_shortened(problems, 1 if sizes else _SHOWN))
    return FormatError(f"{source} does not fit {type(model).__name__}{sizes}:\n  {told}")


def _shortened(problems: Sequence[str], shown: int) -> list[str]:
    """Return the first ``shown`` problems of each kind. If a kind has more, its last line says how many."""
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(problem.split(maxsplit=1)[0], []).append(problem)
    told = []
    for of in kinds.values():
        told += of[:shown]
        if len(of) > shown:
            told[-1] += f", and {len(of) - shown} more of these"
    return told


def _other_size(config: MethodConfig, given: Mapping[str, Shaped], model: Any) -> str:
    """Return both sizes in words if the adapter was trained for a model of another size; else an empty text."""
    own, base = _size(getattr(model, "config", None)), _size_of_base(config)
    trained = _reached(config, given) if base is None else base
    other_width = trained.width and trained.width != own.width
    # an adapter may leave blocks out, so that the fewer layers of its own tensors mean nothing
    other_depth = trained.layers > own.layers or (base is not None and trained.layers < own.layers)
    if not (own.layers and own.width and trained.layers and (other_width or other_depth)):
        return ""
    before, here = (f" of width {trained.width}", f" of {own.width}") if trained.width else ("", "")
    return (
        f": it was trained for {trained.layers} layers{before}, this model has {own.layers}{here}; "
        "give the base that it was trained on"
    )


def _size_of_base(config: MethodConfig) -> _Size | None:
    """Return the size of the adapter's base; None unless the base's config is on this machine and can be loaded."""
    with suppress(OSError, FormatError):
        path = config_of_base(config.base_model_name_or_path, config.revision)
        return None if path is None else _size(model_config(path.parent))
    return None


def _size(config: Any) -> _Size:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return _Size(getattr(text, "num_hidden_layers", 0), getattr(text, "hidden_size", 0))


def _reached(config: MethodConfig, given: Mapping[str, Shaped]) -> _Size:
    """Infer from an adapter's tensors the size of the model that they need.

    The number of layers is the highest number of a block plus 1. The width is the most common one of layers that read
    the hidden state.
    """
    numbers = [int(found[1]) for key in given if (found := re.search(r"\.(\d+)\.", key))]
    places = None
    with suppress(FormatError):  # a damaged file: its problems are listed
        places = config.places_in({key: tuple(value.shape) for key, value in given.items()}, "")
    sites = [placed.site for path, placed in (places or {}).items() if path.rpartition(".")[2] in _READERS]
    widths = [site.in_features for site in sites if isinstance(site, LinearSite) and site.kind == "linear"]
    return _Size(max(numbers, default=-1) + 1, max(sorted(set(widths)), key=widths.count, default=0))
