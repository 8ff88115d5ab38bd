"""The trained networks that come with this program, by name. ``python -m reproduce.networks`` makes them."""

from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / "results"
UNNAMED = "mnist"  # the grid whose networks go by their name alone


def folder(grid: str) -> Path:
    """Where the networks of a grid are."""
    return RESULTS / grid / "networks"


def networks() -> dict[str, Path]:
    """The files by name, ``grad-5`` for MNIST's, or ``c10-narrow/grad-5``."""
    found = {}
    for path in sorted(RESULTS.glob("*/networks/*.safetensors")):
        grid, name = path.parent.parent.name, path.stem
        found[name if grid == UNNAMED else f"{grid}/{name}"] = path
    return found
