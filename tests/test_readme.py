"""What the README says: its example runs, its options are those of the scripts, its commands parse."""

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from c10.c10 import RECIPE as C10
from mnist.mnist import RECIPE as MNIST
from reproduce import grid
from training.options import _parser, parse

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs(tmp_path):
    """As a stranger would run it: with the two modules and what they import, and nothing else of the project."""
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert 10 <= len(example.strip().splitlines()) <= 25
    for module in ("rewiring.py", "gradrewire.py", "deeprewire.py"):
        (tmp_path / module).write_text((ROOT / module).read_text())
    result = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.search(r"connectivity 0\.\d+", result.stdout)


@pytest.mark.parametrize("recipe", [MNIST, C10])
def test_the_options_table_is_complete(recipe):
    table = {
        tuple(re.findall(r"`(-[^` ]*)`", row.split("|")[1])): row.split("|")[3].strip()
        for row in README.splitlines()
        if row.startswith("| `-")
    }
    actions = {tuple(a.option_strings): a for a in _parser(recipe)._actions if a.dest != "help"}
    assert set(actions) <= set(table)
    for flags, action in actions.items():
        default = action.default
        if isinstance(default, (int, str)) and not isinstance(default, bool):
            assert str(default) in table[flags], flags


def test_its_results_are_those_of_the_grid():
    lines = [line.split("|")[1:-1] for line in (ROOT / "results" / "mnist" / "table.md").read_text().splitlines()[2:]]
    head, _, *rows = [[cell.strip() for cell in line] for line in lines]
    (table,) = re.findall(r"<!-- results/mnist/table.md -->\n(.*?)<!-- end -->", README, re.DOTALL)
    shown_head, _, *shown = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    columns = [head.index(name) for name in shown_head]
    assert shown_head[:4] == head[:4] == ["method", "options", "epochs", "seeds"]
    assert {"dense", "Grad R", "Deep R", "soft Deep R"} <= {row[0] for row in shown}
    possible = [[row[column] for column in columns] for row in rows]
    assert [row for row in shown if row not in possible] == []


def test_the_results_are_of_the_grid_as_it_is():
    commands = {row.command for row in grid.load("mnist")}
    with open(ROOT / "results" / "mnist" / "rows.csv") as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert [row["command"] for row in rows if row["command"] not in commands] == []


def test_its_commands_are_accepted(tmp_path):
    commands = re.findall(r"^python (?:-m )?(?:\w+/)?(mnist|c10)(?:\.\w+)* ?(.*)$", README, re.MULTILINE)
    assert len(commands) >= 4
    for name, argv in commands:
        argv = shlex.split(argv, comments=True)
        parse({"mnist": MNIST, "c10": C10}[name], [*argv, "--dump-dir", str(tmp_path)])
