"""Evaluations: as many test images at a time as memory holds, and the files of a test.

A test stores ``test.json``, and ``rate-<LIF layer>-epoch-<epoch>.npy`` for each LIF layer; of a checkpoint within the
epoch after it, ``…-epoch-<epoch>-step-<steps>.npy``.
"""

import io
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from measuring.report import Report
from training import files
from training.data import TestBatches
from training.experiment import Experiment
from training.files import json_files
from training.metrics import FILES, TEST
from training.recording import Recording

Result = TypeVar("Result")


def images_at_a_time(experiment: Experiment, options: Namespace) -> int:
    """The number of test images at a time; on a GPU at most -b, so that a test adds little to what training needs."""
    if options.device.type == "cuda":
        return min(experiment.test_batch_size, options.batch_size)
    return experiment.test_batch_size


def in_memory(evaluate: Callable[[], Result], batches: TestBatches) -> Result:
    """Evaluates; where a GPU's memory is too small, once more from the start, with batches of half as many images.

    It leaves no memory to torch's allocator that what follows could not use.

    Raises:
        torch.OutOfMemoryError: there is no room for one image.
    """
    while True:
        try:
            return evaluate()
        except torch.OutOfMemoryError:
            if min(batches.batch_size, len(batches.split)) == 1:
                raise
        finally:
            torch.cuda.empty_cache()
        # here the error is gone, and with it what its traceback keeps in memory
        before = min(batches.batch_size, len(batches.split))
        batches.batch_size = before // 2
        print(f"No memory for {before} test images at a time: testing {batches.batch_size} at a time.", flush=True)


def store_report(folder: Path, report: Report, data: str, precision: str) -> None:
    """Prints a test's results and stores them in the log folder, with the data's fingerprint and the precision."""
    folder.mkdir(parents=True, exist_ok=True)
    print("\n".join(report.lines()))
    place = f"epoch-{report.epoch}" + (f"-step-{report.position}" if report.position else "")
    for name, rates in report.rates.items():
        array = io.BytesIO()
        np.save(array, rates.cpu().numpy())
        files.write_whole(folder / f"rate-{name}-{place}.npy", array.getvalue())
    record = Recording(TEST)
    report.record(record)
    record("data", data)
    record("precision", precision)
    json_files.write(folder / FILES[TEST], record.content())
    print(f"\nThe firing rates of all neurons and {FILES[TEST]} are in {folder}.")
