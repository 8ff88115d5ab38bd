"""The real commands on tiny data: every mode, every way to call them, resume and -test."""

import ast
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch

from analysis import export, report
from benchmarks import bench, gpu, sparse
from c10 import c10
from mnist import mnist
from reproduce import __main__ as reproduce

ROOT = Path(__file__).resolve().parent.parent
MODES = {
    "no_prune": [],
    "grad": ["-m", "grad", "-s", "0.95"],
    "deep": ["-m", "deep", "-s", "0.5", "-temperature", "1e-3"],
    "soft-deep": ["-m", "deep", "-soft", "-s", "0.5", "-temperature", "1e-3"],
}
# how the script is called, and from where
WAYS = {
    "no_prune": lambda name, elsewhere: ([str(ROOT / name / f"{name}.py")], elsewhere),
    "grad": lambda name, elsewhere: ([f"{name}.py"], ROOT / name),
    "deep": lambda name, elsewhere: (["-m", f"{name}.{name}"], ROOT),
    "soft-deep": lambda name, elsewhere: ([f"{name}/{name}.py"], ROOT),
}
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def call(tmp_path, mnist_folder, cifar_folder, capsys, monkeypatch):
    folders = {"mnist": mnist_folder, "c10": cifar_folder}

    def call(name, mode, *argv, narrow=False):
        argv = [*MODES[mode], *argv, "--dataset-dir", str(folders[name]), "--dump-dir", str(tmp_path / "runs")]
        if narrow:  # in this process, with 8 channels
            status = c10.main([*argv, "--width", "8"])
            out, err = capsys.readouterr()
            return subprocess.CompletedProcess(argv, status, out, err)
        command, cwd = WAYS[mode](name, tmp_path)
        return forked.run([*command, *argv], cwd, ENVIRONMENT)

    yield call
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)  # a CIFAR-10 checkpoint is 0.6 GB


def succeeded(result):
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("mode", "name", "narrow"),
    [
        *[pytest.param(mode, "mnist", False, id=f"mnist-{mode}") for mode in MODES],
        *[pytest.param(mode, "c10", True, id=f"narrow c10-{mode}") for mode in MODES],
        pytest.param("grad", "c10", False, id="c10-grad", marks=pytest.mark.slow),
    ],
)
def test_smoke(call, tmp_path, name, narrow, mode):
    argv = {"mnist": ["-b", "20"], "c10": ["-b", "5", "-T", "2"]}[name]
    call = functools.partial(call, name, mode, *argv, narrow=narrow)
    out = succeeded(call("-N", "1"))
    assert "epoch 1/1  test accuracy " in out
    (path,) = tmp_path.glob("runs/models/*/checkpoint.pt")
    assert path.parent.name.startswith("soft-lr-1e-4-b-" if mode == "soft-deep" else "lr-1e-4-b-")
    assert path.parent.name.removesuffix("-width-8").endswith("-temperature-1e-3" if "deep" in mode else mode)
    (log,) = tmp_path.glob("runs/logs/*")
    assert log.name == path.parent.name
    assert list(log.glob("events.out.tfevents.*"))
    if mode != "grad":
        return
    out = succeeded(call("-N", "2"))
    assert "Resuming after epoch 1; 2 epochs in all." in out
    assert "epoch 2/2  test accuracy " in out
    assert torch.load(path, weights_only=True, mmap=True)["epoch"] == 2
    tested = succeeded(call("-test"))
    assert tested.split("test accuracy ")[1].split("%")[0] == out.split("test accuracy ")[1].split("%")[0]
    lifs = ["fc.0", "fc.2"] if name == "mnist" else [f"conv.{i}" for i in (0, 3, 6, 10, 13, 16)] + ["fc.3", "fc.5"]
    assert sorted(p.name for p in log.glob("rate-*")) == sorted(f"rate-{lif}-epoch-2.npy" for lif in lifs)


def test_bad_input_is_one_line_and_status_2(call):
    result = call("mnist", "no_prune", "-b", "0")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == (
        "mnist.py: error: argument -b/--batch-size: must be a whole number >= 1, not '0' (see --help)\n"
    )


COMMAND_LINES = {
    mnist.main: ("--dataset-dri", "--dataset-dir"),
    c10.main: ("--dataset-dri", "--dataset-dir"),
    report.main: ("--outptu", "-o/--output"),
    export.main: ("-format", "--format"),
    reproduce.main: ("--shards", "--shard"),
    bench.main: ("-rounds", "--rounds"),
    sparse.main: ("-rounds", "--rounds"),
    gpu.main: ("--minuts", "--minutes"),
}


@pytest.mark.parametrize("main", COMMAND_LINES, ids=lambda main: main.__module__)
def test_every_command_line_names_the_nearest_right_option(main, capsys):
    typed, meant = COMMAND_LINES[main]
    assert main([typed, "3"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith(f": error: unrecognized option {typed}; did you mean {meant}? (see --help)\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize("main", [bench.main, sparse.main], ids=lambda main: main.__module__)
def test_a_benchmark_refuses_a_file_that_it_cannot_write_before_it_measures(main, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [str(tmp_path / "package" / "__main__.py")])
    (tmp_path / "file").touch()
    assert main(["--json", str(tmp_path / "file" / "results.json")]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"package: error: argument --json: cannot write {tmp_path / 'file' / 'results.json'}: ")


def test_importing_the_scripts_does_nothing():
    """No parsing, no seeding, no change of sys.path at import time."""
    code = (
        "import sys, torch; torch.manual_seed(5); state = torch.get_rng_state(); path = list(sys.path); "
        "sys.argv = ['x', '--nonsense']; import c10.c10, mnist.mnist; "
        "assert torch.equal(state, torch.get_rng_state()) and path == sys.path"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, check=True)


def imports_of(path):
    """The names of the project's own rooms that a file imports."""
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names} & (MODULES | {*ROOMS})


MODULES = {"sharding", "rewiring", "gradrewire", "deeprewire", "spiking"}
ROOMS = ("training", "measuring", "analysis", "reproduce", "benchmarks", "mnist", "c10", "spiking_kernels")


def test_imports_run_one_way():
    """kernels, rewiring -> gradrewire, deeprewire -> training -> scripts; a model imports neurons and layers only."""
    allowed = {
        "sharding.py": set(),
        "rewiring.py": {"sharding", "spiking_kernels"},
        "gradrewire.py": {"sharding", "rewiring", "spiking_kernels"},
        "deeprewire.py": {"sharding", "rewiring", "spiking_kernels"},
        "spiking.py": {"spiking_kernels"},
        "mnist/model.py": {"spiking", "spiking_kernels"},
        "c10/model.py": {"spiking", "spiking_kernels"},
        "mnist/mnist.py": {"mnist", "training"},
        "c10/c10.py": {"c10", "training"},
    }
    found = {name: imports_of(ROOT / name) for name in allowed}
    assert all(found[name] <= allowed[name] for name in allowed), found
    for path in (ROOT / "training").rglob("*.py"):
        assert imports_of(path).isdisjoint({"analysis", "reproduce", "benchmarks", "mnist", "c10"}), path
