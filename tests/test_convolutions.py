"""The convolution of spikes in C, and its gradients, against torch's."""

import contextlib
import platform

import pytest
import torch
from sanitize import VARIANTS
from torch import nn

import spiking_kernels
from c10.model import Cifar10Net
from measuring.energy import OperationCounter
from spiking_kernels import build, convolutions

pytestmark = pytest.mark.skipif(
    spiking_kernels.unavailable() is not None, reason=f"no fused kernels: {spiking_kernels.unavailable()}"
)
EPS = torch.finfo(torch.float32).eps
CONVOLUTION = convolutions.convolution
# M, C, H, W, channels of the output: one pixel, rows and images that no block of the kernels divides, several parts
SIZES = [(1, 32, 1, 1, 32), (3, 32, 5, 7, 64), (2, 96, 17, 8, 32), (70, 32, 8, 16, 32), (2, 64, 3, 128, 64)]


def spikes_and_weight(M, C, H, W, out, rate=0.2, density=0.2):
    generator = torch.Generator().manual_seed(1)
    spikes = (torch.rand(M, C, H, W, generator=generator) < rate).float()
    weight = torch.randn(out, C, 3, 3, generator=generator)
    weight *= torch.rand(weight.shape, generator=generator) < density
    return spikes.contiguous(memory_format=torch.channels_last).requires_grad_(), weight.requires_grad_()


def gradient(M, C, H, W, out):
    return torch.randn(M, out, H, W, generator=torch.Generator().manual_seed(2))


def exact(spikes, weight, grad):
    """The convolution and its gradients in float64, and those of the absolute values: what rounding is of."""
    found = []
    for change in (torch.Tensor.double, lambda x: x.double().abs()):
        x, w = (change(tensor.detach()).requires_grad_() for tensor in (spikes, weight))
        y = nn.functional.conv2d(x, w, padding=1)
        found.append([y.detach(), *torch.autograd.grad(y, (x, w), change(grad))])
    return zip(*found, strict=True)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("rate", "density"), [(0, 0.1), (0.2, 0.1), (0.2, 1), (1, 1), (1, 0)])
@pytest.mark.parametrize("sizes", SIZES)
def test_it_is_torchs(sizes, rate, density, variant, monkeypatch):
    library = build.library(*VARIANTS[variant])
    monkeypatch.setattr(build, "library", lambda: library)
    spikes, weight = spikes_and_weight(*sizes, rate, density)
    grad = gradient(*sizes)
    y = convolutions.convolution(spikes, weight)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.backward(grad)
    assert weight.grad.is_contiguous()
    for ours, (theirs, largest) in zip((y, spikes.grad, weight.grad), exact(spikes, weight, grad), strict=True):
        assert ours.dtype is torch.float32
        assert ((ours.double() - theirs).abs() <= 32 * EPS * largest).all()
    assert (bool(y.any()), bool(weight.grad.any())) == (rate * density > 0, rate > 0)


def test_the_gradient_of_the_spikes_goes_by_few_weights(monkeypatch):
    """A quarter of them; with one more it is torch's."""
    sizes, calls, library = SIZES[1], [], build.library()

    class Noted:
        def __getattr__(self, name):
            calls.append(name)
            return getattr(library, name)

    monkeypatch.setattr(build, "library", Noted)
    spikes, weight = spikes_and_weight(*sizes, density=1)
    few = int(convolutions.SPARSE * weight.numel())
    for left in (few, few + 1):
        with torch.no_grad():
            weight.view(-1)[left:] = 0
            weight.view(-1)[:left] = 1
        calls.clear()
        convolutions.convolution(spikes, weight).backward(gradient(*sizes))
        assert ("convolution_spikes_gradient" in calls) == (left == few)
        assert "convolution_weights_gradient" in calls


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_only_the_gradients_that_are_needed(needed):
    tensors, grad = spikes_and_weight(*SIZES[1]), gradient(*SIZES[1])
    both = torch.autograd.grad(convolutions.convolution(*tensors), tensors, grad)
    for tensor, need in zip(tensors, needed, strict=True):
        tensor.requires_grad_(need)
    convolutions.convolution(*tensors).backward(grad)
    for tensor, need, expected in zip(tensors, needed, both, strict=True):
        assert torch.equal(tensor.grad, expected) if need else tensor.grad is None


def test_what_comes_back_with_other_sizes_is_refused(monkeypatch):
    """By torch, as for its own convolution; the kernels would read past the gradient."""
    for name in ("_spikes_gradient", "_weights_gradient"):
        monkeypatch.setattr(convolutions, name, None)
    spikes, weight = spikes_and_weight(*SIZES[1])

    def twice(x):
        return torch.cat([x, x]).contiguous(memory_format=torch.channels_last) if x.shape == spikes.shape else x

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, twice):
        y = convolutions.convolution(spikes, weight)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(y, (spikes, weight), gradient(*SIZES[1]))


@pytest.mark.parametrize("how", ["create_graph", "saved tensors"])
def test_hooks_are_called_once(how):
    """Also where torch computes the gradients."""
    if how == "saved tensors" and torch.__version__.startswith("2.6."):
        pytest.skip("torch 2.6 itself forgets the hooks of a tensor that comes back from such hooks")
    (spikes, weight), grad = spikes_and_weight(*SIZES[1]), gradient(*SIZES[1])
    if how == "create_graph":
        around = contextlib.nullcontext()
    else:
        around = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x.contiguous())
    found = []
    for factor in (1, 2):
        with around:
            y = convolutions.convolution(spikes, weight)
        for tensor in (spikes, weight) if factor > 1 else ():
            tensor.register_hook(lambda g: 2 * g)
        found.append(torch.autograd.grad(y, (spikes, weight), grad, create_graph=how == "create_graph"))
    for once, doubled in zip(*found, strict=True):
        assert torch.equal(doubled, 2 * once)


def test_gradients_of_gradients_are_torchs():
    found = []
    for function in (convolutions.convolution, lambda x, w: nn.functional.conv2d(x, w, padding=1)):
        tensors, grad = spikes_and_weight(*SIZES[1]), gradient(*SIZES[1])
        first = torch.autograd.grad(function(*tensors).square(), tensors, grad, create_graph=True)
        found.append(torch.autograd.grad(sum(x.square().sum() for x in first), tensors))
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).abs().max() <= 1000 * EPS * theirs.abs().max()


def test_what_was_saved_may_come_back_as_another_tensor():
    (spikes, weight), grad = spikes_and_weight(*SIZES[1]), gradient(*SIZES[1])
    expected = torch.autograd.grad(convolutions.convolution(spikes, weight), weight, grad)[0]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.double(), lambda x: x.float().contiguous()):
        y = convolutions.convolution(spikes, weight)
    (found,) = torch.autograd.grad(y, weight, grad)
    assert (found - expected).abs().max() <= 100 * EPS * expected.abs().max()


def test_what_was_saved_may_come_back_as_other_numbers():
    (spikes, weight), grad = spikes_and_weight(*SIZES[1]), gradient(*SIZES[1])
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x * 0.75):
        y = convolutions.convolution(spikes, weight)
    found = torch.autograd.grad(y, (spikes, weight), grad)
    theirs = torch.autograd.grad(nn.functional.conv2d(spikes, weight, padding=1), (spikes, weight), grad)
    for ours, expected in zip(found, theirs, strict=True):
        assert (ours - 0.75 * expected).abs().max() <= 100 * EPS * expected.abs().max()


def test_many_parts_of_the_images_give_the_same_sums(monkeypatch):
    sizes, found = (35, 32, 4, 4, 32), []
    for pixels in (1, convolutions.PIXELS):
        monkeypatch.setattr(convolutions, "PIXELS", pixels)
        spikes, weight = spikes_and_weight(*sizes)
        assert convolutions._parts(spikes) == (convolutions.PARTS if pixels == 1 else 1)
        convolutions.convolution(spikes, weight).backward(gradient(*sizes))
        found.append((spikes.grad, weight.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert (found[0][1] - found[1][1]).abs().max() <= 32 * EPS * found[1][1].abs().max()


def test_gradients_may_lie_in_any_way():
    tensors, grad = spikes_and_weight(*SIZES[1]), gradient(*SIZES[1])
    y = convolutions.convolution(*tensors)

    def found(grad):
        return torch.autograd.grad(y, tensors, grad, retain_graph=True)

    for same in (grad.contiguous(memory_format=torch.channels_last), torch._neg_view(-grad)):
        assert all(map(torch.equal, found(same), found(grad)))
    assert all(map(torch.equal, found(torch.ones(()).expand_as(y)), found(torch.ones(y.shape))))


def test_results_do_not_depend_on_the_number_of_threads(kernel_threads):
    sizes, results = SIZES[3], []
    assert sizes[0] * sizes[2] * sizes[3] >= 2 * convolutions.PIXELS
    for threads in (1, 2, 3, 7):
        kernel_threads(threads)
        spikes, weight = spikes_and_weight(*sizes)
        y = convolutions.convolution(spikes, weight)
        y.backward(gradient(*sizes))
        results.append((y, spikes.grad, weight.grad))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def channels_last(*shape, **how):
    return torch.zeros(*shape, **how).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("spikes", "weight", "reason"),
    [
        (channels_last(1, 32, 4, 4, dtype=torch.float64), torch.zeros(32, 32, 3, 3), "spikes is torch.float64"),
        (channels_last(1, 32, 4, 4), torch.zeros(32, 32, 3, 3).bfloat16(), "weight is torch.bfloat16"),
        (torch.zeros(1, 32, 4, 4), torch.zeros(32, 32, 3, 3), "spikes do not lie channels-last"),
        (torch.zeros(32, 4, 4), torch.zeros(32, 32, 3, 3), "spikes do not lie channels-last"),
        (torch._neg_view(channels_last(1, 32, 4, 4)), torch.zeros(32, 32, 3, 3), "spikes do not lie channels-last"),
        (channels_last(1, 32, 4, 4), channels_last(32, 32, 3, 3), "weight is not contiguous"),
        (channels_last(1, 32, 4, 4), torch.zeros(32, 32, 5, 5), "weight has the shape"),
        (channels_last(1, 32, 4, 4), torch.zeros(32, 64, 3, 3), "weight has the shape"),
        (channels_last(1, 32, 4, 4), torch.zeros(()), "weight has the shape"),
        (channels_last(1, 32, 4, 4), torch.zeros(40, 32, 3, 3), "multiples of 32"),
        (channels_last(1, 16, 4, 4), torch.zeros(32, 16, 3, 3), "multiples of 32"),
        (channels_last(1, 32, 4, 4), torch.zeros(0, 32, 3, 3), "multiples of 32"),
        (channels_last(0, 32, 4, 4), torch.zeros(32, 32, 3, 3), "are none, or too large"),
        (channels_last(1, 32, 4, 129), torch.zeros(32, 32, 3, 3), "are none, or too large"),
        (channels_last(1, 288, 1, 64), torch.zeros(32, 288, 3, 3), "are none, or too large"),
        (channels_last(1, 1056, 1, 1), torch.zeros(()).expand(1024, 1056, 3, 3).contiguous(), "too many"),
        (channels_last(1, 32, 4, 4), torch.full((32, 32, 3, 3), torch.inf), "infinite or not a number"),
        (channels_last(1, 32, 4, 4), torch.full((32, 32, 3, 3), torch.nan), "infinite or not a number"),
    ],
)
def test_what_it_cannot_take_is_refused(spikes, weight, reason):
    with pytest.raises(spiking_kernels.Unfit, match=reason):
        convolutions.convolution(spikes, weight)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (2, 31, 4, 6), (1, 7, 3, 2)])
@pytest.mark.parametrize("value", [0.5, 2, -1, torch.nan, torch.inf, 1 + EPS, 1e-45])
def test_numbers_that_are_no_spikes_are_refused(value, place, variant, monkeypatch):
    library = build.library(*VARIANTS[variant])
    monkeypatch.setattr(build, "library", lambda: library)
    spikes, weight = spikes_and_weight(*SIZES[1])
    with torch.no_grad():
        spikes[place] = value
    with pytest.raises(spiking_kernels.Unfit, match="neither 0 nor 1"):
        convolutions.convolution(spikes, weight)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="not an x86 processor")
def test_it_is_for_processors_with_vectors():
    assert build.library(*VARIANTS["portable"]).convolution_fast() == 0
    assert build.library("-mavx2", "-mfma").convolution_fast() == 1  # the question itself needs none


def test_products_that_are_rounded_are_refused():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(spiking_kernels.Unfit, match="rounded"):
        convolutions.convolution(*spikes_and_weight(*SIZES[1]))


# -- the network --------------------------------------------------------------------------------------


def network(width, monkeypatch):
    """A fused network with spikes in all convolutions, and a list of the names of tensors that the kernel gets."""
    torch.manual_seed(0)
    made, calls = Cifar10Net(2, width=width), []
    for norm in made.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.constant_(norm.bias, 1.2)
    names = {id(weight): name for name, weight in made.named_parameters()}

    def convolution(spikes, weight):
        y = CONVOLUTION(spikes, weight)
        calls.append(names[id(weight)])
        return y

    monkeypatch.setattr(convolutions, "convolution", convolution)
    monkeypatch.setattr(convolutions, "are_fast", lambda: True)  # whatever the processor
    made.fused = True
    return made, calls


IMAGES = torch.linspace(-2, 2, 2 * 3 * 32 * 32).sin().view(2, 3, 32, 32)
FIVE = [f"conv.{place}.weight" for place in (1, 4, 8, 11, 14)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("train", [True, False])
def test_the_network_uses_it(train, monkeypatch):
    made, calls = network(32, monkeypatch)
    made.train(train)
    made(IMAGES)
    assert calls == FIVE
    monkeypatch.setattr(convolutions, "are_fast", lambda: False)
    made(IMAGES)
    assert calls == FIVE


@pytest.mark.filterwarnings("error")
def test_other_channels_rounded_products_and_infinite_weights_are_the_layers(monkeypatch):
    made, calls = network(8, monkeypatch)
    made(IMAGES)
    made, calls = network(32, monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        made(IMAGES)
    assert calls == []
    with torch.no_grad():
        made.conv[8].weight[0, 0, 0, 0] = torch.inf
    made(IMAGES)
    assert calls == [name for name in FIVE if name != "conv.8.weight"]


@pytest.mark.filterwarnings("error")
def test_operations_are_counted_without_the_layers_hooks(monkeypatch):
    made, calls = network(32, monkeypatch)
    made.eval()
    found = []
    # the same rounding, so that the spikes are the same
    monkeypatch.setattr(
        convolutions, "convolution", lambda x, w: calls.append(w.shape) or nn.functional.conv2d(x, w, padding=1)
    )
    for fast in (True, False):
        monkeypatch.setattr(convolutions, "are_fast", lambda fast=fast: fast)
        with OperationCounter(made) as counter, torch.no_grad():
            made(IMAGES)
            made(IMAGES[:1])
        found.append(counter.operations())
    assert len(calls) == 10
    assert found[0] == found[1]
    assert all(found[0][name].pruned > 0 for name in FIVE)
