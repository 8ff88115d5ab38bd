"""What a run has left in its folders, read back to be compared."""

import json

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.files import storage


def the_checkpoint(folder):
    (path,) = folder.glob("models/*/checkpoint.pt")
    return path


def load(folder):
    return torch.load(the_checkpoint(folder), weights_only=True)


def store(folder, state):
    """Puts a changed state in the place of a run's newest checkpoint."""
    path = the_checkpoint(folder)
    storage.write(path, state)
    return path


def scalars(folder):
    """Everything that TensorBoard shows: {tag: [(step, value), ...]}, and the steps of the histograms.

    In the order of the steps: files that are begun within one second, as here, are not read in their order.
    """
    (log,) = folder.glob("logs/*")
    accumulator = EventAccumulator(str(log), size_guidance={"scalars": 0, "histograms": 0})
    accumulator.Reload()
    tags = accumulator.Tags()
    events = {tag: sorted((e.step, e.value) for e in accumulator.Scalars(tag)) for tag in tags["scalars"]}
    return events, {tag: sorted(e.step for e in accumulator.Histograms(tag)) for tag in tags["histograms"]}


def results(folder):
    """The lines of results.jsonl, without what the clock says."""
    (path,) = folder.glob("logs/*/results.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith("_seconds")} for line in lines]


def same(a, b):
    """Whether two nested checkpoints are bitwise the same, but for the clock and the names of the log files."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        clock = {"seconds", "files"}
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a.keys() - clock)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(one, other):
    """Final state, results and TensorBoard of two dump folders are bitwise the same."""
    assert same(load(one), load(other))
    assert results(one) == results(other)
    assert scalars(one) == scalars(other)
