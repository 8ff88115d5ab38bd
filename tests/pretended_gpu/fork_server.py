"""Starts programs on the pretended GPU from a process that has imported torch already: imports take seconds of each's.

A request is a line of JSON on the standard input: the arguments of Python, the environment, and the files for what is
printed. It is answered by two lines: "started" with the number of the program's process and, at its end, "ended" with
its exit status.
"""

import gc
import json
import os
import runpy
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

# what asks for no device when it is imported
LIBRARIES = ("torch._inductor.compile_fx", "torch._inductor.codegen.triton", "torchvision", "torch.utils.tensorboard")

# what the pretended GPU's program sets
RUN = ("LD_LIBRARY_PATH", "LD_PRELOAD", "OMP_WAIT_POLICY", "TORCHINDUCTOR_COMPILE_THREADS")


def serve() -> list[str]:
    """Answers requests until there are no more; returns in a program's process, with its arguments."""
    for line in sys.stdin:
        argv, environment, out, err = json.loads(line)
        program = os.fork()
        if program == 0:
            become(environment, out, err)
            return argv
        print("started", program, flush=True)
        print("ended", os.waitstatus_to_exitcode(os.waitpid(program, 0)[1]), flush=True)
    sys.exit()


def become(environment: dict[str, str], out: str, err: str) -> None:
    kept = {name: os.environ[name] for name in RUN if name in os.environ}
    os.environ.clear()
    os.environ.update(environment | kept)
    for descriptor, path in enumerate((os.devnull, out, err)):
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)


def run(argv: list[str]) -> None:
    """As ``python ARGV``: a script, -m and a module, or -c and code."""
    how, *rest = argv
    folder = {"-m": os.getcwd(), "-c": ""}.get(how, str(Path(how).parent.absolute()))
    sys.path[0:1] = [folder, *os.environ["PYTHONPATH"].split(os.pathsep)]
    sys.modules.pop("sitecustomize", None)  # the system may have one of its own
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
    for name in LIBRARIES:
        import_module(name)
    gc.freeze()
    run(serve())
