"""The files of a test: ``test.json``, and ``rate-<LIF layer>-epoch-<epoch>.npy`` for each LIF layer."""

import io
from pathlib import Path

import numpy as np

from measuring.report import Report
from training import files
from training.files import json_files
from training.metrics import FILES, TEST
from training.recording import Recording


def store_report(folder: Path, report: Report) -> None:
    """Prints a test's results and stores them in the log folder."""
    folder.mkdir(parents=True, exist_ok=True)
    print("\n".join(report.lines()))
    for name, rates in report.rates.items():
        array = io.BytesIO()
        np.save(array, rates.cpu().numpy())
        files.write_whole(folder / f"rate-{name}-epoch-{report.epoch}.npy", array.getvalue())
    record = Recording(TEST)
    report.record(record)
    json_files.write(folder / FILES[TEST], record.content())
    print(f"\nThe firing rates of all neurons and {FILES[TEST]} are in {folder}.")
