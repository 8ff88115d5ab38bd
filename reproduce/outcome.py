"""The outcome of a grid: tables (CSV, Markdown) and figures (PNG) of its finished rows, and how they were made."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from analysis.packages import imported
from reproduce.entries import (
    EPOCHS,
    LAYERS,
    MADE,
    NEURONS,
    ROWS,
    Entry,
    collect,
    epochs_csv,
    layers_csv,
    neurons_csv,
    rows_csv,
)
from reproduce.grid import Row
from reproduce.tables import COSTS, countings, equal, layers, summarise, table
from training.files import write_whole
from training.methods import METHODS


def write(dump: Path, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes the outcome of the finished rows of the whole grid to a folder; returns its files.

    ``rows.csv`` has every row, ``epochs.csv`` its epochs, ``layers.csv`` and ``neurons.csv`` its layers; ``table.md``
    has means and spreads; ``equal_connectivity.md``, ``equal_synapses.md`` and ``equal_synops.md`` compare the methods,
    ``countings.md`` counts in other ways, ``layers.md`` tells the layers apart; ``plane.png`` and ``ablations.png``
    show the rows, ``epochs.png`` and ``rewiring.png`` their epochs; ``commands.md`` says how each was made. The results
    come from the dump folder, or else from an earlier outcome in the folder. What nothing is known for is not written.

    Raises:
        Refusal: what the folder has is not an outcome of this grid; nothing is written.
    """
    figures = imported("reproduce.figures", "--outcome")
    entries = collect(dump, rows, folder)
    summaries = summarise(entries)
    done = {entry.row for entry in entries}
    name = rows[0].heading
    caption = f"{len(entries)} of {len(rows)} rows; mean ± standard deviation over the seeds.\n\n"
    files: dict[str, str | bytes] = {ROWS: rows_csv(entries), EPOCHS: epochs_csv(entries)}
    if any(entry.layers for entry in entries):
        files[LAYERS] = layers_csv(entries)
    if any(entry.neurons for entry in entries):
        files[NEURONS] = neurons_csv(entries)
    commands = _commands(entries, [row for row in rows if row not in done])
    texts = {"table.md": caption + table(summaries), "commands.md": commands}
    texts |= {"countings.md": countings(summaries), "layers.md": layers(summaries)}
    texts |= {f"equal_{cost}.md": equal(summaries, cost) for cost in COSTS}
    files |= {file: f"# {name}\n\n{text}" for file, text in texts.items() if text}
    main, ablations = ([summary for summary in summaries if summary.row.ablation == which] for which in (False, True))
    if main:
        files["plane.png"] = figures.plane(main, f"{name}: accuracy against connectivity")
        short = [summary for summary in main if summary.row.epochs == rows[0].epochs]
        keys = {"test_accuracy": "test accuracy (%)", "connectivity": "connectivity (%)"}
        heading = f"{name}: after each epoch, mean over the seeds"
        files["epochs.png"] = figures.curves(short, heading, keys, shares=True)
        if pruning := [summary for summary in short if summary.row.method.prunes]:
            keys = {"pruned": "pruned per epoch", "regrown": "regrown per epoch"}
            heading = f"{name}: connections pruned and regrown in each epoch, mean over the seeds"
            files["rewiring.png"] = figures.curves(pruning, heading, keys, shares=False)
    if main and ablations:
        epochs, labels = {summary.row.epochs for summary in ablations}, {method.label for method in METHODS.values()}
        beside = [summary for summary in main if summary.row.epochs in epochs and summary.row.title in labels]
        ablated = dict.fromkeys(summary.row.method.label for summary in ablations if summary.row.method.prunes)
        heading = f"{name}: ablations{' of ' if ablated else ''}{' and '.join(ablated)}"
        files["ablations.png"] = figures.plane([*beside, *ablations], heading)
    for file, content in files.items():
        write_whole(folder / file, content)
    return [folder / file for file in files]


def _commands(entries: Sequence[Entry], left: Sequence[Row]) -> str:
    machines = defaultdict(list)
    for entry in entries:
        cpu, device, precision, versions, commit = (entry.made[key] or "not known" for key in MADE)
        machines[f"{cpu}; {device}; precision {precision}; {versions}; commit {commit}"].append(entry)
    text = "How the rows were made:\n"
    for machine, some in machines.items():
        hours = np.nansum([entry.numbers["train_seconds"] for entry in some]) / 3600
        text += f"\n{machine}; {hours:.1f} h of training in all, rows that go on from a shorter one counted twice:\n\n"
        text += "".join(f"    {entry.row.command}\n" for entry in some)
    if left:
        text += "\nNot run yet:\n\n" + "".join(f"    {row.command}\n" for row in left)
    return text
