"""The grid of an experiment, with one command. See --help."""

import re
import sys
from pathlib import Path

from reproduce import grid, outcome, runner
from training.options import REPOSITORY, Parser, Refusal, _folder, _whole, command


def _options(argv: list[str] | None):
    parser = Parser(
        prog="python -m reproduce",
        description="Runs the grid of an experiment, row by row, each by its own command line, which is printed.",
        epilog="The same command skips finished rows and goes on with interrupted ones.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("experiment", choices=sorted(grid.RECIPES), help="whose grid to run: reproduce/<experiment>.toml")
    add(
        "--list", action="store_true", help="print the rows, what is left and how long it will take (default: run them)"
    )
    add(
        "--outcome",
        type=_folder,
        metavar="DIR",
        help="write tables and figures of the finished rows (default: run rows)",
    )
    add("--jobs", type=_whole(1, 1024), default=1, metavar="K", help="rows to run at a time (default: 1)")
    add("--shard", default="1/1", metavar="I/N", help="run part I of N of the rows, from 1 (default: 1/1, all)")
    add(
        "--dataset-dir",
        type=_folder,
        default=REPOSITORY / "data",
        metavar="DIR",
        help="folder that holds the data set (default: data, in the repository)",
    )
    add(
        "--dump-dir",
        type=_folder,
        metavar="DIR",
        help="folder for logs and models (default: runs/<experiment>-grid, in the repository)",
    )
    options = parser.parse_args(argv)
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", options.shard)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise Refusal(f"argument --shard: must be I/N with 1 <= I <= N, not {options.shard!r}")
    options.shard = int(match[1]), int(match[2])
    options.dump_dir = Path(options.dump_dir or REPOSITORY / "runs" / f"{options.experiment}-grid")
    return options


@command
def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    rows = grid.shard(grid.load(options.experiment), *options.shard)
    done = [row for row in rows if runner.finished(options.dump_dir, row) is not None]
    if options.outcome:
        for path in outcome.write(options.dump_dir, rows, options.outcome):
            print(path)
        return 0
    if options.list:
        for row in rows:
            print(f"{'done   ' if row in done else 'to do  '}{row.command}")
    left = runner.epochs_left(options.dump_dir, rows)
    seconds = left * runner.seconds_per_epoch(options.dump_dir, rows) / options.jobs
    print(f"{len(done)} of {len(rows)} rows done, {runner.left_text(left, seconds)}", flush=True)
    if options.list or len(done) == len(rows):
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


if __name__ == "__main__":
    sys.exit(main())
