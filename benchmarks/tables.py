"""What the benchmarks share: they measure functions in turns, print tables, and have the same options."""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from analysis.experiments import EXPERIMENTS
from training import data
from training.command_line import Parser, check_output, file_path, folder_path, output_file, whole_number
from training.run_info import processor

Row = tuple[str, ...]
Tables = Iterable[dict]  # of :func:`table`, each when it is measured


def in_turns(
    functions: dict[str, Callable], rounds: int, device: torch.device, warmup: int = 1, take=statistics.median
) -> dict[str, float]:
    """The seconds that each function takes: their median, or what else ``take`` makes of them.

    In each round the functions run one after the other.
    """
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = {name: [] for name in functions}
    for _ in range(warmup + rounds):
        for name, function in functions.items():
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: take(values[warmup:]) for name, values in seconds.items()}


def table(title: str, head: Row, rows: list[Row]) -> dict:
    """Prints a Markdown table; returns it for the machine-readable copy."""
    made = {"title": title, "head": head, "rows": rows}
    print(markdown(made), flush=True)
    return made


def markdown(table: dict) -> str:
    """A table under its title."""
    rows = (table["head"], ["---"] * len(table["head"]), *table["rows"])
    lines = [f"| {' | '.join(cell.replace('|', '¦') for cell in cells)} |" for cells in rows]
    return "\n".join((f"\n### {table['title']}\n", *lines))


def noise(n: int, *shape: int) -> data.Split:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, *shape), generator=generator, dtype=torch.uint8)
    return data.Split(images, torch.randint(0, 10, (n,), generator=generator))


def mnist_images(folder: Path | None) -> data.Dataset:
    """Real MNIST, or noise of its size: speed does not depend on the pixels."""
    if folder:
        return EXPERIMENTS["mnist"].datasets[0].load(folder)
    return data.Dataset(noise(60_000, 1, 28, 28), noise(10_000, 1, 28, 28))


def parser(name: str, description: str, rounds: int) -> Parser:
    what = {"prog": f"python -m benchmarks.{name}", "description": description}
    made = Parser(**what, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "folder with MNIST/raw (default: noise of MNIST's size)"
    made.add_argument("--dataset-dir", type=folder_path, metavar="DIR", help=text)
    text = "measurements of each execution (default: %(default)s)"
    made.add_argument("--rounds", type=whole_number(1), default=rounds, metavar="N", help=text)
    made.add_argument("--json", type=file_path, metavar="FILE", help="also write the tables to this file")
    return made


def versions(packages: Row) -> str:
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)])


def run(options: argparse.Namespace, device: torch.device, packages: Row, measure: Callable[[], Tables]) -> int:
    """Prints where and with what versions it measures, measures, and writes the machine-readable copy."""
    if options.json:
        check_output("--json", options.json, parents=True)  # before the minutes that it takes
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    hardware += f", {torch.get_num_threads()} CPU threads"
    head = {"date": str(date.today()), "hardware": hardware, "versions": versions(packages)}
    print(", ".join(head.values()))
    tables = list(measure())
    if options.json:
        with output_file("--json", options.json) as temporary:
            temporary.write_text(json.dumps({**head, "tables": tables}, indent=1) + "\n", encoding="utf-8")
    return 0
