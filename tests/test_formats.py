"""The formats of exports: their layouts, and what is not one is refused in one line, and never run."""

import hashlib
import io
import json
import math
import os
import pickle
import re
import sys
import tracemalloc
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from export_helpers import (
    OLD_EXPORTS,
    assert_same_counts,
    cifar10,
    forms,
    images_for,
    mnist,
    old_network,
    packed_forms,
    snapshot_of,
    write_run,
)

import measuring
from analysis import formats
from analysis.export import export, load_pruned, load_snapshot
from analysis.formats import description, hdf5, layouts, packed
from analysis.snapshot import Unreadable
from c10.model import Cifar10Net
from spiking import lif
from training.errors import Refusal
from training.files import checks, storage

ROOT = Path(__file__).resolve().parent.parent
SPARSITIES = (0.0, 0.5, 0.9, 0.995, 1.0)

# -- layouts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [*SPARSITIES, 0.9999])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (40, 100), (8, 4, 3, 3), (2, 5000)])
@pytest.mark.parametrize("layout", ["dense", "bitmap", "csr"])
def test_layouts_keep_every_bit(layout, shape, sparsity):
    rng = np.random.default_rng(0)
    weight = (rng.normal(size=shape) * (rng.random(shape) >= sparsity)).astype(np.float32)
    weight.flat[-1] = 1e-38 if sparsity < 1 else 0  # as connected as any other
    packed, parts = layouts.pack(layout, weight), layouts.parts(layout, shape)
    assert packed.keys() == parts.keys()
    for name, part in parts.items():
        assert part.check(name, packed[name]) is packed[name]
        assert packed[name].nbytes <= part.nbytes
    found = layouts.unpack(layout, packed, shape)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, weight)
    if layout == "bitmap":
        assert sum(array.nbytes for array in packed.values()) == 4 * np.count_nonzero(weight) + -(-weight.size // 8)


@pytest.mark.parametrize(
    ("values", "fits"),
    [([0.5, -0.25, 65504], True), ([2**-24, 0], True), ([0.1], False), ([65536], False), ([2**-26], False)],
)
def test_half_precision_is_used_where_it_holds_every_value(values, fits, tmp_path):
    weight = np.array([values], np.float32)
    assert layouts.fits_half(weight) == fits
    assert (packed._smaller(weight) == "half") == fits
    if fits:
        found = layouts.unpack("half", layouts.pack("half", weight), weight.shape)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, weight)


def test_a_network_of_half_precision_is_kept_in_half_the_bytes(tmp_path):
    pytest.importorskip("safetensors")
    network = mnist(0.0, 0.0)
    for weight in measuring.prunable(network).values():
        weight.data = weight.data.half().float()
    export(snapshot_of(network), "safetensors", tmp_path / "file")
    assert (tmp_path / "file").stat().st_size < 2 * 635_200 + 4096
    assert_same_counts(network, load_pruned(tmp_path / "file"))


def test_the_layout_gaps_by_hand():
    gaps = np.array([0, 0, 3, 254, 255, 0, 255, 27], np.uint8)
    values = np.array([1, 2, 3, 4, 5, 6], np.float32)
    weight = layouts.unpack("gaps", {".gaps": gaps, ".values": values}, (2, 400)).ravel()
    expected = [0, 1, 5, 5 + 255, 5 + 255 + 256, 799]  # gaps of 0, 0, 3, 254, 255, 282
    assert np.flatnonzero(weight).tolist() == expected
    assert weight[expected].tolist() == values.tolist()
    with pytest.raises(ValueError, match="a connection at 799 of 799 weights"):
        layouts.unpack("gaps", {".gaps": gaps, ".values": values}, (1, 799))


def test_npz_as_it_is_documented(tmp_path):
    network = mnist()
    export(snapshot_of(network), "npz", tmp_path / "file.npz")
    file = np.load(tmp_path / "file.npz", allow_pickle=False)
    layers = json.loads(str(file["network"]))["layers"]
    for name, weight in measuring.prunable(network).items():
        assert layers[name] == {"shape": list(weight.shape), "layout": "bitmap"}
        found = np.zeros(layers[name]["shape"], "float32")
        connected = np.unpackbits(file[f"{name}.bitmap"], count=found.size)
        found[connected.reshape(found.shape) == 1] = file[f"{name}.values"]
        np.testing.assert_array_equal(found, weight.detach())


@pytest.mark.parametrize("form", ["npz", "csr"])
def test_some_formats_need_no_package(form, tmp_path, monkeypatch):
    for package in ("safetensors", "nir", "nirtorch", "h5py", "scipy", "scipy.sparse"):
        monkeypatch.setitem(sys.modules, package, None)
    export(snapshot_of(mnist()), form, tmp_path / "file")
    assert_same_counts(mnist(), load_pruned(tmp_path / "file"))


def test_safetensors_has_the_smaller_layout_for_each_layer(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    sizes = []
    for sparsity, layout in ((0.0, "dense"), (0.5, "bitmap"), (0.95, "bitmap")):
        export(snapshot_of(mnist(sparsity, 0.0)), "safetensors", tmp_path / "file")
        with safetensors.safe_open(tmp_path / "file", framework="numpy") as file:
            layers = json.loads(file.metadata()["network"])["layers"]
        assert layers["static_fc.1.weight"] == {"shape": [800, 784], "layout": layout}
        sizes.append((tmp_path / "file").stat().st_size)
    assert sizes[0] < 4 * 635_200 + 4096
    assert sizes[1] < 0.55 * sizes[0]
    assert sizes[2] < 0.1 * sizes[0]


@pytest.mark.parametrize("connectivity", [0.17, 0.05, 0.02, 0.01])
def test_npz_is_the_smallest(connectivity):
    """Even of weights and connections drawn at random, which compress least."""
    pytest.importorskip("safetensors")
    snapshot = snapshot_of(mnist(1 - connectivity, 1 - connectivity))
    sizes = {form: len(formats.WRITERS[form](snapshot)) for form in ("npz", "safetensors", "csr")}
    assert min(sizes, key=sizes.get) == "npz"
    entropy = -sum(p * math.log2(p) for p in (connectivity, 1 - connectivity)) / 8  # bytes per weight
    assert sizes["npz"] < 635_200 * (4 * connectivity + 1.6 * entropy) + 4096


# -- what is refused -------------------------------------------------------------------------------


class Trap:
    """What a pickle does when it is loaded: it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def refused(path: Path) -> str:
    with pytest.raises(Unreadable) as caught:
        load_pruned(path)
    assert isinstance(caught.value, ValueError)
    (line,) = str(caught.value).splitlines()
    assert str(path) in line
    return line


def test_no_pickle_runs(tmp_path):
    trap = tmp_path / "trap"
    files = {name: tmp_path / name for name in ("plain", "torch", "array", "member")}
    files["plain"].write_bytes(pickle.dumps(Trap(trap)))
    storage.write(files["torch"], {"arguments": Trap(trap)})
    with open(files["array"], "wb") as file:
        np.savez(file, network=np.array([Trap(trap)], dtype=object))
    with open(files["member"], "wb") as file:
        snapshot = snapshot_of(mnist())
        text = description.describe(snapshot, {})
        np.savez(file, network=np.array(text), **{"static_fc.1.weight/data": np.array([Trap(trap)], dtype=object)})
    for path in files.values():
        refused(path)
        assert not trap.exists(), path
    pickle.loads(files["plain"].read_bytes())
    assert trap.exists()  # the trap works


@forms
def test_damaged_files(form, tmp_path):
    export(snapshot_of(mnist()), form, tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    for size in (0, 3, 8, 9, 100, len(content) // 2, len(content) - 1):
        path = tmp_path / f"{size}"
        path.write_bytes(content[:size])
        refused(path)


def test_damaged_checkpoints(tmp_path):
    models = write_run(tmp_path, mnist())
    content = (models / "checkpoint.pt").read_bytes()
    for size in (0, 100, len(content) // 2, len(content) - 1):
        (models / "checkpoint.pt").write_bytes(content[:size])
        with pytest.raises(Unreadable, match=r"checkpoint\.pt is damaged"):
            load_pruned(models)


def test_foreign_files(tmp_path):
    path = tmp_path / "file"
    for content in (b"hello, world", b"\x89PNG\r\n\x1a\n" + bytes(100), b"PK\x03\x04" + bytes(100), bytes(1000)):
        path.write_bytes(content)
        refused(path)
    with open(path, "wb") as file:
        np.savez(file, a=np.zeros(3))
    refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("network.npy", "no array")
    refused(path)
    storage.write(path, {"weight": torch.zeros(3)})
    assert "arguments" in refused(path)
    storage.write(path, torch.zeros(3))
    refused(path)
    torch.save({"weight": torch.zeros(3)}, path)
    assert "its end is missing or foreign" in refused(path)
    with pytest.raises(FileNotFoundError):
        load_pruned(tmp_path / "nothing")
    assert "has no checkpoint.pt" in refused(tmp_path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            json.dumps({f"{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(20_000)}),
            "1048576",
        ),
        ('{"a": 1, "a": 1}', "two members of one name"),
        ('{"__metadata__": {"network": "{}", "more": ""}}', "metadata are not network and sha256"),
        ('{"a": NaN}', "the number NaN"),
        ('{"a": ' + "[" * 100_000, "recursion"),
    ],
    ids=["many names", "twice", "metadata", "NaN", "nested"],
)
def test_headers_of_safetensors_that_do_not_fit(header, message, tmp_path):
    pytest.importorskip("safetensors")
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header.encode())
    assert message in refused(tmp_path / "file")


def test_a_foreign_safetensors_file(tmp_path):
    save = pytest.importorskip("safetensors.numpy").save
    path = tmp_path / "file"
    path.write_bytes(save({"a": np.zeros(3)}))
    assert "network" in refused(path)


CHANGES = {
    "another program's": lambda d: d.update(format="another"),
    "a later version": lambda d: d.update(version=5),
    "a later version in text": lambda d: d.update(version="5"),
    "version 3 with what is new in 4": lambda d: d.update(version=3),
    "version 2 with a width": lambda d: [d.update(version=2), d.pop("position"), d.pop("data")],
    "no position": lambda d: d.pop("position"),
    "no data": lambda d: d.pop("data"),
    "a negative position": lambda d: d.update(position=-1),
    "data of two lines": lambda d: d.update(data="a\nb"),
    "no width": lambda d: d.pop("width"),
    "another width": lambda d: d.update(width=801),
    "a width of 0": lambda d: d.update(width=0),
    "a float for the width": lambda d: d.update(width=800.0),
    "text for the width": lambda d: d.update(width="800"),
    "a huge width": lambda d: d.update(width=10**9),
    "a version with a digest said to have none": lambda d: d.update(version=1),
    "an unknown experiment": lambda d: d.update(experiment="imagenet"),
    "an unhashable experiment": lambda d: d.update(experiment=["mnist"]),
    "another experiment": lambda d: d.update(experiment="c10"),
    "another data set": lambda d: d.update(dataset="cifar10"),
    "no time": lambda d: d.update(T=0),
    "text for T": lambda d: d.update(T="8"),
    "a float for T": lambda d: d.update(T=8.0),
    "true for T": lambda d: d.update(T=True),
    "a huge T": lambda d: d.update(T=10**9),
    "a negative epoch": lambda d: d.update(epoch=-1),
    "a run of two lines": lambda d: d.update(run="a\nb"),
    "other neurons": lambda d: d["neuron"].update(tau=3.0),
    "a flag for a number": lambda d: d["neuron"].update(v_threshold=True),
    "more of the neurons": lambda d: d["neuron"].update(bias=1.0),
    "no neurons": lambda d: d.pop("neuron"),
    "another normalisation": lambda d: d["normalisation"].update(mean=[0.5]),
    "no normalisation": lambda d: d.pop("normalisation"),
    "other layers": lambda d: d["layers"].update(extra={"shape": [1]}),
    "an extra key": lambda d: d.update(extra=1),
    "a list": lambda d: d.clear(),
}
NOT_FITTING = ("other neurons", "other layers", "a huge T", "another width")  # in every format


@pytest.mark.parametrize(
    ("form", "change"),
    [("safetensors", change) for change in CHANGES]
    + [(form, change) for form in ("npz", "csr", "nir") for change in NOT_FITTING],
    indirect=["form"],
)
def test_descriptions_that_do_not_fit(form, change, tmp_path, monkeypatch):
    describe = description.describe

    def changed(snapshot, layers):
        description = json.loads(describe(snapshot, layers))
        CHANGES[change](description)
        return json.dumps(description)

    monkeypatch.setattr(description, "describe", changed)
    (tmp_path / "file").write_bytes(formats.WRITERS[form](snapshot_of(mnist())))
    refused(tmp_path / "file")


@pytest.mark.parametrize("twice", ['"T": 8, "T"', '"version": 4, "version"', '"layers": {}, "layers"'])
@packed_forms
def test_descriptions_that_say_one_thing_twice(form, twice, tmp_path, monkeypatch):
    key = twice.split('"')[1]
    describe = description.describe
    monkeypatch.setattr(description, "describe", lambda *args: describe(*args).replace(f'"{key}"', twice, 1))
    (tmp_path / "file").write_bytes(formats.WRITERS[form](snapshot_of(mnist())))
    assert "two members of one name" in refused(tmp_path / "file")


@forms
def test_an_export_of_a_newer_program_is_not_damaged(form, tmp_path, monkeypatch):
    monkeypatch.setattr(description, "VERSION", 5)
    (tmp_path / "file").write_bytes(formats.WRITERS[form](snapshot_of(mnist())))
    monkeypatch.setattr(description, "VERSION", 4)
    line = refused(tmp_path / "file")
    assert line == f"{tmp_path / 'file'} is an export of version 5, from a newer program: this one reads up to 4"


@forms
def test_an_export_says_after_which_step_and_on_which_data(form, tmp_path):
    snapshot = replace(snapshot_of(mnist()), position=17, data="40+20 images, crc32 01234567")
    export(snapshot, form, tmp_path / "file")
    found = load_snapshot(tmp_path / "file")
    assert replace(found, state=snapshot.state) == snapshot


def test_the_members_of_an_archive_may_be_in_any_order(tmp_path):
    export(snapshot_of(mnist()), "npz", tmp_path / "file.npz")
    with np.load(tmp_path / "file.npz") as file:
        arrays = dict(reversed(dict(file).items()))
    np.savez(tmp_path / "other.npz", **arrays)
    assert next(iter(arrays)) != "network"
    assert_same_counts(mnist(), load_pruned(tmp_path / "other.npz"))


def arrays_in(form: str, network) -> tuple[str, dict[str, np.ndarray]]:
    """The description and the arrays of an export as npz or csr."""
    with np.load(io.BytesIO(formats.WRITERS[form](snapshot_of(network)))) as file:
        arrays = dict(file)
    del arrays["sha256"]
    return str(arrays.pop("network")), arrays


def write_arrays(path: Path, text: str, arrays: dict[str, np.ndarray]) -> Path:
    """A file with a digest that fits."""
    with open(path, "wb") as file:
        np.savez(file, network=np.array(text), sha256=np.array(description.digest(text, arrays)), **arrays)
    return path


def changed_file(path: Path, form: str, **changes) -> Path:
    """A file whose arrays of the last layer are changed; the digest fits."""
    text, arrays = arrays_in(form, mnist())
    for key, change in changes.items():
        name = f"fc.1.weight{'/' if form == 'csr' else '.'}{key}"
        array = change(arrays.pop(name, None))
        if array is not None:
            arrays[name] = array
    return write_arrays(path, text, arrays)


def put(array, index, value):
    array = array.copy()
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(indices=lambda a: a + 800), "outside its 800 columns"),
        (dict(indices=lambda a: a - 800), "outside its 800 columns"),
        (dict(indices=lambda a: a.astype(np.float32)), "float32"),
        (dict(indices=lambda a: a[:-1]), "inconsistent"),
        (dict(indices=lambda a: put(a, 1, a[0])), "repeated index"),
        (dict(indices=lambda a: put(a, slice(0, 2), a[1::-1])), "out of order"),
        (dict(indptr=lambda a: a[::-1].copy()), "inconsistent"),
        (dict(indptr=lambda a: a[:-1]), r"indptr is int32 \[10\], not int32 \[11\]"),
        (dict(indptr=lambda a: a + 1), "inconsistent"),
        (dict(indptr=lambda a: a.reshape(1, -1)), r"indptr is int32 \[1, 11\]"),
        # differences of int32 wrap: 2^31 - 1 and then -2^31 + 1 look like an increase
        (dict(indptr=lambda a: put(a, slice(1, 3), [2**31 - 1, -(2**31) + 1])), "inconsistent"),
        (dict(data=lambda a: a[:-1]), "inconsistent"),
        (dict(data=lambda a: a.astype(np.float64)), "float64"),
        (dict(data=lambda a: put(a, 7, 0)), "the weight 0"),
        (dict(data=lambda a: put(a, 7, np.nan)), "not finite"),
        (dict(data=lambda a: put(a, 7, -np.inf)), "not finite"),
        (dict(data=lambda a: None), r"lacks fc\.1\.weight/data"),
        (dict(data=lambda a: np.zeros(1 << 20, np.float32)), "more than 32000"),
        (dict(shape=lambda a: a[::-1].copy()), "has the shape"),
        (dict(extra=lambda a: np.zeros(1)), "unknown fc.1.weight/extra"),
    ],
)
def test_csr_arrays_that_do_not_fit(changes, message, tmp_path):
    assert re.search(message, refused(changed_file(tmp_path / "file", "csr", **changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(bitmap=lambda a: a[:-1]), r"bitmap is uint8 \[999\], not uint8 \[1000\]"),
        (dict(bitmap=lambda a: np.append(a, 0).astype(np.uint8)), r"bitmap is uint8 \[1001\]"),
        (dict(bitmap=lambda a: a.astype(np.int8)), " is int8 "),
        (dict(bitmap=lambda a: a.astype(bool)), "bool"),
        (dict(bitmap=lambda a: a.reshape(10, 100)), r"\[10, 100\]"),
        (dict(bitmap=lambda a: ~a), r"fc\.1\.weight has \d+ values other than 0 for \d+ connections"),
        (dict(bitmap=lambda a: put(a, 7, a[7] ^ 1)), "values other than 0 for"),
        (dict(bitmap=lambda a: None), r"lacks fc\.1\.weight\.bitmap"),
        (dict(bitmap=lambda a: np.zeros(1 << 20, np.uint8)), "more than 1000"),
        (dict(values=lambda a: a[:-1]), "values other than 0 for"),
        (dict(values=lambda a: np.append(a, 1).astype(np.float32)), "values other than 0 for"),
        (dict(values=lambda a: put(a, 7, 0)), "values other than 0 for"),
        (dict(values=lambda a: put(a, 7, np.nan)), "not finite"),
        (dict(values=lambda a: a.astype(np.float64)), "float64"),
        (dict(values=lambda a: a.astype(">f4")), ">f4"),
        (dict(values=lambda a: a[None]), "not float32 of up to"),
        (dict(values=lambda a: np.ones(8001, np.float32)), "not float32 of up to"),
        (dict(values=lambda a: np.zeros(1 << 20, np.float32)), "more than 32000"),
        (dict(values=lambda a: None), r"lacks fc\.1\.weight\.values"),
        (dict(gaps=lambda a: np.zeros(1, np.uint8)), r"unknown fc\.1\.weight\.gaps"),
    ],
)
def test_npz_arrays_that_do_not_fit(changes, message, tmp_path):
    assert re.search(message, refused(changed_file(tmp_path / "file", "npz", **changes)))


@pytest.mark.parametrize(("form", "key"), [("npz", "bitmap"), ("csr", "data")])
def test_unchanged_arrays_are_accepted(form, key, tmp_path):
    """The counterpart of the tests above: it is the changes that are refused."""
    path = changed_file(tmp_path / "file", form, **{key: lambda a: a})
    assert_same_counts(mnist(), load_pruned(path))


@pytest.mark.parametrize("layout", ["gaps", "dense", "half", "csr", "zip", None, 7, ["bitmap"], {}])
@pytest.mark.parametrize("form", ["npz", "csr"])
def test_other_layouts_are_refused(form, layout, tmp_path):
    text, arrays = arrays_in(form, mnist())
    there = json.loads(text)
    for layer in there["layers"].values():
        layer["layout"] = layout
    refused(write_arrays(tmp_path / "file", json.dumps(there), arrays))


def changed_members(path: Path, form: str, change) -> Path:
    """A file whose members, (name, bytes), went through ``change``; lengths and CRCs fit."""
    with zipfile.ZipFile(io.BytesIO(formats.WRITERS[form](snapshot_of(mnist())))) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in change(members):
            archive.writestr(name, content)
    return path


LAST = ("fc.1.weight/data.npy", "fc.1.weight.values.npy")  # in csr, in npz


@pytest.mark.parametrize("form", ["npz", "csr"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: [*m, (m[-1][0], m[-1][1])], "two of one name"),
        (lambda m: [*m, (m[-1][0].upper(), m[-1][1])], "two of one name"),
        (lambda m: [*m, ("more", b"")], "unknown more"),
        (lambda m: [*m, ("more.npy", b"")], "unknown more"),
        (lambda m: [*m, *((f"{n}", b"") for n in range(5000))], " members in a directory of "),
        (lambda m: [(n, c + bytes((1 << 20) * (n in LAST))) for n, c in m], "more than 32000"),
        (lambda m: [*m, ("bomb", bytes(1 << 22))], "once expanded, more than"),
        (
            lambda m: [(n, re.sub(rb"'shape': \(\d", b"'shape': (9", c) if n in LAST else c) for n, c in m],
            "bytes for float32 [9",
        ),
        (lambda m: [(n, c.replace(b"'<f4'", b"'|O' ") if n in LAST else c) for n, c in m], "bytes for object"),
        (lambda m: [(n, c.replace(b"False", b"True ") if n in LAST else c) for n, c in m], None),
        (lambda m: m[:1], "without a digest"),
    ],
)
def test_archives_that_do_not_fit(form, change, message, tmp_path, monkeypatch):
    monkeypatch.setattr(description, "SMALL", 1 << 22)
    monkeypatch.setattr(description, "EXPANSION", 1)
    path = changed_members(tmp_path / "file", form, change)
    if message is None:  # an array of one axis is in Fortran's order as well
        assert_same_counts(mnist(), load_pruned(path))
    else:
        assert message in refused(path)


@pytest.mark.parametrize(
    ("sparsity", "change"),
    [
        (0.5, {".bitmap": lambda a: a[:-1]}),
        (0.5, {".bitmap": lambda a: np.full_like(a, 255)}),
        (0.5, {".values": lambda a: a[:-1]}),
        (0.5, {".values": lambda a: a.astype(np.float64)}),
        (0.5, {".values": lambda a: np.where(np.arange(len(a)) == 7, 0, a)}),
        (0.5, {".values": lambda a: np.where(np.arange(len(a)) == 7, np.float32(np.nan), a)}),
        (0.5, {"": lambda a: np.zeros(3, np.float32)}),
        (0.0, {".gaps": lambda a: np.zeros(3, np.uint8)}),
        (0.0, {"": lambda a: np.where(np.arange(784) == 7, np.float32(np.inf), a)}),
        (0.0, {"": lambda a: a[:-1]}),
        (0.0, {"": lambda a: a.astype(np.float16)}),
    ],
)
def test_packed_weights_that_do_not_fit(sparsity, change, tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    pack = layouts.pack

    def changed(layout, weight):
        parts = pack(layout, weight)
        if weight.size > 10_000:
            parts |= {k: np.ascontiguousarray(change[k](parts.get(k))) for k in change}
        return parts

    monkeypatch.setattr(packed, "_smaller", lambda weight: "bitmap" if sparsity else "dense")
    monkeypatch.setattr(layouts, "pack", changed)
    (tmp_path / "file").write_bytes(formats.write_safetensors(snapshot_of(mnist(sparsity))))
    assert "digest" not in refused(tmp_path / "file")


@pytest.mark.parametrize(
    "change",
    [
        {"gaps": lambda a: a[:-1]},
        {"gaps": lambda a: np.full(len(a), 254, np.uint8)},
        {"gaps": lambda a: np.zeros(635_200 + 635_200 // 255 + 1, np.uint8)},
        {"gaps": lambda a: a.astype(np.int16)},
        {"values": lambda a: a[:-1]},
        {"values": lambda a: put(a, 7, 0)},
    ],
)
def test_gaps_that_do_not_fit(change, tmp_path):
    pytest.importorskip("safetensors")
    text, arrays = old_arrays()
    arrays |= {f"static_fc.1.weight.{k}": change[k](arrays[f"static_fc.1.weight.{k}"]) for k in change}
    path = write_old(tmp_path / "file", text, arrays)
    assert "digest" not in refused(path)


@pytest.fixture(scope="module")
def graph() -> bytes:
    """A network as NIR."""
    pytest.importorskip("nir")
    pytest.importorskip("nirtorch")
    return formats.write_nir(snapshot_of(mnist()))


def replaced(file, name, value) -> None:
    del file[name]
    file[name] = value


WEIGHT = "node/nodes/fc_1/weight"
GRAPHS = {
    "fc_0/v_threshold is not": lambda f: f["node/nodes/fc_0/v_threshold"].write_direct(np.full(800, 2.0)),
    "fc_2/tau is not": lambda f: f["node/nodes/fc_2/tau"].write_direct(np.full(10, 4e-4)),
    "fc_2/r is not": lambda f: replaced(f, "node/nodes/fc_2/r", np.ones(10, np.int64)),
    "fc_0/v_leak is not": lambda f: replaced(f, "node/nodes/fc_0/v_leak", np.zeros(799)),
    "fc_0/type is not": lambda f: replaced(f, "node/nodes/fc_0/type", "LI"),
    "flatten/start_dim is not": lambda f: replaced(f, "node/nodes/flatten/start_dim", 1),
    "fc.1.weight is float32 [10, 799]": lambda f: replaced(f, WEIGHT, np.zeros((10, 799), np.float32)),
    "static_fc.1.weight is float64": lambda f: replaced(f, "node/nodes/static_fc_1/weight", np.zeros((800, 784))),
    "does not match its digest": lambda f: replaced(f, WEIGHT, f[WEIGHT][()] * 2),
    "edges is not": lambda f: replaced(f, "node/edges", [*f["node/edges"][()].tolist(), [b"fc_0", b"fc_0"]]),
    "is not a text": lambda f: f.pop("node/metadata"),
    "without a digest": lambda f: f.pop("node/metadata/sha256"),
    "not have exactly one Input": lambda f: f.move("node/nodes/input_1", "node/nodes/flatten/input_1"),
    "unknown node/nodes/fc_0/bias": lambda f: f.create_dataset("node/nodes/fc_0/bias", data=np.zeros(800)),
    "more than 100 names": lambda f: [f.create_group(f"node/nodes/{n}") for n in range(101)],
    "groups deeper than 4": lambda f: f.create_group("node/a/b/c/d/e"),
    "is a link to somewhere else": lambda f: replaced(f, WEIGHT, __import__("h5py").SoftLink("/node/nodes/x")),
    "a is a link": lambda f: (
        replaced(f, WEIGHT, __import__("h5py").ExternalLink("/etc/passwd", "/")) or f.move(WEIGHT, "a")
    ),
    "declares 32000 bytes that are not in the file": lambda f: (
        (f.pop(WEIGHT) and None) or f.create_dataset(WEIGHT, (10, 800), np.float32, chunks=True)
    ),
    "declares 4000000 bytes that are not in the file": lambda f: (
        (f.pop(WEIGHT) and None) or f.create_dataset(WEIGHT, (1000, 1000), np.float32)
    ),
    "has 40000000000 bytes": lambda f: (
        (f.pop(WEIGHT) and None)
        or f.create_dataset(WEIGHT, (10**5, 10**5), np.float32, chunks=True, compression="gzip")
    ),
    "in chunks of 10000000 elements": lambda f: (
        (f.pop(WEIGHT) and None)
        or f.create_dataset(WEIGHT, (10, 800), np.float32, chunks=(10**4, 10**3), maxshape=(None, None))
    ),
    "is of type complex": lambda f: replaced(f, WEIGHT, np.zeros(3, np.complex64)),
    "is not compressed by one of": lambda f: f.create_dataset("a", data=np.zeros(100), compression="lzf"),
}


@pytest.mark.parametrize("message", GRAPHS)
def test_other_nir_graphs(graph, message, tmp_path):
    """A graph that is not this network's is refused, whatever its metadata say, and before anything large is read."""
    import h5py

    path = tmp_path / "file"
    path.write_bytes(graph)
    with h5py.File(path, "r+") as file:
        GRAPHS[message](file)
    assert message in refused(path)


@pytest.mark.parametrize(
    ("does", "message"),
    [
        ("while True: pass", "reading it takes longer than 0.2 s of processor time"),
        ("return {'a': np.ones(1 << 27)}", "Unable to allocate"),
        ("os.abort()", "ended with status -6"),
        ("raise KeyError('a')", "'a'"),
    ],
)
def test_hdf5_in_a_process_of_its_own(does, message, tmp_path, monkeypatch):
    """Whatever the HDF5 library does on a damaged file, here it is a line."""
    pytest.importorskip("h5py")
    if does.startswith(("while", "return")) and not Path("/proc/self/statm").exists():
        pytest.skip("this system bounds neither time nor memory")
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, sys\nimport numpy as np\nsys.path.insert(0, {str(ROOT / 'analysis/formats')!r})\nimport hdf5\n"
        f"def datasets(path):\n    {does}\nhdf5._datasets, hdf5.SECONDS = datasets, 0.2\n"
        "sys.exit(hdf5.main(*sys.argv[1:]))\n"
    )
    monkeypatch.setattr(hdf5, "__file__", str(script))
    monkeypatch.setattr(hdf5, "SECONDS", 0.2)
    with pytest.raises(ValueError, match=re.escape(message)):
        hdf5.read(tmp_path / "file")


# -- networks of another width ---------------------------------------------------------------------


@forms
@pytest.mark.parametrize("width", [1, 5, 1000])
def test_the_width_is_kept(form, width, tmp_path):
    network = mnist(0.5, 0.2, width=width)
    export(snapshot_of(network), form, tmp_path / "file")
    loaded = load_pruned(tmp_path / "file")
    assert loaded.static_fc[1].weight.shape == (width, 784)
    for name, weight in measuring.prunable(network).items():
        assert torch.equal(loaded.get_parameter(name), weight)


def test_the_width_of_a_checkpoint(tmp_path):
    network = mnist(width=5)
    path = write_run(tmp_path, network) / "checkpoint.pt"
    assert torch.equal(load_pruned(path).fc[1].weight, network.fc[1].weight)
    state = torch.load(path, weights_only=True)
    del state["arguments"]["width"]  # as before there was the option: the width is the default
    storage.write(path, state)
    assert "float32 [5, 784], not float32 [800, 784]" in refused(path)
    path = write_run(tmp_path, mnist(), "b-run") / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    del state["arguments"]["width"]
    storage.write(path, state)
    assert_same_counts(mnist(), load_pruned(path))


@packed_forms
@pytest.mark.parametrize(
    ("width", "message"),
    [(checks.WIDTH_LIMIT, "its network of width "), (300, "float32 [8], not float32 [300]"), (8, None)],
)
def test_a_width_takes_no_memory(form, width, message, tmp_path, monkeypatch):
    """Before the arrays are found to be as large; the layers agree with the width."""
    path, network, describe = tmp_path / "file", cifar10(width=8), description.describe
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in measuring.prunable(Cifar10Net(width=width)).items()}

    def wider(snapshot, layers):
        text = json.loads(describe(snapshot, layers)) | {"width": width}
        for name, shape in shapes.items():
            text["layers"][name]["shape"] = list(shape)
        return json.dumps(text)

    monkeypatch.setattr(description, "describe", wider)
    path.write_bytes(formats.WRITERS[form](snapshot_of(network)))
    if message is None:  # the counterpart: it is the width that is refused
        assert_same_counts(network, load_pruned(path))
        return
    tracemalloc.start()
    try:
        assert message in refused(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_large_network_has_a_large_file(tmp_path, monkeypatch):
    """What a file may hold grows with its size."""
    path = tmp_path / "file"
    export(snapshot_of(mnist()), "npz", path)
    monkeypatch.setattr(description, "SMALL", 0)
    monkeypatch.setattr(description, "EXPANSION", -(-4 * 635_200 // path.stat().st_size))
    assert_same_counts(mnist(), load_pruned(path))
    monkeypatch.setattr(description, "EXPANSION", 4 * 635_200 // path.stat().st_size)
    assert "its network of width 800 has 2540800 bytes" in refused(path)


def test_nir_takes_networks_of_bounded_size(tmp_path, monkeypatch):
    pytest.importorskip("nir")
    pytest.importorskip("nirtorch")
    monkeypatch.setattr(hdf5, "BYTES", 2 * 794 * 4 * 5)
    assert formats.write_nir(snapshot_of(mnist(width=5)))
    with pytest.raises(Refusal, match=r"takes at most 15,880 bytes of weights, not 19,056; use npz"):
        export(snapshot_of(mnist(width=6)), "nir", tmp_path / "file")


# -- exports of earlier versions -------------------------------------------------------------------


@pytest.mark.parametrize("form", OLD_EXPORTS)
def test_exports_of_versions_2_and_3_are_read(form):
    pytest.importorskip("safetensors")
    with warnings.catch_warnings(action="error"):
        network = load_pruned(OLD_EXPORTS[form])
        snapshot = load_snapshot(OLD_EXPORTS[form])
    assert (snapshot.epoch, snapshot.position, snapshot.data) == (3, 0, "")
    for name, weight in measuring.prunable(old_network()).items():
        assert torch.equal(network.get_parameter(name), weight)
    assert_same_counts(old_network(), network)


def old_arrays() -> tuple[str, dict[str, np.ndarray]]:
    """The description and the arrays of the old safetensors file."""
    from safetensors import safe_open

    with safe_open(OLD_EXPORTS["safetensors"], framework="numpy") as file:
        return file.metadata()["network"], {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def write_old(path: Path, text: str, arrays: dict[str, np.ndarray]) -> Path:
    from safetensors.numpy import save_file

    save_file(arrays, path, {"network": text, "sha256": description.digest(text, arrays)})
    return path


def test_the_old_safetensors_file_has_both_old_layouts():
    """The layout gaps is read as it is documented, and as the tests of changed arrays assume."""
    pytest.importorskip("safetensors")
    text, arrays = old_arrays()
    layers = json.loads(text)["layers"]
    assert [layer["layout"] for layer in layers.values()] == ["gaps", "bitmap"]
    g = arrays["static_fc.1.weight.gaps"].astype(int)
    positions = (np.cumsum(g + (g < 255)) - 1)[g < 255]
    weight = np.zeros(800 * 784, np.float32)
    weight[positions] = arrays["static_fc.1.weight.values"]
    np.testing.assert_array_equal(weight, old_network().static_fc[1].weight.detach().ravel())


def version_1(form: str, path: Path, change=lambda arrays: None) -> Path:
    """A file as version 1 wrote it: as version 2, without a digest."""
    if form == "csr":
        with np.load(OLD_EXPORTS["csr"]) as file:
            arrays = dict(file)
        text = str(arrays.pop("network"))
        del arrays["sha256"]
        change(arrays)
        with open(path, "wb") as file:
            np.savez_compressed(file, network=np.array(text.replace('"version": 2', '"version": 1')), **arrays)
    elif form == "safetensors":
        from safetensors.numpy import save_file

        text, arrays = old_arrays()
        change(arrays)
        save_file(arrays, path, {"network": text.replace('"version": 2', '"version": 1')})
    else:
        import h5py

        path.write_bytes(formats.write_nir(snapshot_of(old_network())))
        with h5py.File(path, "r+") as file:
            del file["node/metadata/sha256"]
            text = json.loads(file["node/metadata/network"][()]) | {"version": 1}
            for key in ("width", "position", "data"):
                del text[key]
            replaced(file, "node/metadata/network", json.dumps(text))
    return path


old_forms = pytest.mark.parametrize("form", ["safetensors", "csr", "nir"], indirect=True)


@old_forms
def test_exports_of_version_1_are_read_with_a_warning(form, tmp_path):
    with pytest.warns(UserWarning, match="file is an export of version 1, which has no digest"):
        network = load_pruned(version_1(form, tmp_path / "file"))
    assert_same_counts(old_network(), network)


@pytest.mark.filterwarnings("ignore:.*version 1")
@pytest.mark.parametrize("form", ["safetensors", "csr"], indirect=True)
def test_what_can_be_checked_in_version_1_is(form, tmp_path):
    key = {"safetensors": "fc.1.weight.values", "csr": "fc.1.weight/data"}[form]
    for value, message in ((np.nan, "not finite"), (0, "0")):
        path = version_1(form, tmp_path / "file", lambda a, value=value: a.update({key: put(a[key], 7, value)}))
        assert message in refused(path)


@packed_forms
def test_a_changed_weight_does_not_match_the_digest(form, tmp_path):
    """Also where all lengths and CRCs fit."""
    path = tmp_path / "file"
    if form == "safetensors":
        content = bytearray(formats.write_safetensors(snapshot_of(mnist())))
        content[-7] ^= 1
        path.write_bytes(content)
    else:
        text, arrays = arrays_in(form, mnist())
        sha256 = description.digest(text, arrays)
        key = f"fc.1.weight{'/data' if form == 'csr' else '.values'}"
        arrays[key] = put(arrays[key], 7, 0.5)
        with open(path, "wb") as file:
            np.savez(file, network=np.array(text), sha256=np.array(sha256), **arrays)
    assert "does not match its digest" in refused(path)


@packed_forms
def test_a_changed_setting_does_not_match_the_digest(form, tmp_path):
    """T, the epoch and the run's name fit by themselves."""
    path = tmp_path / "file"
    whole = formats.WRITERS[form](snapshot_of(mnist()))
    for old, new in (('"T": 8', '"T": 7'), ('"epoch": 3', '"epoch": 4'), ('"run": "a-run"', '"run": "b-run"')):
        if form == "safetensors":
            old, new = (json.dumps(text)[1:-1] for text in (old, new))
            content = whole.replace(old.encode(), new.encode())
            assert content != whole
            path.write_bytes(content)
        else:
            text, arrays = arrays_in(form, mnist())
            assert old in text
            with open(path, "wb") as file:
                sha256 = np.array(description.digest(text, arrays))
                np.savez(file, network=np.array(text.replace(old, new)), sha256=sha256, **arrays)
        assert "does not match its digest" in refused(path)


def test_the_digest_as_it_is_documented():
    arrays = {"b": np.array([[1.0, 2.0]], np.float32), "a": np.array([7], np.int32)}
    content = b'{"T": 8}\na int32 [1]\n' + b"\7\0\0\0" + b"\nb float32 [1, 2]\n" + b"\0\0\x80?\0\0\0@"
    assert description.digest('{"T": 8}', arrays) == hashlib.sha256(content).hexdigest()
    fortran = {**arrays, "b": np.asfortranarray(arrays["b"])}
    assert description.digest('{"T": 8}', fortran) == hashlib.sha256(content).hexdigest()


# -- other networks --------------------------------------------------------------------------------


def with_neurons(monkeypatch, *settings) -> None:
    """MnistNet with other settings in its neurons, as if its file were edited."""
    made = iter(settings * 1000)

    def node():
        node = lif()
        for key, value in next(made).items():
            setattr(node, key, value)
        return node

    monkeypatch.setattr("mnist.model.lif", node)


@forms
@pytest.mark.parametrize(
    "settings", [{"tau": 4.0}, {"v_threshold": 0.5}, {"v_reset": -0.25}, {"tau": 3.0, "decay_input": False}]
)
def test_the_description_is_of_the_neurons_that_run(form, settings, tmp_path, monkeypatch):
    """And a program with other neurons does not load it."""
    path = tmp_path / "file"
    with monkeypatch.context() as patched:
        with_neurons(patched, settings)
        network = mnist()
        export(snapshot_of(network), form, path)
        assert_same_counts(network, load_pruned(path))
    assert "its neuron is" in refused(path)
    with torch.no_grad():
        assert not torch.equal(network(images_for(network)), mnist()(images_for(network)))


@pytest.mark.parametrize("settings", [[{"tau": 4.0}, {}], [{}, {"v_threshold": 0.5}], [{"v_reset": None}]])
def test_neurons_that_no_description_fits(settings, tmp_path, monkeypatch):
    with_neurons(monkeypatch, *settings)
    with pytest.raises(Refusal, match="mnist has neurons"):
        export(snapshot_of(mnist()), "csr", tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


@forms
def test_a_bias_is_kept_or_refused(form, tmp_path, monkeypatch):
    from spikingjelly.activation_based import layer

    linear = layer.Linear
    monkeypatch.setattr("mnist.model.layer.Linear", lambda *args, bias: linear(*args, bias=True))
    network = mnist()
    if form in ("npz", "safetensors"):
        export(snapshot_of(network), form, tmp_path / "file")
        assert torch.equal(load_pruned(tmp_path / "file").fc[1].bias, network.fc[1].bias)
    else:
        with pytest.raises(Refusal, match=rf"{form} has no place for fc\.1\.bias; npz has"):
            export(snapshot_of(network), form, tmp_path / "file")


# -- checkpoints -----------------------------------------------------------------------------------


def weight(state, change) -> None:
    state["network"]["fc.1.weight"] = change(state["network"]["fc.1.weight"])


CHECKPOINTS = {
    "lacks fc.1.weight": lambda s: s["network"].pop("fc.1.weight"),
    "unknown extra": lambda s: s["network"].update(extra=torch.zeros(1)),
    "float32 [10, 801], not float32 [10, 800]": lambda s: weight(s, lambda w: torch.zeros(10, 801)),
    "float64 [10, 800], not float32": lambda s: weight(s, lambda w: w.double()),
    "of type str, not a tensor": lambda s: weight(s, lambda w: "text"),
    "fc.1.weight has values that are not finite": lambda s: weight(s, lambda w: w / 0),
    "strides (0, 0)": lambda s: weight(s, lambda w: torch.ones(1).expand(10, 800)),
    "strides (1, 10)": lambda s: weight(s, lambda w: w.t().contiguous().t()),
    "_rebuild_sparse_tensor": lambda s: weight(s, lambda w: w.to_sparse()),
    "_rebuild_meta_tensor_no_storage": lambda s: weight(s, lambda w: w.to("meta")),
    "one tensor in two places": lambda s: s.update(again=s["network"]["fc.1.weight"]),
    "the network lacks conv.1.weight": lambda s: s["arguments"].update(experiment="c10", dataset="cifar10"),
    "experiment is 'nothing'": lambda s: s["arguments"].update(experiment="nothing"),
    "dataset is '7'": lambda s: s["arguments"].update(dataset=7),
    "T is True": lambda s: s["arguments"].update(T=True),
    "T is 8.0": lambda s: s["arguments"].update(T=8.0),
    "T is '8'": lambda s: s["arguments"].update(T="8"),
    "T is 1000000000": lambda s: s["arguments"].update(T=10**9),
    "T is None": lambda s: s["arguments"].pop("T"),
    "epoch is -1": lambda s: s.update(epoch=-1),
    "epoch is 3.0": lambda s: s.update(epoch=3.0),
    "no arguments": lambda s: s.pop("arguments"),
    "no network": lambda s: s.update(network=[1]),
}


@pytest.mark.parametrize("message", CHECKPOINTS)
def test_checkpoints_that_do_not_fit(message, tmp_path):
    path = write_run(tmp_path, mnist()) / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    CHECKPOINTS[message](state)
    storage.write(path, state)
    assert message in refused(path)


def test_batch_norms_that_do_not_fit(tmp_path):
    network = cifar10()
    network.conv[2].running_var[3] = -1
    path = write_run(tmp_path, network) / "checkpoint.pt"
    assert "conv.2.running_var has values below 0" in refused(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no pipes")
    os.mkfifo(tmp_path / "pipe")
    assert "is not a file" in refused(tmp_path / "pipe")


def test_nir_has_no_max_pooling(tmp_path):
    with pytest.raises(Refusal, match="max pooling"):
        export(snapshot_of(cifar10()), "nir", tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("form", "module"), [("safetensors", "safetensors.numpy"), ("nir", "nir")])
def test_a_package_that_is_not_there(form, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(Refusal, match=rf"pip install {form}"):
        export(snapshot_of(mnist()), form, tmp_path / "file")
