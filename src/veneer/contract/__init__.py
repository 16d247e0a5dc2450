"""Contract of a method: a frozen config with pure functions from parameters to a record. A config *is* its method.

All methods implement one protocol, that of `MethodConfig`, about a *site*. It consists of ``shapes``, ``init``,
``lower``, ``disk_names``, ``dropout``, ``site_of``, and ``places_in`` for the sites of a saved file. The base class
determines the kind of site:

- `LinearMethod`: a linear layer, `LinearSite`;
- `ResidualMethod`: the output of a sub-layer, `ResidualSite`;
- `PrefixMethod`: all attention layers at once, a tuple of `AttentionSite`;
- `AttentionMethod`: one attention layer, `AttendingSite`;
- `PromptMethod`: the input embeddings, `InputSite`;
- `WholeMethod`: no site, since it trains modules of the base or rows of tables.

`model.sites.places` has one row for each of the six: how a model's places are found, and how parameters get there. No
other file asks of which kind a method is. Callers ask for facts, each with an answer for every method:
``changes_weights``, ``reads_weight``, ``virtual_tokens``, ``invocation_tokens``, ``input_dependent``, ``by_sequence``,
``draws_by_token``, ``counts_layers``, ``largest_rank``, ``has_network``, ``has_own_loss``.

Everything else is a capability that a config may return:

- ``extras``: further parts of the base that it trains (modules, biases, rows, parameters by name);
- ``n_tasks`` and ``of_task``: a record for each of several tasks, of which a row names one;
- ``drawn``: random numbers of its records in training;
- ``training``: its action during a training run (length of the run, a penalty, a schedule);
- ``packing``: its form on disk, if other libraries do not know the form that is trained;
- ``shared``: tensors that its layers share, drawn or trained;
- ``derived``: tensors that follow from the base's weight, kept beside the parameters and in no file;
- ``init_together``: initial values that depend on the weights of several layers;
- ``checks``: the model's layers that it refuses;
- ``late_start``: factors that may be initialized again on the model, from data or from the quantization error;
- ``raised``: an adapter of the method that has given records: a sum of others is kept so.

Laws, run on every method by ``tests/contract``:

- ``init`` returns exactly the names and shapes of ``shapes``, for any site, with finite values;
- ``lower`` is pure and differentiable. If ``identity_at_start`` holds, the record of ``init`` changes nothing, unless a
  field asks for another start (``init_weights=False``, DEFT's ``para``);
- if it ``changes_weights``, forward through the record equals forward through the folded weight;
- an adapter is bit-equal after saving and loading;
- the declared bytes are the bytes on disk;
- the records read from the file are those of the adapter on its model, bit for bit.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.contract.beside_attention import AttentionMethod
    from veneer.contract.config import MethodConfig
    from veneer.contract.linear import LinearMethod
    from veneer.contract.parameters import Params, Shapes
    from veneer.contract.residual import ResidualMethod
    from veneer.contract.targets import TargetedConfig
    from veneer.contract.virtual_tokens import PrefixMethod, PromptMethod, VirtualTokenMethod
    from veneer.contract.whole import WholeMethod

_HOMES = {
    "AttentionMethod": "beside_attention",
    "LinearMethod": "linear",
    "MethodConfig": "config",
    "Params": "parameters",
    "PrefixMethod": "virtual_tokens",
    "PromptMethod": "virtual_tokens",
    "ResidualMethod": "residual",
    "Shapes": "parameters",
    "TargetedConfig": "targets",
    "VirtualTokenMethod": "virtual_tokens",
    "WholeMethod": "whole",
}

__all__ = [
    "AttentionMethod",
    "LinearMethod",
    "MethodConfig",
    "Params",
    "PrefixMethod",
    "PromptMethod",
    "ResidualMethod",
    "Shapes",
    "TargetedConfig",
    "VirtualTokenMethod",
    "WholeMethod",
]


def __getattr__(name: str) -> Any:
    """Import a name of this package when it is first used, so that keys and files of adapters can be read without
    torch.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
