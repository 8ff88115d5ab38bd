"""What an archive declares to hold is checked before torch.load, or anything else, makes it."""

import io
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict

import pytest
import torch
from torch import nn

from training.files import archives, storage


class Subclass(torch.Tensor):
    pass


with warnings.catch_warnings(action="ignore"):  # deprecated, but torch.load still makes them
    QUANTISED = torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8)


# -- archives --------------------------------------------------------------------------------------


def zipped(members, compression=zipfile.ZIP_STORED) -> io.BytesIO:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members:
            with warnings.catch_warnings(action="ignore"):  # a name that is there already
                archive.writestr(name, content)
    return file


@pytest.mark.parametrize(
    ("file", "settings", "message"),
    [
        (zipped([("a", bytes(10**6))], zipfile.ZIP_DEFLATED), {}, "declare 1000000 bytes"),
        (
            zipped([("a", bytes(10**6))], zipfile.ZIP_DEFLATED),
            dict(expanded=999_999),
            "more than 999999",
        ),
        (zipped([("a", b"1"), ("a", b"2")]), {}, "two of one name"),
        (zipped([("a", b"1"), ("A", b"2")]), {}, "two of one name"),
        (zipped([(f"{n}", b"") for n in range(5)]), dict(members=4), "5 members"),
        (io.BytesIO(zipped([("a", b"1")]).getvalue() + b"more"), {}, "does not end as"),
        (io.BytesIO(b"PK\3\4"), {}, "does not end as"),
        (io.BytesIO(), {}, "does not end as"),
    ],
)
def test_archives_that_are_refused(file, settings, message):
    with pytest.raises(ValueError, match=message):
        archives.opened(file, **settings)


def test_archives_that_are_accepted():
    with archives.opened(zipped([("a", b"12"), ("b", bytes(1000))], zipfile.ZIP_DEFLATED), expanded=1002) as archive:
        assert archive.read("a") == b"12"
    with archives.opened(zipped([])) as archive:
        assert archive.namelist() == []


def test_members_that_share_their_bytes():
    """Two names for the same bytes declare more than the file has."""
    content = bytearray(zipped([("a", bytes(1000)), ("b", b"")]).getvalue())
    first, second = (m for m in range(len(content)) if content[m : m + 4] == b"PK\1\2")
    content[second + 16 : second + 28] = content[first + 16 : first + 28]  # CRC and sizes
    content[second + 42 : second + 46] = content[first + 42 : first + 46]  # where it begins
    with pytest.raises(ValueError, match="declare 2000 bytes, 2000 of them stored"):
        archives.opened(io.BytesIO(content))


@pytest.mark.parametrize(("offset", "form", "value"), [(10, "<H", 60_000), (12, "<L", 2**31), (16, "<L", 2**31)])
def test_ends_that_do_not_fit(offset, form, value):
    """The counts at the end are bounded before the directory is read."""
    content = bytearray(zipped([("a", b"1")]).getvalue())
    struct.pack_into(form, content, len(content) - 22 + offset, value)
    with pytest.raises(ValueError, match=r"members|does not end as"):
        archives.opened(io.BytesIO(content))


# -- pickles ---------------------------------------------------------------------------------------


def saved(state) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(state, file)
    return file


def check(file) -> None:
    with archives.opened(file) as archive:
        archives.check_pickled(archive)


class Calls:
    """Pickles as the call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


SHARED = torch.ones(3)
CYCLE: list = []
CYCLE.append(CYCLE)
LAUGHS = [0]
for _ in range(14):
    LAUGHS = [LAUGHS] * 10
BOMBS = {
    "bytearray": Calls(bytearray, 10**12),
    "torch.Tensor": Calls(torch.Tensor, 10**9, 10),
    "Counter": Calls(__import__("collections").Counter, "abc"),
    "set": {1},
    "complex": 1j,
    "Size": torch.zeros(2).shape,
    "device": torch.device("cpu"),
    "float16": torch.float16,
    "_rebuild_parameter": nn.Parameter(torch.ones(2)),
    "_rebuild_sparse_tensor": torch.ones(2, 3).to_sparse(),
    "_rebuild_qtensor": QUANTISED,
    "_rebuild_meta_tensor_no_storage": torch.ones(2, device="meta"),
    "_rebuild_from_type_v2": torch.ones(2).as_subclass(Subclass),
    "_rebuild_tensor_v3": torch.ones(2, dtype=torch.uint16),
    "ComplexFloatStorage": torch.ones(2, dtype=torch.complex64),
    "strides (0, 0)": torch.ones(1).expand(2, 3),
    "strides (1, 2)": torch.ones(3, 2).t(),
    "of 100 elements": torch.ones(100)[:6],
    "offset 6": torch.ones(12)[6:],
    "belongs to two tensors": [SHARED, SHARED.view(3)],
    "one tensor in two places": [SHARED, SHARED],
    "not a plain tensor": torch.ones(2, requires_grad=True),
    "nested deeper": CYCLE,
    "values, or is nested": LAUGHS,
    "more than 64 bits": 2**64,
    "a key of type float": {0.5: 1},
    "a key of type tuple": {(1, 2): 1},
    "bytes without tensors": "x" * archives.PICKLE_LIMIT,
    "its content without tensors": ["x" * 100, *range(archives.PICKLE_LIMIT // 2)],
}


@pytest.mark.parametrize("message", BOMBS)
def test_pickles_that_torch_load_would_make_more_of(message):
    file = saved({"network": BOMBS[message]})
    with pytest.raises(ValueError, match=r"^its content|^its pickle|^it holds|^archive/data") as caught:
        check(file)
    if "without tensors" not in message:
        assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_plain_states_are_accepted():
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    state = {
        "network": network.state_dict(),
        "copied": OrderedDict(a=torch.zeros(0, 3), b=torch.zeros(())),
        "types": [torch.ones(2, dtype=dtype) for dtype in archives.STORAGES.values()],
        "random": (3, (2**32 - 1, 2**64 - 1), None, True, -1.5, "text"),
        1: {},
    }
    check(saved(state))


def resaved(state, change) -> io.BytesIO:
    """A saved archive whose members, by name, went through ``change``."""
    with zipfile.ZipFile(saved(state)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    return zipped(members.items())


def test_a_storage_is_as_long_as_its_member():
    """torch.load takes the length from the pickle: it would read what lies behind in memory."""

    def shorter(members):
        members["archive/data/0"] = members["archive/data/0"][:-4]

    check(resaved(torch.ones(1000), lambda members: None))
    for change, message in (
        (shorter, "3996 bytes for 1000 elements"),
        (lambda members: members.pop("archive/data/0"), "0 bytes for 1000 elements"),
        (lambda members: members.update({"archive/data/7": b"more"}), "data/7 belongs to no tensor"),
        (lambda members: members.update({"other/data/0": b"more"}), "not an archive of torch.save"),
        (lambda members: members.pop("archive/data.pkl"), "not an archive of torch.save"),
    ):
        with pytest.raises(ValueError, match=message):
            check(resaved(torch.ones(1000), change))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02cos\nsystem\nX\x02\0\0\0lsq\0\x85R.", "it holds os.system"),
        (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.", "opcode FRAME|not a pickle"),
        (b"\x80\x05\x96\0\0\0\0\1\0\0\0.", "bytearray|opcode BYTEARRAY8"),  # a bytearray of 4 GB
        (b"\x80\x02]r\xff\xff\xff\x7f.", "remembers 2147483647 values"),  # a table of 16 GB
        (b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\0\0\0itemsK\x01sb.", "attributes of a dictionary"),
        (b"\x80\x02(K\x01K\x02tQ.", "refers to something that is not a storage"),
        (b"\x80\x02K\x01K\x02\x86R.", "not a pickle of plain data"),
        (b"\x80\x02]", "exhausted"),
        (b"", "exhausted"),
        (pickle.dumps([1], protocol=0), "opcode"),
    ],
)
def test_pickles_by_hand(content, message):
    with pytest.raises(ValueError, match=message):
        check(resaved(0, lambda members: members.update({"archive/data.pkl": content})))


def test_storage_checks_before_torch_loads(tmp_path, monkeypatch):
    """In a quick look as well as in a whole reading."""
    monkeypatch.setattr(torch, "load", lambda *args, **settings: pytest.fail("it was loaded"))
    path = tmp_path / "checkpoint.pt"
    for bomb in (Calls(bytearray, 10**12), torch.ones(1).expand(2, 3), torch.ones(2, device="meta")):
        storage.write(path, {"weights": bomb})
        for verify in (True, False):
            with pytest.raises(storage.DamagedError, match="is not accepted"):
                storage.read(path, verify)
