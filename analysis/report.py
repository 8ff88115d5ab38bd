"""Looks at runs: a table on the terminal, and a page with pictures that needs nothing else. See --help.

python -m analysis.report runs -o report.html
"""

import base64
import contextlib
import gc
import math
import os
import signal
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jinja2
import torch

from analysis import pictures
from analysis.pictures import Picture, printable
from analysis.runs import CHECKPOINT, Run, find, number, short_names, weights_of
from training.command_line import Parser, Refusal, command
from training.record import percent

COLUMNS = (
    "run",
    "mode",
    "epochs",
    "test accuracy",
    "best",
    "connectivity",
    "connections",
    "s/epoch",
    "device",
    "commit",
)
NUMERIC = {"epochs", "test accuracy", "best", "connectivity", "connections", "s/epoch"}
EXPERIMENTS = {"mnist": "MNIST network", "c10": "CIFAR-10 network"}
UNKNOWN = "–"


def parse(argv: Sequence[str] | None = None) -> Namespace:
    parser = Parser(
        prog="python -m analysis.report",
        description="Shows runs, finished or still running: a table on the terminal, pictures on one HTML page.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="FOLDER",
        help="dump folder (--dump-dir) with all its runs, folder of such folders, or of one run in logs or models",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="HTML page to write, in place of one that is there (default: %(default)s)",
    )
    return parser.parse_args(argv)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place in the end, so that the page is there whole or not at all.

    Raises:
        Refusal: ``path`` cannot be written.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        handle, name = tempfile.mkstemp(suffix=".tmp", prefix=f".{path.name}-"[:200], dir=path.parent)
    except OSError as error:
        raise Refusal(f"argument -o/--output: cannot write {path}: {error.strerror or error}") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp's is for the owner alone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def row(run: Run) -> dict[str, str]:
    """The table's row of a run: its numbers as they are in the last line of ``results.jsonl``."""

    def share(key: str) -> str:
        value = number(run.last, key)
        return UNKNOWN if math.isnan(value) else percent(value)

    connections, seconds, planned = run.connections, run.seconds_per_epoch, run.arguments.get("epoch")
    cells = (
        run.name,
        run.mode or UNKNOWN,
        f"{run.last.get('epoch', 0)}/{planned or '?'}",
        share("test_accuracy"),
        share("best_accuracy"),
        share("connectivity"),
        f"{connections.connected:,} of {connections.weights:,}" if connections else UNKNOWN,
        UNKNOWN if math.isnan(seconds) else f"{seconds:.3g}" if seconds < 100 else f"{seconds:.0f}",
        run.info.get("device") or UNKNOWN,
        str(run.info.get("git_commit") or UNKNOWN)[:10],
    )
    return dict(zip(COLUMNS, (printable(str(cell)) for cell in cells), strict=True))


def print_table(rows: Sequence[dict[str, str]]) -> None:
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in COLUMNS}
    for cells in ({column: column for column in COLUMNS}, *rows):
        aligned = (f"{cells[c]:>{widths[c]}}" if c in NUMERIC else f"{cells[c]:{widths[c]}}" for c in COLUMNS)
        print("  ".join(aligned).rstrip())


def facts(run: Run) -> dict[str, str]:
    """What else the page says of a run: where it is, how it was made, what it is made of."""
    parameters, versions = run.info.get("parameters"), run.info.get("versions")
    parameters = parameters if isinstance(parameters, dict) else {}
    counts = [
        f"{int(value):,} {what}"
        for key, what in (("prunable", "prunable weights"), ("others", "others"))
        if not math.isnan(value := number(parameters, key))
    ]
    versions = [f"{name} {version}" for name, version in versions.items()] if isinstance(versions, dict) else []
    rate = number(run.last, "learning_rate")
    found = {
        "command": run.info.get("command"),
        "logs": run.logs if run.logs.is_dir() else None,
        "checkpoint": run.models / CHECKPOINT if (run.models / CHECKPOINT).is_file() else None,
        "parameters": ", ".join(counts),
        "learning rate": None if math.isnan(rate) else f"{rate:g}",
        "seed": run.arguments.get("seed"),
        "versions": ", ".join(versions),
        "device": run.info.get("device"),
        "commit": run.info.get("git_commit"),
    }
    return {key: printable(str(value)) for key, value in found.items() if value not in (None, "")}


def _section(run: Run) -> tuple[list[Picture], list[str]]:
    """The pictures of one run, and all its problems; in a process of its own."""
    weights_epoch, weights = weights_of(run)
    return pictures.of_run(run, weights_epoch, weights), run.problems


def _prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    torch.set_num_threads(1)
    gc.freeze()  # all that the imports made stays; looking through it again and again would take a tenth of the time


def _sections(runs: Sequence[Run]) -> list[tuple[list[Picture], list[str]]]:
    workers = min(os.cpu_count() or 1, len(runs), 8)
    with ProcessPoolExecutor(workers, initializer=_prepare_worker) as pool:
        return list(pool.map(_section, runs))


def page(runs: Sequence[Run]) -> str:
    """The HTML page of these runs; what is damaged in their checkpoints is added to their problems."""
    sections = []
    for i, (run, (made, problems)) in enumerate(zip(runs, _sections(runs), strict=True)):
        run.problems[:] = problems
        sections.append(dict(id=f"run-{i + 1}", row=row(run), facts=facts(run), pictures=made))
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault(run.experiment, []).append(run)
    comparisons = []
    for (experiment, dataset), members in groups.items():
        title = f"{EXPERIMENTS.get(experiment, experiment) or 'Unknown network'} on {dataset or 'unknown data'}"
        made = pictures.overall(members, short_names([run.name for run in members]))
        comparisons.append(dict(title=printable(title), pictures=made))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        columns=COLUMNS,
        numeric=NUMERIC,
        sections=sections,
        comparisons=comparisons,
        problems=[printable(problem) for run in runs for problem in run.problems],
        data_uri=_data_uri,
    )


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


@command
def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    with _replacing(options.output) as temporary:
        runs = find(options.runs)
        print_table([row(run) for run in runs])
        sys.stdout.flush()
        text = page(runs)
        temporary.write_text(text, encoding="utf-8")
    for run in runs:
        for problem in run.problems:
            print(f"report.py: warning: {printable(problem)}", file=sys.stderr)
    noun = "run" if len(runs) == 1 else "runs"
    print(f"\nReport of {len(runs)} {noun}: {options.output} ({len(text) / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
