"""What holds for every optimizer: arguments, the torch.optim interface, the two paths."""

import copy
import inspect
import io
import math
import pickle
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_helpers import PATHS, SHAPES, VARIANTS, parameters, train
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from deeprewire import DeepRewiring
from gradrewire import GradRewiring

variants = pytest.mark.parametrize("variant", VARIANTS)


def make(variant, params, **settings):
    optimizer_class, own = VARIANTS[variant]
    if optimizer_class is GradRewiring:
        settings.pop("T", None)
    return optimizer_class(params, **{"lr": 0.01, **own, **settings})


NUMBERS = [math.nan, math.inf, -math.inf, 10**400, "0.1", None, True, [0.1]]
BAD = [
    *[(cls, name, bad) for cls in (GradRewiring, DeepRewiring) for name in ("lr", "eps") for bad in [*NUMBERS, -1e-9]],
    *[(cls, "weight_decay", bad) for cls in (GradRewiring, DeepRewiring) for bad in [*NUMBERS, -1e-9]],
    *[
        (cls, "betas", bad)
        for cls in (GradRewiring, DeepRewiring)
        for bad in [None, 0.9, (0.9,), (0.9, 0.99, 0.999), (-0.1, 0.9), (0.9, 1.0), (math.nan, 0.9), (0.9, "x")]
    ],
    *[
        (cls, name, bad)
        for cls in (GradRewiring, DeepRewiring)
        for name in ("amsgrad", "foreach", "fused")
        for bad in ["no", 1]
    ],
    *[(GradRewiring, "alpha", bad) for bad in [*NUMBERS, -1e-9]],
    *[(GradRewiring, "s", bad) for bad in [*NUMBERS, 0.49, 1.0, -0.5, 2]],
    *[(DeepRewiring, name, bad) for name in ("T", "l1") for bad in [*NUMBERS, -1e-9]],
    *[(DeepRewiring, "max_s", bad) for bad in [*NUMBERS, -0.01, 1.01]],
    *[(DeepRewiring, "soft", bad) for bad in [None, 1, "yes"]],
    (DeepRewiring, "eps", 0.0),
]


@pytest.mark.parametrize(("cls", "name", "bad"), BAD)
def test_bad_argument_is_a_value_error_that_names_it_and_its_value(cls, name, bad):
    good = {"s": 0.9} if cls is GradRewiring else {"max_s": 0.9}
    with pytest.raises(ValueError, match=name) as error:
        cls(parameters(), **{**good, name: bad})
    assert "must be" in str(error.value)
    assert repr(bad) in str(error.value) or (name == "betas" and "betas[" in str(error.value))
    # a group's own setting is checked too, at construction and when it is added
    with pytest.raises(ValueError, match=name):
        cls([{"params": parameters(), name: bad}], **good)
    optimizer = cls(parameters(), **good)
    with pytest.raises(ValueError, match=name):
        optimizer.add_param_group({"params": parameters(1), name: bad})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (GradRewiring, dict(lr=0, alpha=0)),
        (GradRewiring, dict(alpha=1e-8, eps=1e-8)),  # the prior is off up to eps
        (GradRewiring, dict(alpha=1, s=0.5)),
        (GradRewiring, dict(lr=torch.tensor(1e-3), alpha=0)),
        (DeepRewiring, dict(max_s=0)),
        (DeepRewiring, dict(max_s=1, T=1, l1=0)),
        (DeepRewiring, dict(max_s=0.5, soft=True, eps=0)),
    ],
)
def test_bounds_that_are_accepted(cls, settings):
    params = parameters()
    train(cls(params, **settings), params, steps=2)
    assert all(p.isfinite().all() for p in params)


ADAM = "params, lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0, amsgrad=False"


@pytest.mark.parametrize(
    ("cls", "own", "values"),
    [
        (GradRewiring, "alpha=1e-05, s=None", (0.2, 0.9)),
        (DeepRewiring, "T=0, l1=1e-05, max_s=None, soft=False", (0.1, 0.2, 0.9, True)),
    ],
)
def test_arguments_are_adams_and_then_their_own_by_position_or_name(cls, own, values):
    arguments = [p.replace(annotation=p.empty) for p in inspect.signature(cls).parameters.values()]
    *by_position, others = map(str, arguments)
    assert ", ".join(by_position) == f"{ADAM}, {own}"
    assert others.startswith("**")
    adam = (0.1, (0.5, 0.6), 1e-4, 0.2, True)
    optimizer = cls(parameters(), *adam, *values, foreach=True, maximize=True, capturable=True)
    given = dict(zip([p.name for p in arguments[1:-1]], (*adam, *values), strict=True))
    given |= dict(foreach=True, maximize=True, capturable=True, fused=False, prune=True)
    assert {key: optimizer.param_groups[0][key] for key in given} == given
    with pytest.raises(TypeError, match=f"{cls.__name__} takes no argument learning_rate, momentum$"):
        cls(parameters(), momentum=0.9, learning_rate=0.1)


def test_prune_is_the_setting_of_groups_that_name_none():
    pruned, plain = parameters(1), parameters(2)
    optimizer = GradRewiring([{"params": pruned, "prune": True, "alpha": 0}, {"params": plain}], prune=False)
    train(optimizer, [*pruned, *plain], steps=1)
    assert all("theta" in optimizer.state[p] for p in pruned)
    assert not any("theta" in optimizer.state[p] for p in plain)


def test_s_and_max_s_are_required_where_they_are_needed():
    with pytest.raises(ValueError, match=r"s=None.*required"):
        GradRewiring(parameters(), alpha=1e-3)
    with pytest.raises(ValueError, match=r"max_s=None.*required"):
        DeepRewiring(parameters())
    with pytest.raises(ValueError, match=r"max_s=None.*required"):
        DeepRewiring(parameters(), soft=True)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_parameters_must_be_real_and_floating_point(dtype):
    with pytest.raises(ValueError, match=str(dtype)):
        GradRewiring([torch.zeros(3, dtype=dtype)], alpha=0)
    optimizer = GradRewiring(parameters(), alpha=0)
    with pytest.raises(ValueError, match=str(dtype)):
        optimizer.add_param_group({"params": [torch.zeros(3, dtype=dtype)]})
    assert len(optimizer.param_groups) == 1


@variants
def test_closure_is_called_once_with_gradients_and_its_loss_returned(variant):
    params = parameters()
    optimizer, calls = make(variant, params), []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        return loss

    before = [p.detach().clone() for p in params]
    assert optimizer.step(closure) is not None
    assert calls == [True]
    assert all((p != b).any() for p, b in zip(params, before, strict=True))
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


@variants
@pytest.mark.parametrize("foreach", [False, True])
def test_parameters_without_a_gradient_are_left_alone(variant, foreach):
    params = parameters()
    optimizer = make(variant, params, foreach=foreach)
    before = params[1].detach().clone()
    for p in (params[0], params[2], params[3]):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(params[1], before)
    assert params[1] not in optimizer.state
    # when its first gradient comes, its own bias correction starts at step 1
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    assert optimizer.state[params[1]]["step"] == 1
    assert optimizer.state[params[0]]["step"] == 2
    assert make(variant, parameters()).step() is None  # no gradient at all


@variants
@pytest.mark.parametrize("foreach", [False, True])
def test_sparse_gradients_are_refused(variant, foreach):
    param = torch.nn.Parameter(torch.ones(3, 2))
    param.grad = torch.eye(3, 2).to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        make(variant, [param], foreach=foreach).step()


@variants
def test_groups_have_settings_of_their_own(variant):
    together, apart = parameters(), parameters()
    both = make(variant, [{"params": together[:1]}, {"params": together[1:2], "lr": 0.05, "eps": 1e-6}], T=0.0)
    both.add_param_group({"params": together[2:], "betas": (0.5, 0.9)})
    separate = [
        make(variant, apart[:1], T=0.0),
        make(variant, apart[1:2], T=0.0, lr=0.05, eps=1e-6),
        make(variant, apart[2:], T=0.0, betas=(0.5, 0.9)),
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for p, q in zip(together, apart, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        torch.manual_seed(3)
        both.step()
        torch.manual_seed(3)
        for optimizer in separate:
            optimizer.step()
    for p, q in zip(together, apart, strict=True):
        assert torch.equal(p, q)


@variants
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("how", ["state_dict", "saved state_dict", "deepcopy", "pickle"])
@pytest.mark.parametrize("path", [PATHS[0], PATHS[2]])
def test_a_copy_goes_on_exactly(variant, amsgrad, how, path):
    params = parameters()
    optimizer = make(variant, params, amsgrad=amsgrad, weight_decay=0.01, **path)
    optimizer.check_ranks = False  # as for ranks that are meant to differ
    train(optimizer, params, steps=10)
    if how == "deepcopy":
        copied = copy.deepcopy(optimizer)
        others = copied.param_groups[0]["params"]
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(optimizer))
        others = copied.param_groups[0]["params"]
    else:
        state = copy.deepcopy(optimizer.state_dict())  # torch does not copy it when it is loaded
        if how == "saved state_dict":
            buffer = io.BytesIO()
            torch.save(state, buffer)
            buffer.seek(0)
            state = torch.load(buffer, weights_only=True)
        others = [torch.nn.Parameter(p.detach().clone()) for p in params]
        copied = make(variant, others, lr=1.0)  # the state brings the settings
        copied.load_state_dict(state)
    if how in ("deepcopy", "pickle"):
        assert copied.check_ranks is optimizer.check_ranks is False
    for p in others:
        assert copied.state[p]["sign"].dtype == torch.int8
        assert {k: v.dtype for k, v in copied.state[p].items()} == {
            k: v.dtype for k, v in optimizer.state[params[0]].items()
        }
    train(optimizer, params, steps=10, seed=5)
    train(copied, others, steps=10, seed=5)
    for p, q in zip(params, others, strict=True):
        assert p is not q
        assert torch.equal(p, q)
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, copied.state[q][key]), key


@variants
def test_state_is_what_the_algorithm_needs(variant):
    params = parameters()
    optimizer = make(variant, params, amsgrad=True)
    train(optimizer, params, steps=1)
    expected = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "sign"}
    if not variant.startswith("deep"):
        expected.add("theta")
    assert set(optimizer.state[params[0]]) == expected


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", [{}, dict(amsgrad=True, weight_decay=0.02, maximize=True), dict(capturable=True)])
def test_both_paths_give_bitwise_the_same(variant, dtype, settings):
    runs = []
    for foreach in (False, True):
        params = parameters(dtype=dtype)
        params[0].data[0, :5] = 0  # connections that never were
        optimizer = make(variant, params, foreach=foreach, **settings)
        train(optimizer, params, steps=40)
        runs.append([(p.detach(), optimizer.state[p]) for p in params])
    for (p, p_state), (q, q_state) in zip(*runs, strict=True):
        assert torch.equal(p, q)
        assert p_state.keys() == q_state.keys()
        assert all(torch.equal(p_state[key], q_state[key]) for key in p_state)


@variants
@pytest.mark.parametrize("foreach", [False, True])
def test_the_path_is_the_one_asked_for(variant, foreach, monkeypatch):
    params = parameters()
    optimizer = make(variant, params, foreach=foreach)
    used = []
    monkeypatch.setattr(optimizer, "_update", lambda lists, **_: used.append(len(lists["weight"])))
    train(optimizer, params, steps=1)
    assert used == ([4] if foreach else [1, 1, 1, 1])


def test_foreach_none_chooses_as_adam_does(monkeypatch):
    params = parameters()
    for adams_choice in (False, True):
        monkeypatch.setattr("rewiring._default_to_fused_or_foreach", lambda *a, c=adams_choice, **k: (False, c))
        optimizer, used = GradRewiring(params, alpha=0), []
        monkeypatch.setattr(optimizer, "_update", lambda lists, u=used, **_: u.append(len(lists["weight"])))
        train(optimizer, params, steps=1)
        assert used == ([4] if adams_choice else [1, 1, 1, 1])


@variants
@pytest.mark.parametrize("foreach", [False, True])
def test_step_never_asks_for_a_tensors_value(variant, foreach, monkeypatch):
    """On a GPU each of these would wait for the device."""
    params = parameters()
    optimizer = make(variant, params, foreach=foreach)
    train(optimizer, params, steps=1)
    for p in params:
        p.grad = torch.ones_like(p)

    def refuse(*args, **kwargs):
        raise AssertionError("a tensor's value was read")

    for name in ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    optimizer.step()


@variants
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [1.0, 0.3, 0.0])
def test_signs_never_change_and_pruned_is_exactly_zero(variant, path, dtype, density):
    if dtype == torch.float64 and path.get("fused"):
        pytest.skip("the kernels take float32")
    params = parameters(dtype=dtype, shapes=[*SHAPES, (50, 50)])
    for p in params:
        p.data.mul_(torch.rand(p.shape, generator=torch.Generator().manual_seed(9)) < density)
    signs = [p.detach().sign() for p in params]
    optimizer = make(variant, params, **path)
    regrown = 0
    for epoch in range(10):
        before = [p != 0 for p in params]
        train(optimizer, params, steps=5, seed=epoch)
        for p, sign, was in zip(params, signs, before, strict=True):
            state = optimizer.state[p]
            assert torch.equal(state["sign"].to(dtype), sign)
            assert ((p == 0) | (p.sign() == sign)).all()
            if "theta" in state:
                assert torch.equal(p, sign * state["theta"].clamp(min=0))
                assert (state["theta"][sign == 0] == 0).all()
            regrown += int((~was & (p != 0)).sum())
    total = sum(p.numel() for p in params)
    pruned = sum(int((p == 0).sum()) for p in params) / total
    assert (0 < pruned < 1) or density == 0
    if density == 1 and variant != "deep without bound":
        assert regrown > 0  # every algorithm rewires but Deep R without a bound


@variants
@pytest.mark.parametrize("path", PATHS)
def test_the_gradient_is_not_changed(variant, path):
    params = parameters()
    optimizer = make(variant, params, weight_decay=0.1, maximize=True, **path)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert (params[0].grad == 1).all()


@variants
@pytest.mark.parametrize("path", PATHS)
def test_maximize_follows_the_opposite_gradient(variant, path):
    up, down = parameters(), parameters()
    maximizer, minimizer = make(variant, up, maximize=True, **path), make(variant, down, **path)
    for p, q in zip(up, down, strict=True):
        p.grad, q.grad = torch.ones_like(p), -torch.ones_like(q)
    for optimizer in (maximizer, minimizer):
        torch.manual_seed(0)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(up, down, strict=True))


@variants
def test_a_learning_rate_scheduler_drives_the_step_size(variant):
    params = parameters()
    optimizer = make(variant, params, T=0.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.0)
    train(optimizer, params, steps=1)
    scheduler.step()
    if isinstance(optimizer, DeepRewiring) and not VARIANTS[variant][1].get("soft"):
        optimizer.param_groups[0]["max_s"] = 1.0  # re-activation has no step size
    before = [p.detach().clone() for p in params]
    train(optimizer, params, steps=1)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@pytest.mark.gpu
@variants
@pytest.mark.parametrize("foreach", [False, True, None])
def test_on_cuda_without_synchronisation_and_as_on_the_cpu(variant, foreach):
    on_cpu, on_gpu = parameters(), parameters(device="cuda")
    cpu = make(variant, on_cpu, T=0.0)
    gpu = make(variant, on_gpu, T=0.0, foreach=foreach)
    for group in (*cpu.param_groups, *gpu.param_groups):
        if group.get("soft") is False:
            group["max_s"] = 1.0  # re-activation is random
    train(cpu, on_cpu, steps=10)
    train(gpu, on_gpu, steps=10)
    for p, q in zip(on_cpu, on_gpu, strict=True):
        torch.testing.assert_close(q.detach().cpu(), p.detach(), rtol=1e-5, atol=1e-7)
        assert gpu.state[q]["sign"].is_cuda
    torch.cuda.set_sync_debug_mode("error")
    try:
        gpu.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@variants
def test_a_cuda_graph_captures_the_step_and_draws_fresh_noise(variant):
    captured, eager = parameters(device="cuda"), parameters(device="cuda")
    first, second = make(variant, captured, capturable=True), make(variant, eager, capturable=True)
    train(first, captured, steps=3)
    train(second, eager, steps=3)
    for p, q in zip(captured, eager, strict=True):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first.step()
    for _ in range(5):
        graph.replay()
        second.step()
    for p, q in zip(captured, eager, strict=True):
        assert first.state[p]["step"] == second.state[q]["step"] == 8
    if not variant.startswith(("deep", "soft")) or variant == "deep without bound":
        for p, q in zip(captured, eager, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    if VARIANTS[variant][1].get("T"):
        changes = []
        for _ in range(2):
            before = captured[0].detach().clone()
            graph.replay()
            changes.append(captured[0].detach() - before)
        assert not torch.equal(*changes)


needs_cpp = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


@pytest.mark.slow
@needs_cpp
@pytest.mark.parametrize("variant", ["grad", "deep", "soft deep"])
def test_the_compiled_update_is_the_plain_one(variant, monkeypatch):
    """With the same draws, too; and a scheduler's learning rates do not compile it anew."""
    monkeypatch.setattr("rewiring.spiking_kernels", None)
    torch._dynamo.reset()
    runs = []
    for fused in (False, True):
        params = parameters(shapes=[(30, 20), (50,)])
        optimizer = make(variant, params, foreach=False if not fused else None, fused=fused)
        train(optimizer, params, steps=2)
        if fused:
            torch._dynamo.config.error_on_recompile = True
        try:
            for factor in (0.5, 0.7):
                optimizer.param_groups[0]["lr"] *= factor
                train(optimizer, params, steps=4, seed=4)
        finally:
            torch._dynamo.config.error_on_recompile = False
        runs.append([(p.detach(), optimizer.state[p]) for p in params])
    for (p, p_state), (q, q_state) in zip(*runs, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-7)
        assert torch.equal(p == 0, q == 0)
        for key, value in p_state.items():
            torch.testing.assert_close(q_state[key], value, rtol=1e-5, atol=1e-7)


@variants
def test_fused_and_foreach_exclude_each_other(variant):
    with pytest.raises(ValueError, match="foreach=True is not accepted with fused=True"):
        make(variant, parameters(), foreach=True, fused=True)


@pytest.mark.gpu
@variants
@pytest.mark.parametrize("capturable", [True, False])
def test_the_compiled_update_on_cuda(variant, capturable):
    plain, compiled = parameters(device="cuda"), parameters(device="cuda")
    for params, fused in ((plain, False), (compiled, True)):
        train(make(variant, params, fused=fused, capturable=capturable), params, steps=10)
    for p, q in zip(plain, compiled, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-6)


# -- any argument ------------------------------------------------------------------------------------

ANYTHING = st.one_of(
    st.floats(),
    st.integers(),
    st.booleans(),
    st.none(),
    st.text(max_size=3),
    st.tuples(st.floats(), st.floats()),
    st.sampled_from([1e-3, 0.95, 0.5, 0.0, 1.0, (0.9, 0.999)]),
)
NUMBERS = ("lr", "betas", "eps", "weight_decay", "amsgrad", "foreach", "maximize", "capturable", "fused")
OWN = {GradRewiring: ("alpha", "s"), DeepRewiring: ("T", "l1", "max_s", "soft")}


@pytest.mark.parametrize("cls", OWN)
@given(data=st.data())
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_any_argument_is_taken_or_named_in_a_value_error(cls, data):
    """Constructing never fails otherwise, and what is constructed takes a step."""
    names = data.draw(st.lists(st.sampled_from([*NUMBERS, *OWN[cls]]), unique=True, max_size=3))
    arguments = dict(s=0.9) if cls is GradRewiring else dict(max_s=0.9)
    arguments |= {name: data.draw(ANYTHING, label=name) for name in names}
    weight = torch.nn.Parameter(torch.tensor([0.5, -0.25, 0.0]))
    refused = None
    try:
        optimizer = cls([weight], **arguments)
    except ValueError as error:
        refused = str(error)
    if refused is not None:
        assert any(name in refused for name in (*names, "s=", "alpha", "eps")), refused
        assert "accepted" in refused
        return
    if arguments.get("fused") or arguments.get("capturable"):
        return  # compiled, or for a GPU
    sign = weight.detach().sign()
    weight.grad = torch.tensor([0.1, 0.1, 0.1])
    optimizer.step()
    assert not bool((weight.detach() * sign < 0).any())
    assert weight[2] == 0 or not bool(weight.isfinite().all())


@pytest.mark.parametrize("cls", [GradRewiring, DeepRewiring])
@pytest.mark.parametrize("where", ["own", "of all optimizers"])
def test_hooks_are_called_once_around_a_step(cls, where):
    params, called = parameters(), []
    optimizer = cls(params, **({"s": 0.9} if cls is GradRewiring else {"max_s": 0.9}))
    hooks = [lambda o, *_: called.append(("before", o)), lambda o, *_: called.append(("after", o))]
    if where == "own":
        register = (optimizer.register_step_pre_hook, optimizer.register_step_post_hook)
    else:
        register = (register_optimizer_step_pre_hook, register_optimizer_step_post_hook)
    for i in (0, 1):  # one alone, too
        handle, before = register[i](hooks[i]), params[0].detach().clone()
        train(optimizer, params, steps=1)
        handle.remove()
        assert called == [(("before", "after")[i], optimizer)]
        assert not torch.equal(params[0], before)
        called.clear()
    train(optimizer, params, steps=1)
    assert called == []


@pytest.mark.parametrize("cls", [GradRewiring, DeepRewiring])
def test_a_profiler_sees_the_step(cls):
    params = parameters()
    optimizer = cls(params, **({"s": 0.9} if cls is GradRewiring else {"max_s": 0.9}))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        train(optimizer, params, steps=2)
    (event,) = [event for event in profiler.key_averages() if event.key == f"Optimizer.step#{cls.__name__}.step"]
    assert event.count == 2


@pytest.mark.parametrize("cls", [GradRewiring, DeepRewiring])
def test_no_step_is_recorded_for_nobody(cls, monkeypatch):
    params = parameters()
    optimizer = cls(params, **({"s": 0.9} if cls is GradRewiring else {"max_s": 0.9}))
    monkeypatch.setattr(torch.autograd.profiler, "record_function", lambda *_: pytest.fail("it is recorded"))
    train(optimizer, params, steps=2)
