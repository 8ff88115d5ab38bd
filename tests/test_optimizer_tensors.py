"""The optimizers with weights of any dtype and layout, and whatever torch's default dtype and device are."""

import math

import pytest
import torch
from optim_helpers import PATHS, VARIANTS, parameters, train

from deeprewire import DeepRewiring
from gradrewire import GradRewiring
from rewiring import _looks

KINDS = ["grad", "deep", "soft deep"]
variants = pytest.mark.parametrize("variant", KINDS)
paths = pytest.mark.parametrize("path", PATHS)
two_paths = pytest.mark.parametrize("foreach", [False, True])


@pytest.fixture(autouse=True)
def not_compiled(monkeypatch):
    """What no kernel takes is the plain update, not compiled: that has tests of its own."""
    monkeypatch.setattr("rewiring._compiled", lambda update: update)


def make(variant, params, **settings):
    optimizer_class, own = VARIANTS[variant]
    return optimizer_class(params, **{"lr": 0.01, **own, **settings})


# -- defaults --------------------------------------------------------------------------------------


@variants
@paths
@pytest.mark.parametrize("default", [torch.float64, torch.float16, torch.bfloat16, "meta"])
def test_torchs_defaults_change_nothing(variant, path, default):
    def run():
        params = [p for dtype in (torch.float32, torch.float64, torch.bfloat16) for p in parameters(dtype=dtype)]
        return params, [torch.randn(p.shape).to(p.dtype) for p in params]

    def steps(params, gradients):
        optimizer = make(variant, params, **path)
        for _ in range(10):
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = gradient
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.load_parameters()
        optimizer.step()
        return [p.detach() for p in params], [optimizer.state[p] for p in params]

    torch.manual_seed(0)
    expected = steps(*run())
    torch.manual_seed(0)
    given = run()
    try:
        if default == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(default)
        actual = steps(*given)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for p, q in zip(actual[0], expected[0], strict=True):
        assert torch.equal(p, q)
    for left, right in zip(actual[1], expected[1], strict=True):
        assert {key: (value.dtype, value.device) for key, value in left.items()} == {
            key: (value.dtype, value.device) for key, value in right.items()
        }
        assert all(torch.equal(left[key], right[key]) for key in left)


def test_a_learning_rate_without_a_value_is_refused():
    with pytest.raises(ValueError, match=r"lr=.*meta.* is not accepted"):
        GradRewiring(parameters(), lr=torch.empty((), device="meta"), alpha=0)
    with pytest.raises(ValueError, match=r"lr=.* is not accepted"):
        GradRewiring(parameters(), lr=torch.tensor(1j), alpha=0)


# -- dtypes ----------------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_paths_are_bitwise_the_same_in_few_bits(variant, dtype):
    runs = []
    for foreach in (False, True):
        params = parameters(dtype=dtype)
        params[0].data[0, :5] = 0
        optimizer = make(variant, params, eps=1e-4, foreach=foreach)
        train(optimizer, params, steps=40)
        runs.append([(p.detach(), optimizer.state[p]) for p in params])
        assert (params[0] == 0).any()
        assert params[0].isfinite().all()
    for (p, left), (q, right) in zip(*runs, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(left[key], right[key]) for key in left)


@two_paths
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_as_many_are_reactivated_as_are_due_whatever_the_dtype(dtype, foreach):
    """40 of 400 000 dormant ones, +- 6.3; uniforms of 8 bits would give 1 600, those of 11 bits 200."""
    torch.manual_seed(0)
    n, eps = 500_000, 1e-4
    w = torch.nn.Parameter(torch.ones(n, dtype=dtype))
    optimizer = DeepRewiring([w], lr=0.0, l1=0.0, eps=eps, max_s=(400_000 - 40) / n, foreach=foreach)
    w.grad = torch.zeros_like(w)
    optimizer.step()
    w.data[:400_000] = 0
    optimizer.step()
    back = w.detach()[:400_000]
    assert int((back != 0).sum()) == pytest.approx(40, abs=5 * math.sqrt(40))
    assert set(back.tolist()) == {0.0, float(torch.tensor(eps, dtype=dtype))}


@two_paths
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_noise_is_drawn_and_added_in_float32(dtype, soft, foreach):
    w = torch.nn.Parameter(torch.ones(10_000, dtype=dtype))
    optimizer = DeepRewiring([w], lr=0.1, T=0.25, l1=0.0, eps=1e-4, max_s=1.0, soft=soft, foreach=foreach)
    w.grad = torch.zeros_like(w)
    torch.manual_seed(0)
    optimizer.step()
    torch.manual_seed(0)
    noise = torch.randn(10_000) * 0.25  # eta is 1 in the first step
    expected = (1 + noise).to(dtype).clamp(min=0)
    assert torch.equal(w, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@two_paths
def test_what_is_reactivated_is_at_eps_in_the_weights_own_precision(dtype, foreach):
    w = torch.nn.Parameter(torch.ones(100, dtype=dtype))
    optimizer = DeepRewiring([w], lr=0.0, l1=0.0, eps=1e-8, max_s=0.0, foreach=foreach)
    w.grad = torch.zeros_like(w)
    optimizer.step()
    w.data[:50] = 0
    optimizer.step()
    assert (w[:50] == torch.tensor(1e-8, dtype=dtype)).all()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int8])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=f"dtype {dtype} is not accepted: it must be one of torch.float32"):
        GradRewiring([torch.zeros(3, dtype=dtype)], alpha=0)


# -- layouts ---------------------------------------------------------------------------------------

LAYOUTS = {
    "transposed": lambda: torch.randn(6, 40).t(),
    "channels last": lambda: torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
    "a slice": lambda: torch.randn(40, 20)[::2, 3:9],
    "0-dimensional": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 3),
    "one element": lambda: torch.randn(1, 1, 1),
}


def trained(variant, start, path, gradient=lambda p, g: g, seed=0, **settings):
    p = torch.nn.Parameter(start)
    random = {} if variant.startswith("grad") else dict(T=0.0, max_s=1.0)
    optimizer = make(variant, [p], **path, **random, **settings)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(10):
        p.grad = gradient(p, torch.randn(p.shape, generator=generator))
        optimizer.step()
    return p.detach(), optimizer.state[p]


@variants
@paths
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_any_layout_are_updated_as_contiguous_ones(variant, path, layout):
    torch.manual_seed(0)
    start = LAYOUTS[layout]() * 0.05
    expected, states = trained(variant, start.clone(memory_format=torch.contiguous_format), dict(foreach=False))
    strides = start.stride()
    actual, state = trained(variant, start, path, amsgrad=False)
    assert actual.stride() == strides
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
    for key, value in states.items():
        torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-7)


@variants
@paths
@pytest.mark.parametrize(
    "gradient",
    [
        pytest.param(lambda p, g: g.t().contiguous().t(), id="transposed"),
        pytest.param(lambda p, g: g[:1].expand(p.shape), id="expanded"),
        pytest.param(lambda p, g: torch.complex(g, -g).conj().imag, id="negated"),
        pytest.param(lambda p, g: p.detach(), id="the weights themselves"),
    ],
)
def test_gradients_of_any_layout_are_taken(variant, path, gradient):
    start = parameters(shapes=[(12, 10)])[0].detach()
    expected, _ = trained(
        variant, start.clone(), dict(foreach=False), lambda p, g: torch.empty(p.shape).copy_(gradient(p, g))
    )
    actual, _ = trained(variant, start.clone(), path, gradient)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


@paths
def test_the_plain_gradient_of_an_expanded_one(path):
    settings = dict(plain_gradient=True, weight_decay=0.1)
    start = parameters(shapes=[(12, 10)])[0].detach()
    runs = [
        trained("grad", start.clone(), path, gradient, **settings)[0]
        for gradient in (lambda p, g: g[:1].expand(p.shape), lambda p, g: g[:1].expand(p.shape).clone())
    ]
    assert torch.equal(*runs)


@variants
@paths
def test_weights_that_share_memory_with_others_or_with_the_state(variant, path):
    """A step neither crashes nor writes beside them; disjoint views of one buffer are weights like others."""
    buffer = torch.ones(30) * 0.1
    first, second = (torch.nn.Parameter(part) for part in (buffer[:12], buffer[12:24]))
    overlapping = torch.nn.Parameter(buffer[6:18])
    apart = torch.nn.Parameter(torch.ones(12) * 0.1)
    optimizer = make(variant, [first, second, apart], **path)
    for _ in range(5):
        for p in (first, second, apart):
            p.grad = torch.ones(12)
        optimizer.step()
    if variant == "grad":
        assert torch.equal(first, apart)
        assert torch.equal(second, apart)
    assert (buffer[24:] == torch.tensor(0.1)).all()
    optimizer = make(variant, [first, overlapping], **path)
    for p in (first, overlapping):
        p.grad = torch.ones(12)
    optimizer.step()
    optimizer.state[first]["exp_avg"] = first.detach()
    optimizer.step()
    assert buffer.isfinite().all()


@variants
@paths
def test_weights_of_lazy_modules_are_checked_once_they_have_a_shape(variant, path):
    def network():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.Linear(4, 1))

    x, results = torch.randn(8, 3), []
    for before in (True, False):
        lazy = network()
        optimizer = make(variant, lazy.parameters(), **path) if before else None
        torch.manual_seed(1)
        lazy(x)
        optimizer = optimizer or make(variant, lazy.parameters(), **path)
        torch.manual_seed(2)
        for _ in range(3):
            optimizer.zero_grad()
            lazy(x).sum().backward()
            optimizer.step()
        results.append([p.detach() for p in lazy.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    lazy = network()
    optimizer = make(variant, lazy.parameters(), **path)
    lazy(x)
    weight = lazy[0].weight
    weight.data = weight.data[:1].expand(4, 3)
    lazy(x).sum().backward()
    with pytest.raises(ValueError, match="its weights share memory"):
        optimizer.step()


@variants
@paths
@pytest.mark.parametrize("shape", ["expanded", "windows"])
def test_weights_that_share_memory_among_themselves_are_refused(variant, path, shape):
    weights = torch.ones(5, 1).expand(5, 3) if shape == "expanded" else torch.ones(10).as_strided((4, 3), (1, 1))
    with pytest.raises(ValueError, match=r"strides .* share memory; clone\(\) gives each its own"):
        make(variant, [torch.nn.Parameter(weights)], **path)
    p = torch.nn.Parameter(torch.ones(weights.shape))
    optimizer = make(variant, [p], **path)
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.data = weights
    with pytest.raises(ValueError, match="share memory"):
        optimizer.step()
    assert optimizer.state[p]["step"] == 1


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="gradients have the weights' dtype")
@variants
@paths
@pytest.mark.parametrize(
    ("dtype", "other"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float64), (torch.float32, torch.bfloat16)],
)
def test_gradients_of_another_dtype(variant, path, dtype, other):
    def run(gradient_dtype):
        params = parameters(dtype=dtype)
        random = {} if variant == "grad" else dict(T=0.0, max_s=1.0)
        optimizer = make(variant, params, weight_decay=0.1, **path, **random)
        for _ in range(5):
            for p in params:
                p.grad_dtype = gradient_dtype
                p.grad = torch.ones(p.shape, dtype=gradient_dtype)
            optimizer.step()
        return params

    for p, q in zip(run(other), run(dtype), strict=True):
        assert p.dtype == dtype
        torch.testing.assert_close(p, q, rtol=0.02, atol=1e-3)


# -- what a kernel has accepted once -----------------------------------------------------------------


def moved(x, to):
    x.data = to(x)
    return x


OTHERS = {  # than the tensor that was accepted; most are the same object
    "another": lambda x: x.clone(),
    "negated": lambda x: torch._neg_view(x),
    "elsewhere": lambda x: moved(x, lambda y: y.clone()),
    "dtype": lambda x: moved(x, lambda y: y.double()),
    "bits": lambda x: moved(x, lambda y: y.view(torch.int32)),
    "strides": lambda x: x.t_(),
    "strides of one shape": lambda x: moved(x, lambda y: y.t()),
    "shape": lambda x: x.unsqueeze_(0),
    "fewer": lambda x: moved(x, lambda y: y[:2]),
    "freed": lambda x: x.untyped_storage().resize_(0) and x,
    "cut short": lambda x: x.untyped_storage().resize_(x.nbytes - 4) and x,
    "gone": lambda x: None,
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", ["param", "exp_avg", "exp_avg_sq", "sign", "theta"])
def test_a_tensor_that_does_not_stay_as_it_is_looks_different(name, other):
    tensors = {key: torch.ones(4, 4) for key in ("param", "exp_avg", "exp_avg_sq", "theta")}
    tensors["sign"] = torch.ones(4, 4, dtype=torch.int8)
    before, kept = _looks([*tensors.values()]), [*tensors.values()]
    assert before is not None
    assert _looks(kept) == before
    assert _looks(kept[:-1]) != before
    if name == "sign" and other == "bits":
        pytest.skip("int8 has no other bits of int32")
    tensors[name] = OTHERS[other](tensors[name])
    assert _looks([*tensors.values()]) != before


def doubled(state, key):
    state[key] = state[key] * 2


BETWEEN = {
    "another": lambda p, state: doubled(state, "exp_avg"),
    "another theta": lambda p, state: doubled(state, "theta"),
    "elsewhere": lambda p, state: moved(state["theta"], lambda x: x / 2),
    "dtype": lambda p, state: moved(state["exp_avg"], lambda x: x.double()),
    "strides": lambda p, state: state["exp_avg"].t_(),
    "step": lambda p, state: state.update(step=float(state["step"]) + 5),
    "step in place": lambda p, state: state["step"].add_(5),
    "another step": lambda p, state: state.update(step=state["step"] + 5),
    "step elsewhere": lambda p, state: moved(state["step"], lambda x: x + 5),
    "weights": lambda p, state: moved(p, lambda x: x.t()),
    "gradient": lambda p, state: setattr(p, "grad", p.grad.t()),
    "negated gradient": lambda p, state: setattr(p, "grad", torch._neg_view(p.grad)),
    "the state as gradient": lambda p, state: setattr(p, "grad", state["exp_avg"]),
    "sign of a row": lambda p, state: state["sign"][0].zero_(),
    "nothing": lambda p, state: None,
}


@pytest.mark.parametrize("change", BETWEEN)
@pytest.mark.parametrize("variant", ["grad", "soft deep"])
def test_what_changes_between_steps_counts_in_every_path(variant, change):
    """A kernel that went on with the memory of the last step would not see it."""
    random = {} if variant == "grad" else dict(T=0.0, max_s=1.0)
    ends = []
    for path in (dict(foreach=False), dict(fused=True)):
        p = parameters(shapes=[(12, 12)])[0]
        optimizer = make(variant, [p], **path, **random)
        train(optimizer, [p], steps=3)
        generator = torch.Generator().manual_seed(3)
        p.grad = torch.randn(12, 12, generator=generator)
        BETWEEN[change](p, optimizer.state[p])
        optimizer.step()
        train(optimizer, [p], steps=2, seed=2)
        ends.append([p.detach(), *(optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq", "theta", "step"))])
    for plain, fused in zip(*ends, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-7)
