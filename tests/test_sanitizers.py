"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, threads and collectives under ThreadSanitizer."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, not_none

from job.kernels.build import WITHOUT_AMX

COMPILER = shutil.which("gcc")
KERNELS = ROOT / "job" / "kernels"
FLAGS = ["-O1", "-g", "-std=gnu11", "-fno-strict-aliasing", "-pthread", "-Daligned_alloc=failing_aligned_alloc"]
FLAGS.append("-DMAX_LOGITS=1")  # so that a few rows are several blocks
MEMORY = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
THREADS = ["-fsanitize=thread"]
X86 = platform.machine() == "x86_64"
ARCHITECTURES = {
    "native": ["-march=native"],
    "no-amx": ["-march=native", *(WITHOUT_AMX if X86 else [])],
    "portable": ["-march=x86-64"] if X86 else [],
}

pytestmark = [pytest.mark.long, pytest.mark.skipif(COMPILER is None, reason="no gcc")]


def run_sanitized(folder: Path, kernels: Path, flags: list[str]) -> subprocess.CompletedProcess[str]:
    """Builds the kernels with their driver and runs it."""
    sources = [ROOT / "tests" / "sanitized_kernels.c", *sorted(kernels.glob("*.c"))]
    program = folder / "kernels"
    subprocess.run([not_none(COMPILER), *FLAGS, *flags, f"-I{kernels}", *sources, "-lm", "-o", program], check=True)
    return subprocess.run([program], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("sanitizers", [MEMORY, THREADS], ids=["memory", "threads"])
def test_kernels_on_many_shapes_raise_no_sanitizer_report(
    tmp_path: Path, sanitizers: list[str], architecture: list[str]
) -> None:
    ended = run_sanitized(tmp_path, KERNELS, [*sanitizers, *architecture])
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("done")


@pytest.mark.parametrize(
    ("file", "right", "wrong", "sanitizers", "report"),
    [
        ("linear.c", "r < args->rows; r++", "r <= args->rows; r++", MEMORY, "heap-buffer-overflow"),
        ("loss.c", "j < first + count; j += WIDTH", "j <= first + count; j += WIDTH", MEMORY, "heap-buffer-overflow"),
        ("decode.c", "    free(memory);\n", "", MEMORY, "detected memory leaks"),
        ("vector.h", "aligned(4)", "aligned(64)", MEMORY, "misaligned address"),
        ("collectives.c", "memory_order_release", "memory_order_relaxed", THREADS, "data race"),
        ("linear.c", "atomic_int", "int", THREADS, "data race"),
    ],
)
def test_kernels_with_an_error_raise_a_sanitizer_report(
    tmp_path: Path, file: str, right: str, wrong: str, sanitizers: list[str], report: str
) -> None:
    kernels = Path(shutil.copytree(KERNELS, tmp_path / "kernels.d", ignore=shutil.ignore_patterns("*.py")))
    text = (kernels / file).read_text()
    assert right in text
    (kernels / file).write_text(text.replace(right, wrong))
    ended = run_sanitized(tmp_path, kernels, [*sanitizers, "-march=native"])
    assert ended.returncode
    assert report in ended.stderr


def test_kernels_called_from_python_raise_no_sanitizer_report(tmp_path: Path) -> None:
    """The tests of layers, loss, decoder and collectives: whether callers give the sizes that the kernels need."""
    code = f"""
import sys, pytest
from job.kernels import build
build.FLAGS = (*build.FLAGS, "-O1", "-g", *{MEMORY})
assert build.load_library(), build.unavailable_reason()
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""
    libraries = [
        subprocess.run(
            [not_none(COMPILER), f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True
        ).stdout
        for name in ("asan", "ubsan")
    ]
    variables = {"LD_PRELOAD": ":".join(map(str.strip, libraries)), "ASAN_OPTIONS": "detect_leaks=0"}
    variables |= {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    tests = ["tests/test_rnn.py", "tests/test_kernels.py", "tests/test_shared_memory.py"]
    ended = subprocess.run(
        [sys.executable, "-c", code, *tests, "-k", "not test_load and not create_group and not with_gloo"],
        cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
