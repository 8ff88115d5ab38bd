"""The commands on a pretended GPU: torch's own CUDA code over a driver whose kernels do nothing (pretended_runs.py).

It shows crashes, wrong devices, calls that a capture forbids, memory and numbers of launches.
"""

import itertools
import os
import re
import shutil
import signal

import pretended_runs
import pytest
from filelock import FileLock
from pretended_runs import parse

needs_driver = pytest.mark.skipif(
    pretended_runs.unavailable() is not None, reason=pretended_runs.unavailable() or "a pretended GPU"
)
GRAD, DEEP = ("-m", "grad", "-s", "0.95"), ("-m", "deep", "-s", "0.5", "-temperature", "1e-3")
SOFT = ("-m", "deep", "-soft", "-s", "0.95", "-temperature", "1e-3")
MODES = {"grad": GRAD, "deep": DEEP, "soft": SOFT, "no_prune": ("-m", "no_prune")}
NARROW = ("--width", "16")


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder for the kernels that all tests compile, once the driver is built; workers share it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with FileLock(base / "driver.lock"):
        folder = base / "compiled kernels"
        if not folder.exists():
            build = tmp_path_factory.mktemp("build")
            assert pretended_runs.run(["-c", "import torch; torch.zeros(1).cuda()"], build).status == 0
            folder.mkdir()
    return folder


@pytest.fixture
def gpu(shared, tmp_path):
    """Runs a command on pretended GPUs: as pretended_runs.run does, in a folder of its own."""
    numbers = itertools.count()

    def run(*argv, **settings):
        folder = tmp_path / f"run {next(numbers)}"
        caches = {"TORCHINDUCTOR_CACHE_DIR": str(shared / "inductor"), "TRITON_CACHE_DIR": str(shared / "triton")}
        return pretended_runs.run([*map(str, argv)], folder, **caches, **settings)

    return run


@pytest.fixture
def train(gpu, tmp_path):
    """Trains for ten steps an epoch, as a script does; checks that it went well, on the first device alone."""

    def run(experiment, *argv, dump=tmp_path / "runs", images=None, devices=frozenset({0}), status=0, **settings):
        images = images or {"c10": 160, "mnist": 1280}[experiment]
        script = f"{experiment}/{experiment}.py"
        result = gpu(script, *argv, "--dump-dir", dump, images=images, **settings)
        check(result, devices, status)
        return result

    yield run
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)  # the published network's checkpoints are large


def check(run, devices=frozenset({0}), status=0):
    """A command has ended as it should: in no process a call that is not allowed, or work on another device."""
    assert run.status == status, run.err
    assert "Traceback" not in run.err
    for process in run.processes:
        assert process.errors == []
        assert process.devices() <= devices


# -- what reads the reports --------------------------------------------------------------------------

LOG = """\
== start: 3 launches, 0 graph launches, 2 mallocs, 0 frees; device 0 used 0.02 GB, peak 0.05 GB;
   event H2D pageable: 2
   event cudaDeviceSynchronize@0: 1
       2 memset
       3 void fill<int>(int): lambda
[fake 12] capture begins on stream 3 of device 1 (current 1), mode 0, used 0.85 GB
[fake 12] launch outside of the capture, while capturing: void fill<int>
[fake 12] capture ends: 435 nodes, used 3.24 GB
== step 0: 440 launches, 2 graph launches, 0 mallocs, 0 frees; device 0 used 0.02 GB, peak 0.02 GB; device 1 used 1.00 GB, peak 2.50 GB;
   event D2D: 4
   event D2H: 7
   event cudaStreamSynchronize: 7
   event graph launch on device 1, current 1: 2
       5 void fill<int>(int)
"""  # noqa: E501


def test_the_report_of_a_driver_is_understood():
    start, step = parse(iter(LOG.splitlines()))
    assert (start.title, start.launched, start.mallocs, start.captures, start.errors) == ("start", 3, 2, [], [])
    assert start.kernels == {"memset": 2, "void fill<int>(int): lambda": 3}
    assert (start.launches, start.synchronisations, start.used) == (5, 3, {0: 0.05e9})
    assert (step.title, step.launches, step.synchronisations, step.replays) == ("step 0", 9, 7, {1: 2})
    assert step.captures == [[1, 1, 435]]
    assert step.errors == ["launch outside of the capture, while capturing: void fill<int>"]
    process = pretended_runs.Process(["x.py"], [start, step], {}, 0)
    assert process.devices() == {0, 1}
    assert process.total.used == {0: 0.05e9, 1: 2.5e9}
    assert process.steps == [step]
    with pytest.raises(ValueError, match="a new kind of line"):
        parse(iter(["a new kind of line"]))


def test_a_graph_that_runs_beside_the_current_device_is_an_error():
    (period,) = parse(iter([*LOG.splitlines()[:1], "   event graph launch on device 1, current 0: 3"]))
    assert period.replays == {1: 3}
    assert len(period.errors) == 1


FAULTS = {
    "a synchronisation in a capture": ("x.sum().item()", False),
    "a copy from memory that is not pinned, in a capture": ("x + torch.ones(3).to(x.device)", False),
    "work on another device": ("torch.ones(3, device='cuda:1')", True),
    "nothing": ("x + 1", True),
}


@needs_driver
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_a_capture_show(gpu, fault):
    code, goes_on = FAULTS[fault]
    run = gpu(
        "-c",
        f"""
import torch
x = torch.ones(3, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph, capture_error_mode="{"thread_local" if goes_on else "global"}"):
    {code}
graph.replay()
""",
        gpus=2,
    )
    assert (run.status == 0) == goes_on, run.err
    if fault == "nothing":
        check(run)
        ((device, current, nodes),) = run.only.captures
        assert (device, current, nodes) == (0, 0, 1)
    else:
        with pytest.raises(AssertionError):
            check(run, status=run.status)


# -- training ----------------------------------------------------------------------------------------


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@needs_driver
@pytest.mark.parametrize(
    ("experiment", "mode", "precision"),
    [
        *[("mnist", mode, "tf32") for mode in MODES],
        ("mnist", "grad", "bf16"),
        *[slow("c10", mode, "bf16") for mode in MODES],
        slow("c10", "grad", "fp32"),
    ],
)
def test_every_mode_trains_in_one_graph(train, experiment, mode, precision):
    width = NARROW if experiment == "c10" else ()
    process = train(experiment, *MODES[mode], *width, "--precision", precision, "-N", 1).only
    assert len(process.captures) == 1
    assert len(process.steps) == 10
    assert [sum(step.replays.values()) for step in process.steps] == [0] * 3 + [1] * 7
    assert process.of("evaluation")


@needs_driver
@pytest.mark.parametrize("mode", ["grad", slow("deep")])
def test_deterministic_algorithms(train, mode):
    assert len(train("mnist", *MODES[mode], "--deterministic", "-N", 1).only.captures) == 1


@needs_driver
@pytest.mark.parametrize("experiment", ["mnist", slow("c10")])
def test_the_plain_layers_need_no_graph(train, experiment):
    width = NARROW if experiment == "c10" else ()
    process = train(experiment, *GRAD, *width, "--no-compile", "-N", 1).only
    assert process.captures == []
    assert process.compiled == 0


@needs_driver
def test_a_run_goes_on_after_sigterm_and_after_its_end(train, tmp_path):
    def stop():
        log = next((tmp_path / "run 0" / "driver").glob("*.log"), None)
        return log is not None and "== step 3:" in log.read_text()

    stopped = train("mnist", *GRAD, "-N", 9999, status=128 + signal.SIGTERM, stop=stop)
    place, epoch = re.search(r"Stopped by SIGTERM (.*? epoch (\d+).*), and saved", stopped.out).groups()
    resumed = train("mnist", *GRAD, "-N", int(epoch) + 1)
    assert f"Resuming {place}" in resumed.out
    assert len(resumed.only.captures) == 1
    longer = train("mnist", *GRAD, "-N", int(epoch) + 2)
    assert f"Resuming after epoch {int(epoch) + 1}" in longer.out
    assert len(longer.only.steps) == 10


@needs_driver
def test_a_test_alone(train):
    train("mnist", *GRAD, "-N", 1)
    tested = train("mnist", *GRAD, "-N", 1, "-test")
    assert "test accuracy" in tested.out
    assert tested.only.steps == []


@needs_driver
def test_the_host_waits_for_no_step_between_recordings(train):
    """Each step but the first, which is recorded, and the fourth, after which the time left is estimated."""
    steps = train("mnist", *GRAD, "-N", 1).only.steps
    assert [step.synchronisations for step in steps[4:-1]] == [0] * 5
