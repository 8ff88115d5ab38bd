import gc
import itertools
import os
import threading

# Read once, when torch is loaded: threads that wait actively make small tests slow on a busy machine,
# and so do more threads than cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pretended_runs
import pytest
import torch
from filelock import FileLock
from forked import ForkServer
from PIL import Image

import spiking_kernels
from analysis.experiments import EXPERIMENTS
from c10 import c10
from c10.data import CLASSES
from c10.model import Cifar10Net
from mnist import mnist
from spiking_kernels import build
from training import device

GOLDEN = Path(__file__).parent / "golden"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_collection_finish():
    """What is imported and collected by now stays: the garbage collector need not go through it again and again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture(autouse=True)
def deterministic_in_one_test():
    """What a run with --deterministic asks of torch does not outlast its test."""
    yield
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", autouse=True)
def compiled_for_this_arithmetic(tmp_path_factory):
    """torch.compile keeps what it made for one ATEN_CPU_CAPABILITY and takes it for another, where it does not fit."""
    if "ATEN_CPU_CAPABILITY" in os.environ:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture
def bf16_anywhere(monkeypatch):
    """Lets runs use --precision bf16 on a CPU without instructions for it: small ones, as it is slow there."""
    monkeypatch.setattr(device, "precisions", lambda device: ("fp32", "tf32", "bf16"))


@pytest.fixture
def kernel_threads():
    """Sets the number of threads of the kernels, whose OpenMP need not be torch's."""
    if spiking_kernels.unavailable():
        pytest.skip("needs the kernels")
    library = build.library()
    if not hasattr(library, "omp_get_max_threads"):
        pytest.skip("the C compiler has no OpenMP")
    before = library.omp_get_max_threads(), torch.get_num_threads()

    def set_to(threads):
        torch.set_num_threads(threads)
        library.omp_set_num_threads(threads)
        assert library.omp_get_max_threads() == threads

    yield set_to
    torch.set_num_threads(before[1])
    library.omp_set_num_threads(before[0])


@pytest.fixture
def golden():
    """Loads a file of reference facts by its name."""
    return lambda name: np.load(GOLDEN / name)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real images, as --dataset-dir takes it, where SPIKING_TEST_DATA names one."""
    folder = os.environ.get("SPIKING_TEST_DATA")
    if not folder:
        pytest.skip("needs real images: set SPIKING_TEST_DATA to a folder that holds MNIST/raw")
    return Path(folder)


@pytest.fixture(scope="session")
def mnist_folder(tmp_path_factory) -> Path:
    """A data folder with MNIST's four files, but only 40 training and 20 test images, of noise."""
    folder = tmp_path_factory.mktemp("mnist data")
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, n in (("train", 40), ("t10k", 20)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, n, dtype=np.uint8)
        header = np.array([0x803, n, 28, 28], dtype=">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(np.array([0x801, n], dtype=">i4").tobytes() + labels.tobytes())
    return folder


@pytest.fixture(scope="session")
def cifar_folder(tmp_path_factory) -> Path:
    """A data folder with CIFAR-10's class folders: one training and one test image per class, of noise."""
    folder = tmp_path_factory.mktemp("cifar data")
    write_class_folders(folder)
    return folder


def write_class_folders(folder: Path, classes=CLASSES, size: int = 32) -> None:
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for number, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            suffix = "png" if number % 2 else "jpg"
            Image.fromarray(pixels).save(folder / part / name / f"0000.{suffix}")


@pytest.fixture
def run(mnist_folder, tmp_path, capsys):
    """Runs mnist.py's main on the tiny data; returns its status, and what it printed on the two channels."""

    def call(*argv, dump=tmp_path, data=mnist_folder):
        status = mnist.main([*argv, "--dataset-dir", str(data), "--dump-dir", str(dump)])
        for (
            thread
        ) in threading.enumerate():  # a process that is killed takes its threads along; here they come to an end
            if thread.name == "checkpoint writer":
                thread.join()
        return SimpleNamespace(status=status, **capsys.readouterr()._asdict())

    return call


@pytest.fixture
def form(request) -> str:
    """A format of exports, where its packages are installed."""
    for package in {"safetensors": ["safetensors"], "nir": ["nir", "nirtorch"]}.get(request.param, []):
        pytest.importorskip(package)
    return request.param


@pytest.fixture
def narrow(monkeypatch):
    """The CIFAR-10 network with 8 channels instead of 256."""
    experiment = replace(c10.EXPERIMENT, width=8)
    monkeypatch.setattr(c10, "EXPERIMENT", experiment)
    monkeypatch.setitem(EXPERIMENTS, "c10", experiment)
    monkeypatch.setattr(Cifar10Net.__init__, "__defaults__", (8, "m", 8))


@pytest.fixture(scope="session")
def pretended_driver(tmp_path_factory) -> Path:
    """A folder for the kernels that all tests on a pretended GPU compile, once its driver is built."""
    if reason := pretended_runs.unavailable():
        pytest.skip(reason)
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # workers share it
    with FileLock(base / "driver.lock"):
        folder = base / "compiled kernels"
        if not folder.exists():
            pretended_runs.run(["-c", "import torch; torch.zeros(1).cuda()"], tmp_path_factory.mktemp("build")).check()
            folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def fork_server(pretended_driver, tmp_path_factory) -> Iterator[ForkServer]:
    server = pretended_runs.fork_server(tmp_path_factory.mktemp("server") / "err")
    yield server
    server.close()


@pytest.fixture
def gpu(pretended_driver, fork_server, tmp_path) -> Callable[..., pretended_runs.Run]:
    """Runs a command on pretended GPUs as pretended_runs.run does, in the folders "run 0", "run 1", ..."""
    numbers = itertools.count()

    def run(*argv, **settings):
        caches = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
        caches = {key: str(pretended_driver / name) for key, name in caches.items()}
        server = None if settings.keys() & {"PATH", "PRETENDED_WITHOUT"} else fork_server
        folder = tmp_path / f"run {next(numbers)}"
        return pretended_runs.run([*map(str, argv)], folder, **{"server": server, **caches, **settings})

    return run
