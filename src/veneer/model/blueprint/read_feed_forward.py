"""Describes a block's feed-forward part: its layers by role and its activation, or its experts."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from veneer.model.blueprint.linears import is_linear, read_linear
from veneer.model.blueprint.names import (
    CORRECTIONS,
    EXPERTS,
    ROUTERS,
    ROUTING_LAYER,
    SHARED,
    SHARED_GATE,
    STACKS,
    InnerNames,
)
from veneer.model.blueprint.parts import Experts, FeedForward, Linear, Role, Stack, Strange
from veneer.model.blueprint.read_forward import named_activation
from veneer.model.blueprint.source import BlockSource, all_of, first, has_all, undescribed
from veneer.model.quantized.stack import map_shape, parameter_names
from veneer.ops.activation import KINDS, activation_forward
from veneer.ops.glu import SWIGLU_OAI, unit_forward

STRANGE = (AttributeError, TypeError, RuntimeError)  # of a function with other arguments or shapes
MULTIPLIERS = ("gate_multiplier", "down_multiplier")  # Falcon-H1's, of gate and of the output


def read_feed_forward(
    source: BlockSource, module: nn.Module, *, in_block: bool = False
) -> FeedForward | Experts | Strange:
    """Return the description of the feed-forward part ``module``, or a `Strange` part with the reason why it cannot be
    described.

    ``in_block``: its layers are children of the block, and ``module`` is the block.
    """
    path = source.path(module)
    if hasattr(module, EXPERTS) and first(module, ROUTERS) is not None:
        return _experts(source, module)
    names = next((names for names in source.names.inner if has_all(module, names.all)), None)
    if names is None:
        return Strange(path=path, reason="no feed-forward part of known form in it")
    found = _plain(source, module, names)
    if isinstance(found, str):
        return Strange(path=path, reason=found)
    known = [getattr(module, name) for name in names.all]
    rest = None if in_block else next(undescribed(source, module, known), None)
    return rest or found


def _plain(source: BlockSource, module: nn.Module, names: InnerNames) -> FeedForward | str:
    act = first(module, source.names.activation)
    if not all(is_linear(getattr(module, name)) for name in names.all):
        return "its layers are not all linear layers"
    if any(getattr(module, name, 1.0) != 1.0 for name in MULTIPLIERS):
        return f"it multiplies by {' and '.join(MULTIPLIERS)}"
    inner = tuple(read_linear(source, getattr(module, name), role) for role, name in names.inner)
    down = read_linear(source, getattr(module, names.down), "down")
    widths = 1 if inner[0].role == "up" else 2
    if sum(linear.out_features for linear in inner) != widths * down.in_features:
        return "no feed-forward part of known form in it: its widths do not fit together"  # fc1 may hold a gate (Moshi)
    activation = named_activation(module) if act is None else activation_of(getattr(module, act))
    if activation is None:
        return f"its activation is none of {', '.join(KINDS)}"
    path = source.path(module)
    return FeedForward(path=path, inner=inner, down=down, activation=activation, act=f"{path}.{act}" if act else path)


def activation_of(act: Any) -> str | None:
    """Return the name in `veneer.ops.activation.KINDS` of the activation that a module computes, judged by its outputs.
    Return None for any other function.
    """
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    if isinstance(act, nn.Module) and next(act.parameters(), None) is not None:
        return None
    try:
        given = act(x)
    except STRANGE:
        return None
    return next((kind for kind in KINDS if torch.allclose(given, activation_forward(x, kind), atol=1e-6)), None)


def _experts(source: BlockSource, module: nn.Module) -> Experts | Strange:
    path = source.path(module)
    experts, router = getattr(module, EXPERTS), getattr(module, cast(str, first(module, ROUTERS)))
    stacks = _stacks(source, experts)
    activation, shared = _unit_of(experts), _shared(source, module)
    scoring = getattr(router, ROUTING_LAYER, router)
    score = cast("Tensor | None", scoring._parameters.get("weight"))
    if source.family.experts is None:
        return Strange(path=path, reason="how its experts are chosen and weighted is not known for this family")
    if stacks is None or score is None or activation is None:
        return Strange(path=path, reason="its experts or their router are of another form than Mixtral's")
    if isinstance(shared, Strange):
        return shared
    n_experts, width = score.shape
    rest = next(undescribed(source, module, [experts, router, *all_of(module, (*SHARED, SHARED_GATE))]), None)
    return rest or Experts(
        path=path,
        router=Linear(
            role="router", path=source.path(scoring), out_features=n_experts, in_features=width, bias=_has_bias(scoring)
        ),
        n_experts=n_experts,
        top_k=int(router.top_k),
        normalized=bool(getattr(router, "norm_topk_prob", True)),
        gate_up=stacks[0],
        down=stacks[1],
        activation=activation,
        **_sigmoid(source, module, router) if source.family.experts == "sigmoid" else {},
        shared=shared,
        shared_gate=_shared_gate(source, module),
    )


def _stacks(source: BlockSource, experts: nn.Module) -> tuple[Stack, Stack] | None:
    """Return the stacked weights of gate and up, and of down, or None unless each is one parameter for all experts."""
    if not all(name in parameter_names(experts) for name in STACKS):
        return None
    shapes = [cast("tuple[int, int, int]", map_shape(experts, name)) for name in STACKS]
    if any(len(shape) != 3 for shape in shapes):
        return None
    paths = [f"{source.path(experts)}.{name}" for name in STACKS]
    roles: tuple[Role, Role] = ("gate_up", "down")
    biases = [experts._parameters.get(f"{name}_bias") is not None for name in STACKS]
    each, turned = zip(roles, paths, shapes, biases, strict=True), bool(getattr(experts, "is_transposed", False))
    gate_up, down = (Stack(role=r, path=p, shape=s, bias=bias, transposed=turned) for r, p, s, bias in each)
    return gate_up, down


def _unit_of(experts: Any) -> str | None:
    """Return the name in `veneer.ops.glu.UNITS` of the gated unit that experts compute, judged by its outputs. Return
    None for any other.
    """
    if getattr(experts, "is_concatenated", True):
        return activation_of(getattr(experts, "act_fn", None))
    x = torch.linspace(-11, 11, 64, dtype=torch.float64).view(16, 4)
    x = torch.cat([x, x.flip(1)])
    try:
        given = experts._apply_gate(x)
    except STRANGE:
        return None
    known = given.shape == (32, 2) and torch.allclose(given, unit_forward(x, SWIGLU_OAI), atol=1e-6)
    return SWIGLU_OAI if known else None


def _has_bias(router: nn.Module) -> bool:
    return router._parameters.get("bias") is not None


def _sigmoid(source: BlockSource, module: nn.Module, router: Any) -> dict[str, Any]:
    """Return fields of `Experts` for a router that scores experts by sigmoids. DeepSeek V3's form has groups of experts
    and scores in float32, LFM2's has neither.
    """
    owners = [(owner, name) for owner in (router, module) for name in CORRECTIONS if name in owner._buffers]
    correction = "".join(f"{source.path(owner)}.{name}" for owner, name in owners[:1])
    grouped = hasattr(router, "num_group")
    groups = {"n_groups": int(router.num_group), "kept_groups": int(router.topk_group)} if grouped else {}
    scale = float(getattr(router, "routed_scaling_factor", 1.0))
    return {"values": "sigmoid", **groups, "scale": scale, "correction": correction, "wide_scores": grouped}


def _shared(source: BlockSource, module: nn.Module) -> FeedForward | Strange | None:
    name = first(module, SHARED)
    if name is None:
        return None
    shared = getattr(module, name)
    found = read_feed_forward(source, shared)
    return found if not isinstance(found, Experts) else Strange(path=found.path, reason="experts within experts")


def _shared_gate(source: BlockSource, module: nn.Module) -> Linear | None:
    gate = getattr(module, SHARED_GATE, None)
    return None if gate is None else read_linear(source, gate, "shared_gate")
