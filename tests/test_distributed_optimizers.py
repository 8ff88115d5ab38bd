"""The optimizers on two ranks, with DistributedDataParallel and fully_shard, against one process on whole batches."""

import os
import re
import time
from pathlib import Path

import distributed_worker as worker
import forked
import pytest
import torch
from filelock import FileLock

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
TESTS = Path(__file__).resolve().parent
SECONDS = 900  # for two processes, all cases together, on a busy machine
KINDS = ("ddp", "fsdp") if hasattr(torch.cpu.Stream, "record_event") else ("ddp",)  # torch 2.6 shards only on GPUs
BOUND = 1e-9  # of float64 weights of the scale of 1, after 50 steps on gradients of other rounding

# DistributedDataParallel and fully_shard, each method, and each way to execute it
TRAININGS = [f"{kind}, {method}, {path}" for kind in KINDS for method in worker.METHODS for path in worker.PATHS]
FEATURES = [
    f"{kind}, {method}, plain, {feature}"
    for kind in KINDS
    for method, feature in (
        ("deep", "accumulation"),
        ("grad", "scaler"),
        ("deep", "scaler"),
        ("soft deep", "compile"),
        ("deep", "checkpoint"),
        ("soft deep", "checkpoint"),
    )
]
QUICK = ["ddp, deep, plain", "fsdp, deep, plain", "fsdp, schedule, plain", "fsdp, soft deep, fused", "other weights"]
SLOW = [*TRAININGS, *FEATURES, *worker.cases(0)]
if KINDS == ("ddp",):
    QUICK = [name for name in QUICK if not name.startswith("fsdp")]


def on_two_ranks(folder, names):
    """What each rank found, by case."""
    pytest.importorskip("torch.distributed.fsdp", reason="needs torch.distributed.fsdp")
    command = [TESTS / "distributed_worker.py"]
    # without a network: a file to meet at, and sockets on this machine alone
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    processes = [forked.start([*command, rank, folder, *names], env=environment) for rank in range(worker.RANKS)]
    end = time.monotonic() + SECONDS
    try:
        outputs = [process.communicate(timeout=max(end - time.monotonic(), 0)) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * worker.RANKS, outputs
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(worker.RANKS)]


@pytest.fixture(scope="session")
def slow_results(tmp_path_factory):
    """Of all cases, from one pair of processes for all workers of pytest."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two ranks"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            return on_two_ranks(folder, SLOW)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(worker.RANKS)]


def assert_same(actual, expected, bound=0):
    assert isinstance(actual, list), actual
    for p, q in zip(actual, expected, strict=True):
        assert torch.equal(p == 0, q == 0)
        torch.testing.assert_close(p, q, rtol=0, atol=bound)


def assert_as_one_process(results, name):
    """The same weights on both ranks, to the bit, and those of one process; some are 0, and not all."""
    for_kernels = "fused" in name
    kind, method, path, *feature = name.split(", ")
    expected = worker.training("one", method, path, *feature, exact=for_kernels)
    if for_kernels and kind == "fsdp" and "deep" in method:
        # the kernels draw other numbers, and give way where each rank has a part; torch's fused Adam, which rounds in
        # its own way, does not, and the biases' gradients do not depend on the weights
        plain = worker.training("one", method, "plain", exact=True)
        expected = [p if p.dim() == 1 else q for p, q in zip(expected, plain, strict=True)]
    first, second = (found[name] for found in results)
    assert_same(first, expected, 0 if for_kernels else BOUND)
    assert_same(second, first)
    weights = [p for p in expected if p.dim() > 1]
    assert 0 < sum(int((p == 0).sum()) for p in weights) < sum(p.numel() for p in weights)


def test_two_ranks_train_as_one_process(request, tmp_path):
    """A short choice of the cases below; it has its own processes where those are left out."""
    if any("slow_results" in getattr(item, "fixturenames", ()) for item in request.session.items):
        results = request.getfixturevalue("slow_results")
    else:
        results = on_two_ranks(tmp_path, QUICK)
    for name in QUICK[:-1]:
        assert_as_one_process(results, name)
    assert_refused(results, QUICK[-1], "weights differ between ranks 0 and 1: parameter 0 of group 0. Load")


# -- all cases -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TRAININGS, *FEATURES])
def test_each_way_to_train(name, slow_results):
    assert_as_one_process(slow_results, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", worker.COLUMNS)
def test_a_weight_whose_ranks_have_other_columns_is_updated_as_a_whole(name, slow_results):
    """With an odd number of columns, and most dormant connections on one rank; also beside weights of other layouts."""
    method, settings = worker.COLUMNS[name]
    expected = worker.by_columns(method, ranks=1, **settings)
    for weight in expected:
        assert 0 < int((weight == 0).sum()) < weight.numel()
    for found in slow_results:
        assert_same(found[name], expected)


@pytest.mark.slow
def test_without_a_generator_masks_come_apart(slow_results):
    """All ranks start with the same seed, and draw other numbers from then on."""
    first, second = (found["without a generator"] for found in slow_results)
    assert sum(int(((p == 0) != (q == 0)).sum()) for p, q in zip(first, second, strict=True)) > 0


def assert_refused(results, name, message):
    """By the rank that comes second to its first step, whichever it is."""
    errors = [found[name] for found in results if isinstance(found[name], str)]
    assert len(errors) == 1, results
    assert errors[0].startswith(f"RuntimeError: {message}")
    assert len(errors[0].splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other weights", "weights differ between ranks 0 and 1: parameter 0 of group 0. Load the same"),
        ("other weights of Grad R", "weights differ between ranks 0 and 1: parameter 0 of group 0. Load the same"),
        (
            "other seeds",
            "random numbers differ between ranks 0 and 1: the state of the generator. "
            "Give DeepRewiring a generator seeded equally on every rank",
        ),
        (
            "other default seeds",
            "random numbers differ between ranks 0 and 1: the state of the default generator of cpu. "
            "Give DeepRewiring a generator seeded equally on every rank",
        ),
        ("a state on one rank", "states differ between ranks 0 and 1: step of parameter 0 of group 0, exp_avg"),
        ("other settings", "settings differ between ranks 0 and 1: weight_decay of group 0"),
    ],
)
def test_ranks_that_differ_at_the_first_step_are_refused(name, message, slow_results):
    assert_refused(slow_results, name, message)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("the same", "the same default seeds", "other default seeds that nobody draws from"),
        *("other weights on purpose", "other networks", "other ways to execute", "only one rank", "later"),
    ],
)
def test_ranks_that_may_differ_are_not_refused(name, slow_results):
    """Nor does one wait for the other."""
    assert [found[name] for found in slow_results if isinstance(found[name], str)] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flat parameters", r"a parameter of FullyShardedDataParallel is not accepted: it is a part .*fully_shard"),
        ("partial sums", r"a parameter with the placements \(Partial\(sum\),\) is not accepted"),
    ],
)
def test_what_cannot_work_is_refused_by_name(name, message, slow_results):
    for found in slow_results:
        assert re.match(f"ValueError: {message}", found[name])


# -- one process -----------------------------------------------------------------------------------


def test_one_process_compares_nothing(monkeypatch):
    """Nor does it ask again after its first step."""
    asked = []
    monkeypatch.setattr("sharding.several_ranks", lambda: asked.append(1) or False)
    monkeypatch.setattr("sharding.checksum", None)
    worker.steps_of()
    assert asked == [1]
