"""What is tried out before a GPU trains with it: it is compared with the plain step, and nothing but it is left."""

import copy
import random
import re

import pytest
import torch
from test_models import spiking_mnist
from test_step import batches, optimizers_of

import rewiring
from deeprewire import DeepRewiring
from gradrewire import GradRewiring
from training.first_step import Saved, difference, try_out
from training.step import TrainingStep

CPU = torch.device("cpu")
NOISY = dict(cls=DeepRewiring, T=0.01)


def make(seed=0, **settings):
    """A step with random numbers in it, and all that it changes."""
    torch.manual_seed(seed)
    network = spiking_mnist(4, "m")
    return TrainingStep(network, optimizers_of(network, **settings), "fp32", CPU, graph=False)


def tensors_of(step):
    return [*step.parameters, *step.network.buffers(), step.finite.first, step.finite.steps]


def saved(step):
    return Saved(tensors_of(step), step.optimizers, CPU)


def everything(step):
    """All that a step changes, as plain data that can be compared."""
    states = [copy.deepcopy(optimizer.state_dict()["state"]) for optimizer in step.optimizers]
    return [tensor.clone() for tensor in tensors_of(step)], states, torch.get_rng_state()


def assert_same(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


def tried(step, fast, images, labels):
    return try_out(lambda: step(images, labels), fast, saved(step), step.parameters)


@pytest.mark.parametrize("settings", [{}, NOISY], ids=["grad", "deep with noise"])
@pytest.mark.parametrize("before", [0, 3])
def test_what_a_step_changed_comes_back(settings, before):
    step = make(**settings)
    data = batches(before + 1, (5, 1, 28, 28))
    for batch in data[:before]:
        step(*batch)
    here, held = everything(step), saved(step)
    places = [t.data_ptr() for o in step.optimizers for s in o.state.values() for t in s.values()]
    step(*data[-1])
    first = everything(step)
    assert not torch.equal(first[0][0], here[0][0])
    held.restore()
    assert_same(everything(step), here)
    # into the same memory, which a captured graph goes on with
    assert [t.data_ptr() for o in step.optimizers for s in o.state.values() for t in s.values()] == places
    step(*data[-1])
    assert_same(everything(step), first)


def test_state_that_is_no_tensor_comes_back():
    step = make()
    step(*batches(1, (5, 1, 28, 28))[0])
    (state, *_) = step.optimizers[0].state.values()
    state["own"] = 1
    held = saved(step)
    state["own"], state["other"] = 2, torch.ones(1)
    held.restore()
    assert (state["own"], "other" in state) == (1, False)


@pytest.mark.parametrize("cls", [GradRewiring, DeepRewiring])
@pytest.mark.parametrize("before", [0, 3])
def test_a_step_by_another_way_that_does_the_same_is_kept(cls, before, monkeypatch):
    """Here the compiled update, with the same random numbers."""
    compile = torch.compile
    monkeypatch.setattr("rewiring.spiking_kernels", None)
    monkeypatch.setattr("rewiring.torch.compile", lambda update, **_: compile(update, backend="eager"))
    rewiring._compiled.cache_clear()
    step = make(cls=cls)
    *earlier, (images, labels) = batches(before + 1, (5, 1, 28, 28))
    for batch in earlier:
        step(*batch)
    random_before, calls = random.getstate(), []

    def fast():
        for group in step.optimizers[0].param_groups:
            group["fused"] = True
        calls.append(step(images, labels))
        return calls[-1]

    taken, flaw = tried(step, fast, images, labels)
    rewiring._compiled.cache_clear()
    assert flaw is None
    assert taken is calls[0]
    assert len(calls) == 1
    assert int(step.finite.steps) == before + 1
    assert {int(state["step"]) for state in step.optimizers[0].state.values()} == {before + 1}
    assert random.getstate() == random_before


def wrong_ways(step, images, labels):
    def with_rate(factor):
        (group,) = step.optimizers[0].param_groups
        group["lr"] *= factor
        try:
            return step(images, labels)
        finally:
            group["lr"] /= factor

    def failing():
        step(images, labels)  # all is changed already
        raise RuntimeError("no kernel\nfor this")

    def not_a_number():
        loss, right = step(images, labels)
        return loss * float("nan"), right

    return {
        "nothing is done": (lambda: (step.expected, torch.tensor(0)), "100 % of the weights differ"),
        "half of the rate": (lambda: with_rate(0.5), "% of the weights differ"),
        "a little less of the rate": (lambda: with_rate(0.97), "% of the weights differ"),
        "another batch": (lambda: step(images.flip(3), labels), "its loss is|% of the weights differ"),
        "twice": (lambda: step(images, labels) and step(images, labels), "its loss is|% of the weights differ"),
        "it fails": (failing, "RuntimeError: no kernel for this"),
        "nan": (not_a_number, "its loss is nan, not"),
    }


@pytest.mark.parametrize("wrong", wrong_ways(None, None, None))
@pytest.mark.parametrize("settings", [{}, NOISY], ids=["grad", "deep with noise"])
def test_after_a_step_that_does_something_else_the_plain_one_is_left(wrong, settings):
    first, (images, labels) = batches(2, (5, 1, 28, 28))
    plain = make(**settings)
    plain(*first)
    expected_taken = plain(images, labels)
    expected = everything(plain)
    step = make(**settings)
    step(*first)
    step.expected = expected_taken[0]
    fast, message = wrong_ways(step, images, labels)[wrong]
    taken, flaw = tried(step, fast, images, labels)
    assert re.search(message, flaw), flaw
    assert "\n" not in flaw
    assert_same(everything(step), expected)
    assert_same(taken, expected_taken)


def test_no_room_is_no_flaw():
    """The run ends with the line that tells what needs less memory."""
    step = make()
    images, labels = batches(1, (5, 1, 28, 28))[0]

    def fast():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        tried(step, fast, images, labels)


def test_a_step_that_diverges_plainly_too_is_left_to_the_check_for_finite_numbers():
    nan, weights = float("nan"), torch.ones(20, dtype=torch.float64)
    assert difference((nan, 0), (nan, 0), weights, weights * nan, weights * nan) is None
    assert difference((nan, 0), (nan, 0), weights, weights * nan, weights) is not None
    assert difference((1.0, 0), (nan, 0), weights, weights, weights) is not None


def test_few_weights_may_differ_and_rounding_is_none():
    before = torch.linspace(-1, 1, 1000, dtype=torch.float64)
    after, found = before + 1e-3, before + 1e-3
    assert difference((1.0, 0), (1.0, 0), before, after, found) is None
    found = after * (1 + torch.finfo(torch.float32).eps) + 1e-6  # a thousandth of the change
    assert difference((1.0, 0), (1.0 + 1e-6, 3), before, after, found) is None
    found[:99] += 1  # whose gradients are sums that cancel
    assert difference((1.0, 0), (1.0, 0), before, after, found) is None
    found[:101] += 1
    assert difference((1.0, 0), (1.0, 0), before, after, found) == "10 % of the weights differ"
    assert difference((1.0, 0), (1.02, 0), before, after, after) == "its loss is 1.02, not 1"
