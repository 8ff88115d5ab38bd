"""A system without what only Unix has, simulated on this one: everything imports, and a short run works."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What is missing on Windows, taken away before anything is imported.
OTHER_SYSTEM = """
import os, signal, sys
for module in ("fcntl", "resource", "grp", "pwd", "termios"):
    sys.modules[module] = None
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL", "pthread_sigmask", "sigwait"):
    if hasattr(signal, name):
        delattr(signal, name)
for name in ("O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "fchmod", "umask", "getuid", "geteuid", "mkfifo", "fork",
             "killpg"):
    if hasattr(os, name):
        delattr(os, name)
real = os.open
def open_(path, *arguments, **settings):
    if not isinstance(path, int) and os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return real(path, *arguments, **settings)
os.open = open_
sys.path.insert(0, os.getcwd())
"""


SCRIPT = """
import importlib
from pathlib import Path
dump, data, *modules = sys.argv[1:]
for name in modules:
    importlib.import_module(name)
print("all modules are imported", flush=True)

from mnist import mnist
options = ["-m", "grad", "-s", "0.95", "-b", "8", "--dataset-dir", data, "--dump-dir", dump]
for more in (["-N", "1"], ["-N", "2"], ["-test"]):
    assert mnist.main([*options, *more]) == 0

(run,) = Path(dump).glob("models/*")
from analysis import export
from reproduce.runner import Runner
assert export.main([str(run), "--format", "safetensors", "-o", dump + "/export"]) == 0
export.load_pruned(dump + "/export")
assert Runner(Path(dump), [], 1).run([]) == ([], [])

from benchmarks import gpu
assert gpu.finish([sys.executable, "-c", ""], Path(dump) / "log", 60) is None
"""


def modules() -> list[str]:
    """Every module of the repository but the tests."""
    paths = list(ROOT.glob("*.py"))
    for folder in ("spiking_kernels", "mnist", "c10", "training", "analysis", "reproduce", "benchmarks"):
        paths += (ROOT / folder).rglob("*.py")
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return sorted(name.removesuffix(".__init__") for name in names if not name.endswith("__main__"))


def test_everything_works_on_a_system_without_what_only_unix_has(tmp_path, mnist_folder):
    assert {"training.loop", "reproduce.runner", "benchmarks.bench", "spiking", "analysis.report"} <= {*modules()}
    command = [sys.executable, "-c", OTHER_SYSTEM + SCRIPT, str(tmp_path), str(mnist_folder), *modules()]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    for line in ("all modules are imported", "Resuming after epoch 1; 2 epochs in all.", "of 20 images)", "sparsity"):
        assert line in result.stdout
    told = [line for line in result.stderr.splitlines() if line.startswith("warning:")]
    assert len(told) == 2, told  # in all that was done
    assert "cannot be locked (Function not implemented): do not run its command twice" in told[0]
    assert "cannot be synced (Permission denied)" in told[1]


def test_a_console_of_plain_ascii_shows_what_it_can(tmp_path, mnist_folder):
    """-test prints µJ or nJ, a report dashes: no console is too poor for a run."""
    code = """
import sys
from analysis import report
from mnist import mnist
from measuring import energy
options = ["-b", "8", "-N", "1", "--dataset-dir", sys.argv[1], "--dump-dir", sys.argv[2]]
energy.PICOJOULES_PER_MAC = 1e6  # µJ
assert mnist.main(options) == 0
assert mnist.main([*options, "-test"]) == 0
assert report.main([sys.argv[2], "-o", sys.argv[2] + "/page.html"]) == 0
"""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code, str(mnist_folder), str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert " ?J " in result.stdout
