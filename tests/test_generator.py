"""The generator of DeepRewiring: who draws from it, and that it is saved, loaded and copied."""

import copy
import io
import pickle

import pytest
import torch
from optim_helpers import PATHS, VARIANTS, parameters, train

from deeprewire import DeepRewiring
from gradrewire import GradRewiring

variants = pytest.mark.parametrize("variant", ["deep", "soft deep"])
paths = pytest.mark.parametrize("path", PATHS)


def make(variant, params, seed=None, **settings):
    generator = {} if seed is None else {"generator": torch.Generator().manual_seed(seed)}
    return DeepRewiring(params, lr=0.01, **VARIANTS[variant][1], **settings, **generator)


def trained(variant, path, seed, default_seed=1, steps=10):
    params = parameters()
    train(make(variant, params, seed, **path), params, steps=steps, seed=default_seed)
    return params


def equal(params, others):
    return all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


# -- who draws from it -----------------------------------------------------------------------------


@variants
@paths
def test_all_random_numbers_come_from_the_generator(variant, path):
    params, others = parameters(), parameters()
    optimizer, other = make(variant, params, 3, **path), make(variant, others, 3, **path)
    before = torch.get_rng_state()
    gradients = torch.Generator().manual_seed(1)
    for _ in range(10):
        torch.rand(7)  # what else is drawn does not matter
        after = torch.get_rng_state()
        for p, q in zip(params, others, strict=True):
            p.grad = q.grad = torch.randn(p.shape, generator=gradients)
        optimizer.step()
        assert torch.equal(torch.get_rng_state(), after)
        other.step()
    assert not torch.equal(before, after)
    assert equal(params, others)
    assert not equal(params, trained(variant, path, seed=4))


@variants
@paths
def test_it_gives_the_numbers_of_a_default_generator_with_its_seed(variant, path):
    assert equal(trained(variant, path, seed=1), trained(variant, path, seed=None, default_seed=1))
    assert not equal(trained(variant, path, seed=2), trained(variant, path, seed=None, default_seed=1))


@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (6, 7)])
def test_strides_do_not_change_that(shape):
    runs = []
    for seed in (None, 1):
        weight = parameters(shapes=[shape])[0].detach().transpose(0, 1).clone(memory_format=torch.preserve_format)
        params = [torch.nn.Parameter(weight)]
        assert not params[0].is_contiguous()
        train(make("deep", params, seed), params)
        runs.append(params)
    assert equal(*runs)


@variants
@paths
def test_a_compiled_training_step_draws_from_it(variant, path):
    def run(decorate):
        params = parameters(shapes=[(5, 4), (3,)])
        optimizer = make(variant, params, 3, **path)

        def step():
            optimizer.zero_grad()
            sum(p.square().sum() for p in params).backward()
            optimizer.step()

        step = decorate(step)
        for _ in range(5):
            step()
        return params

    assert equal(run(lambda step: step), run(torch.compile(backend="eager")))


# -- what is accepted ------------------------------------------------------------------------------


@pytest.mark.parametrize("generator", [7, "cpu", torch.Generator, torch.default_generator.get_state()])
def test_what_is_no_generator_is_refused(generator):
    with pytest.raises(ValueError, match=r"generator=.* is not accepted: generator must be a torch.Generator or None"):
        DeepRewiring(parameters(), max_s=0.5, generator=generator)


class Elsewhere(torch.Generator):
    device = torch.device("cuda", 1)


def test_a_generator_on_another_device_is_refused_for_what_is_pruned():
    message = r"generator on cuda:1 is not accepted: a parameter is on cpu; use torch.Generator\('cpu'\)"
    with pytest.raises(ValueError, match=message):
        DeepRewiring(parameters(), max_s=0.5, generator=Elsewhere())
    DeepRewiring([{"params": parameters(), "prune": False}], max_s=0.5, generator=Elsewhere())


def test_an_optimizer_that_draws_nothing_takes_none():
    with pytest.raises(TypeError, match="GradRewiring takes no argument generator"):
        GradRewiring(parameters(), alpha=0, generator=torch.Generator())


# -- its state -------------------------------------------------------------------------------------


def through_a_file(state):
    """As torch.load takes it by default: plain data and tensors."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@variants
@paths
def test_a_loaded_state_goes_on_with_the_same_numbers(variant, path):
    params = parameters()
    optimizer = make(variant, [{"params": params[:2]}, {"params": params[2:]}], 3, **path)
    train(optimizer, params, steps=5)
    saved, weights = through_a_file(optimizer.state_dict()), [p.detach().clone() for p in params]
    others = [torch.nn.Parameter(w) for w in weights]
    other = make(variant, [{"params": others[:2]}, {"params": others[2:]}], 99, **path)
    other.load_state_dict(saved)
    assert all("generator" not in group for group in other.param_groups)
    for seed, (one, its) in ((2, (optimizer, params)), (3, (other, others))):
        torch.manual_seed(seed)
        gradients = torch.Generator().manual_seed(2)
        for _ in range(5):
            for p in its:
                p.grad = torch.randn(p.shape, generator=gradients)
            one.step()
    assert equal(params, others)


@variants
def test_the_saved_state_stays_as_it_was(variant):
    params = parameters()
    optimizer = make(variant, params, 3)
    saved = optimizer.state_dict()
    before = saved["param_groups"][0]["generator"].clone()
    train(optimizer, params, steps=2)
    assert torch.equal(saved["param_groups"][0]["generator"], before)
    optimizer.load_state_dict(saved)
    train(optimizer, params, steps=2)
    assert torch.equal(saved["param_groups"][0]["generator"], before)


def test_without_a_generator_the_state_is_that_of_before():
    assert "generator" not in make("deep", parameters()).state_dict()["param_groups"][0]


def test_a_state_without_that_of_a_generator_leaves_the_generator_alone():
    """An older one, or Adam's."""
    params = parameters()
    adam = torch.optim.Adam(params)
    for state in (make("deep", params).state_dict(), adam.state_dict()):
        optimizer = make("deep", params, 3)
        optimizer.load_state_dict(copy.deepcopy(state))
        assert torch.equal(optimizer.generator.get_state(), torch.Generator().manual_seed(3).get_state())


def test_grad_r_takes_the_state_of_deep_r_without_its_generator():
    params = parameters()
    deep = make("deep", params, 3)
    train(deep, params, steps=2)
    grad = GradRewiring(params, alpha=0)
    grad.load_state_dict(deep.state_dict())
    assert "generator" not in grad.state_dict()["param_groups"][0]
    train(grad, params, steps=2)


@pytest.mark.parametrize(
    ("seed", "state", "message"),
    [
        (None, lambda x: x, "construct this DeepRewiring with generator=, to load it"),
        (5, lambda x: x[:16], "the generator's state is not accepted by one on cpu: "),
        (5, lambda x: x.float(), "the generator's state is not accepted by one on cpu: "),
        (5, lambda x: 7, "the generator's state is not accepted by one on cpu: "),
    ],
)
def test_a_generator_state_that_cannot_be_loaded_is_one_error_before_anything_is_changed(seed, state, message):
    saved = make("deep", parameters(1), 3).state_dict()
    saved["param_groups"][0].update(lr=0.5, generator=state(saved["param_groups"][0]["generator"]))
    params = parameters()
    optimizer = make("deep", params, seed)
    train(optimizer, params, steps=2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message) as refusal:
        optimizer.load_state_dict(saved)
    assert len(str(refusal.value).splitlines()) == 1
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)


def test_a_state_that_is_refused_leaves_the_generator_alone():
    saved = make("deep", parameters(1), 3).state_dict()
    saved["param_groups"][0]["lr"] = -1.0
    optimizer = make("deep", parameters(), 5)
    with pytest.raises(ValueError, match=r"lr=-1\.0 is not accepted"):
        optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.generator.get_state(), torch.Generator().manual_seed(5).get_state())


# -- copies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("seed", [None, 3])
@variants
def test_a_copy_goes_on_by_itself_as_the_original_does(variant, seed, duplicate):
    params = parameters()
    optimizer = make(variant, params, seed)
    train(optimizer, params, steps=3)
    other = duplicate(optimizer)
    others = other.param_groups[0]["params"]
    assert (other.generator is None) == (seed is None)
    assert seed is None or other.generator is not optimizer.generator
    train(optimizer, params, steps=3, seed=2)
    train(other, others, steps=3, seed=2)
    assert equal(params, others)
