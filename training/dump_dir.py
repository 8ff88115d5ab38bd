"""Where a run's folders are without --dump-dir."""

from pathlib import Path
from typing import Any

from training.files import json_files


def default(runs: Path, experiment: str, name: str) -> Path:
    """The dump folder of a run: ``runs/<experiment>``, or ``runs`` for a run that was begun there.

    The default used to be ``runs`` for all experiments. The same command must go on with such a run instead of training
    it again; a line on the console says so.
    """
    own = runs / experiment
    if _begun(own, name) or not _begun(runs, name) or _experiment(runs, name) not in (experiment, None):
        return own
    print(
        f"This run is in {runs}, the old default of --dump-dir, and stays there; "
        f"to have it in {own}, move its folders logs/{name} and models/{name} there.",
        flush=True,
    )
    return runs


def _begun(dump: Path, name: str) -> bool:
    return (dump / "logs" / name / "run.json").exists() or any((dump / "models" / name).glob("checkpoint*.pt"))


def _experiment(dump: Path, name: str) -> Any:
    """Whose run it is; None where that cannot be told."""
    return about(dump / "logs" / name).get("experiment")


def about(logs: Path) -> dict[str, Any]:
    """What ``run.json`` says of the run whose logs a folder has; nothing where that cannot be told."""
    try:
        return json_files.read_object(logs / "run.json") or {}
    except ValueError:
        return {}
