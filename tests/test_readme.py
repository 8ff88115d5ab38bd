"""What the README says: its example runs, its options are those of the scripts, its commands parse."""

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from c10.c10 import EXPERIMENT as C10
from mnist.mnist import EXPERIMENT as MNIST
from reproduce import grid
from training.options import _parser, parse

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_examples_run(tmp_path):
    """As a stranger would run them, one after the other: with the modules and what they import alone."""
    examples = re.findall(r"```py(?:thon)?\n(.*?)```", README, re.DOTALL)
    assert all(5 <= len(example.strip().splitlines()) <= 25 for example in examples)
    last = "\npruning.step()\nassert pruning.state[weights[0]]['step'] == 2\n"
    for module in ("rewiring.py", "gradrewire.py", "deeprewire.py"):
        (tmp_path / module).write_text((ROOT / module).read_text())
    result = subprocess.run(
        [sys.executable, "-c", "".join(examples) + last], cwd=tmp_path, capture_output=True, text=True
    )
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


def cells(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def not_shown_right(block, text):
    """What of a page's block does not stand in the text of the file that it is said to show.

    A block is a part of the file as it is, or its table with fewer rows and columns.
    """
    if block.strip() in text:
        return []
    (head, _, *rows), (shown_head, _, *shown) = cells(text), cells(block)
    columns = [head.index(name) for name in shown_head]
    possible = [[row[column] for column in columns] for row in rows]
    return [row for row in shown if row not in possible]


@pytest.mark.parametrize("page", ["README.md", "docs/reproduction.md"])
def test_its_results_are_those_of_the_grid(page):
    text = (ROOT / page).read_text()
    blocks = re.findall(r"<!-- (results/\S+) -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert len(blocks) == text.count("<!-- end -->") == text.count("<!-- results/")
    assert {"results/mnist/table.md", "results/mnist/equal_connectivity.md"} <= {file for file, _ in blocks}
    for file, block in blocks:
        assert not_shown_right(block, (ROOT / file).read_text()) == []
    rows = [row for file, block in blocks if file == "results/mnist/table.md" for row in cells(block)]
    if page == "README.md":
        assert rows[0][:4] == ["method", "options", "epochs", "seeds"]
        assert {"dense", "Grad R", "Deep R", "soft Deep R"} <= {row[0] for row in rows}


def test_a_changed_result_is_not_that_of_the_grid():
    text = "of 3 rows\n\n| a | b | c |\n| --- | --- | --- |\n| 1 | 2 | 3 |\n| 4 | 5 | 6 |\n"
    assert not_shown_right("| 4 | 5 | 6 |\n", text) == []
    assert not_shown_right("| a | c |\n| --- | --- |\n| 4 | 6 |\n", text) == []
    assert not_shown_right("| a | c |\n| --- | --- |\n| 4 | 3 |\n", text) == [["4", "3"]]


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
