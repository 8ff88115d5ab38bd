"""The pretended GPU itself: its reports are understood, and faults show in them (pretended_runs.py)."""

import signal
import subprocess

import forked
import pretended_runs
import pytest
from pretended_runs import parse

LOG = """\
== start: 3 launches, 0 graph launches, 2 mallocs, 0 frees; device 0 used 0.02 GB, peak 0.05 GB;
   event H2D pageable: 2
   event cudaDeviceSynchronize@0: 1
       2 memset
       3 void fill<int>(int): lambda
[fake 12] capture begins on stream 3 of device 1 (current 1), mode 0, used 0.85 GB
[fake 12] launch outside of the capture, while capturing: void fill<int>
[fake 12] capture ends: 435 nodes, used 3.24 GB
== step 0: 440 launches, 2 graph launches, 0 mallocs, 0 frees; device 0 used 0.02 GB, peak 0.02 GB; device 1 used 1.00 GB, peak 2.50 GB;
   event D2D: 4
   event D2H: 7
   event cudaStreamSynchronize: 7
   event graph launch on device 1, current 1: 2
       5 void fill<int>(int)
"""  # noqa: E501


def test_the_report_of_a_driver_is_understood():
    start, step = parse(iter(LOG.splitlines()))
    assert (start.title, start.launched, start.mallocs, start.captures, start.errors) == ("start", 3, 2, [], [])
    assert start.kernels == {"memset": 2, "void fill<int>(int): lambda": 3}
    assert (start.launches, start.synchronisations, start.used) == (5, 3, {0: 0.05e9})
    assert (step.title, step.launches, step.synchronisations, step.replays) == ("step 0", 9, 7, {1: 2})
    assert step.captures == [[1, 1, 435]]
    assert step.errors == ["launch outside of the capture, while capturing: void fill<int>"]
    process = pretended_runs.Process(["x.py"], [start, step], {}, 0)
    assert process.devices() == {0, 1}
    assert process.total.used == {0: 0.05e9, 1: 2.5e9}
    assert process.steps == [step]
    with pytest.raises(ValueError, match="a new kind of line"):
        parse(iter(["a new kind of line"]))


def test_a_graph_that_runs_beside_the_current_device_is_an_error():
    (period,) = parse(iter([*LOG.splitlines()[:1], "   event graph launch on device 1, current 0: 3"]))
    assert period.replays == {1: 3}
    assert len(period.errors) == 1


FAULTS = {
    "a synchronisation in a capture": ("x.sum().item()", False),
    "a copy from memory that is not pinned, in a capture": ("x + torch.ones(3).to(x.device)", False),
    "work on another device": ("torch.ones(3, device='cuda:1')", True),
    "nothing": ("x + 1", True),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_a_capture_show(gpu, fault):
    code, goes_on = FAULTS[fault]
    run = gpu(
        "-c",
        f"""
import torch
x = torch.ones(3, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph, capture_error_mode="{"thread_local" if goes_on else "global"}"):
    {code}
graph.replay()
""",
        gpus=2,
    )
    assert (run.status == 0) == goes_on, run.err
    if fault == "nothing":
        run.check()
        ((device, current, nodes),) = run.only.captures
        assert (device, current, nodes) == (0, 0, 1)
    else:
        with pytest.raises(AssertionError):
            run.check(status=run.status)


def test_a_program_has_an_environment_and_a_main_module_of_its_own(gpu, monkeypatch):
    code = "import os, pickle\nclass A: pass\nprint(os.environ.get('ASKED_FOR'), pickle.dumps(A()) != b'')"
    monkeypatch.setenv("ASKED_FOR", "here")
    assert gpu("-c", code).out == "here True\n"
    monkeypatch.delenv("ASKED_FOR")
    assert gpu("-c", code).out == "None True\n"


def test_a_program_ends_with_a_test_that_fails_and_the_next_one_runs(gpu):
    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        gpu("-c", "import time\ntime.sleep(600)", stop=fail)
    assert gpu("-c", "import sys\nsys.exit(3)").status == 3
    with pytest.raises(subprocess.TimeoutExpired):
        gpu("-c", "import time\ntime.sleep(600)", seconds=0.5)
    run = gpu("-c", "import os, signal\nprint(1, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)")
    assert (run.status, run.out) == (-signal.SIGKILL, "1\n")


def test_a_server_that_cannot_start_says_why(tmp_path, monkeypatch):
    if reason := pretended_runs.unavailable():
        pytest.skip(reason)
    monkeypatch.setattr(forked, "SERVER", tmp_path / "none")
    server = pretended_runs.fork_server(tmp_path / "errors")
    with pytest.raises(RuntimeError, match="No such file or directory"):
        server.start(["-c", ""], pretended_runs.environment(), tmp_path, tmp_path)
    server.close()
