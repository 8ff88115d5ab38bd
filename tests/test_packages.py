"""What only a part of the program needs: the rest works without it, and that part says in one line what is missing."""

import importlib
import re
import tomllib
from pathlib import Path

import forked
import pytest
from export_helpers import mnist, write_run

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
DRAWING = ("analysis.pictures", "reproduce.figures")  # which their commands import when they draw

# In a process where the packages argv[1] are missing: runs the module argv[2] as a command, or imports all that follow.
WITHOUT = """
import importlib, runpy, sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in missing.split() else self.finder.find_spec(name, path, target)

missing, what, *sys.argv[1:] = sys.argv[1:]
for name in [name for name in sys.modules if name.partition(".")[0] in missing.split()]:
    del sys.modules[name]
sys.meta_path[:] = map(Without, sys.meta_path)
if what == "import":
    for module in sys.argv[1:]:
        importlib.import_module(module)
    print("imported")
else:
    runpy.run_module(what, run_name="__main__")
"""


def without(package, *argv):
    return forked.run(["-c", WITHOUT, package, *argv], ROOT)


def modules():
    """Every module of the rooms, by its name."""
    rooms = ("analysis", "benchmarks", "c10", "measuring", "mnist", "reproduce", "spiking_kernels", "training")
    paths = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths}
    return sorted(names | {path.stem for path in ROOT.glob("*.py")})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), mnist())


def test_all_modules_are_imported_without_any():
    names = [name for name in modules() if not name.startswith(DRAWING)]
    assert {"analysis.report", "training.files.locks", "reproduce.outcome"} < set(names)
    result = without("matplotlib jinja2 scipy safetensors nir nirtorch h5py sklearn", "import", *names)
    assert (result.returncode, result.stdout) == (0, "imported\n"), result.stderr


@pytest.mark.parametrize(
    ("package", "install", "argv"),
    [
        ("matplotlib", "matplotlib", ["analysis.report", "RUN", "-o", "OUT"]),
        ("jinja2", "jinja2", ["analysis.report", "RUN", "-o", "OUT"]),
        ("matplotlib", "matplotlib", ["reproduce", "mnist", "--dump-dir", "OUT", "--outcome", "OUT"]),
        ("scipy", "scipy", ["benchmarks.sparse"]),
        ("safetensors", "safetensors", ["analysis.export", "RUN", "--format", "safetensors", "-o", "OUT"]),
        ("nir", "nir nirtorch", ["analysis.export", "RUN", "--format", "nir", "-o", "OUT"]),
        ("nirtorch", "nir nirtorch", ["analysis.export", "RUN", "--format", "nir", "-o", "OUT"]),
        ("sklearn", "scikit-learn", ["mnist.mnist", "--dataset", "digits", "-N", "1", "--dump-dir", "OUT"]),
    ],
)
def test_the_part_that_needs_it_names_it_in_one_line(package, install, argv, run, tmp_path):
    out = tmp_path / "out"
    result = without(package, *({"RUN": run, "OUT": out}.get(word, word) for word in argv))
    lines = [line for line in result.stderr.splitlines() if "warning" not in line.lower()]
    assert result.returncode == 2
    assert len(lines) == 1, result.stderr
    assert re.search(rf"\b{package}\b|\b{install}\b", lines[0])
    assert f"(pip install {install})" in lines[0]
    assert not out.is_file()


def test_the_event_driven_evaluation_names_scipy():
    from analysis.packages import imported
    from training.errors import Refusal

    program = "from analysis.sparse import event_driven; from mnist.model import MnistNet; event_driven(MnistNet())"
    script = WITHOUT.rpartition("if what")[0] + program
    result = forked.run(["-c", script, "scipy", ""], ROOT)
    assert result.stderr.rstrip().endswith(
        "the event-driven evaluation needs scipy, which is not installed (pip install scipy)"
    )
    with pytest.raises(Refusal, match=r"^this needs nothing, which is not installed \(pip install nothing\)$"):
        imported("nothing.at.all", "this")
    assert imported("math", "this") is importlib.import_module("math")


def requirements():
    """The packages of requirements.txt under each of its headings."""
    sections, name = {}, None
    for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines():
        if heading := re.match(r"# (\w+):", line):
            name = heading[1]
        elif requirement := line.partition("#")[0].strip():
            sections.setdefault(name, []).append(requirement)
    return sections


def test_the_extras_are_those_of_the_requirements():
    sections = requirements()
    named = [re.match(r"[\w-]+", requirement)[0] for requirement in sections["train"]]
    assert named[:6] == ["torch", "torchvision", "spikingjelly", "numpy", "tensorboard", "tqdm"]
    assert sections["train"][0] in PROJECT["dependencies"]
    assert {"train": sections["train"][1:], **{name: sections[name] for name in sections if name != "train"}} == {
        name: packages for name, packages in EXTRAS.items() if name != "all"
    }
    assert EXTRAS["all"] == [f"gradrewire[{','.join(name for name in EXTRAS if name != 'all')}]"]


def test_every_requirement_has_a_tested_version():
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if "==" in line
    )
    wanted = [re.match(r"[\w-]+", line)[0] for section in requirements().values() for line in section]
    assert [name for name in wanted if name not in pinned] == []
