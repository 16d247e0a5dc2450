"""Kinds of module that a linear method can adapt (linear layers, embeddings, convolutions and others), as one table."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor, nn

from veneer.model.adapted.convolution import (
    AdaptedConvolution,
    is_convolution,
    shape_of_convolution,
    weight_of_convolution,
)
from veneer.model.adapted.embedding import AdaptedEmbedding, is_embedding, weight_of_embedding
from veneer.model.adapted.linear import AdaptedLinear, is_linear, row_squares, unrounded
from veneer.model.adapted.multihead import (
    adapt_attention,
    adapt_out_projection,
    is_attention,
    is_out_projection,
    shape_of_attention,
    weight_of_attention,
)
from veneer.model.adapted.parameters import AdaptedParameters
from veneer.model.adapted.site import Adapted, adapt
from veneer.model.adapted.state import AdapterState
from veneer.model.quantized.frozen_weight import frozen_weight
from veneer.records.frozen import FrozenWeight
from veneer.records.sites import LinearSite


@dataclass(frozen=True)
class Kind:
    """Kind of module that a linear method can adapt.

    ``name`` is the kind's name in `LinearMethod.kinds`; ``matches`` recognizes its modules. ``site`` describes a module
    as a linear map, by its shape. ``weight`` returns a module's matrix W (o, i). ``adapt`` changes a module in place
    into an adapted one.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    site: Callable[[str, nn.Module], LinearSite]
    weight: Callable[[nn.Module], FrozenWeight]
    adapt: Callable[[str, nn.Module, AdapterState], Adapted]


def shape_of_linear(path: str, module: nn.Module) -> LinearSite:
    """Describe a linear layer by its name, its shape and whether it has a bias, without its weight."""
    o, i = frozen_weight(module).shape
    return LinearSite(name=path, in_features=i, out_features=o, has_bias=module._parameters.get("bias") is not None)


def shape_of_embedding(path: str, module: nn.Module) -> LinearSite:
    """Describe an embedding as a linear layer, by its name and shape, without its weight."""
    vocabulary, width = cast(Tensor, module.weight).shape
    return LinearSite(name=path, in_features=vocabulary, out_features=width, kind="embedding")


def _by(mixin: type[Adapted]) -> Callable[[str, nn.Module, AdapterState], Adapted]:
    return functools.partial(adapt, mixin=mixin)


# The first that matches counts: an attention's output projection is a linear layer too.
KINDS = (
    Kind("attention", is_attention, shape_of_attention, weight_of_attention, adapt_attention),
    Kind("linear", is_out_projection, shape_of_linear, frozen_weight, adapt_out_projection),
    Kind("linear", is_linear, shape_of_linear, frozen_weight, _by(AdaptedLinear)),
    Kind("embedding", is_embedding, shape_of_embedding, weight_of_embedding, _by(AdaptedEmbedding)),
    Kind("convolution", is_convolution, shape_of_convolution, weight_of_convolution, _by(AdaptedConvolution)),
)


def loaded_site(kind: Kind, path: str, module: nn.Module) -> LinearSite:
    """Describe a module as a linear map, with its weight and bias. For a module on the meta device, leave weight and
    bias out.
    """
    site = kind.site(path, module)
    if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        return site
    weight, bias = kind.weight(module), module._parameters.get("in_proj_bias" if kind.name == "attention" else "bias")
    return replace(site, weight=weight, bias=bias, row_sq=lambda: row_squares(unrounded(weight)))


def kind_of(module: nn.Module) -> Kind | None:
    """Return the kind of a module, or None if no method for linear layers can adapt it."""
    return next((kind for kind in KINDS if kind.matches(module)), None)


def adapt_module(path: str, module: nn.Module, state: AdapterState) -> Adapted:
    """Adapt a module in place, according to its kind. In a module of no known kind, adapters can change only parameters
    that ``target_parameters`` names.
    """
    kind = kind_of(module)
    return adapt(path, module, state, AdaptedParameters) if kind is None else kind.adapt(path, module, state)
