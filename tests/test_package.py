"""The installed package: it has the optimizers and load_pruned, with all that these need, and works anywhere."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from export_helpers import images_for, mnist, snapshot_of, write_run

import pruned
from analysis import shipped
from analysis.export import export

SHIPPED = shipped.networks()
ROOT = Path(__file__).resolve().parent.parent


def python(folder, program, *paths):
    """Runs a program in a folder, as a script there would run, with nothing but the paths' modules and the packages."""
    (folder / "program.py").write_text(program)
    return subprocess.run(
        [sys.executable, "program.py"],
        cwd=folder,
        env={"PYTHONPATH": ":".join(map(str, paths)), "PATH": "", "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that pip installs the package into, without a network."""
    source, target = tmp_path_factory.mktemp("source") / "source", tmp_path_factory.mktemp("target")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", target, source], check=True, capture_output=True, timeout=300)
    return target


@pytest.mark.parametrize("kind", ["run", "safetensors", "csr"])
def test_a_pruned_network_is_loaded_without_a_checkout(kind, installed, tmp_path):
    network = mnist()
    path = write_run(tmp_path, network)
    if kind != "run":
        path = tmp_path / "export"
        export(snapshot_of(network), kind, path)
    torch.save(images_for(network), tmp_path / "images.pt")
    program = f"""
import sys, torch
from pathlib import Path
from pruned import load_pruned
torch.save(load_pruned({str(path)!r})(torch.load("images.pt")), "counts.pt")
files = {{name: getattr(module, "__file__", None) for name, module in sys.modules.items()}}
print(*sorted({{name.partition(".")[0] for name, file in files.items() if file and {str(installed)!r} in file}}))
print(*[file for file in files.values() if file and {str(ROOT)!r} in file and ".venv" not in file])
"""
    result = python(tmp_path, program, installed)
    assert result.returncode == 0, result.stderr
    own, from_here = result.stdout.splitlines()
    assert own.split() == sorted([*pruned.MODULES, "pruned"])
    assert from_here == ""
    counts = torch.load(tmp_path / "counts.pt")
    assert counts.sum() > 0
    assert torch.equal(counts, network(images_for(network)))


def test_files_that_are_not_python_are_installed_too(installed):
    others = [path.relative_to(ROOT) for room in ("spiking_kernels", "analysis") for path in (ROOT / room).rglob("*.*")]
    others = [path for path in others if path.suffix not in (".py", ".pyc")]
    assert {path.suffix for path in others} == {".c", ".h", ".jinja"}
    assert [path for path in others if not (installed / path).is_file()] == []


def test_the_networks_are_installed_and_loaded_by_name(installed, tmp_path):
    pytest.importorskip("safetensors")
    program = "from pruned import load_pruned\nprint(load_pruned('grad-5').fc[1].weight.count_nonzero().item())"
    result = python(tmp_path, program, installed)
    assert (result.returncode, result.stdout) == (0, f"{pruned.load_pruned('grad-5').fc[1].weight.count_nonzero()}\n")
    assert sorted(path.suffix for path in (installed / "results").rglob("*.*")) == [".safetensors"] * len(SHIPPED)


@pytest.mark.parametrize("hiding", ["training/__init__.py", "analysis.py", "spiking.py"])
def test_what_hides_a_module_is_named_in_one_line(hiding, installed, tmp_path):
    (tmp_path / hiding).parent.mkdir(exist_ok=True)
    (tmp_path / hiding).write_text("")
    result = python(tmp_path, "import pruned", installed)
    last = result.stderr.splitlines()[-1]
    name = hiding.removesuffix(".py").removesuffix("/__init__")
    assert last == (
        f"ImportError: load_pruned needs the module {name} in {installed}, but {tmp_path / hiding} hides it: "
        "rename or move that"
    )


def test_a_folder_without_modules_hides_nothing(installed, tmp_path):
    (tmp_path / "training").mkdir()
    result = python(tmp_path, "import pruned", installed)
    assert result.returncode == 0, result.stderr


def test_a_missing_package_is_named_in_one_line(installed, tmp_path):
    program = "import sys; sys.modules['spikingjelly'] = None; import pruned"
    result = python(tmp_path, program, installed)
    message = "ImportError: load_pruned needs spikingjelly, which is not installed (pip install '.[train]')"
    assert result.stderr.splitlines()[-1] == message


def test_the_optimizers_need_torch_alone(installed, tmp_path):
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in ("spikingjelly", "tqdm", "tensorboard", "PIL"))
    program = f"import sys; {blocked}\nimport deeprewire, gradrewire\nprint(gradrewire.GradRewiring.__module__)"
    result = python(tmp_path, program, installed)
    assert (result.returncode, result.stdout) == (0, "gradrewire\n"), result.stderr
