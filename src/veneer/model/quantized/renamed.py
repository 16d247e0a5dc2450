"""Names that transformers gives to a checkpoint's tensors when it loads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming


@dataclass(frozen=True)
class ListedExperts:
    """Names of tensors that a checkpoint stores for each expert, and that the model stacks in one parameter.

    Each field has one list of names, by expert, for each half of the parameter (gate and up) or for all of it.
    ``stored`` are names in the files, ``own`` those that transformers gives the tensors.
    """

    stored: list[list[str]]
    own: list[list[str]]


def renamer(model: PreTrainedModel) -> Callable[[str], str]:
    """Return a function that maps a tensor's name in the files to the model's, for tensors that are only renamed."""
    renamings = [each for each in get_model_conversion_mapping(model) if type(each) is WeightRenaming]

    def renamed(name: str) -> str:
        for each in renamings:
            name, _ = each.rename_source_key(name)
        return name

    return renamed


def converter(model: PreTrainedModel) -> Callable[[str], bool]:
    """Return a function of a tensor's name in the files. It returns True if transformers joins or splits this tensor
    when it loads the model, as it does with experts.
    """
    converters = [each for each in get_model_conversion_mapping(model) if type(each) is WeightConverter]
    return lambda name: any(each.rename_source_key(name)[1] is not None for each in converters)


def listed_experts(
    model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, str]
) -> dict[str, ListedExperts]:
    """Return, for each parameter (experts, …) that stacks experts in the model, the names of the tensors of single
    experts in the files.

    ``shapes`` are those of the model's parameters. ``stored`` maps the names that transformers gives tensors to their
    names in the files. Gate and up are stacked by rows.
    """
    found = {}
    for each in get_model_conversion_mapping(model):
        if type(each) is not WeightConverter or not _is_stacking(each):
            continue
        (target,) = each.target_patterns
        for name in (name for name in shapes if name.endswith(target)):
            front = name.removesuffix(target)
            numbers = range(shapes[name][0])
            own = [[front + source.replace("*", str(n)) for n in numbers] for source in each.source_patterns]
            if all(part in stored for half in own for part in half):
                found[name] = ListedExperts([[stored[part] for part in half] for half in own], own)
    return found


def _is_stacking(converter: WeightConverter) -> bool:
    """Return True if a conversion stacks experts and concatenates their halves by rows."""
    steps = [(type(step), step.dim) for step in converter.operations if isinstance(step, MergeModulelist | Concatenate)]
    whole = len(steps) == len(converter.operations) and len(converter.target_patterns) == 1
    return whole and steps in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
