"""The commands on a pretended GPU: torch's own CUDA code over a driver whose kernels do nothing (pretended_runs.py).

It shows crashes, wrong devices, calls that a capture forbids, memory and numbers of launches.
"""

import re
import shutil
import signal

import pytest

GRAD, DEEP = ("-m", "grad", "-s", "0.95"), ("-m", "deep", "-s", "0.5", "-temperature", "1e-3")
SOFT = ("-m", "deep", "-soft", "-s", "0.95", "-temperature", "1e-3")
MODES = {"grad": GRAD, "deep": DEEP, "soft": SOFT, "no_prune": ("-m", "no_prune")}
NARROW = ("--width", "16")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture
def train(gpu, tmp_path):
    """Trains for ten steps an epoch, as a script does; checks that it went well, on the first GPU alone."""

    def run(experiment, *argv, images=None, devices=(0,), status=0, **settings):
        images = images or {"c10": 160, "mnist": 1280}[experiment]
        script = f"{experiment}/{experiment}.py"
        result = gpu(script, *argv, "--dump-dir", tmp_path / "runs", images=images, **settings)
        result.check(devices, status)
        return result

    yield run
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)  # the published network's checkpoints are large


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


@pytest.mark.parametrize("mode", ["grad", slow("deep")])
def test_deterministic_algorithms(train, mode):
    assert len(train("mnist", *MODES[mode], "--deterministic", "-N", 1).only.captures) == 1


@pytest.mark.parametrize("experiment", ["mnist", slow("c10")])
def test_the_plain_layers_need_no_graph(train, experiment):
    width = NARROW if experiment == "c10" else ()
    process = train(experiment, *GRAD, *width, "--no-compile", "-N", 1).only
    assert process.captures == []
    assert process.compiled == 0


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


def test_a_test_alone(train):
    train("mnist", *GRAD, "-N", 1)
    tested = train("mnist", *GRAD, "-N", 1, "-test")
    assert "test accuracy" in tested.out
    assert tested.only.steps == []


# -- other commands ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_benchmarks_of_the_optimizers(gpu):
    run = gpu("-m", "benchmarks.bench", "--only", "optimizers", "--rounds", 1)
    run.check()
    assert "36.7 M weights" in run.out


def test_an_export_is_checked_on_the_gpu_that_is_named(train, gpu, tmp_path):
    """Whether counts differ says nothing here, as no kernel computes any."""
    train("mnist", *GRAD, "--no-compile", "-N", 1)
    (models,) = (tmp_path / "runs" / "models").iterdir()
    checked = gpu("-m", "analysis.export", models, "--check", "-gpu", 1, gpus=2)
    assert checked.status in (0, 1)
    checked.check((1,), checked.status)
    assert checked.only.devices() == {1}
    assert "spike counts differ on the" in checked.out
