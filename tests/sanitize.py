"""make sanitize: random calls of every kernel under AddressSanitizer and UndefinedBehaviorSanitizer.

CC names the compiler, which must have both: gcc and clang do.
"""

import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from spiking_kernels import build

FLAGS = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
SANITIZERS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
ROOT = Path(__file__).parents[1]
# options of the compiler by the vectors that the kernels use, of those that the processor has
VARIANTS = {"native": [], "AVX2": ["-U__AVX512F__"], "portable": ["-U__AVX512F__", "-U__AVX2__"]}
STREAMED = "-DSTREAMED=1"  # small outputs are written past the cache, too
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


class Sanitizer:
    """A compiler's sanitizers; ``folder`` is for the files that they need.

    Raises:
        build.Unavailable: there is no such compiler, or it has none.
    """

    def __init__(self, folder: Path):
        self.folder, self.command = folder, build.compiler()
        clang = "clang" in self._answer("--version")
        accepted = [build.first_accepted(self.command, row, folder) for row in build.ALTERNATIVES]
        self.flags = [*FLAGS, *SANITIZERS, *filter(None, accepted), *(["-shared-libasan"] if clang else [])]
        of_clang = [f"libclang_rt.asan{suffix}.so" for suffix in (f"-{platform.machine()}", "")]
        # and the C++ library, without which no exception of torch's finds its handler
        preloaded = [self._file(*(of_clang if clang else ["libasan.so"])), self._file("libstdc++.so.6")]
        self.environment = {"OMP_NUM_THREADS": "2", **os.environ, **OPTIONS, "LD_PRELOAD": " ".join(preloaded)}

    def _answer(self, option: str) -> str:
        try:
            return subprocess.run([*self.command, option], capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError) as error:
            raise build.Unavailable(f"there is no C compiler ({error})") from None

    def _file(self, *names: str) -> str:
        for name in names:
            if os.path.isabs(path := self._answer(f"-print-file-name={name}")):
                return path
        raise build.Unavailable(f"the C compiler has no {names[0]}")

    def _object(self, source: Path, flags: list[str]) -> Path:
        """What a C file is compiled to: once for each content of it and of the headers beside it."""
        texts = [path.read_text() for path in (source, *build.sources("*.h", source.parent))]
        compiled = self.folder / f"{source.stem}-{hashlib.sha256(repr((texts, flags)).encode()).hexdigest()}.o"
        if not compiled.exists():
            compiled.write_bytes(build.compile_files(self.command, [source], [*flags, "-c"], self.folder))
        return compiled

    def call(self, argv: list[str]) -> tuple[int, str]:
        """Runs ``python ARGV`` with the sanitizers; its exit status, and what it writes to the standard error."""
        command = [sys.executable, *argv]
        found = subprocess.run(command, cwd=ROOT, env=self.environment, stderr=subprocess.PIPE, text=True)
        return found.returncode, found.stderr

    def run(self, sources: Path, variant: str, *arguments: str) -> tuple[int, str]:
        """Makes the random calls of tests/random_calls.py to the kernels in a folder.

        Returns:
            Their exit status, and what the sanitizers say.
        """
        library, last, flags = self.folder / "cpu.so", self.folder / "last", [*self.flags, STREAMED, *VARIANTS[variant]]
        objects = [self._object(source, flags) for source in build.sources(folder=sources)]
        library.write_bytes(build.compile_files(self.command, objects, flags, self.folder))
        status, told = self.call(["-m", "tests.random_calls", str(library), "--last", str(last), *arguments])
        return status, f"{told}\nin {last.read_text()}" if status else ""


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        try:
            sanitizer = Sanitizer(Path(folder))
            for variant in VARIANTS:
                print(f"{' '.join(sanitizer.command)}, {variant}:", flush=True)
                status, told = sanitizer.run(build.FOLDER, variant)
                if status:
                    print(told, file=sys.stderr)
                    return 1
        except build.Unavailable as error:
            print(f"No sanitizers: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
