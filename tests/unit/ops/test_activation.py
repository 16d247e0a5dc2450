"""Activations: torch's own in float64, errors at most twice torch's own in the same dtype and one last place."""

from functools import partial

import pytest
import torch
from torch.nn import functional

from veneer.errors import ConfigError
from veneer.ops.activation import KINDS, activation_backward, activation_forward

OP = "activation.activation_forward"
TORCH = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "relu_squared": lambda x: functional.relu(x).square(),
}


@pytest.mark.looped("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.looped("kind", KINDS)
@pytest.mark.looped("shape", [(1, 1), (3, 17), (2, 3, 131)])
def test_value_and_gradient(shape, kind, dtype, backend):
    generator = torch.Generator().manual_seed(shape[-1])
    x, dy = (torch.randn(2, *shape, generator=generator, dtype=torch.float64) * 4).to(dtype)
    results = {}
    for name, to in (("plain", dtype), ("exact", torch.float64)):
        leaf = x.to(to).requires_grad_()
        y = TORCH[kind](leaf)
        results[name] = y.detach(), *torch.autograd.grad(y, leaf, dy.to(to))
    ours = activation_forward(x, kind, backend=backend), activation_backward(dy, x, kind, backend=backend)
    for got, plain, exact in zip(ours, results["plain"], results["exact"], strict=True):
        assert got.dtype == dtype
        unit = torch.finfo(dtype).eps * exact.abs().max()
        assert (got.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max() + unit


def test_errors():
    for call in (
        lambda: activation_forward(torch.zeros(3), "swish"),
        lambda: activation_backward(*torch.zeros(2, 3), "swish"),
    ):
        with pytest.raises(ConfigError, match=r"'swish' is unknown.*relu_squared"):
            call()
