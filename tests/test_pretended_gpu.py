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
FAST = ("-m", "grad", "--recipe", "fast", "--connectivity", "0.05")
NARROW = ("--width", "8")  # as benchmarks.gpu --small has it: what is compiled for one serves the other
SMALL_CARD = 5.4  # of the 6 GB of a card, what its driver and its screen leave
STEADY = slice(4, 9)  # of the ten steps of an epoch: after the first recording and the capture, before the epoch's end


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


def check_one_graph(process, epochs=1):
    """Recorded after three of the steps, and started at each of the others."""
    assert len(process.captures) == 1
    assert len(process.steps) == 10 * epochs
    assert [sum(step.replays.values()) for step in process.steps] == [0] * 3 + [1] * (10 * epochs - 3)
    assert len(process.of("evaluation")) >= epochs


@pytest.mark.parametrize(
    ("experiment", "mode", "precision"),
    [
        *[("mnist", mode, "tf32") for mode in MODES],
        ("mnist", "grad", "bf16"),
        *[slow("c10", mode, "bf16") for mode in MODES if mode != "grad"],  # as published, below
        slow("c10", "grad", "fp32"),
    ],
)
def test_every_mode_trains_in_one_graph(train, experiment, mode, precision):
    """For MNIST, that is all a step is: the host starts the graph, and little beside it."""
    width = NARROW if experiment == "c10" else ()
    process = train(experiment, *MODES[mode], *width, "--precision", precision, "-N", 1).only
    check_one_graph(process)
    if experiment == "mnist":
        check_steady(process.steps[STEADY])


LAUNCHES = """
import torch
from triton.runtime import JITFunction
from spiking_kernels.blocks import lif_block
from spiking_kernels.shapes import Shape
run = JITFunction.run
def on(self, *arguments, **settings):
    print(self.__name__, torch.cuda.current_device())
    return run(self, *arguments, **settings)
JITFunction.run = on
y = torch.zeros(2, 1, 1, 2, device="cuda:1", requires_grad=True)
lif_block(y, Shape(2), torch.nn.BatchNorm2d(1, device="cuda:1")).sum().backward()
try:
    lif_block(torch.zeros(33, 1, 1, 1, device="cuda:1"), Shape(33))
except ValueError as error:
    print(error)
"""


def test_triton_runs_on_the_device_of_the_images(gpu):
    """Not on the current one; and its tiles have room for fewer time steps than those in C."""
    *launches, refused = gpu("-c", LAUNCHES, gpus=2).out.splitlines()
    kernels = ["_moments", "_merge", "_forward", "_backward", "_factors", "_backward"]
    assert launches == [f"{kernel} 1" for kernel in kernels]
    assert refused == "T=33 is not accepted: must be a whole number from 1 to 32"


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


# -- what it costs -----------------------------------------------------------------------------------


def check_steady(steps):
    """The host starts a graph and little beside it, and waits for nothing."""
    assert {sum(step.replays.values()) for step in steps} == {1}
    assert max(step.launches for step in steps) <= 8
    assert {step.synchronisations for step in steps} == {0}


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "gigabytes"), [("tf32", 4), ("bf16", 3)])
def test_the_published_settings_need_little_memory_and_few_kernels(train, precision, gigabytes):
    process = train("c10", *GRAD, "--precision", precision, "-N", 2, gigabytes=SMALL_CARD).only
    assert process.reserved() <= gigabytes
    assert process.memory[0]["failures"] == 0
    assert process.memory[0]["allocated"] <= 2e9
    ((_, _, nodes),) = process.captures
    assert nodes <= 160
    check_one_graph(process, epochs=2)
    check_steady(process.steps[STEADY])


@pytest.mark.slow
def test_soft_deep_r_runs_on_a_small_card(train):
    run = train("c10", *SOFT, "-N", 2, gigabytes=SMALL_CARD)
    assert run.only.memory[0]["failures"] == 0
    assert len(run.only.captures) == 1


@pytest.mark.slow
def test_the_fast_recipe_needs_one_graph_for_all_segments(train):
    """Here a segment is a step, and each has a learning rate and, from the second on, a penalty of its own."""
    process = train("c10", *FAST, "-N", 2, images=1280).only
    assert process.reserved() <= 24
    assert len(process.captures) == 1
    assert process.compiled <= 2  # with and without prior
    assert {sum(step.replays.values()) for step in process.steps[3:]} == {1}


def test_between_the_starts_of_segments_the_fast_recipe_costs_nothing_more(train):
    """An epoch of 800 steps, in segments of four."""
    process = train("mnist", *FAST, "-b", 64, "-N", 1, images=64 * 800).only
    assert len(process.captures) == 1
    assert process.compiled <= 2
    check_steady([step for number, step in enumerate(process.steps[:-1]) if number > 4 and (number + 1) % 4])
    starts = [step for number, step in enumerate(process.steps[:-1]) if number > 40 and (number + 1) % 4 == 0]
    assert max(step.synchronisations for step in starts[::8]) > 0  # a search for the k-th smallest theta


# -- several GPUs ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("how", [(), ("--no-compile",)])
def test_the_second_gpu_works_alone(train, how):
    second = dict(gpus=2, devices=(1,))
    argv = ("c10", *GRAD, *NARROW, *how, "-gpu", 1)
    process = train(*argv, "-N", 1, **second).only
    assert [capture[:2] for capture in process.captures] == ([] if how else [[1, 1]])
    assert "Resuming after epoch 1" in train(*argv, "-N", 2, **second).out
    assert "test accuracy" in train(*argv, "-N", 2, "-test", **second).out


@pytest.mark.slow
def test_rows_of_a_grid_take_the_gpus_in_turn(gpu, tmp_path):
    (tmp_path / "mnist.toml").write_text(
        'epochs = 1\nseeds = [1, 2]\n[[group]]\ntitle = "Grad R"\nvariants = ["-m grad -s 0.95"]\n'
    )
    grid = dict(PRETENDED_GRID=str(tmp_path), gpus=2, images=1280)
    run = gpu("-m", "reproduce", "mnist", "--jobs", 2, "--dump-dir", tmp_path / "grid", **grid)
    run.check(devices=(0, 1))
    rows = [process.devices() for process in run.processes if process.argv[0].endswith("mnist.py")]
    assert len(rows) == 4  # each trains, then tests
    assert {min(devices) for devices in rows} == {0, 1}
    assert all(len(devices) == 1 for devices in rows)


# -- what a machine lacks ----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_smaller_batch_needs_less_memory(train):
    """As the line says that a run without enough memory ends with: here two layers' spikes need more."""
    refused = train("c10", *GRAD, "-b", 128, "-N", 1, images=128, gigabytes=2, status=1)
    (line,) = [line for line in refused.err.splitlines() if line.startswith("c10.py: error:")]
    assert "out of memory" in line
    assert line.endswith("a smaller -b or -T needs less")
    train("c10", *GRAD, "-b", 4, "-N", 1, images=40, gigabytes=2)


@pytest.mark.slow
def test_a_test_takes_as_many_images_as_memory_holds(train):
    argv = ("c10", *MODES["no_prune"], "--width", 64, "-b", 50, "-N", 1)
    train(*argv, images=50)
    tested = train(*argv, "-test", images=50, gigabytes=0.4)
    assert "No memory for 50 test images at a time: testing 25 at a time." in tested.out
    assert len(tested.only.of("evaluation")) >= 2
    assert "test accuracy" in tested.out


@pytest.mark.parametrize(
    ("lacks", "reason"),
    [
        ("triton", "it is not installed"),
        slow("a C compiler", "C compiler"),
        slow("a C compiler that works", "/bin/gcc'"),
    ],
)
def test_without_triton_the_plain_layers_train(train, tmp_path, lacks, reason):
    """Triton is Python, and a C compiler builds what starts its kernels."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("bash", "dirname", "env", "mkdir"):
        (commands / name).symlink_to(shutil.which(name))
    without = dict(PRETENDED_WITHOUT="triton") if lacks == "triton" else dict(PATH=str(commands))
    if lacks == "a C compiler that works":
        (commands / "gcc").symlink_to(shutil.which("false"))
    nothing_built = dict(TRITON_CACHE_DIR=str(tmp_path / "triton"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"))
    run = train("mnist", *GRAD, "-N", 1, **without, **nothing_built)
    (line,) = [line for line in run.out.splitlines() if line.startswith("No Triton kernels")]
    assert reason in line
    assert "plain layers" in line
    assert run.only.captures == []


# -- other commands ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_benchmarks_of_the_optimizers(gpu):
    code = """
import sys
from benchmarks import bench, optimizers
optimizers.SHAPES.pop("MnistNet's 0.6 M weights")  # the trainings above compile its updates
sys.exit(bench.main(["--only", "optimizers", "--rounds", "1"]))
"""
    run = gpu("-c", code)
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
