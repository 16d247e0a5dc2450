"""8-bit AdamW: equal to bitsandbytes, small in memory, bit-exact over a save and load."""

import copy

import bitsandbytes as bnb
import pytest
import torch

from stand_in import OnDevice, stand_in
from veneer.errors import ConfigError, NonFiniteError, ShapeError
from veneer.ops.adamw import AdamWStep, Moment8bit, adamw_8bit_
from veneer.optim import AdamW8bit, PagedAdamW8bit

SHAPES = [(67, 71), (4099,), (11, 13)]  # 4757, 4099 and 143 entries: two above the limit of 4096, one below
SETTINGS = {"lr": 3e-3, "betas": (0.87, 0.985), "eps": 1e-7, "weight_decay": 0.03}


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in SHAPES]


def set_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    g = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = ((torch.rand(p.shape, generator=g) * 0.8 + 0.2) * torch.randn(p.shape, generator=g).sign()).to(p.dtype)


def run(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


@pytest.mark.parametrize("make", [AdamW8bit, PagedAdamW8bit])
def test_equals_bitsandbytes(make):
    """To rounding in the first step, which reads no rounded state. Later to the one code in a hundred that the CPU code
    of bitsandbytes, which bins values by 3e-5, rounds to the neighbour of the nearest."""
    ours, theirs = parameters(), parameters()
    optimizers = make(ours, **SETTINGS), bnb.optim.AdamW8bit(theirs, **SETTINGS)
    for step, tolerance in enumerate((1e-6, *[0.02 * SETTINGS["lr"]] * 6)):
        run(optimizers[0], ours, range(step, step + 1))
        run(optimizers[1], theirs, range(step, step + 1))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance * (step + 1))


def test_follows_float32_adamw_as_closely_as_eight_bits_allow():
    ours, theirs, start = parameters(), parameters(), parameters()
    run(AdamW8bit(ours, **SETTINGS), ours, range(20))
    run(torch.optim.AdamW(theirs, **SETTINGS), theirs, range(20))
    for a, b, s in zip(ours, theirs, start, strict=True):
        assert float((a - b).detach().norm() / (b - s).detach().norm()) < 0.05
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-6, atol=1e-6)  # below the limit: float32 moments


def test_a_tiny_second_moment_does_not_throw_its_parameter_away():
    """Beside gradients of 1, one of 1e-4 has a second moment below the smallest code."""
    param, twin = (torch.nn.Parameter(torch.zeros(4096)) for _ in range(2))
    grad = torch.where(torch.arange(4096) % 7 == 0, 1.0, 1e-4)
    ours, theirs = AdamW8bit([param], lr=1e-3, weight_decay=0), torch.optim.AdamW([twin], lr=1e-3, weight_decay=0)
    for _ in range(5):
        param.grad, twin.grad = grad.clone(), grad.clone()
        ours.step()
        theirs.step()
    assert float(param.detach().abs().max()) <= float(twin.detach().abs().max()) * 1.01


def test_state_takes_at_most_2_1_bytes_a_parameter():
    param = torch.nn.Parameter(torch.zeros(517, 1031))
    optimizer = AdamW8bit([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert sum(v.nbytes for v in optimizer.state[param].values() if torch.is_tensor(v)) / param.numel() <= 2.1


@pytest.mark.parametrize("make", [AdamW8bit, lambda p, **k: PagedAdamW8bit(p, paged_from=4500, **k)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_exact(make, dtype, tmp_path):
    straight, stopped = parameters(dtype=dtype), parameters(dtype=dtype)
    run(make(straight, **SETTINGS), straight, range(6))
    optimizer = make(stopped, **SETTINGS)
    run(optimizer, stopped, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in stopped]
    again = make(resumed, **SETTINGS)
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    run(again, resumed, range(3, 6))
    for a, b in zip(straight, resumed, strict=True):
        assert torch.equal(a, b)


def test_loading_does_not_share_state_with_what_was_loaded():
    params = parameters()
    first = AdamW8bit(params, **SETTINGS)
    run(first, params, range(2))
    saved = copy.deepcopy(first.state_dict())
    second = AdamW8bit(params, **SETTINGS)
    second.load_state_dict(first.state_dict())
    run(second, params, range(2, 4))
    for key, value in saved["state"][0].items():
        current = first.state_dict()["state"][0][key]
        assert torch.equal(current, value) if torch.is_tensor(value) else current == value


def test_settings_outside_their_range_are_listed_together():
    with pytest.raises(ConfigError, match=r"lr=-1.*betas=\(0.9, 1.0\).*eps=0.*weight_decay=-2"):
        AdamW8bit(parameters(), lr=-1, betas=(0.9, 1.0), eps=0, weight_decay=-2)


def test_tensors_that_do_not_fit_are_refused():
    param, grad = torch.zeros(300), torch.zeros(300)
    good = Moment8bit(torch.zeros(300, dtype=torch.uint8), torch.zeros(2))
    hyper = AdamWStep(1e-3, (0.9, 0.999), 1e-8, 0.0, 1)
    with pytest.raises(ShapeError, match="2 block maxima"):
        adamw_8bit_(param, grad, (good, Moment8bit(good.codes, torch.zeros(3))), hyper)
    with pytest.raises(ShapeError, match="gradient"):
        adamw_8bit_(param, torch.zeros(299), (good, good), hyper)


def test_a_step_on_a_device_reads_once_and_finds_what_is_not_finite():
    pytest.importorskip("triton", reason="needs the package triton")
    with stand_in({"adamw"}) as crossings:
        params = [OnDevice(torch.randn(n)) for n in (521, 769, 257)]
        optimizer = AdamW8bit(params, lr=0.03, min_8bit_size=2)
        for param in params:
            param.grad = OnDevice(torch.randn(len(param)))
        optimizer.step()
        crossings.clear()
        optimizer.step()
        assert (crossings.read, crossings.sent) == (1, 0)
        params[1].grad = OnDevice(torch.full((769,), float("nan")))
        with pytest.raises(NonFiniteError, match=r"shape \(769,\)"):
            optimizer.step()
