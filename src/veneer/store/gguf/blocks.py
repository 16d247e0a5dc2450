"""GGUF files used in place: a folder in the cache describes the model, and its weights stay in the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from veneer.disk.atomic import write_atomically
from veneer.errors import FormatError
from veneer.store.bars import without_bars
from veneer.store.gguf.family import GgufFamily
from veneer.store.gguf.fields import FACTOR_TENSORS
from veneer.store.gguf.header import GgufHeader, own_pairs, read_header
from veneer.store.gguf.parameters import GgufParameter, Places, placed_parameters, places_in
from veneer.store.gguf.registry import laid_out_family
from veneer.store.model_config import model_config

DESCRIPTION = "blocks.json"
"""In the folder of a file: its path and stamp, the dtype of a dense copy, and the tensors of each parameter."""


@dataclass(frozen=True)
class BlockFile:
    """GGUF file that a folder of the cache describes, unchanged since then.

    ``dtype`` is that of the parameters that are not in blocks. ``places`` maps each parameter, tied ones too, to the
    names of its tensors in the file.
    """

    folder: Path
    path: Path
    dtype: torch.dtype
    places: Places

    @cached_property
    def config(self) -> Any:
        """The model's config."""
        return model_config(self.folder)

    def parameters(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, GgufParameter]:
        """Return the file's parameters for a model whose parameters have these ``shapes``, by the model's names. Raises
        FormatError if the file does not fit.
        """
        header = read_header(self.path)
        return placed_parameters(
            self.path,
            {name: self.places[name] for name in shapes},
            shapes,
            {tensor.name: tensor for tensor in header.tensors},
            family=_family(self.path, header),
            config=self.config,
            dtype=self.dtype,
        )

    @cached_property
    def tensors(self) -> dict[str, GgufParameter]:
        """Parameters in the order of the model. Tied parameters are listed once."""
        found, once = self.parameters(_shapes(model_without_storage(self.config))), dict[tuple[str, ...], str]()
        for name, held in self.places.items():
            once.setdefault(tuple(held), name)
        return {name: found[name] for name in once.values()}


def described_file(folder: Path) -> BlockFile | None:
    """Return the GGUF file that a folder describes; None if the folder has weights of its own.

    Raises FormatError if the file is gone, or is not the one that was described.
    """
    description = folder / DESCRIPTION
    if not description.is_file():
        return None
    held = json.loads(description.read_text(encoding="utf-8"))
    path = Path(held["file"])
    if not path.is_file():
        raise FormatError(
            f"{path} is gone: it holds the weights of this model, which are read from it in every pass. Put it back, "
            "or give its new path as the model."
        )
    if [path.stat().st_size, path.stat().st_mtime_ns] != held["stamp"]:
        raise FormatError(f"{path} is another file than the one that was opened: give its path as the model.")
    return BlockFile(folder, path, getattr(torch, held["dtype"]), held["places"])


def is_at_hand(folder: Path) -> bool:
    """Return True if a folder has weights, or the file that it describes is unchanged and still there."""
    try:
        described_file(folder)
    except FormatError:
        return False
    return True


def write_description(folder: Path, path: Path, dtype: torch.dtype, places: Places) -> None:
    """Write the description of a file into its folder."""
    stat = path.stat()
    held = {
        "file": str(path.resolve()),
        "stamp": [stat.st_size, stat.st_mtime_ns],
        "dtype": str(dtype).removeprefix("torch."),
        "places": places,
    }
    write_atomically(folder / DESCRIPTION, (json.dumps(held, indent=1) + "\n").encode())


def describe_into(folder: Path, path: Path, config: Any, dtype: torch.dtype) -> None:
    """Write config and description of a file's model into ``folder``.

    Raises FormatError if parameters or tensors are left over, or do not fit each other.
    """
    model = model_without_storage(config)
    config.architectures = [type(model).__name__]
    found = parameters_of(model, path, dtype)
    places = {name: [tensor.name for tensor in parameter.tensors] for name, parameter in found.items()}
    used = {each for held in places.values() for each in held}
    unplaced = sorted({tensor.name for tensor in read_header(path).tensors} - used - set(FACTOR_TENSORS))
    if unplaced:
        raise FormatError(
            f"{path} holds the tensors {unplaced}, for which transformers' {type(model).__name__} has no place: it "
            "would compute another model. Take the model's own folder of safetensors instead"
        )
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    write_description(folder, path, dtype, places)


def parameters_of(model: Any, path: Path, dtype: torch.dtype) -> dict[str, GgufParameter]:
    """Return the parameters that a file holds for a model on the meta device, by the model's names. Tied parameters are
    listed under each of their names.

    The model may have fewer layers than the file. Raises FormatError if the file lacks a parameter, or if one does not
    fit.
    """
    header, config = read_header(path), model.config
    family, tensors = _family(path, header), {tensor.name: tensor for tensor in header.tensors}
    places = places_in(model, family, config, tensors, path)
    return placed_parameters(path, places, _shapes(model), tensors, family=family, config=config, dtype=dtype)


def model_without_storage(config: Any) -> Any:
    """Return the causal language model of a config on the meta device."""
    with without_bars(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _family(path: Path, header: GgufHeader) -> GgufFamily:
    architecture = str(header.values.get("general.architecture"))
    family = laid_out_family(architecture, own_pairs(header.values, architecture))
    if family is None:
        raise FormatError(
            f"{path} is a file of the architecture {architecture!r}, which veneer has no table of keys for. Take the "
            "model's own folder of safetensors instead"
        )
    return family


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(each.shape) for name, each in model.named_parameters(remove_duplicate=False)}
