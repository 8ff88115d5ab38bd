"""Starts Python programs from a process that has imported torch already: the import takes seconds of each of them.

python fork_server.py MODULES imports these, where they are installed. A request is a line of JSON on the standard
input: the arguments of Python, the working directory, the environment, and a folder. In the folder the program's output
goes to "out" and "err", "pid" has the number of its process and, once it has ended, "status" its exit status.
"""

import atexit
import contextlib
import gc
import json
import os
import runpy
import signal
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

# what the pretended GPU's program sets
RUN = ("LD_LIBRARY_PATH", "LD_PRELOAD", "OMP_WAIT_POLICY", "TORCHINDUCTOR_COMPILE_THREADS")


def serve() -> list[str]:
    """Answers requests until there are no more; returns in a program's process, with its arguments."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait for the programs
    for line in sys.stdin:
        argv, cwd, environment, folder = json.loads(line)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            program = os.fork()
            if program == 0:
                become(cwd, environment, Path(folder))
                return argv
            wait(program, Path(folder))
    os._exit(0)


def wait(program: int, folder: Path) -> None:
    for name, number in (
        ("pid", lambda: program),
        ("status", lambda: os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])),
    ):
        (folder / f"{name}.part").write_text(str(number()))
        (folder / f"{name}.part").rename(folder / name)
    os._exit(0)


def become(cwd: str, environment: dict[str, str], folder: Path) -> None:
    kept = {name: os.environ[name] for name in RUN if name in os.environ}
    os.environ.clear()
    os.environ.update(environment | kept)
    for descriptor, path in enumerate((os.devnull, folder / "out", folder / "err")):
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdin = os.fdopen(0)  # the old one may have read further requests
    sys.stdout.reconfigure(write_through="PYTHONUNBUFFERED" in environment)
    os.chdir(cwd)
    atexit.register(silence)  # as the first, so the last that is called


def silence() -> None:
    """Nothing is told any more: triton would say that what is frozen has leaked, and to unfreeze it takes a second."""
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def run(argv: list[str]) -> None:
    """As ``python ARGV``: a script, -m and a module, or -c and code."""
    how, *rest = argv
    folder = {"-m": os.getcwd(), "-c": ""}.get(how, str(Path(how).parent.absolute()))
    sys.path[0:1] = [folder, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.modules.pop("sitecustomize", None)  # the system may have one of its own
    if find_spec("sitecustomize"):
        import_module("sitecustomize")
    if how == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif how == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(rest[0], vars(main))
    else:
        sys.argv = argv
        runpy.run_path(how, run_name="__main__")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        with contextlib.suppress(ModuleNotFoundError):
            import_module(name)
    gc.freeze()
    run(serve())
