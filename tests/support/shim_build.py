"""Compiles for the shim that runs CUDA kernels on the CPU (tests/cuda_shim)."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from paths import ROOT, TESTS

SHIM = TESTS / "cuda_shim"
KERNELS = ROOT / "csrc" / "cuda" / "stats.cu"
COMPILER = shutil.which("g++") or shutil.which("c++")
FLAGS = ["-std=c++17", "-O1", "-x", "c++", "-DNUMGUARD_CUDA_SHIM", "-include", str(SHIM / "cuda_shim.h")]
FLAGS += ["-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
SHARED = ["-shared", "-fPIC", "-fvisibility=hidden"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
ORDERS = ["forward", "reverse", "shuffled"]

requirements = [
    pytest.mark.skipif(COMPILER is None, reason="neither g++ nor c++ is on the PATH"),
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64", reason="the shim is written for Linux on x86-64"
    ),
]


def compile_with(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(COMPILER), *FLAGS, *map(str, arguments)], capture_output=True, text=True, check=False)


def build(output: Path, *arguments: str | Path) -> Path:
    done = compile_with(*arguments, "-o", output)
    assert done.returncode == 0, done.stderr
    return output


def need_sanitizers(folder: Path) -> None:
    """Skips the test where the compiler has none."""
    empty = folder / "empty.cpp"
    empty.write_text("int main() {}\n")
    if compile_with(*SANITIZERS, empty, "-o", folder / "empty").returncode != 0:
        pytest.skip("the compiler comes without AddressSanitizer or UndefinedBehaviorSanitizer")


def sanitizer_environment() -> dict[str, str]:
    """Returns what a process needs that loads a library with sanitizers; Python's own leaks are left alone."""
    runtime = subprocess.run(
        [str(COMPILER), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}


def build_bindings(output: Path, *flags: str) -> Path:
    """Compiles what does not change with the kernels: the module of csrc/python, and the one that tells of launches."""
    import pybind11

    if SANITIZERS[0] in flags:
        need_sanitizers(output.parent)
    include = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]]
    return build(output, "-c", *SHARED, *include, *flags, SHIM / "extension.cpp")


def build_extension(output: Path, bindings: Path, *flags: str, kernels: Path = KERNELS) -> Path:
    """Compiles csrc/cuda for the shim, and links it with its bindings to a library that Python can load."""
    return build(output, *SHARED, *flags, kernels, "-x", "none", bindings)
