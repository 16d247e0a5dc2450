"""Adapter on disk, in PEFT's format: the key of each tensor, and strict saving and loading."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.contract import MethodConfig
from veneer.contract.config import for_use
from veneer.contract.file import CONFIG_FILE, WEIGHTS_FILE
from veneer.contract.keys import (
    copies_of,
    divided,
    is_bases_own,
    is_of_wrapped,
    place_of,
    rows_key,
    shared_key,
    usual_key,
    weight_key,
)
from veneer.contract.shared import Shared
from veneer.disk.atomic import write_atomically, write_together
from veneer.disk.safetensors import tensors_to_bytes
from veneer.errors import ConfigError, FormatError
from veneer.model.adapted.embedding import input_embeddings
from veneer.model.adapted.site import add_copy, own_parameter
from veneer.model.adapted.state import AdapterState
from veneer.model.attach.attach import (
    adapt_path,
    adapted_modules,
    adapted_places,
    live_parameters,
    named_live_parameters,
    packed_tensors,
    repeated_tensors,
    shared_again,
    shared_tensors,
    stored_tensors,
    unpacked_tensors,
    value_problems,
)
from veneer.model.blueprint.names import MODEL_ENDS
from veneer.model.inplace import InPlace, base_of
from veneer.store.adapter.files import NETWORK_FILE, read_tensors, unusable
from veneer.store.adapter.misfit import misfit
from veneer.store.adapter.skeleton import config_of_base

SaveEmbeddings = bool | Literal["auto"]
_Place = tuple[nn.Module, str]  # a module and the name of its parameter


def save_adapter(
    model: nn.Module,
    state: AdapterState,
    name: str,
    folder: Path,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``, both or neither.

    ``tensors``: tensors by their keys on disk, by default those of `adapter_tensors`. Raises DiskError if writing
    fails.
    """
    base = base_of(type(model)) if isinstance(model, InPlace) else type(model)
    mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
    values = adapter_tensors(model, state, name) if tensors is None else tensors
    config = for_use(state.configs[name]).to_json(mapping).encode()
    write_together(folder, {WEIGHTS_FILE: tensors_to_bytes(values), CONFIG_FILE: config})


def adapter_tensors(
    model: nn.Module,
    state: AdapterState,
    name: str,
    save_embedding_layers: SaveEmbeddings = "auto",
    state_dict: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the tensors to save of an adapter, by key.

    ``state_dict`` supplies the values if the model's are sharded or stale.
    """
    values = state_dict or {}
    live = {key: values.get(own, value) for key, (own, value) in named_live_parameters(model, name).items()}
    found = stored_tensors(model, state, name, live)
    for key, (module, parameter) in _embeddings(model, state.configs[name], name).items():
        if state.configs[name].written_key(key) not in found and _saves_embedding(
            model, state.configs[name], key, save_embedding_layers
        ):
            found[key] = cast(Tensor, own_parameter(module, parameter))
    return found


@dataclass(frozen=True)
class Leniency:
    """Differences that loading tolerates.

    ``mismatched``: if a tensor in the file has another shape than the adapter's, the adapter keeps its own values.
    ``key_mapping`` translates other module names (see `renamed`).
    """

    mismatched: bool = False
    key_mapping: Mapping[str, str] | None = None


def load_weights(
    model: nn.Module, state: AdapterState, name: str, folder: Path, leniency: Leniency | None = None
) -> list[str]:
    """Copy the tensors of an adapter folder into an attached adapter.

    Return the keys of tensors that were not copied because their shape differs. There are none unless ``leniency``
    allows it; otherwise such a tensor is an error.
    """
    leniency = leniency or Leniency()
    file = NETWORK_FILE if has_network(state, name) else WEIGHTS_FILE
    tensors = renamed(read_tensors(folder, file), leniency.key_mapping)
    return assign(model, state, name, tensors, source=str(folder / file), mismatched=leniency.mismatched)


def renamed(tensors: Mapping[str, Tensor], key_mapping: Mapping[str, str] | None) -> dict[str, Tensor]:
    """Return the tensors under renamed keys. ``key_mapping`` maps regular expressions to their replacements.

    As in PEFT, a key is matched without the prefix ``base_model.model.`` or ``base_model.``. The first expression found
    in it is replaced wherever it occurs. Raises FormatError if two keys become one, and ConfigError for an invalid
    regular expression.
    """
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        prefix, rest = divided(key)
        changed = (re.sub(old, new, rest) for old, new in (key_mapping or {}).items() if re.search(old, rest))
        try:
            new_key = prefix + next(changed, rest)
        except re.error as error:
            raise ConfigError(
                f"key_mapping={dict(key_mapping or {})!r} must map regular expressions: {error}"
            ) from error
        if new_key in found:
            raise FormatError(
                f"key_mapping={dict(key_mapping or {})!r} gives two tensors the key {new_key!r}. Give patterns that "
                "keep keys apart"
            )
        found[new_key] = value
    return found


def once_each(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by their `usual_key`, without PEFT's duplicates for fully trained modules.

    With ``bias="all"`` PEFT writes the biases of such modules twice more, under its wrapper's names: as trained
    (``modules_to_save``) and as in the base (``original_module``).
    """
    return {usual_key(key): value for key, value in tensors.items() if not _is_written_again(key, tensors)}


def _is_written_again(key: str, tensors: Mapping[str, Tensor]) -> bool:
    own = next((each for each in copies_of(key) if each in tensors), None)
    return own is not None and (is_bases_own(key) or torch.equal(tensors[own], tensors[key]))


def save_network(model: nn.Module, state: AdapterState, name: str, folder: Path) -> None:
    """Write the weights of the network that generates an adapter's tensors, if there is one, for resuming training."""
    write_atomically(folder / NETWORK_FILE, tensors_to_bytes(live_parameters(model, state, name)))


def has_network(state: AdapterState, name: str) -> bool:
    """Return True if a trained network generates this adapter's tensors. A plain save holds only these tensors."""
    return state.configs[name].has_network


def holds_network(folder: Path) -> bool:
    """Return True if an adapter's folder holds the network that generates its tensors, as in a training checkpoint."""
    return (folder / NETWORK_FILE).is_file()


@dataclass(frozen=True)
class _Expected:
    """Tensors that an adapter's file should hold, by key.

    They are the adapter's ``parameters`` and, optionally, the full weights of the model's modules at ``places``.
    """

    parameters: dict[str, Tensor]
    places: dict[str, _Place]

    @property
    def values(self) -> dict[str, Tensor]:
        """Return the model's tensor for every key."""
        whole = {key: cast(Tensor, module._parameters[parameter]) for key, (module, parameter) in self.places.items()}
        return self.parameters | whole


@torch.no_grad()
def assign(
    model: nn.Module,
    state: AdapterState,
    name: str,
    tensors: Mapping[str, Tensor],
    *,
    source: str,
    mismatched: bool = False,
) -> list[str]:
    """Set the values of an attached adapter, all or nothing. ``source`` is the name of the tensors in errors.

    With ``mismatched``, the adapter keeps its own values where a given tensor has another shape, and the keys of such
    tensors are returned.

    If the tensors include a whole embedding or head that differs from the base's, it is kept with the adapter, frozen.
    The base does not change.

    Raises FormatError that counts all missing, unexpected, wrong-shaped and non-finite tensors and names the first of
    each kind.
    """
    tensors, config = once_each(tensors), state.configs[name]
    expected = _expected(model, state, name, None if mismatched else tensors)
    left: list[str] = []
    if mismatched:
        left = _misshapen(expected.values, tensors)
        tensors = {key: value for key, value in tensors.items() if key not in left}
        tensors |= {key: expected.parameters[key] for key in left if key in expected.parameters}
    problems = _problems(model, state, name, tensors, expected)
    if problems:
        raise misfit(source, model, problems, config, tensors)
    values = unpacked_tensors(model, name, tensors)
    for key, value in live_parameters(model, state, name).items():
        value.copy_(values[key])
    for holder in adapted_places(model).values():
        if holder.owns(name):
            holder.derive(name)
    for key, place in expected.places.items():
        if key in tensors:
            _carry(model, state, name, place, key=key, value=tensors[key])
    return left


def _expected(model: nn.Module, state: AdapterState, name: str, given: Mapping[str, Tensor] | None) -> _Expected:
    """Return the adapter's expected tensors.

    Tensors that the config alone determines are left out if the ``given`` tensors do not have the parameters' shapes.
    The config may then be damaged, and ask for a rank too large to generate them.
    """
    config, held = state.configs[name], live_parameters if has_network(state, name) else packed_tensors
    parameters, ends = held(model, state, name), _embeddings(model, config, name)
    fit = given is None or (given.keys() >= parameters.keys() and not _misshapen(parameters, given))
    if config.shared is not None and config.shared.is_saved and fit:
        parameters |= shared_tensors(config)
    return _Expected(parameters, {key: place for key, place in ends.items() if key not in parameters})


def _problems(
    model: nn.Module, state: AdapterState, name: str, tensors: Mapping[str, Tensor], expected: _Expected
) -> list[str]:
    """Return the reasons why these tensors cannot be the adapter's."""
    config = state.configs[name]
    shapes = {key: tuple(value.shape) for key, value in expected.values.items()}
    misshapen = _misshapen(expected.values, tensors)
    missing = [key for key in expected.parameters if key not in tensors]
    shared = {} if missing or misshapen else shared_tensors(config)
    names, again = () if config.shared is None else config.shared.names, shared_again(model, config, name)
    shared |= {key: shared[own] for key, own in again.items() if own in shared}
    known = shapes.keys() | _repeated(model, name) | {shared_key(each) for each in names} | again.keys()
    whole = [key for key, own in expected.parameters.items() if not own.is_floating_point()]
    is_held = config.shared is not None and config.shared.is_held
    tied = "that of the layer that shares it" if is_held else "the embeddings' that it is tied to"
    return [
        *(f"missing: {key}" for key in missing),
        *(f"unexpected: {key}" for key in tensors if key not in known),
        *(
            f"shape {tuple(tensors[key].shape)}, but the model needs {shapes[key]}: {key}"
            f"{_advice(tensors[key]) if key in expected.places else ''}"
            for key in misshapen
        ),
        *(
            f"differs from what {cast(Shared, config.shared).source} draws: {key}"
            for key in _differing(shared, tensors)
        ),
        *(f"differs from {tied}: {key}" for key in _torn(model, name, tensors)),
        *(f"{why}: {key}" for key, why in unusable(tensors, whole).items()),
        *([] if missing or misshapen else value_problems(model, name, tensors)),
    ]


def _misshapen(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    return [key for key, own in expected.items() if key in given and given[key].shape != own.shape]


def _differing(shared: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the keys of tensors that the config determines but whose values in the file differ."""
    return [key for key, value in shared.items() if key in tensors and not _is_drawn(tensors[key], value)]


def _torn(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the keys that tied modules share but whose values in the file differ from those of the first module."""
    expected = repeated_tensors(model, name, tensors)
    first: dict[int, str] = {}
    for key, (_, value) in named_live_parameters(model, name).items():
        shared = first.setdefault(id(value), key)
        expected |= {key: tensors[shared]} if shared != key and shared in tensors else {}
    return [key for key, value in expected.items() if key in tensors and not torch.equal(tensors[key], value)]


def _is_drawn(value: Tensor, drawn: Tensor) -> bool:
    """Return True if ``value`` equals the random values ``drawn`` up to a tolerance, directly or after rounding to
    bfloat16 or float16, because PEFT saves in a 16-bit base's dtype.
    """
    return any(_is_near(value, drawn.to(dtype).float()) for dtype in (drawn.dtype, torch.bfloat16, torch.float16))


def _is_near(value: Tensor, expected: Tensor) -> bool:
    return value.shape == expected.shape and torch.allclose(value.float(), expected, rtol=1e-5, atol=1e-6)


def _carry(model: nn.Module, state: AdapterState, name: str, place: _Place, *, key: str, value: Tensor) -> None:
    module, parameter = place
    own = cast(Tensor, module._parameters[parameter])
    value = value.to(own.device, own.dtype, copy=True)  # apart from the file's others
    if not torch.equal(own, value):
        add_copy(adapt_path(model, place_of(key, ()).path, state), name, parameter, value, frozen=True)


def _embeddings(model: nn.Module, config: MethodConfig, name: str) -> dict[str, _Place]:
    """Map an adapter file's keys for full input embeddings and heads to the module and parameter of each weight."""
    if not isinstance(model, PreTrainedModel):
        return {}
    ends = [m for m in (input_embeddings(model), model.get_output_embeddings()) if m is not None]
    found, held = {}, adapted_modules(model)
    for path, module in model.named_modules():
        if any(module is end for end in ends) and module._parameters.get("weight") is not None:
            adapted = path in held and name in held[path].adapters
            with_rows = path in held and bool(held[path].token_rows((name,)))
            key = weight_key(path, adapted=adapted, with_rows=with_rows, virtual=config.virtual_tokens > 0)
            found[key] = (module, "weight")
    return found


def _repeated(model: nn.Module, name: str) -> set[str]:
    """Return the keys of trained embedding rows that PEFT saves again for each module tied to the embedding."""
    return {rows_key(path) for path, module in adapted_modules(model).items() if module.token_rows((name,))}


def _saves_embedding(model: nn.Module, config: MethodConfig, key: str, wanted: SaveEmbeddings) -> bool:
    """Return True if the embedding of ``key`` is saved with the adapter. ``wanted`` is True, False or PEFT's rule
    "auto".

    "auto" saves an embedding that the adapter changes, if it has one of the usual names of embeddings and heads. If the
    vocabulary was resized, it saves every embedding.
    """
    if wanted != "auto":
        return wanted
    targeted = is_of_wrapped(key) and any(f".{end}." in key for end in MODEL_ENDS)
    return targeted or _was_resized(model, config)


def _was_resized(model: nn.Module, config: MethodConfig) -> bool:
    """Return True if the model's vocabulary size differs from the base's. Return False if the base's config is not on
    this machine.
    """
    mine: Any = cast(PreTrainedModel, model).config
    path = config_of_base(config.base_model_name_or_path, getattr(mine, "_commit_hash", None) or config.revision)
    if path is None:
        return False
    before = type(mine).from_pretrained(path.parent).get_text_config().vocab_size
    return bool(before != mine.get_text_config().vocab_size)


def _advice(vocabulary: Tensor) -> str:
    if vocabulary.dim() != 2:
        return ""
    return f" (the vocabulary differs: call model.resize_token_embeddings({vocabulary.shape[0]}) on the base first)"
