"""Runs the programs that check Triton kernels without a GPU, each in a process with an environment of its own."""

import contextlib
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

OLD = False
with contextlib.suppress(PackageNotFoundError):  # not installed, or by another name
    OLD = version("triton").startswith("3.2.")


def interpret(program: Path, *arguments: str) -> None:
    """Compares the values that Triton's interpreter computes."""
    if OLD:
        pytest.skip("Triton 3.2's interpreter fails with NumPy 2.4: an array of one number is no number there")
    _run([str(program), "values", *arguments], {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})


def compile(program: Path, cache: Path, *capabilities: int) -> None:
    """Compiles the kernels for compute capabilities, 90 for 9.0 say, with an empty cache."""
    if OLD:  # it does not compile for compute capability 10.0
        capabilities = [capability for capability in capabilities if capability < 100]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    _run([str(program), "compile", *map(str, capabilities)], environment)


def _run(argv: list[str], environment: dict[str, str]) -> None:
    assert subprocess.run([sys.executable, *argv], env=environment, timeout=900).returncode == 0
