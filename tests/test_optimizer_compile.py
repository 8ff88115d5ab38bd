"""torch.compile around a training step with the optimizers, and around their step alone: the weights of eager steps."""

import copy
import shutil

import pytest
import torch
import torch._dynamo.testing
from optim_helpers import PATHS, VARIANTS, parameters

import rewiring
import spiking_kernels
from gradrewire import GradRewiring

needs_cpp = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@pytest.fixture(autouse=True)
def reset():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def training(variant, decorate, changes=None, reload_at=None, **settings):
    """Eight steps on a small loss; ``changes`` are settings by the number of the step."""
    torch.manual_seed(0)
    params = parameters(shapes=[(30, 20), (20,)])
    optimizer_class, own = VARIANTS[variant]
    optimizer = optimizer_class(
        [{"params": params[:1]}, {"params": params[1:], "eps": 1e-7}], **{"lr": 0.01, **own, **settings}
    )

    def step(x):
        optimizer.zero_grad()
        loss = (x @ params[0] + params[1]).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    step = decorate(step)
    generator = torch.Generator().manual_seed(1)
    for number in range(8):
        for group in optimizer.param_groups:
            group.update((changes or {}).get(number, {}))
        if number == reload_at:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        step(torch.randn(5, 30, generator=generator))
    return params, optimizer


def assert_as_eager(variant, backend="eager", tolerance=0.0, **arguments):
    plain, expected = training(variant, lambda step: step, **arguments)
    compiled, actual = training(variant, torch.compile(backend=backend), **arguments)
    assert (plain[0] == 0).any()
    for p, q in zip(plain, compiled, strict=True):
        torch.testing.assert_close(q, p, rtol=tolerance, atol=tolerance)
        assert torch.equal(p == 0, q == 0)
        assert actual.state[q].keys() == expected.state[p].keys()
        for key, value in expected.state[p].items():
            torch.testing.assert_close(actual.state[q][key], value, rtol=tolerance, atol=tolerance)
    assert [group["lr"] for group in actual.param_groups] == [group["lr"] for group in expected.param_groups]


SLOW = [pytest.param(variant, path.values[0], marks=pytest.mark.slow) for variant in VARIANTS for path in PATHS]
QUICK = [("grad", {}), ("deep", dict(foreach=True))]


@pytest.mark.parametrize(("variant", "path"), QUICK + SLOW)
def test_a_compiled_training_step_gives_the_weights_of_eager_ones(variant, path):
    """With a learning rate that changes at each step, and after load_state_dict."""
    if path.get("fused") and spiking_kernels.unavailable() is not None:
        pytest.skip("no fused kernels")
    assert_as_eager(variant, changes={n: {"lr": 0.01 / (n + 1)} for n in range(8)}, reload_at=5, **path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("grad", {3: {"amsgrad": True}, 5: {"alpha": 0.0}, 6: {"maximize": True, "weight_decay": 0.1}}),
        ("grad", {2: {"plain_gradient": True}, 5: {"foreach": True}, 7: {"plain_gradient": False}}),
        ("soft deep", {3: {"soft": False}, 5: {"T": 0.0, "betas": (0.5, 0.9)}, 6: {"soft": True}}),
        ("deep", {2: {"lr": torch.tensor(0.02)}, 4: {"max_s": 1.0}, 6: {"l1": 0.0, "foreach": True}}),
    ],
)
def test_a_compiled_step_follows_settings_that_change(variant, changes):
    assert_as_eager(variant, changes=changes)


@pytest.mark.parametrize("variant", ["grad", "deep"])
@pytest.mark.parametrize("closure", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_step_alone_can_be_compiled(variant, closure):
    def run(decorate):
        torch.manual_seed(0)
        params = parameters(shapes=[(30, 20), (20,)])
        optimizer = VARIANTS[variant][0](params, lr=0.01, **VARIANTS[variant][1])

        def loss():
            optimizer.zero_grad()
            value = params[0].square().sum() + params[1].sum()
            value.backward()
            return value

        step = decorate(optimizer.step)
        for _ in range(5):
            if closure:
                step(loss)
            else:
                loss()
                step()
        return params

    for p, q in zip(run(lambda step: step), run(torch.compile(backend="eager")), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("variant", ["grad"])
def test_the_arithmetic_is_compiled_once_for_all_groups_and_learning_rates(variant):
    """A graph for the loss, one for all updates, and one that takes any learning rate."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    training(variant, torch.compile(backend=counter), changes={n: {"lr": 0.01 / (n + 1)} for n in range(8)})
    assert counter.frame_count <= 5
    assert sum("foreach" in str(node.target) for graph in counter.graphs for node in graph.graph.nodes) > 20


MANY = [(3,), (4, 5), (2, 3, 4), (7, 1), (8, 9), (9,), (2, 2, 2, 2), (11,), (12, 13), (5, 4), ()]


@pytest.fixture
def compilations(monkeypatch):
    """Has updates without kernels compiled by a backend that needs no compiler, and counts."""
    counter, compile = torch._dynamo.testing.CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr("rewiring.spiking_kernels", None)
    monkeypatch.setattr(
        "rewiring.torch.compile", lambda update, **settings: compile(update, backend=counter, **settings)
    )
    rewiring._compiled.cache_clear()
    yield counter
    rewiring._compiled.cache_clear()


def fused_steps(variant, groups, changes):
    """A step of weights of many shapes for each change of settings, with and without ``fused``."""
    runs = []
    for path in (dict(foreach=False), dict(fused=True)):
        params = parameters(shapes=MANY)
        optimizer = VARIANTS[variant][0](groups(params), **{"lr": 0.01, **VARIANTS[variant][1]}, **path)
        generator = torch.Generator().manual_seed(1)
        torch.manual_seed(1)
        for change in changes:
            for group in optimizer.param_groups:
                group.update(change)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        runs.append(params)
    return runs


@pytest.mark.parametrize("variant", ["grad", "deep", "soft deep", "deep without noise"])
def test_fused_is_compiled_once_for_all_shapes_and_settings(variant, compilations):
    """With and without prior, for Grad R."""
    changes = [
        dict(lr=0.01 / (n + 1), betas=(0.9 - n / 100, 0.99), eps=1e-8 * (n + 1), weight_decay=0.1 / (n + 1))
        for n in range(12)
    ]
    for n, change in enumerate(changes):
        change.update(dict(alpha=0.0 if n in (5, 8) else 0.1 / (n + 1), s=0.9) if variant == "grad" else {})
        change.update(dict(l1=0.01 / (n + 1)) if variant != "grad" else {})
    plain, fused = fused_steps(variant, lambda params: params, changes)
    assert compilations.frame_count == (2 if variant == "grad" else 1)
    for p, q in zip(plain, fused, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-6)


def test_fused_is_compiled_once_for_a_penalty_in_a_tensor(compilations):
    """With and without prior: whether there is one is not known when it is compiled."""
    runs = []
    for alpha in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        params = parameters(shapes=MANY)
        optimizer = GradRewiring(params, alpha=alpha, s=0.9, lr=0.01, fused=isinstance(alpha, torch.Tensor))
        (group,), generator = optimizer.param_groups, torch.Generator().manual_seed(1)
        for value in (0.1, 0.0, 0.2, 0.0, 0.3):
            if isinstance(alpha, torch.Tensor):
                group["alpha"].fill_(value)
            else:
                group["alpha"] = value
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        runs.append(params)
    assert compilations.frame_count == 1
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-6)


def test_groups_of_as_many_weights_share_what_is_compiled(compilations):
    """However many there are; a weight of one element is a case of its own for torch.compile."""
    changes = [dict(lr=0.01 / (n + 1)) for n in range(3)]
    fused_steps("grad", lambda params: [{"params": [p]} for p in params[:-1]], changes)
    assert compilations.frame_count == 1
    sizes = [[*range(n * (n + 1) // 2, (n + 1) * (n + 2) // 2)] for n in range(10)]  # 1, 2, ... 10 weights
    shapes = [parameters(shapes=[(3 + i,) for i in some]) for some in sizes]
    optimizer = VARIANTS["grad"][0]([{"params": some} for some in shapes], fused=True, alpha=0.1, s=0.9)
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert compilations.frame_count == 1 + 9


def test_where_torch_cannot_compile_the_plain_update_runs(monkeypatch):
    """One line says so, once; no C++ compiler is one reason."""

    def no_compiler(graph, inputs):
        raise OSError("there is no C++ compiler")

    compile = torch.compile
    monkeypatch.setattr("rewiring.spiking_kernels", None)
    monkeypatch.setattr("rewiring.torch.compile", lambda update, **_: compile(update, backend=no_compiler))
    rewiring._compiled.cache_clear()
    try:
        with pytest.warns(UserWarning, match="torch.compile") as caught:
            params, _ = training("grad", lambda step: step, fused=True)
    finally:
        rewiring._compiled.cache_clear()
    assert [str(w.message) for w in caught] == ["torch.compile fails (OSError): fused=True is as slow as foreach=False"]
    for p, q in zip(params, training("grad", lambda step: step, foreach=False)[0], strict=True):
        assert torch.equal(p, q)


def test_where_torch_refuses_to_compile_the_plain_update_runs(monkeypatch):
    """As it does for a Python that is newer than it knows."""

    def refuse(update, **_):
        raise RuntimeError("torch.compile is not supported on this Python")

    def weights(**settings):
        p = torch.nn.Parameter(torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64))  # which no kernel takes
        optimizer = GradRewiring([p], alpha=0.1, s=0.9, **settings)
        for _ in range(2):
            p.grad = p.detach().clone()
            optimizer.step()
        return p.detach()

    monkeypatch.setattr("rewiring.torch.compile", refuse)
    rewiring._compiled.cache_clear()
    try:
        with pytest.warns(UserWarning, match="torch.compile") as caught:
            fused = weights(fused=True)
    finally:
        rewiring._compiled.cache_clear()
    text = "torch.compile fails (RuntimeError): fused=True is as slow as foreach=False"
    assert [str(w.message) for w in caught] == [text]
    assert torch.equal(fused, weights(foreach=False))


@pytest.mark.slow
@needs_cpp
def test_the_fused_update_is_compiled_without_kernels_too(monkeypatch):
    monkeypatch.setattr("rewiring.spiking_kernels", None)
    assert_as_eager("grad", fused=True, changes={3: {"lr": 0.02}, 5: {"betas": (0.5, 0.9)}})


@pytest.mark.parametrize("variant", ["grad", "deep", "soft deep"])
def test_no_weight_computes_powers_in_the_compiled_update(variant, monkeypatch):
    """Inductor would compute those of the bias corrections in float64 for every weight, in the loop over them."""
    traced, compile = [], torch.compile

    def keep(graph, inputs):
        traced.append([str(node.target) for node in graph.graph.nodes if node.op in ("call_function", "call_method")])
        return graph.forward

    rewiring._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda update, dynamic: compile(update, dynamic=dynamic, backend=keep))
    monkeypatch.setattr("rewiring.spiking_kernels", None)
    plain, _ = training(variant, lambda step: step, foreach=False)
    fused, optimizer = training(variant, lambda step: step, fused=True)
    rewiring._compiled.cache_clear()
    assert traced
    assert all(len(calls) > 10 and not any("pow" in call for call in calls) for calls in traced)
    assert [int(state["step"]) for state in optimizer.state.values()] == [8, 8]
    if variant != "deep":  # which draws other random numbers
        for p, q in zip(plain, fused, strict=True):
            torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-6)


def test_a_compilation_that_is_interrupted_counts_no_step(monkeypatch):
    """And the next one is the first."""
    compile, fails = torch.compile, [KeyboardInterrupt, KeyboardInterrupt]

    def backend(graph, inputs):
        if fails:
            raise fails.pop()
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda update, dynamic: compile(update, dynamic=dynamic, backend=backend))
    monkeypatch.setattr("rewiring.spiking_kernels", None)
    expected, _ = training("grad", lambda step: step, foreach=False)
    rewiring._compiled.cache_clear()

    def again(step):
        def tried(x):
            while True:
                try:
                    return step(x)
                except KeyboardInterrupt:
                    continue

        return tried

    found, optimizer = training("grad", again, fused=True)
    rewiring._compiled.cache_clear()
    assert not fails
    assert [int(state["step"]) for state in optimizer.state.values()] == [8, 8]
    for p, q in zip(expected, found, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stacked", [False, True])
def test_step_sizes_come_back_in_their_order(stacked):
    steps = (torch.tensor(1.0), torch.tensor(5.0))
    etas, corrections = map(list, zip(*(rewiring.step_sizes(t, 0.1, (0.9, 0.99)) for t in steps), strict=True))
    assert [float(eta) for eta in etas] == [pytest.approx(1), pytest.approx(0.1 / (1 - 0.9**5))]
    assert [float(root) for root in corrections] == [pytest.approx(0.1), pytest.approx((1 - 0.99**5) ** 0.5)]
    sizes = [torch.stack([torch.stack(etas), torch.stack(corrections)])] if stacked else [*etas, *corrections]
    assert rewiring._pairs(sizes) == (etas, corrections)


@pytest.mark.slow
@needs_cpp
@pytest.mark.parametrize("variant", ["grad", "deep"])
def test_inductor_gives_the_weights_of_eager_steps(variant):
    """Within rounding; with the same random numbers, as these are not compiled."""
    assert_as_eager(variant, backend="inductor", tolerance=1e-6, changes={4: {"lr": 0.02}})
