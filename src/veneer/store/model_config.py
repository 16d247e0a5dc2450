"""Config of a model's folder, as transformers reads it, with one error for every way in which it may be damaged."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from veneer.contract.file import read_values
from veneer.errors import FormatError, listed

_MOST = 2**40
_SIZES = {
    "hidden_size": (1, _MOST), "num_hidden_layers": (0, 10_000), "num_attention_heads": (1, _MOST),
    "vocab_size": (0, _MOST), "head_dim": (1, _MOST), "sliding_window": (-1, _MOST),
}  # fmt: skip
"""The least and the most of each size."""
# What transformers raises for values that it does not take, from checks of its own and from its arithmetic.
_REFUSALS = (ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
_ADVICE = "Give the folder of another model, or install a later transformers"


def model_config(folder: Path) -> Any:
    """Return transformers' config of a model's folder. No code in the folder is run.

    Raises FormatError if it is not a JSON object, has an impossible size, or is of an unknown model.
    """
    path = folder / "config.json"
    problems = list(_wrong_sizes(read_values(path)))
    if problems:
        raise FormatError(listed(problems, f"{path} describes no model"))
    log = logging.getLogger("transformers.configuration_utils")
    log.addFilter(_is_no_refusal)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (*_REFUSALS, StrictDataclassError) as error:
        reason = " ".join(str(error).split("\n")[:2]).strip().rstrip(".") or type(error).__name__
        raise FormatError(f"{path} describes no model that transformers knows: {reason}. {_ADVICE}") from error
    finally:
        log.removeFilter(_is_no_refusal)


def _is_no_refusal(record: logging.LogRecord) -> bool:
    """Return False for the record in which transformers logs the whole config, just before it raises an error about a
    value.
    """
    return not str(record.msg).startswith("Can't set ")


def _wrong_sizes(values: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """Yield a problem for each size in a config, or in its ``text_config``, that no decoder can have. If a size is a
    list with one number for each layer, every number is checked.
    """
    for name, (least, most) in _SIZES.items():
        size = values.get(name)
        numbers = size if isinstance(size, list) else [] if size is None else [size]
        if not all(type(number) is int and least <= number <= most for number in numbers):
            yield f"{place}{name} is {size!r:.60}: {least} to {most:,} is allowed. Save or download the model again"
    share = values.get("partial_rotary_factor", 1)
    if share is not None and (type(share) not in (int, float) or not 0 <= share <= 1):
        yield f"{place}partial_rotary_factor is {share!r:.60}: 0 to 1 is allowed. Save or download the model again"
    if not place and isinstance(values.get("text_config"), dict):
        yield from _wrong_sizes(values["text_config"], "text_config.")
