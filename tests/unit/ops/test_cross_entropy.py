"""Head and loss: torch's own over full logits in float64, errors at most twice torch's own in the same dtype."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from stand_in import DEVICE, OnDevice, stand_in
from veneer.errors import ConfigError, ShapeError
from veneer.ops import cross_entropy, matmul
from veneer.ops.cross_entropy import (
    HeadOptions,
    linear_cross_entropy,
    linear_cross_entropy_and_hits,
    linear_cross_entropy_rows,
    linear_token_scores,
    softmax_cross_entropy,
)
from veneer.plan.live_bytes import LiveBytes, peaks
from veneer.quant.dense import DenseWeight

OP = "cross_entropy.softmax_cross_entropy"
DTYPES = [torch.float32, torch.bfloat16]


def draw(n=23, d=29, v=211, ignored=True):
    generator = torch.Generator().manual_seed(n)
    hidden, weight = torch.randn(n, d, generator=generator), torch.randn(v, d, generator=generator) * 0.7
    labels = torch.randint(0, v, (n,), generator=generator)
    if ignored:
        labels[::3] = -100
    return hidden, weight, torch.randn(v, generator=generator), labels


def plain(hidden, weight, bias, labels, softcap, num_items, scale=1.0):
    logits = functional.linear(hidden, weight, bias) * scale
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return functional.cross_entropy(logits, labels, reduction="sum") / (num_items or (labels != -100).sum())


def results(function, hidden, weight, bias, dtype):
    leaves = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
    loss = function(*leaves, None if bias is None else bias.to(dtype))
    return [loss.detach(), *torch.autograd.grad(loss, leaves, torch.tensor(1.7, dtype=loss.dtype))]


@pytest.mark.looped("dtype", DTYPES)
@pytest.mark.looped(("softcap", "scale"), [(None, 1.0), (3.0, 1.0), (3.0, 0.37), (None, 1.9)])
@pytest.mark.looped("num_items", [None, 37])
@pytest.mark.looped("with_bias", [False, True])
def test_loss_and_gradients_over_chunks(with_bias, num_items, softcap, scale, dtype, backend):
    hidden, weight, bias, labels = draw()
    hidden, weight, bias = hidden.to(dtype), weight.to(dtype), bias.to(dtype) if with_bias else None
    options = HeadOptions(
        scale=scale, softcap=softcap, num_items=num_items, chunk_bytes=5 * 211 * hidden.element_size(), backend=backend
    )
    ours = results(lambda h, w, b: linear_cross_entropy(h, w, labels, b, options), hidden, weight, bias, dtype)
    theirs = results(lambda h, w, b: plain(h, w, b, labels, softcap, num_items, scale), hidden, weight, bias, dtype)
    exact = results(
        lambda h, w, b: plain(h, w, b, labels, softcap, num_items, scale), hidden, weight, bias, torch.float64
    )
    for name, got, other, truth in zip(("loss", "dhidden", "dweight"), ours, theirs, exact, strict=True):
        assert got.dtype == other.dtype
        allowed = 2 * (other.double() - truth).abs().max() + 2e-6 * truth.abs().max()
        assert (got.double() - truth).abs().max() <= allowed, name


@pytest.mark.looped("dtype", DTYPES)
@pytest.mark.looped("shape", [(1, 1), (3, 2), (5, 1031), (2, 17)])
def test_rows_of_logits(shape, dtype, backend):
    generator = torch.Generator().manual_seed(7)
    logits = (torch.randn(shape, generator=generator) * 5).to(dtype)
    labels = torch.randint(0, shape[1], shape[:1], generator=generator)
    exact = logits.double().requires_grad_()
    losses = functional.cross_entropy(exact, labels, reduction="none")
    grad = torch.autograd.grad(losses.sum(), exact)[0]
    kept = logits.clone()
    read_only = softmax_cross_entropy(kept, labels, write_grad=False, backend=backend)
    assert torch.equal(kept, logits)
    got = softmax_cross_entropy(kept, labels, backend=backend)
    assert torch.equal(got, read_only)
    assert torch.allclose(got.double(), losses.detach(), rtol=1e-6, atol=2e-6)
    assert (kept.double() - grad).abs().max() <= 4 * torch.finfo(dtype).eps


def test_large_logits_do_not_overflow(backend):
    logits = torch.tensor([[3e4, -3e4, 0.0], [-3e4, -3e4, -3e4]])
    losses = softmax_cross_entropy(logits, torch.tensor([1, 2]), backend=backend)
    assert torch.allclose(losses, torch.tensor([6e4, 1.0986123]))
    assert torch.allclose(logits, torch.tensor([[1.0, -1.0, 0.0], [1 / 3, 1 / 3, -2 / 3]]), atol=1e-6)


def test_frozen_weight_object_equals_the_tensor():
    hidden, weight, _, labels = draw()
    got = results(
        lambda h, w, b: linear_cross_entropy(h, DenseWeight(weight), labels) + 0 * w.sum(),
        hidden,
        weight,
        None,
        torch.float32,
    )
    wanted = results(
        lambda h, w, b: linear_cross_entropy(h, weight, labels) + 0 * w.sum(), hidden, weight, None, torch.float32
    )
    for g, w in zip(got[:2], wanted[:2], strict=True):
        assert torch.allclose(g, w, rtol=1e-6, atol=1e-7)


def test_num_items_as_a_tensor_and_no_row_that_counts():
    hidden, weight, _, labels = draw()
    one = linear_cross_entropy(hidden, weight, labels, options=HeadOptions(num_items=torch.tensor(37)))
    assert torch.equal(one, linear_cross_entropy(hidden, weight, labels, options=HeadOptions(num_items=37)))
    hidden.requires_grad_()
    nothing = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), options=HeadOptions(num_items=37))
    nothing.backward()
    assert nothing == 0
    assert not hidden.grad.any()
    assert linear_cross_entropy(hidden, weight, torch.full_like(labels, -100)).isnan()


@pytest.mark.usefixtures("own_checks")
def test_shapes_that_do_not_fit():
    with pytest.raises(ShapeError, match="Flatten the batch"):
        linear_cross_entropy(torch.zeros(2, 3, 5), torch.zeros(7, 5), torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ShapeError, match="labels"):
        softmax_cross_entropy(torch.zeros(3, 5), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("n_classes", [0, 7])
def test_no_rows(backend, n_classes):
    logits, labels = torch.empty(0, n_classes), torch.empty(0, dtype=torch.long)
    assert softmax_cross_entropy(logits, labels, backend=backend).shape == (0,)


@pytest.mark.parametrize("label", [-1, -101, 211, 10**9])
def test_a_label_that_is_no_class(label):
    hidden, weight, _, labels = draw()
    labels[4] = label
    with pytest.raises(ShapeError, match=rf"labels reach from .*{label}.*the classes 0 to 210"):
        linear_cross_entropy(hidden, weight, labels)
    with pytest.raises(ShapeError, match=rf"labels reach from .*{label}.*the classes 0 to 210"):
        softmax_cross_entropy(hidden @ weight.T, labels.where(labels != -100, 3))


def test_the_gradient_of_a_sum_over_many_tokens_is_not_off_as_a_whole():
    hidden, weight, _, labels = draw()
    hidden = hidden.bfloat16().requires_grad_()
    wide = hidden.detach().double().requires_grad_()
    factor = torch.tensor(1 / 1003)  # in bfloat16 it is 0.2% off
    summed = linear_cross_entropy(hidden, weight.bfloat16(), labels, options=HeadOptions(num_items=1.0))
    alone, _ = linear_cross_entropy_rows(hidden, weight.bfloat16(), labels)
    exact = plain(wide, weight.bfloat16().double(), None, labels, None, 1.0)
    (truth,) = torch.autograd.grad(exact * factor.double(), wide)
    for loss in (summed, alone.sum()):
        (got,) = torch.autograd.grad(loss * factor, hidden)
        assert abs((got.double() * truth).sum() / truth.square().sum() - 1) < 5e-4


@pytest.mark.parametrize("chunk_bytes", [211 * 4 * 5, 1 << 20])
def test_hits_are_the_rows_whose_label_is_on_top(chunk_bytes):
    hidden, weight, bias, labels = draw()
    labels = torch.where(torch.arange(len(labels)) % 3 == 0, (hidden @ weight.T + bias).argmax(-1), labels)
    counted = labels != -100
    options = HeadOptions(chunk_bytes=chunk_bytes)
    loss, hits = linear_cross_entropy_and_hits(hidden, weight, labels, bias, options)
    expected = ((hidden @ weight.T + bias).argmax(-1) == labels)[counted].sum()
    assert hits == expected
    assert 0 < hits < counted.sum()
    torch.testing.assert_close(loss, linear_cross_entropy(hidden, weight, labels, bias, options))


def test_labels_on_cuda_are_not_waited_for(monkeypatch):
    monkeypatch.setattr("veneer.ops.cross_entropy.implementation", lambda *_: lambda logits, *_: logits.new_empty(7))
    with FakeTensorMode():  # raises where the value of a tensor is asked for
        logits, labels = torch.empty(7, 11, device="cuda"), torch.empty(7, dtype=torch.long, device="cuda")
        assert softmax_cross_entropy(logits, labels).device.type == "cuda"


def test_a_cap_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ConfigError, match="softcap=0"):
        HeadOptions(softcap=0.0)


@pytest.mark.parametrize("n", [3, 23])
def test_a_head_that_is_widened_by_parts_gives_the_same_in_less_memory(n, monkeypatch):
    hidden, weight, bias, labels = draw(n=n, v=2003, ignored=False)
    hidden, weight, bias = hidden.bfloat16().requires_grad_(), weight.bfloat16(), bias.bfloat16()
    options = HeadOptions(chunk_bytes=11 * 2003 * 2)
    monkeypatch.setattr(matmul, "float32_is_faster", lambda: True)
    found = {}
    for widened in (7 * 29 * 4, 1 << 30):
        monkeypatch.setattr(cross_entropy, "_WIDENED_BYTES", widened)
        live = LiveBytes()
        with live:
            loss = linear_cross_entropy(hidden, weight, labels, bias, options)
        (gradient,) = torch.autograd.grad(loss, [hidden])
        found[widened] = loss.item(), gradient.double(), peaks(live.events, live.kinds, str)["load"].n_bytes
    (loss, gradient, n_bytes), (whole_loss, whole_gradient, whole_bytes) = found.values()
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    assert (gradient - whole_gradient).norm() <= 2**-8 * whole_gradient.norm()
    assert whole_bytes - n_bytes > 4 * 29 * 1990


def test_a_gpu_takes_a_thousand_rows_of_a_large_vocabulary_at_a_time():
    """In whole tiles; what is asked for is kept, and the CPU's chunks are those of its cache."""
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert cross_entropy.chunk_rows(128_256 * 2, cuda) == 1024
    assert cross_entropy.chunk_rows(6_007 * 2, cuda) == 2560
    assert cross_entropy.chunk_rows(128_256 * 2, cpu) == 130
    assert cross_entropy.chunk_rows(128_256 * 2, cuda, HeadOptions(chunk_bytes=1 << 20)) == 4


def test_details_on_a_gpu_take_many_rows_at_a_time():
    logits = torch.randn(301, 37, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(301) % 37
    expected = cross_entropy._Details(labels, logits.device, True)
    expected(slice(0, 301), logits.clone())  # it shifts float32 logits in place
    with stand_in():
        found = cross_entropy._Details(labels, DEVICE, True)
        found._rows = OnDevice(found._rows)
        found(slice(0, 301), OnDevice(logits.clone()))
    for name in ("entropy", "mean_logits", "log_sum_sq_probs"):
        torch.testing.assert_close(getattr(found, name).host, getattr(expected, name))


def test_the_entropy_has_a_gradient_if_it_is_asked_for() -> None:
    for softcap, scale, bias in ((None, 1.0, True), (2.0, 1.7, False)):
        hidden, weight, own, labels = draw()
        own = own if bias else None
        options = HeadOptions(softcap=softcap, scale=scale, chunk_bytes=211 * 4 * 5)
        x = hidden.clone().requires_grad_()
        scores = linear_token_scores(x, weight, labels, own, options, entropy_learns=True)
        logits = (y := hidden.clone().requires_grad_()) @ weight.T
        logits = (logits if own is None else logits + own) * scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        log_p = logits.log_softmax(dim=-1)
        counted = labels != -100
        expected = -(log_p.exp() * log_p).sum(dim=-1) * counted
        factors = torch.arange(len(labels)) % 5 - 1.5
        own_log_p = log_p.gather(1, labels.clamp(min=0)[:, None])[:, 0] * counted
        ((scores.entropy * factors).sum() + scores.log_probs.sum()).backward()
        ((expected * factors).sum() + own_log_p.sum()).backward()
        torch.testing.assert_close(scores.entropy, expected, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(x.grad, y.grad, atol=5e-5, rtol=1e-4)
