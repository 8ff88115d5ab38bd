"""The grids and their runner: rows are commands, finished ones are skipped, failed ones named."""

import csv
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import measuring
from analysis.experiments import EXPERIMENTS
from mnist.model import MnistNet
from reproduce import __main__ as reproduce
from reproduce import entries, figures, grid, outcome, records, runner, slurm, tables
from training import device
from training.errors import Refusal
from training.methods import METHODS
from training.methods.deep import TEMPERATURE
from training.methods.method import PENALTY, SPARSITY, Method, Option
from training.options import REPOSITORY, read
from training.run_info import processor

TABLE = """
options = "--dataset digits -lr 1e-2"
epochs = 1
seeds = [2020, 1]

[[group]]
title = "dense"
variants = ["-m no_prune"]

[[group]]
title = "Grad R"
method = "-m grad -s 0.95"
variants = ["-penalty 1e-3", "-penalty 1e-2"]

[[group]]
title = "long"
epochs = 2
seeds = [2020]
variants = ["-m no_prune"]

[[group]]
title = "high rate"
ablation = true
options = "--dataset digits -lr 1e-1"
seeds = [2020]
variants = ["-m no_prune"]
"""

# Stands for the experiment's script: writes what it would, and nothing of torch is imported.
SCRIPT = """
import json, os, pathlib, sys, time
argv = sys.argv[1:]
value = lambda option: argv[argv.index(option) + 1]
name = "-".join([f"lr-{value('-lr')}-b-128-T-8"])
name += f"-penalty-{value('-penalty')}-s-{value('-s')}" if "-s" in argv else ""
name += "-" + value("-m") + ("" if value("--seed") == "2020" else "-seed-" + value("--seed")) + "-digits"
dump = pathlib.Path(value("--dump-dir"))
logs = dump / "logs" / name
logs.mkdir(parents=True, exist_ok=True)
results, epochs = logs / "results.jsonl", int(value("-N"))
with open(dump / "calls", "a") as calls:
    threads = os.environ["OMP_NUM_THREADS"] + "/" + os.environ["TORCHINDUCTOR_COMPILE_THREADS"]
    print(" ".join(["start", *argv]), threads, file=calls)
deadline = time.monotonic() + 30
while (dump / "meet").exists() and (dump / "calls").read_text("utf-8").count("start") < 3:
    time.sleep(0.01)
    if time.monotonic() > deadline:
        sys.exit("alone")
for trouble in ("fail", "taken", "wait"):
    path = dump / trouble
    if path.exists() and path.read_text("utf-8") in " ".join(argv):
        if trouble == "wait":
            import fcntl
            held = open(dump / f"held-{os.getpid()}", "w")
            fcntl.flock(held, fcntl.LOCK_EX)
            time.sleep(60)
        sys.exit("another process is training in it" if trouble == "taken" else "all is lost")
if "-test" in argv:
    (logs / "test.json").write_text(json.dumps({"epoch": epochs, "accuracy": 0.5}))
else:
    done = len(results.read_text("utf-8").splitlines()) if results.exists() else 0
    with open(results, "a") as file:
        for epoch in range(done + 1, epochs + 1):
            line = {"epoch": epoch, "test_accuracy": 0.5 + epoch / 10, "connectivity": 0.25}
            line |= {"pruned": 2, "regrown": 6}
            line |= {"train_seconds": 3.0, "test_seconds": 0.5, "checkpoint_seconds": 0.5}
            print(json.dumps(line), file=file)
    info = {"cpu": "6502", "device": "stub", "precision": "fp8", "versions": {"torch": "9"}, "git_commit": "c0ffee"}
    (logs / "run.json").write_text(json.dumps(info))
with open(dump / "calls", "a") as calls:
    print("end", name, file=calls)
"""


def rows_in(folder):
    (folder / "mnist.toml").write_text(TABLE)
    return grid.load("mnist", folder)


def stub_in(folder, monkeypatch):
    (folder / "repository" / "mnist").mkdir(parents=True)
    (folder / "repository" / "mnist" / "mnist.py").write_text(SCRIPT)
    monkeypatch.setattr(runner, "REPOSITORY", folder / "repository")
    for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.delenv(name, raising=False)
    (folder / "dump").mkdir()
    return folder / "dump"


@pytest.fixture
def rows(tmp_path):
    return rows_in(tmp_path)


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A repository whose script is the stub, and a dump folder to run rows in."""
    return stub_in(tmp_path, monkeypatch)


def calls(dump):
    return (dump / "calls").read_text("utf-8").splitlines() if (dump / "calls").exists() else []


# -- the grid ------------------------------------------------------------------------------------------


def test_rows_are_commands_the_first_seed_first_methods_before_ablations(rows):
    penalties = [("-m grad -s 0.95 -penalty " + p, "penalty-" + p + "-s-0.95-grad") for p in ("1e-3", "1e-2")]
    expected = [
        (f"python mnist/mnist.py --dataset digits -lr 1e-2 {options} -N 1 --seed {seed}", 1, name)
        for seed in (2020, 1)
        for options, name in [("-m no_prune", "no_prune"), *penalties]
    ]
    long, high = rows[3], rows[4]
    short = [row for row in rows if row not in (long, high)]
    assert [row.command for row in short] == [command for command, *_ in expected]
    assert long.command == "python mnist/mnist.py --dataset digits -lr 1e-2 -m no_prune -N 2 --seed 2020"
    assert high.command == "python mnist/mnist.py --dataset digits -lr 1e-1 -m no_prune -N 1 --seed 2020"
    for row, (_, _, name) in zip(short, expected, strict=True):
        seed = "-seed-1" if row.seed == 1 else ""
        assert row.name == f"lr-1e-2-b-128-T-8-{name}{seed}-digits"
    assert long.name == rows[0].name
    assert (long.key, rows[0].key) == (f"{rows[0].name}-N-2", f"{rows[0].name}-N-1")
    assert [row.title for row in rows] == [
        *("dense", "Grad R", "Grad R", "long", "high rate"),
        *("dense", "Grad R", "Grad R"),
    ]
    assert [row.ablation for row in rows] == [row.title == "high rate" for row in rows]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("-penalty 1e-2", "-penalty -1", r"Grad R: .*-penalty -1.*: argument -penalty"),
        ("-penalty 1e-2", "-penalty 0.001", r"is there twice, in Grad R and Grad R"),
        ('title = "dense"\n', "", r"a group has no title"),
        ("epochs = 1\n", "", r"a group has no epochs"),
        ("seeds = [2020, 1]\n", "", r"a group has no seeds"),
        ("[[group]]", "[[group", r"mnist\.toml: "),
        (
            "epochs = 1\n",
            'epochs = 1\nexperiment = "mnits"\n',
            r"mnist\.toml: experiment must be mnist or c10, not 'mnits'",
        ),
        ("epochs = 1\n", 'epochs = 1\ntitle = "{no_such}"\n', r"mnist\.toml: title: .*'\{no_such\}'"),
        ("epochs = 1\n", 'epochs = 1\ntitle = "{"\n', r"mnist\.toml: title: .*'\{'"),
        ("epochs = 1\n", "epochs = 1\nseed = [1]\n", r"mnist\.toml: seed is not known here; there are title, "),
        ('title = "dense"\n', 'title = "dense"\nexperiment = "c10"\n', r"mnist\.toml: experiment is not known here"),
        ("epochs = 1\n", 'epochs = 1\ntitle = "{T[0]}"\n', r"mnist\.toml: title: .*'\{T\[0\]\}'"),
        ("epochs = 1\n", 'epochs = "1"\n', r"mnist\.toml: epochs must be a whole number, not '1'"),
        ("seeds = [2020, 1]", "seeds = 2020", r"mnist\.toml: seeds must be a list of whole numbers, not 2020"),
        ("seeds = [2020, 1]", "seeds = [true]", r"mnist\.toml: seeds must be a list of whole numbers, not \[True\]"),
        ('["-m no_prune"]', "[1]", r"mnist\.toml: variants must be a list of texts"),
        ('title = "dense"\n', 'title = "dense"\nablation = "no"\n', r"mnist\.toml: ablation must be true or false"),
        ("--dataset digits -lr 1e-2", "-lr '1", r"mnist\.toml: .* is no command line: No closing quot"),
        ("epochs = 1\n", "epochs = 3\n", r"-N 2 --seed 2020 has to come before that of 3 epochs"),
    ],
)
def test_a_faulty_table_is_refused(tmp_path, old, new, message):
    (tmp_path / "mnist.toml").write_text(TABLE.replace(old, new, 1))
    with pytest.raises(Refusal, match=message):
        grid.load("mnist", tmp_path)


def test_the_head_of_a_table_names_its_experiment_its_figures_and_the_place_of_its_ablations(tmp_path):
    head = 'experiment = "mnist"\ntitle = "width {width}, {epoch} epochs"\nablations_last = false\n'
    first = '[[group]]\ntitle = "early"\nablation = true\nseeds = [2020]\nvariants = ["-m no_prune -T 2"]\n'
    (tmp_path / "small.toml").write_text(head + TABLE.replace("[[group]]", f"{first}\n[[group]]", 1))
    (tmp_path / "mnist.toml").write_text(TABLE.replace("[[group]]", f"{first}\n[[group]]", 1))
    assert grid.names(tmp_path) == ["mnist", "small"]
    small, plain = grid.load("small", tmp_path), grid.load("mnist", tmp_path)
    titles = ["early", "dense", "Grad R", "Grad R", "long", "high rate", "dense", "Grad R", "Grad R"]
    assert [row.title for row in small] == titles
    assert [row.title for row in plain] == [*titles[1:5], "early", *titles[5:]]
    assert {row.command for row in small} == {row.command for row in plain}
    assert [row.heading for row in small[3:5]] == ["width 800, 1 epochs", "width 800, 2 epochs"]
    assert {row.heading for row in plain} == {"mnist"}


def test_the_narrow_grid_has_its_most_telling_rows_first():
    rows = grid.load("c10-narrow")
    assert {row.experiment for row in rows} == {"c10"}
    first = [row for row in rows if row.seed == 2020]
    assert rows[: len(first)] == first
    assert [row.title for row in first] == [
        *[
            "dense",
            *["Grad R"] * 3,
            *["Deep R"] * 3,
            "Deep R, large penalty",
            *["Grad R, constant penalty"] * 3,
            *["Grad R, plain gradient"] * 3,
        ],
        *["Grad R"] * 2,
        *["soft Deep R"] * 2,
        *("Grad R, no prior", "Deep R with noise"),
    ]
    assert [row.options.connectivity for row in first if row.title == "Grad R"] == [0.1, 0.05, 0.02, 0.3, 0.01]
    assert [row.options.sparsity for row in first if row.title == "Deep R"] == [0.9, 0.95, 0.98]
    constant, plain = (
        [row.options.penalty for row in first if row.title == f"Grad R, {kind}"]
        for kind in ("constant penalty", "plain gradient")
    )
    assert constant == plain
    for seed in (1, 2):
        again = [row.command.replace(f"--seed {seed}", "--seed 2020") for row in rows if row.seed == seed]
        assert again == [row.command for row in [*first[:7], *first[11:16]]]
    shared = ("recipe", "epoch", "batch_size", "learning_rate", "T", "width", "precision")
    assert len({tuple(getattr(row.options, name) for name in shared) for row in rows}) == 1
    options = rows[0].options
    (heading,) = {row.heading for row in rows}
    assert all(text in heading for text in (f"width {options.width}", f"T {options.T}", f"{options.epoch} epochs"))


@pytest.mark.parametrize("experiment", ["mnist", "c10"])
def test_the_grids_have_what_the_paper_compares(experiment):
    rows = grid.load(experiment)
    least = {"dense": 1, "Grad R": 6, "Deep R": 4, "Deep R with noise": 4, "soft Deep R": 4}
    for title, variants in least.items():
        some = [row for row in rows if row.title == title]
        short = min(row.epochs for row in some)
        seeds = [
            {row.seed for row in some if row.argv[:-1] == argv}
            for argv in {r.argv[:-1] for r in some if r.epochs == short}
        ]
        assert len(seeds) >= variants
        assert all(len(of_variant) >= 3 for of_variant in seeds)
        assert short >= 60
        assert not any(row.ablation for row in some)
    assert {row.title for row in rows if not row.ablation} == {*least, "dense, fast recipe", "Grad R, fast recipe"}
    fast = [read(EXPERIMENTS[experiment], row.argv) for row in rows if row.title == "Grad R, fast recipe"]
    assert all(options.recipe == "fast" for options in fast)
    assert {options.epoch for options in fast} == {EXPERIMENTS[experiment].fast.epochs}
    reached = {options.connectivity for options in fast}
    assert len(reached) >= 4
    assert (min(reached), max(reached)) == (0.007, 0.3)
    whole = [row for row in rows if row.epochs == EXPERIMENTS[experiment].paper.epochs]
    assert len([row for row in whole if row.title == "Grad R"]) >= 4
    assert len([row for row in whole if row.title == "dense"]) >= 1


def test_the_grids_ablate_prior_target_gradient_and_learning_rate():
    for experiment, rate in (("mnist", 1e-4), ("c10", 1e-3)):
        options = [read(EXPERIMENTS[experiment], row.argv) for row in grid.load(experiment) if row.ablation]
        assert any(o.mode == "grad" and o.penalty == 0 for o in options)
        assert any(o.plain_gradient for o in options)
        assert {o.sparsity for o in options if o.mode == "grad"} == {0.5, 0.75, 0.9, 0.95, 0.99}
        assert {o.mode for o in options if o.learning_rate == rate} == {"no_prune", "grad"}
        assert any(o.mode == "deep" and not o.soft and o.sparsity == 1 for o in options)
        assert any(o.soft and not o.temperature for o in options)


def test_shards_share_the_rows_out_and_keep_a_run_together(rows):
    parts = [grid.shard(rows, part, 3) for part in (1, 2, 3)]
    assert sorted(row.key for part in parts for row in part) == sorted(row.key for row in rows)
    assert all(parts)
    assert {rows[0], rows[3]} <= set(parts[0])  # of one run
    assert grid.shard(rows, 1, 1) == rows


# -- the runner ----------------------------------------------------------------------------------------


def test_rows_are_trained_tested_and_recorded_once(rows, stub, capsys):
    assert records.progress(stub, rows) == records.Progress([], 8, 8, pytest.approx(float("nan"), nan_ok=True))
    assert runner.Runner(stub, ["--dataset-dir", "data"], 1).run(rows) == ([], [])
    starts = [line for line in calls(stub) if line.startswith("start")]
    assert len(starts) == 2 * len(rows)
    for row, train, test in zip(rows, starts[::2], starts[1::2], strict=True):
        command = " ".join(["start", *row.argv, "--dataset-dir data --dump-dir", str(stub)])
        assert train.rpartition(" ")[0] == command
        assert test.rpartition(" ")[0] == command + " -test"
    record = records.finished(stub, rows[0])
    assert record["result"]["test_accuracy"] == 0.6
    assert record["test"] == {"epoch": 1, "accuracy": 0.5}
    assert (record["command"], record["seed"], record["epochs"]) == (rows[0].command, 2020, 1)
    where = {"cpu": "6502", "device": "stub", "precision": "fp8"}
    assert record["run"] == {**where, "versions": {"torch": "9"}, "git_commit": "c0ffee"}
    assert records.finished(stub, rows[3])["result"]["test_accuracy"] == 0.7
    out = capsys.readouterr().out
    assert f"{rows[0].key} finished: test accuracy 60.00 %, connectivity 25.00 %" in out
    assert "1 of 8 rows done, 7 epochs left, about 28 seconds" in out
    assert records.progress(stub, rows) == records.Progress(rows, 8, 0, 4.0)
    assert records.Progress(rows[:2], 8, 1800, 4.0).line(2) == "2 of 8 rows done, 1,800 epochs left, about 60 minutes"
    assert runner.Runner(stub, [], 1).run(rows) == ([], [])
    assert len(calls(stub)) == 4 * len(rows)  # nothing was run again


def test_jobs_run_side_by_side_but_never_two_of_one_run(rows, stub, monkeypatch):
    monkeypatch.setattr(device, "cores", lambda: 15)
    (stub / "meet").touch()  # none ends before three have begun
    assert runner.Runner(stub, [], 7).run(rows) == ([], [])
    lines = calls(stub)
    (long,) = [index for index, line in enumerate(lines) if "-N 2" in line and "-test" not in line]
    (short,) = [
        index for index, line in enumerate(lines) if "1e-2 -m no_prune -N 1 --seed 2020" in line and "-test" in line
    ]
    assert long > short
    assert threads_of(lines) == {"2/2"}


def threads_of(lines):
    """What the rows had as OMP_NUM_THREADS and TORCHINDUCTOR_COMPILE_THREADS."""
    return {line.rpartition(" ")[2] for line in lines if line.startswith("start")}


@pytest.mark.parametrize(("name", "threads"), [("OMP", "5/3"), ("TORCHINDUCTOR_COMPILE", "3/5")])
def test_the_threads_that_the_user_sets_stay(rows, stub, monkeypatch, name, threads):
    monkeypatch.setattr(device, "cores", lambda: 12)
    name = {"OMP": "OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE": "TORCHINDUCTOR_COMPILE_THREADS"}[name]
    monkeypatch.setenv(name, "5")
    assert runner.Runner(stub, [], 4).run(rows) == ([], [])
    assert threads_of(calls(stub)) == {threads}


def test_rows_side_by_side_take_the_gpus_in_turn(rows, stub):
    (stub / "meet").touch()
    run = runner.Runner(stub, [], 3)
    run.gpus = 2
    assert run.run(rows) == ([], [])
    starts = [line.split() for line in calls(stub) if line.startswith("start")]
    gpus = [words[words.index("-gpu") + 1] for words in starts]
    assert sorted(gpus[:3]) == ["0", "0", "1"]  # of the three rows that begin together
    assert set(gpus) == {"0", "1"}


# Stands for python: keeps what it is to start as torchrun would, with its GPUs and its threads; starts one process.
LAUNCHER = """
import os, pathlib, sys
argv = sys.argv[1:]
if argv[:2] == ["-m", "torch.distributed.run"]:
    place = argv.index("--dump-dir") + 1
    with open(pathlib.Path(argv[place]) / "launches", "a") as launches:
        print(*argv[2:5], os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["OMP_NUM_THREADS"], file=launches)
    argv = argv[5:]
    assert "-gpu" not in argv
os.execv(sys.executable, [sys.executable, *argv])
"""


@pytest.fixture
def launches(tmp_path, stub, monkeypatch):
    """What torchrun was to start: its options, the GPUs and the threads."""
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    monkeypatch.setattr(runner, "PYTHON", [sys.executable, str(tmp_path / "launcher.py")])
    monkeypatch.setattr(device, "cores", lambda: 12)
    return lambda: [tuple(line.rsplit(" ", 2)) for line in (stub / "launches").read_text("utf-8").splitlines()]


@pytest.mark.parametrize(
    ("visible", "gpus", "expected"),
    [(None, 4, {"0,1", "2,3"}), ("7,5,3", 3, {"7,5", "3,7", "5,3"}), ("0", 0, {"0"}), (None, 0, {"None"})],
)
def test_torchrun_trains_a_row_on_several_gpus(rows, stub, launches, monkeypatch, visible, gpus, expected):
    """Rows side by side take them in turn. One process tests."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (stub / "meet").touch()
    run = runner.Runner(stub, [], 3, ranks=2)
    run.gpus = gpus
    assert run.run(rows) == ([], [])
    options, places, threads = map(set, zip(*launches(), strict=True))
    assert (options, places, threads) == ({"--standalone --nproc-per-node 2"}, expected, {"2"})
    assert len(launches()) == len(rows)
    tests = [line.split() for line in calls(stub) if "-test" in line and line.startswith("start")]
    assert len(tests) == len(rows)
    firsts = {words[words.index("-gpu") + 1] for words in tests if "-gpu" in words}
    assert firsts == ({str(slot * 2 % gpus) for slot in range(3)} if gpus else set())


def test_a_row_of_several_ranks_that_fails_is_told_by_the_line_of_the_script(rows, stub, launches, monkeypatch):
    ends = "print('mnist.py: error: all is lost', file=sys.stderr)\nprint('=====', file=sys.stderr)\nsys.exit(1)\n"
    (runner.REPOSITORY / "mnist" / "mnist.py").write_text(f"import sys\n{ends}")
    (stub / "rows").mkdir()
    runner.log_of(stub, rows[0]).write_text("$ an earlier call\nmnist.py: error: another process is training in it\n")
    run = runner.Runner(stub, [], 1, ranks=2)
    assert run._finish(rows[0], 0) == (runner.End.FAILED, "failed with status 1: mnist.py: error: all is lost")
    (runner.REPOSITORY / "mnist" / "mnist.py").write_text("print('=====')\n1 / 0\n")
    assert run._finish(rows[0], 0) == (runner.End.FAILED, "failed with status 1: ZeroDivisionError: division by zero")


def test_torchrun_is_not_sent_the_signal_that_only_saves(tmp_path):
    """It would end."""
    for ranks, expected in ((1, [signal.SIGUSR1, signal.SIGTERM]), (2, [signal.SIGTERM])):
        run, sent = runner.Runner(tmp_path, [], 1, ranks), []
        run._processes = [SimpleNamespace(send_signal=sent.append)]
        run._hand_on(signal.SIGUSR1, None)
        run._hand_on(signal.SIGTERM, None)
        assert sent == expected


@pytest.mark.parametrize("ranks", ["0", "two", "1025", "-2", "1.5"])
def test_a_number_of_ranks_that_is_none_is_refused(ranks, tmp_path, capsys):
    assert reproduce.main(["mnist", "--dump-dir", str(tmp_path / "dump"), f"--ranks={ranks}"]) == 2
    assert re.match(r".*: error: argument --ranks: must be a whole number", capsys.readouterr().err)


@pytest.mark.parametrize("more", [[], ["--slurm", "array.sh"], ["--list"]])
def test_ranks_that_do_not_divide_a_batch_are_refused(more, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert reproduce.main(["c10", "--dump-dir", str(tmp_path / "dump"), "--ranks", "3", *more]) == 2
    out, err = capsys.readouterr()
    assert re.search(
        r"argument --ranks: must divide the 16 images of a batch in: python c10/c10.py .*; 3 does not", err
    )
    assert (out, err.count("\n"), [*tmp_path.iterdir()]) == ("", 1, [])


def test_more_ranks_than_gpus_are_refused(rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    runner.Runner(tmp_path, [], 1, ranks=2)
    assert reproduce.main(["mnist", "--dump-dir", str(tmp_path / "dump"), "--ranks", "4"]) == 2
    line = "argument --ranks: 4 ranks need as many GPUs; this machine has 2\n"
    assert capsys.readouterr().err.endswith(line)


def test_a_task_of_an_array_has_a_gpu_for_each_rank(tmp_path):
    texts = []
    for more in ([], ["--ranks", "4"]):
        assert reproduce.main(["c10", "--slurm", str(tmp_path / "a.sh"), "--dump-dir", str(tmp_path), *more]) == 0
        texts.append((tmp_path / "a.sh").read_text("utf-8"))
    for text, gpus, cpus in zip(texts, (1, 4), (4, 16), strict=True):
        for line in ("--nodes=1", f"--gpus={gpus}", f"--cpus-per-task={cpus}"):
            assert f"\n#SBATCH {line}\n" in text
    words = [
        shlex.split(re.search(r"\n\S+ -m (reproduce .*?)&", text, re.DOTALL)[1].replace("\\\n", " ")) for text in texts
    ]
    assert words[1] == [*words[0], "--ranks", "4"]


def test_a_failed_row_is_named_and_the_others_go_on(rows, stub, capsys):
    (stub / "fail").write_text("-penalty 1e-2 -N 1 --seed 1")
    failed, taken = runner.Runner(stub, [], 2).run(rows)
    assert ([row.key for row in failed], taken) == ([rows[7].key], [])
    assert sum(records.finished(stub, row) is not None for row in rows) == len(rows) - 1
    assert f"{rows[7].key} failed with status 1: all is lost" in capsys.readouterr().out
    (stub / "fail").unlink()
    assert runner.Runner(stub, [], 2).run(rows) == ([], [])
    assert records.finished(stub, rows[7]) is not None


def test_a_row_that_another_process_has_is_left_to_it(rows, stub):
    (stub / "taken").write_text("-penalty 1e-2 -N 1 --seed 1")
    failed, taken = runner.Runner(stub, [], 2).run(rows)
    assert (failed, [row.key for row in taken]) == ([], [rows[7].key])


def test_a_row_whose_run_was_prolonged_is_recorded_from_its_results(rows, stub):
    runner.Runner(stub, [], 1).run(rows)
    records.path_of(stub, rows[0]).unlink()
    before = calls(stub)
    assert runner.Runner(stub, [], 1).run(rows) == ([], [])
    assert calls(stub) == before
    record = records.finished(stub, rows[0])
    assert (record["result"]["epoch"], record["test"]) == (1, None)  # the test is of epoch 2


def test_a_row_that_another_runner_finishes_meanwhile_is_left_as_it_is(rows, stub, monkeypatch, capsys):
    """Its run is longer by then, so that a record of now would lack the test."""
    runner.Runner(stub, [], 1).run(rows)
    record, before = records.path_of(stub, rows[0]).read_bytes(), calls(stub)
    found, finished = [], records.finished

    def not_yet(dump, row):
        found.append(row)
        return None if found.count(row) == 1 else finished(dump, row)

    monkeypatch.setattr(records, "finished", not_yet)
    assert runner.Runner(stub, [], 1).run(rows[:1]) == ([], [])
    assert records.path_of(stub, rows[0]).read_bytes() == record
    assert calls(stub) == before
    assert "finished by another runner" in capsys.readouterr().out


def test_every_number_of_a_record_reaches_its_column(tmp_path, rows, stub):
    runner.Runner(stub, [], 1).run(rows[:1])
    record = records.finished(stub, rows[0])
    layers = {"a": {"connected": 3, "weights": 8}, "b": {"connected": 1, "weights": 2}}
    record["result"] |= {"best_accuracy": 0.75, "layers": layers}
    operations = {"a": {"kind": "MAC", "pruned": 11, "dense": 12}, "b": {"kind": "SynOp", "pruned": 13, "dense": 14}}
    energy = {"pruned": 5, "dense": 9}
    record["test"] |= {"structural_connectivity": 0.125, "energy": energy, "operations": operations}
    records.path_of(stub, rows[0]).write_text(json.dumps(record))
    (entry,) = entries.collect(stub, rows[:1], tmp_path / "none")
    assert entry.numbers == {
        "test_accuracy": 0.6,
        "best_accuracy": 0.75,
        "connectivity": 0.25,
        "connected": 4,
        "weights": 10,
        "structural_connectivity": 0.125,
        "synops": 13,
        "macs": 11,
        "energy_pj": 5,
        "pruned_in_all": 2,
        "regrown_in_all": 6,
        "train_seconds": 3,
    }
    counted = {"connected": 3, "weights": 8, "operations": 11}
    assert {key: entry.layers["a"][key] for key in counted} == counted
    assert math.isnan(entry.layers["a"]["positions"])  # it is no layer of this network
    assert entry.neurons == {}


def test_the_layers_of_a_record_reach_their_files_and_outlive_it(tmp_path, rows, stub):
    runner.Runner(stub, [], 1).run(rows[:2])
    record = records.finished(stub, rows[0])
    names = list(measuring.prunable(MnistNet(1)))
    record["result"]["layers"] = {name: {"connected": 30, "weights": 40} for name in names}
    record["test"]["operations"] = {names[1]: {"kind": "SynOp", "pruned": 1.5, "dense": 2}}
    record["test"]["neurons"] = {"fc.0": {"firing_rate": 0.25, "silent": 0.5}, "fc.2": "lost"}
    records.path_of(stub, rows[0]).write_text(json.dumps(record))
    state = torch.get_rng_state()
    first, second = entries.collect(stub, rows[:2], tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(first.layers) == names
    assert first.layers[names[1]] == {"connected": 30, "weights": 40, "positions": 1, "operations": 1.5}
    assert first.neurons["fc.0"] == {"firing_rate": 0.25, "silent": 0.5}
    assert first.synapses == 0.75
    assert (second.layers, second.neurons) == ({}, {})
    assert math.isnan(second.synapses)
    assert replace(second, numbers={"connectivity": 1.0}).synapses == 1  # all of them, whatever the layers are
    (tmp_path / "out").mkdir()
    outcome.write(stub, rows[:2], tmp_path / "out")
    before = contents(tmp_path / "out")
    assert {"layers.csv", "neurons.csv", "layers.md"} <= before.keys()
    assert [line["operations"] for line in csv.DictReader(before["layers.csv"].decode().splitlines())] == ["", "1.5"]
    outcome.write(tmp_path / "empty", rows[:2], tmp_path / "out")
    assert contents(tmp_path / "out") == before
    # a record of the same result without its layers does not lose them; one of another result does
    del record["result"]["layers"], record["test"]["neurons"]
    records.path_of(stub, rows[0]).write_text(json.dumps(record))
    (again, _) = entries.collect(stub, rows[:2], tmp_path / "out")
    assert (again.layers.keys(), again.neurons.keys()) == (first.layers.keys(), first.neurons.keys())
    record["result"]["test_accuracy"] /= 2
    records.path_of(stub, rows[0]).write_text(json.dumps(record))
    (again, _) = entries.collect(stub, rows[:2], tmp_path / "out")
    assert (again.layers, again.neurons) == ({}, {})


def test_the_accuracy_of_the_training_is_kept_where_it_is_known(tmp_path, rows, stub):
    runner.Runner(stub, [], 1).run(rows[:2])
    assert "train_accuracy" not in entries.epochs_csv(entries.collect(stub, rows[:2], tmp_path)).splitlines()[0]
    path = records.state(stub, rows[0]).logs / "results.jsonl"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"train_accuracy": 0.375}) + "\n")
    for _ in range(2):  # from the dump folder, and from the outcome
        text = entries.epochs_csv(entries.collect(stub, rows[:2], tmp_path))
        assert [line["train_accuracy"] for line in csv.DictReader(text.splitlines())] == ["0.375", ""]
        (tmp_path / "epochs.csv").write_text(text)
        (tmp_path / "rows.csv").write_text(entries.rows_csv(entries.collect(stub, rows[:2], tmp_path)))
        stub = tmp_path / "empty"


def test_a_test_from_within_the_next_epoch_is_not_of_the_row(rows, stub):
    runner.Runner(stub, [], 1).run(rows[:1])
    path = records.state(stub, rows[0]).logs / "test.json"
    records.path_of(stub, rows[0]).unlink()
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "position": 5}))
    assert records.write(stub, rows[0])["test"] is None


def test_a_record_with_its_test_is_not_replaced_by_one_without(rows, stub):
    runner.Runner(stub, [], 1).run(rows)
    path = records.path_of(stub, rows[0])
    record = path.read_bytes()
    assert records.write(stub, rows[0])["test"] is not None
    assert path.read_bytes() == record


@pytest.fixture
def waiting(rows, stub):
    """A runner in a process of its own, with two rows that wait in it for a minute."""
    (stub / "wait").write_text("-N")
    program = (
        "import sys, pathlib\n"
        "from reproduce import grid, runner\n"
        "runner.REPOSITORY = pathlib.Path(sys.argv[1]) / 'repository'\n"
        "run = runner.Runner(pathlib.Path(sys.argv[1]) / 'dump', [], 2)\n"
        "print(run.run(grid.load('mnist', pathlib.Path(sys.argv[1]))), run.stopped)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(stub.parent)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while len(list(stub.glob("held-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    return process


def test_a_signal_stops_the_rows_that_run_and_starts_no_other(stub, waiting):
    waiting.send_signal(signal.SIGTERM)
    out, _ = waiting.communicate(timeout=30)  # the stub would sleep for 60 s
    assert out.splitlines()[-1] == f"([], []) {signal.SIGTERM:d}"
    assert len(calls(stub)) == 2
    assert not list((stub / "rows").glob("*.json"))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process does not learn that its parent has ended")
def test_a_request_to_save_ends_no_row_that_does_not_train_yet(stub, waiting):
    waiting.send_signal(signal.SIGUSR1)
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(1)
    waiting.send_signal(signal.SIGTERM)
    out = waiting.communicate(timeout=30)[0]
    assert "status" not in out  # of a row that the first signal has ended


def test_a_record_tells_all_places_where_its_row_was_trained(rows, stub):
    runner.Runner(stub, [], 1).run(rows[:1])
    path = records.state(stub, rows[0]).logs / "run.json"
    info = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**info, "before": [{"precision": "bf16", "device": "stub", "cpu": "Z80"}, None]}))
    made = records.write(stub, rows[0])["run"]
    assert made == {**{key: info[key] for key in records.MADE}, "precision": "bf16, then fp8", "cpu": "Z80, then 6502"}


def test_rows_end_with_a_runner_that_is_killed(stub, waiting):
    import fcntl

    waiting.kill()
    waiting.communicate(timeout=30)
    start = time.monotonic()
    for path in stub.glob("held-*"):
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until the row that holds it has ended
    assert time.monotonic() - start < 30


def test_a_runner_whose_output_nobody_reads_starts_no_other_row(rows, stub, monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(BrokenPipeError):
        runner.Runner(stub, [], 2).run(rows)
    assert calls(stub) == []


RECORD = {"result": {"test_accuracy": 0.5, "connectivity": 0.25}, "test": None, "run": {}}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "damaged, not JSON"),
        (b"[]", "not a JSON object"),
        (b'{"a": 1}', "it is not of this row"),
        (b"\xff\x00", "damaged, not JSON"),
        (b"[" * 100_000, "damaged, not JSON"),
        ({"row": "another"}, "it is not of this row"),
        ({"epochs": 2}, "it is not of this row"),
        ({"result": []}, "it has no test_accuracy from 0 to 1"),
        ({"result": {"test_accuracy": 0.5}}, "it has no connectivity from 0 to 1"),
        ({"result": {"test_accuracy": 10**18, "connectivity": 0.5}}, "it has no test_accuracy from 0 to 1"),
        ({"result": RECORD["result"] | {"layers": [1]}}, "its layers is not a JSON object"),
        ({"test": []}, "its test is not a JSON object"),
        ({"test": {"operations": "all"}}, "its operations is not a JSON object"),
        ({"test": {"neurons": 5}}, "its neurons is not a JSON object"),
        ({"run": None}, "its run is not a JSON object"),
        (None, "not a regular file"),
    ],
)
def test_a_damaged_record_is_named_and_its_row_is_not_done(tmp_path, monkeypatch, capsys, rows, stub, content, reason):
    monkeypatch.setattr(reproduce.grid, "load", lambda experiment: rows)
    for figure in ("plane", "curves"):
        monkeypatch.setattr(f"reproduce.figures.{figure}", lambda *settings, **more: b"")
    path, other = (records.path_of(stub, row) for row in rows[:2])
    path.parent.mkdir()
    whole, second = ({"row": row.key, "epochs": row.epochs, **RECORD} for row in rows[:2])
    other.write_text(json.dumps(second))
    path.write_text(json.dumps(whole))
    assert records.damaged(stub, rows) == []  # but for the change it is one
    if content is None:
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(whole | content).encode())
    line = f"{path} is damaged ({reason}): the row counts as not done until it is run again\n"
    assert reproduce.main(["mnist", "--list", "--dump-dir", str(stub)]) == 0
    out, err = capsys.readouterr()
    assert err == line
    assert out.splitlines()[:2] == [f"to do  {rows[0].command}", f"done   {rows[1].command}"]
    assert "1 of 8 rows done" in out
    assert reproduce.main(["mnist", "--dump-dir", str(stub), "--outcome", str(tmp_path / "results")]) == 0
    assert capsys.readouterr().err == line
    recorded = entries.recorded(tmp_path / "results")
    assert [entry["command"] for entry in recorded] == [rows[1].command]
    if content == b"":
        assert runner.Runner(stub, [], 1).run(rows[:1]) == ([], [])
        assert records.damaged(stub, rows) == []
        assert len(entries.collect(stub, rows, tmp_path / "none")) == 2


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("test.json", "{", "test.json: damaged, not JSON"),
        ("test.json", "[1]", "test.json: not a JSON object"),
        ("test.json", '{"epoch": 1, "operations": 5}', "its operations is not a JSON object"),
        ("results.jsonl", "{\n", "results.jsonl has no epoch 1; "),
        ("results.jsonl", '{"epoch": 1, "connectivity": 0.5}\n', "it has no test_accuracy from 0 to 1"),
    ],
)
def test_a_row_whose_results_are_damaged_fails_and_the_others_go_on(rows, stub, capsys, file, content, reason):
    """They are damaged behind the back of the script that wrote them, here by its second call."""
    path = stub.parent / "repository" / "mnist" / "mnist.py"
    damage = f"    if value('-penalty') == '1e-2': (logs / {file!r}).write_text({content!r})\n" if file else ""
    text = path.read_text("utf-8").replace('"accuracy": 0.5}))\n', f'"accuracy": 0.5}}))\n{damage}')
    path.write_text(text.replace("value('-penalty')", "'-penalty' in argv and value('-penalty')"))
    failed, taken = runner.Runner(stub, [], 2).run(rows[:3])
    assert ([row.key for row in failed], taken) == ([rows[2].key], [])
    assert not records.path_of(stub, rows[2]).exists()
    out = capsys.readouterr().out
    assert f"{rows[2].key} failed: " in out
    assert reason in out
    assert "2 of 3 rows done" in out


def test_a_row_that_cannot_be_started_fails_and_the_others_go_on(rows, stub, capsys):
    for row in rows[:2]:
        runner.log_of(stub, row).mkdir(parents=True)  # no file can be there
    failed, taken = runner.Runner(stub, [], 2).run(rows[:3])
    assert ([row.key for row in failed], taken) == ([row.key for row in rows[:2]], [])
    assert f"{rows[0].key} failed: [Errno" in capsys.readouterr().out
    assert records.finished(stub, rows[2]) is not None
    assert "cannot be read" in runner._last_line(runner.log_of(stub, rows[0]))


def test_texts_that_cannot_be_written_do_not_break_an_outcome(tmp_path, rows, stub):
    path = records.path_of(stub, rows[0])
    path.parent.mkdir()
    made = {"cpu": "\ud800\n", "device": ["no text"], "versions": {"\ud800": "9"}}
    path.write_text(json.dumps({"row": rows[0].key, "epochs": 1, **RECORD, "run": made}))
    (tmp_path / "rows.csv").write_text(entries.rows_csv(entries.collect(stub, rows[:1], tmp_path)))
    (line,) = entries.recorded(tmp_path)
    assert [line[key] for key in records.MADE] == ["��", "", "", "� 9", ""]


def test_an_outcome_from_before_the_precision_was_in_it_is_read(tmp_path, rows, stub):
    runner.Runner(stub, [], 1).run(rows[:1])
    lines = list(csv.DictReader(entries.rows_csv(entries.collect(stub, rows[:1], tmp_path)).splitlines()))
    assert lines[0].pop("precision") == "fp8"
    with open(tmp_path / "rows.csv", "w") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    (line,) = entries.recorded(tmp_path)
    assert (line["precision"], line["device"]) == ("", "stub")
    (entry,) = entries.collect(tmp_path / "empty", rows[:1], tmp_path)
    assert (entry.made["precision"], entry.made["device"]) == ("", "stub")


def test_a_lost_line_does_not_shift_the_epochs_behind_it(tmp_path, rows, stub):
    runner.Runner(stub, [], 1).run(rows[3:4])
    path = records.state(stub, rows[3]).logs / "results.jsonl"
    first, second = path.read_text("utf-8").splitlines()
    path.write_text(f"{first[:20]}\n{second}\n")
    assert records.progress(stub, rows[3:4]).epochs_left == 0
    for dump in (stub, tmp_path / "empty"):  # from the dump folder, and from the outcome
        text = entries.epochs_csv(entries.collect(dump, rows[3:4], tmp_path))
        lines = [(line["epoch"], line["test_accuracy"]) for line in csv.DictReader(text.splitlines())]
        assert lines == [("1", ""), ("2", "0.7")]
        (entry,) = entries.collect(dump, rows[3:4], tmp_path)
        assert all(math.isnan(entry.numbers[key]) for key in entries.SUMS)  # not the sums of what is left
        (tmp_path / "epochs.csv").write_text(text)
        (tmp_path / "rows.csv").write_text(entries.rows_csv(entries.collect(dump, rows[3:4], tmp_path)))


@pytest.mark.parametrize("left", [None, "", "another"])
def test_an_outcome_keeps_the_epochs_whose_logs_are_lost(tmp_path, rows, stub, left):
    """Unless the row has been trained again since, with other results."""
    runner.Runner(stub, [], 1).run(rows[3:4])
    (entry,) = entries.collect(stub, rows[3:4], tmp_path)
    assert not any(math.isnan(entry.numbers[key]) for key in entries.SUMS)
    (tmp_path / "rows.csv").write_text(entries.rows_csv([entry]))
    (tmp_path / "epochs.csv").write_text(entries.epochs_csv([entry]))
    results = records.state(stub, rows[3]).logs / "results.jsonl"
    if left is None:
        shutil.rmtree(results.parent)
    else:
        results.write_text("")
    if left == "another":
        record = json.loads(records.path_of(stub, rows[3]).read_text("utf-8"))
        record["result"]["test_accuracy"] /= 2
        records.path_of(stub, rows[3]).write_text(json.dumps(record))
    (again,) = entries.collect(stub, rows[3:4], tmp_path)
    if left == "another":
        assert again.epochs == []
        assert all(math.isnan(again.numbers[key]) for key in entries.SUMS)
    else:
        assert again == entry


# -- the command ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", ""])
def test_a_shard_that_is_none_is_refused(shard, tmp_path, capsys):
    assert reproduce.main(["mnist", "--list", "--dump-dir", str(tmp_path), f"--shard={shard}"]) == 2
    err = capsys.readouterr().err
    assert "argument --shard: must be I/N" in err
    assert err.count("\n") == 1


def test_the_list_says_what_is_done_and_what_is_left(tmp_path, monkeypatch, capsys, rows, stub):
    monkeypatch.setattr(reproduce.grid, "load", lambda experiment: rows)
    runner.Runner(stub, [], 2).run(rows[:2])
    capsys.readouterr()
    assert reproduce.main(["mnist", "--list", "--dump-dir", str(stub), "--jobs", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [f"{'done   ' if row in rows[:2] else 'to do  '}{row.command}" for row in rows]
    assert lines[-1] == "2 of 8 rows done, 6 epochs left, about 12 seconds"
    (stub / "fail").write_text("--seed 1")
    assert reproduce.main(["mnist", "--dump-dir", str(stub), "--jobs", "2", "--shard", "1/1"]) == 1
    assert "3 rows failed:" in capsys.readouterr().out


def test_some_titles_or_the_first_rows_are_run_alone(tmp_path, monkeypatch, capsys, rows, stub):
    monkeypatch.setattr(reproduce.grid, "load", lambda experiment: rows)

    def listed(*argv):
        assert reproduce.main(["mnist", "--list", "--dump-dir", str(stub), *argv]) == 0
        return [line.removeprefix("to do  ") for line in capsys.readouterr().out.splitlines()[:-1]]

    def of(*some):
        return [row.command for row in some]

    grad, high = [row for row in rows if row.title == "Grad R"], rows[4]
    assert listed("--title", "Grad R") == of(*grad)
    assert listed("--title", "high rate", "--title", "Grad R") == of(*grad[:2], high, *grad[2:])
    assert listed("--first", "2") == of(*rows[:2])
    assert listed("--first", "99") == of(*rows)
    assert listed("--first", "3", "--title", "Grad R") == of(*grad[:3])
    assert listed("--first", "3", "--shard", "2/2") == of(rows[1])
    assert reproduce.main(["mnist", "--dump-dir", str(stub), "--first", "1", "--title", "Grad R"]) == 0
    assert [row for row in rows if records.finished(stub, row)] == grad[:1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--title", "Deep"],
            r"argument --title: 'Deep' is no title of the rows: 'dense', 'Grad R', 'long' or 'high rate'",
        ),
        (["--first", "0"], r"argument --first: must be "),
        (["--first", "2", "--outcome", "results"], r"argument --first: not allowed with --outcome"),
        (["--title", "Grad R", "--outcome", "results"], r"argument --title: not allowed with --outcome"),
    ],
)
def test_a_choice_of_rows_that_is_none_is_refused(argv, message, tmp_path, monkeypatch, capsys, rows):
    monkeypatch.setattr(reproduce.grid, "load", lambda experiment: rows)
    monkeypatch.chdir(tmp_path)
    assert reproduce.main(["mnist", "--dump-dir", str(tmp_path), *argv]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err)
    assert err.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_a_list_whose_reader_ends_is_no_error(tmp_path):
    """As of ``| head``, here before the first line."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "reproduce", "mnist", "--list", "--dump-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=REPOSITORY, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, "")


# Stands for the runner in a task of a job array; argv is kept, and by which signal it was stopped.
TASK = """
import pathlib, signal, sys, time
here = pathlib.Path(__file__).parent
def stop(number, frame):
    (here / "stopped").write_text(str(number))
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
(here / "argv").write_text("\\n".join(sys.argv[1:]))
deadline = time.monotonic() + 60
while (here / "wait").exists() and time.monotonic() < deadline:
    time.sleep(0.05)
sys.exit(3)
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A folder, with a blank in its name, and what starts a task of the array there as Slurm would; all is stubs."""
    place = tmp_path / "a place" / "reproduce"
    place.mkdir(parents=True)
    (place / "__main__.py").write_text(TASK)
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" > "{place}/scontrol"\n')
    scontrol.chmod(0o755)
    for module in (reproduce, slurm):
        monkeypatch.setattr(module, "REPOSITORY", place.parent)
    argv = ["--slurm", str(tmp_path / "array.sh"), "--jobs", "4", "--dump-dir", str(tmp_path / "the dump")]
    assert reproduce.main(["mnist", *argv]) == 0
    ids = {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "2"}

    def start():
        environment = {**os.environ, **ids, "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
        return subprocess.Popen(["bash", str(tmp_path / "array.sh")], env=environment)

    return place, start


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def test_a_task_of_the_array_runs_its_shard_and_fails_as_it_does(task, tmp_path):
    runs = len({row.name for row in grid.load("mnist")})
    tasks = -(-runs // 4)
    text = (tmp_path / "array.sh").read_text("utf-8")
    for line in (f"--array=1-{tasks}", "--signal=B:USR1@300", "--requeue", "--open-mode=append"):
        assert f"\n#SBATCH {line}\n" in text
    place, start = task
    assert start().wait(60) == 3
    argv = ["mnist", "--shard", f"2/{tasks}", "--jobs", "4", "--dataset-dir", str(place.parent / "data")]
    assert (place / "argv").read_text("utf-8").splitlines() == [*argv, "--dump-dir", str(tmp_path / "the dump")]
    assert (tmp_path / "the dump" / "rows").is_dir()  # where the array's logs go
    assert not (place / "scontrol").exists()


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, "requeue 77_2\n"), (signal.SIGTERM, None)])
def test_a_warned_task_stops_its_rows_and_queues_again(task, number, requeued):
    place, start = task
    (place / "wait").touch()
    process = start()
    wait_for(place / "argv")
    process.send_signal(number)
    process.wait(60)
    assert (place / "stopped").read_text("utf-8") == str(int(signal.SIGTERM))
    assert ((place / "scontrol").read_text("utf-8") if requeued else None) == requeued
    assert (place / "scontrol").exists() == bool(requeued)


def test_a_task_of_an_array_takes_the_chosen_rows_only(tmp_path):
    array = tmp_path / "array.sh"
    argv = ["--slurm", str(array), "--dump-dir", str(tmp_path), "--title", "Grad R", "--first", "3"]
    assert reproduce.main(["c10-narrow", *argv, "--title", "Deep R"]) == 0
    text = array.read_text("utf-8")
    assert "\n#SBATCH --array=1-3\n" in text
    words = shlex.split(re.search(r"-m (reproduce .*?)&", text, re.DOTALL)[1].replace("\\\n", " "))
    assert words[:2] == ["reproduce", "c10-narrow"]
    assert words[-6:] == ["--title", "Grad R", "--title", "Deep R", "--first", "3"]


def test_an_array_is_of_all_rows(tmp_path, capsys):
    assert reproduce.main(["mnist", "--slurm", str(tmp_path / "array.sh"), "--shard", "1/2"]) == 2
    assert "argument --shard: not allowed with --slurm" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--outcome", "--slurm", "--dump-dir"])
def test_a_place_that_cannot_be_written_to_is_refused(option, tmp_path, capsys):
    (tmp_path / "file").touch()
    argv = ["mnist", option, str(tmp_path / "file" / "below")]
    assert reproduce.main([*argv, "--slurm", str(tmp_path / "x")] if option == "--dump-dir" else argv) == 2
    assert re.match(rf".*: error: argument {option}: cannot write {tmp_path / 'file'}", capsys.readouterr().err)
    assert reproduce.main([*argv[:1], option, ""]) == 2
    assert re.search(rf"argument {option}: must be the path of a (folder|file)", capsys.readouterr().err)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_row_runs_by_the_real_script(tmp_path, monkeypatch, ranks):
    monkeypatch.setattr(device, "cores", lambda: 1)
    table = TABLE.replace("seeds = [2020, 1]", "seeds = [2020]").replace("-lr 1e-2", "-lr 1e-2 -T 2", 1)
    (tmp_path / "mnist.toml").write_text(table)
    row = grid.load("mnist", tmp_path)[1]
    assert runner.Runner(tmp_path, [], 1, ranks).run([row]) == ([], []), runner.log_of(tmp_path, row).read_text("utf-8")
    record = json.loads(records.path_of(tmp_path, row).read_text("utf-8"))
    assert record["test"]["epoch"] == 1
    assert record["test"]["accuracy"] == record["result"]["test_accuracy"]
    assert record["test"]["operations"]
    assert record["run"]["versions"]["torch"]
    assert record["run"]["cpu"] == processor()
    info = json.loads((records.state(tmp_path, row).logs / "run.json").read_text("utf-8"))
    assert record["run"] == {key: info[key] for key in records.MADE}
    assert info["ranks"] == ranks


# -- the outcome ---------------------------------------------------------------------------------------


def test_the_outcome_has_means_spreads_and_every_row(tmp_path, monkeypatch, capsys, rows, stub):
    monkeypatch.setattr(reproduce.grid, "load", lambda experiment: rows)
    done = [*rows[:3], *rows[4:7]]  # without the long row, and a seed of Grad R
    runner.Runner(stub, [], 4).run(done)
    for row, accuracy in zip(done, (0.97, 0.95, 0.9, 0.5, 0.95, 0.96), strict=True):
        record = records.finished(stub, row)
        record["result"]["test_accuracy"] = accuracy
        record["result"]["layers"] = {"a": {"connected": 1500, "weights": 4000}, "b": {"connected": 5, "weights": 20}}
        record["test"]["operations"] = {"fc": {"kind": "SynOp", "pruned": 1234.4, "dense": 5000.0}}
        records.path_of(stub, row).write_text(json.dumps(record))
    folder = tmp_path / "results"
    assert reproduce.main(["mnist", "--dump-dir", str(stub), "--outcome", str(folder)]) == 0
    pictures = {"plane.png", "epochs.png", "rewiring.png", "ablations.png"}
    texts = {"rows.csv", "epochs.csv", "layers.csv", "table.md", "countings.md", "layers.md", "commands.md"}
    texts |= {"equal_connectivity.md", "equal_synops.md"}
    assert {path.name for path in folder.iterdir()} == {*texts, *pictures}
    out = capsys.readouterr().out
    assert all(str(path) in out for path in folder.iterdir())
    table = (folder / "table.md").read_text("utf-8")
    assert table.startswith("# mnist\n\n6 of 8 rows")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[6:]]
    assert cells[0][:6] == ["dense", "`-lr 1e-2`", "1", "2", "96.00 ± 1.41", "0.00 ± 1.41"]
    assert cells[1][:6] == ["Grad R", "`-s 0.95 -penalty 1e-3 -lr 1e-2`", "1", "2", "95.50 ± 0.71", "0.50 ± 0.71"]
    assert cells[1][6:] == ["25.00 ± 0.00", "1 505 ± 0", "1 234 ± 0", "-", "6 ± 0"]
    assert cells[2][3:6] == ["1", "90.00", "6.00"]
    assert cells[3][:6] == ["high rate", "`-lr 1e-1`", "1", "1", "50.00", "0.00"]  # against its own learning rate
    lines = list(csv.DictReader((folder / "rows.csv").open()))
    assert [line["command"] for line in lines] == [row.command for row in done]
    assert (lines[1]["test_accuracy"], lines[1]["macs"], lines[1]["seed"]) == ("0.95", "", "2020")
    made, left = (folder / "commands.md").read_text("utf-8").split("Not run yet")
    assert "6502; stub; precision fp8; torch 9; commit c0ffee" in made
    assert all(row.command in made for row in done)
    assert all(row.command in left for row in (rows[3], rows[7]))
    for name in pictures:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_the_plane_shows_a_method_in_one_colour_and_its_epochs_apart():
    titles = [f"method {i}" for i in range(12)]
    lines = [*((title, 60) for title in titles), *((title, 512) for title in titles[:2]), (titles[1], 20)]
    looks = figures.line_looks(lines)
    assert list(looks) == lines
    assert len({(look["color"], look["marker"]) for look in looks.values()}) == len(titles)
    short, long, other = (looks[titles[1], epochs] for epochs in (60, 512, 20))
    assert {(look["color"], look["marker"]) for look in (long, other)} == {(short["color"], short["marker"])}
    assert len({look["linestyle"] for look in (short, long, other)}) == 3
    assert ("markerfacecolor" in short, "markerfacecolor" in long) == (False, True)


@pytest.mark.parametrize(
    ("epochs", "beside"),
    [(1, {("dense", 1), ("Grad R", 1)}), (2, {("dense", 2)})],  # "long" is called dense here
)
def test_the_ablations_are_shown_beside_the_methods_of_as_many_epochs(tmp_path, monkeypatch, stub, epochs, beside):
    table = TABLE.replace('"long"', '"dense"').replace("ablation = true", f"ablation = true\nepochs = {epochs}")
    (tmp_path / "mnist.toml").write_text(table)
    rows = grid.load("mnist", tmp_path)
    runner.Runner(stub, [], 4).run(rows)
    shown = []
    monkeypatch.setattr("reproduce.figures.plane", lambda summaries, heading: shown.append(summaries) or b"")
    outcome.write(stub, rows, tmp_path)
    methods, ablations = ({summary.line for summary in some} for some in shown)
    assert methods == {("dense", 1), ("Grad R", 1), ("dense", 2)}
    assert ablations == {*beside, ("high rate", epochs)}


def test_a_dense_grid_has_an_outcome_too(tmp_path, rows, stub):
    runner.Runner(stub, [], 1).run(rows[:1])
    names = [path.name for path in outcome.write(stub, rows[:1], tmp_path)]
    texts = ["rows.csv", "epochs.csv", "table.md", "commands.md"]  # nothing to count or to compare
    assert names == [*texts, "plane.png", "epochs.png"]
    (tmp_path / "other").mkdir()
    assert [path.name for path in outcome.write(stub, rows[1:2], tmp_path / "other")] == texts


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A folder with a dump folder in which all rows but the last have run, and their outcome."""
    folder = tmp_path_factory.mktemp("ran")
    rows = rows_in(folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        dump = stub_in(folder, monkeypatch)
        runner.Runner(dump, [], 4).run(rows[:-1])
    (folder / "results").mkdir()
    outcome.write(dump, rows, folder / "results")
    return folder


@pytest.fixture
def results(tmp_path, stub, ran):
    """A folder with the outcome of all rows but the last, which have run in the dump folder."""
    shutil.copytree(ran / "dump", stub, dirs_exist_ok=True)
    return shutil.copytree(ran / "results", tmp_path / "results")


@pytest.mark.parametrize("name", ["mnist", "c10-narrow"])
def test_the_texts_of_the_kept_results_are_written_again_as_they_are(tmp_path, monkeypatch, name):
    for figure in ("plane", "curves"):
        monkeypatch.setattr(figures, figure, lambda *settings, **more: b"")
    shutil.copytree(REPOSITORY / "results" / name, tmp_path / name)
    before = contents(tmp_path / name)
    outcome.write(tmp_path / "empty", grid.load(name), tmp_path / name)
    after = contents(tmp_path / name)
    assert before.keys() == after.keys()
    for name in before:
        assert name.endswith(".png") or before[name] == after[name], name


def test_a_grid_that_is_not_finished_has_an_outcome_the_same_every_time(tmp_path, monkeypatch, stub):
    table = 'experiment = "mnist"\ntitle = "width {width}, T {T}, {epoch} epochs"\n' + TABLE
    (tmp_path / "small.toml").write_text(table)
    rows = grid.load("small", tmp_path)
    monkeypatch.setattr(reproduce.grid, "load", lambda name: rows)
    headings = []
    original = figures._png
    monkeypatch.setattr(figures, "_png", lambda figure, text: headings.append(text) or original(figure, text))
    runner.Runner(stub, [], 1).run([rows[0], rows[2]])
    contents = []
    for _ in range(2):
        assert reproduce.main(["mnist", "--dump-dir", str(stub), "--outcome", str(tmp_path / "out")]) == 0
        contents.append({path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()})
    assert contents[0] == contents[1]
    assert contents[0]["table.md"].startswith(b"# width 800, T 8, 1 epochs\n\n2 of 8 rows")
    assert all(text.startswith("width 800, T 8, 1 epochs: ") for text in headings)
    assert len(headings) == 6  # plane, epochs and rewiring, twice


@pytest.mark.parametrize(("options", "shown"), [("", True), ("-T 4", False), ("--width 32", False)])
def test_published_results_are_shown_beside_those_of_the_published_network(options, shown, monkeypatch):
    labels = []
    monkeypatch.setattr(figures, "_png", lambda figure, text: labels.extend(figure.legends[0].get_texts()))
    argv = shlex.split(f"-m no_prune -N 1 {options}")
    row = grid.Row("c10", "c10", "dense", False, tuple(argv), read(EXPERIMENTS["c10"], argv))
    numbers = {"test_accuracy": 0.5, "connectivity": 1.0}
    figures.plane([tables.Summary((entries.Entry(row, numbers, {}, []),), ())], "")
    assert any("published" in label.get_text() for label in labels) == shown


def test_an_outcome_outlives_the_dump_folder(tmp_path, rows, stub, results):
    before = contents(results)
    assert before["table.md"].startswith(b"# mnist\n\n7 of 8 rows")
    outcome.write(tmp_path / "empty", rows, results)
    assert contents(results) == before
    other = tmp_path / "other dump"
    other.mkdir()
    runner.Runner(other, [], 2).run([rows[0], rows[-1]])  # one anew, one that is not there yet
    record = records.finished(other, rows[0])
    record["result"]["test_accuracy"] = 0.875
    records.path_of(other, rows[0]).write_text(json.dumps(record))
    outcome.write(other, rows, results)
    lines = list(csv.DictReader((results / "rows.csv").open()))
    assert [line["command"] for line in lines] == [row.command for row in rows]
    accuracies = [line["test_accuracy"] for line in lines]
    assert accuracies == ["0.875", "0.6", "0.6", "0.7", "0.6", "0.6", "0.6", "0.6"]
    epochs = list(csv.DictReader((results / "epochs.csv").open()))
    assert [(line["row"], line["epoch"]) for line in epochs] == [
        (row.key, str(epoch)) for row in rows for epoch in range(1, row.epochs + 1)
    ]
    keys = ("test_accuracy", "connectivity", "pruned", "regrown")
    assert [epochs[4][key] for key in keys] == ["0.7", "0.25", "2", "6"]  # the second of the long row
    assert (results / "table.md").read_text("utf-8").startswith("# mnist\n\n8 of 8 rows")


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            "rows.csv",
            "-penalty 1e-3 -N",
            "-penalty 2e-3 -N",
            "rows.csv: this row is not in the grid and would be lost: python",
        ),
        ("rows.csv", "best_accuracy", "best", "rows.csv: a line has no best_accuracy"),
        ("rows.csv", ",0.6,", ",much,", "rows.csv: not a number: 'much'"),
        ("rows.csv", ",0.6,", ",inf,", "rows.csv: not a number: 'inf'"),
        ("epochs.csv", ",0.6,", ",much,", "epochs.csv: not a number: 'much'"),
        ("epochs.csv", ",2,6", "", "epochs.csv: a line has no pruned"),
        ("epochs.csv", "-N-1,1,", "-N-1,1000000000000000000,", "epochs.csv: not an epoch of lr-"),
        ("epochs.csv", "row,epoch", '"row,epoch', "epochs.csv: cannot be read"),
    ],
)
def test_an_outcome_that_is_not_of_the_grid_is_not_written_over(
    file, old, new, message, tmp_path, monkeypatch, capsys, rows, results
):
    monkeypatch.setattr(reproduce.grid, "load", lambda experiment: rows)
    text = (results / file).read_text("utf-8")
    assert old in text
    (results / file).write_text(text.replace(old, new))
    before = contents(results)
    capsys.readouterr()
    assert reproduce.main(["mnist", "--dump-dir", str(tmp_path / "empty"), "--outcome", str(results)]) == 2
    assert contents(results) == before
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_rows_of_an_outcome_are_left_out(tmp_path, monkeypatch, capsys, rows, stub, results):
    real = grid.load("mnist")
    monkeypatch.setattr(reproduce.grid, "load", lambda experiment: rows)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    options = ["mnist", "--dump-dir", str(fresh), "--without", str(results)]
    capsys.readouterr()
    assert reproduce.main([*options, "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"to do  {rows[-1].command}", "0 of 1 rows done, 1 epochs left"]
    assert reproduce.main(options) == 0
    assert [line.split(" --dataset-dir")[0] for line in calls(fresh) if line.startswith("start")] == 2 * [
        f"start {' '.join(rows[-1].argv)}"
    ]
    monkeypatch.setattr(reproduce.grid, "load", lambda experiment: real)
    lines = (results / "rows.csv").read_text("utf-8").splitlines()
    for line, row in enumerate(real[:5], 1):
        lines[line] = f"{lines[line].rpartition(',')[0]},{row.command}"
    (results / "rows.csv").write_text("\n".join(lines))
    tasks = []
    for argv in ([], ["--without", str(results)]):
        assert reproduce.main(["mnist", "--dump-dir", str(fresh), "--slurm", str(tmp_path / "array.sh"), *argv]) == 0
        text = (tmp_path / "array.sh").read_text("utf-8")
        assert ("--without" in text) == bool(argv)
        tasks.append(int(re.search("--array=1-([0-9]+)", text)[1]))
    assert f"--dump-dir {fresh} --without {results} &\n" in text
    assert tasks == [len({row.name for row in some}) for some in (real, real[5:])]
    monkeypatch.setattr(reproduce.grid, "load", lambda experiment: real[:5])
    (tmp_path / "array.sh").unlink()
    assert reproduce.main([*options, "--slurm", str(tmp_path / "array.sh")]) == 2
    assert "argument --slurm: no row is left to run" in capsys.readouterr().err
    assert not (tmp_path / "array.sh").exists()


def test_rows_are_left_out_by_a_sound_outcome_only(tmp_path, monkeypatch, capsys, rows, results):
    monkeypatch.setattr(reproduce.grid, "load", lambda experiment: rows)
    argv = ["mnist", "--list", "--dump-dir", str(tmp_path / "none"), "--without", str(results)]
    assert reproduce.main(argv) == 0
    path = results / "rows.csv"
    path.write_text(path.read_text("utf-8").replace(",0.6,", ",much,"))
    assert reproduce.main(argv) == 2
    assert "rows.csv: not a number: 'much'" in capsys.readouterr().err


def test_a_folder_without_an_outcome_has_no_rows_to_leave_out(tmp_path, capsys):
    assert reproduce.main(["mnist", "--list", "--without", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count(f"argument --without: no outcome of finished rows in {tmp_path}") == 1
    for option, value in (("--without", str(tmp_path)), ("--shard", "1/2")):
        assert reproduce.main(["mnist", "--outcome", str(tmp_path / "new"), option, value]) == 2
        assert f"argument {option}: not allowed with --outcome" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_front_has_what_is_most_accurate_with_so_few_connections():
    points = [(0.5, 0.9), (0.04, 0.8), (0.01, 0.6), (0.16, 0.8), (0.25, 0.95), (0.04, 0.7), (0.0, 0.99)]
    front = [(0.01, 0.6), (0.04, 0.8), (0.25, 0.95)]
    assert tables.front(points) == front
    assert tables.accuracy_at(points, 0.02) == pytest.approx(0.7)  # half way in the logarithm
    assert tables.accuracy_at(points, 0.1) == pytest.approx(0.875)
    for connectivity, accuracy in [*front, (0.5, 0.95), (1.0, 0.95)]:
        assert tables.accuracy_at(points, connectivity) == accuracy
    assert tables.accuracy_at(points, 0.009) != tables.accuracy_at(points, 0.009)  # NaN
    assert tables.accuracy_at([(0.0, 0.1)], 0.5) != 0.1


def test_methods_are_compared_at_equal_connectivity():
    def entry(title, seed, connectivity, accuracy, penalty, epochs=60, ablation=False):
        argv = shlex.split(f"-m grad -s 0.95 -penalty {penalty} -N {epochs} --seed {seed}")
        row = grid.Row("mnist", "mnist", title, ablation, tuple(argv), read(EXPERIMENTS["mnist"], argv))
        return entries.Entry(row, {"connectivity": connectivity, "test_accuracy": accuracy}, {}, [])

    some = [
        *(entry("Grad R", 1, 0.5, 0.98, 1), entry("Grad R", 1, 0.02, 0.90, 2)),
        *(entry("Grad R", 2, 0.5, 0.96, 1), entry("Grad R", 2, 0.01, 0.90, 2)),
        entry("Grad R", 3, 0.5, 0.10, 1),  # a seed whose other variant is not finished
        *(entry("Deep R", 1, 0.25, 0.97, 1), entry("Deep R", 1, 0.05, 0.95, 2)),
        *(entry("Deep R", 3, 0.25, 0.99, 1), entry("Deep R", 3, 0.05, 0.99, 2)),
        entry("alone", 1, 0.25, 0.97, 1),
        *(entry("Grad R", 1, 0.5, 0.5, 1, epochs=512), entry("Grad R", 1, 0.25, 0.5, 2, epochs=512)),
    ]
    text = tables.equal(tables.summarise(some), "connectivity")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert cells[0] == ["method", "epochs", "seeds", "50 %", "25 %", "10 %", "5 %", "3 %", "2 %", "1.5 %", "1 %"]
    (first, second, long, lead) = (line for line in cells if line[0] in ("Grad R", "Deep R"))
    assert first[:4] == ["Grad R", "60", "2", "97.00 ± 1.41"]
    assert first[8:] == ["90.53 ± 0.75", "-", "-"]  # 90.00 and 91.06; below 2 % one of the seeds has nothing
    assert second == ["Deep R", "60", "2", "98.00 ± 1.41 †", "98.00 ± 1.41", "97.43 ± 2.22", "97.00 ± 2.83", *4 * ["-"]]
    assert long == ["Grad R", "512", "1", "50.00", "50.00", *6 * ["-"]]
    assert lead[:5] == ["Deep R", "60", "1", "1.00 †", "-0.72"]  # seed 1 alone: 98.00 - 97.00, 96.28 - 97.00
    assert "alone" not in text


def test_a_connectivity_may_be_missed_by_a_thousandth():
    """As by a run that is given it: of 596 832 weights, 5969 are a little more than a hundredth."""
    points = [(5969 / 596832, 0.1), (0.1, 0.5)]
    assert tables.accuracy_at(points, [0.01, 0.1]).tolist() == [0.1, 0.5]
    assert math.isnan(tables.accuracy_at([(0.0101, 0.1), (0.1, 0.5)], 0.01))


def test_a_number_that_one_seed_lacks_is_not_that_of_the_others():
    assert tables.spread([1.0, math.nan, 3.0], str) == "-"


def test_a_loss_of_nothing_has_no_sign():
    """The mean of the dense network's losses against its own mean is 0 only up to rounding; a gain keeps its sign."""
    _, show = tables.TABLE["loss against dense (points)"]
    assert tables.spread([-0.00761, 0.0076], show) == "0.00 ± 1.08"
    assert tables.spread([-0.0001], show) == "-0.01"


def test_results_are_counted_in_every_way():
    def entry(options, accuracy, best, connectivity, path, synops, macs, seed=1):
        argv = shlex.split(f"{options} -N 60 --seed {seed}")
        row = grid.Row("mnist", "mnist", "a method", False, tuple(argv), read(EXPERIMENTS["mnist"], argv))
        numbers = {"test_accuracy": accuracy, "best_accuracy": best, "synops": synops, "macs": macs}
        numbers |= {"connectivity": connectivity, "structural_connectivity": path}
        return entries.Entry(row, numbers, {}, [])

    grad = "-m grad -s 0.95 -penalty 1e-2"
    some = [
        entry("-m no_prune", 0.90, 0.94, 1, 1, 1000, 8000),
        entry("-m no_prune", 0.92, 0.96, 1, 1, 3000, 8000, seed=2),
        entry(grad, 0.87, 0.90, 0.11, 0.1, 500, 1000),
        entry(grad, 0.89, 0.92, 0.11, 0.1, 700, 1000, seed=2),
        entry(f"{grad} -lr 1e-2", 0.87, 0.90, 0.11, 0.1, 500, 1000),  # no dense row of its learning rate
    ]
    lines = tables.countings(tables.summarise(some)).splitlines()
    head, _, dense, row = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    assert dense[4:10] == ["91.00 ± 1.41", "95.00 ± 1.41", "0.00 ± 1.41", "4.00 ± 1.41", "-4.00 ± 1.41", "0.00 ± 1.41"]
    assert dict(zip(head, row, strict=True)) == {
        "method": "a method",
        "options": "`-s 0.95 -penalty 1e-2 -lr 1e-4`",
        "epochs": "60",
        "seeds": "2",
        "last epoch (%)": "88.00 ± 1.41",
        "best epoch (%)": "91.00 ± 1.41",
        "loss, last against last": "3.00 ± 1.41",
        "last against best": "7.00 ± 1.41",
        "best against last": "0.00 ± 1.41",
        "best against best": "4.00 ± 1.41",
        "connectivity (%)": "11.00 ± 0.00",
        "on a path (%)": "10.00 ± 0.00",
        "SynOps (% of dense)": "30.00 ± 7.07",
        "with the first layer": "16.00 ± 1.41",
    }
    assert tables.countings(tables.summarise(some[:2])) == ""  # dense rows alone


def test_methods_are_compared_at_equal_synapses_and_synops():
    """By each cost the order is another one here; a row whose layers are not known is not compared by its synapses."""

    def entry(options, seed, accuracy, connectivity, synapses, synops):
        argv = shlex.split(f"{options} -N 60 --seed {seed}")
        title = METHODS[argv[1]].label
        row = grid.Row("mnist", "mnist", title, False, tuple(argv), read(EXPERIMENTS["mnist"], argv))
        numbers = {"test_accuracy": accuracy, "connectivity": connectivity, "synops": synops}
        layers = {  # of a hundred weights at ten positions, and of as many at one
            "conv": {"connected": 100 * synapses[0], "weights": 100.0, "positions": 10.0},
            "fc": {"connected": 100 * synapses[1], "weights": 100.0, "positions": 1.0},
        }
        return entries.Entry(row, numbers, {}, [], layers if synapses != (0, 0) else {})

    some = [
        *(entry("-m no_prune", seed, 0.99, 1, (0, 0), synops) for seed, synops in ((1, 900), (2, 1100))),
        *(entry("-m grad -s 0.95 -penalty 1", seed, 0.8, 0.25, (0.25, 0.25), 500) for seed in (1, 2)),
        *(entry("-m grad -s 0.95 -penalty 2", seed, 0.4, 0.05, (0.55, 0), 20) for seed in (1, 2)),
        *(entry("-m deep -s 0.95 -penalty 1", seed, 0.7, 0.25, (0.055, 0), 250) for seed in (1, 2)),
        entry("-m deep -s 0.95 -penalty 2", 1, 0.6, 0.01, (0.0, 0.11), 100),
        entry("-m deep -s 0.95 -penalty 2", 2, 0.5, 0.01, (0, 0), 50),
    ]
    found = {}
    for cost in tables.COSTS:
        text = tables.equal(tables.summarise(some), cost)
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "| Deep R" in line]
        found[cost] = {line[2]: line[3:] for line in lines}  # the last one, of the lead, stays
    assert found["connectivity"] == {
        "2": ["10.00 ± 0.00 †", "10.00 ± 0.00", "-8.50 ± 2.01", "-22.50 ± 3.54", *4 * ["-"]]
    }
    # 250 and 500 of the dense 1000: a quarter of it has 0.7 of Deep R, and between 0.4 and 0.8 of Grad R
    first, *_ = found["synops"]["2"]
    assert first == "10.00 ± 0.00 †"
    quarter = 100 * (0.4 + 0.4 * math.log(250 / 20) / math.log(500 / 20) - 0.7)
    assert found["synops"]["2"][1] == f"{quarter:.2f} ± 0.00"
    # Deep R has 5 and 1 % of the synapses, with one seed; Grad R 25 and, with less accuracy, 50 %
    assert found["synapses"] == {"1": ["10.00 †", "10.00 †", *6 * ["-"]]}
    assert "synapses (a weight of a convolution" in tables.equal(tables.summarise(some), "synapses")
    assert tables.equal(tables.summarise(some[:3]), "synops") == ""
    # those of another learning rate, whose own dense network has twice the SynOps, have the same reference
    other = [
        *(entry("-m no_prune -lr 1e-3", seed, 0.99, 1, (0, 0), 2000) for seed in (1, 2)),
        *(entry("-m deep -lr 1e-3 -s 0.95 -penalty 1", seed, 0.7, 0.25, (0, 0), 250) for seed in (1, 2)),
        *(entry("-m deep -lr 1e-3 -s 0.95 -penalty 2", seed, 0.5, 0.01, (0, 0), 50) for seed in (1, 2)),
    ]
    lines = tables.equal(tables.summarise([*some[:6], *other]), "synops").splitlines()
    (at,) = [line.split("|")[4:] for line in lines if line.startswith("| Deep R") and "70.00" in line]
    assert [cell.strip() for cell in at[1:3]] == ["70.00 ± 0.00", f"{50 + 20 * math.log(2) / math.log(5):.2f} ± 0.00"]


def test_the_layers_of_each_row_are_told_apart():
    argv = ["-m", "no_prune", "-N", "60", "--seed"]
    rows = [
        grid.Row("mnist", "mnist", "dense", False, (*argv, seed), read(EXPERIMENTS["mnist"], [*argv, seed]))
        for seed in "123"
    ]
    some = [
        entries.Entry(
            row,
            {"connectivity": 0.5},
            {},
            [],
            {"a": {"connected": n, "weights": 8.0, "positions": 4.0, "operations": math.nan}, "b": b},
            {"x": {"firing_rate": n / 100, "silent": 0.0}},
        )
        for row, n in zip(rows, (2.0, 4.0), strict=False)
        for b in [{"connected": 1.0, "weights": 10.0, "positions": 1.0, "operations": 3.5}]
    ]
    text = tables.layers(tables.summarise([*some, entries.Entry(rows[2], {"connectivity": 0.5}, {}, [])]))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert cells[0] == ["method", "options", "epochs", "seeds", "a", "b", "synapses"]
    assert cells[2][3:] == ["2", "37.50 ± 17.68", "10.00 ± 0.00", "30.95 ± 13.47"]  # 9 and 17 of 42 synapses
    assert cells[3][4:] == ["x"]
    assert cells[5][3:] == ["2", "3.00 ± 1.41"]
    assert tables.layers(tables.summarise([entries.Entry(rows[2], {"connectivity": 0.5}, {}, [])])) == ""
    lines = list(csv.DictReader(entries.layers_csv(some).splitlines()))
    assert [line["layer"] for line in lines] == ["a", "b", "a", "b"]
    assert {key: lines[1][key] for key in entries.LAYER} == dict(
        connected="1", weights="10", positions="1", operations="3.5"
    )
    assert lines[0]["operations"] == ""


def test_a_method_that_is_added_has_its_place_in_tables_and_figures(tmp_path, monkeypatch, stub):
    """Two of them: one prunes and has a switch, which tells its rows apart; the other one is dense."""

    class Cut(Method):
        name, label, about = "cut", "Cut", "cutting"
        options = {PENALTY: "p", SPARSITY: "s", Option("--hard"): "h", TEMPERATURE: "t"}  # noqa: RUF012

    class Plain(Method):
        name, label, about, prunes = "plain", "plain SGD", "SGD", False

    for method in (Cut(), Plain()):
        monkeypatch.setitem(METHODS, method.name, method)
    (tmp_path / "mnist.toml").write_text(
        'options = "--dataset digits -lr 1e-2"\nepochs = 1\nseeds = [2020, 1]\n'
        '[[group]]\ntitle = "plain SGD"\nvariants = ["-m plain"]\n'
        '[[group]]\ntitle = "Cut"\nmethod = "-m cut -s 1"\n'
        'variants = ["-temperature 1e-3 -penalty 0", "--hard -temperature 1e-3 -penalty 0"]\n'
        '[[group]]\ntitle = "cut off"\nablation = true\nvariants = ["-m cut -s 0.5"]\n'
    )
    rows = grid.load("mnist", tmp_path)
    assert [row.name.removeprefix("lr-1e-2-b-128-T-8-") for row in rows[:3]] == [
        "plain-digits",
        "penalty-0-s-1.0-cut-temperature-1e-3-digits",
        "penalty-0-s-1.0-cut-hard-temperature-1e-3-digits",
    ]
    numbers = {**entries._numbers({}, []), "connectivity": 0.5, "test_accuracy": 0.75}
    line = {"test_accuracy": 0.75, "connectivity": 0.5, "pruned": 1.0, "regrown": 1.0, "train_accuracy": 0.5}
    some = [entries.Entry(row, numbers, dict.fromkeys(records.MADE, ""), [line]) for row in rows]
    summaries = tables.summarise(some)
    variants = ["-lr 1e-2", *2 * ["-s 1 -penalty 0 -temperature 1e-3 -lr 1e-2"], "-s 0.5 -lr 1e-2"]
    assert [summary.row.variant for summary in summaries] == variants
    assert [len(summary.entries) for summary in summaries] == [2, 2, 2, 2]  # the seeds
    assert summaries[1].values("loss") == [0.0, 0.0]  # against plain SGD
    text = tables.equal(summaries, "connectivity")
    assert "| Cut | 1 | 2 | 75.00 ± 0.00 |" in text
    assert "plain" not in text
    drawn, planes = [], []
    monkeypatch.setattr(figures.Axes, "plot", lambda axes, *data, **look: drawn.append(look["label"]))
    monkeypatch.setattr(
        figures, "plane", lambda some, heading: planes.append((heading, [one.row.title for one in some])) or b""
    )
    monkeypatch.setattr(outcome, "collect", lambda *places: some)
    outcome.write(stub, rows, tmp_path)
    keys, cut = 2, [*variants[1:3], "plain SGD"]
    assert drawn == keys * cut + keys * cut[:2]  # over the epochs, beside the dense method; rewiring, without it
    methods = ["plain SGD", "Cut", "Cut"]
    assert planes == [
        ("mnist: accuracy against connectivity", methods),
        ("mnist: ablations of Cut", [*methods, "cut off"]),
    ]


def test_the_curves_say_of_which_seeds_they_are(tmp_path, monkeypatch, rows, stub, results):
    headings = []
    monkeypatch.setattr(figures.Figure, "suptitle", lambda figure, text, **look: headings.append(text))
    outcome.write(tmp_path / "empty", rows, results)
    assert [text.partition("\nseeds ")[2].partition(", as far as ")[0] for text in headings] == [
        "",
        "2020, 1",
        "2020, 1",
        "",
    ]
    kept = [
        line
        for line in (results / "epochs.csv").read_text("utf-8").splitlines()
        if line.startswith("row") or "seed-1" in line
    ]
    (results / "epochs.csv").write_text("\n".join(kept))
    headings.clear()
    outcome.write(tmp_path / "empty", rows, results)
    assert [text.partition("\nseeds ")[2].partition(", as far as ")[0] for text in headings] == ["", "1", "1", ""]
