"""What a run tells on the console: its first lines, durations in words, and the time that is left."""

import re
from argparse import Namespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from c10.c10 import EXPERIMENT as C10
from mnist.mnist import EXPERIMENT as MNIST
from training import console
from training.console import UNITS, TimeLeft, duration, first_lines
from training.options import parse

GRAD = ["-m", "grad", "-s", "0.95", "-lr", "1e-2", "-b", "8"]  # five steps an epoch


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 seconds"),
        (1.2, "1 second"),
        (59.6, "60 seconds"),
        (99.4, "99 seconds"),
        (99.6, "1.7 minutes"),
        (600, "10 minutes"),
        (3600, "60 minutes"),
        (6000, "1.7 hours"),
        (86400, "24 hours"),
        (2 * 86400, "2 days"),
        (12.8 * 86400, "13 days"),
        (365.25 * 86400, "365 days"),
        (2 * 365.25 * 86400, "2 years"),
        (5000 * 365.25 * 86400, "5,000 years"),
    ],
)
def test_durations_in_words(seconds, text):
    assert duration(seconds) == text


@given(st.floats(10, 1e12))
@settings(max_examples=200, derandomize=True, deadline=None)
def test_a_duration_in_words_is_that_duration(seconds):
    """Two digits of it, so within a twentieth."""
    number, unit = duration(seconds).replace(",", "").split()
    length = {name: length for name, length, _ in UNITS}[unit.removesuffix("s")]
    assert float(number) * length == pytest.approx(seconds, rel=0.051)


# -- the time that is left ---------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    clock = Namespace(now=100.0)
    monkeypatch.setattr(console.time, "perf_counter", lambda: clock.now)
    return clock


def steps(time_left, clock, seconds, n):
    told = []
    for step in range(n):
        clock.now += seconds
        if time_left.step():
            told.append(step + 1)
    return told


def test_the_speed_is_known_inside_a_long_epoch_and_told_once(clock, tmp_path):
    time_left = TimeLeft(2048, 3125, 128, wait=lambda: None)
    time_left.start()
    assert time_left.left(0) is None
    assert steps(time_left, clock, 2, 4) == []  # kernels are built
    assert steps(time_left, clock, 7, 10) == [1]
    assert time_left.per_epoch == pytest.approx(7 * 3125)
    assert time_left.left(0, 14) == pytest.approx(7 * (2048 * 3125 - 14))
    options = parse(C10, ["--dump-dir", str(tmp_path)])
    options.device = torch.device("cpu")
    assert time_left.line(0, 14, options) == (
        "An epoch trains for about 6.1 hours; 1.4 years remain in all, without tests. "
        "To shorten it: a GPU, --recipe fast or a smaller -N."
    )
    slow = TimeLeft(2048, 3125, 128, wait=lambda: None)
    slow.start()
    assert steps(slow, clock, 40, 10) == [2]
    options.device, options.recipe = torch.device("cuda"), "fast"
    assert time_left.line(2047, 0, options).endswith("; 6.1 hours remain in all, without tests.")
    line = "; 2 days remain in all, without tests. To shorten it: a smaller -N."
    assert time_left.line(2040, 0, options).endswith(line)


def test_short_steps_are_told_of_after_some_seconds_and_not_after_the_first_epoch(clock):
    time_left = TimeLeft(3, 1000, 1, wait=lambda: None)
    time_left.start()
    assert steps(time_left, clock, 0.01, 1000) == [504]
    short = TimeLeft(3, 100, 1, wait=lambda: None)
    short.start()
    assert steps(short, clock, 0.01, 100) == []
    short.trained()
    short.start()
    assert steps(short, clock, 1, 100) == []


def test_training_and_both_kinds_of_test_are_apart(clock):
    time_left = TimeLeft(10, 20, 4, wait=lambda: None)  # full tests after epochs 1, 4 and 8

    def epoch(number, training, testing):
        time_left.start()
        steps(time_left, clock, training, 20)
        time_left.trained()
        clock.now += testing
        time_left.tested(number == 1 or number % 4 == 0)

    epoch(1, 1, 30)
    assert time_left.left(1) == pytest.approx(9 * 20 + 9 * 30)  # no other test is known yet
    epoch(2, 1, 5)
    assert time_left.left(2) == pytest.approx(8 * 20 + 2 * 30 + 6 * 5)
    epoch(3, 1, 5)
    epoch(4, 1, 40)
    assert time_left.left(4) == pytest.approx(6 * 20 + 40 + 5 * 5)
    assert time_left.left(10) == 0
    for number in range(5, 8):  # a machine that has become slower
        epoch(number, 3, 5)
    assert time_left.left(7) == pytest.approx(3 * 60 + 40 + 2 * 5)


@pytest.mark.parametrize("batches", [1, 2, 3, 4, 5, 9])
def test_the_first_steps_count_only_as_long_as_there_are_no_others(clock, batches):
    time_left = TimeLeft(100, batches, 1, wait=lambda: None)
    taken, per_step = 0, None
    for _ in range(6):
        time_left.start()
        for _ in range(batches):
            steps(time_left, clock, 2 if taken < 4 else 1, 1)
            taken += 1
        time_left.trained()
        per_step = time_left.per_epoch / batches
        assert per_step == pytest.approx(2 if taken <= 4 else 1)


def test_the_device_is_waited_for_before_the_clock_is_read(clock):
    def wait():
        clock.now += 2.0  # the host was ahead

    time_left = TimeLeft(2, 10, 1, wait)
    time_left.start()
    steps(time_left, clock, 0, 10)
    time_left.trained()
    assert time_left.per_epoch == pytest.approx(2.0 / 6 * 10)


def test_a_run_tells_early_and_after_every_epoch_and_after_a_resume(run, monkeypatch):
    monkeypatch.setattr(TimeLeft, "ENOUGH", 0.0)  # as if the steps were long
    early = r"An epoch trains for about \S+ \w+; \S+ \w+ remain in all, without tests\."
    for argv, epochs in ((["-N", "2"], [1, 2]), (["-N", "5"], [3, 4, 5])):
        out = run(*GRAD, *argv).out
        (at,) = [match.start() for match in re.finditer(early, out)]
        found = re.findall(r"^epoch (\d)/\d .* \d+\.\d s  (\d+ \w+) left$", out, re.MULTILINE)
        assert [int(epoch) for epoch, _ in found] == epochs
        assert found[-1][1] == "0 seconds"
        assert at < out.index(f"epoch {epochs[0]}/")


def test_short_epochs_are_not_announced(run):
    assert "An epoch trains for" not in run(*GRAD, "-N", "2").out


def test_the_time_left_is_told_beside_a_progress_bar(run, monkeypatch):
    monkeypatch.setattr(TimeLeft, "ENOUGH", 0.0)
    monkeypatch.setattr("training.loop.sys.stderr.isatty", lambda: True)
    assert "An epoch trains for" in run(*GRAD, "-N", "1").out


# -- the first lines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "first", "third"),
    [
        ("", "Dense training on mnist: learning rate 1e-4, batches of 128, 8 time steps, 512 epochs, seed 2020.", None),
        (
            "-m grad -s 0.95 -N 1 -T 1 --seed 7",
            "Grad R on mnist: penalty 1e-3, learning rate 1e-4, batches of 128, 1 time step, 1 epoch, seed 7.",
            "-s 0.95 is the target of the prior, not the final sparsity, which depends on -penalty, -lr and "
            "-N. To set the final connectivity, use --recipe fast --connectivity.",
        ),
        (
            "-m grad -s 0.9 --plain-gradient",
            "Grad R without its redefined gradient on mnist: penalty 1e-3, ",
            "-s 0.9 is the target of the prior",
        ),
        (
            "-m grad --recipe fast --connectivity 0.05",
            "Grad R on mnist with the fast recipe: learning rate 5e-3, batches of 512, ",
            "The penalty is scheduled so that 5 % of the weights stay connected.",
        ),
        (
            "-m deep -s 0.9 -temperature 1e-3 --dataset digits",
            "Deep R on digits: penalty 1e-3, temperature 1e-3, ",
            "-s 0.9 is the maximum sparsity of each layer, not the final one: beyond it, connections are regrown. "
            "To set the final connectivity, use -m grad --recipe fast --connectivity.",
        ),
        (
            "-m deep -soft -s 0.9",
            "Soft Deep R on mnist: penalty 1e-3, ",
            "-s 0.9 is the target of the prior, not the final sparsity, which depends on -penalty, "
            "-temperature, -lr and -N. To set the final connectivity",
        ),
    ],
)
def test_the_first_lines_say_what_runs_and_what_s_means(tmp_path, argv, first, third):
    options = parse(MNIST, ["--dump-dir", str(tmp_path), *argv.split()])
    options.device = torch.device("cpu")
    lines = first_lines(options, tmp_path / "logs", tmp_path / "model")
    assert lines[0].startswith(first)
    assert re.fullmatch(r"On CPU, \d+ threads?, in fp32; logs go to \S+/logs, the model to \S+/model\.", lines[1])
    assert len(lines) == (2 if third is None else 3)
    assert third is None or lines[2].startswith(third)


def test_a_run_begins_with_them(run):
    out = run(*GRAD, "-N", "1").out
    assert out.index("Grad R on mnist: ") < out.index("-s 0.95 is the target") < out.index("epoch 1/1")
    assert "Grad R on mnist" not in run(*GRAD, "-N", "1").out  # there is nothing to run
    assert "Grad R on mnist" not in run(*GRAD, "-test").out
