"""Model's head in int8: the largest part of the weights that serving reads for each new token."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from veneer.errors import ConfigError
from veneer.model.quantized.quant_linear import QuantLinear
from veneer.quant.int8 import Int8Spec


def quantize_head(model: PreTrainedModel) -> None:
    """Replace the head by an int8 copy with one scale for each row. Embeddings that are tied to the head stay
    unchanged.

    Raises ConfigError for a model without a dense head, and NonFiniteError for a head with values that are not finite.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        found = "has none" if head is None else f"has {type(head).__name__}"
        raise ConfigError(
            f"quantize_head='int8' is for a head that is an nn.Linear, and {type(model).__name__} {found}: leave it out"
        )
    o, i = head.weight.shape
    path = next(name for name, module in model.named_modules() if module is head)
    model.set_submodule(path, QuantLinear.from_dense(head, Int8Spec((o, i), head.weight.dtype)))
