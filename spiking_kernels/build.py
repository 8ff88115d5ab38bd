"""Compiles the C files beside this one at first use, into one library, and keeps it for later processes."""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import signal
import subprocess
import tempfile
import warnings
from pathlib import Path

from spiking_kernels import kept

FOLDER = Path(__file__).parent  # every .c file in it is compiled, and may include every .h file
FLAGS = ("-O3", "-fno-fast-math", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# Left out of CC: by each of these, gcc 12 links in what rounds denormals to 0 in all of the process.
FAST = {"-Ofast", "-ffast-math", "-funsafe-math-optimizations"}
# Of each row the first that the compiler takes, or none. Without -fopenmp the kernels have one thread.
ALTERNATIVES = (("-march=native", "-mcpu=native"), ("-fopenmp", "-fopenmp-simd"))
PROBE = """int probe(int n) {
    int sum = 0;
    _Pragma("omp parallel for reduction(+ : sum)")
    for (int i = 0; i < n; i++) sum += i;
    return sum;
}
"""
SECONDS = 120  # for one call of the compiler; the kernels take one or two

_pointer, _int, _int64, _uint64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_uint64
_double = ctypes.c_double
ARGUMENTS = {  # of each function in C that Python calls
    "constant_lif_linear_forward": [_pointer] * 7 + [_int] * 5,
    "constant_lif_linear_backward": [_pointer] * 8 + [_int] * 5,
    "constant_lif_linear_learn": [_pointer] * 12 + [_int] * 6,
    "lif_count_forward": [_pointer] * 2 + [_int64, _int],
    "lif_count_backward": [_pointer] * 3 + [_int64, _int],
    "block_statistics": [_pointer] * 4 + [_int] * 5,
    "block_forward": [_pointer] * 5 + [_int] * 8,
    "block_backward_sums": [_pointer] * 8 + [_int] * 7,
    "block_backward": [_pointer] * 9 + [_int] * 8,
    "convolution_fast": [],
    "convolution_forward": [_pointer] * 3 + [_int] * 5,
    "convolution_weights_gradient": [_pointer] * 4 + [_int] * 6,
    "convolution_plane": [_int],
    "convolution_spikes_gradient": [_pointer] * 7 + [_int] * 6,
    "affine_lookup": [_pointer] * 5 + [_int64] + [_int] * 3,
    "grad_rewiring_step": [_pointer] * 2,
    "deep_rewiring_draws": [_pointer] * 2 + [_int64, _uint64, _double],
    "deep_rewiring_step": [_pointer] * 2 + [_uint64],
}
REFUSING = {
    "constant_lif_linear_forward",
    "constant_lif_linear_learn",
    "convolution_forward",
    "convolution_weights_gradient",
    "affine_lookup",
}  # return 1 for what they refuse, having written nothing that counts
TELLING = {"convolution_fast", "convolution_plane"}  # return what they are asked for


class Unavailable(RuntimeError):
    """The kernels cannot be built on this machine; the text says why, in one line."""


class _OptionFails(Unavailable):
    """The compiler runs, but makes nothing that loads: other options may help."""


@functools.cache
def unavailable() -> str | None:
    """Why the kernels cannot be used on this machine, in one line; None if they can. Compiles them if need be."""
    try:
        library()
    except Unavailable as error:
        return str(error)
    return None


@functools.cache
def library(*options: str) -> ctypes.CDLL:
    """The kernels, compiled with these options too by the command in CC, or by cc where CC is not set.

    Raises:
        Unavailable: there is no compiler, or what it makes cannot be used.
    """
    command = compiler()
    loaded = _load_kept(_path(command, [row[0] for row in ALTERNATIVES], options)) or _build(command, options)
    if not hasattr(loaded, "omp_get_max_threads"):
        warnings.warn(f"{shlex.join(command)} has no OpenMP: the fused kernels run on one thread", stacklevel=2)
    return loaded


def sources(pattern: str = "*.c", folder: Path = FOLDER) -> list[Path]:
    return sorted(folder.glob(pattern))


def _build(command: list[str], options: tuple[str, ...]) -> ctypes.CDLL:
    try:
        with kept.workspace() as folder:
            chosen = [first_accepted(command, row, folder) for row in ALTERNATIVES]
            path = _path(command, chosen, options)
            if (loaded := _load_kept(path)) is not None:
                return loaded
            try:
                content = _compiled(command, chosen, options, folder)
            except _OptionFails:  # an assembler that is older than the compiler, say
                if chosen[0] is None:
                    raise
                chosen[0] = None
                path = _path(command, chosen, options)
                if (loaded := _load_kept(path)) is not None:
                    return loaded
                content = _compiled(command, chosen, options, folder)
    except OSError as error:
        raise Unavailable(f"they cannot be compiled ({error})") from None
    loaded = _load(content)
    reason = "there is no home folder"
    try:
        if path:
            kept.write(content, path)
            if kept.read(path) is not None:
                return loaded
            reason = f"{path}: others can write there, or its file system says so"
    except OSError as error:
        reason = f"{path}: {error.strerror}"
    warnings.warn(
        f"the compiled kernels cannot be kept ({reason}): every process compiles them, "
        "unless XDG_CACHE_HOME names another folder",
        stacklevel=3,
    )
    return loaded


def _compiled(command: list[str], chosen: list[str | None], options: tuple[str, ...], folder: Path) -> bytes:
    return compile_files(command, sources(), [*FLAGS, *filter(None, chosen), *options], folder)


def _path(command: list[str], chosen: list[str | None], options: tuple[str, ...]) -> Path | None:
    """Where a library is kept; the name holds all that its content depends on."""
    texts = [path.read_bytes() for path in sources("*.[ch]")]
    parts = (texts, command, FLAGS, chosen, options, platform.libc_ver(), _processor())
    folder = kept.folder()
    return folder and folder / f"cpu-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.kernels"


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by different machines."""
    told = ("model name", "flags", "Features", "features", "CPU implementer", "CPU part", "cpu\t", "isa")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join([platform.machine(), *sorted({line for line in lines if line.startswith(told)})])
    except OSError:  # if the system does not say what its processor can do, a library is for one machine only
        return "\n".join(platform.uname())


# -- the compiler ------------------------------------------------------------------------------------


def compiler() -> list[str]:
    """The words of CC, which may hold arguments, without those for arithmetic that knows no NaN and infinity."""
    text, problem = os.environ.get("CC", "cc"), ""
    try:
        if words := [word for word in shlex.split(text) if word not in FAST]:
            return words
    except ValueError as error:
        problem = f": {error}"
    raise Unavailable(f"there is no C compiler (CC={text!r}{problem})")


def first_accepted(command: list[str], options: tuple[str, ...], folder: Path) -> str | None:
    """The first option with which a compiler makes a library that loads: OpenMP's runtime may not be there."""
    source = folder / "probe.c"
    source.write_text(PROBE)
    for option in options:
        with contextlib.suppress(_OptionFails, OSError):
            kept.load(compile_files(command, [source], ["-shared", "-fPIC", option], folder))
            return option
    return None


def compile_files(command: list[str], files: list[Path], flags: list[str], folder: Path) -> bytes:
    """The library that a compiler makes of C files, in one call; ``folder`` is for files of its own.

    Raises:
        Unavailable: it fails, is missing, or takes more than SECONDS.
    """
    built, name = Path(tempfile.mkdtemp(dir=folder)) / "built.so", shlex.join(command)
    try:
        process = subprocess.Popen(
            [*command, *flags, "-o", str(built), *map(str, files), "-lm"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "LC_ALL": "C", "TMPDIR": str(folder)},  # its own files go with the folder
            start_new_session=True,  # so that it can be ended with all that it has started
        )
    except FileNotFoundError:
        raise Unavailable(f"there is no C compiler ({name})") from None
    except OSError as error:
        raise Unavailable(f"the C compiler does not run ({name}: {error.strerror})") from None
    with process:
        try:
            _, message = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"the C compiler does not finish ({name}, in {SECONDS} seconds)") from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
    if process.returncode:
        lines = [line.strip() for line in message.splitlines() if line.strip()]
        lines.append(f"{name}: status {process.returncode}")
        raise _OptionFails(f"the C compiler fails ({next((line for line in lines if 'error' in line), lines[0])})")
    try:
        return built.read_bytes()
    except OSError:
        raise _OptionFails(f"the C compiler writes no library ({name})") from None


# -- loading -----------------------------------------------------------------------------------------


def _load_kept(path: Path | None) -> ctypes.CDLL | None:
    content = path and kept.read(path)
    with contextlib.suppress(Unavailable):  # it was built on another system
        return _load(content) if content else None


def _load(content: bytes) -> ctypes.CDLL:
    try:
        return declared(kept.load(content))
    except (OSError, AttributeError) as error:
        raise Unavailable(f"the compiled kernels do not load ({error})") from None


def declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """The library, with the types of its functions' arguments."""
    for name, arguments in ARGUMENTS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, _int if name in REFUSING | TELLING else None
    return loaded
