"""kill -9 at random moments, inside checkpoint writes and epochs after one, until the run is as if never killed.

One kill by default; KILLS says how many (.ci/run: 3, make kill-test: 50).
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import forked
import pytest
from run_helpers import assert_same_run, load, the_checkpoint

from training.files import storage
from training.files.storage import temporary_of

KILLS = int(os.environ.get("KILLS", "1"))
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def command(folder, epochs, minutes):
    # noise from the default generator
    settings = f"--dataset digits -m deep -s 0.9 -temperature 1e-4 -lr 1e-3 -b 128 -i1 3 -i2 5 -N {epochs}"
    folder = ["--checkpoint-minutes", minutes, "--dump-dir", str(folder)]
    return ["mnist/mnist.py", *settings.split(), *folder]


def begin(*arguments):
    process = forked.start(command(*arguments), env=ENVIRONMENT)
    ended = False
    while "\n" not in process.out:
        assert not ended, process.err
        ended = process.poll() is not None
        time.sleep(0.002)
    assert "No GPU found" in process.out.splitlines()[0]
    return process


def is_training(folder, since):
    """Whether the process has got as far as to log what it does."""
    return any(path.stat().st_mtime >= since for path in folder.glob("logs/*/run.json"))


def epochs_to_repeat(folder):
    """How many epochs the results have that the checkpoint has not."""
    (models,) = folder.glob("models/*")
    state, *_ = storage.newest(models / storage.CHECKPOINT)
    lines = sum(path.read_bytes().count(b"\n") for path in folder.glob("logs/*/results.jsonl"))
    return lines - state["epoch"]


# Checkpoints after each step, or as by default: after the first epoch of each process, and at the end.
@pytest.mark.parametrize(("minutes", "epochs"), [("1e-9", 3 + KILLS // 2), ("10", 8 + KILLS)])
def test_a_run_that_is_killed_anywhere_ends_as_if_it_never_was(tmp_path, minutes, epochs):
    draw = random.Random(KILLS)
    one, killed = tmp_path / "one", tmp_path / "killed"
    # in a new Python, so with another order of sets
    new = [sys.executable, *command(one, epochs, minutes)]
    subprocess.run(new, cwd=forked.REPOSITORY, env=ENVIRONMENT, check=True, capture_output=True)
    kills = in_writes = processes = most = 0
    while True:
        processes += 1
        assert processes < 10 * KILLS + 10
        since = time.time()
        process = begin(killed, epochs, minutes)
        if kills < KILLS:
            while process.poll() is None and not is_training(killed, since):
                time.sleep(0.002)
            into_a_write = draw.random() < 0.5 and (minutes == "1e-9" or kills)  # the first kill comes epochs later
            epochs_later = 2 if minutes == "10" and not into_a_write else 0
            while process.poll() is None and epochs_to_repeat(killed) < epochs_later:
                time.sleep(0.02)
            deadline = time.monotonic() + draw.uniform(0.0, 0.6)
            # a fast machine would come to the end, and save
            while process.poll() is None and time.monotonic() < deadline and epochs_to_repeat(killed) < 4:
                time.sleep(0.001)
            temporary = None
            if into_a_write:  # wait for the next one to begin, and a moment of it
                while process.poll() is None and not (temporary and temporary.exists()):
                    temporary = next((temporary_of(p) for p in killed.glob("models/*/checkpoint.pt")), None)
                    time.sleep(0.0005)
                time.sleep(draw.uniform(0.0, 0.01))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                kills += 1
                in_writes += any(path.name.endswith(".tmp") for path in killed.glob("models/*/*"))
                most = max(most, epochs_to_repeat(killed))
                continue
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert not re.search("damaged|lost its end", out)
        assert load(killed)["epoch"] == epochs
        assert_same_run(one, killed)
        assert not temporary_of(the_checkpoint(killed)).exists()
        if kills == KILLS:
            assert minutes == "1e-9" or most >= 2
            break
        shutil.rmtree(killed)  # it was too fast; once more from the start
    print(
        f"{kills} kills, {in_writes} of them inside a checkpoint write, at most {most} epochs after one, "
        f"{processes} processes: 0 differences"
    )
