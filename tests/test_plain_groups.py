"""Groups with prune=False: the weights of torch.optim.Adam, to the bit, beside groups that are pruned."""

import copy
import math

import pytest
import torch
from optim_helpers import VARIANTS, parameters, train

from deeprewire import DeepRewiring
from gradrewire import GradRewiring

KINDS = ["grad", "deep", "soft deep"]
variants = pytest.mark.parametrize("variant", KINDS)


def make(variant, params, **settings):
    optimizer_class, own = VARIANTS[variant]
    return optimizer_class(params, **{"lr": 0.01, **own, **settings})


def gradients(steps, seed=0):
    """Of the parameters of optim_helpers, for so many steps."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(p.shape, generator=generator) for p in parameters()] for _ in range(steps)]


def take(optimizers, params, steps, seed=0):
    torch.manual_seed(seed)
    for gradient in gradients(steps, seed):
        for p, g in zip(params, gradient, strict=True):
            p.grad = g.clone()
        for optimizer in optimizers:
            optimizer.step()


SETTINGS = [
    {},
    dict(weight_decay=0.1, maximize=True),
    dict(amsgrad=True, betas=(0.5, 0.9), eps=1e-4),
    dict(lr=torch.tensor(0.02, dtype=torch.float64)),
]


@variants
@pytest.mark.parametrize("execution", [{}, dict(foreach=False), dict(foreach=True), dict(fused=True)])
@pytest.mark.parametrize("settings", SETTINGS)
def test_one_optimizer_is_adam_and_the_pruning_one_to_the_bit(variant, execution, settings):
    if "lr" in settings and execution.get("foreach"):
        execution = dict(foreach=False)  # as Adam asks for
    apart, together = parameters(), parameters()
    plain = {"params": together[2:], "prune": False, "weight_decay": 0.2, **settings, **execution}
    both = make(variant, [{"params": together[:2]}, plain])
    alone = make(variant, apart[:2])
    adam = torch.optim.Adam(apart[2:], **{"lr": 0.01, "weight_decay": 0.2, **settings}, **execution)
    take([both], together, 20)
    take([alone, adam], apart, 20)
    for p, q in zip(together, apart, strict=True):
        assert torch.equal(p, q)
    assert (together[0] == 0).any()
    assert not (together[3] == 0).any()
    for p, q in zip(together[2:], apart[2:], strict=True):
        assert both.state[p].keys() == adam.state[q].keys()
        assert all(torch.equal(both.state[p][key], value) for key, value in adam.state[q].items())
        assert all(both.state[p][key].device == value.device for key, value in adam.state[q].items())


@pytest.mark.parametrize("cls", [GradRewiring, DeepRewiring])
@pytest.mark.parametrize("setting", ["alpha", "s", "l1", "max_s", "T", "soft", "plain_gradient"])
def test_a_plain_group_needs_no_settings_of_pruning_and_checks_none(cls, setting):
    params = parameters()
    optimizer = cls([{"params": params, "prune": False, setting: "nonsense"}])
    take([optimizer], params, 2)
    optimizer.param_groups[0]["prune"] = True
    with pytest.raises(ValueError, match="is not accepted"):
        optimizer.step()


@pytest.mark.parametrize("cls", [GradRewiring, DeepRewiring])
@pytest.mark.parametrize(("setting", "bad"), [("lr", -1.0), ("betas", (0.9, 1.0)), ("eps", math.nan), ("prune", 1)])
def test_what_adam_takes_is_checked(cls, setting, bad):
    with pytest.raises(ValueError, match=setting):
        cls([{"params": parameters(), "prune": False, setting: bad}])


@variants
def test_a_group_that_is_pruned_later_begins_from_its_weights(variant):
    params = parameters()
    optimizer = make(variant, params)
    group = optimizer.param_groups[0]
    take([optimizer], params, 20)
    assert (params[0] == 0).any()
    group["prune"] = False
    take([optimizer], params, 2, seed=1)
    assert not (params[0] == 0).any()  # Adam moves all of them
    assert optimizer.state[params[0]].keys() == {"step", "exp_avg", "exp_avg_sq"}
    weights = [p.detach().clone() for p in params]
    moments = optimizer.state[params[0]]["exp_avg"].clone()
    group.update(prune=True, lr=0.0)
    optimizer.load_parameters()  # changes nothing: there is no sign yet
    take([optimizer], params, 1, seed=2)
    for p, w in zip(params, weights, strict=True):
        assert torch.equal(p, w)
        assert torch.equal(optimizer.state[p]["sign"], w.sign().to(torch.int8))
        assert "theta" not in optimizer.state[p] or torch.equal(optimizer.state[p]["theta"], w.abs())
    assert optimizer.state[params[0]]["step"] == 23
    assert not torch.equal(optimizer.state[params[0]]["exp_avg"], moments)


@variants
def test_load_parameters_leaves_a_group_that_was_just_made_plain(variant):
    params = parameters()
    optimizer = make(variant, params)
    take([optimizer], params, 3)
    optimizer.param_groups[0]["prune"] = False
    before = copy.deepcopy(dict(optimizer.state[params[0]]))
    params[0].data.neg_()
    optimizer.load_parameters()
    assert all(torch.equal(optimizer.state[params[0]][key], value) for key, value in before.items())


@variants
def test_a_parameter_that_moves_to_another_group(variant):
    params = parameters()
    optimizer = make(variant, [{"params": params[:2]}, {"params": params[2:], "prune": False}])
    take([optimizer], params, 10)
    pruned, plain = optimizer.param_groups
    plain["params"].append(pruned["params"].pop(0))
    pruned["params"].append(plain["params"].pop(0))
    take([optimizer], params, 1, seed=1)
    assert optimizer.state[params[0]].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert "sign" in optimizer.state[params[2]]
    assert optimizer.state[params[0]]["step"] == optimizer.state[params[2]]["step"] == 11


@variants
def test_a_state_dict_keeps_what_is_pruned(variant):
    params, others = parameters(), parameters()

    def both(params):
        return make(variant, [{"params": params[:2]}, {"params": params[2:], "prune": False}])

    optimizer = both(params)
    take([optimizer], params, 5)
    copied = make(variant, [{"params": others[:2]}, {"params": others[2:]}])
    for p, q in zip(others, params, strict=True):
        p.data.copy_(q)
    copied.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [group["prune"] for group in copied.param_groups] == [True, False]
    take([optimizer], params, 5, seed=1)
    take([copied], others, 5, seed=1)
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


@variants
def test_a_state_from_before_there_was_the_setting_is_pruned(variant):
    params = parameters()
    optimizer = make(variant, params)
    train(optimizer, params, steps=2)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["prune"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["prune"] is True
    assert "sign" in optimizer.state[params[0]]


@variants
def test_the_moments_of_one_adam_go_on_in_both_groups(variant):
    params, others = parameters(), parameters()
    adam = torch.optim.Adam(params, lr=0.01)
    take([adam], params, 5)
    groups = [{"params": params[:2]}, {"params": params[2:], "prune": False}]
    optimizer = make(variant, groups)
    adam_groups = torch.optim.Adam([{"params": params[:2]}, {"params": params[2:]}], lr=0.01)
    adam_groups.load_state_dict({**adam_groups.state_dict(), "state": adam.state_dict()["state"]})
    optimizer.load_state_dict(copy.deepcopy(adam_groups.state_dict()))
    assert [group["prune"] for group in optimizer.param_groups] == [True, False]
    theirs = torch.optim.Adam(others, lr=0.01)
    take([theirs], others, 5)
    take([optimizer], params, 5, seed=1)
    take([theirs], others, 5, seed=1)
    for p, q in zip(params[2:], others[2:], strict=True):
        assert torch.equal(p, q)
    assert (params[0] != others[0]).any()


@variants
@pytest.mark.parametrize("foreach", [False, True])
def test_a_compiled_step_updates_both_groups(variant, foreach):
    torch._dynamo.reset()
    runs = []
    for compiled in (False, True):
        params = parameters(shapes=[(30, 20), (20,)])
        plain = {"params": params[1:], "prune": False}
        optimizer = make(variant, [{"params": params[:1]}, plain], foreach=foreach)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        for _ in range(4):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            step()
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        assert torch.equal(p, q)
    torch._dynamo.reset()
