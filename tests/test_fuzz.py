"""The fuzzer, in short (make fuzz is the long form), and that it notices what it is there for."""

import copy
import mmap
import os
from pathlib import Path

import fuzz
import mutations
import pytest
import torch

from analysis.export import load_pruned
from analysis.snapshot import Unreadable

PACKAGES = {"safetensors": ["safetensors"], "gaps": ["safetensors"], "nir": ["nir", "nirtorch"]}


@pytest.mark.parametrize(("form", "count"), [(form, 6 if form == "nir" else 30) for form in fuzz.FORMS])
def test_damaged_files_are_refused_or_the_same(form, count):
    for package in PACKAGES.get(form, ()):
        pytest.importorskip(package)
    outcome = fuzz.fuzz(form, count)
    assert outcome.failures == []
    assert sum(outcome.counts.values()) == count
    assert outcome.counts["refused"] > count // 2


def test_the_command_takes_all_formats_or_some(monkeypatch, capsys):
    asked = []
    outcome = fuzz.fuzz("checkpoint", 1)
    monkeypatch.setattr(fuzz, "fuzz", lambda form, *settings: asked.append(form) or outcome)
    assert (fuzz.main([]), fuzz.main(["nir", "csr"])) == (0, 0)
    assert asked == [*fuzz.FORMS, "nir", "csr"]
    with pytest.raises(SystemExit, match="2"):
        fuzz.main(["zip"])
    assert "must be one of npz, safetensors, gaps, csr, nir, checkpoint, not 'zip'" in capsys.readouterr().err


def test_mutations_are_the_same_each_time():
    ((_, content), _) = mutations.contents("checkpoint")
    first, again = ([mutations.mutation("checkpoint", n, content) for n in range(6)] for _ in range(2))
    assert first == again
    assert all(changed != content for changed, _ in first)
    assert [change == "signed anew" for _, change in first] == [False, True] * 3


class Loads:
    """Readers that do what none may do."""

    def __init__(self):
        (self.network, _), *_ = mutations.contents("checkpoint")

    def whole(self, path):
        return self.network

    def another(self, path):
        other = copy.deepcopy(self.network)
        with torch.no_grad():
            other.fc[1].weight[3, 7] += 1
        return other

    def not_finite(self, path):
        other = self.another(path)
        with torch.no_grad():
            other.fc[1].weight[3, 7] = torch.nan
        return other

    def another_T(self, path):
        other = copy.deepcopy(self.network)
        other.T += 1
        return other

    def crashes(self, path):
        raise KeyError("fc.1.weight")

    def exits(self, path):
        raise SystemExit(3)

    def two_lines(self, path):
        raise Unreadable(f"{path}\nis damaged")

    def no_name(self, path):
        raise Unreadable("a file is damaged")

    def is_slow(self, path):
        start = sum(os.times()[:4])  # the fuzzer's clock: another one may tick more finely
        while sum(os.times()[:4]) - start < 0.1:
            pass
        raise Unreadable(f"{path} is damaged")

    def takes_memory(self, path):
        # 256 MB: a system that is short of memory may take some back meanwhile. Not of the heap, where a run in this
        # process, which keeps what is freed, may have left as much.
        with mmap.mmap(-1, 1 << 28) as memory:
            memory[:: mmap.PAGESIZE] = bytes([1]) * len(range(0, 1 << 28, mmap.PAGESIZE))
        raise Unreadable(f"{path} is damaged")


@pytest.mark.parametrize(
    ("reader", "first", "failure"),
    [
        ("another", 0, "is loaded as another network"),
        ("another_T", 0, "is loaded as another network"),
        ("not_finite", 1, "not sound"),
        ("crashes", 0, "ends in KeyError"),
        ("exits", 0, "ends in SystemExit"),
        ("two_lines", 0, "other than one line"),
        ("no_name", 0, "other than one line"),
        ("is_slow", 0, "takes 0.1 s"),
        ("takes_memory", 0, " MB"),
        ("whole", 0, None),
        ("whole", 1, None),
        ("another", 1, None),  # a sound network, signed anew: anyone can export one
    ],
)
def test_the_fuzzer_notices(reader, first, failure, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 0.09 if reader == "is_slow" else 60)
    monkeypatch.setattr(fuzz, "MEMORY", 40 << 20)
    if reader == "takes_memory" and not fuzz.peak():
        pytest.skip("the system does not tell the peak of a process's memory")
    monkeypatch.setattr(fuzz, "contents", lambda form: mutations.contents(form)[:1])
    outcome = fuzz.fuzz("checkpoint", 1, first, tmp_path / "kept", getattr(Loads(), reader))
    if failure is None:
        assert outcome.failures == []
        assert not (tmp_path / "kept").exists()
    else:
        (line,) = outcome.failures
        assert failure in line
        assert line.startswith(f"checkpoint {first} (")
        content, _ = mutations.mutation("checkpoint", first, mutations.contents("checkpoint")[0][1])
        assert (tmp_path / "kept" / f"checkpoint-{first}").read_bytes() == content


def test_the_table(capsys, monkeypatch):
    assert fuzz.main(["checkpoint", "--mutations", "4"]) == 0
    heading, line = capsys.readouterr().out.splitlines()
    assert heading.split()[:4] == ["format", "mutations", "refused", "the"]
    assert line.split()[:2] == ["checkpoint", "4"]
    monkeypatch.setattr(fuzz, "SECONDS", -1)
    assert fuzz.main(["checkpoint", "--mutations", "1"]) == 1
    assert "checkpoint 0 (" in capsys.readouterr().out


def test_a_whole_file_is_the_same(tmp_path):
    """Otherwise a reader that refuses everything would pass."""
    for form in ("npz", "safetensors", "gaps", "csr", "checkpoint"):
        for package in PACKAGES.get(form, ()):
            pytest.importorskip(package)
        for network, content in mutations.contents(form):
            (tmp_path / "file").write_bytes(content)
            assert fuzz.same(network, load_pruned(Path(tmp_path / "file"))), form
