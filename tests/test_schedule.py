"""The fast recipe: its learning rate and penalty over a run, the connectivity that it leads to."""

import copy
import math
import re

import pytest
import torch
from run_helpers import load, results, store
from test_models import narrow_cifar10
from test_step import batches, optimizers_of
from torch.optim import Adam

import measuring
from gradrewire import GradRewiring
from training import step
from training.schedule import FastSchedule, PaperSchedule

without_steps = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
THETA = [0.1, 0.7, 0.3, 0.4, 0.5, 0.6, 0.2, 0.8, 0.9, 1.0]


def grad_rewiring(lr=0.25, theta=THETA):
    w = torch.nn.Parameter(torch.tensor(theta) * torch.tensor([1.0, -1.0]).repeat(len(theta) // 2))
    return GradRewiring([w], lr=lr, alpha=0.0, s=0.95)


def settings(optimizers):
    return [(group["lr"], group.get("alpha")) for optimizer in optimizers for group in optimizer.param_groups]


# -- the settings --------------------------------------------------------------------------------------


def test_the_papers_recipe_changes_nothing():
    optimizer = grad_rewiring()
    before = settings([optimizer])
    schedule = PaperSchedule()
    assert not any(schedule.advance(i) for i in range(100))
    schedule.restore(7, schedule.state())
    assert settings([optimizer]) == before
    with pytest.raises(ValueError, match="a schedule, where this run has none"):
        schedule.restore(7, {"penalty": 0.1})


@without_steps
def test_the_learning_rate_has_one_cycle_in_all_optimizers():
    optimizers = [grad_rewiring(lr=0.25), Adam([torch.nn.Parameter(torch.ones(2))], lr=0.5)]
    schedule = FastSchedule(optimizers, 2010, None)
    assert schedule.length == 11  # steps of a segment: 2010 are 182 of 11 and one of 8
    rates, changes = [], []
    for i in range(2010):
        changes.append(schedule.advance(i))
        rates.append(settings(optimizers))
    assert changes == [i % 11 == 0 for i in range(2010)]
    for i in range(2010):
        middle = (i // 11 * 11 + 5.5) / 2010 if i < 2002 else 2006 / 2010
        share = middle / 0.05 if middle < 0.05 else (1 + math.cos(math.pi * (middle - 0.05) / 0.95)) / 2
        assert [rate for rate, _ in rates[i]] == pytest.approx([0.25 * share, 0.5 * share])
    peak = max(rates)
    assert rates.index(peak) in range(90, 112)
    assert peak[0][0] == pytest.approx(0.25, rel=1e-2)
    assert rates[-1][0][0] < 1e-3
    assert [alpha for _, alpha in rates[-1]] == [0.0, None]  # nothing is scheduled but the rate
    assert schedule.state() == {}


def test_the_wanted_connectivity_falls_to_the_target_and_stays():
    schedule = FastSchedule([grad_rewiring()], 10, 0.2)
    half_way = 0.2 ** ((1 - math.exp(-2.5)) / (1 - math.exp(-5)))
    shares = {0.0: 1.0, 0.05: 1.0, 0.375: half_way, 0.7: 0.2, 1.0: 0.2}
    for share, wanted in shares.items():
        assert schedule.penalty.wanted(share) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("steps", "at", "connectivity", "theta"),
    [
        (10, 8, 0.6, 0.4),  # the four smallest of ten are to be pruned
        (10, 8, 0.1, 0.9),
        (10, 8, 1.0, 0.0),
        (10, 1, 0.5, 0.4),  # on the way: after 2 of 10 steps 0.62 are to be left, which is 6 of 10
        (1000, 900, 0.6, 0.4),
    ],
)
def test_the_penalty_prunes_what_is_wanted_by_itself(steps, at, connectivity, theta):
    optimizer = grad_rewiring()
    schedule = FastSchedule([optimizer], steps, connectivity)
    schedule.penalty.max_alpha = math.inf
    schedule.advance(at)
    (group,) = optimizer.param_groups
    moved = sum(group["lr"] / (1 - 0.9**t) for t in range(at + 1, at + 1 + schedule.length))
    assert group["alpha"] == pytest.approx(theta / moved)
    assert schedule.state() == {"penalty": group["alpha"]}


def test_the_last_segment_may_be_shorter():
    optimizer = grad_rewiring()
    schedule = FastSchedule([optimizer], 205, 0.6)  # of 2 steps, the last of 1
    schedule.advance(204)
    assert optimizer.param_groups[0]["alpha"] == pytest.approx(0.4 / optimizer.param_groups[0]["lr"])


@without_steps
def test_a_gradient_can_hold_out_against_the_penalty_until_the_target_is_due():
    optimizer = grad_rewiring()
    schedule = FastSchedule([optimizer], 10, 0.1)
    schedule.advance(5)
    assert optimizer.param_groups[0]["alpha"] == schedule.penalty.max_alpha == 1
    schedule.advance(7)
    assert optimizer.param_groups[0]["alpha"] > 1


@without_steps
def test_theta_of_pruned_connections_counts():
    optimizer = grad_rewiring(theta=[0.5, 0.6])
    (w,) = optimizer.param_groups[0]["params"]
    w.grad = torch.zeros(2)
    optimizer.step()
    optimizer.state[w]["theta"].copy_(torch.tensor([-0.5, 0.6]))  # half of them are pruned
    schedule = FastSchedule([optimizer], 10, 0.5)
    schedule.advance(9)
    assert optimizer.param_groups[0]["alpha"] == 0.0
    optimizer.state[w]["theta"].copy_(torch.tensor([0.5, 0.6]))
    schedule.advance(9)
    assert optimizer.param_groups[0]["alpha"] > 0


@without_steps
@pytest.mark.parametrize("connectivity", [None, 0.3])
def test_settings_come_back_at_every_step(connectivity, monkeypatch):
    monkeypatch.setattr(FastSchedule, "SEGMENTS", 8)  # of 4 steps

    def run_from(schedule, optimizers, first):
        found = []
        for i in range(first, 30):
            schedule.advance(i)
            found.append((settings(optimizers), schedule.state()))
        return found

    optimizers = [grad_rewiring(), Adam([torch.nn.Parameter(torch.ones(2))], lr=0.5)]
    schedule = FastSchedule(optimizers, 30, connectivity)
    schedule.advance(0)
    once = [(settings(optimizers), schedule.state()), *run_from(schedule, optimizers, 1)]
    assert len({str(one) for one in once}) == 8
    for first in range(1, 30):
        again = [grad_rewiring(), Adam([torch.nn.Parameter(torch.ones(2))], lr=0.5)]
        resumed = FastSchedule(again, 30, connectivity)
        resumed.restore(first, once[first - 1][1])
        assert settings(again) == once[first - 1][0]
        assert run_from(resumed, again, first) == once[first:]


@pytest.mark.parametrize(
    "state", [{}, {"penalty": -1.0}, {"penalty": math.nan}, {"penalty": "1"}, {"penalty": 1}, {"penalty": 1.0, "x": 2}]
)
def test_a_state_that_is_none_is_refused(state):
    with pytest.raises(ValueError, match="a schedule"):
        FastSchedule([grad_rewiring()], 10, 0.5).restore(3, state)
    with pytest.raises(ValueError, match="a schedule"):
        FastSchedule([grad_rewiring()], 10, None).restore(3, {"penalty": 1.0})


# learning rates of both optimizers and the penalty of each segment, by steps, segments and connectivity: frozen when
# the recipe's runs were published
SETTINGS = {
    (41, 8, 0.3): [
        (0.019970658011837405, 0.009985329005918702, 0.11995205428801664),
        (0.01846954006671338, 0.00923477003335669, 0.2264860734297809),
        (0.015023265589840835, 0.0075116327949204175, 0.13398138254757852),
        (0.010423323051205625, 0.005211661525602812, 0.11091503570508351),
        (0.005726158043391891, 0.0028630790216959455, 0.09077496755438937),
        (0.002010544752917527, 0.0010052723764587634, 0.12447944380217069),
        (0.00020261090585764973, 0.00010130545292882486, 1.3477681471014562),
    ],
    (41, 8, 0.05): [
        (0.019970658011837405, 0.009985329005918702, 0.2545428308817949),
        (0.01846954006671338, 0.00923477003335669, 0.36162087997817366),
        (0.015023265589840835, 0.0075116327949204175, 0.4163132637141018),
        (0.010423323051205625, 0.005211661525602812, 0.30721166653183435),
        (0.005726158043391891, 0.0028630790216959455, 0.4313137662160473),
        (0.002010544752917527, 0.0010052723764587634, 0.44149251748231977),
        (0.00020261090585764973, 0.00010130545292882486, 2.2961710146572574),
    ],
    (12, 200, 0.05): [
        (0.016666666666666666, 0.008333333333333333, 0.4064138635830662),
        (0.019694002659393302, 0.009847001329696651, 0.7625021736106578),
        (0.01866025403784439, 0.009330127018922194, 0.4906072477703163),
        (0.016972968010939952, 0.008486484005469976, 0.31768674172734523),
        (0.014759473930370734, 0.007379736965185367, 0.2917813041730776),
        (0.012186810912063759, 0.0060934054560318794, 0.3907875469535045),
        (0.009449122396441346, 0.004724561198220673, 0.5148465062367776),
        (0.0067530053079531685, 0.0033765026539765842, 0.7285426125811583),
        (0.004301919424897338, 0.002150959712448669, 0.5834631737762175),
        (0.0022808334908367913, 0.0011404167454183956, 0.4503081663128062),
        (0.0008422667334494249, 0.00042113336672471247, 0.5426131167037754),
        (9.477915362496759e-05, 4.7389576812483793e-05, 2.812808202173611),
    ],
}


@pytest.mark.parametrize(("steps", "segments", "connectivity"), SETTINGS)
def test_the_settings_are_those_of_the_published_runs(steps, segments, connectivity, monkeypatch):
    """In float64, whose rounding leaves the bound by far; the k-th smallest theta hardly follows it."""
    monkeypatch.setattr(FastSchedule, "SEGMENTS", segments)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = [torch.nn.Parameter(normal(30, 20) * 0.1), torch.nn.Parameter(normal(50) * 0.2)]
    other = torch.nn.Parameter(normal(5))
    optimizers = [GradRewiring(weights, lr=0.02, alpha=0.0, s=0.9, foreach=False), Adam([other], lr=0.01)]
    schedule, found = FastSchedule(optimizers, steps, connectivity), []
    for i in range(steps):
        if schedule.advance(i):
            (rate, alpha), (other_rate, _) = settings(optimizers)
            found.append((rate, other_rate, alpha))
        for p in (*weights, other):
            p.grad = p.detach() - 0.1 + normal(*p.shape)
        for optimizer in optimizers:
            optimizer.step()
    expected = SETTINGS[steps, segments, connectivity]
    assert len(found) == len(expected)
    for actual, row in zip(found, expected, strict=True):
        assert actual == pytest.approx(row, rel=1e-9)


# -- runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("connectivity", [0.3, 0.05, 0.007])
def test_a_run_reaches_the_connectivity_that_is_asked_for(run, tmp_path, connectivity):
    argv = f"--dataset digits -m grad --recipe fast --connectivity {connectivity} -b 64 -N 4 -T 4"
    result = run(*argv.split())
    assert (result.status, "--connectivity" in result.out) == (0, False)
    lines = results(tmp_path)
    assert lines[-1]["connectivity"] == pytest.approx(connectivity, rel=0.1)
    assert lines[0]["connectivity"] > 1.1 * connectivity  # not at once
    weights = [weight for name, weight in load(tmp_path)["network"].items() if name.endswith("weight")]
    left = sum(int((weight != 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    assert left == lines[-1]["connectivity"]
    assert lines[-1]["learning_rate"] < 1e-3 * max(line["learning_rate"] for line in lines)
    assert lines[0]["penalty"] != lines[-2]["penalty"]


def test_the_constant_penalty_of_the_same_run_leaves_more(run, tmp_path):
    argv = "--dataset digits -m grad -s 0.95 --recipe fast -b 64 -N 4 -T 4"
    assert run(*argv.split()).status == 0
    lines = results(tmp_path)
    assert {line["penalty"] for line in lines} == {1e-3}
    assert lines[-1]["connectivity"] > 0.5


def test_a_target_above_what_the_gradient_leaves_is_not_reached_and_that_is_said(run, tmp_path):
    argv = "--dataset digits -m grad --recipe fast --connectivity 1 -b 64 -N 4 -T 4"
    result = run(*argv.split())
    assert result.status == 0
    (found,) = re.findall(r"^--connectivity: (\S+) % was reached, not 100 %; the gradient", result.out, re.MULTILINE)
    assert float(found) == pytest.approx(100 * results(tmp_path)[-1]["connectivity"], abs=0.01)
    assert results(tmp_path)[-1]["penalty"] == 0.0


@pytest.mark.parametrize(
    ("argv", "changes"),
    [
        (["-m", "grad", "-s", "0.95"], ()),
        (["-m", "no_prune", "--recipe", "fast"], ("lr",)),
        (["-m", "grad", "-s", "0.95", "--recipe", "fast"], ("lr",)),
        (["-m", "grad", "--connectivity", "0.05", "--recipe", "fast"], ("lr", "alpha")),
    ],
)
def test_a_step_is_told_all_settings_that_change_in_a_run(run, monkeypatch, argv, changes):
    told, seen = [], []
    make, take = step.TrainingStep.__init__, step.TrainingStep.__call__

    def note(self, *args, **settings):
        told.append(settings["changing"])
        make(self, *args, **settings)

    def taken(self, *batch):
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        seen.append([{key: value for key, value in group.items() if key != "params"} for group in groups])
        return take(self, *batch)

    monkeypatch.setattr(step.TrainingStep, "__init__", note)
    monkeypatch.setattr(step.TrainingStep, "__call__", taken)
    monkeypatch.setattr(FastSchedule, "SEGMENTS", 4)
    assert run(*argv, "-b", "8", "-N", "3").status == 0
    assert len(seen) == 15
    assert told == [changes]
    changed = {
        key
        for groups in seen
        for now, first in zip(groups, seen[0], strict=True)
        for key in now
        if now[key] != first[key]
    }
    assert changed == set(changes)


def test_the_number_of_epochs_is_part_of_a_fast_run(run, tmp_path):
    for epochs in ("1", "2"):
        result = run("--recipe", "fast", "-b", "8", "-N", epochs)
        assert (result.status, "Resuming" in result.out) == (0, False)
    assert len(list(tmp_path.glob("models/*"))) == 2


def test_a_checkpoint_with_another_schedule_is_refused(run, tmp_path):
    argv = ["-m", "grad", "--recipe", "fast", "--connectivity", "0.3", "-b", "8", "-N", "2"]
    run(*argv)
    state = load(tmp_path)
    for schedule, message in (
        ({}, "does not fit: a schedule of"),
        ({"penalty": 0.123}, "GradRewiring's alpha is"),
    ):
        store(tmp_path, {**state, "schedule": schedule})
        result = run(*argv)
        assert result.status == 2
        assert message in result.err


@pytest.mark.gpu
def test_a_graph_takes_the_new_settings(monkeypatch):
    monkeypatch.setattr(FastSchedule, "SEGMENTS", 5)  # of 4 steps
    device = torch.device("cuda")
    step.set_precision("fp32", device)
    torch.manual_seed(0)
    eager = narrow_cifar10("m").cuda()
    eager.fc[1].p = 0.0
    graphed = copy.deepcopy(eager)
    takes = []
    for network, graph in ((eager, False), (graphed, True)):
        optimizers = optimizers_of(network, capturable=True, alpha=0.0)
        schedule = FastSchedule(optimizers, 20, 0.3)
        takes.append((schedule, step.TrainingStep(network, optimizers, "fp32", device, graph, schedule.changes)))
    for i, (images, labels) in enumerate(batches(20, (4, 3, 32, 32), device)):
        losses = []
        for schedule, take in takes:
            schedule.advance(i)
            losses.append(float(take(images, labels)[0]))
        assert losses[0] == pytest.approx(losses[1], rel=0.05), i
    for network in (eager, graphed):
        weights = measuring.prunable(network).values()
        left = sum(int((w != 0).sum()) for w in weights) / sum(w.numel() for w in weights)
        assert left == pytest.approx(0.3, rel=0.1)
