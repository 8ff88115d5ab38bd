"""The table of metrics: files, TensorBoard, console and docs/metrics.md have every number from it, and no other."""

import json
import re
from pathlib import Path

import pytest
from run_helpers import results, scalars

import measuring
from measuring.report import percent
from reproduce import entries
from training import metrics
from training.metrics import EPOCH, FULL, GRID, METRICS, SHARE, STEP, TEST, Metric
from training.recording import Recorder, Recording

ROOT = Path(__file__).resolve().parent.parent
GRAD = ["-m", "grad", "-s", "0.95", "-lr", "1e-2", "-b", "8"]


def test_the_page_is_made_from_the_table():
    assert (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8") == metrics.page(), "run make docs"


def test_every_number_is_defined_once():
    moments = re.findall(r"^<!-- (\w+) -->$", metrics.page(), re.MULTILINE)
    assert moments == [STEP, EPOCH, FULL, TEST, GRID]
    names = [(when, metric.key, metric.by_layer) for metric in METRICS for when in metric.when]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert metric.definition.endswith("."), metric.key
        assert set(metric.when) <= set(moments), metric.key
        page_row = (metric.key, metric.unit, metric.definition, metric.formula, metric.also)
        assert not any(mark in text for text in page_row for mark in "|\n"), metric.key
        row = f"| {metric.key}{', by layer' if metric.by_layer else ''} | {metric.unit or '–'} | "
        assert metrics.page().count(row) == sum(
            (other.key, other.by_layer, other.unit) == (metric.key, metric.by_layer, metric.unit) for other in METRICS
        )


def key_paths(content, *path):
    """The keys of nested objects, in their order, without what is in a distribution."""
    for key, value in content.items():
        if isinstance(value, dict) and "edges" not in value:
            yield from key_paths(value, *path, key)
        else:
            yield "/".join((*path, key))


def test_the_files_have_the_keys_that_readers_know(run, tmp_path):
    """In their order: results.jsonl of a full recording, of another epoch, and test.json."""
    run(*GRAD, "-N", "2")
    run(*GRAD, "-test")
    full, line = results(tmp_path)
    numbers = "epoch step train_loss train_accuracy test_accuracy best_accuracy sparsity connectivity"
    numbers += " sparsity_with_bn connectivity_with_bn pruned regrown"
    weights, neurons = ("static_fc.1.weight", "fc.1.weight"), ("fc.0", "fc.2")
    layers = [
        f"layers/{name}/{key}"
        for name in weights
        for key in ("connected", "weights", "sparsity", "connectivity", "pruned", "regrown")
    ]
    assert list(key_paths(line)) == [*numbers.split(), *layers, "learning_rate", "penalty"]
    rates = [f"neurons/{name}/{key}" for name in neurons for key in ("firing_rate", "silent")]
    distributions = [f"distributions/{name}/{kind}" for name in weights for kind in ("w", "theta")]
    assert list(key_paths(full)) == [*key_paths(line), *rates, *distributions]
    (path,) = tmp_path.glob("logs/*/results.jsonl")
    seconds = ["train_seconds", "test_seconds", "checkpoint_seconds"]
    assert list(json.loads(path.read_text("utf-8").splitlines()[1])) == [*line, *seconds]
    keys = "epoch position accuracy accuracy_interval right images confusion"
    keys += " sparsity connectivity structural_connectivity"
    of_layer = ("connected", "structural", "weights", "sparsity", "connectivity", "structural_connectivity")
    assert list(key_paths(json.loads(path.with_name("test.json").read_text("utf-8")))) == [
        *keys.split(),
        *(f"layer_sparsity/{name}" for name in weights),
        *(f"layers/{name}/{key}" for name in weights for key in of_layer),
        *rates,
        *(f"operations/{name}/{key}" for name in weights for key in ("kind", "pruned", "dense")),
        *("energy/pruned", "energy/dense", "data", "precision"),
    ]


def test_a_number_is_added_by_an_entry_and_a_line(run, tmp_path, monkeypatch):
    """One of the network, and one of each layer: in the results, TensorBoard, on the console and on the page."""
    turnover = Metric(
        "turnover", SHARE, (EPOCH,), "What changed.", "c / w", tag="turn/over", words="turnover", also="nowhere else"
    )
    lost = Metric("lost", "weights", (EPOCH,), "Gone.", "p", "layers/{layer}/{key}", tag="lost/{layer}")
    numbers = (*METRICS, turnover, lost)
    run(*GRAD, "-N", "2", dump=tmp_path / "before")
    monkeypatch.setattr(metrics, "METRICS", numbers)
    record_rewired = measuring.record_rewired

    def with_two_more(record, layers):
        record_rewired(record, layers)
        record("turnover", sum(pruned for pruned, _ in layers.values()) / 635200)
        for name, (pruned, _) in layers.items():
            record("lost", pruned, layer=name)

    monkeypatch.setattr(measuring, "record_rewired", with_two_more)
    told = run(*GRAD, "-N", "2", dump=tmp_path / "after").out
    lines, (events, _) = results(tmp_path / "after"), scalars(tmp_path / "after")
    shares = [line["pruned"] / 635200 for line in lines]
    assert shares[0] > 0
    assert [line["turnover"] for line in lines] == shares
    assert events["turn/over"] == [(1, pytest.approx(shares[0])), (2, pytest.approx(shares[1]))]
    for name in ("static_fc.1.weight", "fc.1.weight"):
        assert [line["layers"][name]["lost"] for line in lines] == [line["layers"][name]["pruned"] for line in lines]
        assert events[f"lost/{name}"] == events[f"prune_cnt/{name}"]
    said = [line for line in told.splitlines() if line.startswith("epoch")]
    assert all(f"  turnover {percent(share)}" in line for share, line in zip(shares, said, strict=True))
    rows = set(metrics.page().splitlines()) - set((ROOT / "docs" / "metrics.md").read_text("utf-8").splitlines())
    assert rows == {
        "| turnover | share | `results.jsonl`; TensorBoard `turn/over`; console, as “turnover”; nowhere else "
        "| What changed. | c / w |",
        "| lost, by layer | weights | `results.jsonl` as `layers/<layer>/lost`; TensorBoard `lost/<layer>` "
        "| Gone. | p |",
    }
    # and nothing else is recorded in another way
    before, (tags, _) = results(tmp_path / "before"), scalars(tmp_path / "before")
    for line in lines:
        del line["turnover"]
        for layer in line["layers"].values():
            del layer["lost"]
    assert lines == before
    assert {tag: values for tag, values in events.items() if not tag.startswith(("turn", "lost"))} == tags


def recorded(*moments, skip):
    """A recording of all numbers of a moment, but of what ``skip`` is true for."""
    record = Recording(*moments)
    for metric in record.values:
        for layer in ("a", "b") if metric.by_layer else (None,):
            if not metric.optional and not skip(metric, layer):
                record(metric.key, 0, layer=layer)
    return record


@pytest.mark.parametrize("moments", [(STEP,), (EPOCH,), (EPOCH, FULL), (TEST,)])
def test_what_is_missing_is_an_error(moments):
    recorded(*moments, skip=lambda *number: False).check()
    needed = [metric for metric in Recording(*moments).values if not metric.optional]
    assert needed
    for metric in needed:
        with pytest.raises(ValueError, match=rf"^'{metric.key}' is not recorded$"):
            recorded(*moments, skip=lambda other, layer, metric=metric: other is metric).check()


@pytest.mark.parametrize("key", ["connected", "weights", "sparsity", "connectivity", "pruned", "regrown"])
def test_a_layer_that_is_missing_is_an_error(key):
    with pytest.raises(ValueError, match=rf"^'{key}' is not recorded for every layer$"):
        recorded(EPOCH, skip=lambda metric, layer: (metric.key, layer) == (key, "a")).check()


def test_a_run_that_records_too_little_ends(run, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "record_rewired", lambda record, layers: None)
    with pytest.raises(ValueError, match="'pruned' is not recorded"):
        run(*GRAD, "-N", "1")
    assert not any(path.read_bytes() for path in tmp_path.glob("logs/*/results.jsonl"))


@pytest.mark.parametrize(
    ("key", "layer", "message"),
    [
        ("tset_accuracy", None, "'tset_accuracy' without a layer is not in training.metrics.METRICS for epoch"),
        ("connected", None, "'connected' without a layer is not"),
        ("test_accuracy", "fc.0", "'test_accuracy' of fc.0 is not"),
        ("firing_rate", "fc.0", "'firing_rate' of fc.0 is not"),  # only in a full recording
        ("batch_loss", None, "'batch_loss' without a layer is not"),
        ("fan-in", None, "'fan-in' without a layer is not"),
        ("epoch", None, "'epoch' without a layer is recorded twice"),
        ("weights", "a", "'weights' of a is recorded twice"),
    ],
)
def test_what_is_not_in_the_table_or_was_recorded_is_an_error(key, layer, message):
    record = Recording(EPOCH)
    record("epoch", 1)
    record("weights", 1, layer="a")
    record("weights", 1, layer="b")
    with pytest.raises(ValueError, match=message):
        record(key, 1, layer=layer)


def test_an_incomplete_epoch_is_not_in_the_results(tmp_path):
    with Recorder(tmp_path, {}) as recorder:
        with pytest.raises(ValueError, match="is not recorded"), recorder.epoch(1, full=False) as record:
            record("epoch", 1)
        with pytest.raises(ValueError, match="is not recorded"), recorder.step(0) as record:
            record("batch_loss", 1.0)
    assert not (tmp_path / "results.jsonl").exists()


def test_what_is_not_known_is_null_and_not_in_tensorboard(tmp_path, monkeypatch):
    numbers = [Metric(key, "", (STEP,), "A number.", tag=key) for key in ("known", "unknown")]
    monkeypatch.setattr(metrics, "METRICS", tuple(numbers))
    with Recorder(tmp_path / "logs" / "x", {}) as recorder, recorder.step(7) as record:
        record("known", 0.5)
        record("unknown", None)
    assert record.content() == {"known": 0.5, "unknown": None}
    assert scalars(tmp_path)[0] == {"known": [(7, 0.5)]}


def test_the_columns_of_a_grid_are_defined():
    defined = {metric.key for metric in METRICS if GRID in metric.when}
    assert set(entries._numbers({}, [])) <= defined
    in_epochs = {metric.key for metric in METRICS if "`epochs.csv`" in metric.also}
    assert in_epochs == set(entries.EPOCH)
