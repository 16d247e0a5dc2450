"""The fused 8-bit AdamW step against the reference: the same codes to the bit, the same parameters to rounding."""

import pytest
import torch

from veneer.errors import NonFiniteError
from veneer.ops.adamw import BLOCK_SIZE, AdamWStep, Moment8bit, adamw_8bit_, require_finite
from veneer.ops.blockwise import dynamic_map, quantize_blockwise

OP = "adamw.adamw_8bit_"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def state(n: int, step: int) -> tuple[Moment8bit, Moment8bit]:
    """Moments as some steps leave them: of either sign and above zero, over decades, a block still zero."""
    spread = torch.randn(2, n) * 10 ** (torch.rand(2, n) * 5 - 5) * (step > 1)
    spread[:, 256:512] = 0
    pairs = (
        quantize_blockwise(v, dynamic_map(signed), BLOCK_SIZE)
        for v, signed in zip((spread[0], spread[1].square()), (True, False), strict=True)
    )
    return tuple(Moment8bit(*pair) for pair in pairs)


def copied(moments: tuple[Moment8bit, Moment8bit]) -> tuple[Moment8bit, Moment8bit]:
    return tuple(Moment8bit(m.codes.clone(), m.absmax.clone()) for m in moments)


@pytest.mark.looped("param_dtype", DTYPES)
@pytest.mark.looped("grad_dtype", DTYPES)
@pytest.mark.looped(("shape", "step"), [((5,), 1), ((3, 257), 7), ((67, 71), 3)])
def test_equals_the_reference(shape, step, param_dtype, grad_dtype, backend):
    torch.manual_seed(step)
    param, grad = torch.randn(shape).to(param_dtype), (torch.randn(shape) ** 5 * 1e-2).to(grad_dtype)
    grad.view(-1)[2::3] = 0
    hyper = AdamWStep(lr=3e-3, betas=(0.87, 0.985), eps=1e-7, weight_decay=0.03, step=step)
    moments = state(param.numel(), step)
    truth, expected = param.clone(), copied(moments)
    adamw_8bit_(truth, grad, expected, hyper, backend="reference")
    adamw_8bit_(param, grad, moments, hyper, backend=backend)
    for ours, theirs in zip(moments, expected, strict=True):
        assert torch.equal(ours.codes, theirs.codes)
        assert torch.equal(ours.absmax, theirs.absmax)
    torch.testing.assert_close(param, truth, rtol=max(5e-7, torch.finfo(param_dtype).eps), atol=3e-7)


@pytest.mark.parametrize("signed", [True, False])
def test_rounds_to_codes_as_blockwise_quantization_does_at_and_beside_every_midpoint(signed, backend):
    """With betas of zero the moments are the gradient and its square: every value of a block can be chosen."""
    code = dynamic_map(signed)
    middles = (code[:-1] + code[1:]) / 2
    near = torch.cat(
        [middles, torch.nextafter(middles, torch.tensor(2.0)), torch.nextafter(middles, torch.tensor(-2.0))]
    )
    values = torch.cat([near, code, torch.logspace(-12, 0, 331), torch.zeros(3)])
    blocks = torch.nn.functional.pad(values, (0, -len(values) % 255)).view(-1, 255)
    grad = torch.nn.functional.pad(blocks, (0, 1), value=1.0).flatten()  # every block's maximum is 1
    grad = grad if signed else grad.sqrt()
    param, moments = torch.zeros_like(grad), copied(state(len(grad), 1))
    adamw_8bit_(param, grad, moments, AdamWStep(1e-3, (0.0, 0.0), 1e-8, 0.0, 1), backend=backend)
    value = grad if signed else grad * grad
    codes, absmax = quantize_blockwise(value, code, BLOCK_SIZE, backend="reference")
    codes = codes if signed else torch.where(value > 0, codes.clamp_min(1), codes)
    moment = moments[0 if signed else 1]
    assert torch.equal(moment.codes, codes)
    assert torch.equal(moment.absmax, absmax)


def test_layouts_and_dtypes_without_a_kernel_take_the_reference():
    param, grad = torch.randn(71, 67), torch.randn(71, 67)
    hyper = AdamWStep(3e-3, (0.87, 0.985), 1e-7, 0.03, 2)
    truth, expected = param.clone(), state(param.numel(), 2)
    moments, wide, moments_wide = copied(expected), param.double(), copied(expected)
    adamw_8bit_(truth, grad, expected, hyper, backend="reference")
    turned = param.T.contiguous().T
    adamw_8bit_(turned, grad, moments, hyper)
    adamw_8bit_(wide, grad.double(), moments_wide, hyper)
    assert torch.equal(turned, truth)
    assert torch.equal(wide.float(), truth)
    assert torch.equal(moments_wide[1].codes, expected[1].codes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_moment_that_is_not_finite_is_an_error(value, backend):
    grad = torch.ones(300)
    grad[271] = value
    hyper, good = AdamWStep(1e-3, (0.9, 0.999), 1e-8, 0.0, 1), torch.zeros(1, dtype=torch.int32)

    def step():
        flag = adamw_8bit_(torch.zeros(300), grad, state(300, 1), hyper, backend=backend)
        require_finite([(good, torch.zeros(7)), (flag, grad)])

    with pytest.raises(NonFiniteError, match=r"shape \(300,\)"):
        step()
