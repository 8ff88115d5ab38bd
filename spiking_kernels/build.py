"""Compiles ``cpu.c`` at first use and loads what came of it."""

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("cpu.c")


class Unavailable(RuntimeError):
    """The kernels cannot be built on this machine; the text says why, in one line."""


def _cache_folder() -> Path:
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradrewire"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # no home folder, or one that cannot be written to
        return Path(tempfile.mkdtemp(prefix="gradrewire-"))


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))
    except OSError:
        return platform.processor()


def compile_source(compiler: str = "cc", *options: str) -> Path:
    """Compiles ``cpu.c`` for this processor, once, with options of the compiler; returns the library's path.

    Raises:
        Unavailable: there is no compiler, or it cannot compile the source.
    """
    flags = ["-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", *options]
    key = hashlib.sha256("\n".join([SOURCE.read_text(), compiler, *flags, _processor()]).encode()).hexdigest()
    library = _cache_folder() / f"cpu-{key[:16]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / "cpu.so"  # renamed when complete: several processes may build at once
            try:
                subprocess.run(
                    [compiler, *flags, "-o", built, SOURCE, "-lm"], check=True, capture_output=True, text=True
                )
            except FileNotFoundError:
                raise Unavailable(f"there is no C compiler ({compiler})") from None
            except subprocess.CalledProcessError as error:
                message = (error.stderr.strip() or str(error)).splitlines()[0]
                raise Unavailable(f"the C compiler fails ({message})") from None
            os.replace(built, library)
    return library


@functools.cache
def library() -> ctypes.CDLL:
    return load(compile_source(os.environ.get("CC", "cc")))


def load(path: Path) -> ctypes.CDLL:
    """The functions of a compiled ``cpu.c``, with the types of their arguments.

    Raises:
        Unavailable: the library does not load.
    """
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"the compiled kernels do not load ({error})") from None
    pointer, integer, wide, seed = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_uint64
    real, double = ctypes.c_float, ctypes.c_double
    for name, arguments in {
        "constant_lif_linear_forward": [pointer] * 7 + [integer] * 5,
        "constant_lif_linear_backward": [pointer] * 8 + [integer] * 5,
        "lif_count_forward": [pointer] * 2 + [wide, integer],
        "lif_count_backward": [pointer] * 3 + [wide, integer],
        "affine_lookup": [pointer] * 5 + [wide] + [integer] * 3,
        "grad_rewiring_step": [pointer] * 7 + [wide] + [real] * 11,
        "deep_rewiring_draws": [pointer] * 2 + [wide, seed, double],
        "deep_rewiring_step": [pointer] * 7 + [wide, seed, double] + [real] * 12,
    }.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, integer if name == "affine_lookup" else None
    return library


@functools.cache
def available() -> str | None:
    """None when the kernels can be used, building them if need be; else why not, in one line."""
    try:
        library()
    except Unavailable as error:
        return str(error)
    return None
