"""Shows runs: a table on the terminal, and one HTML page with pictures. See ``python -m analysis.report --help``."""

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import threading
from argparse import Namespace
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from analysis.experiments import EXPERIMENTS
from analysis.packages import imported
from analysis.runs import SavedRun, find, is_there, short_names, weights_of
from measuring.report import percent
from training import files
from training.command_line import Parser, check_output, command, file_path, output_file, whole_number
from training.device import cores
from training.files.json_files import number, printable, shown
from training.files.storage import CHECKPOINT
from training.logs import INFO, RESULTS
from training.run_info import everywhere

if TYPE_CHECKING:
    from analysis.pictures import Picture

COLUMNS = {  # of the page's table, and how it aligns them
    **dict.fromkeys(("run", "method"), "text"),
    **dict.fromkeys(("epochs", "test accuracy", "best", "connectivity", "connections", "s/epoch"), "number"),
    **dict.fromkeys(("device", "commit"), "text"),
}
# of the terminal's table: the long names are last, so that they do not break the others where a line wraps
PRINTED = ("method", "epochs", "test accuracy", "best", "connectivity", "s/epoch", "run")


def parse(argv: Sequence[str] | None = None) -> Namespace:
    text = "Shows runs, finished or still running: a table on the terminal, pictures on one HTML page."
    parser = Parser(prog="python -m analysis.report", description=text)
    text = "a dump folder (--dump-dir), a folder of dump folders, or the folder of one run in logs or models"
    parser.add_argument("runs", nargs="+", metavar="FOLDER", help=text)
    text = "HTML page to write; replaces an existing one (default: %(default)s)"
    parser.add_argument("-o", "--output", type=file_path, default=Path("report.html"), metavar="FILE", help=text)
    text = "draw pictures of each of the N runs that changed last; comparisons show all runs (default: %(default)s)"
    parser.add_argument("--details", type=whole_number(0), default=40, metavar="N", help=text)
    return parser.parse_args(argv)


def row(run: SavedRun) -> dict[str, str]:
    """The row of a run in the tables, with the numbers of the last line of ``results.jsonl``."""
    shares = (number(run.last, key) for key in ("test_accuracy", "best_accuracy", "connectivity"))
    connections, seconds = run.connections, run.seconds_per_epoch
    cells = (
        run.name,
        run.method,
        f"{run.last.get('epoch', 0)}/{shown(run.arguments.get('epoch')) or '?'}",
        *("" if math.isnan(share) else percent(share) for share in shares),
        f"{connections.connected:,} of {connections.weights:,}" if connections else "",
        "" if math.isnan(seconds) else f"{seconds:.3g}" if seconds < 100 else f"{seconds:.0f}",
        shown(run.info.get("device")),
        shown(run.info.get("git_commit"))[:10],
    )
    return dict(zip(COLUMNS, (printable(cell) or "–" for cell in cells), strict=True))


def print_table(rows: Sequence[dict[str, str]]) -> None:
    lines = [dict(zip(PRINTED, PRINTED, strict=True)), *rows]
    widths = {column: max(len(line[column]) for line in lines) for column in PRINTED}
    for line in lines:
        cells = (f"{line[c]:{'>' if COLUMNS[c] == 'number' else '<'}{widths[c]}}" for c in PRINTED)
        print("  ".join(cells).rstrip())


def facts(run: SavedRun) -> dict[str, str]:
    """What else the page says of a run: its folders, its command, its size."""
    counts = {"prunable weights": number(run.info, "parameters", "prunable")}
    counts["others"] = number(run.info, "parameters", "others")
    versions = everywhere(run.info, "versions")
    versions = [f"{name} {shown(version)}" for name, version in versions.items()] if isinstance(versions, dict) else []
    rate = number(run.last, "learning_rate")
    found = {
        "command": run.info.get("command"),
        "logs": str(run.logs) if run.logs.is_dir() else None,
        "checkpoint": str(run.models / CHECKPOINT) if is_there(run.models / CHECKPOINT) else None,
        "parameters": ", ".join(f"{count:,.0f} {what}" for what, count in counts.items() if not math.isnan(count)),
        "learning rate": None if math.isnan(rate) else f"{rate:g}",
        "seed": run.arguments.get("seed"),
        "versions": ", ".join(versions),
        "device": everywhere(run.info, "device"),
        "precision": everywhere(run.info, "precision"),
        "commit": everywhere(run.info, "git_commit"),
    }
    return {key: text for key, value in found.items() if (text := shown(value, 2000))}


def _section(run: SavedRun) -> tuple[list["Picture"], list[str]]:
    """The pictures of one run, and all its problems; in a process of its own."""
    from analysis import pictures

    return pictures.of_run(run, *weights_of(run)), run.problems


def _prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """Ends this worker when its parent has ended for any reason: nobody waits for its pictures then."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _sections(runs: Sequence[SavedRun]) -> list[tuple[list["Picture"], list[str]]]:
    if not runs:
        return []
    try:
        with ProcessPoolExecutor(min(cores(), len(runs), 8), initializer=_prepare_worker) as pool:
            return list(pool.map(_section, runs))
    except BrokenProcessPool:
        raise MemoryError("a process that was drawing pictures was killed") from None


def _changed(run: SavedRun) -> float:
    """When the run's files changed last, in seconds; 0 for one without files."""
    paths = (run.logs / RESULTS, run.logs / INFO, run.models / CHECKPOINT)
    times = [0.0]
    for path in paths:
        with contextlib.suppress(OSError):  # it is not there, or the run puts another one in its place
            times.append(path.stat().st_mtime)
    return max(times)


def page(runs: Sequence[SavedRun], details: int) -> str:
    """The HTML page of these runs. Adds what is damaged in their checkpoints to their problems.

    Only the ``details`` runs that changed last have pictures of their own, which take nearly all of the time.
    """
    jinja2, pictures = (imported(name, "the report's page") for name in ("jinja2", "analysis.pictures"))
    newest = sorted(runs, key=_changed, reverse=True)[:details]
    made = {id(run): drawn for run, drawn in zip(newest, _sections(newest), strict=True)}
    sections, comparisons = [], []
    groups: dict[tuple[str, str], list[SavedRun]] = defaultdict(list)
    for i, run in enumerate(runs, 1):
        groups[run.experiment].append(run)
        own = []
        if id(run) in made:
            own, run.problems[:] = made[id(run)]
        about = dict(id=f"run-{i}", row=row(run), facts=facts(run), pictures=own, detailed=id(run) in made)
        sections.append(about)
    for (experiment, dataset), members in groups.items():
        label = EXPERIMENTS[experiment].label if experiment in EXPERIMENTS else experiment or "Unknown network"
        overall = pictures.overall(members, short_names([run.name for run in members]))
        comparisons.append({"title": f"{label} on {dataset or 'unknown data'}", "pictures": overall})
    settings = dict(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), **settings)
    problems = [printable(problem) for run in runs for problem in run.problems]
    template = environment.get_template("report.html.jinja")
    return template.render(columns=COLUMNS, sections=sections, comparisons=comparisons, problems=problems)


@command
def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    check_output("-o/--output", options.output)
    runs = find(options.runs)
    print_table([row(run) for run in runs])
    sys.stdout.flush()
    text = page(runs, options.details)
    with output_file("-o/--output", options.output) as temporary, files.naming(options.output):
        temporary.write_text(text, encoding="utf-8")
    for run in runs:
        for problem in run.problems:
            print(f"report.py: warning: {printable(problem)}", file=sys.stderr)
    print(f"\nReport of {len(runs)} run{'' if len(runs) == 1 else 's'}: {options.output} ({len(text) / 1e6:.1f} MB)")
    if options.details < len(runs):
        print(f"{options.details} of them have pictures of their own; --details {len(runs)} draws those of all.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
