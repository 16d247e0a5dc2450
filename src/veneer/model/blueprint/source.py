"""Source of a description: a model's modules by path, its config and its family."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from veneer.model.blueprint.family import CONVENTION, Family
from veneer.model.blueprint.names import Names
from veneer.model.blueprint.parts import Strange
from veneer.model.blueprint.registry import family_of

OURS = (".adapters.", ".copies.")  # what adapters bring is no part of the model


@dataclass(frozen=True, slots=True)
class BlockSource:
    """A transformers model to describe, on any device. Its values are never read, so that meta tensors suffice."""

    model: PreTrainedModel
    config: Any
    family: Family
    paths: dict[int, str]
    norm_forms: dict[Any, Any] = field(default_factory=dict)
    rotary_dims: dict[str | None, int | None] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel) -> BlockSource:
        """Return the source for a model."""
        config = model.config.get_text_config(decoder=True)
        paths = {id(module): path for path, module in model.named_modules()}
        return cls(model, config, family_of(config.model_type), paths)

    @property
    def names(self) -> Names:
        """Names of the model's parts in this family."""
        return self.family.names

    @property
    def listed(self) -> bool:
        """Return True if tests compare the outputs of described models of this type with the models' own."""
        return self.family is not CONVENTION

    def path(self, module: nn.Module) -> str:
        """Return the path of a module from the model's root."""
        return self.paths[id(module)]


def first(module: nn.Module, names: Collection[str]) -> str | None:
    """Return the first of these names under which a module has a child, or None."""
    return next((name for name in names if getattr(module, name, None) is not None), None)


def all_of(module: nn.Module, names: Collection[str]) -> list[nn.Module]:
    """Return the children that a module has under these names."""
    found = (getattr(module, name, None) for name in names)
    return [child for child in found if isinstance(child, nn.Module)]


def has_all(module: nn.Module, names: Collection[str]) -> bool:
    """Return True if a module has children of all these names."""
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def undescribed(
    source: BlockSource, module: nn.Module, known: Collection[nn.Module | None], own: Collection[str] = ()
) -> Iterator[Strange]:
    """Yield one `Strange` part, which names the parameters below ``module`` that are neither in a ``known`` module nor
    named in ``own``. Yield nothing if there are none.
    """
    inside = {path for path, part in module.named_modules() if any(part is each for each in known)}
    rest = sorted(
        {
            name.rpartition(".")[0] or name
            for name, _ in module.named_parameters()
            if name not in own
            and not any(mark in f".{name}" for mark in OURS)
            and not any(name.startswith(f"{path}.") for path in inside)
        }
    )
    if rest:
        shown = ", ".join(rest[:3]) + (f" and {len(rest) - 3} more" if len(rest) > 3 else "")
        yield Strange(path=source.path(module), reason=f"it holds {shown}, which the model description does not cover")
