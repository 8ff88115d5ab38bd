"""The grid as a job array of Slurm: one file to submit, whose tasks are shards of the grid."""

import shlex
from collections.abc import Sequence
from pathlib import Path

SCRIPT = """\
#!/bin/bash
# Made by: {command}
# Submit with: sbatch {file}    (options of sbatch before the file replace those below: --partition=gpu --time=8:00:00)
#SBATCH --job-name=reproduce-{experiment}
#SBATCH --array=1-{tasks}
#SBATCH --gpus=1
#SBATCH --cpus-per-task=4
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
{python} -m reproduce {experiment} --shard "$SLURM_ARRAY_TASK_ID/{tasks}" --jobs {jobs} \\
    --dataset-dir {dataset_dir} --dump-dir {dump_dir} {more}&
runner=$!
wait "$runner"
"""


def script(
    file: Path,
    experiment: str,
    tasks: int,
    jobs: int,
    dataset_dir: Path,
    dump_dir: Path,
    repository: Path,
    python: str,
    more: Sequence[str] = (),
) -> str:
    """The text of the array script.

    Args:
        file: that it will be.
        experiment: whose grid it runs.
        tasks: of the array, each of them a shard.
        jobs: rows that a task runs at a time.
        dataset_dir, dump_dir: absolute, on a file system that all machines share.
        repository: absolute, where the tasks run.
        python: the interpreter.
        more: words that every task's command has, too.
    """
    words = {"repository": repository, "python": python, "dataset_dir": dataset_dir, "dump_dir": dump_dir, "file": file}
    quoted = {name: shlex.quote(str(word)) for name, word in words.items()}
    log = shlex.quote(str(dump_dir / "rows" / "slurm-%a.log"))
    command = f"python -m reproduce {experiment} --slurm {quoted['file']}"
    last = f"{shlex.join(more)} " if more else ""
    return SCRIPT.format(**quoted, experiment=experiment, tasks=tasks, jobs=jobs, log=log, command=command, more=last)
