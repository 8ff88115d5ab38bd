"""Reads the results of finished rows, from the dump folder or from an outcome's CSV files, and writes these files.

``rows.csv``, ``epochs.csv``, ``layers.csv`` and ``neurons.csv`` hold everything that the other files of an outcome
show, so an outcome needs no dump folder.
"""

import contextlib
import csv
import functools
import io
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from analysis.experiments import EXPERIMENTS
from analysis.runs import LARGEST_RESULTS
from measuring.synapses import positions
from reproduce import records
from reproduce.grid import Row
from reproduce.records import MADE
from training.errors import Refusal
from training.files.json_files import nested, number, read_file, shown

ROWS, EPOCHS, LAYERS, NEURONS = "rows.csv", "epochs.csv", "layers.csv", "neurons.csv"
SUMS = ("pruned_in_all", "regrown_in_all", "train_seconds")  # over all epochs
EPOCH = ("test_accuracy", "connectivity", "pruned", "regrown", "train_accuracy")  # an epoch's numbers in epochs.csv
ADDED = {"precision", "train_accuracy"}  # columns that older outcomes have not
LAYER = ("connected", "weights", "positions", "operations")  # a layer's numbers in layers.csv
NEURON = ("firing_rate", "silent")  # the numbers of a layer of neurons in neurons.csv


@dataclass(frozen=True)
class Entry:
    """A finished row with its results."""

    row: Row  # of the grid
    numbers: dict[str, float]  # its results, by the names in rows.csv; NaN where it is not known
    made: dict[str, str]  # how, by the names in MADE; empty texts where it is not known
    epochs: list[dict[str, float]]  # after each epoch up to the row's last, by the names in EPOCH; NaN where it is lost
    # after the last epoch, the numbers of LAYER by the weight's name, and those of NEURON by the neurons'; none where
    # they are not known
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    neurons: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def synapses(self) -> float:
        """The share of the network's synapses that are connected (see :mod:`measuring.synapses`); NaN if not known."""
        if self.numbers["connectivity"] == 1:
            return 1.0
        connected, all_of_them = (
            sum(layer[key] * layer["positions"] for layer in self.layers.values()) for key in ("connected", "weights")
        )
        return connected / all_of_them if all_of_them else math.nan


def collect(dump: Path, rows: Sequence[Row], folder: Path) -> list[Entry]:
    """The finished rows in the grid's order, from the dump folder or else from the outcome in ``folder``.

    Raises:
        Refusal: the outcome in ``folder`` cannot be read, or has rows that are not in the grid.
    """
    earlier = {line["command"]: line for line in recorded(folder)}
    if strange := sorted(earlier.keys() - {row.command for row in rows}):
        raise Refusal(f"{folder / ROWS}: this row is not in the grid and would be lost: {strange[0]}")
    earlier_epochs = _by_row(_lines(folder / EPOCHS, ["row"], ["epoch", *EPOCH]))
    earlier_layers = _by_row(_lines(folder / LAYERS, ["row", "layer"], LAYER))
    earlier_neurons = _by_row(_lines(folder / NEURONS, ["row", "layer"], NEURON))
    entries = []
    for row in rows:
        line, kept = earlier.get(row.command), earlier_epochs[row.key]
        for epoch in (result["epoch"] for result in kept):
            if not (1 <= epoch <= row.epochs and epoch.is_integer()):
                raise Refusal(f"{folder / EPOCHS}: not an epoch of {row.key}: {epoch:g}")
        layers, neurons = _parts(earlier_layers[row.key], LAYER), _parts(earlier_neurons[row.key], NEURON)
        if record := records.finished(dump, row):
            results = [result for result in records.state(dump, row).epochs if result["epoch"] <= row.epochs]
            complete = _all_there(results, row)
            numbers, made = _numbers(record, results if complete else []), _made(record)
            same = line is not None and _same(line, numbers)  # then the outcome has what the record has not
            layers = _layers(record, row) or (layers if same else {})
            neurons = _neurons(record) or (neurons if same else {})
            if not complete and same and _all_there(kept, row):
                results, numbers = kept, numbers | {key: line[key] for key in SUMS}  # the run's logs were lost since
        elif line is not None:
            results = kept
            numbers, made = ({key: line[key] for key in keys} for keys in (_numbers({}, []), MADE))
        else:
            continue
        by_epoch = {int(result["epoch"]): {key: number(result, key) for key in EPOCH} for result in results}
        lost = dict.fromkeys(EPOCH, math.nan)
        epochs = [by_epoch.get(epoch, lost) for epoch in range(1, max(by_epoch, default=0) + 1)]
        entries.append(Entry(row, numbers, made, epochs, layers, neurons))
    return entries


def _by_row(lines: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        found[line["row"]].append(line)
    return found


def _parts(lines: Iterable[dict[str, Any]], keys: Sequence[str]) -> dict[str, dict[str, float]]:
    return {line["layer"]: {key: line[key] for key in keys} for line in lines}


def _all_there(results: Sequence[dict[str, Any]], row: Row) -> bool:
    """Whether there are results of each epoch up to the row's last."""
    return {result["epoch"] for result in results} == set(range(1, row.epochs + 1))


def _same(line: dict[str, Any], numbers: dict[str, float]) -> bool:
    """Whether an outcome's line tells what a row's record does."""
    return all(line[key] == numbers[key] for key in ("test_accuracy", "connectivity"))


def recorded(folder: Path) -> list[dict[str, Any]]:
    """The rows of the outcome in a folder, by the columns of ``rows.csv``; none where there is no outcome.

    Raises:
        Refusal: the file is not one that :func:`rows_csv` made.
    """
    return _lines(folder / ROWS, ["row", "command", *MADE], list(_numbers({}, [])))


def _lines(path: Path, texts: Sequence[str], numbers: Sequence[str]) -> list[dict[str, Any]]:
    """The lines of a CSV file, which must have these columns, but for those in ADDED; none where there is no file.

    An empty number is NaN.
    """
    try:
        text = read_file(path, LARGEST_RESULTS).decode()
        lines: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, csv.Error) as error:
        raise Refusal(f"{path}: cannot be read: {error}") from None
    for line in lines:
        line.update(dict.fromkeys(ADDED.intersection([*texts, *numbers]) - line.keys(), ""))
        if missing := [column for column in (*texts, *numbers) if line.get(column) is None]:
            raise Refusal(f"{path}: a line has no {missing[0]}")
        line.update({key: _value(path, line[key]) for key in numbers})
    return lines


def _value(path: Path, text: str) -> float:
    with contextlib.suppress(ValueError):
        if not math.isinf(value := float(text or "nan")):
            return value
    raise Refusal(f"{path}: not a number: {text!r}")


def _numbers(record: dict[str, Any], results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """A row's results, from its record and the lines of all its epochs; NaN where it is not known."""
    layers = list((nested(record, "result", "layers") or {}).values())
    operations = [nested(layer) or {} for layer in (nested(record, "test", "operations") or {}).values()]

    def total(parts: Sequence[dict[str, Any]], key: str) -> float:
        return sum(number(part, key) for part in parts) if parts else math.nan

    return {
        "test_accuracy": number(record, "result", "test_accuracy"),
        "best_accuracy": number(record, "result", "best_accuracy"),
        "connectivity": number(record, "result", "connectivity"),
        "connected": total(layers, "connected"),
        "weights": total(layers, "weights"),
        "structural_connectivity": number(record, "test", "structural_connectivity"),
        "synops": total([layer for layer in operations if layer.get("kind") == "SynOp"], "pruned"),
        "macs": total([layer for layer in operations if layer.get("kind") == "MAC"], "pruned"),
        "energy_pj": number(record, "test", "energy", "pruned"),
        "pruned_in_all": total(results, "pruned"),
        "regrown_in_all": total(results, "regrown"),
        "train_seconds": total(results, "train_seconds"),
    }


def _layers(record: dict[str, Any], row: Row) -> dict[str, dict[str, float]]:
    """The numbers of each layer, from a row's record; NaN where it is not known."""
    found = {}
    for name, layer in (nested(record, "result", "layers") or {}).items():
        counted = {key: number(nested(layer) or {}, key) for key in ("connected", "weights")}
        places = _positions(row.experiment, row.options.dataset, row.options.width).get(name, math.nan)
        operations = number(record, "test", "operations", name, "pruned")
        found[shown(name)] = counted | {"positions": places, "operations": operations}
    return found


def _neurons(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    neurons = nested(record, "test", "neurons") or {}
    return {shown(name): {key: number(nested(part) or {}, key) for key in NEURON} for name, part in neurons.items()}


@functools.cache
def _positions(experiment: str, dataset: str, width: int) -> dict[str, int]:
    about = EXPERIMENTS[experiment]
    with torch.random.fork_rng(devices=[]):
        return positions(about.network(1, width=width).eval(), about.dataset(dataset).shape)


def _made(record: dict[str, Any]) -> dict[str, str]:
    versions = sorted((nested(record, "run", "versions") or {}).items())
    text = ", ".join(f"{shown(name)} {shown(value)}" for name, value in versions)
    return {key: shown(record["run"].get(key), 2000) for key in MADE} | {"versions": text}


def rows_csv(entries: Sequence[Entry]) -> str:
    """A line for every finished row; unknown numbers are empty."""
    lines = []
    for entry in entries:
        row = entry.row
        about = {"title": row.title, "variant": row.variant, "epochs": row.epochs, "seed": row.seed}
        lines.append({**about, **entry.numbers, **entry.made, "row": row.key, "command": row.command})
    return _csv(lines)


def epochs_csv(entries: Sequence[Entry]) -> str:
    """A line for every epoch of every row; unknown numbers are empty.

    A column that was added later is left out where none of its numbers is known.
    """
    results = [line for entry in entries for line in entry.epochs]
    known = [key for key in EPOCH if key not in ADDED or not all(math.isnan(line[key]) for line in results)]
    lines = [
        {"row": entry.row.key, "epoch": epoch, **{key: numbers[key] for key in known}}
        for entry in entries
        for epoch, numbers in enumerate(entry.epochs, 1)
    ]
    return _csv(lines)


def layers_csv(entries: Sequence[Entry]) -> str:
    """A line for each layer of every row, after its last epoch, where they are known."""
    return _csv([line for entry in entries for line in _of_layers(entry, entry.layers)])


def neurons_csv(entries: Sequence[Entry]) -> str:
    """A line for each layer of neurons of every row, after its last epoch, where they are known."""
    return _csv([line for entry in entries for line in _of_layers(entry, entry.neurons)])


def _of_layers(entry: Entry, layers: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    return [{"row": entry.row.key, "layer": name, **numbers} for name, numbers in layers.items()]


def _csv(lines: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in line.items()} for line in lines)
    return text.getvalue()


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return ""
    return str(int(value)) if value.is_integer() else repr(value)
