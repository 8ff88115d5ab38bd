"""What README and docs say: examples run, commands parse, options and results are those of the program."""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import forked
import pytest
from export_helpers import mnist, write_run

import analysis.export
import analysis.report
import benchmarks.bench
import benchmarks.gpu
import benchmarks.sparse
import reproduce.__main__
import reproduce.networks
from analysis.experiments import EXPERIMENTS
from reproduce import grid
from training.options import _parser, parse

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))), "benchmarks/README.md"]
TEXTS = {page: (ROOT / page).read_text("utf-8") for page in PAGES}
ADDING = TEXTS["docs/adding.md"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# The modules that a page says its examples need: copied beside them. Other pages have the whole repository, and so have
# examples that import from pruned.
COPIED = {
    "README.md": ["rewiring.py", "sharding.py", "gradrewire.py"],
    "docs/optimizers.md": ["rewiring.py", "sharding.py", "gradrewire.py", "deeprewire.py"],
}


def blocks(page, language):
    return [block for name, block in BLOCK.findall(TEXTS[page]) if name == language]


def test_every_block_is_run_or_parsed():
    assert {name for page in PAGES for name, _ in BLOCK.findall(TEXTS[page])} == {"", "python", "diff", "toml"}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page != "docs/adding.md"])
def test_the_examples_run(page, tmp_path):
    """As a stranger would run them, one after the other."""
    for module in COPIED.get(page, []):
        shutil.copy(ROOT / module, tmp_path)
    write_run(tmp_path / "runs" / "mnist", mnist(), "NAME")
    examples = blocks(page, "python")
    alone = [block for block in examples if page in COPIED and "from pruned import" not in block]
    others = [block for block in examples if block not in alone]
    programs = ["".join(alone)] if alone else []
    programs += [_in_repository("".join(others))] if others else []
    printed = ""
    for program in programs:
        result = forked.run(["-c", program], tmp_path)
        assert result.returncode == 0, result.stderr
        printed += result.stdout
    if page == "README.md":
        connectivity = float(re.search(r"connectivity (0\.\d+)", printed)[1])
        assert abs(connectivity - 0.05) < 0.0035  # four of its 1344 weights, in three digits
        assert re.search(r"^fc\.1\.weight: [\d,]+ of 8,000 connections$", printed, re.MULTILINE)


def _in_repository(program):
    return f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{program}"


def test_the_files_of_the_page_on_adding_are_those_that_tests_add():
    shown = re.findall(r"^<!-- (tests/\S+) -->\n```python\n(.*?)^```\n<!-- end -->", ADDING, re.MULTILINE | re.DOTALL)
    assert len(shown) == len(blocks("docs/adding.md", "python")) == 3
    assert [file for file, text in shown if (ROOT / file).read_text("utf-8") != text] == []


def test_what_the_page_on_adding_says_works(tmp_path):
    """In a copy of the repository with the files and entries of the page, in the places that it names."""
    for package in ("analysis", "c10", "measuring", "mnist", "reproduce", "spiking_kernels", "training"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    for module in ("sharding", "rewiring", "gradrewire", "deeprewire", "spiking"):
        shutil.copy(ROOT / f"{module}.py", tmp_path)
    for file in ("training/methods/magnitude.py", "mnist/stripes.py", "shallow/shallow.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        example = (ROOT / "tests" / "examples" / Path(file).name).read_text("utf-8")
        (tmp_path / file).write_text(example.replace("from examples.stripes", "from mnist.stripes"))
    changes = re.findall(r"`([\w/]+\.py)`[^`]*:\n\n```diff\n(.*?)^```", ADDING, re.MULTILINE | re.DOTALL)
    assert len(changes) == len(blocks("docs/adding.md", "diff")) == 5
    for file, change in changes:
        content = (tmp_path / file).read_text("utf-8")
        for part in change.split("@@\n"):
            lines = part.splitlines(keepends=True)
            old, new = ("".join(line[1:] for line in lines if line[0] in kinds) for kinds in (" -", " +"))
            assert content.count(old) == 1, f"{file} has no\n{old}"
            content = content.replace(old, new)
        (tmp_path / file).write_text(content)

    pytest.importorskip("sklearn")  # for the digits
    trainings = [line for line in commands("docs/adding.md") if re.match(r"python (?!-m reproduce)", line)]
    assert len(trainings) == 3
    for number, line in enumerate(trainings):
        result = forked.run([*line.split()[1:], "--dump-dir", str(number), "-N", "1"], tmp_path)
        assert result.returncode == 0, result.stderr
        (results,) = (tmp_path / str(number)).glob("logs/*/results.jsonl")
        assert json.loads(results.read_text("utf-8"))["largest"] > 0
    with open(tmp_path / "reproduce" / "mnist.toml", "a", encoding="utf-8") as table:
        table.write("\n".join(blocks("docs/adding.md", "toml")))
    program = """
from analysis.experiments import EXPERIMENTS
from reproduce import grid
EXPERIMENTS["shallow"]
print([row.title for row in grid.load("mnist")].count("magnitude"))
"""
    result = forked.run(["-c", program], tmp_path)
    assert (result.returncode, result.stdout) == (0, "12\n"), result.stderr  # four settings, three seeds


def test_the_readme_is_one_page():
    assert len(TEXTS["README.md"].splitlines()) <= 150


# -- commands ----------------------------------------------------------------------------------------


def commands(page):
    """The command lines of a page: those of its blocks, and whole ones within its text."""
    lines = [line for block in blocks(page, "") for line in block.splitlines()]
    lines += re.findall(r"`((?:python|pip|make|tensorboard) [^`]+)`", BLOCK.sub("", TEXTS[page]))
    return [line for line in lines if "…" not in line]


def _dump(argv, tmp_path):
    return argv if "--dump-dir" in argv else [*argv, "--dump-dir", str(tmp_path)]


PROGRAMS = {  # how each takes its arguments
    "reproduce": reproduce.__main__._options,
    "reproduce.networks": reproduce.networks._options,
    "analysis.report": analysis.report.parse,
    "analysis.export": analysis.export._options,
    "benchmarks.bench": benchmarks.bench.parse,
    "benchmarks.gpu": benchmarks.gpu.parse,
    "benchmarks.sparse": benchmarks.sparse.parse,
}


def check(line, tmp_path):
    """Parses a command line as its program does; raises for one that is not accepted, and for an unknown program."""
    words = shlex.split(line, comments=True)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):  # a variable of the environment
        del words[0]
    if words[0] == "cd":
        assert (ROOT / words[1]).is_dir()
    elif words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        assert [word for word in words[1:] if "=" not in word and word not in targets] == []
        for program, options in (word.split("=", 1) for word in words if word.startswith(("BENCH=", "GPU="))):
            PROGRAMS[f"benchmarks.{program.lower()}"](shlex.split(options))
    elif words[:2] in (["pip", "install"], ["pip", "download"]):
        for word in words[2:]:
            if word.endswith(".txt"):
                assert (ROOT / word).is_file()
            for extra in re.findall(r"^\.\[(.*)\]$", word):
                assert set(extra.split(",")) <= set(PROJECT["optional-dependencies"])
    elif words[0] == "tensorboard":
        assert words[1] == "--logdir"
    else:
        assert words[0] == "python", line
        script = "-m" not in words[:2]
        name, argv = (words[1], words[2:]) if script else (words[2], words[3:])
        experiment = re.fullmatch(r"(?:(\w+)/)?(\w+)\.py" if script else r"(\w+)\.(\w+)", name)
        if experiment and experiment[2] in EXPERIMENTS:
            parse(EXPERIMENTS[experiment[2]], _dump(argv, tmp_path))
        else:
            PROGRAMS[name](argv)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/adding.md"])  # see above
def test_the_commands_are_accepted(page, tmp_path):
    for line in commands(page):
        if line.strip() and not line.startswith("#"):
            check(line, tmp_path)


def test_commands_are_found_and_wrong_ones_refused(tmp_path):
    found = commands("README.md")
    for line in ("python mnist/mnist.py -m grad -s 0.95", "python c10/c10.py -m grad -s 0.95"):  # the published ones
        assert line in found
    assert any("--recipe fast --connectivity 0.05" in line for line in found)
    assert any(line.startswith("make demo") for line in found)
    for line in (
        "python mnist.py -m grad -s 2",
        "python -m c10.c10 --no-such 3",
        "python -m analysis.report",
        "python -m analysis.export run --format no",
        "python -m reproduce no",
        "python other.py",
        "make no-such",
        'make bench BENCH="--dataset-dri data"',
        "python -m benchmarks.sparse --dataset-dri data",
        "pip install .[no]",
        "rm -rf runs",
    ):
        with pytest.raises(Exception):  # noqa: B017, PT011 - a Refusal, or an assertion
            check(line, tmp_path)


def test_the_make_targets_are_listed():
    targets = re.findall(r"^([a-z-]+):.*## (.+)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)[1].split()
    assert [name for name, _ in targets] == phony
    listed = re.findall(r"^\| `make ([a-z-]+)` \| (.+) \|$", TEXTS["docs/running.md"], re.MULTILINE)
    assert listed == [target for target in targets if target[0] != "help"]
    files = re.search(r"^NUMERIC := .*?golden (.*)\)\)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)[
        1
    ].split()
    assert [name for name in files if not (ROOT / "tests" / f"test_{name}.py").is_file()] == []


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_refuses_an_old_python_before_it_makes_anything(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("requirements.txt", "tests/requirements.txt", "constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    old = tmp_path / "python39"
    pretend = "import sys; sys.version_info = (3, 9, 6); sys.version = '3.9.6 (default)'; exec(sys.argv.pop(1))"
    old.write_text(f'#!/bin/sh\n[ "$1" = -c ] || exit 3\nexec {shlex.quote(sys.executable)} -c "{pretend}" "$2"\n')
    old.chmod(0o755)
    own = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}  # not make test's
    result = subprocess.run(
        ["make", "demo", "PYTHON=./python39"], cwd=tmp_path, env=own, capture_output=True, text=True, timeout=60
    )
    assert result.returncode != 0
    line, *_ = result.stderr.splitlines()
    assert line.startswith("./python39 is Python 3.9.6, and 3.11 or newer is needed: ")
    assert result.stdout == ""
    assert not (tmp_path / ".venv").exists()


# -- options -----------------------------------------------------------------------------------------


def table(text):
    """The options of a page's table: spellings to what the row says."""
    rows = [[cell.strip() for cell in row.split(" | ")] for row in text.splitlines() if row.startswith("| `-")]
    return {tuple(re.findall(r"`(-[^` ]*)[^`]*`", row[0])): [cell.strip(" |") for cell in row[1:]] for row in rows}


def defaults(parser):
    """The default of every option, as --help says it."""
    options = {tuple(action.option_strings): action for action in parser._actions if action.dest != "help"}
    return {
        spellings: re.search(r"\(default: (.*)\)$", parser._get_formatter()._expand_help(action))[1]
        for spellings, action in options.items()
        if spellings
    }


def test_the_options_page_has_every_option_with_its_default_and_no_other():
    mnist_defaults, c10_defaults = (defaults(_parser(EXPERIMENTS[name])) for name in ("mnist", "c10"))
    assert mnist_defaults.keys() == c10_defaults.keys()
    expected = {
        spellings: one if one == other else f"MNIST: {one}. CIFAR-10: {other}"
        for (spellings, one), other in zip(mnist_defaults.items(), c10_defaults.values(), strict=True)
    }
    shown = table(TEXTS["docs/options.md"])
    assert {spellings: row[-1] for spellings, row in shown.items()} == expected
    assert list(shown) == list(expected)  # in the order of --help
    assert all(len(row) == 2 and row[0] for row in shown.values())


def test_the_options_of_the_grid_are_listed(monkeypatch):
    made = []
    original = reproduce.__main__.Parser.parse_args
    monkeypatch.setattr(
        reproduce.__main__.Parser, "parse_args", lambda self, argv: made.append(self) or original(self, argv)
    )
    reproduce.__main__._options(["mnist"])
    assert set(table(TEXTS["docs/running.md"])) == set(defaults(made[0]))


def test_the_formats_of_exports_are_listed():
    assert re.findall(r"^\| `(\w+)` \|", TEXTS["docs/exporting.md"], re.MULTILINE) == list(analysis.export.WRITERS)


# -- links, versions -----------------------------------------------------------------------------------


def anchors(path):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text("utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?://", target):
            file, _, anchor = target.partition("#")
            path = (ROOT / page).parent / file if file else ROOT / page
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), target


def test_the_readme_leads_to_every_page():
    assert [page for page in PAGES if page != "README.md" and f"({page})" not in TEXTS["README.md"]] == []


def test_citation_and_changelog_are_of_this_version():
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    fields = dict(re.findall(r"^([\w-]+): *(.*)$", citation, re.MULTILINE))
    assert {"cff-version": "1.2.0", "type": "software", "version": PROJECT["version"]}.items() <= fields.items()
    assert {"title", "message", "authors", "preferred-citation"} <= fields.keys()
    assert "10.24963/ijcai.2021/236" in citation
    assert "10.24963/ijcai.2021/236" in TEXTS["README.md"]
    versions = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert versions[:2] == ["Unreleased", PROJECT["version"]]


# -- results -----------------------------------------------------------------------------------------


def cells(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def tables(text):
    """The Markdown tables of a text: of each its head, and its rows."""
    found = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [(head, rows) for head, _, *rows in map(cells, found)]


def not_shown_right(block, text):
    """What of a page's block does not stand in the text of the file that it is said to show.

    A block is a part of the file as it is, or has tables of it with fewer rows and columns.
    """
    if block.strip() in text:
        return []
    wrong = [line for line in block.splitlines() if not line.startswith("|") and line not in text.splitlines()]
    for shown_head, shown in tables(block):
        possible = []
        for head, rows in tables(text):
            if set(shown_head) <= set(head):
                columns = [head.index(name) for name in shown_head]
                possible += [[row[column] for column in columns] for row in rows]
        wrong += [row for row in shown if row not in possible]
    return wrong


@pytest.mark.parametrize("page", ["docs/results.md", "docs/reproduction.md"])
def test_its_results_are_those_of_the_grid(page):
    text = TEXTS[page]
    shown = re.findall(r"<!-- (results/\S+) -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert len(shown) == text.count("<!-- end -->") == text.count("<!-- results/")
    assert {"results/mnist/table.md", "results/mnist/equal_connectivity.md"} <= {file for file, _ in shown}
    for file, block in shown:
        assert not_shown_right(block, (ROOT / file).read_text("utf-8")) == []
    rows = [row for file, block in shown if file == "results/mnist/table.md" for row in cells(block)]
    if page == "docs/results.md":
        assert rows[0][:4] == ["method", "options", "epochs", "seeds"]
        assert {"dense", "Grad R", "Deep R", "soft Deep R"} <= {row[0] for row in rows}


def test_it_says_how_many_rows_of_the_narrow_grid_are_finished():
    text = TEXTS["docs/reproduction.md"]
    ((finished, asked),) = re.findall(r"(\d+) of (\d+) are finished", text)
    assert f"{finished} of {asked} rows;" in (ROOT / "results/c10-narrow/table.md").read_text("utf-8")
    shown = re.search(r"<!-- results/c10-narrow/table.md -->\n(.*?)<!-- end -->", text, re.DOTALL)
    head, _, *lines = cells(shown[1])
    assert sum(int(line[head.index("seeds")]) for line in lines) == int(finished)


def test_the_page_on_comparability_shows_the_results_of_the_grid():
    text = TEXTS["docs/comparability.md"]
    shown = re.findall(r"<!-- (results/\S+) -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert len(shown) == text.count("<!-- end -->") == text.count("<!-- results/") >= 2
    for file, block in shown:
        assert not_shown_right(block, (ROOT / file).read_text("utf-8")) == []
    heads = {name for file, block in shown if "countings" in file for name in cells(block)[0]}
    assert heads == set(cells((ROOT / "results/mnist/countings.md").read_text("utf-8"))[0])  # each counting is there


def test_the_readme_gives_the_results_of_the_grid():
    head, _, *rows = cells((ROOT / "results/mnist/table.md").read_text("utf-8"))
    rows = [dict(zip(head, row, strict=True)) for row in rows]
    claims = re.findall(
        r"\*\*MNIST: Grad R with (\d+) % .* reaches ([\d.]+ ± [\d.]+) %, with (\d+) % of them ([^*]+) %",
        TEXTS["README.md"],
    )
    ((one, one_accuracy, two, two_accuracy),) = claims
    text = " ".join(TEXTS["README.md"].split())
    dense = re.search(r"The dense network reaches ([\d.]+) % at the same .*?\), and ([\d.]+ ± [\d.]+) % at 1e-4", text)
    penalties = re.search(r"\(`-penalty (\S+)` and `(\S+)`, `-lr 1e-3`\)", text)
    ((left, first),) = re.findall(r"after 60 epochs, .* has ([\d.]+) % of .* accuracy of ([\d.]+ ± [\d.]+) %", text)
    published = "`-s 0.95 -penalty 1e-3 -lr 1e-4`"
    for method, options, epochs, seeds, connectivity, accuracy in (
        ("Grad R", f"`-s 0.95 -penalty {penalties[1]} -lr 1e-3`", "512", "3", one, one_accuracy),
        ("Grad R", f"`-s 0.95 -penalty {penalties[2]} -lr 1e-3`", "512", "3", two, two_accuracy),
        ("dense", "`-lr 1e-3`", "512", "1", "100", dense[1]),
        ("dense, lr 1e-4", "`-lr 1e-4`", "512", "3", "100", dense[2]),
        ("Grad R, lr 1e-4", published, "60", "3", left, first),
    ):
        key = {"method": method, "options": options, "epochs": epochs, "seeds": seeds, "test accuracy (%)": accuracy}
        ((shown, *_),) = [row["connectivity (%)"].split() for row in rows if key.items() <= row.items()]
        assert f"{float(shown):.{len(connectivity.partition('.')[2])}f}" == connectivity
    assert [row["epochs"] for row in rows if row["options"] == published] == ["60"]  # not to the end


def test_a_changed_result_is_not_that_of_the_grid():
    text = "of 3 rows\n\n| a | b | c |\n| --- | --- | --- |\n| 1 | 2 | 3 |\n| 4 | 5 | 6 |\n"
    text += "\n| a | d |\n| --- | --- |\n| 7 | 8 |\n"
    assert not_shown_right("| 4 | 5 | 6 |\n", text) == []
    assert not_shown_right("| a | c |\n| --- | --- |\n| 4 | 6 |\n", text) == []
    assert not_shown_right("| a | c |\n| --- | --- |\n| 4 | 3 |\n", text) == [["4", "3"]]
    assert not_shown_right("of 3 rows\n\n| d |\n| --- |\n| 8 |\n", text) == []  # the second table
    assert not_shown_right("of 4 rows\n\n| d | c |\n| --- | --- |\n| 8 | 3 |\n", text) == ["of 4 rows", ["8", "3"]]


def test_the_results_are_of_the_grid_as_it_is():
    listed = {row.command for row in grid.load("mnist")}
    with open(ROOT / "results" / "mnist" / "rows.csv") as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert [row["command"] for row in rows if row["command"] not in listed] == []
