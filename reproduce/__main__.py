"""A grid, with one command. See --help."""

import argparse
import re
import sys
from collections.abc import Sequence

from reproduce import entries, grid, outcome, records, runner, slurm
from training.command_line import Parser, check_writable, command, either, file_path, folder_path, whole_number
from training.errors import Refusal
from training.options import REPOSITORY

WHOLE = (1, 1)  # the shard that is all of the grid


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m reproduce",
        description="Runs a grid. Each row is a command line of an experiment, which is printed.",
        epilog="The same command skips finished rows and continues interrupted ones.",
    )
    parser.add_argument("grid", choices=grid.names(), help="it is reproduce/<grid>.toml")
    add, folder = parser.add_argument, {"type": folder_path, "metavar": "DIR"}
    instead = parser.add_mutually_exclusive_group().add_argument
    instead("--list", action="store_true", help="print the rows and the time that is left (default: run the rows)")
    text = "write tables and figures of the finished rows; keeps the rows that DIR has already (default: run rows)"
    instead("--outcome", **folder, help=text)
    text = "write a Slurm job array that runs the rows, --jobs of them per task (default: run them)"
    instead("--slurm", type=file_path, metavar="FILE", help=text)
    add("--jobs", type=whole_number(1, 1024), default=1, metavar="K", help="rows to run at a time (default: 1)")
    text = (
        "processes that train each row together, by torchrun, each with a GPU of its own if there are any (default: 1)"
    )
    add("--ranks", type=whole_number(1, 1024), default=1, metavar="K", help=text)
    add("--shard", type=_shard, default=WHOLE, metavar="I/N", help="part I of N of the rows (default: 1/1, all)")
    text = "run only the rows of the groups with this title; may be repeated (default: run all)"
    add("--title", action="append", metavar="TITLE", help=text)
    text = "run only the first K rows (default: run all)"
    add("--first", type=whole_number(1), metavar="K", help=text)
    add("--without", **folder, help="leave out the rows that the outcome in DIR has (default: take all)")
    text = "folder that holds the data set (default: data, in the repository)"
    add("--dataset-dir", **folder, default=REPOSITORY / "data", help=text)
    text = "folder for logs and models (default: runs/<grid>-grid, in the repository)"
    add("--dump-dir", **folder, help=text)
    options = parser.parse_args(argv)
    if options.slurm and options.shard != WHOLE:
        raise Refusal("argument --shard: not allowed with --slurm, which divides all rows among the tasks of its array")
    for name in ("shard", "title", "first", "without"):
        if options.outcome and getattr(options, name) not in (WHOLE, None):
            raise Refusal(f"argument --{name}: not allowed with --outcome, which covers all rows")
    options.dump_dir = options.dump_dir or grid.dump_dir(options.grid)
    return options


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"must be I/N with 1 <= I <= N, not {text!r}")
    return int(match[1]), int(match[2])


@command
def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    rows = grid.load(options.grid)
    if options.without:
        known = {line["command"] for line in entries.recorded(options.without)}
        if not known:
            raise Refusal(f"argument --without: no outcome of finished rows in {options.without}")
        rows = [row for row in rows if row.command not in known]
    if options.title:
        if unknown := set(options.title) - {row.title for row in rows}:
            titles = either(dict.fromkeys(repr(row.title) for row in rows)) if rows else "none is left"
            raise Refusal(f"argument --title: {min(unknown)!r} is no title of the rows: {titles}")
        rows = [row for row in rows if row.title in options.title]
    rows = grid.shard(rows[: options.first], *options.shard)
    for row in rows:
        if row.options.batch_size % options.ranks:
            batch = f"the {row.options.batch_size} images of a batch in: {row.command}"
            raise Refusal(f"argument --ranks: must divide {batch}; {options.ranks} does not")
    if options.slurm:
        if not rows:
            raise Refusal("argument --slurm: no row is left to run")
        tasks = slurm.write(options, rows)
        print(f"{options.slurm}: {tasks} tasks; submit it with: sbatch {options.slurm}")
        return 0
    for line in records.damaged(options.dump_dir, rows):
        print(line, file=sys.stderr)
    if options.outcome:
        check_writable("--outcome", options.outcome)
        print(*outcome.write(options.dump_dir, rows, options.outcome), sep="\n")
        return 0
    progress = records.progress(options.dump_dir, rows)
    if options.list:
        for row in rows:
            print(f"{'done   ' if row in progress.done else 'to do  '}{row.command}")
    print(progress.line(options.jobs), flush=True)
    if options.list:
        return 0
    places = ["--dataset-dir", str(options.dataset_dir)]
    running = runner.Runner(options.dump_dir, places, options.jobs, options.ranks)
    failed, taken = running.run(rows)
    for what, some in (("failed", failed), ("skipped, which other processes run", taken)):
        if some:
            print(f"{len(some)} rows {what}:", *(row.key for row in some), sep="\n  ")
    if running.stopped is not None:
        print("Stopped; running rows are saved. The same command continues them.")
        return 128 + running.stopped
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
