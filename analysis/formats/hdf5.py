"""Reads a small HDF5 file in a process of its own: ``python hdf5.py FILE`` writes its datasets as an .npz.

With a single wrong byte in a file, the HDF5 library may loop for ever, take all memory, or crash. Here its time and
memory are limited, and it reads only datasets that are small, complete and in this file.
"""

import io
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SECONDS = 1.0  # of processor time; the network takes 0.02
WALL_SECONDS = 120.0  # for a process that does not even start
MEMORY = 1 << 28  # bytes beyond those of the Python process with h5py in it
LINKS, DEPTH, BYTES = 100, 4, 1 << 25  # the network has some 45 names, 3 groups deep, and, of width 800, 2.6 MB
FILTERS = {1: "deflate", 2: "shuffle", 3: "fletcher32"}  # with their numbers in HDF5


def read(path: Path) -> dict[str, NDArray]:
    """Reads all datasets of a file, by their paths in it, in a process of its own.

    Raises:
        ValueError: it is damaged, or holds more than the network; or reading it took too long.
    """
    command = [sys.executable, "-P", __file__, str(path)]  # -P: its folder has modules with common names
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=WALL_SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(f"reading it takes longer than {WALL_SECONDS:g} s") from None
    if hasattr(signal, "SIGPROF") and done.returncode == -signal.SIGPROF:
        raise ValueError(f"reading it takes longer than {SECONDS:g} s of processor time")
    if done.returncode:
        reasons = done.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(reasons[-1] if reasons else f"the HDF5 library ended with status {done.returncode}")
    with np.load(io.BytesIO(done.stdout), allow_pickle=False) as file:
        return dict(file)


def _limit() -> None:
    """Ends this process after :data:`SECONDS` of processor time, and bounds its memory, where the system can."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, whatever the library is doing
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        return
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _datasets(path: str) -> dict[str, NDArray]:
    import h5py

    names: list[bytes] = []
    found: dict[str, NDArray] = {}

    def stop(name: bytes) -> bool | None:
        names.append(name)
        return True if len(names) > LINKS else None

    with h5py.File(path, "r") as file:
        file.id.links.visit(stop)
        if len(names) > LINKS or any(name.count(b"/") > DEPTH for name in names):
            raise ValueError(f"it has more than {LINKS} names, or groups deeper than {DEPTH}")
        for name in map(bytes.decode, names):
            if type(file.get(name, getlink=True)) is not h5py.HardLink:
                raise ValueError(f"{name} is a link to somewhere else")
            if not isinstance(file[name], h5py.Group):
                found[name] = _array(file[name], name, BYTES - sum(array.nbytes for array in found.values()))
    return found


def _array(dataset: Any, name: str, limit: int) -> NDArray:
    """Reads a dataset of numbers or texts, if all of it is in the file, and in no more than ``limit`` bytes."""
    import h5py

    if not isinstance(dataset, h5py.Dataset) or dataset.shape is None or dataset.is_virtual or dataset.external:
        raise ValueError(f"{name} is not stored in the file")
    text = h5py.check_string_dtype(dataset.dtype) is not None
    if not text and dataset.dtype.kind not in "fiu":
        raise ValueError(f"{name} is of type {dataset.dtype}")
    settings = dataset.id.get_create_plist()
    filters = {settings.get_filter(number)[0] for number in range(settings.get_nfilters())}
    if filters - FILTERS.keys():
        raise ValueError(f"{name} is not compressed by one of {', '.join(FILTERS.values())}")
    size, chunk = math.prod(dataset.shape) * dataset.dtype.itemsize, math.prod(dataset.chunks or ())
    if max(size, chunk * dataset.dtype.itemsize) > limit or (text and math.prod(dataset.shape) > LINKS):
        raise ValueError(f"{name} has {size} bytes, in chunks of {chunk} elements, more than {limit} bytes")
    if dataset.chunks:
        wanted = math.prod(-(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True))
        whole = dataset.id.get_num_chunks() == wanted
    else:
        stored = dataset.id.get_storage_size()  # of texts: of references to them, in the file's own size
        whole = stored > 0 if text else stored == size
    if not whole:
        raise ValueError(f"{name} declares {size} bytes that are not in the file")
    return np.asarray(dataset.asstr()[()], dtype=np.str_) if text else np.asarray(dataset[()])


def main(path: str) -> int:
    try:
        import h5py  # noqa: F401 (its own time and memory do not count)

        _limit()
        content = io.BytesIO()
        np.savez(content, **_datasets(path))
    except Exception as error:
        print((str(error) or type(error).__name__).replace("\n", " "), file=sys.stderr)
        return 1
    sys.stdout.buffer.write(content.getbuffer())
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
