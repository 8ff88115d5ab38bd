"""The proof that the fused kernel computes what MnistNet's layers do: each thing that it assumes, changed in turn."""

import copy
import gc
import itertools
import re
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from spikingjelly.activation_based import layer, neuron, surrogate
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode

import measuring
import spiking_kernels
from mnist.model import MnistNet
from spiking import LIFNode, lif
from spiking_kernels import Unfit, build, products, proof
from training.step import TrainingStep

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    spiking_kernels.unavailable() is not None, reason=f"no fused kernels: {spiking_kernels.unavailable()}"
)


def small(T=5, hidden=24, classes=10, step_mode="m") -> MnistNet:
    """A MnistNet with fewer neurons, all of which spike; whole multiples of 1/16, so that no sum rounds."""
    network, generator = MnistNet(T, step_mode), torch.Generator().manual_seed(0)
    network.static_fc[1] = nn.Linear(16, hidden, bias=False)
    network.fc[1] = layer.Linear(hidden, classes, bias=False, step_mode=step_mode)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(torch.randint(-8, 13, weight.shape, generator=generator) / 16)
    return network


def images_of(n=6):
    return torch.randint(0, 4, (n, 1, 4, 4), generator=torch.Generator().manual_seed(1)).float()


def accepted(monkeypatch, name):
    """A list that grows with each call that a kernel does not refuse."""
    calls, kernel = [], getattr(spiking_kernels, name)

    def counted(*arguments):
        found = kernel(*arguments)
        calls.append(1)
        return found

    monkeypatch.setattr(spiking_kernels, name, counted)
    return calls


@pytest.fixture
def calls(monkeypatch):
    return accepted(monkeypatch, "lif_linear_lif")


def results(network, fused, images=None):
    """Spike counts, gradients of images and weights, and spikes of every neuron, of one batch; or what is raised."""
    network.fused, images = fused, images_of() if images is None else images
    images = images.clone().requires_grad_(images.is_floating_point())
    try:
        with measuring.SpikeCounter(network) as spikes, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            counts = network(images)
        found = {"counts": counts.detach(), **spikes._counts}
        if counts.requires_grad:
            for parameter in network.parameters():
                parameter.grad = None
            (counts * torch.arange(counts.numel()).view_as(counts)).sum().backward()
            found |= {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
            found["images"] = images.grad
        return found
    except Exception as error:
        return {"error": (type(error), str(error))}


def assert_same(plain, fused):
    assert plain.keys() == fused.keys()
    for name, value in plain.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name != "counts":
            bound = 1e-5 * float(value.nan_to_num().abs().max())  # the sums of a gradient have another order
            torch.testing.assert_close(fused[name], value, rtol=1e-5, atol=bound, equal_nan=True, msg=name)
        else:
            assert torch.equal(value, fused[name]) if isinstance(value, torch.Tensor) else value == fused[name], name


@pytest.mark.parametrize("T", [1, 4, 255])
@pytest.mark.parametrize(("hidden", "classes"), [(24, 10), (1, 1), (65, 17), (800, 10)])
def test_the_kernel_runs_the_papers_layers_of_every_size(hidden, classes, T, calls):
    network = small(T, hidden, classes)
    plain = results(network, False)
    assert calls == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused = results(network, True)
    assert calls == [1]
    assert_same(plain, fused)
    assert plain["fc.0"].shape == (hidden,)
    assert T == 1 or hidden == 1 or (plain["counts"].sum() > 0 and plain["images"].abs().sum() > 0)


def set_both(key, value):
    def change(network):
        for node in (network.fc[0], network.fc[2]):
            setattr(node, key, value)

    return change


def set_node(place, key, value):
    return lambda network: setattr(network.fc[place], key, value)


def set_surrogate(place, made):
    return lambda network: setattr(network.fc[place], "surrogate_function", made())


def replace(place, made):
    return lambda network: network.fc.__setitem__(place, made().to(torch.float32))


def insert(place, made):
    return lambda network: network.fc.insert(place, made())


class Noisy(LIFNode):
    def multi_step_forward(self, x_seq):
        return super().multi_step_forward(x_seq * 1.5)


class Doubling(nn.Sequential):
    def forward(self, x):
        return super().forward(2 * x)


class DoublingLinear(layer.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def with_bias(network):
    network.fc[1] = layer.Linear(24, 10, bias=True, step_mode="m")
    with torch.no_grad():
        network.fc[1].weight.copy_(small().fc[1].weight)
        network.fc[1].bias.fill_(0.5)


def with_constant_bias(network):
    """No parameter, but an attribute of that name, as torch.nn.functional.linear takes it."""
    del network.fc[1].bias
    network.fc[1].bias = torch.full((10,), 0.5)


def one_neuron_twice(network):
    network.fc[1] = layer.Linear(24, 24, bias=False, step_mode="m")
    nn.init.constant_(network.fc[1].weight, 0.125)
    network.fc[2] = network.fc[0]


def rest_at(value):
    def change(network):
        network.fc[2].set_reset_value("v", value)

    return change


def potentials_from_static(network):
    """The first layer leaves potentials in the neurons that follow."""
    network.static_fc[1].register_forward_hook(lambda m, i, o: setattr(network.fc[0], "v", torch.full_like(o, 0.75)))


def attributes_in_another_dictionary(network):
    node = network.fc[0]
    node.__dict__ = node.__dict__ | {"tau": 4.0}


def hooks_in_another_dictionary(network):
    """In which there is none when the kernel looks for the first time."""
    network.fc[1]._forward_hooks = type(network.fc[1]._forward_hooks)()
    network.fused = True
    network(images_of())
    network.fc[1]._forward_hooks[0] = lambda module, inputs, output: output * 2


# What is changed, by a name: what the network computes is otherwise then, so that the kernel must not run.
CHANGES = {
    **{f"tau {place}": set_node(place, "tau", 4.0) for place in (0, 2)},
    **{f"v_threshold {place}": set_node(place, "v_threshold", 0.75) for place in (0, 2)},
    **{f"v_reset {place}": set_node(place, "v_reset", 0.25) for place in (0, 2)},
    **{f"soft reset {place}": set_node(place, "v_reset", None) for place in (0, 2)},
    **{f"decay_input {place}": set_node(place, "decay_input", False) for place in (0, 2)},
    **{f"detach_reset {place}": set_node(place, "detach_reset", False) for place in (0, 2)},
    **{f"alpha {place}": set_surrogate(place, lambda: surrogate.ATan(alpha=3.0)) for place in (0, 2)},
    **{f"surrogate {place}": set_surrogate(place, lambda: surrogate.Sigmoid(alpha=2.0)) for place in (0, 2)},
    **{f"not spiking {place}": set_surrogate(place, lambda: surrogate.ATan(spiking=False)) for place in (0, 2)},
    "rest": rest_at(0.5),
    "potentials": potentials_from_static,
    "another class of neuron": replace(0, lambda: neuron.IFNode(detach_reset=True, step_mode="m")),
    "a subclass of the neuron": replace(0, lambda: Noisy(surrogate_function=surrogate.ATan(), step_mode="m")),
    "no neuron": lambda network: network.fc.__delitem__(2),
    "one neuron twice": one_neuron_twice,
    "a bias": with_bias,
    "a bias that is no parameter": with_constant_bias,
    "a surrogate beside the registered one": lambda network: network.fc[0].__dict__.update(
        surrogate_function=surrogate.Sigmoid()
    ),
    "a layer more": insert(1, lambda: nn.AvgPool1d(3, 1, 1)),
    "dropout": lambda network: network.fc.insert(1, layer.Dropout(0.9, step_mode="m")),
    "a layer last": lambda network: network.fc.append(nn.Hardtanh(0, 0.5)),
    "a subclass of the linear layer": lambda network: network.fc.__setitem__(
        1, DoublingLinear(24, 10, bias=False, step_mode="m").requires_grad_()
    ),
    "a subclass of the sequence": lambda network: setattr(network, "fc", Doubling(*network.fc)),
    "a forward of its own": lambda network: setattr(
        network.fc[1], "forward", lambda x: 2 * nn.Linear.forward(network.fc[1], x)
    ),
    "a step of its own": lambda network: setattr(network.fc[0], "multi_step_forward", lambda x: (x > 1).float()),
    "a spiking of its own": lambda network: setattr(network, "spiking", lambda x: network.fc(2 * x)),
    "a readout of its own": lambda network: setattr(network, "readout", lambda counts: 2 * counts),
    **{
        f"a hook that changes what leaves fc.{place}": lambda network, place=place: network.fc[
            place
        ].register_forward_hook(lambda module, inputs, output: output * 2)
        for place in (0, 1, 2)
    },
    "a hook that changes what enters": lambda network: network.fc[1].register_forward_pre_hook(
        lambda m, i: (i[0] * 2,)
    ),
    "a hook of the sequence": lambda network: network.fc.register_forward_hook(lambda m, i, o: o * 2),
    "a hook with keywords": lambda network: network.fc[0].register_forward_hook(
        lambda m, a, k, o: o * 2, with_kwargs=True
    ),
    "a backward hook": lambda network: network.fc[1].register_full_backward_hook(lambda m, i, o: (i[0] * 2,)),
    "a backward pre-hook": lambda network: network.fc[1].register_full_backward_pre_hook(lambda m, o: (o[0] * 2,)),
    "pruned by torch": lambda network: prune.random_unstructured(network.fc[1], "weight", 0.5),
    "a parametrisation": lambda network: parametrizations.weight_norm(network.fc[1]),
    "weights that are not finite": lambda network: network.fc[1].weight.data.__setitem__((0, 0), torch.inf),
    "attributes in another dictionary": attributes_in_another_dictionary,
    "hooks in another dictionary": hooks_in_another_dictionary,
}
# These compute the same; how the kernel would take part in them, nobody has to find out.
OTHERS = {
    "a hook of a surrogate": lambda n: n.fc[0].surrogate_function.register_forward_hook(lambda m, i, o: o * 2),
    "store_v_seq": set_both("store_v_seq", True),
    "a subclass that changes nothing": lambda network: setattr(network, "__class__", type("Mine", (MnistNet,), {})),
    "compiled layer": lambda network: setattr(network.fc[0], "_compiled_call_impl", None),
    "a tensor that is equal": set_both("tau", torch.tensor(2.0)),
    "double": lambda network: network.double(),
    "bfloat16": lambda network: network.bfloat16(),
    "float16": lambda network: network.half(),
}


@pytest.mark.parametrize("change", [*CHANGES, *OTHERS])
def test_a_change_of_the_layers_changes_the_result_with_and_without_the_kernel(change, calls):
    network = small()
    before = results(network, False)
    assert_same(before, results(network, True))  # what was proven of the network as it was does not hold any more
    assert calls == [1]
    (CHANGES | OTHERS)[change](network)
    calls.clear()
    images = images_of().to(network.static_fc[1].weight.dtype)
    torch.manual_seed(0)
    plain = results(network, False, images)
    torch.manual_seed(0)
    fused = results(network, True, images)
    assert calls == []
    assert "error" not in plain
    assert_same(plain, fused)
    if change in CHANGES:
        with pytest.raises(AssertionError):  # the kernel's result would be another one
            assert_same(before, plain)


@pytest.mark.parametrize(
    "change",
    [
        set_node(0, "_neuron_precision", (torch.bfloat16, "fp32", "fp32")),  # which SpikingJelly has on CUDA only
        lambda network: network.fc[1].float().to(torch.float64),
    ],
)
def test_what_the_layers_refuse_the_kernel_does_not_accept(change, calls):
    network = small()
    change(network)
    plain, fused = results(network, False), results(network, True)
    assert calls == []
    assert plain["error"] == fused["error"]


@pytest.mark.parametrize("change", [*CHANGES, *OTHERS])
def test_one_line_says_why_the_plain_layers_run(change):
    network = small()
    network.fused = True
    (CHANGES | OTHERS)[change](network)
    images = images_of().to(network.static_fc[1].weight.dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        network(images)
        network(images)
    caught = [warning for warning in caught if "runs its plain layers, not the fused kernel: " in str(warning.message)]
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert len(str(caught[0].message)) < 200


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("tau 0", "fc.0 has tau 4.0, not 2.0"),
        ("soft reset 2", "fc.2 has v_reset None, not 0.0"),
        ("alpha 0", "fc.0.surrogate_function has alpha 3.0, not 2.0"),
        ("a bias", "fc.1 has the parameters weight, bias, not weight"),
        ("a bias that is no parameter", "fc.1 has a bias of its own"),
        ("no neuron", "fc has 2 layers, not 3"),
        ("a hook of the sequence", "fc has hooks"),
        ("a forward of its own", "fc.1 has a forward of its own"),
        (
            "another class of neuron",
            "fc.0 is a spikingjelly.activation_based.neuron.integrate_and_fire.IFNode, not a spiking.LIFNode",
        ),
        ("double", "current is torch.float64, not torch.float32"),
        ("weights that are not finite", "weight is not finite"),
    ],
)
def test_the_reason_names_what_is_otherwise(change, reason):
    network = small()
    (CHANGES | OTHERS)[change](network)
    network.fused = True
    with pytest.warns(UserWarning, match=f" plain layers, not the fused kernel: {re.escape(reason)}$"):
        network(images_of().to(network.static_fc[1].weight.dtype))


def changes_nothing(network):
    """Nothing that the layers compute: numbers of another type, hooks that are gone, names of the user's own."""
    network.fc[0].tau, network.fc[2].v_reset, network.fc[0].decay_input = 2, 0, 1
    network.fc[1].register_full_backward_hook(lambda *_: None).remove()
    network.fc[0].register_forward_hook(lambda *_: None).remove()
    network.fc[1].register_state_dict_pre_hook(lambda *_: None)
    network.fc[0].note = network.note = "mine"
    network.fc.eval()
    network.static_fc[1].register_forward_hook(lambda m, i, o: 2 * o)
    network.static_fc.append(nn.Threshold(0.5, 0.0))
    network.extra = nn.Linear(2, 2)
    network.fc[0].v = torch.ones(3)


def test_what_changes_nothing_leaves_the_kernel_at_work(calls):
    network = small()
    changes_nothing(network)
    assert_same(results(network, False), results(network, True))
    assert calls == [1]


@pytest.mark.parametrize("trainable", ["neither", "static_fc", "fc"])
def test_weights_that_need_no_gradient(trainable, calls):
    network = small().requires_grad_(False)
    if trainable != "neither":
        getattr(network, trainable).requires_grad_()
    assert_same(results(network, False), results(network, True))
    assert calls == [1]


def test_a_tensor_in_two_places_gets_the_gradient_of_both(calls):
    network = small(hidden=16, classes=16)
    network.static_fc[1].weight = network.fc[1].weight
    plain, fused = results(network, False), results(network, True)
    assert calls == [1]
    assert_same(plain, fused)
    assert len(list(network.parameters())) == 1


def test_parts_that_take_turns_are_compared_in_full_once(monkeypatch):
    """And what they were compared with is not kept for that."""
    compared, in_full = [], proof._difference
    monkeypatch.setattr(proof, "_difference", lambda *given: compared.append(given[2]) or in_full(*given))
    network, like, layer = small(), small(), nn.Linear(2, 2)
    free = proof.SIZES | {"_warned", "spike_counts"}
    for _ in range(3):
        for part in ("fc", "static_fc"):
            assert proof.difference(getattr(network, part), getattr(like, part), part, free) is None
    assert [name for name in compared if "." not in name] == ["fc", "static_fc"]
    other = nn.Linear(2, 2)
    assert proof.difference(layer, other, "layer") is None
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None


# -- a whole training step -----------------------------------------------------------------------


@pytest.fixture
def learned(monkeypatch):
    return accepted(monkeypatch, "lif_linear_lif_learn")


def learnt(network, fused, precision="fp32"):
    """Loss, correct predictions and gradients of a training step of one batch; or what is raised."""
    network.fused, images = fused, images_of().to(network.static_fc[1].weight.dtype)
    for parameter in network.parameters():
        parameter.grad = None
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss, right = TrainingStep(network, [], precision, CPU, graph=False)(images, torch.arange(6) % 5)
        found = {"loss": loss, "right": right}
        return found | {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    except Exception as error:
        return {"error": (type(error), str(error))}


@pytest.mark.parametrize("T", [1, 4, 255])
@pytest.mark.parametrize(("hidden", "classes"), [(24, 10), (65, 17), (800, 10)])
def test_a_step_by_the_kernel_is_that_of_the_layers_at_every_size(hidden, classes, T, learned, calls):
    network = small(T, hidden, classes)
    network.note, network.fc[0].tau = "mine", 2
    plain = learnt(network, False)
    assert learned == []
    fused = learnt(network, True)
    assert (learned, calls) == ([1], [])
    assert_same(plain, fused)
    assert {"loss", "right", "static_fc.1.weight", "fc.1.weight"} == fused.keys()
    assert all(T == 1 or value.abs().sum() > 0 for value in fused.values())
    assert not any(value.requires_grad for value in fused.values())


def test_a_step_after_potentials_were_left_behind(learned):
    """Which a forward pass would reset, so that one runs."""
    network = small()
    plain = learnt(network, False)
    network.fc[0].v = torch.ones(3)
    assert_same(plain, learnt(network, True))
    assert learned == []
    assert network.fc[0].v == 0.0
    assert_same(plain, learnt(network, True))
    assert learned == [1]


@pytest.mark.parametrize("transposed", [False, True])
def test_a_step_has_bitwise_the_gradients_of_the_kernels_and_autograd(monkeypatch, transposed):
    """The sums of the currents are exact, in any order; all others round."""
    torch.manual_seed(0)
    network, images, labels = MnistNet(8), torch.randint(-3, 4, (128, 1, 28, 28)).float(), torch.arange(128) % 10
    with torch.no_grad():
        network.static_fc[1].weight.mul_(64).round_().div_(64)
    steps, layouts = [], []
    kernel = spiking_kernels.lif_linear_lif_learn
    monkeypatch.setattr(
        spiking_kernels, "lif_linear_lif_learn", lambda x, *more: layouts.append(x.is_contiguous()) or kernel(x, *more)
    )
    monkeypatch.setattr(products, "transposed_is_faster", lambda *sizes: transposed)
    network.fused = True
    for gradients in (MnistNet.fused_gradients, lambda *batch: None):
        monkeypatch.setattr(MnistNet, "fused_gradients", gradients)
        loss, right = TrainingStep(network, [], "fp32", CPU, graph=False)(images, labels)
        steps.append([right, *(parameter.grad for parameter in network.parameters()), loss])
    assert layouts == [not transposed]
    assert all(torch.equal(one, other) for one, other in zip(steps[0][:-1], steps[1][:-1], strict=True))
    torch.testing.assert_close(steps[0][-1], steps[1][-1], rtol=1e-6, atol=0)  # the loss is a sum in another order
    assert all(value.abs().sum() > 0 for value in steps[0])


def test_the_transposed_product_is_taken_where_it_is_faster_and_the_same(monkeypatch):
    now, rounds = 0.0, 0
    monkeypatch.setattr(products, "time", SimpleNamespace(perf_counter=lambda: now))

    def lasting(*seconds, numbers=(0.0, 0.0)):
        turns = itertools.cycle(seconds)

        def function():
            nonlocal now, rounds
            now, rounds = now + next(turns), rounds + 1
            return torch.tensor(numbers)

        return function

    assert products.clearly_faster(lasting(0.0009), lasting(0.001))
    assert rounds == 2 * (1 + 20)
    assert products.clearly_faster(lasting(0.9), lasting(1.0))
    assert rounds == 2 * (1 + 20) + 2 * (1 + 3)  # large ones
    assert products.clearly_faster(lasting(0.9, 1.5), lasting(1.0, 1.2))  # what else runs takes time now and then
    assert not products.clearly_faster(lasting(0.97), lasting(1.0))
    assert not products.clearly_faster(lasting(1.0), lasting(0.9))
    assert not products.clearly_faster(lasting(0.1, numbers=(0.0, 1e-30)), lasting(1.0))


@pytest.mark.parametrize("transposed", [False, True])
def test_the_product_is_that_of_a_linear_layer(monkeypatch, transposed):
    """It draws no random numbers that others would draw, and tries both ways once for all calls of some sizes."""
    asked = []
    monkeypatch.setattr(products, "clearly_faster", lambda *ways: asked.append(ways) or transposed)
    products.transposed_is_faster.cache_clear()
    monkeypatch.setattr(products, "LARGE", 5 * 7 * 3)
    images, layer = torch.randn(5, 7), nn.Linear(7, 3, bias=False)
    state = torch.get_rng_state()
    for _ in range(3):
        product = products.linear(images, layer.weight)
        torch.testing.assert_close(product, layer(images))
        assert product.t().is_contiguous() is transposed
    assert torch.equal(torch.get_rng_state(), state)
    ((one, other),) = asked
    torch.testing.assert_close(one(), other())
    assert one().shape == (5, 3)
    # smaller ones, and those elsewhere than where torch begins
    apart = torch.randn(36)[1:].view(5, 7)
    for given in (images[:4], apart):
        assert products.linear(given, layer.weight).is_contiguous()
    assert len(asked) == 1
    products.transposed_is_faster.cache_clear()


def hook_of(key, place):
    """A hook of a weight's own that doubles its gradient, as an optimizer within the backward pass might."""

    def double(parameter):
        parameter.grad *= 2

    def change(network):
        weight = getattr(network, place)[1].weight
        weight.register_hook(lambda grad: 2 * grad) if key == "tensor" else (
            weight.register_post_accumulate_grad_hook(double)
        )

    return change


def static_of(made):
    return lambda network: network.static_fc.__setitem__(1, made(network.static_fc[1]))


def with_static_bias(linear):
    biased = nn.Linear(16, 24)
    biased.weight = linear.weight
    return biased


def in_two_places(network):
    network.static_fc[1], network.fc[1] = (
        nn.Linear(16, 16, bias=False),
        layer.Linear(16, 16, bias=False, step_mode="m"),
    )
    with torch.no_grad():
        network.static_fc[1].weight.copy_((torch.arange(256) % 13 - 4).view(16, 16) / 16)
    network.fc[1].weight = network.static_fc[1].weight


# What only the whole step has to look at.
OF_A_STEP = {
    **{f"a hook of the weight of {place}": hook_of("tensor", place) for place in ("static_fc", "fc")},
    **{f"a hook after {place} has its gradient": hook_of("after", place) for place in ("static_fc", "fc")},
    **{
        f"weights of {place} that stay": lambda network, place=place: getattr(network, place).requires_grad_(False)
        for place in ("static_fc", "fc")
    },
    "a hook of the network": lambda network: network.register_forward_hook(lambda m, i, counts: 2 * counts),
    "a hook before the network": lambda network: network.register_forward_pre_hook(lambda m, i: (i[0] * 2,)),
    "a hook of the first layer": lambda network: network.static_fc[1].register_forward_hook(lambda m, i, o: 2 * o),
    "a hook of what flattens": lambda network: network.static_fc[0].register_forward_hook(lambda m, i, o: 2 * o),
    "a bias of the first layer": static_of(with_static_bias),
    "a layer after the first": lambda network: network.static_fc.append(nn.Threshold(0.5, 0.0)),
    "a subclass of the first layer": lambda network: setattr(network, "static_fc", Doubling(*network.static_fc)),
    "a static of its own": lambda network: setattr(network, "static", lambda x: 2 * network.static_fc(x)),
    "a forward of the network's own": lambda network: setattr(
        network, "forward", lambda x: 2 * MnistNet.forward(network, x)
    ),
    "a layer more than the network has": lambda network: setattr(network, "extra", nn.Linear(2, 2)),
    "one weight in two places": in_two_places,
    "step by step": lambda network: setattr(network, "step_mode", "s"),
    **{
        f"weights of {place} in another layout": lambda network, place=place: setattr(
            getattr(network, place)[1],
            "weight",
            nn.Parameter(getattr(network, place)[1].weight.detach().t().contiguous().t()),
        )
        for place in ("static_fc", "fc")
    },
    "spikes to count": lambda network: network.spike_counts.append({"fc.0": torch.zeros(24, dtype=torch.int64)}),
}


@pytest.mark.parametrize("change", [*CHANGES, *OTHERS, *OF_A_STEP])
def test_a_step_of_a_changed_network_is_that_of_its_layers(change, learned):
    network = small()
    assert_same(learnt(network, False), learnt(network, True))  # what was proven of it does not hold any more
    assert learned == [1]
    (CHANGES | OTHERS | OF_A_STEP)[change](network)
    plain, fused = learnt(network, False), learnt(network, True)
    assert learned == [1]
    assert "error" not in plain
    assert_same(plain, fused)
    for name, parameter in network.named_parameters():
        assert name not in plain or plain[name].stride() == fused[name].stride() == parameter.stride()
    assert all(counts["fc.0"].sum() > 0 for counts in network.spike_counts)


def test_a_step_of_a_changed_class_is_that_of_its_layers(monkeypatch, learned):
    static = MnistNet.static
    monkeypatch.setattr(MnistNet, "static", lambda self, images: 2 * static(self, images))
    assert_same(learnt(small(), False), learnt(small(), True))
    assert learned == []


def test_in_bf16_the_layers_behind_the_first_are_the_kernels(learned, calls):
    network = small()
    plain, fused = learnt(network, False, "bf16"), learnt(network, True, "bf16")
    assert (learned, calls) == ([], [1])
    assert plain.keys() == fused.keys()
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=0, atol=0.02 * float(value.abs().max()))


def test_a_step_leaves_gradients_to_autograd_where_more_is_asked_of_it(learned):
    """Images that need gradients, gradients to add to, anomalies to look for, none to compute, what spikes to count."""
    network, images, labels = small(), images_of(), torch.arange(6)
    network.fused = True
    assert network.fused_gradients(images.clone().requires_grad_(), labels) is None
    assert network.fused_gradients(images.to("meta"), labels) is None
    with torch.inference_mode():
        of_inference = images_of()
    assert network.fused_gradients(of_inference, labels) is None
    assert small(65535).fused_gradients(images, labels) is None
    with torch.autograd.set_detect_anomaly(True), pytest.raises(Unfit, match="anomalies"):
        network.fused_gradients(images, labels)
    with torch.no_grad(), pytest.raises(Unfit, match="autograd is off"):
        network.fused_gradients(images, labels)
    with measuring.SpikeCounter(network):
        assert network.fused_gradients(images, labels) is None
    with pytest.raises(Unfit, match=r"^labels has the shape"):
        network.fused_gradients(images, labels[:5])
    assert all(parameter.grad is None for parameter in network.parameters())
    assert learned == []
    network.fused_gradients(images, labels)
    with pytest.raises(Unfit, match="or has one"):
        network.fused_gradients(images, labels)
    assert learned == [1]


def test_a_label_that_is_none_is_refused_as_by_the_layers():
    errors = []
    for fused in (False, True):
        network = small()
        network.fused = fused
        with pytest.raises(RuntimeError, match="out of bounds") as caught:
            TrainingStep(network, [], "fp32", CPU, graph=False)(images_of(), torch.tensor([0, 1, 2, 3, 4, 10]))
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_without_a_compiler_a_step_is_that_of_the_layers(monkeypatch):
    network = small()
    plain = learnt(network, False)
    monkeypatch.setattr(spiking_kernels, "unavailable", lambda: "there is none")
    monkeypatch.setattr(build, "library", lambda: pytest.fail("is there none?"))
    assert_same(plain, learnt(network, True))


def test_the_state_left_behind_is_that_of_the_layers():
    """At rest, whatever was left in the neurons before; a copy can be made, and nothing holds a graph."""
    for fused in (False, True):
        network = small()
        network.fused = fused
        network.fc[0].v, network.fc[2].v = torch.ones(6, 24), torch.ones(6, 10)
        network(images_of())
        assert (network.fc[0].v, network.fc[2].v) == (0.0, 0.0)
        copy.deepcopy(network)


def test_the_layers_that_the_kernel_replaces_are_not_run_twice():
    """A fall-back does not run the first layer, which may draw random numbers, a second time."""
    network, ran = small(), []
    network.fused = True
    network.fc[0].tau = 4.0
    network.static_fc[1].register_forward_hook(lambda *_: ran.append(1))
    with pytest.warns(UserWarning, match="tau"):
        network(images_of())
    assert ran == [1]


def test_counters_within_counters(calls):
    """Each has the spikes of all batches while it was open, of the kernel and of the layers."""
    network = small()
    network.fused = True
    with measuring.SpikeCounter(network) as outer:
        network(images_of(3))
        with measuring.SpikeCounter(network) as inner:
            network(images_of(4))
            network.fused = False
            network(images_of(2))
            network.fused = True
        network(images_of(5))
    network(images_of(5))
    assert len(calls) == 4
    for counter, batches in ((outer, (3, 4, 2, 5)), (inner, (4, 2))):
        expected = sum(results(network, False, images_of(n))["fc.0"] for n in batches)
        assert torch.equal(counter._counts["fc.0"], expected)
        assert counter._images == sum(batches)
    assert network.spike_counts == []


def test_hooks_of_all_modules_are_called(calls):
    network, seen = small(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, i, o: seen.append(type(module)))
    try:
        plain = results(network, False)
        fused = results(network, True)
    finally:
        handle.remove()
    assert calls == []
    assert_same(plain, fused)
    assert seen.count(LIFNode) == 4


def test_what_counts_operations_sees_them_all(calls):
    from torch.utils.flop_counter import FlopCounterMode

    network, flops = small(), []
    for fused in (False, True):
        network.fused = fused
        with FlopCounterMode(display=False) as counter, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network(images_of())
        flops.append(counter.get_total_flops())
    assert calls == []
    assert flops[0] == flops[1] > 0


class DoublesProducts(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return 2 * result if function is nn.functional.linear else result


def test_what_changes_operations_changes_them_all(calls):
    network = small()
    before = results(network, False)
    with DoublesProducts():
        plain, fused = results(network, False), results(network, True)
    assert calls == []
    assert_same(plain, fused)
    assert not torch.equal(plain["counts"], before["counts"])
    with torch.device("cpu"):  # a mode of the same kind, that changes nothing here
        assert_same(before, results(network, True))
    assert calls == [1]


def test_networks_that_take_turns_are_proven_each(calls):
    one, other = small(), small()
    for network in (one, other, one, other):
        results(network, True)
    assert len(calls) == 4
    other.fc[0].tau = 4.0
    results(one, True)
    results(other, True)
    assert len(calls) == 5


def test_a_layer_that_lacks_an_attribute_fails_with_and_without_the_kernel(calls):
    network = small()
    results(network, True)
    del network.fc[1].bias
    calls.clear()
    plain, fused = results(network, False), results(network, True)
    assert calls == []
    assert plain == fused
    assert plain["error"][0] is AttributeError


def test_transforms_of_functions(calls):
    network, images = small().requires_grad_(False), images_of().unsqueeze(1)
    found = []
    for fused in (False, True):
        network.fused = fused
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(torch.func.vmap(network)(images))
    assert calls == []
    assert torch.equal(*found)


def test_parameters_by_functional_call(calls):
    network = small()
    network.fused = True
    parameters = {name: 2 * p.detach() for name, p in network.named_parameters()}
    fused = torch.func.functional_call(network, parameters, images_of())
    assert calls == [1]
    network.fused = False
    assert torch.equal(torch.func.functional_call(network, parameters, images_of()), fused)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype, calls):
    """The kernel rounds as the layers do: to 8 bits or 11, where 1/16 is exact, and thirds are not."""
    network, rounded = small(T=8), []
    for divisor in (1, 3):
        with torch.no_grad():
            network.fc[1].weight /= divisor
        with torch.autocast("cpu", dtype):
            rounded = [results(network, False), results(network, True)]
        assert torch.equal(rounded[0]["fc.0"], rounded[1]["fc.0"])
        assert divisor == 3 or torch.equal(rounded[0]["counts"], rounded[1]["counts"])
    assert len(calls) == 2
    exact = results(network, False)
    off = [(found["counts"] - rounded[0]["counts"]).abs().sum() for found in (rounded[1], exact)]
    assert off[0] <= 1  # a sum in another order, rounded to the other side
    for name in ("fc.1.weight", "static_fc.1.weight"):
        bound = 4 * torch.finfo(dtype).eps * float(rounded[0][name].abs().max())
        torch.testing.assert_close(rounded[1][name], rounded[0][name], rtol=0, atol=bound)


@pytest.mark.parametrize("kind", ["trace", "compile"])
def test_the_kernel_stays_out_of_what_is_traced(kind, calls):
    torch._dynamo.reset()  # what other tests have had compiled is theirs
    gc.collect()  # dynamo looks at SpikingJelly's cache of networks by position; one that goes meanwhile breaks that
    network = small().requires_grad_(False)
    network.fused = True
    expected = network(images_of())
    assert calls == [1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "trace":
            traced = torch.jit.trace(network, images_of(), check_trace=False)
        else:
            traced = torch.compile(network, backend="eager")
        assert torch.equal(traced(images_of()), expected)
        other = traced(2 * images_of())  # a graph with the kernel's result as a constant would give `expected`
    assert calls == [1]
    network.fused = False
    assert torch.equal(network(2 * images_of()), other)
    assert not torch.equal(other, expected)


def test_single_steps_are_left_to_the_layers(calls):
    network = small(step_mode="s")
    assert_same(results(network, False), results(network, True))
    assert calls == []


def test_the_neuron_of_the_networks_is_the_kernels(calls):
    """Should the paper's neuron ever change, the kernel must be left out, not the test adapted."""
    assert (lif().tau, lif().v_threshold, lif().v_reset) == (2.0, 1.0, 0.0)
    results(small(), True)
    assert calls == [1]
