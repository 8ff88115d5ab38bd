"""Loads pruned networks wherever this package is installed: ``from pruned import load_pruned``.

The modules that it needs have common names. If another file hides one, or a package is missing, the import fails with
one line that says which.
"""

from importlib.util import find_spec
from pathlib import Path

__all__ = ["load_pruned"]

HERE = Path(__file__).resolve().parent
MODULES = (
    *("analysis", "c10", "deeprewire", "gradrewire", "measuring"),
    *("mnist", "rewiring", "sharding", "spiking", "spiking_kernels", "training"),
)


def _check(name: str) -> None:
    """Raises ImportError unless the module that Python finds is the one beside this file."""
    spec = find_spec(name)
    found = Path(spec.origin or next(iter(spec.submodule_search_locations))).resolve() if spec else None
    if found not in (HERE / f"{name}.py", HERE / name / "__init__.py"):
        reason = f"{found} hides it: rename or move that" if found else "it is missing: install the package again"
        raise ImportError(f"load_pruned needs the module {name} in {HERE}, but {reason}")


for _name in MODULES:
    _check(_name)
try:
    from analysis.export import load_pruned
except ModuleNotFoundError as error:
    missing = error.name.partition(".")[0]
    raise ImportError(f"load_pruned needs {missing}, which is not installed (pip install '.[train]')") from None
