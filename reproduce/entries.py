"""Reads the results of finished rows, from the dump folder or from an outcome's CSV files, and writes these files.

``rows.csv`` and ``epochs.csv`` hold everything that the other files of an outcome show, so an outcome needs no
dump folder.
"""

import csv
import io
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.runs import LARGEST_RESULTS
from reproduce import records
from reproduce.grid import Row
from reproduce.records import MADE
from training.command_line import format_number
from training.errors import Refusal
from training.files.json_files import nested, number, read_file, shown
from training.methods.method import PENALTY

ROWS, EPOCHS = "rows.csv", "epochs.csv"
EPOCH = ("test_accuracy", "connectivity", "pruned", "regrown")  # the numbers of an epoch in epochs.csv


@dataclass(frozen=True)
class Entry:
    """A finished row with its results.

    Attributes:
        row: of the grid.
        numbers: its results, by the names in ``rows.csv``; NaN where it is not known.
        made: how, by the names in ``MADE``; empty texts where it is not known.
        epochs: the numbers after each epoch up to the row's last, by the names in ``EPOCH``; NaN where they are lost.
    """

    row: Row
    numbers: dict[str, float]
    made: dict[str, str]
    epochs: list[dict[str, float]]

    @property
    def variant(self) -> str:
        """The options of its method that have a value, and the learning rate."""
        texts = []
        for option in sorted(self.row.method.options, key=lambda option: (option.place == "last", option is PENALTY)):
            if option.type is not None and (parts := option.parts(self.row.options)):
                texts += [option.spellings.split("/")[0], parts[1].removesuffix(".0")]
        return " ".join([*texts, "-lr", format_number(self.row.options.learning_rate)])


def collect(dump: Path, rows: Sequence[Row], folder: Path) -> list[Entry]:
    """The finished rows in the grid's order, from the dump folder or else from the outcome in ``folder``.

    Raises:
        Refusal: the outcome in ``folder`` cannot be read, or has rows that are not in the grid.
    """
    earlier = {line["command"]: line for line in recorded(folder)}
    strange = sorted(earlier.keys() - {row.command for row in rows})
    if strange:
        raise Refusal(f"{folder / ROWS}: this row is not in the grid and would be lost: {strange[0]}")
    lines_of: dict[str, list[dict[str, str]]] = defaultdict(list)
    for line in _lines(folder / EPOCHS, ("row", "epoch", *EPOCH)):
        lines_of[line["row"]].append(line)
    entries = []
    for row in rows:
        record, line = records.finished(dump, row), earlier.get(row.command)
        by_epoch: dict[int, dict[str, float]] = {}
        if record is not None:
            results = [result for result in records.state(dump, row).epochs if result["epoch"] <= row.epochs]
            by_epoch = {result["epoch"]: {key: number(result, key) for key in EPOCH} for result in results}
            numbers, made = _numbers(record, results), _made(record)
        elif line is not None:
            for text in lines_of[row.key]:
                epoch = _value(folder / EPOCHS, text["epoch"])
                if epoch not in range(1, row.epochs + 1):
                    raise Refusal(f"{folder / EPOCHS}: not an epoch of {row.key}: {text['epoch']!r}")
                by_epoch[int(epoch)] = {key: _value(folder / EPOCHS, text[key]) for key in EPOCH}
            numbers = {key: _value(folder / ROWS, line[key]) for key in _numbers({}, [])}
            made = {key: line[key] for key in MADE}
        else:
            continue
        lost = dict.fromkeys(EPOCH, math.nan)
        epochs = [by_epoch.get(epoch, lost) for epoch in range(1, max(by_epoch, default=0) + 1)]
        entries.append(Entry(row, numbers, made, epochs))
    return entries


def recorded(folder: Path) -> list[dict[str, str]]:
    """The rows of the outcome in a folder, by the columns of ``rows.csv``; none where there is no outcome.

    Raises:
        Refusal: the file is not one that :func:`write` wrote.
    """
    return _lines(folder / ROWS, ("row", "command", *_numbers({}, []), *MADE))


def _lines(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    try:
        text = read_file(path, LARGEST_RESULTS).decode()
        lines = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, csv.Error) as error:
        raise Refusal(f"{path}: cannot be read: {error}") from None
    for line in lines:
        missing = [column for column in columns if line.get(column) is None]
        if missing:
            raise Refusal(f"{path}: a line has no {missing[0]}")
    return lines


def _value(path: Path, text: str) -> float:
    try:
        value = float(text) if text else math.nan
    except ValueError:
        value = math.inf
    if math.isinf(value):
        raise Refusal(f"{path}: not a number: {text!r}")
    return value


def _numbers(record: dict[str, Any], results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """A row's results, from its record and the lines of its run's results; NaN where it is not known."""
    layers, operations = nested(record, "result", "layers") or {}, nested(record, "test", "operations") or {}

    def of_layers(key: str) -> float:
        return sum(number(layer, key) for layer in layers.values()) if layers else math.nan

    def of_operations(kind: str) -> float:
        found = [number(layer, "pruned") for layer in operations.values() if (nested(layer) or {}).get("kind") == kind]
        return sum(found) if found else math.nan

    def of_epochs(key: str) -> float:
        return sum(number(line, key) for line in results) if results else math.nan

    return {
        "test_accuracy": number(record, "result", "test_accuracy"),
        "best_accuracy": number(record, "result", "best_accuracy"),
        "connectivity": number(record, "result", "connectivity"),
        "connected": of_layers("connected"),
        "weights": of_layers("weights"),
        "structural_connectivity": number(record, "test", "structural_connectivity"),
        "synops": of_operations("SynOp"),
        "macs": of_operations("MAC"),
        "energy_pj": number(record, "test", "energy", "pruned"),
        "pruned_in_all": of_epochs("pruned"),
        "regrown_in_all": of_epochs("regrown"),
        "train_seconds": of_epochs("train_seconds"),
    }


def _made(record: dict[str, Any]) -> dict[str, str]:
    versions = ", ".join(
        f"{shown(name)} {shown(value)}" for name, value in sorted((nested(record, "run", "versions") or {}).items())
    )
    return {key: versions if key == "versions" else shown(record["run"].get(key)) for key in MADE}


def rows_csv(entries: Sequence[Entry]) -> str:
    """A line for every finished row; unknown numbers are empty."""
    lines = []
    for entry in entries:
        row = entry.row
        about = {"title": row.title, "variant": entry.variant, "epochs": row.epochs, "seed": row.seed}
        numbers = {key: _cell(value) for key, value in entry.numbers.items()}
        lines.append({**about, **numbers, **entry.made, "row": row.key, "command": row.command})
    return _csv(lines)


def epochs_csv(entries: Sequence[Entry]) -> str:
    """A line for every epoch of every row; unknown numbers are empty."""
    return _csv(
        [
            {"row": entry.row.key, "epoch": epoch, **{key: _cell(value) for key, value in numbers.items()}}
            for entry in entries
            for epoch, numbers in enumerate(entry.epochs, 1)
        ]
    )


def _cell(value: float) -> str:
    if math.isnan(value):
        return ""
    return str(int(value)) if value == int(value) else repr(float(value))


def _csv(lines: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
