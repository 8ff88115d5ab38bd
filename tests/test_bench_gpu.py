"""Ten minutes on a GPU: the parts on tiny sizes, and what holds them together."""

import contextlib
import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pretended_runs
import pytest
import torch
from torch import nn

import spiking_kernels
from benchmarks import gpu, gpu_parts
from benchmarks import gpu as program
from benchmarks.gpu_report import Report
from benchmarks.tables import table

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TITLES = [gpu.TESTS, *(part.title for part in gpu_parts.PARTS.values()), gpu.TRAINING]


def python(tmp_path, code, seconds=gpu.GRACE + 60):
    return gpu.finish([sys.executable, "-c", code], tmp_path / "log", seconds)


# -- processes ---------------------------------------------------------------------------------------


def test_what_ends_well_has_no_reason(tmp_path):
    assert python(tmp_path, "print('hello')") is None
    assert "hello" in (tmp_path / "log").read_text("utf-8")
    code = "import os; assert os.environ['ANY'] == 'thing' and os.path.exists('c10/c10.py')"
    assert gpu.finish([sys.executable, "-c", code], tmp_path / "log", gpu.GRACE + 60, {"ANY": "thing"}) is None


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import no_such_thing", "ModuleNotFoundError: No module named 'no_such_thing'"),
        ("import sys; print('one'); sys.exit('two')", "two"),
        ("import sys; sys.exit(3)", "exit status 3"),
        ("import os, signal; print('so far'); os.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV"),
    ],
)
def test_what_fails_says_so_in_one_line(tmp_path, code, reason):
    python(tmp_path, "print('of another process')")
    assert python(tmp_path, code) == reason


def test_what_hangs_is_stopped_with_all_that_it_started(tmp_path, monkeypatch):
    """Even if it ignores SIGTERM."""
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    child = "import time, pathlib\nwhile True: time.sleep(0.1); pathlib.Path('alive').touch()"
    code = f"""
import os, signal, subprocess, sys, time
os.chdir({str(tmp_path)!r})
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", {child!r}])
time.sleep(1000)
"""
    began = time.monotonic()
    assert python(tmp_path, code, 6.0) == "stopped after 5 s, its share of the time"
    assert time.monotonic() - began < 60
    alive = tmp_path / "alive"
    assert alive.exists()
    alive.unlink()
    time.sleep(1)
    assert not alive.exists()


# -- the report --------------------------------------------------------------------------------------


def test_a_report_grows_and_is_read_again(tmp_path, capsys):
    report = Report(tmp_path)
    report.head["card"] = "a card"
    report.add("one", table("speed", ("way", "s/epoch"), [("a", "1,234.5")]))
    report.add("one", table("speed", ("way", "s/epoch"), [("a", "1,234.5"), ("b | c", "error")]))
    report.add("two", note="Left out.", seconds=2.6)
    again = Report(tmp_path)
    assert (again.head, list(again.parts)) == ({"card": "a card"}, ["one", "two"])
    assert again.number("one", "a", "s/epoch") == 1234.5
    assert again.number("one", "b | c", "s/epoch") is None
    assert again.number("one", "c", "s/epoch") is None
    assert again.number("three", "a", "s/epoch") is None
    page = (tmp_path / "gpu.md").read_text("utf-8")
    assert page.count("### speed") == 1
    assert "| b ¦ c | error |" in page  # a table has two columns still
    assert page.endswith("## two (3 s)\n\nLeft out.\n")


# -- tests and training ------------------------------------------------------------------------------

PYTEST = """\
tests/test_a.py::test_one PASSED     [ 10%]
tests/test_a.py::test_two[a b] FAILED [ 20%]
tests/test_a.py::test_three SKIPPED (needs a CUDA GPU) [ 30%]
[gw0] [ 40%] FAILED tests/test_a.py::no_such_form
tests/test_b.py::test_four FAILED [ 50%]
FAILED tests/test_a.py::test_two[a b] - RuntimeError: CUDA error: an illegal memory access was encountered
"""


def test_the_outcomes_of_the_tests_are_read():
    counts, failures = gpu.outcomes(PYTEST)
    assert counts == Counter(PASSED=1, FAILED=2, SKIPPED=1)
    assert failures == [
        ("tests/test_a.py::test_two[a b]", "RuntimeError: CUDA error: an illegal memory access was encountered"),
        ("tests/test_b.py::test_four", ""),
    ]


def test_all_files_with_tests_for_a_gpu_run_and_what_tells_most_first():
    names = gpu.gpu_tests()
    assert names[:2] == ["tests/test_step.py", "tests/test_models.py"]
    assert {"tests/test_rewiring.py", "tests/test_checkpoint.py"} < set(names)
    assert "tests/test_docs.py" not in names
    assert {f"tests/test_{name}.py" for name in gpu.FIRST} < set(names)
    assert len(names) == len(set(names))


def test_without_pytest_one_line_says_so(tmp_path, monkeypatch):
    report = Report(tmp_path)
    (tmp_path / "log").touch()
    monkeypatch.setattr(gpu, "finish", lambda *args: "/usr/bin/python3: No module named pytest")
    gpu.run_tests(report, tmp_path / "log", 100, False)
    assert report.parts[gpu.TESTS]["note"] == "none ran; /usr/bin/python3: No module named pytest"


def trained(monkeypatch, tmp_path, seconds, pace=None, start=10.0):
    """The epochs of the runs on a pretended clock, where an epoch takes 10 seconds: by name, done and asked for."""
    clock, found = [0.0], {}

    def finish(argv, log, left):
        asked = int(argv[argv.index("-N") + 1])
        done = min(asked, int((left - gpu.GRACE - start) // 10))
        clock[0] += start + 10 * done
        folder = Path(argv[argv.index("--dump-dir") + 1]) / "logs" / "run"
        folder.mkdir(parents=True)
        line = dict(test_accuracy=0.5, best_accuracy=0.5, connectivity=0.05, train_seconds=9, test_seconds=1, layers={})
        (folder / "results.jsonl").write_text((json.dumps(line) + "\n") * max(done, 0))
        return None if done == asked else "stopped"

    monkeypatch.setattr(gpu, "finish", finish)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(gpu, "START", start)
    (tmp_path / "train").mkdir()
    report = Report(tmp_path)
    if pace:
        cells = dict.fromkeys(gpu_parts.STEP_HEAD, "-") | {"s/epoch": f"{pace - 1}", "s/test set": "1"}
        report.add(gpu.PARTS["c10-bf16"].title, table("t", ("execution", *cells), [(gpu.FAST, *cells.values())]))
    options = gpu.parse(["--dataset-dir", str(tmp_path)])
    gpu.train(report, tmp_path / "log", seconds, options)
    (made,) = report.parts[gpu.TRAINING]["tables"]
    for name, epochs, *_ in made["rows"]:
        found[name] = epochs
    assert report.parts[gpu.TRAINING]["epochs, 5 %"][0].keys() >= {"test_accuracy", "train_seconds"}
    assert clock[0] <= seconds
    return found


def test_two_networks_have_as_many_epochs_as_both_have_time_for(monkeypatch, tmp_path):
    found = trained(monkeypatch, tmp_path, 240, pace=10)
    assert found == {"5 %": "10 of 10", "dense": "10 of 10", "1 %": "-", "30 %": "-"}


def test_all_four_fit_into_a_long_time(monkeypatch, tmp_path):
    found = trained(monkeypatch, tmp_path, 1000, pace=10)
    assert found == {"5 %": "30 of 30", "dense": "30 of 30", "1 %": "17 of 17", "30 %": "17 of 17"}


def test_a_wrong_pace_is_put_right_by_the_first_run(monkeypatch, tmp_path):
    """It takes half as long as was measured: what is left goes to the others."""
    found = trained(monkeypatch, tmp_path, 300, pace=20)
    assert found == {"5 %": "6 of 6", "dense": "6 of 6", "1 %": "6 of 6", "30 %": "6 of 6"}


def test_without_a_pace_the_first_run_finds_it(monkeypatch, tmp_path):
    found = trained(monkeypatch, tmp_path, 200)
    assert found["5 %"] == "1 of 1"
    assert found["dense"] == "1 of 1"
    assert int(found["1 %"].split()[0]) > 1


def test_without_images_nothing_is_trained_or_downloaded(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "finish", None)
    for argv in ([], ["--dataset-dir", str(tmp_path)]):
        report = Report(tmp_path)
        gpu.train(report, tmp_path / "log", time.monotonic() + 1000, gpu.parse(argv))
        assert report.parts[gpu.TRAINING]["note"].startswith("Left out: ")


# -- what is measured --------------------------------------------------------------------------------


def test_wrong_training_differs_by_more_than_the_bounds(monkeypatch):
    """Twice the learning rate, other batches, and nothing learned: in every precision. The same again: not."""
    monkeypatch.setattr(nn.functional, "dropout", nn.functional.dropout)  # bench_equality turns it off

    def trained(line):
        return gpu_parts.trained(gpu_parts.MNIST, gpu_parts.images(gpu_parts.MNIST, 160), CPU, "-m no_prune", line)

    line = "-b 128 --no-compile"
    reference, again = (trained(f"-lr 1e-3 {line}") for _ in range(2))
    still = gpu_parts.Trained(reference.losses, 0 * reference.change, 1.0, False)
    wrong = [trained(f"-lr 2e-3 {line}"), trained(f"-lr 1e-3 {line} --seed 1"), still]
    wrong.append(gpu_parts.Trained(reference.losses * torch.nan, reference.change, 1.0, False))
    for precision in gpu_parts.BOUNDS:
        assert gpu_parts.equality_row(reference, again, precision)[-1] == "yes"
        assert [gpu_parts.equality_row(reference, run, precision)[-1] for run in wrong] == ["DIFFERS"] * 4


def test_an_execution_that_fails_gets_a_row_and_the_others_go_on():
    ways = {"wrong": dict(line="-b 99999"), "right": dict(line="--width 16 -T 2 -b 4 --no-compile")}
    rows = list(gpu_parts.step_rows(gpu_parts.MNIST, gpu_parts.images(gpu_parts.MNIST, 20), CPU, ways, 1, 1))
    assert [len(row) for row in rows] == [1 + len(gpu_parts.STEP_HEAD)] * 2
    assert rows[0][1].startswith("argument -b/--batch-size: ")
    assert rows[1][-1] == "1 x 1"
    assert float(rows[1][2].replace(",", "")) > 0


# -- all of it ---------------------------------------------------------------------------------------


def test_a_machine_without_a_gpu_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "argument --device: " in err
    assert not (tmp_path / "out").exists()


def read(out):
    content = json.loads((out / "gpu.json").read_text("utf-8"))
    page = (out / "gpu.md").read_text("utf-8")
    assert re.findall(r"^## (.*?)(?: \(\d+ s\))?$", page, re.MULTILINE) == list(content["parts"])
    return content


def test_parts_alone_on_the_cpu(tmp_path, cifar_folder):
    """A second call adds to the report of the first."""
    common = ["--device", "cpu", "--small", "--dataset-dir", str(cifar_folder), "--out", str(tmp_path)]
    assert gpu.main([*common, "--only", "c10-bf16", "--commit", "abc"]) == 0
    assert gpu.main([*common, "--only", "blocks", "--minutes", "0.1"]) == 0
    content = read(tmp_path)
    assert list(content["parts"]) == ["CIFAR-10 in bf16", gpu_parts.PARTS["blocks"].title]
    steps, _products = content["parts"]["CIFAR-10 in bf16"]["tables"]
    assert len(steps["rows"]) == 4
    assert all(float(row[1]) > 0 for row in steps["rows"])
    assert content["parts"][gpu_parts.PARTS["blocks"].title]["note"] == "Left out: no time."
    assert content["head"]["card"] == "CPU alone"


def whole(content, may_fail=None):
    assert list(content["parts"]) == TITLES
    assert re.match(r"\d+ (passed|failed|skipped)", content["parts"][gpu.TESTS]["note"])
    for part in gpu_parts.PARTS.values():
        entry = content["parts"][part.title]
        if "note" in entry:
            assert entry["note"].startswith("Left out: there is no ") or part.title == may_fail
        else:
            assert entry["tables"]
            failed = [row for made in entry["tables"] for row in made["rows"] if row[-1] == "-"]  # with their reasons
            assert failed == [] or part is gpu_parts.PARTS["profile"]  # whose last row has less to say
    (training,) = content["parts"][gpu.TRAINING]["tables"]
    assert [row[0] for row in training["rows"]] == list(gpu.RUNS)
    assert [(row[1], row[-1]) for row in training["rows"]] == [("1 of 1", "")] * 4


@pytest.mark.slow
@pytest.mark.skipif(pretended_runs.unavailable() is None, reason="a pretended GPU does all of it")
@pytest.mark.skipif(spiking_kernels.unavailable() is not None, reason="needs a C compiler")
def test_all_of_it_on_the_cpu(tmp_path, cifar_folder):
    argv = ["--device", "cpu", "--small", "--minutes", "30", "--dataset-dir", str(cifar_folder), "--out", str(tmp_path)]
    assert gpu.main(argv) == 0
    whole(read(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "gpu.md", "gpu.log"}


@pytest.mark.slow
def test_all_of_it_on_a_pretended_gpu(gpu, tmp_path, cifar_folder, monkeypatch):
    """The program runs here, and what it starts on the pretended GPU, by the server that spares each its imports."""

    def finish(argv, log, seconds, environment=None):
        run = started(*argv[1:], images=640, seconds=3600, **(environment or {}))
        with open(log, "a", encoding="utf-8") as file:
            file.write(run.out + run.err)
        return None if run.status == 0 else (run.err.strip() or run.out.strip()).splitlines()[-1]

    started = gpu
    monkeypatch.setattr(program, "finish", finish)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    argv = ["--small", "--minutes", "60", "--dataset-dir", str(cifar_folder), "--out", str(tmp_path / "out")]
    assert program.main(argv) == 0
    whole(read(tmp_path / "out"), may_fail="Profile")  # there are no kernels to find


def of_part(folder):
    """The command lines of the processes that measure a part into a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            found.append(path.read_bytes())
    return [line for line in found if str(folder).encode() in line and b"benchmarks.gpu_parts" in line]


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_sigterm_leaves_no_process_behind(tmp_path):
    argv = ["--device", "cpu", "--small", "--out", str(tmp_path), "--only", "mnist"]
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.gpu", *argv], cwd=ROOT, stderr=subprocess.PIPE)
    try:
        while not of_part(tmp_path):
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(1)
        process.terminate()
        assert process.wait(120) == 130
    finally:
        process.kill()
        process.communicate()
    assert of_part(tmp_path) == []
