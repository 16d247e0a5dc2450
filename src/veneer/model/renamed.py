"""Names that transformers gives to a checkpoint's tensors when it loads them."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming


def renamer(model: PreTrainedModel) -> Callable[[str], str]:
    """Return the function from a tensor's name in the files to the model's, where only names change."""
    renamings = [each for each in get_model_conversion_mapping(model) if type(each) is WeightRenaming]

    def renamed(name: str) -> str:
        for each in renamings:
            name, _ = each.rename_source_key(name)
        return name

    return renamed


def converter(model: PreTrainedModel) -> Callable[[str], bool]:
    """Return the predicate for tensors that are joined or split when they are loaded, such as experts."""
    converters = [each for each in get_model_conversion_mapping(model) if type(each) is WeightConverter]
    return lambda name: any(each.rename_source_key(name)[1] is not None for each in converters)
