"""Compiling the kernels and keeping the library; compilers and kept files that are not what they should be."""

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sanitize import VARIANTS

import spiking_kernels
from spiking_kernels import build, kept

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:.* has no OpenMP")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> bytes:
    """The kernels, compiled quickly."""
    try:
        return build.compile_files(
            build.compiler(), build.sources(), ["-O0", "-shared", "-fPIC"], tmp_path_factory.mktemp("compiled")
        )
    except build.Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def working_compiler(tmp_path):
    try:
        works = build.first_accepted(build.compiler(), ("-O0",), tmp_path) is not None
    except build.Unavailable:
        works = False
    if not works:
        pytest.skip("needs a C compiler")


@pytest.mark.usefixtures("working_compiler")
def test_where_there_is_a_compiler_there_are_kernels():
    """So that tests which need them are not left out because of a fault in them."""
    assert spiking_kernels.unavailable() is None


@pytest.mark.skipif(platform.machine() != "x86_64", reason="of x86-64")
@pytest.mark.usefixtures("working_compiler")
@pytest.mark.parametrize("vectors", [("-mavx2", "-mfma"), ("-mavx2", "-mfma", "-mavx512f")])
def test_the_code_for_vectors_that_this_processor_may_not_have_compiles(vectors, tmp_path):
    flags = ["-O0", "-fopenmp-simd", "-shared", "-fPIC", "-Werror=implicit-function-declaration", *vectors]
    assert build.compile_files(build.compiler(), build.sources(), flags, tmp_path)


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Empty folders for the cache and for temporary files, and nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "temporary").mkdir(mode=0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    forget()
    yield SimpleNamespace(cache=tmp_path / "cache" / "gradrewire", temporary=tmp_path / "temporary")
    forget()


def forget():
    """As in a new process."""
    build.library.cache_clear()
    build.unavailable.cache_clear()


def files(folder):
    return sorted(folder.iterdir()) if folder.exists() else []


@pytest.fixture
def compiler(places, compiled, tmp_path, monkeypatch):
    """Makes CC a script that writes a compiled library; it begins with the given lines. Returns its calls."""
    log, prebuilt = tmp_path / "calls", tmp_path / "prebuilt"
    prebuilt.write_bytes(compiled)

    def calls():
        """The arguments of each call since the last."""
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    def make(*lines, arguments=""):
        script = tmp_path / "compiler"
        ours = [f'echo "$*" >> {log}', *lines, 'while [ "$1" != -o ]; do shift; done', f'cp {prebuilt} "$2"']
        script.write_text("\n".join(["#!/bin/sh", *ours]) + "\n")
        script.chmod(0o755)
        monkeypatch.setenv("CC", f"{script} {arguments}")
        return calls

    return make


def works(library):
    """Spike counts of two neurons in two steps."""
    x, counts = np.array([[2, 1], [2, 2]], dtype=np.float32), np.empty(2, dtype=np.float32)
    library.lif_count_forward(x.ctypes.data, counts.ctypes.data, 2, 2)
    return counts.tolist() == [2, 1]


# -- what is kept ------------------------------------------------------------------------------------


def test_a_library_is_compiled_once_and_leaves_one_file(compiler, places):
    calls = compiler()
    assert works(build.library())
    assert len([call for call in calls() if call.endswith("updates.c -lm")]) == 1
    (kept_file,) = files(places.cache)
    assert kept_file.stat().st_mode & 0o777 == 0o600
    assert files(places.temporary) == []
    forget()
    assert works(build.library())
    assert calls() == []


def shorter(path):
    os.truncate(path, path.stat().st_size // 2)


def one_bit(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def another(path, content):
    path.unlink()
    path.write_bytes(content)


DAMAGE = {
    "cut short": shorter,
    "empty": lambda path: os.truncate(path, 0),
    "a bit": lambda path: one_bit(path, 20_000),
    "a bit of the digest": lambda path: one_bit(path, 3),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "no library": lambda path: path.write_bytes(b"<html>"),
    "a library of nobody knows whom": lambda path: path.write_bytes(path.read_bytes()[32:]),
    "for another system": lambda path: kept.write(b"\x7fELF but not for here", path),
    "no functions": pytest.param(
        lambda path: kept.write(kept.read(path).replace(b"lif_count_forward", b"lif_count_forwxxx"), path),
        marks=pytest.mark.skipif(sys.platform == "darwin", reason="the system ends what loads a library changed so"),
    ),
    "huge": lambda path: os.truncate(path, 1 << 40),
    "others may write it": lambda path: path.chmod(0o666),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nothing")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_kept_library_that_is_not_what_was_kept_is_compiled_anew(compiler, places, damage):
    calls = compiler()
    build.library()
    (path,) = files(places.cache)
    content = path.read_bytes()
    for _ in range(2):
        damage(path)
        forget()
        calls()
        assert works(build.library())
        assert len([call for call in calls() if call.endswith("updates.c -lm")]) == 1
        assert files(places.cache) == [path]
        assert path.read_bytes() == content
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_library_that_belongs_to_another_user_is_not_loaded(compiler, places, monkeypatch):
    calls = compiler()
    build.library()
    forget()
    calls()
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    monkeypatch.setattr(kept, "_ours", lambda folder: True)
    with pytest.warns(UserWarning, match="cannot be kept"):  # as what is written still belongs to the old one
        build.library()
    assert calls()


def test_a_folder_in_place_of_the_library_is_named(compiler, places):
    compiler()
    build.library()
    (path,) = files(places.cache)
    path.unlink()
    path.mkdir()
    forget()
    with pytest.warns(UserWarning, match=f"cannot be kept \\({path}: Is a directory\\): every process compiles them"):
        assert works(build.library())
    assert files(places.cache) == [path]


def test_another_processor_or_system_has_a_library_of_its_own(compiler, places, monkeypatch):
    compiler()
    build.library()
    monkeypatch.setattr(build, "_processor", lambda: "another")
    forget()
    build.library()
    monkeypatch.setattr(build.platform, "libc_ver", lambda: ("musl", "1"))
    forget()
    build.library()
    assert len(files(places.cache)) == 3


def test_what_killed_processes_left_is_removed(compiler, places):
    compiler()
    old, young = places.cache / f"{kept.PREFIX}old", places.cache / f"{kept.PREFIX}young"
    for folder in (old, young):
        (folder / "objects").mkdir(parents=True)
    file = places.cache / f"{kept.PREFIX}file.so"
    file.touch()
    for path in (old, file):
        os.utime(path, (time.time() - 2 * kept.ABANDONED,) * 2)
    build.library()
    left = files(places.cache)
    assert young in left
    assert len(left) == 2


@pytest.mark.parametrize("folder", ["/dev/null/cache", "/proc/no/cache"])
def test_without_a_cache_every_process_compiles_and_leaves_nothing(compiler, places, monkeypatch, folder):
    calls = compiler()
    monkeypatch.setenv("XDG_CACHE_HOME", folder)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"cannot be kept \(/.*\): every process .* unless XDG_CACHE_HOME names"):
            assert works(build.library())
        assert calls()
        forget()
    assert files(places.temporary) == []


def test_the_cache_folder(monkeypatch):
    """As in the XDG Base Directory Specification, where a relative path counts as none."""
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert kept.folder() == Path("/cache/gradrewire")
    for none in ("", "cache", "~/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", none)
        assert kept.folder() == Path("/home/somebody/.cache/gradrewire")

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert kept.folder() is None


def test_without_a_home_folder(compiler, places, monkeypatch):
    compiler()
    monkeypatch.setattr(kept, "folder", lambda: None)
    with pytest.warns(UserWarning, match="cannot be kept \\(there is no home folder\\)"):
        assert works(build.library())
    assert files(places.temporary) == []


def test_without_any_folder(places, monkeypatch):
    monkeypatch.setattr(kept, "_places", lambda: [Path("/dev/null/x")])
    assert (
        build.unavailable()
        == "they cannot be compiled (no folder for temporary files that others cannot write to: TMPDIR names one)"
    )


IN_USE = """
import ctypes, os, sys, types
package = sys.modules["spiking_kernels"] = types.ModuleType("spiking_kernels")  # without torch, which takes seconds
package.__path__ = ["spiking_kernels"]
from spiking_kernels import build, kept
library = build.library()
def draws():
    normal, chosen = (ctypes.c_float * 1000)(), (ctypes.c_uint8 * 1000)()
    library.deep_rewiring_draws(normal, chosen, 1000, 7, 0.5)
    return bytes(normal).hex()
(path,) = [path for path in kept.folder().iterdir() if path.suffix == ".kernels"]
os.truncate(path, 100)
print(draws())
"""


def test_two_processes_at_once_and_a_file_cut_while_it_is_used(compiler, places):
    """A process that has a file mapped is killed when it reads what was cut off."""
    compiler()
    command = [sys.executable, "-c", IN_USE]
    pair = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = [process.communicate(timeout=120)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    assert len(first) > 8000
    assert first == second
    assert len(files(places.cache)) == 1


# -- loading -----------------------------------------------------------------------------------------


@pytest.fixture(params=["no memory files", "no /proc", "forbidden"])
def no_memory_files(request, monkeypatch):
    """macOS; a container; a hardened Linux."""
    if request.param == "no memory files":
        monkeypatch.delattr(os, "memfd_create", raising=False)
        return
    real, error = kept._dlopen, "No such file or directory" if request.param == "no /proc" else "failed to map segment"

    def dlopen(path):
        if path.startswith("/proc"):
            raise OSError(error)
        return real(path)

    monkeypatch.setattr(kept, "_dlopen", dlopen)


def test_loading_from_a_file_that_does_not_stay(compiler, places, no_memory_files):
    compiler()
    before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
    assert works(build.library())
    assert len(files(places.cache)) == 1
    assert files(places.temporary) == []
    assert not before or len(os.listdir("/proc/self/fd")) == len(before)


def test_where_the_cache_forbids_execution_the_temporary_folder_serves(compiler, places, monkeypatch):
    compiler()
    monkeypatch.delattr(os, "memfd_create", raising=False)
    real = kept._dlopen

    def dlopen(path):
        if path.startswith(str(places.cache)):
            raise OSError("failed to map segment from shared object")
        return real(path)

    monkeypatch.setattr(kept, "_dlopen", dlopen)
    assert works(build.library())
    monkeypatch.setattr(kept, "_places", lambda: [places.cache])
    forget()
    assert build.unavailable() == "the compiled kernels do not load (failed to map segment from shared object)"


def test_libraries_in_turn_are_different_ones(compiled, places):
    """The loader gives a path that it knows the library of old."""
    one, two = kept.load(compiled), kept.load(compiled + b"\0")
    assert ctypes.addressof(ctypes.c_char.in_dll(one, "lif_count_forward")) != ctypes.addressof(
        ctypes.c_char.in_dll(two, "lif_count_forward")
    )


# -- the compiler ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "there is no C compiler (CC='')"),
        ("  ", "there is no C compiler (CC='  ')"),
        ("cc '-O2", 'there is no C compiler (CC="cc \'-O2": No closing quotation)'),
        ("no-such-compiler -O2", "there is no C compiler (no-such-compiler -O2)"),
        ("/no/such/compiler", "there is no C compiler (/no/such/compiler)"),
        ("/", "the C compiler does not run (/: Permission denied)"),
        ("/dev/null", "the C compiler does not run (/dev/null: Permission denied)"),
        ("false", "the C compiler fails (false: status 1)"),
        ("true", "the C compiler writes no library (true)"),
        ("echo", "the C compiler writes no library (echo)"),
        (
            "sh -c 'echo note >&2; echo; printf \"cpu.c: error: \\377 no\\n\" >&2; exit 3'",
            "the C compiler fails (cpu.c: error: \N{REPLACEMENT CHARACTER} no)",
        ),
        ("sh -c 'kill -11 $$'", "the C compiler fails (sh -c 'kill -11 $$': status -11)"),
        ("sh -c 'while [ $1 != -o ]; do shift; done; echo hello >$2' -", None),
        ("sh -c 'while [ $1 != -o ]; do shift; done; >$2' -", None),
        (
            "sh -c 'while [ $1 != -o ]; do shift; done; mkdir $2' -",
            "the C compiler writes no library (sh -c 'while [ $1 != -o ]; do shift; done; mkdir $2' -)",
        ),
    ],
)
def test_a_compiler_that_is_none_is_a_line(places, monkeypatch, text, line):
    monkeypatch.setenv("CC", text)
    reason = build.unavailable()
    if line is None:  # in the words of the system's loader
        assert reason.startswith("the compiled kernels do not load (")
        assert "\n" not in reason
    else:
        assert reason == line
    assert files(places.cache) == []
    assert files(places.temporary) == []


def test_a_compiler_that_does_not_end_is_ended_with_its_children(places, monkeypatch, tmp_path):
    pipe, script = tmp_path / "pipe", tmp_path / "slow"
    os.mkfifo(pipe)
    script.write_text(f"#!/bin/sh\n(echo started; sleep 600) >{pipe} &\nwait\n")
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    monkeypatch.setattr(build, "SECONDS", 2)
    began = time.monotonic()
    with open(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), "rb") as child:
        assert build.unavailable() == f"the C compiler does not finish ({script}, in 2 seconds)"
        os.set_blocking(child.fileno(), True)
        assert child.read() == b"started\n"  # to the end: nobody has it open
    assert time.monotonic() - began < 300  # the child has not slept to its end
    assert files(places.cache) == []


def test_arguments_of_the_compiler(compiler, places):
    calls = compiler(arguments="-one 'two three'")
    assert works(build.library("-four"))
    call = calls()[-1]
    assert call.startswith("-one two three -O3 -fno-fast-math ")
    assert " -four -o " in call
    build.library("-five")
    assert " -five -o " in calls()[-1]
    assert len(files(places.cache)) == 2


def test_arithmetic_without_nan_and_infinity_is_not_asked_for(compiler, places):
    """The kernels look for both; and a library that gcc 12 makes so rounds denormals to 0 in all of the process."""
    calls = compiler(arguments="-one -ffast-math -Ofast -funsafe-math-optimizations -two")
    assert works(build.library())
    for call in calls():
        assert call.startswith("-one -two -")
        assert "fast" not in call.replace("-fno-fast-math", "")


@pytest.mark.usefixtures("working_compiler")
def test_kernels_of_fast_arithmetic_count_as_they_should(places, monkeypatch):
    monkeypatch.setenv("CC", f"{shlex.join(build.compiler())} -ffast-math")
    x, counts = np.array([[np.inf, 1], [2, np.nan]], dtype=np.float32), np.empty(2, dtype=np.float32)
    build.library("-O1").lif_count_forward(x.ctypes.data, counts.ctypes.data, 2, 2)
    expected = torch.zeros(2)
    v = torch.zeros(2)
    for step in torch.from_numpy(x):
        h = v + (step - v) / 2
        expected += h >= 1
        v = torch.where(h >= 1, h - h, h)
    assert counts.tolist() == expected.tolist()
    assert np.float32(1e-20) * np.float32(1e-20) > 0


def test_where_the_real_code_does_not_compile_for_this_processor_it_does_for_another(compiler, places):
    """An assembler that is older than the compiler knows not all of its instructions."""
    calls = compiler('case "$*" in *native*updates.c*) echo "Error: no such instruction" >&2; exit 1;; esac')
    assert works(build.library())
    assert "native" not in calls()[-1]
    assert len(files(places.cache)) == 1
    forget()
    assert works(build.library())
    (tried,) = [call for call in calls() if call.endswith("updates.c -lm")]
    assert "native" in tried  # what is kept is found only once this has failed


def test_a_cache_that_cannot_be_read_again_is_named(compiler, places, monkeypatch):
    """On a file system that shows every file as writable by all, or as another user's."""
    calls, fstat = compiler(), os.fstat
    monkeypatch.setattr(os, "fstat", lambda descriptor: as_of_all(fstat(descriptor)))
    with pytest.warns(UserWarning, match="cannot be kept .*others can write there.*every process compiles"):
        assert works(build.library())
    assert calls()


def as_of_all(status):
    return os.stat_result((status.st_mode | 0o022, *status[1:]))


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="folders have no owners here")
def test_no_library_is_built_where_others_can_put_another_one(compiler, places):
    compiler()
    places.cache.mkdir(parents=True)
    places.cache.chmod(0o777)
    assert kept._places() == [places.temporary]
    places.cache.chmod(0o1777)
    assert kept._places() == [places.cache, places.temporary]
    places.cache.chmod(0o770)
    with kept.workspace() as folder:
        assert folder.parent == places.temporary


def test_a_compiler_that_talks(compiler, places):
    compiler("i=0; while [ $i -lt 20000 ]; do echo talk; echo warning >&2; i=$((i+1)); done")
    assert works(build.library())


ANSWER = 'case "$*" in *{}*) echo "error: unknown option" >&2; exit 1;; esac'


@pytest.mark.parametrize(
    ("unknown", "used"),
    [
        ([], ["-march=native", "-fopenmp"]),
        (["-march=native"], ["-mcpu=native", "-fopenmp"]),
        (["=native"], ["-fopenmp"]),
        (["-fopenmp"], ["-march=native"]),
        (["'-fopenmp '"], ["-march=native", "-fopenmp-simd"]),
    ],
)
def test_options_that_a_compiler_does_not_know_are_left_out(compiler, places, unknown, used):
    calls = compiler(*(ANSWER.format(option) for option in unknown))
    assert works(build.library())
    words = calls()[-1].split()
    assert [word for word in words if "native" in word or "openmp" in word] == used
    forget()
    assert works(build.library())
    assert not any(call.endswith("updates.c -lm") for call in calls())


def test_without_openmp_one_line_says_so_until_there_is_some(compiler, places, compiled):
    with warnings.catch_warnings(record=True) as before:
        warnings.simplefilter("always")
        calls = compiler(ANSWER.format("'-fopenmp '"))
        build.library()
    one_thread = not hasattr(kept.load(compiled), "omp_get_max_threads")
    assert one_thread  # it was compiled without -fopenmp
    (warning,) = before
    assert str(warning.message).endswith("compiler has no OpenMP: the fused kernels run on one thread")
    calls = compiler()
    calls()
    forget()
    build.library()
    assert " -fopenmp " in calls()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["gcc", "clang"])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_every_compiler_makes_the_same_steps_of_deep_rewiring(places, monkeypatch, command, options):
    found, default = (shutil.which(name) for name in (command, "cc"))
    if not found or (default and os.path.realpath(found) == os.path.realpath(default)):
        pytest.skip(f"no {command} beside cc")
    steps = []
    for cc in ("cc", command):
        monkeypatch.setenv("CC", cc)
        forget()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* has no OpenMP")
            library = build.library(*options)
        rng = np.random.default_rng(0)
        w, g, m, v, x, theta = torch.from_numpy(rng.standard_normal((6, 5003)).astype(np.float32)).unbind()
        sign = torch.from_numpy(rng.choice([-1, 1], 5003).astype(np.int8))
        tensors = dict(exp_avg=m, exp_avg_sq=v.abs_(), max_exp_avg_sq=x.abs_(), sign=sign, step=torch.tensor(1.0))
        settings = dict(lr=0.001, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, amsgrad=True, maximize=False)
        settings = spiking_kernels.Settings(**settings, l1=0.5, T=0.3, max_s=0.3, theta_min=-0.5)
        for soft in (None, theta):
            memory = spiking_kernels.Memory(w, **tensors, theta=soft)
            with monkeypatch.context() as patched:
                patched.setattr(build, "library", lambda library=library: library)
                spiking_kernels.deep_rewiring_step(memory, g, settings, seed=7)
        steps.append([w, m, theta])
    assert all(torch.equal(a, b) for a, b in zip(*steps, strict=True))
