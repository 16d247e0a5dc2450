"""Runs experts of a mixture one by one if they have adapters or are quantized, or if torch cannot group
their products.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.errors import FormatError
from veneer.model.blueprint.names import STACKS, UNGATED_STACKS
from veneer.model.inplace import InPlace, change_class
from veneer.model.quantized.stack import (
    ORDER,
    CodedStack,
    PackedExpertStack,
    as_maps,
    coded_stacks,
    give_parameter,
    holds_stacks,
    stack_of,
)
from veneer.ops.traced import Traced
from veneer.records.deltas import LinearDelta
from veneer.records.frozen import FrozenStack
from veneer.records.linear import apply_linear

log = logging.getLogger(__name__)

ROW_BYTES = 16
STACK_NAMES = ("gate_up_proj", "up_proj", "down_proj")
"""The names under which transformers keeps the weights of all experts of a layer in one parameter (n, o, i)."""


class CodedExperts(InPlace):
    """Mixin for a class of experts whose weights are quantized stacks, in transformers' common form. It runs the
    experts one by one, and loads and saves the stacks.
    """

    name_prefix = "Coded"

    def forward(self, *args: Any) -> Any:
        module = cast(nn.Module, self)
        if not holds_stacks(module):  # made dense again
            return cast(Any, super()).forward(*args)
        return run_experts(module, *args)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        known: set[str] = set()
        for name, stack in coded_stacks(cast(nn.Module, self)).items():
            held = {key: t for key, t in own.items() if stack.stack_spec.owns(key) or key in stack.carried}
            known |= {prefix + key for key in held}
            if not held:
                missing_keys.append(prefix + name)
                continue
            try:
                device = torch.device("cpu") if stack.weight.is_meta else stack.weight.device
                stack.take({key: tensor.to(device, copy=True) for key, tensor in held.items()})
            except FormatError as error:
                error_msgs.append(f"{prefix}{name}: {error}")
        rest = {key: value for key, value in state_dict.items() if key not in known}
        cast(Any, super())._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def runs_by_convention(module: nn.Module) -> bool:
    """Return True if a module is a mixture's experts in transformers' common form, whose forward transformers can
    replace by its own implementations.
    """
    described = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")
    return all(hasattr(module, name) for name in described) and not getattr(module, "_is_expert_parallel", True)


def stacks_by_convention(module: nn.Module) -> tuple[str, str]:
    """Return the names of two stacks of experts' weights: before the activation, and after it."""
    return STACKS if cast(Any, module).has_gate else UNGATED_STACKS


def run_experts(
    module: nn.Module, x: Tensor, chosen: Tensor, weights: Tensor, records: Mapping[str, LinearDelta] | None = None
) -> Tensor:
    """Return the experts' output for tokens x (n, d), expert ids ``chosen`` (n, k) and their ``weights`` (n, k).

    ``records`` are the adapters' changes of the experts' stacked weights, by parameter name. ``module`` has
    transformers' common form of experts; they are run one by one.
    """
    experts, changes = cast(Any, module), records or {}
    inner, down = stacks_by_convention(module)
    stacks = {name: stack_of(module, name) for name in (inner, down)}
    y = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, weights.dtype))
    for number, token, place in _sent(chosen, stacks[down].shape[0]):
        hidden = project(module, inner, x[token], number, stacks[inner], changes.get(inner))
        through = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
        out = project(module, down, through, number, stacks[down], changes.get(down))
        out = experts.post_expert_norm(out) if experts.has_post_expert_norm else out
        y = y.index_add(0, token, (out * weights[token, place, None]).to(y.dtype))
    return y.to(x.dtype)


def project(
    module: nn.Module, name: str, x: Tensor, number: int, stack: FrozenStack, change: LinearDelta | None
) -> Tensor:
    """Apply the linear layer of expert ``number`` to its tokens x (n, i), with the bias and an adapter's change.
    ``stack`` holds the weights of the parameter ``name`` for all experts.
    """
    bias = module._parameters.get(f"{name}_bias")
    record = LinearDelta() if change is None else change.of_expert(number)
    return apply_linear(record, x, stack.expert(number), None if bias is None else bias[number])


def _sent(chosen: Tensor, n_experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each chosen expert's number, the indices of its tokens, and for each token the rank (0 to k - 1) at which
    it chose the expert.

    For tensors without values (of a trace), the tokens are divided equally among all experts.
    """
    if isinstance(chosen, Traced):
        pairs = torch.arange(chosen.numel())
        for number, own in enumerate(torch.tensor_split(pairs, n_experts)):
            yield number, own // chosen.shape[1], own % chosen.shape[1]
        return
    for number in torch.unique(chosen).tolist():
        yield number, *torch.where(chosen == number)


def put_in_codes(experts: nn.Module, name: str, stack: CodedStack) -> None:
    """Replace one of the experts' parameters by a quantized stack."""
    hold_stack(experts, name, stack)
    cast(Any, experts)._is_hf_initialized = True  # transformers would draw values for a parameter of this name


def hold_stack(experts: nn.Module, name: str, stack: CodedStack | PackedExpertStack) -> None:
    """Replace one of the experts' parameters by a module that holds the stack."""
    vars(experts).setdefault(ORDER, tuple(experts._parameters))
    del experts._parameters[name]
    experts._modules[name] = stack
    if not isinstance(experts, CodedExperts):
        change_class(experts, CodedExperts)


def put_dense(experts: nn.Module, name: str, weights: Tensor) -> None:
    """Replace one of the experts' quantized stacks by dense weights (experts, o, i)."""
    give_parameter(experts, name, nn.Parameter(as_maps(experts, weights).contiguous(), requires_grad=False))


def fit_experts(model: nn.Module) -> None:
    """Switch transformers to running experts one by one if torch's grouped products do not support their widths.

    torch groups products only if the size of every row is a multiple of 16 bytes, and raises otherwise in the first
    forward pass. The switch is logged.
    """
    config: Any = getattr(model, "config", None)
    if not isinstance(model, PreTrainedModel) or "grouped_mm" not in model.get_experts_implementation().values():
        return
    widths = sorted(
        {
            n
            for name, weight in model.named_parameters()
            if weight.ndim == 3 and name.rpartition(".")[2] in STACK_NAMES
            for n in weight.shape[1:]
            if n * weight.element_size() % ROW_BYTES
        }
    )
    if widths:
        model.set_experts_implementation("eager")
        log.warning(
            "%s: experts run one by one, which is slower: grouped products need rows whose size is a multiple of %d "
            "bytes, and rows of these experts have %s values",
            config.model_type, ROW_BYTES, " and ".join(map(str, widths)),
        )  # fmt: skip
