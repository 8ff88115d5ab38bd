"""The choice of the device: what a machine has, and the best that works with it, or a line that says what it lacks."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import training
from mnist.mnist import EXPERIMENT as MNIST
from mnist.mnist import main
from training import run_info
from training.device import runs_on
from training.errors import Refusal
from training.options import REPOSITORY, parse

WHEELS = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]  # of torch 2.15 for CUDA 13


@pytest.fixture
def machine(monkeypatch):
    """A machine with two GPUs, as torch.cuda tells of it."""
    about = SimpleNamespace(capability=(9, 0), made_for=WHEELS, current=[], kernel=lambda device: None)
    for name, answer in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_capability": lambda device: about.capability,
        "get_device_name": lambda device: "NVIDIA Card",
        "get_arch_list": lambda: about.made_for,
        "set_device": lambda device: about.current.append(device),
        "synchronize": lambda device=None: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(training, "triton_kernel", SimpleNamespace(run=lambda d: about.kernel(d)), raising=False)
    monkeypatch.setenv("SJ_LIF_CUDA_IMPLEMENTATION", "")  # so that it is put back
    monkeypatch.delenv("SJ_LIF_CUDA_IMPLEMENTATION")
    return about


@pytest.fixture
def run_options(tmp_path):
    return lambda *argv: parse(MNIST, ["--dump-dir", str(tmp_path), *argv])


def test_the_gpu_that_is_chosen_becomes_the_current_one(machine, run_options, capsys):
    for argv, number in (((), 0), (("-gpu", "1"), 1), (("--gpu", "1"), 1)):
        options = run_options(*argv)
        assert options.device == torch.device("cuda", number)
        assert machine.current.pop() == options.device
        assert (options.compile, options.precision_used) == (True, "tf32")
    with pytest.raises(Refusal, match=r"there is no GPU 2 on this machine \(the GPUs are 0 to 1\)"):
        run_options("-gpu", "2")
    assert machine.current == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("capability", "made_for", "runs"),
    [
        ((7, 0), WHEELS, False),  # a V100
        ((7, 5), WHEELS, True),
        ((8, 0), WHEELS, True),
        ((8, 9), WHEELS, True),  # code for 8.6, or 8.0
        ((9, 0), WHEELS, True),
        ((10, 3), WHEELS, True),
        ((11, 0), WHEELS, False),
        ((12, 1), WHEELS, True),
        ((13, 0), WHEELS, False),
        ((13, 0), [*WHEELS, "compute_120"], True),  # translated for it
        ((9, 0), ["sm_80", "compute_90"], True),
        ((8, 6), ["compute_90"], False),
        ((9, 0), ["sm_90a"], True),
        ((9, 1), ["sm_90a"], False),
        ((8, 0), ["sm_86"], False),
        ((7, 0), [], True),
        ((9, 4), ["gfx942"], True),  # another maker's
    ],
)
def test_what_code_runs_on_which_gpus(capability, made_for, runs):
    assert runs_on(capability, made_for) == runs


def test_a_gpu_that_torch_has_no_code_for_is_refused(machine, tmp_path, capsys):
    machine.capability = (7, 0)
    assert main(["--dump-dir", str(tmp_path / "new")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for part in (
        "NVIDIA Card",
        "compute capability 7.0",
        "sm_75",
        torch.__version__,
        "install",
        "CUDA_VISIBLE_DEVICES",
    ):
        assert part in line
    assert not (tmp_path / "new").exists()


def test_a_gpu_that_cannot_be_used_is_refused(machine, run_options, monkeypatch):
    def busy(device=None):
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(torch.cuda, "synchronize", busy)
    with pytest.raises(Refusal, match=r"^argument -gpu/--gpu: cuda:1 cannot be used \(RuntimeError: .*are busy\)$"):
        run_options("-gpu", "1")


@pytest.mark.parametrize(
    ("capability", "precision", "used", "lines"),
    [
        ((7, 5), "bf16", "fp32", 1),
        ((7, 5), "tf32", "fp32", 0),  # without it, torch computes in fp32
        ((7, 5), None, "fp32", 0),
        ((7, 5), "fp32", "fp32", 0),
        ((8, 0), "bf16", "bf16", 0),
        ((8, 0), None, "tf32", 0),
    ],
)
def test_the_precision_is_one_that_the_gpu_has(machine, run_options, capsys, capability, precision, used, lines):
    machine.capability = capability
    options = run_options(*(["--precision", precision] if precision else []))
    assert options.precision_used == used
    out = capsys.readouterr().out
    assert out.count("\n") == lines
    assert lines == 0 or ("bf16" in out and "running in fp32" in out)
    # the run keeps its name, and can move to a card that has the precision
    assert options.precision == (None if precision == "tf32" else precision)


@pytest.mark.parametrize(("onednn", "multiplies"), [(True, True), (True, False), (False, None)])
def test_bf16_on_a_cpu_without_instructions_for_it(run_options, monkeypatch, capsys, onednn, multiplies):
    """torch would take many times fp32's time."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    operations = SimpleNamespace(_is_mkldnn_bf16_supported=lambda: multiplies) if onednn else SimpleNamespace()
    monkeypatch.setattr(torch.ops, "mkldnn", operations)
    options = run_options("--precision", "bf16")
    assert options.precision == "bf16"
    assert options.precision_used == ("bf16" if multiplies else "fp32")
    said = ["No bf16, as this CPU has no instructions for it: running in fp32."]
    assert [line for line in capsys.readouterr().out.splitlines() if "bf16" in line] == ([] if multiplies else said)


COMPILER = subprocess.CalledProcessError(1, ["gcc", "launcher.c"])
FAULTS = {
    "no compiler": (
        RuntimeError("Failed to find C compiler. Please specify via CC\nmore"),
        "Failed to find C compiler",
    ),
    "no headers": (COMPILER, "CalledProcessError: Command"),
    "no Triton": (ModuleNotFoundError("No module named 'triton'"), "it is not installed"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("argv", [(), ("--no-compile",)])
def test_without_triton_kernels_the_plain_layers_run(machine, run_options, capsys, fault, argv):
    """Without --compile the neurons would still need them."""
    error, reason = FAULTS[fault]

    def fail(device):
        raise error

    machine.kernel = fail
    assert run_options(*argv).compile is False
    (line,) = capsys.readouterr().out.splitlines()
    assert reason in line
    assert "C compiler and Python's headers" in line
    assert os.environ["SJ_LIF_CUDA_IMPLEMENTATION"] == "torch"


def test_where_triton_works_nothing_is_said(machine, run_options, capsys):
    tried = []
    machine.kernel = tried.append
    assert run_options("-gpu", "1").compile is True
    assert run_options("--no-compile").compile is False
    assert tried == [torch.device("cuda", 1), torch.device("cuda", 0)]
    assert capsys.readouterr().out == ""
    assert "SJ_LIF_CUDA_IMPLEMENTATION" not in os.environ


def test_a_missing_package_is_found_when_the_kernel_is_imported(machine, run_options, monkeypatch, capsys):
    monkeypatch.delattr(training, "triton_kernel")
    monkeypatch.delitem(sys.modules, "training.triton_kernel", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert run_options().compile is False
    assert "it is not installed" in capsys.readouterr().out


def test_spikingjelly_asks_for_its_implementation_after_the_device_is_chosen():
    """Its neurons read the variable once; were that when they are imported, the choice would come too late."""
    code = """
import os, sys
import c10.c10, mnist.mnist, training.script
os.environ["SJ_LIF_CUDA_IMPLEMENTATION"] = "torch"
from spikingjelly._ops import lif
assert lif._selection._requested == "torch"
"""
    environment = {key: value for key, value in os.environ.items() if key != "SJ_LIF_CUDA_IMPLEMENTATION"}
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=environment, check=True)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_run_on_the_cpu_keeps_freed_memory():
    """A large tensor goes back to the system at once, and the next one takes page faults again; kept, it takes none."""
    code = """
import resource, sys, torch
from training.device import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = [
        int(subprocess.run([sys.executable, "-c", code, how], cwd=REPOSITORY, capture_output=True, check=True).stdout)
        for how in ("keep", "return")
    ]
    assert faults[0] < faults[1] / 2


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no process can be bound to a core here")
def test_only_the_cores_that_the_process_may_use_count(monkeypatch, tmp_path):
    monkeypatch.setattr(training.device, "LIMIT", tmp_path / "no limit")
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert training.device.cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert training.device.cores() == len(before)


@pytest.mark.parametrize(
    ("text", "cores"),
    [("200000 100000", 2), ("150000 100000", 2), ("5000 100000", 1), ("max 100000", 6), ("9900000 100000", 6), ("", 6)],
)
def test_a_container_may_have_the_time_of_a_few_cores(text, cores, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {*range(6)}, raising=False)
    monkeypatch.setattr(training.device, "LIMIT", tmp_path / "cpu.max")
    (tmp_path / "cpu.max").write_text(text + "\n")
    assert training.device.cores() == cores


def test_apples_gpu_is_named_where_it_is_not_used(run_options, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    run_options("--no-compile")
    assert capsys.readouterr().out == "No GPU found (Apple's is not used): running on the CPU.\n"


ARM = "processor\t: 0\nBogoMIPS\t: 2000.00\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n"
PROGRAMS = {  # of other systems, as far as they are asked here
    "lscpu": "#!/bin/sh\nprintf 'Vendor ID:  ARM\\n  Model name:          Neoverse-V2\\n    Model:  0\\n'\n",
    "sysctl": "#!/bin/sh\necho Apple M2\n",
    "neither": "",
    "lscpu, old": "#!/bin/sh\nprintf 'Vendor ID:  0x61\\nModel name:   -\\n'\n",
}


@pytest.mark.skipif(os.name != "posix", reason="the programs are scripts of a shell")
@pytest.mark.parametrize(
    ("program", "found"),
    [("lscpu", "Neoverse-V2"), ("sysctl", "Apple M2"), ("neither", "arm9"), ("lscpu, old", "arm9")],
)
def test_a_processor_that_linux_does_not_name_is_named(program, found, monkeypatch, tmp_path):
    """On ARM, /proc/cpuinfo has no model; elsewhere there is no such file."""
    monkeypatch.setattr(run_info, "CPUINFO", tmp_path / "cpuinfo")
    if program == "lscpu":
        run_info.CPUINFO.write_text(ARM)
    path = tmp_path / program.split(",")[0]
    path.write_text(PROGRAMS[program])
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "arm9")
    monkeypatch.setattr(os, "cpu_count", lambda: 72)
    assert run_info.processor() == f"72 cores of {found}"
