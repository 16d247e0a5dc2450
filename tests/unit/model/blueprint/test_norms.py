"""The norm that a module is, found by running its code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from veneer.model.blueprint.describe import describe_config
from veneer.model.blueprint.norms import norm_form

from .families import FAMILIES, model_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "form"),
    [("llama", ("rms", 0.0)), ("gemma3", ("rms", 1.0)), ("neox", ("layer", 0.0)), ("cohere", ("layer", 0.0)),
     ("nemotron", ("layer", 1.0))],
)  # fmt: skip
def test_the_form_of_a_norm_does_not_depend_on_its_weights(
    family: str, form: tuple[str, float], dtype: torch.dtype
) -> None:
    norm = model_of(family, dtype).base_model.layers[0].input_layernorm
    nn.init.uniform_(norm.weight, 90, 1700)
    assert norm_form(norm, 1e-5) == form


def test_a_norm_without_weights() -> None:
    norm = describe_config(FAMILIES["olmo"]).norm
    assert norm is not None
    assert (norm.kind, norm.shape, norm.eps, norm.weight, norm.bias) == ("layer", (84,), 1e-5, False, False)


class _Shifted(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1


@pytest.mark.parametrize("module", [nn.Linear(5, 5), nn.ReLU(), _Shifted(7), nn.PReLU(7)])
def test_what_is_no_norm(module: nn.Module) -> None:
    assert norm_form(module, 1e-5) is None


def test_hooks_and_modes_stay_untouched() -> None:
    norm, calls = nn.RMSNorm(7), list[str]()
    norm.register_forward_hook(lambda m, a, y: calls.append("hook"))
    before = norm.weight.clone()
    assert norm_form(norm, 1e-5) == ("rms", 0.0)
    assert not calls
    assert torch.equal(norm.weight, before)
