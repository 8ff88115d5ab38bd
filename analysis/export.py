"""Exports a run's network to a small file, and loads it: ``python -m analysis.export --help``."""

import argparse
import errno
import os
import sys
from pathlib import Path

import torch

import measuring
from analysis import shipped
from analysis.formats import SUFFIXES, WRITERS, read
from analysis.formats.packed import as_folded
from analysis.snapshot import Snapshot, Unreadable, from_run, models_folder
from measuring.report import beyond, percent
from spiking import SpikingNetwork
from training import data, device, files
from training.command_line import Parser, check_output, command, file_path, folder_path
from training.console import counted
from training.defaults import torch_defaults
from training.errors import Refusal
from training.files import storage
from training.options import REPOSITORY, gpu_number
from training.step import set_precision


@torch_defaults()
def load_pruned(path: str | Path) -> SpikingNetwork:
    """Loads a network for evaluation: in eval mode, on the CPU, its parameters without gradients.

    The network maps images [N, C, H, W] to spike counts [N, 10]; a pixel in [0, 1] enters it as
    (pixel - mean) / std (see :mod:`analysis.formats`). Pruned weights are zeros of dense tensors;
    :mod:`analysis.sparse` computes with the connections alone. To train the network, call
    ``network.requires_grad_()`` and ``network.train()``. No random number is drawn, and no code in a file is run.

    Args:
        path: a run's folder (below models or logs), whose newest intact checkpoint is loaded, a checkpoint, or an
            export of any format; or, where there is no such file, the name of a network that comes with this program,
            one of :func:`analysis.shipped.networks`.

    Raises:
        ValueError: the file is damaged or not one of this program; the message is one line.
        training.errors.Refusal: the format needs a package that is not installed.
        OSError: the file cannot be read.
    """
    return load_snapshot(path).network()


def load_snapshot(path: str | Path) -> Snapshot:
    """The network that :func:`load_pruned` loads, with what its file says of it."""
    name, path, known = str(path), files.expanded(path), shipped.networks()
    if path.is_dir():
        try:
            return from_run(path)[0]
        except Unreadable as error:
            if name not in known:
                raise
            raise Unreadable(f"{error}; it hides the network {name}, which comes with this program") from None
    if not path.exists():
        if name not in known:
            text = f"No such file, and no network of this name: {', '.join(known) or 'there are none'}"
            raise FileNotFoundError(errno.ENOENT, text, name)
        path = known[name]
    return read(path)


@torch_defaults()
def export(snapshot: Snapshot, form: str, path: str | Path) -> int:
    """Writes a network to ``path`` in one of the formats of :mod:`analysis.formats`; returns the number of bytes.

    The file is read back and compared with the network before it takes its name. If the process is killed, ``path``
    has its old content or the new file, whole (see :func:`training.files.replacing`).

    Args:
        snapshot: the network; that of a run by :func:`analysis.snapshot.from_run`.
        form: the format, one of :data:`analysis.formats.WRITERS`.
        path: the file.

    Raises:
        Refusal: the format cannot hold this network, or a package that it needs is not installed; or ``path`` is the
            checkpoint of a run.
        ValueError: there is no such format.
        OSError: the file cannot be written; it names ``path``.
    """
    path = files.expanded(path)
    if form not in WRITERS:
        raise ValueError(f"the format must be one of {', '.join(WRITERS)}, not {form!r}")
    if storage.is_stored(path):
        raise Refusal(f"{path} is the checkpoint of a run")
    with files.replacing(path, parents=True) as temporary:
        content = WRITERS[form](snapshot)
        with files.naming(path):
            temporary.write_bytes(content)
        written = read(temporary)
        expected = (as_folded(snapshot) if form == "csr" else snapshot).state
        different = [name for name in expected if not torch.equal(expected[name], written.state[name])]
        if different or snapshot.T != written.T:
            raise RuntimeError(f"the export does not read back as it was written: {', '.join(different) or 'T'}")
    return len(content)


@torch.no_grad()
def differing_counts(one: SpikingNetwork, other: SpikingNetwork, test_set: data.TestBatches) -> tuple[int, int]:
    """How many spike counts (image and class) differ between two networks, of how many."""
    differing = counted = 0
    for images, _ in test_set:
        counts = one(images)
        differing += int((counts != other(images)).sum())
        counted += counts.numel()
    return differing, counted


def _options(argv: list[str] | None) -> argparse.Namespace:
    text = "Exports the network of a run to one small file, without its pruned weights."
    parser = Parser(prog="python -m analysis.export", description=text)
    text = "folder of the run: <dump-dir>/models/<name> or <dump-dir>/logs/<name>"
    parser.add_argument("run", type=folder_path, metavar="RUN", help=text)
    text = (
        "npz: small, for NumPy; safetensors: for any language; csr: matrices for SciPy; nir: a graph for other "
        "simulators and chips, mnist only (default: %(default)s)"
    )
    parser.add_argument("--format", choices=list(WRITERS), default="npz", help=text)
    text = "file to write (default: export, with the format's suffix, beside the run's checkpoint)"
    parser.add_argument("-o", "--output", type=file_path, metavar="FILE", help=text)
    text = "compare every spike count on the test set with the checkpoint's"
    parser.add_argument("--check", action="store_true", help=text)
    text, folder = "with --check: folder of the data set (default: data, in the repository)", REPOSITORY / "data"
    parser.add_argument("--dataset-dir", type=folder_path, default=folder, metavar="DIR", help=text)
    text = "with --check: id of the GPU to use (default: the first GPU, or the CPU without a GPU)"
    parser.add_argument("-gpu", "--gpu", type=gpu_number, metavar="ID", help=text)
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    models = models_folder(options.run)
    output = options.output or models / f"export{SUFFIXES[options.format]}"
    if os.path.realpath(output) in map(os.path.realpath, models.glob("checkpoint*")):
        raise Refusal(f"argument -o/--output: {output} is the run's checkpoint")
    if options.check and output.exists() and not output.is_file():
        raise Refusal(f"argument --check: {output} is not a file that can be read again")
    snapshot, checkpoint = from_run(models)
    check_output("-o/--output", output, parents=True)
    place = argparse.Namespace(gpu=options.gpu, precision="fp32", deterministic=False, compile=False)
    if options.check:
        device.choose(place)
        set_precision(place.precision_used, place.device)
    size = export(snapshot, options.format, output)
    total = measuring.total(measuring.count(measuring.masks(snapshot.network())))
    dense = sum(tensor.nbytes for tensor in snapshot.state.values())
    epochs, sparsity = f"{counted(snapshot.epoch, 'epoch')}{beyond(snapshot.position)}", percent(total.sparsity)
    print(f"after {epochs}: {total.connected} of {total.weights} connections, sparsity {sparsity}, T {snapshot.T}")
    print(f"checkpoint   {checkpoint.stat().st_size:>11,} bytes  with the optimizers' state")
    print(f"its network  {dense:>11,} bytes  dense")
    print(f"the export   {size:>11,} bytes  {100 * size / dense:.1f} % of the network: {output}")
    if not options.check:
        return 0
    test_images = snapshot.source.load(options.dataset_dir).test
    normalisation = snapshot.source.normalisation(place.device)
    test_set = data.TestBatches(test_images.to(place.device), snapshot.about.test_batch_size, normalisation)
    folded = options.format == "csr" and place.device.type != "cpu"
    expected = as_folded(snapshot) if folded else snapshot
    networks = (network.to(place.device) for network in (expected.network(), load_pruned(output)))
    differing, pairs = differing_counts(*networks, test_set)
    print(f"{differing} of {pairs} spike counts differ on the {len(test_images)} test images")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
