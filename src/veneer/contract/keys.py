"""Keys of PEFT: the key of each tensor in an adapter's file, and the parsing of keys.

A key starts with the names of PEFT's two wrappers of a model, then the path of a module. The names of the wrappers
around that module and the end follow. The end is the method's name for a parameter, or the module's own parameter if
that is trained completely.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

_MODEL = "base_model."  # PEFT's wrapper of a model; what its layers share, and virtual tokens, stand behind it
_TUNER = "base_model.model."  # with the second one, that all other methods have
_BASE = "base_layer"  # the module itself, where a method wraps it
_ROWS = "token_adapter"  # the wrapper of a table of which rows are trained
_DELTA = "trainable_tokens_delta"
_TUNED = "ln_tuning_layers"  # the wrapper of a norm in the one method that trains norms alone
_WHOLE = ("modules_to_save", "original_module")  # the copy and the base's own of a module that is trained whole
_WRAPPERS = (_BASE, _ROWS, *_WHOLE)
_OF_VIRTUAL_TOKENS = ("prompt_embeddings", "prompt_encoder.", "prefix_task_")
SUBLAYER = "adapter_"  # a bottleneck behind attention is the module "adapter_attention" of its block
OUT_PROJECTION = "out_proj"  # of torch's attention, which PEFT wraps as a whole


def is_adapters(key: str) -> bool:
    """Return True if a key has a form that occurs in adapters' files."""
    return key.startswith((_MODEL, *_OF_VIRTUAL_TOKENS))


def parameter_key(path: str, end: str, depth: int = 0) -> str:
    """Return the key of a method's parameter.

    PEFT wraps a module once for each of its parameters that is adapted by name. ``depth`` is the number of wrappers
    around the one of this parameter.
    """
    return f"{_TUNER}{path}.{f'{_BASE}.' * depth}{end}"


def attention_path(path: str) -> str:
    """Return the path that keys have for the output projection of torch's attention, if it is adapted with the
    attention.
    """
    return f"{path.removesuffix(f'.{OUT_PROJECTION}')}.{_BASE}.{OUT_PROJECTION}"


def shared_key(name: str) -> str:
    """Return the key of a tensor that all layers share."""
    return f"{_MODEL}{name}"


def is_shared(key: str, names: Collection[str]) -> bool:
    """Return True if a key belongs to a tensor shared by all layers. ``names`` are the names of such tensors.

    This includes the key of a copy that a file holds under one layer's path.
    """
    rest = divided(key)[1]
    return key.startswith(_MODEL) and (rest.partition(".")[0] in names or rest.rpartition(".")[2] in names)


def rows_key(path: str) -> str:
    """Return the key for trained single rows of an embedding table."""
    return f"{_TUNER}{path}.{_ROWS}.{_DELTA}"


def tokens_key(key: str) -> str:
    """Return the key of trained table rows in the file of a method that trains only such rows. Any other key is
    returned unchanged.
    """
    return key.replace(f".{_ROWS}.{_DELTA}", f".{_DELTA}")


def tuned_key(path: str, parameter: str) -> str:
    """Return the key of a parameter of a norm in the file of a method that trains norms."""
    return f"{_TUNER}{path}.{_TUNED}.{parameter}"


def usual_key(key: str) -> str:
    """Return the key that trained table rows, or a norm's parameter, have in the files of methods that train more than
    these.

    This is the inverse of `tokens_key` and `tuned_key`. Any other key is returned unchanged.
    """
    if key.endswith(f".{_DELTA}") and not key.endswith(f".{_ROWS}.{_DELTA}"):
        return f"{key.removesuffix(_DELTA)}{_ROWS}.{_DELTA}"
    return key.replace(f".{_TUNED}.", ".")


def is_rows(key: str) -> bool:
    """Return True if a key belongs to single rows of a table."""
    return key.endswith(f".{_DELTA}")


def copy_key(path: str, parameter: str, *, adapted: bool, virtual: bool = False) -> str:
    """Return the key for a ``parameter`` of a module that an adapter trains as a whole, or some rows of which it
    trains.

    ``adapted``: the method adapts the module too. ``virtual``: the method has virtual tokens; its keys have one wrapper
    less.
    """
    inner = f"{_BASE}." if adapted else ""
    return f"{_MODEL if virtual else _TUNER}{path}.{inner}{parameter}"


def weight_key(path: str, *, adapted: bool, with_rows: bool, virtual: bool = False) -> str:
    """Return the key of the whole weight of an embedding or a head that is saved with the adapter."""
    inner = f"{_ROWS}.{_BASE}." if with_rows else f"{_BASE}." if adapted else ""
    return f"{_MODEL if virtual else _TUNER}{path}.{inner}weight"


def weight_keys(path: str) -> tuple[str, ...]:
    """Return every key that the whole weight of a module may have."""
    settings = ((False, False), (True, False), (False, True))
    return tuple(weight_key(path, adapted=adapted, with_rows=rows) for adapted, rows in settings)


def is_of_wrapped(key: str) -> bool:
    """Return True if a key belongs to the base's weight of a module that the method adapts."""
    return f".{_BASE}." in key and f".{_ROWS}." not in key


def divided(key: str) -> tuple[str, str]:
    """Return the names of PEFT's wrappers at the start of a key, if any, and the rest."""
    prefix = next((each for each in (_TUNER, _MODEL) if key.startswith(each)), "")
    return prefix, key.removeprefix(prefix)


@dataclass(frozen=True, slots=True)
class Place:
    """A parsed key: the ``path`` of the module in the model, the ``end`` of the key, and the number of PEFT's wrappers
    between the two.

    ``of_attention``: the module is an attention's output projection, adapted with the attention.
    """

    path: str
    end: str
    depth: int = 0
    of_attention: bool = False


def place_of(key: str, ends: Collection[str]) -> Place:
    """Parse a key, given the ``ends`` of the method's parameters.

    If the key has another end, it belongs to a parameter of the module itself. The path is empty if no module holds the
    tensor.
    """
    rest = divided(key)[1]
    own = (end for end in ends if rest == end or rest.endswith(f".{end}"))
    end = max((*own, *([f"{_ROWS}.{_DELTA}"] if rest.endswith(_DELTA) else [])), key=len, default="")
    end = end or rest.rpartition(".")[2]
    path = rest.removesuffix(end).removesuffix(".")
    depth = 0
    while path.rpartition(".")[2] in _WRAPPERS:
        path, depth = path.rpartition(".")[0], depth + 1
    inner = f".{_BASE}.{OUT_PROJECTION}"
    return Place(path.replace(inner, f".{OUT_PROJECTION}"), end, depth, path.endswith(inner))


def copies_of(key: str) -> tuple[str, ...]:
    """Return the two keys that the same tensor may have without PEFT's wrapper, if ``key`` names the wrapper of a
    module trained whole.

    They differ in the first name behind the wrapper, which is kept in one and left out in the other. It may be the
    adapter's name, or that of a part of the module.
    """
    for wrapper in _WHOLE:
        path, found, end = key.partition(f".{wrapper}.")
        if found:
            return f"{path}.{end}", f"{path}.{end.partition('.')[2]}"
    return ()


def is_bases_own(key: str) -> bool:
    """Return True if a key belongs to the untrained original of a module that is trained whole."""
    return f".{_WHOLE[1]}." in key
