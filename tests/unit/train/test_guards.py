"""Gradients that are not finite are found, wherever they lie, and large ones are not taken for them."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from veneer.errors import DivergedError
from veneer.train.guards import FiniteGradients


def check(*gradients):
    model = SimpleNamespace(parameters=lambda: [SimpleNamespace(grad=gradient) for gradient in gradients])
    FiniteGradients().on_pre_optimizer_step(None, SimpleNamespace(global_step=4), None, model=model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_entry_is_found(bad):
    with pytest.raises(DivergedError, match="in step 5"):
        check(torch.ones(3), torch.tensor([1.0, bad, 2.0]).bfloat16())


def test_large_gradients_are_finite():
    check(torch.full((7,), 1e30), torch.full((5,), -3e38))


def test_gradients_on_several_devices():
    # Without the devices: the mode refuses to mix them, and to read a value, which is what is left to do.
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        check(torch.empty(3, device="cuda:0"), torch.empty(4, device="cuda:1"))
