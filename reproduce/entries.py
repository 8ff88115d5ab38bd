"""Reads the results of finished rows, from the dump folder or from an outcome's CSV files, and writes these files.

``rows.csv`` and ``epochs.csv`` hold everything that the other files of an outcome show, so an outcome needs no
dump folder.
"""

import contextlib
import csv
import io
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.runs import LARGEST_RESULTS
from reproduce import records
from reproduce.grid import Row
from reproduce.records import MADE
from training.errors import Refusal
from training.files.json_files import nested, number, read_file, shown

ROWS, EPOCHS = "rows.csv", "epochs.csv"
SUMS = ("pruned_in_all", "regrown_in_all", "train_seconds")  # over all epochs
EPOCH = ("test_accuracy", "connectivity", "pruned", "regrown")  # the numbers of an epoch in epochs.csv


@dataclass(frozen=True)
class Entry:
    """A finished row with its results."""

    row: Row  # of the grid
    numbers: dict[str, float]  # its results, by the names in rows.csv; NaN where it is not known
    made: dict[str, str]  # how, by the names in MADE; empty texts where it is not known
    epochs: list[dict[str, float]]  # after each epoch up to the row's last, by the names in EPOCH; NaN where it is lost


def collect(dump: Path, rows: Sequence[Row], folder: Path) -> list[Entry]:
    """The finished rows in the grid's order, from the dump folder or else from the outcome in ``folder``.

    Raises:
        Refusal: the outcome in ``folder`` cannot be read, or has rows that are not in the grid.
    """
    earlier = {line["command"]: line for line in recorded(folder)}
    if strange := sorted(earlier.keys() - {row.command for row in rows}):
        raise Refusal(f"{folder / ROWS}: this row is not in the grid and would be lost: {strange[0]}")
    earlier_epochs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in _lines(folder / EPOCHS, ["row"], ["epoch", *EPOCH]):
        earlier_epochs[line["row"]].append(line)
    entries = []
    for row in rows:
        line, kept = earlier.get(row.command), earlier_epochs[row.key]
        for epoch in (result["epoch"] for result in kept):
            if not (1 <= epoch <= row.epochs and epoch.is_integer()):
                raise Refusal(f"{folder / EPOCHS}: not an epoch of {row.key}: {epoch:g}")
        if record := records.finished(dump, row):
            results = [result for result in records.state(dump, row).epochs if result["epoch"] <= row.epochs]
            complete = _all_there(results, row)
            numbers, made = _numbers(record, results if complete else []), _made(record)
            if not complete and line is not None and _all_there(kept, row) and _same(line, numbers):
                results, numbers = kept, numbers | {key: line[key] for key in SUMS}  # the run's logs were lost since
        elif line is not None:
            results = kept
            numbers, made = ({key: line[key] for key in keys} for keys in (_numbers({}, []), MADE))
        else:
            continue
        by_epoch = {int(result["epoch"]): {key: number(result, key) for key in EPOCH} for result in results}
        lost = dict.fromkeys(EPOCH, math.nan)
        epochs = [by_epoch.get(epoch, lost) for epoch in range(1, max(by_epoch, default=0) + 1)]
        entries.append(Entry(row, numbers, made, epochs))
    return entries


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
    return _lines(folder / ROWS, ["row", "command", *MADE], list(_numbers({}, [])), added=["precision"])


def _lines(path: Path, texts: Sequence[str], numbers: Sequence[str], added: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The lines of a CSV file, which must have these columns, but for those that were ``added`` to them later.

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
        line.update({column: "" for column in added if column not in line})
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
    """A line for every epoch of every row; unknown numbers are empty."""
    lines = [
        {"row": entry.row.key, "epoch": epoch, **numbers}
        for entry in entries
        for epoch, numbers in enumerate(entry.epochs, 1)
    ]
    return _csv(lines)


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
