"""Packages that only a part of this program needs: pyproject.toml and requirements.txt list them."""

import importlib
from typing import Any

from training.errors import Refusal

INSTALL = {"h5py": "nir nirtorch", "nir": "nir nirtorch", "nirtorch": "nir nirtorch", "sklearn": "scikit-learn"}


def imported(module: str, needing: str) -> Any:
    """Imports a module that is, or imports, such a package; where it is missing, a Refusal says how to install it.

    ``needing`` names the part of the program that needs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).partition(".")[0]
        install = INSTALL.get(missing, missing)
        raise Refusal(f"{needing} needs {missing}, which is not installed (pip install {install})") from None
