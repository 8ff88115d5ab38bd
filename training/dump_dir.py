"""The default of --dump-dir."""

from pathlib import Path

from training import logs
from training.logs import INFO


def choose(runs: Path, experiment: str, name: str) -> Path:
    """Chooses ``runs/<experiment>``, or ``runs`` if the run was started there.

    ``runs`` is the old default for all experiments. Its runs must be resumed, not trained again.
    """
    own = runs / experiment
    its_own = logs.info(runs / "logs" / name).get("experiment") in (experiment, None)
    if _exists(own, name) or not _exists(runs, name) or not its_own:
        return own
    print(
        f"This run is in {runs}, the old default of --dump-dir, and stays there. "
        f"To move it to {own}, move its folders logs/{name} and models/{name}.",
        flush=True,
    )
    return runs


def _exists(dump: Path, name: str) -> bool:
    return (dump / "logs" / name / INFO).exists() or any((dump / "models" / name).glob("checkpoint*.pt"))
