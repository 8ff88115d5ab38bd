"""Checks what a zip archive (a checkpoint or an .npz file) declares, before anything in it is expanded.

Every function raises ValueError with one line that says what is wrong; the caller names the file.
"""

import io
import math
import os
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from typing import Any, BinaryIO, NamedTuple

import torch

from training.files import checks

MEMBERS = 4096  # of an archive; the CIFAR-10 checkpoint has 130
PICKLE_LIMIT = 1 << 19  # bytes of a checkpoint without its tensors; the CIFAR-10 one has 21 000
ITEMS, DEPTH = 1 << 17, 16  # values in a checkpoint without its tensors, and how far they are nested

END_RECORD, END_RECORD_64, LOCATOR_64 = b"PK\5\6", b"PK\6\6", b"PK\6\7"


def opened(
    file: BinaryIO, end: int | None = None, members: int = MEMBERS, expanded: int | None = None
) -> zipfile.ZipFile:
    """Opens a zip archive if the sizes that it declares are bounded; reads only its directory.

    All readers of zip archives (zipfile, NumPy, torch) then find the same members: the directory is at the end, and no
    name occurs twice.

    Args:
        file: open for reading; the caller closes it.
        end: where the archive ends, if something else follows it; default: the file's end.
        members: how many there may be.
        expanded: how many bytes all members together may have once they are expanded. None: none may be compressed.

    Raises:
        ValueError: it is no such archive.
    """
    end = file.seek(0, os.SEEK_END) if end is None else end
    count, directory = _end_of_archive(file, end)
    if count > members or directory > 128 * members:
        raise ValueError(f"it has {count} members in a directory of {directory} bytes, more than {members}")
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError, UnicodeError) as error:
        raise ValueError(f"it is not a zip archive ({error})") from None
    infos = archive.infolist()
    if len({info.filename.lower() for info in infos}) != count:  # torch.load does not tell case apart
        raise ValueError(f"it has {len(infos)} members, {count} declared, or two of one name")
    stored, declared = (sum(getattr(info, key) for info in infos) for key in ("compress_size", "file_size"))
    compressed = any(info.compress_type != zipfile.ZIP_STORED for info in infos) or stored != declared
    if stored > end or (compressed and expanded is None):
        raise ValueError(f"its members declare {declared} bytes, {stored} of them stored, in {end} bytes of file")
    if expanded is not None and declared > expanded:
        raise ValueError(f"its members have {declared} bytes once expanded, more than {expanded}")
    return archive


def _end_of_archive(file: BinaryIO, end: int) -> tuple[int, int]:
    """The number of members and the length of the directory, which the records at the end declare."""
    file.seek(max(end - 98, 0))
    tail = file.read(min(end, 98)).rjust(98, b"\0")
    wide, locator, record = tail[:56], tail[56:76], tail[76:]
    count, directory, start, comment = struct.unpack("<10xHLLH", record)
    consistent, position = record.rfind(END_RECORD) == 0 and not comment, end - 22
    if locator.startswith(LOCATOR_64):
        position = end - 98
        consistent &= wide.startswith(END_RECORD_64) and struct.unpack("<8xQ4x", locator)[0] == position
        count, directory, start = struct.unpack("<32xQQQ", wide)
    if not consistent or start + directory != position:
        raise ValueError("it does not end as a zip archive does")
    return count, directory


# -- what torch.load would make --------------------------------------------------------------------

STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
}
OPCODES = """
    PROTO GLOBAL REDUCE BUILD BINPERSID STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
    BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS
    BINPUT LONG_BINPUT BINGET LONG_BINGET
""".split()  # noqa: SIM905


def check_pickled(archive: zipfile.ZipFile) -> None:
    """Checks what torch.load would make of an archive, without making any tensor.

    Accepted are numbers, texts, dense tensors, and dictionaries, lists and tuples of them. Each tensor is contiguous
    and has a storage of its own size. torch.load itself checks less: even with weights_only it makes subclasses, views,
    sparse, quantised and meta tensors and arrays of any length, and believes the pickle about the size of a storage.

    Args:
        archive: from :func:`opened`, without compression.

    Raises:
        ValueError: it holds something else.
    """
    sizes = {info.filename: info.file_size for info in archive.infolist()}
    folder = next(iter(sizes), "").partition("/")[0]
    name = f"{folder}/data.pkl"
    if name not in sizes or not all(member.startswith(f"{folder}/") for member in sizes):
        raise ValueError("it is not an archive of torch.save")
    if sizes[name] > PICKLE_LIMIT:
        raise ValueError(f"its content without tensors has {sizes[name]} bytes, more than {PICKLE_LIMIT}")
    try:
        content = archive.read(name)
        _check_opcodes(content)
        unpickler = _Declared(content, sizes, f"{folder}/data/")
        _check_nested(unpickler.load())
    except ValueError:
        raise
    except Exception as error:  # what a damaged pickle raises is up to zipfile and pickle
        raise ValueError(f"its content is not a pickle of plain data ({type(error).__name__}: {error})") from None
    unused = {member for member in sizes if member.startswith(f"{folder}/data/")} - unpickler.used
    if unused:
        raise ValueError(f"{min(unused)} belongs to no tensor")


def _check_opcodes(content: bytes) -> None:
    """Accepts only opcodes that torch.save writes: with others, a few bytes can ask for gigabytes."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name not in OPCODES:
            raise ValueError(f"its pickle has the opcode {opcode.name}")
        if opcode.name == "LONG1" and argument.bit_length() > 64:
            raise ValueError("its pickle has a number of more than 64 bits")
        if opcode.name == "LONG_BINPUT" and argument > len(content):  # as long a table is allocated
            raise ValueError(f"its pickle remembers {argument} values in {len(content)} bytes")


class _Storage(NamedTuple):
    """In the place of a tensor's storage."""

    member: str
    elements: int


class _Tensor:
    """In the place of a tensor."""


class _State(OrderedDict):
    """In the place of what state_dict() returns, with its one attribute."""

    def __setstate__(self, state: Any) -> None:
        if type(state) is not dict or set(state) != {"_metadata"}:
            raise ValueError("its pickle sets attributes of a dictionary")


class _Declared(pickle.Unpickler):
    """Unpickles with :class:`_Tensor` in the place of tensors; refuses everything that is not listed here."""

    def __init__(self, content: bytes, sizes: dict[str, int], folder: str):
        super().__init__(io.BytesIO(content))
        self.sizes, self.folder = sizes, folder
        self.used: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _State
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise ValueError(f"it holds {module}.{name}, not only plain tensors, numbers and texts")

    def persistent_load(self, reference: Any) -> _Storage:
        kinds = (str, torch.dtype, str, str, int)
        if type(reference) is not tuple or tuple(map(type, reference)) != kinds or reference[0] != "storage":
            raise ValueError("its pickle refers to something that is not a storage")
        _, dtype, key, _, elements = reference
        member = f"{self.folder}{key}"
        if elements < 0 or self.sizes.get(member) != elements * dtype.itemsize:
            raise ValueError(f"{member} has {self.sizes.get(member, 0)} bytes for {elements} elements of {dtype}")
        return _Storage(member, elements)

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, gradient: Any, hooks: Any) -> _Tensor:
        if type(storage) is not _Storage:
            raise ValueError("its pickle has a tensor without a storage")
        member, elements = storage
        for sizes in (shape, stride):
            if type(sizes) is not tuple or len(sizes) > 16:
                raise ValueError(f"{member} has no shape")
            for size in sizes:
                checks.whole_number(f"a size of {member}", size)
        rows = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]  # the strides of elements in a row
        whole = (type(offset), offset, len(stride), math.prod(shape)) == (int, 0, len(shape), elements)
        in_a_row = whole and all(n <= 1 or s == row for n, s, row in zip(shape, stride, rows, strict=True))
        if not in_a_row or gradient is not False or hooks:
            raise ValueError(
                f"{member} is a view with offset {offset}, shape {shape} and strides {stride} of {elements} elements, "
                "not a plain tensor"
            )
        if member in self.used:
            raise ValueError(f"{member} belongs to two tensors")
        self.used.add(member)
        return _Tensor()


def _check_nested(value: Any) -> None:
    """Raises ValueError unless a value is nested plain data of bounded size, and no tensor occurs twice."""
    waiting, items = [(value, 0)], 0
    seen: set[int] = set()
    while waiting:
        value, depth = waiting.pop()
        items += 1
        if items > ITEMS or depth > DEPTH:
            raise ValueError(f"its content has more than {ITEMS} values, or is nested deeper than {DEPTH}")
        if isinstance(value, dict):
            if odd := set(map(type, value)) - {str, int}:
                raise ValueError(f"its content has a key of type {odd.pop().__name__}")
            waiting += ((item, depth + 1) for item in value.values())
        elif type(value) in (list, tuple):
            waiting += ((item, depth + 1) for item in value)
        elif type(value) is _Tensor:
            if id(value) in seen:
                raise ValueError("its content has one tensor in two places")
            seen.add(id(value))
        elif value is not None and type(value) not in (bool, int, float, str):
            raise ValueError(f"its content has a value of type {type(value).__name__}")
