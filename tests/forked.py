"""Programs that run in processes of their own, started from one that has imported torch already (fork_server.py).

They differ from those of a new Python in this: they share the hash seed and the first random numbers of NumPy, and what
only Python's start looks at in their environment is the server's.
"""

import atexit
import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SERVER = Path(__file__).resolve().parent / "fork_server.py"
LIBRARIES = ("torch._dynamo", "torch.distributed", "torch.utils.tensorboard", "torchvision", "sklearn.datasets")
READ = ("ATEN_CPU_CAPABILITY", "LD_PRELOAD", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")  # by the time that torch is loaded
OF_PYTHON = ("PYTHONPATH", "PYTHONUNBUFFERED")  # which the server heeds for each program
LEAKS = re.compile(r"nanobind: | - |See https://nanobind")  # lines of what triton tells when a forked program ends
SECONDS = 120  # for the server to import its libraries and to start a program


class Program:
    """A program that has been started: what is needed here of subprocess.Popen. Its output goes to files."""

    def __init__(self, argv: Sequence[str], folder: Path, process: subprocess.Popen | None, server: "ForkServer"):
        self.args, self.folder, self.returncode = argv, folder, None
        self._process, self._server = process, server
        self.pid = process.pid if process else self._number("pid")

    def _number(self, file: str) -> int:
        """What the server writes to a file, once it is there."""
        end = time.monotonic() + SECONDS
        while not (self.folder / file).exists():
            if self._server.ended() or time.monotonic() > end:
                raise RuntimeError(f"the fork server has started nothing: {self._server.errors.read_text()}")
            time.sleep(0.005)
        return int((self.folder / file).read_text())

    def poll(self) -> int | None:
        if self.returncode is None:
            if self._process:
                self.returncode = self._process.poll()
            elif (self.folder / "status").exists():
                self.returncode = int((self.folder / "status").read_text())
        return self.returncode

    def wait(self, seconds: float) -> int:
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, seconds)
            time.sleep(0.005)
        return self.returncode

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """Waits for the end; what was printed on the two channels."""
        self.wait(timeout)
        return self.out, self.err

    @property
    def out(self) -> str:
        """What was printed so far."""
        return (self.folder / "out").read_text("utf-8", errors="replace")

    @property
    def err(self) -> str:
        """The same of the standard error."""
        text = (self.folder / "err").read_text("utf-8", errors="replace")
        if (self.folder / "end").exists():
            lines = (self.folder / "end").read_text("utf-8", errors="replace").splitlines(keepends=True)
            text += "".join(line for line in lines if not LEAKS.match(line))
        return text

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """A process that starts programs with libraries imported already.

    Args:
        errors: the file for what the server itself prints.
        environment: of the server. The programs have their own; one that differs in ``READ`` has a new Python.
        libraries: the modules to import.
        command: what runs Python, followed by its arguments.
        kept: variables that the command sets, for all programs.
    """

    def __init__(
        self,
        errors: Path,
        environment: Mapping[str, str],
        libraries: Sequence[str] = LIBRARIES,
        command: Sequence[str] = (sys.executable,),
        kept: Sequence[str] = (),
    ) -> None:
        self.errors, self._command = errors, command
        environment = {name: value for name, value in environment.items() if name not in OF_PYTHON}
        self._read = {name: environment.get(name) for name in READ}
        self._process = None
        if sys.platform == "linux":  # elsewhere a process with threads or frameworks need not survive a fork
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
            argv = [*command, str(SERVER), ",".join(kept), *libraries]
            with open(errors, "wb") as err:
                self._process = subprocess.Popen(argv, cwd=REPOSITORY, env=environment, stderr=err, **pipes)

    def ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def serves(self, environment: Mapping[str, str]) -> bool:
        """Whether programs with such an environment are started by the server."""
        return self._process is not None and all(environment.get(name) == self._read[name] for name in READ)

    def start(self, argv: Sequence[str], environment: Mapping[str, str], cwd: Path, folder: Path) -> Program:
        """Starts ``python ARGV``; the folder, which is there, is for its output."""
        argv, process = [*map(str, argv)], None
        with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
            if self.serves(environment):
                with contextlib.suppress(BrokenPipeError):  # waiting for the answer tells why
                    request = json.dumps([argv, str(cwd), dict(environment), str(folder)])
                    self._process.stdin.write(request.encode() + b"\n")
                    self._process.stdin.flush()
            else:
                command = [*self._command, *argv]
                process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=out, stderr=err)
        return Program(argv, folder, process, self)

    def close(self) -> None:
        if self._process:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.wait(60)


@functools.cache
def _server() -> tuple[ForkServer, Path]:
    """The server of this process, and a folder for its programs."""
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    server = ForkServer(Path(folder.name) / "errors", os.environ | {"OMP_NUM_THREADS": "1"})
    atexit.register(folder.cleanup)
    atexit.register(server.close)  # before
    return server, Path(folder.name)


def start(argv: Sequence[str | Path], cwd: Path = REPOSITORY, env: Mapping[str, str] | None = None) -> Program:
    """Starts ``python ARGV`` in a folder, with an environment of its own or that of the tests."""
    server, folder = _server()
    return server.start(argv, os.environ if env is None else env, cwd, Path(tempfile.mkdtemp(dir=folder)))


def run(
    argv: Sequence[str | Path], cwd: Path = REPOSITORY, env: Mapping[str, str] | None = None, timeout: float = 600
) -> subprocess.CompletedProcess:
    """Runs ``python ARGV`` to its end, as subprocess.run does with what is printed."""
    program = start(argv, cwd, env)
    try:
        out, err = program.communicate(timeout)
    finally:
        program.kill()
    return subprocess.CompletedProcess(argv, program.returncode, out, err)
