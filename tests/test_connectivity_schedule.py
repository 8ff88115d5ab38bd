"""ConnectivitySchedule: the connectivity that it leads any network to, and the penalties that it sets on the way."""

import copy
import inspect
import io
import math
import re
import textwrap

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

import gradrewire
from deeprewire import DeepRewiring
from gradrewire import ConnectivitySchedule, GradRewiring

THETA = [0.1, 0.7, 0.3, 0.4, 0.5, 0.6, 0.2, 0.8, 0.9, 1.0]
TOLERANCE = 0.02


def weight(theta=THETA):
    return torch.nn.Parameter(torch.tensor(theta) * torch.tensor([1.0, -1.0]).repeat(len(theta) // 2))


def grad_rewiring(**settings):
    return GradRewiring([weight()], **{"lr": 0.25, "alpha": 0, **settings})


def connectivity(weights):
    return sum(int((w != 0).sum()) for w in weights) / sum(w.numel() for w in weights)


# -- what is reached ---------------------------------------------------------------------------------


class Task:
    """A network with what no method prunes, BatchNorm and biases, and 18 000 weights; batches of a regression."""

    def __init__(self, rate=2e-3, schedule=None, wanted=0.05, steps=200, convolution=False, groups=1, **settings):
        torch.manual_seed(0)
        self.network = torch.nn.Sequential(
            torch.nn.Linear(40, 200), torch.nn.BatchNorm1d(200), torch.nn.ReLU(), torch.nn.Linear(200, 50)
        )
        if convolution:
            self.network = torch.nn.Sequential(
                torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.BatchNorm2d(16), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
                torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.BatchNorm2d(32), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
                torch.nn.Flatten(), torch.nn.Linear(2 * 32, 200, bias=False), torch.nn.Linear(200, 50),
            )  # fmt: skip
            self.network.insert(0, torch.nn.Unflatten(1, (1, 5, 8)))
        self.weights = [p for p in self.network.parameters() if p.dim() > 1]
        others = [p for p in self.network.parameters() if p.dim() == 1]
        parts = [{"params": self.weights[i::groups], "lr": rate / (i + 1)} for i in range(groups)]
        self.optimizer = GradRewiring([*parts, {"params": others, "prune": False}], lr=rate, alpha=0)
        rates = {None: None, "one cycle": lambda o: OneCycleLR(o, rate, total_steps=steps)}
        rates["cosine"] = lambda o: CosineAnnealingLR(o, steps)
        self.rates = rates[schedule](self.optimizer) if schedule else None
        self.schedule = ConnectivitySchedule(self.optimizer, wanted, steps, **settings)

    def train(self, first, last):
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(32, 40, generator=generator)
            y = x[:, :5].sum(1, keepdim=True).sin() + torch.arange(50) / 50
            self.optimizer.zero_grad()
            torch.nn.functional.mse_loss(self.network(x), y).backward()
            self.optimizer.step()
            if self.rates:
                self.rates.step()
            self.schedule.step()
        return connectivity(self.weights)


RATES = [(1e-3, None), (5e-3, "one cycle"), (5e-3, "cosine"), (1e-3, "one cycle")]


@pytest.mark.parametrize(
    ("rate", "schedule", "wanted"),
    [*((2e-3, None, w) for w in (0.3, 0.1, 0.05, 0.02, 0.01)), *((*how, w) for how in RATES for w in (0.3, 0.01))],
)
def test_the_wanted_connectivity_is_reached_in_200_steps(rate, schedule, wanted):
    assert Task(rate, schedule, wanted).train(0, 200) == pytest.approx(wanted, rel=TOLERANCE)


@pytest.mark.parametrize("wanted", [0.3, 0.05, 0.01])
@pytest.mark.parametrize(
    "arguments", [dict(convolution=True), dict(groups=2), dict(steps=1000, schedule="one cycle"), dict(segments=100)]
)
def test_it_is_reached_by_convolutions_groups_and_in_longer_segments(arguments, wanted):
    steps = arguments.get("steps", 200)
    assert Task(wanted=wanted, **arguments).train(0, steps) == pytest.approx(wanted, rel=TOLERANCE)


def test_it_is_held_after_the_last_step():
    task = Task(wanted=0.1)
    task.train(0, 200)
    assert task.train(200, 260) == pytest.approx(0.1, rel=TOLERANCE)


@pytest.mark.parametrize("reload", [None, "before", "after"])
def test_another_schedule_goes_on_where_one_has_ended(reload):
    """Also with what a checkpoint of the network and the optimizer has, without the first schedule's state."""
    task = Task(rate=1e-2, wanted=0.3)
    task.train(0, 200)
    assert task.optimizer.param_groups[0]["s"] is not None
    if reload is not None:
        before, task = task, Task(rate=1e-2)
        task.network.load_state_dict(before.network.state_dict())
    if reload == "before":
        task.optimizer.load_state_dict(copy.deepcopy(before.optimizer.state_dict()))
    if reload != "after":
        task.schedule = ConnectivitySchedule(task.optimizer, 0.05, 200)
    else:
        task.optimizer.load_state_dict(copy.deepcopy(before.optimizer.state_dict()))
    assert task.train(200, 400) == pytest.approx(0.05, rel=TOLERANCE)


def test_an_s_that_the_user_has_set_stays():
    optimizer = grad_rewiring(s=0.95)
    for _ in range(2):
        ConnectivitySchedule(optimizer, 0.5, 10, begin=0, end=0)
        assert (optimizer.param_groups[0]["s"], "scheduled_s" in optimizer.param_groups[0]) == (0.95, False)
    optimizer = grad_rewiring()
    ConnectivitySchedule(optimizer, 0.5, 10, begin=0, end=0)
    optimizer.param_groups[0]["s"] = 0.9  # instead of what the schedule has set
    ConnectivitySchedule(optimizer, 0.5, 10, begin=0, end=0)
    assert optimizer.param_groups[0]["s"] == 0.9


def test_a_group_that_a_schedule_has_had_joins_another():
    optimizer = grad_rewiring()
    ConnectivitySchedule(optimizer, 0.5, 10, begin=0, end=0)
    (had,) = optimizer.param_groups
    other = grad_rewiring()
    schedule = ConnectivitySchedule(other, 0.5, 10)
    other.add_param_group({**had, "params": [weight()]})
    schedule.begin_segment(0)
    assert schedule.sets_s == [True, True]


@pytest.mark.parametrize("wanted", [0.05, 0.3])
def test_an_s_of_a_half_with_which_no_weight_would_stay_pruned_is_set(wanted):
    """An older optimizer's state has it without a mark, too, where its schedule's alpha was 0."""
    task = Task(wanted=wanted)
    task.optimizer.param_groups[0]["s"] = 0.5
    task.schedule = ConnectivitySchedule(task.optimizer, wanted, 200)
    assert task.train(0, 200) == pytest.approx(wanted, rel=TOLERANCE)


def test_an_s_of_a_half_that_a_captured_graph_has_read_is_refused():
    optimizer = grad_rewiring(alpha=torch.tensor(0.0, dtype=torch.float64), s=0.5, capturable=True)
    with pytest.raises(ValueError, match=r"s=0\.5 and alpha in a tensor; give an s above 0\.5$"):
        ConnectivitySchedule(optimizer, 0.5, 10)
    optimizer.param_groups[0]["s"] = 0.6
    ConnectivitySchedule(optimizer, 0.5, 10, begin=0, end=0)
    assert optimizer.param_groups[0]["s"] == 0.6


@pytest.mark.parametrize("when", [0, 30])
def test_frozen_weights_do_not_count(when):
    """Else the others would be pruned for them."""
    task = Task(wanted=0.1)
    task.train(0, when)
    frozen, rest = task.weights
    frozen.requires_grad_(False)
    if when == 0:
        task.schedule = ConnectivitySchedule(task.optimizer, 0.1, 200)
    frozen.grad = None
    before = frozen.clone()
    task.train(when, 200)
    assert torch.equal(frozen, before)
    assert connectivity([rest]) == pytest.approx(0.1, rel=TOLERANCE)


def test_where_all_weights_are_frozen_there_is_no_penalty():
    optimizer = grad_rewiring()
    optimizer.param_groups[0]["params"][0].requires_grad_(False)
    schedule = ConnectivitySchedule(optimizer, 0.1, 10, begin=0, end=0)
    schedule.step()
    assert optimizer.param_groups[0]["alpha"] == 0


def test_without_the_schedule_it_is_missed_by_far():
    task = Task()
    task.schedule.step = lambda: None
    assert task.train(0, 200) > 0.3


def test_where_the_gradient_prunes_more_the_penalty_is_0():
    w = torch.nn.Parameter(torch.full((100,), 0.1))
    optimizer = GradRewiring([w], lr=0.01, alpha=0)
    schedule = ConnectivitySchedule(optimizer, 0.9, 50)
    for _ in range(50):
        w.grad = torch.ones(100)
        optimizer.step()
        schedule.step()
    assert connectivity([w]) == 0
    assert optimizer.param_groups[0]["alpha"] == 0.0


def test_the_example_of_the_module_runs_and_reaches_what_it_says():
    example = textwrap.dedent(re.search(r"::\n\n(.*)\Z", inspect.getdoc(gradrewire), re.DOTALL)[1])
    torch.manual_seed(0)
    x = torch.randn(512, 20)
    names = {
        "torch": torch,
        "network": torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)),
        "x": x,
        "y": x[:, :3].sum(1, keepdim=True),
        **vars(gradrewire),
    }
    exec(example, names)
    assert len(example.strip().splitlines()) <= 10
    assert connectivity(names["weights"]) == pytest.approx(0.05, rel=TOLERANCE)


# -- the penalties -----------------------------------------------------------------------------------


def moved(lr, beta1, steps, first=1):
    return sum(lr / (1 - beta1**t) for t in range(first, first + steps))


def test_the_constructor_sets_the_first_penalty():
    optimizer = grad_rewiring()
    ConnectivitySchedule(optimizer, 0.2, 10, begin=0.0, end=0.1, max_alpha=100.0)
    (group,) = optimizer.param_groups
    assert group["alpha"] == pytest.approx(0.8 / moved(0.25, 0.9, 1))


def test_s_keeps_mu_near_where_there_is_none():
    optimizer = grad_rewiring()
    (group,) = optimizer.param_groups
    schedule = ConnectivitySchedule(optimizer, 0.2, 10, end=0.1)
    for rate in (0.25, 0.5, 0.1):
        group["lr"] = rate
        schedule.step()
        mu = math.log(2 * (1 - group["s"])) / group["alpha"]
        assert mu == pytest.approx(max(-7 * max(rate, 0.5 if rate == 0.1 else 0), math.log(2e-4) / group["alpha"]))
    optimizer = grad_rewiring(s=0.6)
    ConnectivitySchedule(optimizer, 0.2, 10, end=0.1).step()
    assert optimizer.param_groups[0]["s"] == 0.6


def test_groups_have_one_quantile_and_each_its_own_penalty():
    first, second, plain = weight(THETA[:4]), weight(THETA[4:]), weight([1e-3, 1e-3])
    groups = [
        {"params": [first], "lr": 0.5},
        {"params": [plain], "prune": False},
        {"params": [second], "lr": 0.1, "betas": (0.5, 0.9)},
    ]
    optimizer = GradRewiring(groups, alpha=0)
    ConnectivitySchedule(optimizer, 0.6, 20, begin=0.0, end=0.0, segments=10)
    alphas = [group["alpha"] for group in optimizer.param_groups]
    assert alphas == pytest.approx([0.4 / moved(0.5, 0.9, 2), 0, 0.4 / moved(0.1, 0.5, 2)])
    for p in (first, second, plain):
        p.grad = torch.zeros_like(p)
    for _ in range(2):
        optimizer.step()
    assert connectivity([first, second]) in (0.6, 0.7)  # that of 0.4 is 0 but for rounding
    assert connectivity([plain]) == 1


@pytest.mark.parametrize("foresight", [False, True])
def test_foresight_is_where_momentum_alone_takes_theta(foresight):
    """Without a prior; exact where the denominator stays, with amsgrad and a short memory."""
    optimizer = grad_rewiring(lr=0.01, betas=(0.9, 0.5), amsgrad=True)
    (group,), generator = optimizer.param_groups, torch.Generator().manual_seed(0)
    (w,) = group["params"]
    for _ in range(60):
        w.grad = torch.rand(w.shape, generator=generator)
        optimizer.step()
    thetas = [optimizer.state[w]["theta"].clone()]
    ConnectivitySchedule(optimizer, 0.5, 8, segments=2, begin=0, end=0, max_alpha=1e6, foresight=foresight)
    alpha, group["alpha"] = group["alpha"], 0
    for _ in range(4):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    thetas.append(optimizer.state[w]["theta"])
    penalties = [max(0, float(theta.kthvalue(5).values)) / moved(0.01, 0.9, 4, first=61) for theta in thetas]
    assert alpha == pytest.approx(penalties[foresight], rel=1e-4)
    assert abs(penalties[0] - penalties[1]) > 0.01 * penalties[0]


def test_amsgrad_may_be_turned_on_between_steps():
    task = Task()
    task.train(0, 50)
    task.optimizer.param_groups[0]["amsgrad"] = True
    task.schedule.begin_segment(50)
    assert task.train(50, 200) == pytest.approx(0.05, rel=TOLERANCE)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_theta_that_is_not_finite_makes_no_penalty(bad):
    """Which the optimizer would refuse at the next step."""
    optimizer = grad_rewiring()
    p = optimizer.param_groups[0]["params"][0]
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[p]["theta"].fill_(bad)
    schedule = ConnectivitySchedule(optimizer, 0.5, 10, begin=0, end=0)
    assert optimizer.param_groups[0]["alpha"] == 0
    optimizer.step()
    schedule.step()


def test_foresight_of_amsgrad_is_by_its_largest_moment():
    """By the other one, after a large gradient, theta would go much further."""
    optimizer = grad_rewiring(lr=0.01, amsgrad=True, betas=(0.9, 0.5))
    p = optimizer.param_groups[0]["params"][0]
    for size in (100.0, *[1.0] * 30):
        p.grad = torch.full_like(p, size)
        optimizer.step()
    state, group = optimizer.state[p], optimizer.param_groups[0]
    assert bool((state["max_exp_avg_sq"] > 100 * state["exp_avg_sq"]).all())
    schedule = ConnectivitySchedule(optimizer, 1.0, 10)  # which needs no prior
    expected = schedule._theta(p, group, 5)
    p.grad = torch.zeros_like(p)
    for _ in range(5):
        optimizer.step()
    torch.testing.assert_close(state["theta"], expected, rtol=1e-5, atol=0)


def test_segments_and_the_largest_penalty():
    optimizer = grad_rewiring(lr=1e-3)
    (group,) = optimizer.param_groups
    schedule = ConnectivitySchedule(optimizer, 0.1, 100, segments=20, end=0.5, max_alpha=0.75)
    alphas = [group["alpha"]]
    for _ in range(100):
        schedule.step()
        alphas.append(group["alpha"])
    for step, alpha in enumerate(alphas):
        assert alpha == alphas[step // 5 * 5]
    assert set(alphas[5:50]) == {0.75}
    assert min(alphas[50:]) > 0.75
    assert schedule.taken == 100


def test_steps_that_the_optimizer_took_before_count_for_its_step_size():
    optimizer = grad_rewiring()
    (w,) = optimizer.param_groups[0]["params"]
    for _ in range(7):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    ConnectivitySchedule(optimizer, 0.6, 10, begin=0, end=0, max_alpha=100.0)
    assert optimizer.param_groups[0]["alpha"] == pytest.approx(0.4 / moved(0.25, 0.9, 1, first=8))


def test_the_penalty_follows_the_learning_rate_within_a_segment():
    optimizer = grad_rewiring()
    (group,) = optimizer.param_groups
    schedule = ConnectivitySchedule(optimizer, 0.5, 100, segments=2, begin=0, end=0)
    alpha = group["alpha"]
    for rate, expected in (
        (0.25, alpha),
        (0.5, alpha / 2),
        (0.0, 0.0),
        (0.125, 2 * alpha),
        (torch.tensor(0.25), alpha),
    ):
        group["lr"] = rate
        schedule.step()
        assert group["alpha"] == pytest.approx(expected)
        assert type(group["alpha"]) is float


@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0)])
def test_nothing_is_divided_by_a_learning_rate_of_0(rate):
    optimizer = grad_rewiring(lr=rate)
    schedule = ConnectivitySchedule(optimizer, 0.5, 10, begin=0, end=0)
    for _ in range(10):
        schedule.step()
        assert optimizer.param_groups[0]["alpha"] == 0.0


# -- checkpoints ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule_first", [False, True])
@pytest.mark.parametrize("stop", [1, 37, 40, 60])
def test_a_run_goes_on_to_the_bit(stop, schedule_first):
    """Also within a segment, of 4 steps, and after the last step."""
    arguments = dict(schedule="cosine", steps=60, segments=15, groups=2)
    whole, part, rest = (Task(**arguments) for _ in range(3))
    whole.train(0, 64)
    part.train(0, stop)
    buffer = io.BytesIO()
    saved = [x.state_dict() for x in (part.network, part.optimizer, part.rates, part.schedule)]
    torch.save(saved, buffer)
    buffer.seek(0)
    network, optimizer, rates, schedule = torch.load(buffer, weights_only=True)
    rest.network.load_state_dict(network)
    if schedule_first:
        rest.schedule.load_state_dict(schedule)
    rest.optimizer.load_state_dict(optimizer)
    rest.rates.load_state_dict(rates)
    if not schedule_first:
        rest.schedule = ConnectivitySchedule(rest.optimizer, 0.5, 7)  # the state brings the rest
        rest.schedule.load_state_dict(schedule)
    rest.train(stop, 64)
    for p, q in zip(whole.network.parameters(), rest.network.parameters(), strict=True):
        assert torch.equal(p, q)
    assert rest.schedule.state_dict() == whole.schedule.state_dict()
    assert [g["alpha"] for g in rest.optimizer.param_groups] == [g["alpha"] for g in whole.optimizer.param_groups]


def test_a_state_is_plain_and_does_not_change_with_the_schedule():
    schedule = ConnectivitySchedule(grad_rewiring(), 0.5, 10)
    state = schedule.state_dict()
    before = copy.deepcopy(state)
    assert all(type(value) in (int, float, bool, list) for value in state.values())
    for _ in range(5):
        schedule.step()
    assert state == before
    other = ConnectivitySchedule(grad_rewiring(), 0.5, 10)
    other.load_state_dict(state)
    other.alphas[0] = -1.0
    assert state == before


def test_a_state_that_is_none_is_refused_and_changes_nothing():
    schedule = ConnectivitySchedule(grad_rewiring(), 0.5, 10)
    state = schedule.state_dict()
    for bad in ({}, {**state, "more": 1}, {**state, "alphas": [0.0, 0.0]}):
        with pytest.raises(ValueError, match="ConnectivitySchedule's"):
            schedule.load_state_dict(bad)
        assert schedule.state_dict() == state


@pytest.mark.parametrize(
    ("key", "bad"),
    [
        *[("taken", bad) for bad in ("x", None, -1, math.nan, 1.0, True)],
        *[("steps", 0), ("length", 0), ("connectivity", 7), ("end", None), ("foresight", 1), ("largest_lr", -1.0)],
        *[("lrs", [math.inf]), ("lrs", 0.25), ("alphas", ["0"]), ("alphas", [-1.0]), ("sets_s", [None])],
    ],
)
def test_a_state_with_a_bad_value_is_refused_and_changes_nothing(key, bad):
    schedule = ConnectivitySchedule(grad_rewiring(), 0.5, 10)
    state, group = schedule.state_dict(), dict(schedule.optimizer.param_groups[0])
    with pytest.raises(ValueError, match=key):
        schedule.load_state_dict({**state, key: bad})
    assert schedule.state_dict() == state
    assert schedule.optimizer.param_groups[0] == group


def test_a_group_that_is_added_later_is_scheduled_too():
    task = Task(wanted=0.1)
    for group in task.optimizer.param_groups:
        group.update(alpha=0.0, s=None)
    last = task.optimizer.param_groups[0]["params"].pop()  # as if it had been forgotten
    schedule = task.schedule = ConnectivitySchedule(task.optimizer, 0.1, 200)
    task.train(0, 20)
    task.optimizer.add_param_group({"params": [last], "alpha": 0})
    assert task.train(20, 200) == pytest.approx(0.1, rel=0.02)
    assert task.optimizer.param_groups[-1]["s"] is not None
    assert schedule.sets_s == [True, True, True]


def test_a_state_from_before_an_added_group_joins_is_loaded():
    def begun(schedule):
        torch.manual_seed(0)
        optimizer = grad_rewiring()
        found = ConnectivitySchedule(optimizer, 0.5, 10, segments=5) if schedule else None
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.randn(4, 4))]})
        return found or optimizer

    schedule, optimizer = begun(True), begun(False)
    state = schedule.state_dict()
    assert len(state["alphas"]) == 1
    other = ConnectivitySchedule(optimizer, 0.9, 3)
    before = other.state_dict()
    for key in ("sets_s", "lrs", "alphas"):
        with pytest.raises(ValueError, match="as many groups"):
            other.load_state_dict({**state, key: []})
        assert other.state_dict() == before
    other.load_state_dict(state)
    assert other.state_dict() == state
    optimizer.param_groups[1]["s"] = None  # which the schedule before had set
    for _ in range(2):  # to the next segment
        schedule.step(), other.step()
    assert other.state_dict() == schedule.state_dict()
    assert len(other.alphas) == 2


@pytest.mark.parametrize("at", [0.0, 0.3, 1.0])
def test_a_schedule_may_prune_at_once(at):
    """Where begin is end, C is wanted from there on, and everything before."""
    schedule = ConnectivitySchedule(grad_rewiring(), 0.2, 10, begin=at, end=at)
    assert [schedule.wanted(share) for share in (0.0, 0.25, 0.3, 0.5, 1.0)] == [
        0.2 if share >= at else 1.0 for share in (0.0, 0.25, 0.3, 0.5, 1.0)
    ]


def test_a_short_last_segment_does_not_prune_on():
    optimizer = grad_rewiring()
    schedule = ConnectivitySchedule(optimizer, 0.6, 5, begin=1.0, end=1.0, segments=2)  # of 3 and 2 steps
    (w,) = optimizer.param_groups[0]["params"]
    for step in range(1, 9):
        w.grad = torch.zeros_like(w)
        optimizer.step()
        schedule.step()
        if step >= 5:
            assert 0.6 <= float((w != 0).double().mean()) <= 0.7  # as the k-th smallest theta itself may stay


def test_numbers_of_numpy_become_plain():
    share = np.float32(0.5)
    schedule = ConnectivitySchedule(grad_rewiring(), share, 10, begin=share / 2, end=share, max_alpha=share)
    assert {type(value) for value in schedule.state_dict().values()} <= {int, float, bool, list}


# -- arguments -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *[("connectivity", bad) for bad in (0, -0.1, 1.1, math.nan, "0.1", None, True)],
        *[(name, bad) for name in ("steps", "segments") for bad in (0, -1, 1.5, 10.0, math.inf, None, True)],
        *[("begin", bad) for bad in (-0.1, 1.1, math.nan, None)],
        *[("end", bad) for bad in (0.01, 1.1, math.nan, None)],
        *[("max_alpha", bad) for bad in (0, -1.0, math.inf, None)],
        *[("foresight", bad) for bad in (None, 1)],
    ],
)
def test_a_bad_argument_is_a_value_error_that_names_it(name, bad):
    optimizer = grad_rewiring()
    with pytest.raises(ValueError, match=f"^{name}=.* is not accepted") as error:
        ConnectivitySchedule(optimizer, **{"connectivity": 0.5, "steps": 10, name: bad})
    assert "\n" not in str(error.value)
    assert optimizer.param_groups[0]["alpha"] == 0


def test_an_optimizer_that_has_nothing_to_schedule_is_refused_in_one_line():
    for optimizer in (torch.optim.Adam([weight()]), DeepRewiring([weight()], max_s=0.5)):
        with pytest.raises(
            TypeError, match=f"^ConnectivitySchedule .*GradRewiring; {type(optimizer).__name__} has none$"
        ):
            ConnectivitySchedule(optimizer, 0.5, 10)
    with pytest.raises(ValueError, match="all of its groups have prune=False"):
        ConnectivitySchedule(GradRewiring([{"params": [weight()], "prune": False}]), 0.5, 10)


def test_what_grad_rewiring_asks_for_names_both_ways_to_go_on():
    with pytest.raises(ValueError, match=r"^s=None .* s=0\.95 .* alpha=0.* ConnectivitySchedule.*$"):
        GradRewiring([weight()])


# -- the k-th smallest theta -----------------------------------------------------------------------------

TINY = 2.0**-149
PARTS = {
    "normal": [0.3, -0.1, 0.2, 5.0, -7.0],
    "ties": [0.25] * 4 + [0.5] * 3 + [0.25],
    "zeros": [0.0, -0.0, -0.0, 1.0, -1.0, 0.0],
    "denormal": [TINY, -TINY, 3 * TINY, 2.0**-127, -(2.0**-130), 0.0],
    "infinite": [math.inf, -math.inf, 1.0, 3.4e38, -3.4e38, -math.inf],
    "nan": [math.nan, 1.0, math.inf, -math.nan, -2.0],
    "one": [-0.125],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("part", PARTS)
def test_counting_finds_what_sorting_finds(part, dtype):
    values = torch.tensor(PARTS[part], dtype=torch.float64).to(dtype)
    for k in range(1, len(values) + 1):
        expected = values.kthvalue(k).values.double()
        found = torch.tensor(gradrewire._smallest_by_counting([values], k), dtype=torch.float64)
        assert torch.equal(found, expected) or (found.isnan() and expected.isnan()), (k, found, expected)


@pytest.mark.parametrize("at_once", [1, 7, 2**22])
def test_counting_takes_all_values_of_all_tensors(monkeypatch, at_once):
    monkeypatch.setattr(gradrewire, "COUNTED_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, 3, generator=generator).round(decimals=1) for n in (20, 1, 7)]
    tensors += [torch.randn(5, 4, generator=generator).t(), torch.randn(9, generator=generator, dtype=torch.float64)]
    tensors.append(torch.randn(6, generator=generator).bfloat16())
    values = torch.cat([tensor.flatten().double() for tensor in tensors])
    for k in range(1, len(values) + 1, 5 if at_once == 1 else 1):
        expected = float(values.kthvalue(k).values)
        assert gradrewire._smallest_by_counting(tensors, k) == gradrewire._smallest(tensors, k) == expected


def test_counting_needs_little_memory(monkeypatch):
    """What it makes of the values at a time, it makes of few."""
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != start:
                made.append(out.nbytes)
            return out

    monkeypatch.setattr(gradrewire, "COUNTED_AT_ONCE", 100)
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    start = values.untyped_storage().data_ptr()
    with Watch():
        gradrewire._smallest_by_counting([values], 1234)
    assert 0 < max(made) <= 8 * 100


# -- alpha in a tensor -----------------------------------------------------------------------------------


def test_a_schedule_writes_into_the_tensor_of_a_captured_graph():
    runs = []
    for alpha in (0.0, torch.zeros((), dtype=torch.float64)):
        optimizer = grad_rewiring(alpha=alpha, s=0.9)
        schedule = ConnectivitySchedule(optimizer, 0.3, 20)
        (w,), found = optimizer.param_groups[0]["params"], []
        for _ in range(25):
            w.grad = w.detach() - 0.2
            optimizer.step()
            schedule.step()
            found.append((float(optimizer.param_groups[0]["alpha"]), w.tolist()))
        assert (optimizer.param_groups[0]["alpha"] is alpha) == isinstance(alpha, torch.Tensor)
        assert all(type(value) is not torch.Tensor for value in schedule.state_dict().values())
        runs.append((found, schedule.state_dict()))
    assert len({alpha for alpha, _ in runs[0][0]}) > 3
    assert runs[0] == runs[1]
