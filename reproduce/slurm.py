"""The grid as a job array of Slurm, in one file. Each task of the array runs a shard of the grid."""

import math
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence

from reproduce.grid import Row
from training import files
from training.command_line import check_writable, output_file
from training.options import REPOSITORY

SCRIPT = """\
#!/bin/bash
# Made by: python -m reproduce {grid} --slurm {file}
# Submit with: sbatch {file}    (options of sbatch before the file replace those below: --partition=gpu --time=8:00:00)
#SBATCH --job-name=reproduce-{grid}
#SBATCH --array=1-{tasks}
#SBATCH --nodes=1
#SBATCH --gpus={ranks}
#SBATCH --cpus-per-task={cpus}
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={log}

# Five minutes before the time is up, Slurm sends SIGUSR1: the rows save and stop, the task queues again and goes on.
again() {{
    kill -TERM "$runner"
    wait "$runner"
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
    exit
}}
trap again USR1
trap 'kill -TERM "$runner"; wait "$runner"; exit' TERM  # preempted, to be queued again by --requeue, or cancelled

cd {repository} || exit
{python} -m reproduce {grid} --shard "$SLURM_ARRAY_TASK_ID/{tasks}" --jobs {jobs} \\
    --dataset-dir {dataset_dir} --dump-dir {dump_dir} {more}&
runner=$!
wait "$runner"
"""


def write(options: Namespace, rows: Sequence[Row]) -> int:
    """Writes the array script that runs the rows by the options of ``python -m reproduce``; returns its tasks."""
    tasks = math.ceil(len({row.name for row in rows}) / options.jobs)
    dump, data = options.dump_dir.absolute(), options.dataset_dir.absolute()
    paths = {"file": options.slurm, "repository": REPOSITORY, "python": sys.executable}
    paths |= {"dataset_dir": data, "dump_dir": dump, "log": dump / "rows" / "slurm-%a.log"}
    quoted = {name: shlex.quote(str(path)) for name, path in paths.items()}
    words = [word for title in options.title or [] for word in ("--title", title)]
    words += ["--ranks", str(options.ranks)] if options.ranks > 1 else []
    words += ["--first", str(options.first)] if options.first else []
    words += ["--without", str(options.without.absolute())] if options.without else []
    more = f"{shlex.join(words)} " if words else ""
    sizes = dict(tasks=tasks, jobs=options.jobs, ranks=options.ranks, cpus=4 * options.ranks)
    text = SCRIPT.format(**quoted, **sizes, grid=options.grid, more=more)
    check_writable("--dump-dir", dump / "rows")  # Slurm does not make the folder of its logs
    with output_file("--slurm", options.slurm, parents=True) as temporary, files.naming(options.slurm):
        temporary.write_text(text, encoding="utf-8")
    return tasks
