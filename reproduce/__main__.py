"""The grid of an experiment, with one command. See --help."""

import argparse
import math
import re
import sys
from collections.abc import Sequence

from analysis.experiments import EXPERIMENTS
from reproduce import entries, grid, outcome, runner, slurm
from reproduce.grid import Row
from training import files
from training.command_line import Parser, check_writable, command, file_path, folder_path, output_file, whole_number
from training.errors import Refusal
from training.options import REPOSITORY


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m reproduce",
        description="Runs the grid of an experiment, row by row, each by its own command line, which is printed.",
        epilog="The same command skips finished rows and goes on with interrupted ones.",
    )
    parser.add_argument(
        "experiment", choices=sorted(EXPERIMENTS), help="whose grid to run: reproduce/<experiment>.toml"
    )
    instead = parser.add_mutually_exclusive_group().add_argument
    instead(
        "--list", action="store_true", help="print the rows, what is left and how long it will take (default: run them)"
    )
    instead(
        "--outcome",
        type=folder_path,
        metavar="DIR",
        help="write tables and figures of the finished rows, beside those of the rows that DIR has already "
        "(default: run rows)",
    )
    instead(
        "--slurm",
        type=file_path,
        metavar="FILE",
        help="write the script of a Slurm job array that runs the rows, --jobs of them per task (default: run them)",
    )
    add = parser.add_argument
    add("--jobs", type=whole_number(1, 1024), default=1, metavar="K", help="rows to run at a time (default: 1)")
    add("--shard", default="1/1", metavar="I/N", help="take part I of N of the rows, from 1 (default: 1/1, all)")
    add(
        "--without",
        type=folder_path,
        metavar="DIR",
        help="leave out the rows that the outcome in DIR has (default: take all)",
    )
    add(
        "--dataset-dir",
        type=folder_path,
        default=REPOSITORY / "data",
        metavar="DIR",
        help="folder that holds the data set (default: data, in the repository)",
    )
    add(
        "--dump-dir",
        type=folder_path,
        metavar="DIR",
        help="folder for logs and models (default: runs/<experiment>-grid, in the repository)",
    )
    options = parser.parse_args(argv)
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", options.shard)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise Refusal(f"argument --shard: must be I/N with 1 <= I <= N, not {options.shard!r}")
    options.shard = int(match[1]), int(match[2])
    if options.slurm and options.shard != (1, 1):
        raise Refusal("argument --shard: not allowed with --slurm, which divides all rows among the tasks of its array")
    for name in ("shard", "without"):
        if options.outcome and getattr(options, name) not in ((1, 1), None):
            raise Refusal(f"argument --{name}: not allowed with --outcome, which covers all rows")
    options.dump_dir = options.dump_dir or REPOSITORY / "runs" / f"{options.experiment}-grid"
    return options


@command
def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    rows = grid.load(options.experiment)
    if options.without:
        known = {line["command"] for line in entries.recorded(options.without)}
        if not known:
            raise Refusal(f"argument --without: no outcome of finished rows in {options.without}")
        rows = [row for row in rows if row.command not in known]
    rows = grid.shard(rows, *options.shard)
    if not options.slurm:
        for line in runner.damaged(options.dump_dir, rows):
            print(line, file=sys.stderr)
    if options.outcome:
        check_writable("--outcome", options.outcome)
        for path in outcome.write(options.dump_dir, rows, options.outcome):
            print(path)
        return 0
    if options.slurm:
        return _write_slurm(options, rows)
    progress = runner.progress(options.dump_dir, rows)
    if options.list:
        for row in rows:
            print(f"{'done   ' if row in progress.done else 'to do  '}{row.command}")
    print(progress.line(options.jobs), flush=True)
    if options.list:
        return 0
    running = runner.Runner(options.dump_dir, ["--dataset-dir", str(options.dataset_dir)], options.jobs)
    failed, taken = running.run(rows)
    for what, some in (("failed", failed), ("left to other processes", taken)):
        if some:
            print(f"{len(some)} rows {what}:", *(row.key for row in some), sep="\n  ")
    if running.stopped is not None:
        print("Stopped; what runs is saved. The same command goes on.")
        return 128 + running.stopped
    return 1 if failed else 0


def _write_slurm(options: argparse.Namespace, rows: Sequence[Row]) -> int:
    tasks = math.ceil(len({row.name for row in rows}) / options.jobs)
    places = [path.absolute() for path in (options.dataset_dir, options.dump_dir, REPOSITORY)]
    without = ["--without", str(options.without.absolute())] if options.without else []
    text = slurm.script(options.slurm, options.experiment, tasks, options.jobs, *places, sys.executable, without)
    check_writable("--dump-dir", options.dump_dir / "rows")  # Slurm does not make the folder of its logs
    with output_file("--slurm", options.slurm, parents=True) as temporary, files.naming(options.slurm):
        temporary.write_text(text, encoding="utf-8")
    print(f"{options.slurm}: {tasks} tasks; submit it with: sbatch {options.slurm}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
