"""Describes a norm. Its formula is found by running its code on artificial weights.

Families use the same names for different formulas.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from veneer.model.blueprint.parts import Norm, NormKind
from veneer.model.blueprint.source import BlockSource
from veneer.model.inplace import InPlace, base_of

_ANY_WIDTH = 11  # of the rows on which a norm without parameters is tried
EPSILONS = ("variance_epsilon", "eps", "epsilon")
Form = tuple[NormKind, float]  # the kind, and what is added to the weight


def epsilon_of(module: nn.Module) -> float | None:
    """Return the epsilon of a norm, under any of the names that families give it."""
    return next((float(getattr(module, name)) for name in EPSILONS if hasattr(module, name)), None)


def norm_form(module: nn.Module, eps: float) -> Form | None:
    """Return whether a module is an RMSNorm or a LayerNorm, and whether 1 is added to its weight; or None for another
    module.

    A copy of the module with other weights is run, so that neither the values nor the device of the module matter.
    """
    generator = torch.Generator().manual_seed(3)
    shapes = {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None}
    shape = next(iter(shapes.values()), tuple(getattr(module, "normalized_shape", (_ANY_WIDTH,))))
    if not shape or not set(shapes) <= {"weight", "bias"}:
        return None
    values = {name: torch.rand(shape, generator=generator) + 0.5 for name in shapes}
    x = torch.randn(2, *shape, generator=generator) * 3 + 1
    try:
        given = _twin(module, values)(x)
    except (AttributeError, RuntimeError, TypeError, ValueError):  # what other code than a norm's raises
        return None
    expected = {form: _normed(x, form, eps, values) for form in _forms("bias" in values)}
    error = {form: float((given - y).norm() / y.norm()) for form, y in expected.items()}
    nearest = min(error, key=error.__getitem__)
    return nearest if error[nearest] <= 1e-3 else None


def read_norm(source: BlockSource, module: nn.Module | None, width: int | None = None) -> Norm | None:
    """Return the description of a norm. Return None if there is no module, or the module is neither an RMSNorm nor a
    LayerNorm.

    ``width`` is that of the rows of a norm that stores no shape; if it is None, the model's hidden size.
    """
    if module is None:
        return None
    eps = epsilon_of(module)
    eps = source.family.norm_eps if eps is None else eps
    if eps is None:
        return None
    held = {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None}
    # the code of a class is the same for every layer of a model
    key = (_own_class(module), tuple(sorted((name, len(shape)) for name, shape in held.items())))
    if key not in source.norm_forms:
        source.norm_forms[key] = norm_form(module, eps)
    form = cast("Form | None", source.norm_forms[key])
    if form is None:
        return None
    return Norm(
        path=source.path(module),
        kind=form[0],
        shape=held.get("weight") or tuple(getattr(module, "normalized_shape", (width or source.config.hidden_size,))),
        eps=eps,
        offset=form[1] if "weight" in held else 0.0,
        weight="weight" in held,
        bias="bias" in held,
    )


def _forms(has_bias: bool) -> list[Form]:
    kinds: tuple[NormKind, ...] = ("layer",) if has_bias else ("rms", "layer")
    return [(kind, offset) for kind in kinds for offset in (0.0, 1.0)]


def _normed(x: Tensor, form: Form, eps: float, values: dict[str, Tensor]) -> Tensor:
    kind, offset = form
    centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return y * (values["weight"] + offset if "weight" in values else 1) + values.get("bias", torch.zeros(()))


def _own_class(module: nn.Module) -> type[nn.Module]:
    cls = type(module)
    while issubclass(cls, InPlace):
        cls = base_of(cls)
    return cls


def _twin(module: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """Create a module of the same class and settings, with the given weights and no hooks."""
    cls: Any = _own_class(module)
    twin = cls.__new__(cls)
    nn.Module.__init__(twin)
    settings = {name: value for name, value in vars(module).items() if name not in vars(twin) and name != "forward"}
    vars(twin).update(settings)
    for name in module._parameters:
        twin._parameters[name] = nn.Parameter(values[name], requires_grad=False) if name in values else None
    return cast(nn.Module, twin)
