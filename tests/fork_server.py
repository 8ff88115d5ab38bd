"""Starts Python programs from a process that has imported torch already: the import takes seconds of each of them.

python fork_server.py KEPT MODULES imports the modules, where they are installed; none may start CUDA when it is
imported, as torch does not. A request is a line of JSON on the standard input: the arguments of Python, the working
directory, the environment, and a folder. In the folder the program's output goes to "out" and "err", and to "end" what
is told on the standard error when Python itself ends; "pid" has the number of its process and, once it has ended,
"status" its exit status. The variables KEPT (with commas) are the server's in all programs.
"""

import atexit
import contextlib
import gc
import io
import json
import os
import runpy
import signal
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType


def serve(kept: dict[str, str]) -> list[str]:
    """Answers requests until there are no more; returns in a program's process, with its arguments."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait for the programs
    for line in sys.stdin:
        argv, cwd, environment, folder = json.loads(line)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            program = os.fork()
            if program == 0:
                become(cwd, environment | kept, Path(folder))
                return argv
            wait(program, Path(folder))
    os._exit(0)


def wait(program: int, folder: Path) -> None:
    """Tells the number of a program's process and, before the system gives it to another, how it has ended."""
    tell(folder / "pid", program)
    end = os.waitid(os.P_PID, program, os.WEXITED | os.WNOWAIT)
    tell(folder / "status", end.si_status if end.si_code == os.CLD_EXITED else -end.si_status)
    os._exit(0)


def tell(file: Path, number: int) -> None:
    part = file.with_suffix(".part")
    part.write_text(str(number))
    part.rename(file)


def become(cwd: str, environment: dict[str, str], folder: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in enumerate((os.devnull, folder / "out", folder / "err")):
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdin = os.fdopen(0)  # the old one may have read further requests
    if "PYTHONUNBUFFERED" in environment:
        unbuffered = os.fdopen(1, "wb", 0, closefd=False)
        sys.stdout = io.TextIOWrapper(unbuffered, sys.stdout.encoding, write_through=True)
    os.chdir(cwd)
    atexit.register(aside, folder / "end")  # after all that the program will register


def aside(file: Path) -> None:
    """From here on errors go to a file: triton says that what is frozen has leaked, and to unfreeze it takes long."""
    sys.stderr.flush()
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), 2)


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
    for name in sys.argv[2:]:
        with contextlib.suppress(ModuleNotFoundError):
            import_module(name)
    gc.freeze()
    run(serve({name: os.environ[name] for name in sys.argv[1].split(",") if name in os.environ}))
