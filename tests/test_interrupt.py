"""Signals: the run stops or saves between two steps, and goes on to the same result."""

import os
import shlex
import signal
import sys

import pytest
from run_helpers import assert_same_run, load, results

from mnist.model import MnistNet
from training import script
from training.interrupt import Signals, StopRequested

DEEP = ["-m", "deep", "-s", "0.5", "-temperature", "1e-3", "-lr", "1e-2", "-b", "8", "-i2", "1", "-N", "3"]


@pytest.fixture
def at_forward(monkeypatch):
    """Sends this process a signal in the n-th forward pass, of training or of a test; returns the passes so far."""
    forward, sent = MnistNet.forward, []

    def arrange(number, n, training=True, times=1):
        passes = []

        def forward_and_signal(self, images):
            if self.training == training:
                passes.append(1)
                if len(passes) == n:
                    sent.append(number)
                    for _ in range(times):
                        os.kill(os.getpid(), number)
            return forward(self, images)

        monkeypatch.setattr(MnistNet, "forward", forward_and_signal)
        return passes

    return arrange


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_and_the_command_goes_on(run, tmp_path, at_forward, number, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mnist.py", "-m", "deep", "a b"])
    run(*DEEP, dump=tmp_path / "one")
    passes = at_forward(number, 8)
    before = signal.getsignal(number)
    result = run(*DEEP, dump=tmp_path / "stopped")
    assert result.status == 128 + number
    assert signal.getsignal(number) is before
    assert len(passes) == 8
    state = load(tmp_path / "stopped")
    assert (state["epoch"], state["position"], state["step"]) == (1, 3, 8)
    last = result.out.splitlines()[-1]
    assert f"Stopped by {number.name} in epoch 2, after step 3 of 5, and saved." in last
    assert shlex.join(["python", *sys.argv]) in last
    run(*DEEP, "-test", dump=tmp_path / "stopped")
    (logs,) = (tmp_path / "stopped" / "logs").iterdir()
    assert {path.name for path in logs.glob("rate-*")} == {
        f"rate-{name}-epoch-1-step-3.npy" for name in ("fc.0", "fc.2")
    }
    for path in (logs / "test.json", *logs.glob("rate-*")):
        path.unlink()
    result = run(*DEEP, dump=tmp_path / "stopped")
    assert result.status == 0
    assert "Resuming in epoch 2, after step 3 of 5; 3 epochs in all." in result.out
    assert len(passes) == 15  # no step twice
    assert_same_run(tmp_path / "one", tmp_path / "stopped")


def test_a_test_of_several_batches_is_left_at_once(run, tmp_path, at_forward, monkeypatch):
    from dataclasses import replace

    from mnist import mnist

    monkeypatch.setattr(mnist, "EXPERIMENT", replace(mnist.EXPERIMENT, test_batch_size=4))  # five test batches
    run(*DEEP, dump=tmp_path / "one")
    passes = at_forward(signal.SIGTERM, 7, training=False)
    assert run(*DEEP, dump=tmp_path / "stopped").status == 128 + signal.SIGTERM
    assert len(passes) == 7
    state = load(tmp_path / "stopped")
    assert (state["epoch"], state["position"]) == (1, 5)
    assert [line["epoch"] for line in results(tmp_path / "stopped")] == [1]
    result = run(*DEEP, dump=tmp_path / "stopped")
    assert "Resuming in epoch 2, after step 5 of 5" in result.out
    assert_same_run(tmp_path / "one", tmp_path / "stopped")


def test_sigusr1_saves_and_goes_on(run, tmp_path, at_forward):
    run(*DEEP, dump=tmp_path / "one")
    at_forward(signal.SIGUSR1, 8)
    result = run(*DEEP, dump=tmp_path / "warned")
    assert result.status == 0
    assert "Saved in epoch 2, after step 3 of 5, as requested by SIGUSR1; continuing." in result.out
    assert_same_run(tmp_path / "one", tmp_path / "warned")


@pytest.mark.parametrize("option", [[], ["-test"]])
def test_sigusr1_does_not_end_a_run_that_has_nothing_to_save(run, tmp_path, monkeypatch, option):
    """Before it trains, or for a test."""
    run(*DEEP, dump=tmp_path / "a")
    seed, sent = script.seed, []

    def seed_warned(*args):
        sent.append(os.kill(os.getpid(), signal.SIGUSR1))
        return seed(*args)

    monkeypatch.setattr(script, "seed", seed_warned)
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    assert run(*DEEP, *option, dump=tmp_path / "a").status == 0
    assert sent == [None]
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_a_second_sigint_stops_at_once(run, tmp_path, at_forward):
    at_forward(signal.SIGINT, 8, times=2)
    result = run(*DEEP, dump=tmp_path / "a")
    assert result.status == 130
    assert result.err.endswith(": error: interrupted; existing files are unchanged\n")
    assert result.err.count("\n") == 1
    assert load(tmp_path / "a")["step"] <= 5


def test_only_an_interrupt_counts_as_a_second_one():
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # the first of its kind
        assert signals.stop == signal.SIGINT
        with pytest.raises(StopRequested):
            signals.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with Signals() as signals:
        signals.check()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.save
        signals.check()
