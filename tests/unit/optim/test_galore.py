"""GaLore against the paper's algorithm written out in float64, its memory, and its per-layer form."""

import pytest
import torch

from veneer.errors import ConfigError, TrainingError
from veneer.optim.galore import GaLoreAdamW, GaLoreProjection
from veneer.optim.layerwise import LayerwiseGaLoreAdamW

TALL, WIDE, SQUARE = (23, 11), (7, 19), (13, 13)


def paper(weight, grads, rank, gap, scale, right, lr=0.02, betas=(0.8, 0.95), eps=1e-6, decay=0.1):
    """Algorithm 2 in float64."""
    w, m, v = weight.double(), 0.0, 0.0
    for t, g in enumerate(grads, 1):
        g = g.double()
        if (t - 1) % gap == 0:
            # In float32, as there: singular vectors have no sign of their own, and moments outlive a change of basis.
            u, _, vt = torch.linalg.svd(g.float(), full_matrices=False)
            base = (vt[:rank].T if right else u[:, :rank]).double()
        low = g @ base if right else base.T @ g
        m, v = betas[0] * m + (1 - betas[0]) * low, betas[1] * v + (1 - betas[1]) * low**2
        n = (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
        w = (w - lr * scale * (n @ base.T if right else base @ n)) * (1 - lr * decay)
    return w


@pytest.mark.parametrize(
    ("shape", "side", "right"),
    [
        (TALL, "shorter", True),
        (WIDE, "shorter", False),
        (TALL, "longer", False),
        (WIDE, "longer", True),
        (SQUARE, "longer", False),
    ],
)
def test_equals_the_paper(shape, side, right):
    g = torch.Generator().manual_seed(3)
    start, grads = torch.randn(shape, generator=g), [torch.randn(shape, generator=g) for _ in range(5)]
    param = torch.nn.Parameter(start.clone())
    optimizer = GaLoreAdamW(
        [param],
        lr=0.02,
        betas=(0.8, 0.95),
        weight_decay=0.1,
        projection=GaLoreProjection(rank=3, gap=2, scale=0.7, side=side),
    )
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(param.double(), paper(start, grads, 3, 2, 0.7, right), rtol=1e-4, atol=1e-5)


def test_vectors_and_small_matrices_take_plain_adamw():
    params = [torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(2, 9))]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    ours = GaLoreAdamW(params, lr=0.1, eps=1e-6, projection=GaLoreProjection(rank=3))
    theirs = torch.optim.AdamW(twins, lr=0.1, eps=1e-6, weight_decay=0.0)
    for step in range(4):
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.full_like(p, 0.3 * (step - 1.5))
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize(("eight_bit", "most"), [(False, 0.22), (True, 0.12)])
def test_state_is_a_fraction_of_adamw(eight_bit, most):
    param = torch.nn.Parameter(torch.randn(331, 257))
    optimizer = GaLoreAdamW([param], projection=GaLoreProjection(rank=32), eight_bit=eight_bit)
    param.grad = torch.randn_like(param)
    optimizer.step()
    assert sum(v.nbytes for v in optimizer.state[param].values() if torch.is_tensor(v)) / (8 * param.numel()) < most


@pytest.mark.parametrize("eight_bit", [False, True])
def test_resume_is_bit_exact(eight_bit, tmp_path):
    def run(steps, param, optimizer):
        for step in steps:
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step)).to(param.dtype)
            optimizer.step()

    def make(value):
        param = torch.nn.Parameter(value.clone())
        return param, GaLoreAdamW([param], lr=0.01, projection=GaLoreProjection(rank=4, gap=3), eight_bit=eight_bit)

    start = torch.randn(29, 17).bfloat16()
    straight, optimizer = make(start)
    run(range(7), straight, optimizer)
    stopped, optimizer = make(start)
    run(range(4), stopped, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    resumed, again = make(stopped.detach())
    again.load_state_dict(torch.load(tmp_path / "o.pt"))
    run(range(4, 7), resumed, again)
    assert torch.equal(straight, resumed)


def two_layers():
    torch.manual_seed(5)
    return torch.nn.Sequential(torch.nn.Linear(9, 31), torch.nn.Tanh(), torch.nn.Linear(31, 13))


def test_the_layerwise_form_gives_the_same_weights_and_frees_gradients():
    options = {"lr": 0.03, "projection": GaLoreProjection(rank=4, gap=2)}
    x = torch.randn(6, 9)
    plain, layerwise = two_layers(), two_layers()
    optimizer = GaLoreAdamW(plain.parameters(), **options)
    inside = LayerwiseGaLoreAdamW([{"params": [p]} for p in layerwise.parameters()], **options)
    for step in range(4):
        if step == 2:
            inside.load_state_dict(inside.state_dict())  # replaces the groups
            inside.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] = 0.05
            for group in inside.param_groups[1:]:
                group["lr"] = 0.05
        plain(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        layerwise(x).square().mean().backward()
        assert all(p.grad is None for p in layerwise.parameters())
        inside.step()
    for p, q in zip(plain.parameters(), layerwise.parameters(), strict=True):
        assert torch.equal(p, q)
    before = layerwise[0].weight.clone()
    inside.close()
    layerwise(x).square().mean().backward()
    assert torch.equal(layerwise[0].weight, before)
    inside.step()
    assert not torch.equal(layerwise[0].weight, before)


def test_the_layerwise_form_stops_before_a_weight_takes_a_gradient_that_is_not_finite():
    model = two_layers()
    before = model[2].weight.clone()
    LayerwiseGaLoreAdamW(model.parameters(), projection=GaLoreProjection(rank=4))
    with pytest.raises(TrainingError, match="NaN or infinite"):
        (model(torch.ones(2, 9)).sum() * float("nan")).backward()
    assert torch.equal(model[2].weight, before)


def test_a_group_that_is_not_projected_takes_plain_adamw():
    param, twin = (torch.nn.Parameter(torch.ones(7, 5)) for _ in range(2))
    ours = GaLoreAdamW([{"params": [param], "projected": False}], lr=0.1, projection=GaLoreProjection(rank=2))
    theirs = torch.optim.AdamW([twin], lr=0.1, eps=1e-6, weight_decay=0.0)
    for p in (param, twin):
        p.grad = torch.linspace(-1, 1, 35).view(7, 5)
    ours.step()
    theirs.step()
    torch.testing.assert_close(param, twin)


def test_settings_are_checked():
    with pytest.raises(ConfigError, match=r"rank=0.*gap=0.*side='up'"):
        GaLoreProjection(rank=0, gap=0, side="up")
    for scale in (0.0, -0.25, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=f"scale={scale} must be a number above 0"):
            GaLoreProjection(scale=scale)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"projection": GaLoreProjection(rank=5)},
            r"matrix \(29, 17\) has a basis \(17, 4\), but rank=5.* need \(17, 5\)",
        ),
        (
            {"projection": GaLoreProjection(rank=4, side="longer")},
            r"a basis \(17, 4\), but .*side='longer' need \(29, 4\)",
        ),
        ({"projection": GaLoreProjection(rank=17)}, r"a basis \(17, 4\), but rank=17 .* need none"),
        ({"projection": GaLoreProjection(rank=4), "eight_bit": True}, "moments are float32, but .* eight_bit=True"),
    ],
)
def test_a_state_of_another_projection_is_refused_and_nothing_is_changed(changes, message):
    param, twin = (torch.nn.Parameter(torch.ones(29, 17)) for _ in range(2))
    before = GaLoreAdamW([param], lr=0.1, projection=GaLoreProjection(rank=4))
    param.grad = torch.linspace(-1, 1, 29 * 17).view(29, 17)
    before.step()
    other = GaLoreAdamW([twin], lr=0.3, **changes)
    with pytest.raises(ConfigError, match=message):
        other.load_state_dict(before.state_dict())
    assert not other.state
    assert other.param_groups[0]["lr"] == 0.3
