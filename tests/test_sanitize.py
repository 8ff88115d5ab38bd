"""The sanitizers find a fault that is put into the C code (make sanitize finds none in it)."""

import re
import tempfile
from pathlib import Path

import pytest
from forked import ForkServer
from sanitize import ROOT, Sanitizer

from spiking_kernels import build

pytestmark = pytest.mark.slow


class Forking(Sanitizer):
    """Its programs come from a process that has imported torch under the sanitizers already."""

    def __init__(self, folder):
        super().__init__(folder)
        self.server = ForkServer(folder / "errors", self.environment, ("torch", "hypothesis.strategies"))

    def call(self, argv):
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        program = self.server.start(argv, self.environment, ROOT, folder)
        try:
            out, err = program.communicate()
        finally:
            program.kill()
        print(out)
        return program.returncode, err


@pytest.fixture(scope="module")
def sanitizer(tmp_path_factory):
    try:
        sanitizer = Forking(tmp_path_factory.mktemp("sanitized"))
    except build.Unavailable as error:
        pytest.skip(f"no sanitizers: {error}")
    yield sanitizer
    sanitizer.server.close()


@pytest.mark.parametrize(
    ("function", "right", "wrong", "told"),
    [
        (
            "grad_rewiring_step",
            "for (int64_t i = done; i < n; i++)",
            "for (int64_t i = done; i <= n; i++)",
            "heap-buffer|null pointer",
        ),
        (
            "lif_linear_lif",
            "memcpy(counts, count, sizeof(float) * m)",
            "memcpy(counts, count, 4 * BLOCK)",
            "heap-buffer",
        ),
        ("lif_linear_lif", "k[i] = T + 1;", "k[i] = T + 2;", "buffer-overflow"),
        (
            "lif_linear_lif_learn",
            "*x = inputs + (size_t)n * T * O",
            "*x = inputs + (size_t)n * T * O + 1",
            "heap-buffer",
        ),
        ("lif_block", "float v[TILE], h[TILE];", "float v[TILE], h[TILE - 1];", "stack-buffer"),
        (
            "lif_block",
            "at->rows == 2 && p + 2 <= at->pixels; p += 2) {\n        const size_t",
            "p < at->pixels; p += 2) {\n        const size_t",
            "buffer-overflow",
        ),
        ("convolution", "uint16_t places[(size_t)C * most];", "uint16_t places[(size_t)C * most / 2];", "stack-buffer"),
        ("convolution", "if (row < 0 || row >= H) {", "if (row < 0 || row > H) {", "heap-buffer"),
        ("convolution", "if (to >= 0 && to < H)", "if (to >= 0 && to <= H)", "heap-buffer"),
        ("convolution", "(W + 2) + 2 + WIDTH + 15) / 16 * 16", "(W + 2))", "heap-buffer"),
        ("affine_lookup", "index[n] >= D) return", "index[n] > D) return", "heap-buffer|null pointer"),
        ("affine_lookup", "m[0] * (uint32_t)x", "m[0] * x", "signed integer overflow"),
        ("deep_rewiring_draws", "uint16_t places[CHUNK];", "uint16_t places[CHUNK / 2];", "stack-buffer"),
        ("deep_rewiring_step", "signs[i] = (float)sign[i]", "signs[i] = (float)sign[i + 1]", "heap-buffer"),
    ],
)
def test_a_fault_is_found(sanitizer, tmp_path, function, right, wrong, told):
    texts = {path.name: path.read_text() for path in build.sources("*.[ch]")}
    assert sum(right in text for text in texts.values()) == 1
    for name, text in texts.items():
        (tmp_path / name).write_text(text.replace(right, wrong))
    status, report = sanitizer.run(tmp_path, "portable", "--only", function)
    assert status != 0
    assert re.search(told, report)
    assert "\nin call " in report


def test_the_code_as_it_is_passes(sanitizer, capfd):
    status, report = sanitizer.run(build.FOLDER, "native", "--calls", "20")
    assert (status, report) == (0, "")
    assert [line.split()[0] for line in capfd.readouterr().out.split("\n") if line] == list(build.ARGUMENTS)
