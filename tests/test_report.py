"""The report of runs: finding and reading them, the table, the pictures, the page."""

import ast
import base64
import errno
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from report_runs import result, write_checkpoint, write_run, write_runs

import measuring
from analysis import pictures, report, runs
from analysis.experiments import EXPERIMENTS
from analysis.pictures import drawing, results, weights
from training.errors import Refusal
from training.files import json_files, storage
from training.methods import METHODS
from training.methods.method import PENALTY, Method

ROOT = Path(__file__).resolve().parent.parent


def small_checkpoint(dump, name, epoch=1):
    """MnistNet's two weights: hidden neuron 0 sees the first pixel, the others nothing; class 9 hears neuron 799."""
    first, second = torch.zeros(800, 784), torch.zeros(10, 800)
    first[0, 0], second[9, 799] = 0.5, -1e-8
    return write_checkpoint(dump, name, {"static_fc.1.weight": first, "fc.1.weight": second}, epoch)


# -- finding -----------------------------------------------------------------------------------------


@pytest.fixture
def dump(tmp_path):
    """A dump folder with runs a (results only), b (results and checkpoint) and c (checkpoint only)."""
    folder = tmp_path / "dump"
    write_run(folder, "a", [result(1)])
    write_run(folder, "b", [result(1), result(2)])
    small_checkpoint(folder, "b", 2)
    small_checkpoint(folder, "c")
    return folder


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ([""], "abc"),
        (["logs"], "abc"),
        (["logs/b"], "b"),
        (["models/b"], "b"),
        (["models/b", "logs/b/", "logs/a"], "ba"),  # each once, in the order given
        (["", "logs/a"], "abc"),
    ],
)
def test_runs_are_found(dump, given, names):
    found = runs.find([str(dump / path) for path in given])
    assert [run.name for run in found] == list(names)
    for run in found:
        assert (run.logs, run.models) == (dump / "logs" / run.name, dump / "models" / run.name)
        assert len(run.epochs) == "cab".index(run.name)


def test_a_relative_path_finds_the_same(dump, monkeypatch):
    monkeypatch.chdir(dump / "logs" / "b")
    (run,) = runs.find(["."])
    assert (run.name, run.models) == ("b", dump / "models" / "b")


def test_the_files_of_a_run_taken_elsewhere_are_found(dump, tmp_path):
    (dump / "logs" / "b").rename(tmp_path / "kept")
    (run,) = runs.find([tmp_path / "kept"])
    assert (run.name, len(run.epochs)) == ("kept", 2)


def test_runs_of_one_name_are_told_apart(dump, tmp_path):
    write_run(tmp_path / "other", "a", [result(1)])
    names = [run.name for run in runs.find([dump, tmp_path / "other"])]
    assert names == [f"{dump}/a", "b", "c", f"{tmp_path}/other/a"]


def test_the_runs_of_all_dump_folders_in_a_folder_are_found(dump, tmp_path):
    """As in the default folder: those of each experiment in a folder of its own, and older ones beside these."""
    write_run(tmp_path, "older", [result(1)])
    write_run(tmp_path / "c10", "a", [result(1)])
    (tmp_path / "other" / "folder").mkdir(parents=True)
    names = [run.name for run in runs.find([tmp_path])]
    assert names == ["older", f"{tmp_path}/c10/a", f"{dump}/a", "b", "c"]
    assert [run.name for run in runs.find([tmp_path / "logs"])] == ["older"]


def test_where_there_is_no_run(tmp_path):
    with pytest.raises(Refusal, match=r"no run in .*: looked for folders logs/<name> and models/<name> in it"):
        runs.find([tmp_path])
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "file").write_text("not a run's folder")
    with pytest.raises(Refusal, match="no run in"):
        runs.find([tmp_path])
    with pytest.raises(Refusal, match=r"nowhere is not a folder"):
        runs.find([tmp_path / "nowhere"])


# -- reading -----------------------------------------------------------------------------------------


def read(tmp_path, content: bytes):
    logs = write_run(tmp_path, "x")
    (logs / "results.jsonl").write_bytes(content)
    return runs.read("x", logs, tmp_path / "models" / "x")


def test_a_last_line_without_newline_is_not_read(tmp_path):
    run = read(tmp_path, b'{"epoch": 1}\n{"epoch": 2}')
    assert ([e["epoch"] for e in run.epochs], run.problems) == ([1], [])
    assert read(tmp_path / "2", b'{"epoch": 1}\n{"epo').epochs == [{"epoch": 1}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"epoch": 2', "damaged, not JSON"),
        (b"\xff\xfe\x00", "damaged, not JSON"),
        (b"[" * 100_000, "damaged, not JSON"),
        (b"[2]", "not a JSON object"),
        (b'{"test_accuracy": 0.5}', "no epoch, a whole number >= 1"),
        (b'{"epoch": true}', "no epoch, a whole number >= 1"),
        (b'{"epoch": 0}', "no epoch, a whole number >= 1"),
        (b'{"epoch": 1}', "epoch 1 was there before"),
    ],
)
def test_a_damaged_line_is_named_and_left_out(tmp_path, line, reason):
    run = read(tmp_path, b'{"epoch": 1}\n\n' + line + b'\n{"epoch": 3}\n')
    assert [e["epoch"] for e in run.epochs] == [1, 3]
    assert run.problems == [f"{run.logs}/results.jsonl, line 3: {reason}; the line is left out"]


def test_a_run_before_its_first_epoch(tmp_path):
    run = read(tmp_path, b"")
    assert (run.epochs, run.last, run.connections, run.problems) == ([], {}, None, [])
    assert math.isnan(run.seconds_per_epoch)
    (run.logs / "results.jsonl").unlink()
    (run.logs / "run.json").unlink()
    run = runs.read("x", run.logs, run.models)
    assert (run.info, run.arguments, run.experiment, run.method, run.problems) == ({}, {}, ("", ""), "", [])


def test_a_damaged_run_json_hides_nothing_else(tmp_path):
    logs = write_run(tmp_path, "x", [result(1)])
    (logs / "run.json").write_text('{"format": 1,')
    run = runs.read("x", logs, tmp_path)
    assert (run.info, len(run.epochs)) == ({}, 1)
    assert run.problems == [f"{logs}/run.json: damaged, not JSON; its arguments are not shown"]


def test_a_file_that_no_run_writes_is_not_read(tmp_path, monkeypatch):
    """Its size, lines, names and kind are looked at before anything is made of it; other files go on."""
    monkeypatch.setattr(runs, "LARGEST_RESULTS", 1 << 20)
    for name, size in (("run.json", json_files.LARGEST + 1), ("results.jsonl", (1 << 20) + 1)):
        logs = write_run(tmp_path / name, "x", [result(1)])
        os.truncate(logs / name, size)
        run = runs.read("x", logs, logs)
        assert (run.info == {}, run.epochs == []) == ((True, False) if name == "run.json" else (False, True))
        (problem,) = run.problems
        assert problem.startswith(f"{logs / name}: {size:,} bytes, more than {size - 1:,}")
    run = read(tmp_path / "lines", b"\n" * (runs.MOST_EPOCHS + 1))
    assert run.problems == [f"{run.logs}/results.jsonl: 131,073 lines, more than 131,072"]
    many = json.dumps({"epoch": 2, "layers": {str(i): {} for i in range(1000)}}).encode()
    run = read(tmp_path / "names", b'{"epoch": 1}\n' + many + b"\n")
    assert run.problems == [f"{run.logs}/results.jsonl, line 2: more than 256 names of layers; the line is left out"]
    monkeypatch.setattr(runs, "LARGEST", 100)
    run = read(tmp_path / "a long line", b'{"epoch": 1, "a": "' + b"x" * 100 + b'"}\n{"epoch": 2}\n')
    assert run.problems[-1] == f"{run.logs}/results.jsonl, line 1: 121 bytes, more than 100; the line is left out"
    monkeypatch.undo()
    line = {"epoch": 1, "a": [[]], "b": {}, "layers": {"c": {"weights": 5, "d": [5], "e": {}}, "f": 1}, "neurons": 1}
    run = read(tmp_path / "what no run writes", json.dumps(line).encode() + b"\n")
    assert run.epochs == [{"epoch": 1, "layers": {"c": {"weights": 5}, "f": {}}, "neurons": 1}]  # the rest is not kept
    lines = [json.dumps({"epoch": i + 1, "layers": {f"{i}-{j}": {} for j in range(100)}}) for i in range(9)]
    run = read(tmp_path / "new names in every line", "\n".join([*lines, ""]).encode())
    assert (len(run.epochs), len(run.names_in("layers")), len(run.problems)) == (2, 200, 7)
    run = read(tmp_path / "damage", b"x\n" * 1000)
    assert len(run.problems) == runs.MOST_PROBLEMS + 1
    assert run.problems[-1] == f"{run.logs}/results.jsonl: 980 more lines are left out"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path):
    logs = write_run(tmp_path, "x")
    for name in ("run.json", "results.jsonl"):
        (logs / name).unlink()
        os.mkfifo(logs / name)
    problems = runs.read("x", logs, logs).problems
    assert problems == [
        f"{logs}/run.json: not a regular file; its arguments are not shown",
        f"{logs}/results.jsonl: not a regular file",
    ]


def test_numbers_are_numbers():
    entry = {"a": {"b": 0.5, "c": "0.5", "d": True, "e": None, "f": float("inf"), "g": 10**400, "h": 3}, "i": [1]}
    assert [json_files.number(entry, "a", key) for key in "bh"] == [0.5, 3.0]
    for keys in (
        ("a", "c"),
        ("a", "d"),
        ("a", "e"),
        ("a", "f"),
        ("a", "g"),
        ("a", "z"),
        ("i", "a"),
        ("z", "z"),
        ("a",),
    ):
        assert math.isnan(json_files.number(entry, *keys)), keys
    assert math.isnan(json_files.number([], "a"))


def test_method_and_experiment(monkeypatch):
    def run(**arguments):
        info = {"experiment": "mnist", "arguments": {"dataset": "digits", **arguments}}
        return runs.SavedRun("x", Path(), Path(), info)

    assert run().experiment == ("mnist", "digits")
    assert run(mode="no_prune").method == "Dense training"
    assert run(mode="grad", soft=False).method == "Grad R"
    assert run(mode="deep", soft=True).method == "Soft Deep R"
    assert run(mode="theirs", soft=True).method == "theirs"

    class Theirs(Method):
        name, label, options = "theirs", "Theirs", {PENALTY: ""}

        def title(self, options):
            return f"Theirs, {options.penalty:g}"

    monkeypatch.setitem(METHODS, "theirs", Theirs())
    assert run(mode="theirs", penalty=0.5).method == "Theirs, 0.5"
    for penalty in ("much", None, [1]):
        assert run(mode="theirs", penalty=penalty).method == "Theirs"


def test_short_names():
    shared = "lr-1e-4-b-128-T-8"
    assert runs.short_names(
        [f"{shared}-no_prune", f"{shared}-penalty-5e-4-s-0.95-grad", f"{shared}-penalty-1e-3-s-0.95-grad"]
    ) == ["no_prune", "penalty-5e-4 s-0.95 grad", "penalty-1e-3 s-0.95 grad"]
    assert runs.short_names(["lr-1e-4-s-0.9-grad", "lr-1e-4-s-0.8-grad"]) == ["s-0.9", "s-0.8"]
    assert runs.short_names(["lr-1e-4-grad", "lr-2.5e-4-grad", "soft-lr-1e-4-grad"]) == [
        "lr-1e-4",
        "lr-2.5e-4",
        "soft lr-1e-4",
    ]
    assert runs.short_names(["b-8-grad", "b-8-grad-seed-7"]) == ["grad", "seed-7"]
    assert runs.short_names(["/one/b-8-grad", "/two/b-8-grad"]) == ["one", "two"]
    for unchanged in (["b-8-grad"], [], ["a", "a-a"], ["---", "b"]):
        assert runs.short_names(unchanged) == unchanged


def test_fan_in_and_fan_out_by_hand():
    weight = torch.tensor(
        [[0.0, 1.0, -2.0, 0.0], [0.0, 0.0, 0.0, -0.0], [1e-8, 3.0, 1.0, 0.0]]
    )  # [3 outputs, 4 inputs]
    mask = measuring.connected(weight)
    assert weights.fan_in(mask).tolist() == [2, 0, 3]
    assert weights.fan_out(mask).tolist() == [1, 2, 2, 0]
    kernels = torch.zeros(2, 3, 2, 2, dtype=torch.bool)  # [out, in, kH, kW]
    kernels[0, 0] = True
    kernels[1, 0, 0, 1] = kernels[1, 2, 1, 1] = True
    assert weights.fan_in(kernels).tolist() == [4, 2]
    assert weights.fan_out(kernels).tolist() == [5, 0, 1]


def test_weights_of_a_checkpoint(dump):
    a, b, _ = runs.find([dump])
    assert runs.weights_of(a) == ("", {})
    epoch, tensors = runs.weights_of(b)
    assert (epoch, list(tensors)) == ("2", ["static_fc.1.weight", "fc.1.weight"])
    assert [int((w != 0).sum()) for w in tensors.values()] == [1, 1]
    path = b.models / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:2000])
    assert runs.weights_of(b) == ("", {})
    (problem,) = b.problems
    assert problem.startswith(f"{path}: damaged or not a checkpoint of this program (")
    assert "\n" not in problem


def test_the_logs_may_be_epochs_newer_than_the_checkpoint(tmp_path):
    """As those of a run that trains, or was killed: the table shows the logs, the pictures of weights their epoch."""
    write_run(tmp_path, "x", [result(epoch) for epoch in range(1, 8)])
    small_checkpoint(tmp_path, "x", epoch=5)
    (run,) = runs.find([tmp_path])
    assert report.row(run)["epochs"] == "7/512"
    captions = [picture.caption for picture in pictures.of_run(run, *runs.weights_of(run))]
    assert len([caption for caption in captions if "rom the checkpoint of epoch 5." in caption]) == 2
    path = run.models / "checkpoint.pt"
    storage.write(path, storage.read(path) | {"position": 20})
    captions = [picture.caption for picture in pictures.of_run(run, *runs.weights_of(run))]
    assert len([caption for caption in captions if "checkpoint of epoch 5 and 20 steps of the next." in caption]) == 2
    assert run.problems == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"epoch": "2"}, "epoch is '2', not a whole number"),
        ({"arguments": {"experiment": ["mnist"]}}, "unhashable"),
        ({"network": {"static_fc.1.weight": torch.zeros(800, 784)}}, "fc.1.weight"),
        ({"network": {"static_fc.1.weight": torch.zeros(5), "fc.1.weight": torch.zeros(5, 5)}}, "not of a layer"),
        ({"network": {"static_fc.1.weight": torch.zeros(0, 784), "fc.1.weight": torch.zeros(5, 5)}}, "not of a layer"),
        (
            {"network": {"static_fc.1.weight": torch.zeros(5, 5).int(), "fc.1.weight": torch.zeros(5, 5)}},
            "not of a layer",
        ),
        ({"network": {"static_fc.1.weight": torch.zeros(1).expand(10**9, 784)}}, "not accepted"),  # of 4 bytes
    ],
)
def test_a_checkpoint_of_something_else_is_a_problem(tmp_path, change, reason):
    path = small_checkpoint(tmp_path, "x")
    storage.write(path, {**storage.read(path), **change})
    (run,) = runs.find([tmp_path])
    assert runs.weights_of(run) == ("", {})
    (problem,) = run.problems
    assert problem.startswith(f"{path}: damaged or not a checkpoint of this program (")
    assert reason in problem


def test_a_checkpoint_without_batchnorms_weights(tmp_path):
    """Only what can be pruned, by module type: BatchNorm's weight is left out."""
    names = ["static_conv.0", *(f"conv.{i}" for i in (1, 4, 8, 11, 14)), "fc.2", "fc.4"]
    network = {f"{name}.weight": torch.ones(2, 2) for name in names} | {"static_conv.1.weight": torch.ones(2)}
    write_checkpoint(tmp_path, "x", network, 3, "c10")
    (run,) = runs.find([tmp_path])
    assert list(runs.weights_of(run)[1]) == [f"{name}.weight" for name in names]


# -- the table ---------------------------------------------------------------------------------------


def test_the_row_has_the_last_lines_numbers(tmp_path):
    lines = [result(epoch, accuracy=0.5, connectivity=0.5) for epoch in (1, 2)] + [result(7)]
    lines[-1] |= {"test_accuracy": 0.98761, "best_accuracy": 0.99, "connectivity": 0.04321}
    lines[-1]["layers"] = {"u": {"connected": 1200, "weights": 2000}, "v": {"connected": 34, "weights": 500}}
    for line, seconds in zip(lines, ((9.0, 1.0, 1.0), (1.0, 0.5, 0.25), (2.0, 1.0, 0.5)), strict=True):
        line |= dict(zip(("train_seconds", "test_seconds", "checkpoint_seconds"), seconds, strict=True))
    write_run(tmp_path, "x", lines, arguments={"epoch": 30})
    (run,) = runs.find([tmp_path])
    assert report.row(run) == {
        "run": "x",
        "method": "Grad R",
        "epochs": "7/30",
        "test accuracy": "98.76 %",
        "best": "99.00 %",
        "connectivity": "4.32 %",
        "connections": "1,234 of 2,500",
        "s/epoch": "3.5",  # the median of 11, 1.75 and 3.5
        "device": "cpu: 2 cores",
        "commit": "0123456789",
    }


def test_what_is_not_known_is_a_dash(tmp_path):
    write_run(tmp_path, "new")
    (tmp_path / "logs" / "bare").mkdir()
    bare, new = runs.find([tmp_path])
    assert list(report.row(bare).values()) == ["bare", "–", "0/?", "–", "–", "–", "–", "–", "–", "–"]
    assert report.row(new)["epochs"] == "0/512"


# -- the pictures ------------------------------------------------------------------------------------


@pytest.fixture
def style():
    with matplotlib.rc_context(drawing.STYLE):
        yield


@pytest.fixture
def drawn(monkeypatch, style):
    """What the last picture's axes held: of each its title, its labels, and the points of its lines."""
    axes_of_last = []
    picture = drawing.picture

    def capture(title, alt, caption, figure):
        axes_of_last[:] = [
            (
                axes.get_title(loc="left"),
                axes.get_xlabel(),
                axes.get_ylabel(),
                [line.get_xydata() for line in axes.lines],
            )
            for axes in figure.axes
        ]
        return picture(title, alt, caption, figure)

    monkeypatch.setattr(drawing, "picture", capture)
    return axes_of_last


def run_of(lines, experiment="mnist", dataset="mnist"):
    info = {"experiment": experiment, "arguments": {"dataset": dataset}}
    return runs.SavedRun("x", Path(), Path(), info, lines)


def test_curves_are_the_results(drawn):
    lines = [result(epoch, connectivity=0.5 / epoch, accuracy=0.3 * epoch, full=epoch != 2) for epoch in (1, 2, 3)]
    run = run_of(lines)
    compared = results.accuracy([run], ["r"])
    ((_, x, y, (line,)),) = drawn
    assert (x, y) == ("epoch", "test accuracy (%)")
    np.testing.assert_allclose(line, [[1, 30], [2, 60], [3, 90]])
    assert "r 90.00 %" in compared.alt
    results.layers(run)
    ((_, _, y, points),) = drawn
    assert y == "connectivity (%)"
    for line, name in zip(points, ("static_fc.1.weight", "fc.1.weight"), strict=True):
        np.testing.assert_allclose(line[:, 1], [100 * entry["layers"][name]["connectivity"] for entry in lines])
    results.layer_rewiring(run)
    for (title, _, _, points), what in zip(drawn, ("pruned", "regrown"), strict=True):
        assert title == what
        np.testing.assert_array_equal(points[1][:, 1], [entry["layers"]["fc.1.weight"][what] for entry in lines])
    results.neurons(run)
    (_, _, y_rate, rates), (_, _, y_silent, silent) = drawn
    assert (y_rate, y_silent) == ("firing rate (spikes per time step)", "silent neurons (%)")
    recorded = [lines[0], lines[2]]
    np.testing.assert_allclose(rates[1], [[e["epoch"], e["neurons"]["fc.2"]["firing_rate"]] for e in recorded])
    np.testing.assert_allclose(silent[0], [[e["epoch"], 100 * e["neurons"]["fc.0"]["silent"]] for e in recorded])


def test_a_dense_run_has_no_picture_of_rewiring():
    run = run_of([result(1, connectivity=1.0), result(2, connectivity=1.0)])
    titles = [picture.title for picture in pictures.of_run(run, "0", {}) + pictures.overall([run], ["r"])]
    assert "Connectivity per layer" in titles
    assert "Connections pruned and regrown" not in titles


def test_a_run_that_diverged_has_its_pictures(recwarn):
    """NaN weights are connected (they are not 0); numbers that are not finite leave gaps."""
    nan = math.nan
    lines = [result(1, full=True) | {"train_loss": nan, "test_accuracy": nan}, result(2) | {"connectivity": math.inf}]
    for entry in lines[0]["distributions"].values():
        entry["w"]["edges"][0] = nan
        entry["theta"]["counts"] = [0] * 64
    tensors = {"static_fc.1.weight": torch.full((800, 784), nan), "fc.1.weight": torch.zeros(10, 800)}
    made = pictures.of_run(run_of(lines), "2", tensors) + pictures.overall(
        [run_of(lines), run_of(lines[:1])], ["r", "s"]
    )
    assert len(made) == 6 + 4
    assert "mean fan-in 784.0" in made[4].alt
    assert "unknown" in made[-2].alt
    assert not recwarn.list, [str(warning.message) for warning in recwarn]


@pytest.mark.parametrize("number", [10**18, -(10**18), 2**62, -1, 0, 1e-300])
def test_numbers_that_no_run_has_are_drawn_without_a_word(tmp_path, recwarn, number):
    lines = [result(1, full=True), result(2) | {"epoch": 10**18}, result(3)]
    for key in ("test_accuracy", "connectivity", "pruned", "regrown", "train_seconds"):
        lines[2][key] = number
    lines[2]["layers"]["fc.1.weight"] = dict.fromkeys(("connected", "weights", "connectivity", "pruned"), number)
    lines[0]["neurons"]["fc.0"] = {"firing_rate": number, "silent": number}
    lines[0]["distributions"]["fc.1.weight"]["w"] = {"edges": [0, abs(number) or 1], "counts": [1]}
    write_run(tmp_path, "x", lines, arguments={"T": number, "epoch": number})
    (run,) = runs.find([tmp_path])
    assert len(pictures.of_run(run, str(10**18), {}) + pictures.overall([run], ["r"])) == 8
    report.row(run), report.facts(run)
    assert not recwarn.list, [str(warning.message) for warning in recwarn]


def test_a_network_without_connections_is_drawn_without_a_word(recwarn):
    run = run_of([result(1) | {"connectivity": 0.0}], dataset="digits")  # of which there are no published results
    assert len(pictures.overall([run], ["r"])) == 4
    assert not recwarn.list, [str(warning.message) for warning in recwarn]


def test_values_that_are_no_text_and_no_number_are_not_shown(tmp_path):
    nested = json.loads("[" * 500 + "]" * 500)
    write_run(tmp_path, "x", arguments={"epoch": nested, "mode": nested, "seed": nested, "dataset": "d" * 10_000})
    path = tmp_path / "logs" / "x" / "run.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"device": nested, "command": "c" * 10_000, "versions": {"torch": nested}}))
    (run,) = runs.find([tmp_path])
    assert list(report.row(run).values()) == ["x", "–", "0/?", "–", "–", "–", "–", "–", "–", "0123456789"]
    assert [len(text) for text in run.experiment] == [5, 200]
    facts = report.facts(run)
    assert (len(facts["command"]), facts["versions"], "seed" in facts) == (2000, "torch ", False)


def test_density_by_hand():
    edges, density = weights._histogram({"w": {"edges": [0, 1, 3, 4], "counts": [2, 6, 0]}}, "w")
    assert edges.tolist() == [0, 1, 3, 4]
    np.testing.assert_array_equal(density, [0.25, 0.375, np.nan])  # 2 of 8 in a bin of width 1, 6 of 8 in one of 2
    for broken in (
        {"edges": [0, 1], "counts": [1, 2]},
        {"edges": [0, 0, 1], "counts": [1, 2]},
        {"edges": [0, 1], "counts": [0]},
        {"edges": "ab", "counts": [1]},
        {"edges": 1, "counts": 2},
        {"edges": [0, 10**400], "counts": [1]},
        {"edges": [0, 1], "counts": [math.inf]},
        {"edges": list(range(5000)), "counts": [1] * 4999},
        {"counts": [1]},
        [],
    ):
        assert weights._histogram({"w": broken}, "w") is None


def test_distributions_are_few_and_reach_from_first_to_last(drawn, tmp_path):
    lines = [result(epoch, full=epoch % 2 == 1) for epoch in range(1, 30)]
    write_run(tmp_path, "x", lines)
    (run,) = runs.find([tmp_path])
    kept = [epoch for epoch in run.epochs if "distributions" in epoch]  # in memory: they are nearly all of a file
    assert [epoch["epoch"] for epoch in kept] == [1, 5, 11, 15, 19, 25, 29]
    assert kept == [lines[epoch["epoch"] - 1] for epoch in kept]
    made = weights.distributions(run)
    assert [title for title, *_ in drawn] == [
        f"{name}, {symbol}" for name in ("static_fc.1.weight", "fc.1.weight") for symbol in ("w", "θ")
    ]
    assert all(len(points) == 7 for *_, points in drawn)
    assert "epoch 1, " in made.alt
    assert made.alt.endswith("epoch 29.")
    for epoch in kept:
        for entry in epoch["distributions"].values():
            del entry["theta"]
    made = weights.distributions(run)
    assert len(drawn) == 2
    assert "θ" not in made.title + made.caption


@pytest.mark.parametrize(
    ("experiment", "dataset", "published"),
    [
        ("mnist", "mnist", [[(100, 98.92)]]),
        ("mnist", "digits", []),
        (
            "c10",
            "cifar10",
            [
                [(100, 92.84)],
                [(0.73, 89.34)],
                [(4.6, 92.49), (2.2, 92.49), (1.4, 91.64), (1.0, 91.06), (0.75, 90.21)],
            ],
        ),
        ("", "", []),
    ],
)
def test_published_points_belong_to_their_experiment(drawn, experiment, dataset, published):
    made = results.plane([run_of([result(1, accuracy=0.9)], experiment, dataset)], ["mine"])
    ((_, x, y, (mine, *others)),) = drawn
    assert (x, y) == ("connectivity (%), logarithmic", "test accuracy (%)")
    assert mine[0][1] == pytest.approx(90)
    assert len(others) == len(published)
    for points, expected in zip(others, published, strict=True):
        np.testing.assert_allclose(points, expected)
    assert made.svg.count("published: ") == len(published)
    assert ("IJCAI 2021" in made.caption) == bool(published)


def test_published_points_are_of_the_published_network(drawn):
    published, narrow, short = (run_of([result(1)], "c10", "cifar10") for _ in range(3))
    narrow.info["arguments"]["width"], short.info["arguments"]["T"] = 32, 4
    for runs_shown, others, said in (
        ([narrow], 0, None),
        ([short], 0, None),
        ([published], 3, "results of the same network and data set"),
        ([narrow, published], 3, "results of the network as published, which not all of the runs have, and data set"),
    ):
        made = results.plane(runs_shown, ["r"] * len(runs_shown))
        assert len(drawn[-1][-1]) == len(runs_shown) + others
        assert (said or "") in made.caption
        assert ("published" in made.caption) == bool(others)


def test_a_run_that_cannot_be_looked_into_hides_no_other(tmp_path, monkeypatch, capsys):
    for name in ("closed", "open"):
        write_run(tmp_path, name, [result(1)])
        small_checkpoint(tmp_path, name)

    def refused(method):  # as before Python 3.14 in another user's folder, and not as root
        def call(path, **settings):
            if path.parent.name == "closed":
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return method(path, **settings)

        return call

    for name in ("is_file", "stat"):
        monkeypatch.setattr(Path, name, refused(getattr(Path, name)))
    found = runs.find([tmp_path])
    assert [report._changed(run) > 0 for run in found] == [False, True]
    assert [bool(report.facts(run).get("checkpoint")) for run in found] == [False, True]
    assert [bool(runs.weights_of(run)[1]) for run in found] == [False, True]


def test_the_accuracy_of_the_plane_is_of_the_same_epoch_as_its_connectivity(drawn):
    line = result(2) | {"test_accuracy": 0.5, "best_accuracy": 0.9, "connectivity": 0.25}
    results.plane([run_of([result(1), line], dataset="digits")], ["mine"])
    np.testing.assert_allclose(drawn[0][3][0], [[25, 50]])


def test_receptive_fields_by_hand(monkeypatch, style):
    shown = []
    monkeypatch.setattr(weights, "_image", lambda axes, values, *_: shown.append(values))
    weight = torch.zeros(40, 784)
    weight[:10, 2 * 28 + 5] = 0.5  # row 2, column 5
    weight[9, 783] = -1.0
    made = weights.receptive_fields("3", {"static_fc.1.weight": weight})
    share, grid = shown
    assert share.shape == (28, 28)
    assert (share[2, 5], share[27, 27], share.sum()) == (25.0, 2.5, 27.5)  # per cent of the 40 hidden neurons
    assert grid.shape == (4 * 29 - 1, 8 * 29 - 1)
    assert grid[29 + 2, 29 + 5] == 0.5  # neuron 9 is the second of the second row
    assert grid[29 + 27, 29 + 27] == -1.0
    assert np.isnan(grid[28]).all()
    assert "0.00 % to 25.00 %" in made.alt


def test_a_picture_does_not_depend_on_those_before():
    """Nothing of one run may stay in the next one's."""
    few, many = (run_of([result(e, connectivity=0.3 / e, full=True) for e in range(1, n)]) for n in (3, 60))
    dense = run_of([result(e, connectivity=1.0, full=True) for e in range(1, 4)])
    empty = run_of([result(1, full=True)])  # axes without anything in them
    for entry in empty.epochs[0]["distributions"].values():
        entry["w"]["counts"] = [0] * 64
    tensors = {"fc.1.weight": torch.eye(10, 800)}

    def svgs(run):
        return [picture.svg for picture in pictures.of_run(run, "1", tensors) + pictures.overall([run], ["r"])]

    alone = [svgs(run) for run in (few, many, dense, empty)]
    assert [svgs(run) for run in (many, few, dense, many, few, empty)] == [alone[i] for i in (1, 0, 2, 1, 0, 3)]
    one = run_of([result(1, full=True)])  # of the same form as the empty one
    svgs(one)
    assert svgs(empty) == alone[3]


def test_runs_of_every_number_can_be_told_apart():
    looks = [tuple(map(str, drawing.look(i).values())) for i in range(40)]
    assert len(set(looks)) == 40


# -- the page ----------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The elements of a page, its text, and its pictures as (alt, parsed SVG)."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.pictures, self.attributes = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag == "img":
            attributes = dict(attributes)
            head, data = attributes["src"].split(",")
            assert head == "data:image/svg+xml;base64"
            self.pictures.append((attributes["alt"], ElementTree.fromstring(base64.b64decode(data, validate=True))))

    def handle_data(self, data):
        self.text.append(data)


def call(*argv):
    return report.main([str(argument) for argument in argv])


def test_the_page_shows_every_run_and_picture(dump, tmp_path, capsys):
    write_run(dump, "d", [result(1, "c10", full=True), result(2, "c10")], "c10")
    assert call(dump, "-o", tmp_path / "page.html") == 0
    out, err = capsys.readouterr()
    assert err == ""
    head, *rows = out.split("\n\n")[0].splitlines()
    assert head.split() == " ".join(report.PRINTED).split()
    assert [row.split()[-1] for row in rows] == ["a", "b", "c", "d"]
    assert max(map(len, rows)) <= 80  # with names of one letter
    assert "Report of 4 runs: " in out
    page = Page(tmp_path / "page.html")
    text = " ".join(page.text)
    for run in runs.find([dump]):
        for cell in report.row(run).values():
            assert cell in text
    # two groups compare four ways; b and d have two and four pictures of results, b and c three of weights, a ...
    expected = {
        **{"Test accuracy against epoch": 2, "Connectivity against epoch": 2, "Accuracy and connectivity": 2},
        **{"Connections pruned and regrown": 2 + 3, "Connectivity per layer": 3, "Firing rates and silent neurons": 1},
        **{"Distributions of w and θ over time": 1, "Connectivity map": 2, "Receptive fields of the first layer": 2},
    }
    headings = [text.strip() for text in page.text]
    assert {title: headings.count(title) for title in expected} == expected
    assert len(page.pictures) == page.tags.count("figure") == sum(expected.values())
    assert all(len(alt) > 60 for alt, _ in page.pictures)
    svg = "{http://www.w3.org/2000/svg}"
    assert all(picture.tag == f"{svg}svg" and list(picture.iter(f"{svg}text")) for _, picture in page.pictures)
    for title in (f"{EXPERIMENTS[name].label} on {EXPERIMENTS[name].datasets[0].name}" for name in ("mnist", "c10")):
        assert title in text


def test_the_page_needs_nothing_else(dump, tmp_path):
    call(dump, "-o", tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    for name, value in page.attributes:
        if name in ("src", "href", "srcset", "action", "data"):
            assert value.startswith(("data:", "#")), (name, value)
        assert not name.startswith("on")
    assert "url(" not in "".join(page.text)
    assert "@import" not in "".join(page.text)


def test_hostile_names_do_no_harm(tmp_path, capsys):
    hostile = "_<img src=x onerror=alert(1)>$\\frac{$&\"'\x01\x1b[31m\n"
    write_run(tmp_path, hostile, [result(1, full=True)], arguments={"mode": "<script>", "epoch": "<b>"})
    write_run(tmp_path, "{{ 7 * 7 }} 日本", [result(1)], dataset="</title><script>")
    line = json.dumps(result(1)).replace("static_fc.1.weight", "<script>$")
    (tmp_path / "logs" / hostile / "results.jsonl").write_text(line + "\n<script>damaged\n")
    path = small_checkpoint(tmp_path, hostile)
    assert call(tmp_path, "-o", tmp_path / "page.html") == 0
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert "\x01" not in out + err
    shown = hostile.replace("\x01", "�").replace("\x1b", "�").replace("\n", "�")
    page = Page(tmp_path / "page.html")
    assert not {"script", "b"} & set(page.tags)
    assert len(page.pictures) == page.tags.count("img")
    assert page.text.count(shown) == 2  # in the table and above its section
    assert "{{ 7 * 7 }} 日本" in page.text
    assert path.parent.name == hostile


def test_damage_is_named_on_the_page_and_the_terminal(dump, tmp_path, capsys):
    with open(dump / "logs" / "a" / "results.jsonl", "a") as file:
        file.write("damaged\n")
    (dump / "models" / "b" / "checkpoint.pt").write_bytes(b"damaged")
    assert call(dump, "-o", tmp_path / "page.html") == 0
    out, err = capsys.readouterr()
    line, checkpoint = err.splitlines()
    assert line == (f"report.py: warning: {dump}/logs/a/results.jsonl, line 2: damaged, not JSON; the line is left out")
    assert checkpoint.startswith(f"report.py: warning: {dump}/models/b/checkpoint.pt: damaged or not a checkpoint")
    text = " ".join(Page(tmp_path / "page.html").text)
    for problem in err.splitlines():
        assert problem.removeprefix("report.py: warning: ") in text
    assert "Report of 3 runs" in out


def test_the_same_runs_give_the_same_page(dump, tmp_path):
    for name in ("one.html", "two.html"):
        call(dump, "-o", tmp_path / name)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_only_the_runs_that_changed_last_have_pictures_of_their_own(dump, tmp_path, capsys):
    """To draw them takes nearly all of the time: a report of hundreds of runs would take minutes."""
    for age, name in ((300, "a"), (200, "c"), (100, "b")):
        for path in [*dump.glob(f"logs/{name}/*"), *dump.glob(f"models/{name}/*")]:
            os.utime(path, (10**9 - age, 10**9 - age))
    pages = {}
    for details in (0, 1, 2, 3):
        assert call(dump, "-o", tmp_path / "page.html", "--details", details) == 0
        page = pages[details] = Page(tmp_path / "page.html")
        headings = [text.strip() for text in page.text]
        assert headings.count("Receptive fields of the first layer") == min(details, 2)  # of b and c
        assert headings.count("Connectivity per layer") == min(details, 1) + (details == 3)  # of b and a
        assert sum("not one of the runs that changed last" in text for text in page.text) == 3 - details
        assert headings.count("Test accuracy against epoch") == 1
        said = f"{details} of them have pictures of their own; --details 3 draws those of all."
        assert (said in capsys.readouterr().out) == (details < 3)
    assert report.parse([str(dump)]).details >= 3


def test_a_tilde_is_the_home_folder(dump, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert call("~/dump", "-o=~/page.html", "--details", "0") == 0
    assert (tmp_path / "page.html").is_file()


def test_workers_end_with_the_report(dump, tmp_path):
    """Whatever ends it: here a signal that nobody can handle."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\n"
        "from analysis import report, runs\n"
        "def drawing(run):\n"
        "    os.write(1, b'drawing')\n"
        "    time.sleep(60)\n"
        "report._section = drawing\n"
        "if __name__ == '__main__':\n"
        "    report._sections(runs.find([sys.argv[1]]))\n"
    )
    with open(tmp_path / "errors", "w") as errors:
        process = subprocess.Popen(
            [sys.executable, program, dump],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdout.read(7) == "drawing", (tmp_path / "errors").read_text()
    process.kill()
    process.communicate(timeout=30)  # until all who could write to it have ended


def end_process(run):
    os._exit(1)


def test_a_worker_that_is_killed_is_a_line(dump, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "_section", end_process)
    assert call(dump, "-o", tmp_path / "page.html") == 1
    err = capsys.readouterr().err
    assert "out of memory (a process that was drawing pictures was killed)" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


def test_made_up_runs_have_what_real_ones_have(tmp_path):
    """The runs to measure with have every picture."""
    write_runs(tmp_path, 2, 3, interval=2)
    call(tmp_path, "-o", tmp_path / "page.html")
    assert len(Page(tmp_path / "page.html").pictures) == 4 + 6 + 5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: FOLDER (see --help)"),
        (["{dump}", "--nonsense"], "unrecognized option --nonsense (see --help)"),
        (["{dump}/nowhere"], "{dump}/nowhere is not a folder; give a dump folder"),
        (["{dump}/empty"], "there is no run in {dump}/empty: looked for"),
        (["{dump}", "-o", "{dump}"], "argument -o/--output: cannot write {dump}: it is a folder"),
        (["{dump}", "--details", "-1"], "argument --details: must be a whole number >= 0, not '-1'"),
        (
            ["{dump}", "-o", "{dump}/no/page.html"],
            "argument -o/--output: cannot write {dump}/no/page.html: No such file",
        ),
    ],
)
def test_refusals_are_one_line_and_status_2(dump, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(dump)
    (dump / "empty").mkdir()
    assert call(*(argument.format(dump=dump) for argument in argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert f"error: {message.format(dump=dump)}" in err
    assert sorted(path.name for path in dump.iterdir()) == ["empty", "logs", "models"]  # no page, nothing temporary


def test_the_command(dump, tmp_path):
    """The real command: its default output and the page's permissions."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "analysis.report"]
    result = subprocess.run([*command, str(dump)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert re.search(r"Report of 3 runs: report\.html \(\d\.\d MB\)", result.stdout)
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "report.html").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_help_has_a_sentence_for_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        call("--help")
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert " ".join(out.split()).startswith(
        "usage: python -m analysis.report [-h] [-o FILE] [--details N] FOLDER [FOLDER ...]"
    )
    assert "dump folder (--dump-dir)" in out
    assert "(default: report.html)" in " ".join(out.split())


def test_nothing_imports_analysis():
    rooms = ("spiking_kernels", "measuring", "training", "mnist", "c10")
    modules = {*ROOT.glob("*.py")} - {ROOT / "pruned.py"}  # which is analysis's door
    for path in [*modules, *(path for room in rooms for path in (ROOT / room).rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "analysis" for name in names), path


def test_pictures_are_drawn_on_the_cores_that_the_process_may_use(monkeypatch):
    class Pool:
        def __init__(self, workers, **settings):
            raise InterruptedError(workers)

    monkeypatch.setattr(report, "ProcessPoolExecutor", Pool)
    for cores, workers in ((3, 3), (64, 5)):
        monkeypatch.setattr(report, "cores", lambda cores=cores: cores)
        with pytest.raises(InterruptedError, match=f"^{workers}$"):
            report._sections([run_of([])] * 5)
