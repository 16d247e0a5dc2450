"""Replaces a model's quantized weights by dense ones. Tied weights stay tied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.model.adapted.experts import fit_experts, put_dense
from veneer.model.quantized.embedding import CodedEmbedding
from veneer.model.quantized.module import CodedModule
from veneer.model.quantized.quant_linear import QuantLinear
from veneer.model.quantized.stack import CodedStack
from veneer.model.sharded.sharding import require_whole


def make_dense(
    model: PreTrainedModel, dtype: torch.dtype | None = None, weights: Mapping[str, Tensor | None] | None = None
) -> None:
    """Replace every quantized layer, table and stack by a dense one, in ``dtype``, by default the original one.

    ``weights`` replace the layers' own (o, i) by path, and those of stacks (experts, o, i). Layers and tables that
    share their codes share the dense weight. Raises ConfigError if the base is sharded over processes.
    """
    require_whole(model, "making it dense")
    given = weights or {}
    coded = [(path, m) for path, m in model.named_modules() if isinstance(m, CodedModule)]
    made: dict[int, nn.Parameter] = {}  # by the codes, which the list above keeps alive
    for path, module in coded:
        if isinstance(module, CodedStack):
            _put_stack(model, path, module.coded().dense(dtype) if given.get(path) is None else given[path])
            continue
        own, shared = given.get(path), made.get(id(module.weight))
        if own is None:
            own = module.bound().dense(dtype) if shared is None else shared
        dense = _dense_of(module, own)
        if own is shared:
            dense.weight = shared
        elif given.get(path) is None:
            made[id(module.weight)] = cast(nn.Parameter, dense.weight)
        model.set_submodule(path, dense)
    if any(isinstance(module, CodedStack) for _, module in coded):
        fit_experts(model)


def _put_stack(model: PreTrainedModel, path: str, weights: Tensor | None) -> None:
    experts, _, name = path.rpartition(".")
    put_dense(model.get_submodule(experts), name, cast(Tensor, weights))


def _dense_of(module: CodedModule, weight: Tensor) -> nn.Module:
    if isinstance(module, CodedEmbedding):
        n_tokens, width = weight.shape
        with torch.device("meta"):
            table = nn.Embedding(n_tokens, width, module.padding_idx)
        table.weight = nn.Parameter(weight, requires_grad=False)
        return table.train(module.training)
    return cast(QuantLinear, module).to_dense(weight=weight)
