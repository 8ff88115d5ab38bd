"""The grids and their runner: rows are commands, finished ones are skipped, failed ones named."""

import json
import signal
import subprocess
import sys
import time

import pytest

from reproduce import __main__ as reproduce
from reproduce import grid, runner
from training.options import REPOSITORY, Refusal

TABLE = """
options = "--dataset digits -lr 1e-2"
epochs = 1
seeds = [2020, 1]

[[group]]
title = "dense"
variants = ["-m no_prune"]

[[group]]
title = "Grad R"
options = "-m grad -s 0.95"
variants = ["-penalty 1e-3", "-penalty 1e-2"]

[[group]]
title = "long"
epochs = 2
seeds = [2020]
variants = ["-m no_prune"]
"""

# Stands for the experiment's script: writes what it would, and nothing of torch is imported.
SCRIPT = """
import json, os, pathlib, sys, time
argv = sys.argv[1:]
value = lambda option: argv[argv.index(option) + 1]
name = "-".join(["lr-1e-2-b-128-T-8", *(["penalty", value("-penalty"), "s", value("-s")] if "-s" in argv else [])])
name += "-" + value("-m") + ("" if value("--seed") == "2020" else "-seed-" + value("--seed")) + "-digits"
dump = pathlib.Path(value("--dump-dir"))
logs = dump / "logs" / name
logs.mkdir(parents=True, exist_ok=True)
results, epochs = logs / "results.jsonl", int(value("-N"))
with open(dump / "calls", "a") as calls:
    print(" ".join(["start", *argv]), os.environ["OMP_NUM_THREADS"], file=calls)
deadline = time.monotonic() + 30
while (dump / "meet").exists() and (dump / "calls").read_text().count("start") < 3:
    time.sleep(0.01)
    if time.monotonic() > deadline:
        sys.exit("alone")
for trouble in ("fail", "taken", "wait"):
    path = dump / trouble
    if path.exists() and path.read_text() in " ".join(argv):
        if trouble == "wait":
            time.sleep(60)
        sys.exit("another process is training in it" if trouble == "taken" else "all is lost")
if "-test" in argv:
    (logs / "test.json").write_text(json.dumps({"epoch": epochs, "accuracy": 0.5}))
else:
    done = len(results.read_text().splitlines()) if results.exists() else 0
    with open(results, "a") as file:
        for epoch in range(done + 1, epochs + 1):
            line = {"epoch": epoch, "test_accuracy": 0.5 + epoch / 10, "connectivity": 0.25}
            line |= {"train_seconds": 3.0, "test_seconds": 0.5, "checkpoint_seconds": 0.5}
            print(json.dumps(line), file=file)
    (logs / "run.json").write_text(json.dumps({"versions": {"torch": "9"}, "device": "stub", "commit": "c0ffee"}))
with open(dump / "calls", "a") as calls:
    print("end", name, file=calls)
"""


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "mnist.toml").write_text(TABLE)
    return grid.load("mnist", tmp_path)


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A repository whose script is the stub, and a dump folder to run rows in."""
    (tmp_path / "repository" / "mnist").mkdir(parents=True)
    (tmp_path / "repository" / "mnist" / "mnist.py").write_text(SCRIPT)
    monkeypatch.setattr(runner, "REPOSITORY", tmp_path / "repository")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "dump").mkdir()
    return tmp_path / "dump"


def calls(dump):
    return (dump / "calls").read_text().splitlines() if (dump / "calls").exists() else []


# -- the grid ------------------------------------------------------------------------------------------


def test_rows_are_commands_the_first_seed_first_and_long_rows_last(rows):
    penalties = [("-m grad -s 0.95 -penalty " + p, "penalty-" + p + "-s-0.95-grad") for p in ("1e-3", "1e-2")]
    expected = [
        (f"python mnist/mnist.py --dataset digits -lr 1e-2 {options} -N 1 --seed {seed}", 1, name)
        for seed in (2020, 1)
        for options, name in [("-m no_prune", "no_prune"), *penalties]
    ]
    assert [row.command for row in rows[:-1]] == [command for command, *_ in expected]
    assert rows[-1].command == "python mnist/mnist.py --dataset digits -lr 1e-2 -m no_prune -N 2 --seed 2020"
    for row, (_, _, name) in zip(rows, expected, strict=False):
        seed = "-seed-1" if row.seed == 1 else ""
        assert row.name == f"lr-1e-2-b-128-T-8-{name}{seed}-digits"
    assert rows[-1].name == rows[0].name
    assert (rows[-1].key, rows[0].key) == (f"{rows[0].name}-N-2", f"{rows[0].name}-N-1")
    assert [row.title for row in rows] == ["dense", "Grad R", "Grad R"] * 2 + ["long"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("-penalty 1e-2", "-penalty -1", r"Grad R: .*-penalty -1.*: argument -penalty"),
        ("-penalty 1e-2", "-penalty 0.001", r"is there twice, in Grad R and Grad R"),
        ('title = "dense"\n', "", r"a group has no title"),
        ("[[group]]", "[[group", r"mnist\.toml: "),
    ],
)
def test_a_faulty_table_is_refused(tmp_path, old, new, message):
    (tmp_path / "mnist.toml").write_text(TABLE.replace(old, new, 1))
    with pytest.raises(Refusal, match=message):
        grid.load("mnist", tmp_path)


def test_the_mnist_grid_is_the_papers():
    rows = grid.load("mnist")
    settings = {title: {row.argv[:-1] for row in rows if row.title == title} for title in {row.title for row in rows}}
    seeds = {title: {row.seed for row in rows if row.title == title} for title in settings}
    least = {"dense": 1, "Grad R": 6, "Deep R": 4, "Deep R with noise": 4, "soft Deep R": 4}
    for title, variants in least.items():
        assert len(settings[title]) >= variants
        assert len(seeds[title]) >= 3
        assert all(row.epochs >= 60 for row in rows if row.title == title)
    long = [row for row in rows if row.epochs == 512]
    assert len([row for row in long if "grad" in row.argv]) >= 4
    assert len([row for row in long if "no_prune" in row.argv]) >= 1


def test_shards_share_the_rows_out_and_keep_a_run_together(rows):
    parts = [grid.shard(rows, part, 3) for part in (1, 2, 3)]
    assert sorted(row.key for part in parts for row in part) == sorted(row.key for row in rows)
    assert all(parts)
    assert rows[-1] in parts[0]
    assert rows[0] in parts[0]
    assert grid.shard(rows, 1, 1) == rows


# -- the runner ----------------------------------------------------------------------------------------


def test_rows_are_trained_tested_and_recorded_once(rows, stub, capsys):
    assert runner.epochs_left(stub, rows) == 8 - 1  # the long row goes on from the short one
    assert runner.Runner(stub, ["--dataset-dir", "data"], 1).run(rows) == ([], [])
    starts = [line for line in calls(stub) if line.startswith("start")]
    assert len(starts) == 2 * len(rows)
    for row, train, test in zip(rows, starts[::2], starts[1::2], strict=True):
        command = " ".join(["start", *row.argv, "--dataset-dir data --dump-dir", str(stub)])
        assert train.rpartition(" ")[0] == command
        assert test.rpartition(" ")[0] == command + " -test"
    record = runner.finished(stub, rows[0])
    assert record["result"]["test_accuracy"] == 0.6
    assert record["test"] == {"epoch": 1, "accuracy": 0.5}
    assert (record["command"], record["seed"], record["epochs"]) == (rows[0].command, 2020, 1)
    assert record["run"] == {"versions": {"torch": "9"}, "device": "stub", "commit": "c0ffee"}
    assert runner.finished(stub, rows[-1])["result"]["test_accuracy"] == 0.7
    out = capsys.readouterr().out
    assert f"{rows[0].key} finished: test accuracy 60.00 %, connectivity 25.00 %" in out
    assert "1 of 7 rows done, 6 epochs left, about 0.0 h" in out
    assert runner.Runner(stub, [], 1).run(rows) == ([], [])
    assert len(calls(stub)) == 4 * len(rows)  # nothing was run again


def test_jobs_run_side_by_side_but_never_two_of_one_run(rows, stub):
    (stub / "meet").touch()  # none ends before three have begun
    assert runner.Runner(stub, [], 7).run(rows) == ([], [])
    lines = calls(stub)
    (long,) = [index for index, line in enumerate(lines) if "-N 2" in line and "-test" not in line]
    (short,) = [index for index, line in enumerate(lines) if "no_prune -N 1 --seed 2020" in line and "-test" in line]
    assert long > short
    threads = {line.rpartition(" ")[2] for line in lines if line.startswith("start")}
    assert threads == {"1"}


def test_a_failed_row_is_named_and_the_others_go_on(rows, stub, capsys):
    (stub / "fail").write_text("-penalty 1e-2 -N 1 --seed 1")
    failed, taken = runner.Runner(stub, [], 2).run(rows)
    assert ([row.key for row in failed], taken) == ([rows[5].key], [])
    assert sum(runner.finished(stub, row) is not None for row in rows) == len(rows) - 1
    assert f"{rows[5].key} failed with status 1: all is lost" in capsys.readouterr().out
    (stub / "fail").unlink()
    assert runner.Runner(stub, [], 2).run(rows) == ([], [])
    assert runner.finished(stub, rows[5]) is not None


def test_a_row_that_another_process_has_is_left_to_it(rows, stub):
    (stub / "taken").write_text("-penalty 1e-2 -N 1 --seed 1")
    failed, taken = runner.Runner(stub, [], 2).run(rows)
    assert (failed, [row.key for row in taken]) == ([], [rows[5].key])


def test_a_row_whose_run_was_prolonged_is_recorded_from_its_results(rows, stub):
    runner.Runner(stub, [], 1).run(rows)
    runner.record_of(stub, rows[0]).unlink()
    before = calls(stub)
    assert runner.Runner(stub, [], 1).run(rows) == ([], [])
    assert calls(stub) == before
    record = runner.finished(stub, rows[0])
    assert (record["result"]["epoch"], record["test"]) == (1, None)  # the test is of epoch 2


def test_a_signal_stops_the_rows_that_run_and_starts_no_other(rows, stub):
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
    while len(calls(stub)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)  # the stub would sleep for 60 s
    assert out.splitlines()[-1] == f"([], []) {signal.SIGTERM:d}"
    assert len(calls(stub)) == 2
    assert not list((stub / "rows").glob("*.json"))


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
    assert lines[-1] == "2 of 7 rows done, 5 epochs left, about 0.0 h"
    (stub / "fail").write_text("--seed 1")
    assert reproduce.main(["mnist", "--dump-dir", str(stub), "--jobs", "2", "--shard", "1/1"]) == 1
    assert "3 rows failed:" in capsys.readouterr().out


def test_a_row_runs_by_the_real_script(tmp_path):
    table = TABLE.replace("seeds = [2020, 1]", "seeds = [2020]").replace("-lr 1e-2", "-lr 1e-2 -T 2", 1)
    (tmp_path / "mnist.toml").write_text(table)
    row = grid.load("mnist", tmp_path)[1]
    assert runner.Runner(tmp_path, [], 1).run([row]) == ([], []), runner.log_of(tmp_path, row).read_text()
    record = json.loads(runner.record_of(tmp_path, row).read_text())
    assert record["test"]["epoch"] == 1
    assert record["test"]["accuracy"] == record["result"]["test_accuracy"]
    assert record["test"]["operations"]
    assert record["run"]["versions"]["torch"]


# -- the outcome ---------------------------------------------------------------------------------------


def test_the_outcome_has_means_spreads_and_every_row(tmp_path, monkeypatch, capsys, rows, stub):
    monkeypatch.setattr(reproduce.grid, "load", lambda experiment: rows)
    runner.Runner(stub, [], 4).run(rows[:-2])
    for row, accuracy in zip(rows[:-2], (0.97, 0.95, 0.9, 0.95, 0.96), strict=True):
        record = runner.finished(stub, row)
        record["result"]["test_accuracy"] = accuracy
        record["test"]["operations"] = {"fc": {"kind": "SynOp", "pruned": 1234.4, "dense": 5000.0}}
        runner.record_of(stub, row).write_text(json.dumps(record))
    folder = tmp_path / "results"
    assert reproduce.main(["mnist", "--dump-dir", str(stub), "--outcome", str(folder)]) == 0
    names = {"rows.csv", "table.md", "plane.png", "epochs.png", "rewiring.png", "commands.md"}
    assert {path.name for path in folder.iterdir()} == names
    table = (folder / "table.md").read_text()
    assert table.startswith("5 of 7 rows")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[4:]]
    assert cells[0][2:7] == ["1", "2", "96.00 ± 1.41", "0", "25.00 ± 0.00"]
    assert cells[1][:7] == [
        *("Grad R", "`-s 0.95 -penalty 0.001 -lr 0.01`", "1", "2"),
        *("95.50 ± 0.71", "0.50 ± 0.71", "25.00 ± 0.00"),
    ]
    assert cells[2][3:6] == ["1", "90.00", "6.00"]
    assert cells[2][8:] == ["1 234", "-"]
    lines = (folder / "rows.csv").read_text().splitlines()
    assert len(lines) == 1 + 5
    assert lines[1].endswith(rows[0].command)
    commands = (folder / "commands.md").read_text()
    done, left = commands.split("Not run yet")
    assert all(row.command in done for row in rows[:-2])
    assert all(row.command in left for row in rows[-2:])
    assert all(str(path) in capsys.readouterr().out for path in [folder / "table.md"])
    for name in ("plane.png", "epochs.png", "rewiring.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
