"""Reading of a gated delta rule in attention's place: its layers, convolution, decays, norm and gate."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from veneer.model.blueprint.linears import is_linear, read_linear
from veneer.model.blueprint.norms import epsilon_of
from veneer.model.blueprint.parts import DeltaNet, Norm
from veneer.model.blueprint.source import BlockSource, first, has_all, undescribed

# Layers of q, k, v, then of the gate z, of β and of the decay; or two, whose outputs lie by head of the keys.
INNER = (
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    ("q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "a_proj"),
    ("in_proj_qkvz", "in_proj_ba"),
)
CONV, NORMS, OUTS = "conv1d", ("norm", "o_norm"), ("out_proj", "o_proj")
DECAYS = ("A_log", "dt_bias")
SIZES = ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim")


def read_delta_net(source: BlockSource, module: Any) -> DeltaNet | None:
    """Return the description of a gated delta rule, or None if ``module``, a part that mixes tokens, is of another
    kind.
    """
    names = next((each for each in INNER if has_all(module, each)), None)
    norm_name, out_name = first(module, NORMS), first(module, OUTS)
    if names is None or norm_name is None or out_name is None or not set(DECAYS) <= module._parameters.keys():
        return None
    conv, norm, out = (cast(nn.Module, getattr(module, name, None)) for name in (CONV, norm_name, out_name))
    layers = [getattr(module, name) for name in names]
    sizes = [getattr(module, name, 0) for name in SIZES]
    eps, plain = epsilon_of(norm), all(is_linear(layer) for layer in (*layers, out))
    if not plain or eps is None or not isinstance(conv, nn.Conv1d) or getattr(module, "activation", "") != "silu":
        return None
    if any(undescribed(source, module, [*layers, conv, norm, out], own=DECAYS)) or 0 in sizes:
        return None
    inner = tuple(read_linear(source, layer, "scan_in") for layer in layers)
    n_k_heads, n_v_heads, k_width, v_width = sizes
    [kernel], channels = conv.kernel_size, 2 * n_k_heads * k_width + n_v_heads * v_width
    by_channel = conv.groups == conv.in_channels == conv.out_channels == channels
    as_usual = conv.stride == conv.dilation == (1,) and conv.padding == (kernel - 1,)
    widths = channels + n_v_heads * v_width + 2 * n_v_heads
    if not by_channel or not as_usual or sum(layer.out_features for layer in inner) != widths or n_v_heads % n_k_heads:
        return None
    return DeltaNet(
        path=source.path(module),
        inner=inner,
        by_head=len(inner) == 2,
        n_k_heads=n_k_heads,
        n_v_heads=n_v_heads,
        k_width=k_width,
        v_width=v_width,
        conv=source.path(conv),
        kernel=kernel,
        bias=conv.bias is not None,
        beta_scale=2.0 if getattr(module, "allow_neg_eigval", False) else 1.0,
        norm=Norm(path=source.path(norm), kind="rms", shape=(v_width,), eps=eps, offset=0.0, weight=True, bias=False),
        out=read_linear(source, out, "scan_out"),
    )
