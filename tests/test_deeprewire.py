"""DeepRewiring against reference trajectories, steps worked by hand, and the faults that would disable it."""

import pytest
import torch
from optim_helpers import (
    PATHS,
    TRAJECTORY_BOUND,
    WRONG,
    assert_a_wrong_trajectory_is_told,
    golden_errors,
    parameters,
    train,
)

import deeprewire
from deeprewire import DeepRewiring

EPS = 1e-8
paths = pytest.mark.parametrize("path", PATHS)
trajectories = pytest.mark.parametrize("name", ["deep_norewire", "softdeep_l1", "softdeep_ams"])


@trajectories
@paths
def test_golden_trajectory(golden, name, path):
    error, differing_zeros = golden_errors(golden(f"optim_{name}.npz"), **path)
    assert error <= TRAJECTORY_BOUND
    assert differing_zeros == 0


@trajectories
def test_golden_trajectory_with_other_rounding(golden, name):
    """In float64: the rounding that is farthest from float32's."""
    error, differing_zeros = golden_errors(golden(f"optim_{name}.npz"), dtype=torch.float64)
    assert error <= TRAJECTORY_BOUND
    assert differing_zeros == 0


@trajectories
@pytest.mark.parametrize("wrong", [*WRONG, "other penalty"])
def test_the_golden_trajectory_tells_a_wrong_optimizer(golden, name, wrong):
    change = WRONG.get(wrong, lambda settings: dict(l1=1.5 * settings["l1"]))
    assert_a_wrong_trajectory_is_told(golden(f"optim_{name}.npz"), change)


def by_hand(path, **settings):
    """Eight weights and an optimizer whose Adam part is lr * sign(g), with lr = 0.25."""
    w = torch.nn.Parameter(torch.tensor([1.0, 1.0, -1.0, -1.0, 0.125, -0.125, 0.0, -0.75]))
    optimizer = DeepRewiring([w], lr=0.25, betas=(0.0, 0.0), **path, **settings)

    def step(*gradient):
        w.grad = torch.tensor(gradient)
        optimizer.step()
        return w.tolist()

    return optimizer, step


@paths
def test_deep_by_hand(path):
    _, step = by_hand(path, l1=1.0, max_s=1.0)
    close = lambda numbers: pytest.approx(numbers, abs=1e-6)  # noqa: E731
    # |w| changes by -0.25 s sign(g), and by -0.25 l1; 4 and 5 flip and become dormant
    assert step(2.0, -2.0, 2.0, -2.0, 2.0, -2.0, 2.0, -3.0) == close([0.5, 1.0, -1.0, -0.5, 0, 0, 0, -0.25])
    # dormant ones feel neither the gradient nor the penalty
    assert step(-2.0, -2.0, 2.0, 2.0, -9.0, 9.0, -9.0, 3.0) == close([0.5, 1.0, -1.0, -0.5, 0, 0, 0, -0.25])


@paths
def test_soft_deep_by_hand(path):
    optimizer, step = by_hand(path, l1=1.0, max_s=1.0, soft=True)
    close = lambda numbers: pytest.approx(numbers, abs=1e-6)  # noqa: E731
    assert step(2.0, -2.0, 2.0, -2.0, 2.0, -2.0, 2.0, -3.0) == close([0.5, 1.0, -1.0, -0.5, 0, 0, 0, -0.25])
    theta = next(iter(optimizer.state.values()))["theta"]
    assert theta.tolist() == close([0.5, 1.0, 1.0, 0.5, -0.375, -0.375, 0, 0.25])
    step(-2.0, -2.0, 2.0, 2.0, -9.0, 9.0, -9.0, 3.0)
    assert theta.tolist() == close([0.5, 1.0, 1.0, 0.5, -0.375, -0.375, 0, 0.25])


@paths
def test_soft_deep_bounds_theta_from_below(path):
    """theta_min = -(T^2 / 2) max_s / (l1 (1 - max_s)); here -(0.04 / 2) * 0.75 / (0.5 * 0.25) = -0.12."""
    params = parameters()
    optimizer = DeepRewiring(params, lr=1.0, T=0.2, l1=0.5, max_s=0.75, soft=True, **path)
    train(optimizer, params, steps=10)
    lowest = min(float(optimizer.state[p]["theta"].min()) for p in params)
    assert lowest == pytest.approx(-0.12, rel=1e-6)
    # no bound without a penalty
    optimizer = DeepRewiring(params, lr=1.0, T=0.2, l1=0.0, max_s=0.75, soft=True, **path)
    train(optimizer, params, steps=10)
    assert min(float(optimizer.state[p]["theta"].min()) for p in params) < -0.2


@paths
@pytest.mark.parametrize("soft", [False, True])
def test_noise_has_the_scale_of_the_temperature(path, soft):
    """Each step adds T sqrt(eta_t) N, and eta_1 = lr / (1 - beta1) = 10 lr."""
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.cat([torch.full((40_000,), 5.0), torch.full((40_000,), -5.0)]))
    start = w.detach().clone()
    optimizer = DeepRewiring([w], lr=1e-3, T=0.5, l1=0.0, max_s=1.0, soft=soft, **path)
    w.grad = torch.zeros_like(w)
    optimizer.step()
    noise = w.detach() - start
    assert noise.std() == pytest.approx(0.5 * (10 * 1e-3) ** 0.5, rel=0.02)
    assert abs(noise.mean()) < 0.001


@paths
def test_hard_noise_moves_active_and_soft_noise_all_connections(path):
    def moved(soft):
        torch.manual_seed(0)
        w = torch.nn.Parameter(torch.tensor([1.0, -1.0] * 50))
        optimizer = DeepRewiring([w], lr=0.01, T=0.0, l1=0.0, max_s=1.0, soft=soft, **path)
        w.grad = torch.where(torch.arange(100) < 50, w.detach(), 0)
        for _ in range(150):  # lr * sign of the gradient: the first half is pruned
            optimizer.step()
        assert (w[:50] == 0).all()
        optimizer.param_groups[0]["T"] = 0.3
        for _ in range(20):
            w.grad = torch.zeros_like(w)
            optimizer.step()
        assert (w[50:].abs() != 1).all()
        return int((w[:50] != 0).sum())

    assert moved(soft=False) == 0
    assert moved(soft=True) > 5


@paths
def test_reactivation_brings_the_dormant_fraction_to_max_s(path):
    """In expectation: 30 000 of 40 000 dormant, max_s 0.6, so 6 000 +- 70 come back; at s * eps, active."""
    torch.manual_seed(0)
    signs = torch.where(torch.arange(40_000) % 2 == 0, 1.0, -1.0)
    w = torch.nn.Parameter(signs.clone())
    optimizer = DeepRewiring([w], lr=1e-4, l1=0.0, max_s=0.6, **path)
    w.grad = torch.zeros_like(w)
    optimizer.step()
    assert (w != 0).all()  # nothing is dormant: nothing happens
    w.data[:30_000] = 0
    w.grad = torch.zeros_like(w)
    optimizer.step()
    back = w.detach()[:30_000]
    assert int((back != 0).sum()) == pytest.approx(6_000, abs=5 * 70)
    assert torch.equal(back[back != 0], (signs[:30_000] * EPS)[back != 0])
    assert (back > 0).any()
    assert (back < 0).any()


@paths
def test_below_max_s_nothing_is_reactivated(path):
    w = torch.nn.Parameter(torch.ones(1000))
    optimizer = DeepRewiring([w], lr=1e-4, l1=0.0, max_s=0.6, **path)
    for dormant in (0, 600):
        w.data[:dormant] = 0
        w.grad = torch.zeros_like(w)
        optimizer.step()
        assert int((w == 0).sum()) == dormant


@paths
def test_connections_without_a_sign_do_not_spoil_the_fraction(path):
    """A weight that is 0 at first can never be active; the others make up for it."""
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.ones(40_000))
    w.data[:10_000] = 0
    optimizer = DeepRewiring([w], lr=1e-4, l1=0.0, max_s=0.5, **path)
    w.grad = torch.zeros_like(w)
    optimizer.step()
    w.data[:35_000] = 0
    optimizer.step()
    assert float((w == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert (w[:10_000] == 0).all()


@paths
def test_a_reactivated_connection_receives_gradient_and_grows(path):
    torch.manual_seed(0)
    signs = torch.where(torch.arange(1000) % 2 == 0, 1.0, -1.0)
    w = torch.nn.Parameter(signs.clone())
    optimizer = DeepRewiring([w], lr=0.01, l1=0.1, max_s=0.3, **path)
    w.grad = torch.zeros_like(w)
    optimizer.step()
    w.data.zero_()
    optimizer.step()
    active = w.detach() != 0
    assert 600 < int(active.sum()) < 800
    w.grad = -signs  # the loss wants every connection to grow
    optimizer.step()
    # eta_3 m / d, less the penalty of lr * l1: at least a tenth of lr
    assert (w.detach()[active].abs() > 1e-3).all()
    assert torch.equal(w.detach()[active].sign(), signs[active])


def test_an_eps_that_the_dtype_cannot_hold_is_refused():
    """1e-8 is 0 in float16: a connection re-activated there would not be active."""
    with pytest.raises(ValueError, match="eps=1e-08"):
        DeepRewiring([torch.zeros(3, dtype=torch.float16)], max_s=0.5)
    DeepRewiring([torch.zeros(3, dtype=torch.float16)], max_s=0.5, eps=1e-4)
    DeepRewiring([torch.zeros(3, dtype=torch.float16)], max_s=0.5, soft=True)


# -- long runs: does it rewire? ------------------------------------------------------------------

MAX_S = 0.5
FAULTS = ["re-activated ones are zeroed again", "re-activated at +eps whatever the sign", "no temperature"]


def long_run(fault=None, soft=False, **path):
    """600 steps towards random targets, as published or with one of the faults of the published implementation.

    Returns the mean dormant fraction per tensor over the last 300 steps, the share of weights at the end
    that are well above eps, the number of weights ever seen with a wrong sign, and the share of the
    connections dormant after 300 steps that were active at some later step.
    """
    torch.manual_seed(0)
    params = parameters(shapes=[(64, 64), (3000,)])
    targets = [torch.randn(p.shape) * 0.1 for p in params]
    signs = [p.detach().sign() for p in params]
    T = 0 if fault == "no temperature" else 0.05
    optimizer = DeepRewiring(params, lr=0.005, T=T, l1=0.3, max_s=MAX_S, soft=soft, **path)

    def fresh(p):
        return p.detach().abs() == torch.tensor(EPS)

    fractions, wrong_signs, dormant, back = [], 0, None, None
    for step in range(600):
        for p, target in zip(params, targets, strict=True):
            if fault == "re-activated ones are zeroed again":
                p.data[fresh(p)] = 0
            p.grad = p.detach() - target
        optimizer.step()
        for p, sign in zip(params, signs, strict=True):
            if fault == "re-activated at +eps whatever the sign":
                p.data[fresh(p)] = EPS
            wrong_signs += int((p.detach() * sign < 0).sum())
        if step == 299:
            dormant = [p.detach() == 0 for p in params]
            back = [torch.zeros_like(d) for d in dormant]
        if step >= 300:
            fractions.append([float((p == 0).float().mean()) for p in params])
            for b, d, p in zip(back, dormant, params, strict=True):
                b |= d & (p.detach() != 0)
    grown = sum(int((p.abs() > 1e-4).sum()) for p in params) / sum(p.numel() for p in params)
    came_back = sum(int(b.sum()) for b in back) / sum(int(d.sum()) for d in dormant)
    return torch.tensor(fractions).mean(0).tolist(), grown, wrong_signs, came_back


def rewires(fractions, grown, wrong_signs, came_back, soft):
    """What Deep R must do; soft Deep R has no bound on the dormant fraction, but noise must bring connections back."""
    if soft:
        return wrong_signs == 0 and came_back > 0.5
    return wrong_signs == 0 and grown > 0.4 and all(abs(f - MAX_S) < 0.005 for f in fractions)


@paths
@pytest.mark.parametrize("soft", [False, True])
def test_over_a_long_run_it_rewires(soft, path):
    assert rewires(*long_run(soft=soft, **path), soft)


@pytest.mark.parametrize(("fault", "soft"), list(zip(FAULTS, (False, False, True), strict=True)))
def test_the_long_run_tells_each_fault(fault, soft):
    assert not rewires(*long_run(fault, soft=soft, foreach=True), soft)


def test_a_device_without_float64_counts_in_float32(monkeypatch):
    """Apple's GPU is one. As many connections are re-activated."""
    assert deeprewire._wide(torch.device("mps")) == torch.float32
    assert deeprewire._wide(torch.device("cpu")) == deeprewire._wide(torch.device("cuda", 1)) == torch.float64
    found = []
    for dtype in (torch.float64, torch.float32):
        asked = []
        monkeypatch.setattr(deeprewire, "_wide", lambda device, dtype=dtype, asked=asked: asked.append(device) or dtype)
        torch.manual_seed(0)
        w = 0.01 * torch.randn(1000)
        optimizer = DeepRewiring([w], lr=0.1, l1=0.0, max_s=0.3, foreach=False)
        for _ in range(3):
            w.grad = torch.randn(1000)
            optimizer.step()
        assert asked == [torch.device("cpu")] * 3
        found.append(w)
    assert torch.equal(*found)
    assert 250 < int((found[0] == 0).sum()) < 350
