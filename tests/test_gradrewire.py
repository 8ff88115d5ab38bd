"""GradRewiring against reference trajectories, a step worked by hand, and Adam."""

import math

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

from gradrewire import GradRewiring

trajectories = pytest.mark.parametrize("name", ["default", "noprior", "s_half", "strong", "wd_ams"])


@trajectories
@pytest.mark.parametrize("path", PATHS)
def test_golden_trajectory(golden, name, path):
    error, differing_zeros = golden_errors(golden(f"optim_grad_{name}.npz"), **path)
    assert error <= TRAJECTORY_BOUND
    assert differing_zeros == 0


@trajectories
def test_golden_trajectory_with_other_rounding(golden, name):
    """In float64: the rounding that is farthest from float32's."""
    error, differing_zeros = golden_errors(golden(f"optim_grad_{name}.npz"), dtype=torch.float64)
    assert error <= TRAJECTORY_BOUND
    assert differing_zeros == 0


@trajectories
@pytest.mark.parametrize("wrong", [*WRONG, "plain gradient"])
def test_the_golden_trajectory_tells_a_wrong_optimizer(golden, name, wrong):
    change = WRONG.get(wrong, lambda settings: dict(plain_gradient=True))
    assert_a_wrong_trajectory_is_told(golden(f"optim_grad_{name}.npz"), change)


@pytest.mark.parametrize("foreach", [False, True])
def test_two_steps_by_hand(foreach):
    """With beta1 = beta2 = 0, eps = 0 and a gradient g, Adam's change is lr * sign(g): numbers for the head.

    lr = 0.25, alpha = 1, s = 0.75: mu = ln(0.5) = -0.69, so the prior takes 0.25 from theta while
    theta > -0.69 and gives 0.25 to it below.
    """
    w = torch.nn.Parameter(torch.tensor([1.0, 1.0, -1.0, -1.0, 0.125, -0.125, 0.0, -0.75]))
    optimizer = GradRewiring([w], lr=0.25, betas=(0.0, 0.0), eps=0.0, alpha=1.0, s=0.75, foreach=foreach)

    def step(*gradient):
        w.grad = torch.tensor(gradient)
        optimizer.step()
        return w.tolist(), optimizer.state[w]["theta"].tolist()

    # theta changes by -0.25 s sign(g), and by -0.25 from the prior
    weights, theta = step(2.0, -2.0, 2.0, -2.0, 2.0, -2.0, 2.0, -3.0)
    assert theta == [0.5, 1.0, 1.0, 0.5, -0.375, -0.375, 0.0, 0.25]
    assert weights == [0.5, 1.0, -1.0, -0.5, 0.0, 0.0, 0.0, -0.25]
    # pruned connections feel the gradient: 4 regrows by 0.25 less 0.25 of the prior, 5 goes below mu
    weights, theta = step(2.0, -2.0, 2.0, -2.0, -2.0, -2.0, 2.0, -3.0)
    assert theta == [0.0, 1.0, 1.0, 0.0, -0.375, -0.875, 0.0, -0.25]
    assert weights == [0.0, 1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    # below mu the prior pushes back: 5 gets +0.25 from it and +0.25 from the gradient
    weights, theta = step(2.0, -2.0, 2.0, -2.0, -2.0, 2.0, 2.0, 3.0)
    assert theta == [-0.5, 1.0, 1.0, -0.5, -0.375, -0.375, 0.0, -0.25]


def test_the_prior_is_off_up_to_eps():
    runs = []
    for alpha, s in ((0.0, None), (1e-3, 0.9), (1.1e-3, 0.9)):
        params = parameters()
        train(GradRewiring(params, lr=0.1, eps=1e-3, alpha=alpha, s=s), params, steps=5)
        runs.append(params[0].detach())
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("settings", [{}, dict(weight_decay=0.1), dict(amsgrad=True, betas=(0.8, 0.9))])
@pytest.mark.parametrize("foreach", [False, True])
def test_without_prior_and_sign_flips_it_is_adam(settings, foreach):
    ours = [torch.nn.Parameter(10 + p.detach().double()) for p in parameters()]
    adams = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    train(GradRewiring(ours, lr=0.01, alpha=0, foreach=foreach, **settings), ours, steps=50)
    train(torch.optim.Adam(adams, lr=0.01, **settings), adams, steps=50)
    for p, q in zip(ours, adams, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=0)
        assert (p != 10).all()


def test_the_gradient_of_a_pruned_connection_regrows_it():
    w = torch.nn.Parameter(torch.tensor([1e-3, -1e-3]))
    optimizer = GradRewiring([w], lr=0.01, alpha=0)
    w.grad = torch.tensor([1.0, -1.0])
    optimizer.step()
    assert w.tolist() == [0.0, 0.0]
    for _ in range(30):
        w.grad = torch.tensor([-1.0, 1.0])
        optimizer.step()
    assert w[0] > 0 > w[1]


@pytest.mark.parametrize("path", PATHS)
def test_the_plain_gradient_is_that_of_connected_weights(path):
    """It equals Grad R on gradients that were masked by hand, in every path, and differs from Grad R on all."""
    settings = dict(lr=0.01, alpha=0.3, s=0.9, weight_decay=0.1)
    plain, masked, redefined = parameters(), parameters(), parameters()
    ours = GradRewiring(plain, plain_gradient=True, **settings, **path)
    theirs, others = (GradRewiring(params, **settings, **path) for params in (masked, redefined))
    for step in range(40):
        generator = torch.Generator().manual_seed(step)
        for p, q, r in zip(plain, masked, redefined, strict=True):
            gradient = torch.randn(p.shape, generator=generator)
            p.grad, q.grad, r.grad = gradient.clone(), gradient * (q.detach() != 0), gradient
        for optimizer in (ours, theirs, others):
            optimizer.step()
    assert 0 < (plain[0] == 0).sum() < plain[0].numel()
    for p, q in zip(plain, masked, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(ours.state[p]["theta"], theirs.state[q]["theta"])
    assert not torch.equal(plain[0], redefined[0])


def test_without_the_redefined_gradient_a_pruned_connection_stays_pruned():
    w = torch.nn.Parameter(torch.tensor([1e-3, -1e-3]))
    optimizer = GradRewiring([w], lr=0.01, alpha=0, plain_gradient=True)
    for gradient in [[1.0, -1.0]] + 30 * [[-1.0, 1.0]]:
        w.grad = torch.tensor(gradient)
        optimizer.step()
        assert w.tolist() == [0.0, 0.0]


def test_the_plain_gradient_is_off_in_what_was_saved_before_there_was_one():
    optimizer = GradRewiring(parameters(), alpha=0)
    state = optimizer.__getstate__()
    for group in state["param_groups"]:
        del group["plain_gradient"]
    optimizer.__setstate__(state)
    assert optimizer.param_groups[0]["plain_gradient"] is False


def test_a_plain_gradient_that_is_no_bool_is_refused():
    with pytest.raises(ValueError, match="plain_gradient=1 is not accepted"):
        GradRewiring(parameters(), alpha=0, plain_gradient=1)


@pytest.mark.parametrize("s", [0.5, 0.75, 0.95])
def test_the_prior_alone_settles_theta_at_mu(s):
    """Without a gradient theta walks to mu = ln(2 (1 - s)) / alpha, where the prior changes sign."""
    alpha = 10.0
    w = torch.nn.Parameter(torch.full((4,), 0.05))
    optimizer = GradRewiring([w], lr=1e-3, alpha=alpha, s=s)
    for _ in range(100):
        w.grad = torch.zeros(4)
        optimizer.step()
    mu = math.log(2 * (1 - s)) / alpha
    assert (optimizer.state[w]["theta"] - mu).abs().max() <= 10e-3 * 1.01  # one step of lr * alpha


# -- settings in tensors, which a captured graph reads anew -----------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("path", PATHS)
def test_a_tensor_gives_the_weights_of_its_number(path, dtype):
    """To the bit, in whatever order the prior comes and goes; the tensors keep their values."""
    # numbers that float32 holds, so that both dtypes mean the same
    values = [(0.25, 0.0), (0.0625, 0.5), (0.03125, 0.0), (0.125, 2.0**-30), (0.25, 0.125), (0.25, 1e-9)]
    values = [tuple(torch.tensor(x, dtype=torch.float32).item() for x in pair) for pair in values] * 2
    runs = []
    for tensors in (False, True):
        params = parameters()
        settings = {key: torch.tensor(0.5, dtype=dtype) if tensors else 0.5 for key in ("lr", "alpha")}
        optimizer = GradRewiring(params, s=0.9, betas=(0.5, 0.75), **settings, **path)
        (group,) = optimizer.param_groups
        for lr, alpha in values:
            if tensors:
                group["lr"].fill_(lr)
                group["alpha"].fill_(alpha)
            else:
                group.update(lr=lr, alpha=alpha)
            train(optimizer, params, steps=3)
        runs.append([*params, *(optimizer.state[p]["theta"] for p in params)])
        assert float(group["alpha"]) == values[-1][1]
    assert any((p == 0).any() for p in runs[0][: len(params)])
    for number, tensor in zip(*runs, strict=True):
        assert torch.equal(tensor, number)


def test_a_tensor_of_one_element_may_have_axes():
    params = parameters()
    optimizer = GradRewiring(params, alpha=torch.full((1, 1), 0.5), s=0.9)
    train(optimizer, params, steps=2)
    assert [p.shape for p in params] == [p.shape for p in parameters()]


@pytest.mark.parametrize(
    ("alpha", "s", "message"),
    [
        (torch.tensor(0.0), None, "s=None is not accepted"),  # it may be any number later
        (torch.tensor(-1.0), 0.9, "alpha=-1.0 is not accepted"),
        (torch.tensor(math.nan), 0.9, "alpha=nan is not accepted"),
        (torch.ones(2), 0.9, "alpha=.*a tensor of one real element"),
        (torch.tensor(1j), 0.9, "alpha=.*a tensor of one real element"),
    ],
)
def test_a_tensor_that_is_no_penalty_is_refused(alpha, s, message):
    with pytest.raises(ValueError, match=message):
        GradRewiring(parameters(), alpha=alpha, s=s)


def test_what_a_tensor_holds_is_not_asked_in_a_step():
    """It would wait for the device; here it cannot be had."""
    params = [torch.nn.Parameter(torch.ones(3, 2, device="meta"))]
    optimizer = GradRewiring(params, alpha=0.5, s=0.9, foreach=True, capturable=True)
    for key in ("lr", "alpha"):
        optimizer.param_groups[0][key] = torch.tensor(0.5, dtype=torch.float64, device="meta")
    optimizer._accept_group = lambda group, wait: None  # which refuses a tensor of no value
    for _ in range(3):
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()
