"""The state of the optimizers: settings that change, weights that others change, and what is loaded."""

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
from optim_helpers import PATHS, VARIANTS, parameters, train

import spiking_kernels
from deeprewire import DeepRewiring
from gradrewire import GradRewiring

variants = pytest.mark.parametrize("variant", ["grad", "deep", "soft deep"])
paths = pytest.mark.parametrize("path", PATHS)


def make(variant, params, **settings):
    optimizer_class, own = VARIANTS[variant]
    return optimizer_class(params, **{"lr": 0.01, **own, **settings})


def snapshot(optimizer, params):
    """Weights, state and settings, as copies."""
    states = [
        {key: value.clone() if torch.is_tensor(value) else value for key, value in optimizer.state.get(p, {}).items()}
        for p in params
    ]
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return [p.detach().clone() for p in params], states, settings


def assert_same(actual, expected):
    for p, q in zip(actual[0], expected[0], strict=True):
        assert torch.equal(p, q)
    for left, right in zip(actual[1], expected[1], strict=True):
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert torch.equal(value, right[key]) if torch.is_tensor(value) else value == right[key], key


# -- settings change between steps -----------------------------------------------------------------

# each setting in turn, on and off and on again
CHANGES = {
    "amsgrad": (False, True, False, True),
    "weight_decay": (0.0, 0.1, 0.0, 0.2),
    "maximize": (False, True, False, True),
    "betas": ((0.9, 0.999), (0.5, 0.9), [0.0, 0.0], (0.9, 0.99)),
    "eps": (1e-8, 1e-3, 1e-8, 1e-2),
    "lr": (0.01, torch.tensor([0.02], dtype=torch.float64), torch.tensor(0.03, dtype=torch.float64), 0.0),
    "capturable": (False, True, False, True),
    "alpha": (0.1, 0.0, 0.2, 1e-9),
    "s": (0.9, 0.5, 0.99, 0.9),
    "plain_gradient": (False, True, False, True),
    "T": (0.0, 0.1, 0.0, 0.02),
    "l1": (0.01, 0.0, 0.1, 0.01),
    "max_s": (0.2, 1.0, 0.0, 0.5),
    "soft": (False, True, False, True),
}
CASES = [
    (variant, setting)
    for variant in ("grad", "deep", "soft deep")
    for setting in CHANGES
    if setting in VARIANTS[variant][0]([torch.zeros(1)], **VARIANTS[variant][1]).defaults
]


def changing(variant, setting, path, **settings):
    params = parameters()
    params[0].data[0, :5] = 0
    optimizer = make(variant, params, **path, **settings)
    for number, value in enumerate(CHANGES[setting]):
        optimizer.param_groups[0][setting] = value
        train(optimizer, params, steps=4, seed=number)
    return params, optimizer


@pytest.mark.parametrize(("variant", "setting"), CASES)
def test_all_paths_follow_a_setting_that_changes(variant, setting):
    results = [
        snapshot(*reversed(changing(variant, setting, path))) for path in (dict(foreach=False), dict(foreach=True))
    ]
    assert_same(*results)
    constant = make(variant, unchanged := parameters(), foreach=False)
    unchanged[0].data[0, :5] = 0
    for number in range(4):
        train(constant, unchanged, steps=4, seed=number)
    if variant != "soft deep" or setting != "max_s":  # with this T, theta stays above any bound
        assert not torch.equal(unchanged[0], results[0][0][0]) or setting == "capturable"


@pytest.mark.skipif(spiking_kernels.unavailable() is not None, reason="no fused kernels")
@pytest.mark.parametrize(("variant", "setting"), CASES)
def test_the_kernels_follow_a_setting_that_changes(variant, setting):
    if setting in ("T", "max_s"):
        pytest.skip("its random numbers are other ones")
    random = {} if variant == "grad" else dict(T=0.0, max_s=1.0)
    plain, fused = (changing(variant, setting, path, **random) for path in (dict(foreach=False), dict(fused=True)))
    for p, q in zip(plain[0], fused[0], strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-6)
        for key, value in plain[1].state[p].items():
            torch.testing.assert_close(fused[1].state[q][key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("setting", ["amsgrad", "weight_decay", "maximize", "betas", "eps", "lr"])
@pytest.mark.parametrize("foreach", [False, True])
def test_settings_change_as_those_of_adam_do(setting, foreach):
    ours = [torch.nn.Parameter(10 + p.detach().double()) for p in parameters()]
    adams = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    first = {"amsgrad": True} if setting == "amsgrad" else {}  # Adam needs its maximum from the first step on
    optimizer = GradRewiring(ours, lr=0.01, alpha=0, foreach=foreach, **first)
    adam = torch.optim.Adam(adams, lr=0.01, foreach=False, **first)
    for number, value in enumerate(reversed(CHANGES[setting])):
        for one in (optimizer, adam):
            one.param_groups[0][setting] = value.squeeze() if torch.is_tensor(value) else value
        train(optimizer, ours, steps=4, seed=number)
        train(adam, adams, steps=4, seed=number)
    for p, q in zip(ours, adams, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=0)


@paths
def test_amsgrad_that_is_turned_on_takes_the_maximum_from_then_on(path):
    w = torch.nn.Parameter(torch.ones(4))
    optimizer = GradRewiring([w], lr=0.01, alpha=0, betas=(0.9, 0.5), **path)
    seen = []
    for step, gradient in enumerate([100.0, 1.0, 1.0, 5.0, 1.0, 1.0]):
        optimizer.param_groups[0]["amsgrad"] = step >= 2
        w.grad = torch.full((4,), gradient)
        optimizer.step()
        seen.append(optimizer.state[w]["exp_avg_sq"].clone())
        if step >= 2:
            expected = torch.stack(seen[2:]).amax(0)
            torch.testing.assert_close(optimizer.state[w]["max_exp_avg_sq"], expected, rtol=1e-6, atol=0)


@paths
def test_soft_deep_r_that_was_hard_begins_at_the_weights_of_now(path):
    params = parameters()
    optimizer = DeepRewiring(params, lr=0.01, l1=0.1, max_s=1.0, soft=True, **path)
    group = optimizer.param_groups[0]
    train(optimizer, params, steps=10)
    group["soft"] = False
    train(optimizer, params, steps=10)
    assert "theta" not in optimizer.state[params[0]]
    group.update(soft=True, lr=0.0)
    hard = [p.detach().clone() for p in params]
    train(optimizer, params, steps=1)
    for p, q in zip(params, hard, strict=True):
        assert torch.equal(p, q)


@paths
@pytest.mark.parametrize(
    ("variant", "setting", "value", "message"),
    [
        ("grad", "lr", float("nan"), "lr=nan is not accepted"),
        ("grad", "lr", torch.tensor([-1.0]), "lr=-1.0 is not accepted"),
        ("grad", "lr", torch.ones(2), "one real element"),
        ("grad", "betas", (0.9, 1.0), r"betas\[1\]=1.0 is not accepted"),
        ("grad", "s", None, "s=None is not accepted"),
        ("grad", "amsgrad", 1, "amsgrad=1 is not accepted"),
        ("deep", "max_s", 1.5, "max_s=1.5 is not accepted"),
        ("deep", "eps", 0.0, "eps=0.0 is not accepted"),
        ("soft deep", "soft", None, "soft=None is not accepted"),
    ],
)
def test_a_setting_that_is_not_accepted_ends_the_step_before_it_begins(variant, setting, value, message, path):
    params = parameters()
    optimizer = make(variant, [{"params": params[:2]}, {"params": params[2:]}], **path)
    train(optimizer, params, steps=2)
    before = snapshot(optimizer, params)
    optimizer.param_groups[1][setting] = value
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert_same(snapshot(optimizer, params), before)


@variants
@paths
def test_parameters_are_checked_again_only_after_a_change_that_matters(variant, path, monkeypatch):
    """A scheduler that changes numbers in every step costs no check of every weight."""
    params = parameters()
    optimizer = make(variant, params, **path)
    group, checked, check = optimizer.param_groups[0], [], optimizer._check_param
    monkeypatch.setattr(optimizer, "_check_param", lambda *a: checked.append(1) or check(*a))
    number = {"grad": "alpha"}.get(variant, "l1")
    for change, expected in (
        ({}, 4),
        ({}, 0),
        ({"lr": 0.02}, 0),
        ({number: 0.2, "betas": (0.8, 0.9)}, 0),
        ({"amsgrad": True}, 4),
        ({"eps": 1e-5}, 4),
        ({"capturable": True}, 4),
        ({"prune": False}, 4),
        ({"prune": True}, 4),
        ({"lr": torch.tensor(0.01)}, 0),
    ):
        group.update(change)
        checked.clear()
        train(optimizer, params, steps=1)
        assert len(checked) == expected, change


# -- weights that others change --------------------------------------------------------------------

MASTERED = ["grad", "soft deep"]  # theta holds the weights
still = dict(lr=0.0)  # a step that changes no weight by itself


@paths
@pytest.mark.parametrize("variant", MASTERED)
def test_load_parameters_takes_the_weights_as_they_are(variant, path):
    params = parameters()
    optimizer = make(variant, params, lr=0.05, **path)
    best = [p.detach().clone() for p in params]
    train(optimizer, params, steps=20)
    optimizer.param_groups[0].update(still)
    trained = [p.detach().clone() for p in params]
    assert (params[0] == 0).any()
    with torch.no_grad():
        for p, b in zip(params, best, strict=True):
            p.copy_(b)
    train(optimizer, params, steps=1)
    assert torch.equal(params[0], trained[0])  # theta holds: this is what the method is for
    with torch.no_grad():
        for p, b in zip(params, best, strict=True):
            p.copy_(b)
    optimizer.load_parameters()
    train(optimizer, params, steps=1)
    for p, b in zip(params, best, strict=True):
        assert torch.equal(p, b)
        assert torch.equal(optimizer.state[p]["theta"], b.abs())


@variants
@paths
def test_load_parameters_changes_nothing_where_nothing_was_changed(variant, path):
    runs = []
    for loads in (False, True):
        params = parameters()
        params[0].data[0, :5] = 0
        optimizer = make(variant, params, **path)
        if loads:
            optimizer.load_parameters()  # no state yet
        for step in range(20):
            train(optimizer, params, steps=1, seed=step)
            if loads:
                optimizer.load_parameters()
        runs.append(snapshot(optimizer, params))
    assert_same(*runs)


@variants
@paths
def test_load_parameters_takes_new_signs_and_keeps_those_of_zeros(variant, path):
    w = torch.nn.Parameter(torch.tensor([1.0, -1.0, 0.0, 0.5, -0.5, 0.0]))
    optimizer = make(variant, [w], T=0.0, max_s=1.0, **path) if variant[0] != "g" else make(variant, [w], **path)
    w.grad = torch.ones(6)
    optimizer.step()
    state = optimizer.state[w]
    addresses = {key: value.data_ptr() for key, value in state.items()}
    moments = state["exp_avg"].clone(), state["exp_avg_sq"].clone(), state["step"].clone()
    if "theta" in state:
        state["theta"][4] = -0.25
    changed = torch.tensor([-2.0, 3.0, -4.0, 0.0, 0.0, 0.0])
    w.data.copy_(changed)
    optimizer.load_parameters()
    assert state["sign"].tolist() == [-1, 1, -1, 1, -1, 0]
    if "theta" in state:
        assert state["theta"].tolist() == [2.0, 3.0, 4.0, 0.0, -0.25, 0.0]
    assert {key: value.data_ptr() for key, value in state.items()} == addresses  # a CUDA graph goes on
    assert torch.equal(state["exp_avg"], moments[0])
    assert torch.equal(state["exp_avg_sq"], moments[1])
    assert state["step"] == moments[2]
    optimizer.param_groups[0].update(still)
    w.grad = torch.ones(6)
    optimizer.step()
    assert torch.equal(w, changed)


@variants
@paths
def test_a_row_of_sign_0_never_comes_back(variant, path):
    params = parameters()
    optimizer = make(variant, params, **path)
    train(optimizer, params, steps=5)
    with torch.no_grad():
        params[0][3] = 0
    optimizer.state[params[0]]["sign"][3] = 0
    optimizer.load_parameters()
    other = (params[0][4] != 0).clone()
    for step in range(20):
        train(optimizer, params, steps=1, seed=step)
        assert (params[0][3] == 0).all()
    assert other.any()


@variants
@paths
def test_a_row_that_is_only_zeroed_may_come_back_with_its_signs(variant, path):
    params = parameters()
    optimizer = make(variant, params, **path)
    train(optimizer, params, steps=5)
    sign = optimizer.state[params[0]]["sign"][3].clone()
    with torch.no_grad():
        params[0][3] = 0
    optimizer.load_parameters()
    back = torch.zeros(20, dtype=torch.bool)
    for step in range(20):
        train(optimizer, params, steps=1, seed=step)
        back |= params[0][3] != 0
        assert ((params[0][3] == 0) | (params[0][3].sign() == sign)).all()
    assert back.any()


# -- the state of another optimizer ----------------------------------------------------------------

ADAMS = {
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01, betas=(0.8, 0.99)),
    "Adam with amsgrad": lambda params: torch.optim.Adam(params, lr=0.01, amsgrad=True),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.3),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=0.01),
    "RAdam": lambda params: torch.optim.RAdam(params, lr=0.01),
}


@variants
@paths
@pytest.mark.parametrize("adam", ADAMS)
def test_adams_moments_are_taken_and_the_rest_begins_from_the_weights(variant, path, adam):
    params = parameters()
    dense = ADAMS[adam](params)
    train(dense, params, steps=10)
    optimizer = make(variant, params, lr=0.0, **path)
    settings = copy.deepcopy({key: value for key, value in optimizer.param_groups[0].items() if key != "params"})
    optimizer.load_state_dict(copy.deepcopy(dense.state_dict()))
    assert {key: value for key, value in optimizer.param_groups[0].items() if key != "params"} == settings
    for p in params:
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[p][key], dense.state[p][key])
        assert optimizer.state[p]["step"] == 10
    trained = [p.detach().clone() for p in params]
    train(optimizer, params, steps=1)
    for p, q in zip(params, trained, strict=True):
        assert torch.equal(p, q)
        state = optimizer.state[p]
        assert state["step"] == 11
        assert torch.equal(state["sign"], q.sign().to(torch.int8))
        assert "theta" not in state or torch.equal(state["theta"], q.abs())
    optimizer.param_groups[0]["lr"] = 0.01
    train(optimizer, params, steps=10)
    assert (params[0] == 0).any()
    restored = make(variant, parameters(), **path)
    restored.load_state_dict(optimizer.state_dict())  # what is then saved is loaded as ever
    assert restored.state[restored.param_groups[0]["params"][0]]["step"] == 21


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("how", ["state_dict", "state of each parameter"])
def test_pruning_goes_on_as_adam_would_have(foreach, how):
    """Without a prior and sign flips, the weights are those of an Adam that was never changed."""
    ours = [torch.nn.Parameter(10 + p.detach().double()) for p in parameters()]
    adams = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    first, second = torch.optim.Adam(ours, lr=0.01), torch.optim.Adam(adams, lr=0.01)
    train(first, ours, steps=20)
    train(second, adams, steps=20)
    optimizer = GradRewiring(ours, lr=0.01, alpha=0, foreach=foreach)
    if how == "state_dict":
        optimizer.load_state_dict(first.state_dict())
    else:
        for p in ours:
            optimizer.state[p] = dict(first.state[p])
    train(optimizer, ours, steps=20, seed=2)
    train(second, adams, steps=20, seed=2)
    for p, q in zip(ours, adams, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=0)


@pytest.mark.parametrize("soft", [False, True])
def test_one_method_goes_on_where_the_other_was(soft):
    """Signs are those of before: begun from the weights, what is pruned could never come back."""
    params = parameters()
    grad = make("grad", params)
    train(grad, params, steps=20)
    before = snapshot(grad, params)
    optimizer = DeepRewiring(params, lr=0.01, l1=0.01, max_s=0.1, T=0.02, soft=soft)
    optimizer.load_state_dict(grad.state_dict())
    assert optimizer.param_groups[0]["l1"] == 0.01
    assert (params[0] == 0).sum() > 10
    train(optimizer, params, steps=1)
    for p, old in zip(params, before[1], strict=True):
        assert torch.equal(optimizer.state[p]["sign"], old["sign"])
        assert ("theta" in optimizer.state[p]) == soft


def test_an_optimizer_without_any_state_can_be_loaded():
    params = parameters()
    sgd = torch.optim.SGD(params, lr=0.1)
    train(sgd, params, steps=2)
    optimizer = make("grad", params)
    optimizer.load_state_dict(sgd.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.01
    train(optimizer, params, steps=2)
    assert optimizer.state[params[0]]["step"] == 2


def of(optimizer_class, **settings):
    def state(params):
        other = optimizer_class(params, lr=0.01, **settings)
        train(other, params, steps=2)
        return other.state_dict()

    return state


def own(*change):
    """The state dict of a GradRewiring, with one entry set, or deleted where the value is None."""

    def state(params):
        other = make("grad", params)
        train(other, params, steps=2)
        saved = copy.deepcopy(other.state_dict())
        *place, key, value = change
        part = saved
        for name in place:
            part = part[name]
        if value is None:
            del part[key]
        else:
            part[key] = value(part[key]) if callable(value) else value
        return saved

    return state


LACKS = "step, exp_avg, exp_avg_sq"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            of(torch.optim.SGD, momentum=0.9),
            f"parameter 0 of group 0 .* has momentum_buffer, but lacks {LACKS}: it is not",
        ),
        (of(torch.optim.RMSprop), "has step, square_avg, but lacks exp_avg, exp_avg_sq"),
        (of(torch.optim.Adagrad), "has step, sum, but lacks exp_avg, exp_avg_sq"),
        (of(torch.optim.Adamax), "but lacks exp_avg_sq"),
        (of(torch.optim.Adam, maximize=True), "maximize=True, this optimizer has False"),
        (own("state", 0, "exp_avg", None), "has step, exp_avg_sq, sign, theta, but lacks exp_avg"),
        (own("state", 0, "step", None), "but lacks step"),
        (own("state", 2, "sign", None), "parameter 2 of group 0 .* but lacks sign"),
        (
            own("state", 1, "theta", lambda t: t[:1]),
            r"theta has the shape \[1, 3, 3, 3\], the parameter \[6, 3, 3, 3\]",
        ),
        (own("state", 1, "exp_avg", lambda t: t.to_sparse()), "exp_avg is not a dense tensor"),
        (own("state", 1, "exp_avg", 3.0), "exp_avg is not a dense tensor"),
        (own("state", 0, "sign", lambda t: t * 2), "sign has other values than -1, 0 and 1"),
        (own("state", 0, "step", torch.tensor(float("nan"))), "step is nan, not a number of steps"),
        (own("state", 0, "step", torch.tensor(-1.0)), "step is -1.0, not a number of steps"),
        (own("state", 0, "step", torch.ones(2)), "not one number"),
        (own("state", 0, [1, 2]), "it is a list, not a dictionary"),
        (own("param_groups", 0, "s", None), r"param_groups\[0\] is not accepted: it lacks s"),
        (own("param_groups", 0, "lr", float("nan")), "lr=nan is not accepted"),
        (own("param_groups", 0, "alpha", -1.0), "alpha=-1.0 is not accepted"),
        (own("param_groups", 0, "params", [0, 1]), "doesn't match the size"),
        (own("param_groups", []), "different number of parameter groups"),
    ],
)
def test_what_cannot_be_loaded_is_one_error_before_anything_is_changed(state, message):
    saved = state(parameters(1))
    params = parameters()
    optimizer = make("grad", params)
    train(optimizer, params, steps=3)
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    after = snapshot(optimizer, params)
    assert_same(after, before)
    assert after[2] == before[2]
    train(optimizer, params, steps=1)


def test_a_refusal_names_the_parameter():
    layer = torch.nn.Linear(3, 2)
    optimizer = GradRewiring(list(layer.named_parameters()), alpha=0)
    saved = torch.optim.Adam(layer.parameters()).state_dict()
    saved["state"] = {1: {"step": torch.tensor(1.0)}}
    with pytest.raises(
        ValueError, match=r"parameter 1 of group 0 \(bias\) is not accepted: it has step, but lacks exp_avg"
    ):
        optimizer.load_state_dict(saved)


# -- what else is in the state, and weights that are cast ------------------------------------------


@variants
@paths
def test_foreign_entries_are_left_alone(variant, path):
    """Wrappers keep some in the state of a parameter, before or after its first step, or beside the parameters."""
    params, others = parameters(), parameters()
    optimizer, plain = make(variant, params, **path), make(variant, others, **path)
    optimizer.state[params[0]]["slow_weights"] = params[0].detach().t().clone()
    optimizer.state["calls"] = 3
    train(optimizer, params, steps=3)
    optimizer.state[params[1]]["calls"] = 7
    train(optimizer, params, steps=3, seed=2)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    optimizer.load_parameters()
    train(optimizer, params, steps=3, seed=3)
    for seed, steps in ((1, 3), (2, 3), (3, 3)):
        train(plain, others, steps=steps, seed=seed)
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
    assert optimizer.state[params[0]]["slow_weights"].shape == (20, 30)
    assert optimizer.state[params[1]]["calls"] == 7
    assert optimizer.state["calls"] == 3


NUMBERS = {
    "lr": 0.01,
    "betas": (0.9, 0.99),
    "eps": 1e-3,
    "weight_decay": 0.1,
    "alpha": 0.1,
    "s": 0.9,
    "T": 0.02,
    "l1": 0.01,
    "max_s": 0.6,
}


@variants
@paths
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("number", [np.float32, np.float16, lambda x: Fraction(x).limit_denominator(1000)])
def test_numbers_of_other_types_are_those_numbers(variant, path, later, number):
    """They are not the precision of what is computed with them, and a saved state holds none of them."""
    runs = []
    for of in (lambda x: float(number(x)), number):
        params = parameters(shapes=[(3, 4), (2,)])
        optimizer = make(variant, params, **path)
        settings = {key: value for key, value in NUMBERS.items() if key in optimizer.defaults}
        settings = {key: tuple(map(of, v)) if isinstance(v, tuple) else of(v) for key, v in settings.items()}
        if later:
            optimizer.param_groups[0].update(settings)
        else:
            optimizer = make(variant, params, **path, **settings)
        train(optimizer, params, steps=4)
        assert all(type(optimizer.param_groups[0][key]) in (float, tuple) for key in settings)
        assert all(type(beta) is float for beta in optimizer.param_groups[0]["betas"])
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        assert torch.equal(p, q)


@variants
@paths
@pytest.mark.parametrize("lr", [torch.tensor([0.5]), torch.tensor([[0.5]], dtype=torch.float64), torch.tensor(0.5)])
def test_a_learning_rate_of_one_element_is_a_number(variant, path, lr):
    runs = []
    for rate in (0.5, lr):
        params = parameters(shapes=[(), (1,), (3, 4)])
        optimizer = make(variant, params, lr=rate, **path)
        train(optimizer, params, steps=5)
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        assert p.shape == q.shape
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-7)


@variants
@paths
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_state_follows_weights_that_are_cast(variant, path, dtype, monkeypatch):
    """As a state dict does that is loaded for weights of another dtype."""
    monkeypatch.setattr("rewiring._compiled", lambda update: update)
    params = parameters()
    optimizer = make(variant, params, eps=1e-4, **path)
    train(optimizer, params, steps=5)
    others = [torch.nn.Parameter(p.detach().to(dtype)) for p in params]
    other = make(variant, others, eps=1e-4, **path)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p in params:
        p.data = p.data.to(dtype)
    train(optimizer, params, steps=5, seed=2)
    train(other, others, steps=5, seed=2)
    assert_same(snapshot(optimizer, params), snapshot(other, others))
    assert optimizer.state[params[0]]["exp_avg"].dtype == dtype


@paths
def test_a_state_that_was_cast_follows_its_weight(path):
    params, others = parameters(), parameters()
    optimizer, plain = make("grad", params, **path), make("grad", others, **path)
    train(optimizer, params, steps=3)
    train(plain, others, steps=3)
    for state in optimizer.state.values():
        state.update(exp_avg=state["exp_avg"].double(), sign=state["sign"].float(), step=float(state["step"]))
    train(optimizer, params, steps=3)
    train(plain, others, steps=3)
    assert_same(snapshot(optimizer, params), snapshot(plain, others))


@variants
@paths
def test_weights_of_another_shape_are_one_error_before_anything_is_changed(variant, path):
    params = parameters()
    optimizer = make(variant, params, **path)
    train(optimizer, params, steps=2)
    params[3].data = torch.ones(9)
    params[3].grad = torch.ones(9)
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=r"parameter 3 of group 0 .* has the shape \[7\], the parameter \[9\]"):
        optimizer.step()
    params[3].grad = None
    params[3].data = before[0][3]
    assert_same(snapshot(optimizer, params), before)
