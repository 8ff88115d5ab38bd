"""Keeps networks of a grid's finished rows, each with a card that says what it is. See --help."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import measuring
from analysis import shipped
from analysis.export import export, load_snapshot
from analysis.snapshot import Snapshot
from measuring import energy
from measuring.report import percent, report_on
from reproduce import grid, records
from reproduce.grid import Row
from training.command_line import Parser, check_writable, command, folder_path
from training.console import counted
from training.data import TestBatches
from training.data.dataset import Dataset, Split
from training.errors import Refusal
from training.files import storage, write_whole
from training.options import REPOSITORY
from training.run_info import everywhere


def in_half(snapshot: Snapshot) -> Snapshot:
    """The snapshot with its prunable weights rounded to half precision, so that the file has half the size."""
    rounded = {name: snapshot.state[name].half().float() for name in snapshot.shapes()}
    return replace(snapshot, state=snapshot.state | rounded)


def _batches(snapshot: Snapshot, split: Split) -> TestBatches:
    normalisation = snapshot.source.normalisation(torch.device("cpu"))
    return TestBatches(split, snapshot.about.test_batch_size, normalisation)


def tested(snapshot: Snapshot, dataset: Dataset) -> measuring.report.Report:
    """The test of a network on the CPU in full precision."""
    return report_on(snapshot.network(), _batches(snapshot, dataset.test), snapshot.epoch, snapshot.position)


def right_of_some(snapshot: Snapshot, dataset: Dataset) -> str:
    """The correct predictions of every fortieth test image in float64, which are the same on every processor.

    In float32 rounding decides whether a potential near the threshold is a spike, and with it an image now and then.
    """
    some = _batches(snapshot, dataset.test.part(slice(None, None, 40)))
    seen = measuring.evaluate(snapshot.network().double(), ((images.double(), labels) for images, labels in some))
    return f"{seen.right:,} of {seen.images:,} right"


def _right(report: measuring.report.Report) -> str:
    seen = report.evaluation
    return f"{percent(seen.accuracy)}, {seen.right:,} of {seen.images:,} images"


def card(name: str, row: Row, commit: str, path: Path, dataset: Dataset, before: Snapshot, note: str) -> str:
    """The Markdown card of the network in a file; ``before`` is the run's, and the ``note`` is on its data."""
    snapshot = load_snapshot(path)
    report = tested(snapshot, dataset)
    if report.left_out:
        raise Refusal(f"{name}: {' '.join(report.left_out)}")
    total = measuring.total(report.connected)
    connections = f"{total.connected:,} of {total.weights:,} connections"
    synops = sum(part.pruned / part.images for part in report.operations.values() if part.kind == "SynOp")
    rounded = [key for key, tensor in before.state.items() if not torch.equal(tensor, snapshot.state[key])]
    weights = "float32, as trained"
    if rounded:
        weights = f"rounded to float16; as trained, the test accuracy is {_right(tested(before, dataset))}"
    lines = {
        "network": f"{type(snapshot.plan()).__name__}, width {snapshot.width}, T {snapshot.T}; {row.title}",
        "command": f"`{row.command}`",
        "commit": commit,
        "data": f"{snapshot.dataset}: {snapshot.data}" + (f", {note}" if note else ""),
        "test accuracy": f"{_right(report)}; after the last of {counted(snapshot.epoch, 'epoch')}",
        "every fortieth test image in float64": right_of_some(snapshot, dataset),
        "connectivity": f"{percent(total.connectivity)}, {connections}",
        "SynOps per image": f"{synops:,.0f}",
        "energy per image": f"{energy.energy_per_image(report.operations.values()).pruned / 1000:,.1f} nJ",
        "weights": weights,
        "file": f"{path.name}, {path.stat().st_size:,} bytes",
    }
    table = "".join(f"| {key} | {value} |\n" for key, value in lines.items())
    return f"# {name}\n\n| | |\n| --- | --- |\n{table}"


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    text = "Keeps the networks that a grid names, of its finished rows: safetensors, each with a card in Markdown."
    parser = Parser(prog="python -m reproduce.networks", description=text)
    parser.add_argument("grid", choices=grid.names(), help="it is reproduce/<grid>.toml")
    folder = {"type": folder_path, "metavar": "DIR"}
    text = "folder for the files (default: results/<grid>/networks, in the repository)"
    parser.add_argument("-o", "--output", **folder, help=text)
    text = "folder that holds the data set (default: data, in the repository)"
    parser.add_argument("--dataset-dir", **folder, default=REPOSITORY / "data", help=text)
    text = "folder with the rows' logs and models (default: runs/<grid>-grid, in the repository)"
    parser.add_argument("--dump-dir", **folder, help=text)
    options = parser.parse_args(argv)
    options.output = options.output or shipped.folder(options.grid)
    options.dump_dir = options.dump_dir or grid.dump_dir(options.grid)
    return options


@command
def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    rows = grid.networks(options.grid)
    if not rows:
        raise Refusal(f"argument grid: reproduce/{options.grid}.toml names no networks")
    finished = {}
    for name, row in rows.items():
        models = options.dump_dir / "models" / row.name
        if storage.is_there(models / storage.CHECKPOINT):
            snapshot = load_snapshot(models)
            if (snapshot.epoch, snapshot.position) == (row.epochs, 0):
                finished[name] = snapshot
    if not finished:
        raise Refusal(f"argument --dump-dir: {options.dump_dir} has no finished row that the grid names a network of")
    check_writable("-o/--output", options.output)
    (source,) = {snapshot.source for snapshot in finished.values()}
    dataset = source.load(options.dataset_dir)
    found = dataset.fingerprint()
    for name, snapshot in finished.items():
        if snapshot.data != found:
            text = f"{name} was trained on other data ({snapshot.data or 'not known'}), not {found}"
            raise Refusal(f"argument --dataset-dir: {text}")
    for name, snapshot in finished.items():
        row, path = rows[name], options.output / f"{name}.safetensors"
        note = grid.data_note(options.grid, snapshot.data)
        export(snapshot if row.method.prunes else in_half(snapshot), "safetensors", path)
        commit = everywhere(records.state(options.dump_dir, row).info, "git_commit") or "not known"
        write_whole(path.with_suffix(".md"), card(name, row, commit, path, dataset, snapshot, note))
        print(f"{path}: {path.stat().st_size:,} bytes", flush=True)
    for name, row in rows.items():
        if name not in finished:
            print(f"not there: {name}, {row.command}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
