"""Layout of tensors in GGUF files. Whole output rows move, so that one function serves weights, biases and LoRA's B."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    Part = tuple[str, Callable[[Tensor], Tensor]]


def neighbours(leaf: str, tensor: Tensor, config: Any) -> Tensor:
    """Return q and k (o, …) for a runtime that rotates neighbouring pairs. transformers rotates halves of a head."""
    role = leaf.partition(".")[0]
    if role not in ("attn_q", "attn_k"):
        return tensor
    heads = config.num_attention_heads if role == "attn_q" else config.num_key_value_heads
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def by_role(leaf: str, tensor: Tensor, config: Any) -> Tensor:
    """Return a fused matrix (o, …), interleaved by head, as all q, then all k, then all v."""
    if not leaf.startswith("attn_qkv."):
        return tensor
    heads = config.num_attention_heads
    return tensor.reshape(heads, 3, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)


def shared_gate(leaf: str, tensor: Tensor, config: Any) -> Tensor:
    """Return the gate of a shared expert (1, hidden) as a vector."""
    return tensor.reshape(-1) if leaf == "ffn_gate_inp_shexp.weight" else tensor


def experts(name: str) -> Iterator[Part]:
    """Yield the file's stacked tensors (n, out, in) that hold an expert parameter's values, each with the function that
    selects its values from the parameter.

    Gate and up may be one parameter, and each expert may have parameters of its own.
    """
    # Here, as it imports torch: the families are known without it.
    from veneer.model.blueprint.names import EXPERT_LAYERS, EXPERTS, STACKS

    of_experts, (gate_up, down) = EXPERTS, STACKS
    if name.endswith(f".{of_experts}.{gate_up}"):
        yield "ffn_gate_exps.weight", lambda tensor: tensor.chunk(2, 1)[0]
        yield "ffn_up_exps.weight", lambda tensor: tensor.chunk(2, 1)[1]
    elif name.endswith(f".{of_experts}.{down}"):
        yield "ffn_down_exps.weight", lambda tensor: tensor
    elif found := re.search(rf"\.{of_experts}\.\d+\.(\w+)\.weight$", name):
        yield f"ffn_{EXPERT_LAYERS[found[1]]}_exps.weight", lambda tensor: tensor


def alternating_experts(name: str) -> Iterator[Part]:
    """Yield as `experts` does, for stacks (n, in, out) with biases (n, out) in which gate and up alternate; and the
    attention's sinks.
    """
    # Here, as in `experts`.
    from veneer.model.blueprint.names import EXPERTS, STACKS

    of_experts, (gate_up, down) = EXPERTS, STACKS
    if name.endswith(".self_attn.sinks"):
        yield "attn_sinks.weight", lambda tensor: tensor
    for end, suffix in (("", "weight"), ("_bias", "bias")):
        if name.endswith(f".{of_experts}.{gate_up}{end}"):
            yield f"ffn_gate_exps.{suffix}", lambda tensor: tensor[..., ::2]
            yield f"ffn_up_exps.{suffix}", lambda tensor: tensor[..., 1::2]
        elif name.endswith(f".{of_experts}.{down}{end}"):
            yield f"ffn_down_exps.{suffix}", lambda tensor: tensor


def no_windows(config: Any) -> Iterator[str]:
    """Yield a problem if a config has sliding windows, for a family whose windows the runtime does not support."""
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        yield "sliding windows (use_sliding_window), which the runtime does not have for this family"


def experts_everywhere(config: Any) -> Iterator[str]:
    """Return the problems of a config with sliding windows, or with layers without experts."""
    yield from no_windows(config)
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        yield "layers without experts (mlp_only_layers, decoder_sparse_step), which the runtime does not read"
