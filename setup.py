"""Builds the optional extension `hallo_numguard._native`. Everything else is in pyproject.toml.

HALLO_NUMGUARD_BUILD_NATIVE = auto (default: build it if there is a C++ compiler), 1 (or fail), 0 (never).
CXX names the compiler.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]

# Every translation unit with the flags that it alone gets: one unit an instruction set, chosen between at run time.
PORTABLE_UNITS: dict[str, list[str]] = {
    "csrc/bindings.cpp": [],
    "csrc/cpu/pool.cpp": [],
    "csrc/cpu/scan_portable.cpp": [],
    "csrc/cpu/stats.cpp": [],
    "csrc/tensor_list.cpp": [],
}
X86_UNITS: dict[str, list[str]] = {
    "csrc/cpu/scan_avx2.cpp": AVX2,
    "csrc/cpu/scan_avx512.cpp": AVX512,
    "csrc/cpu/scan_avx512bf16.cpp": [*AVX512, "-mavx512bf16"],
}


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def units() -> dict[str, list[str]]:
    return {**PORTABLE_UNITS, **X86_UNITS} if is_x86() else PORTABLE_UNITS


def compiler() -> list[str] | None:
    """The C++ compiler's command, or None where there is none."""
    for command in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if command and shutil.which(shlex.split(command)[0]):
            return shlex.split(command)
    return None


def ninja_file(cxx: list[str], build_dir: Path, target: Path) -> str:
    """The text of build.ninja: one rule to compile, one to link, one edge a translation unit."""
    import pybind11

    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    flags = [
        "-O3",
        "-std=c++17",
        "-fPIC",
        "-fvisibility=hidden",
        "-ffp-contract=off",
        "-pthread",
        "-Wall",
        "-Wextra",
    ]
    flags += ["-DNUMGUARD_X86"] if is_x86() else []
    link = ["-shared", "-pthread"]
    if platform.system() == "Darwin":
        link += ["-undefined", "dynamic_lookup"]

    def escape(path: Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = [
        f"cxx = {shlex.join(cxx)}",
        f"flags = {shlex.join([*flags, *include])}",
        f"link = {shlex.join(link)}",
        "rule compile",
        "  command = $cxx $flags $own -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx $in $link -o $out",
    ]
    objects = []
    for source, own in units().items():
        objects.append(build_dir / (Path(source).stem + ".o"))
        lines += [
            f"build {escape(objects[-1])}: compile {escape(ROOT / source)}",
            f"  own = {shlex.join(own)}",
        ]
    lines.append(f"build {escape(target)}: link {' '.join(map(escape, objects))}")
    return "\n".join(lines) + "\n"


class NinjaBuildExt(build_ext):
    """Compiles with ninja: in parallel, only what changed, and with flags for each translation unit."""

    def build_extension(self, ext: Extension) -> None:
        wanted = os.environ.get("HALLO_NUMGUARD_BUILD_NATIVE", "auto")
        cxx = compiler()
        if cxx is None:
            self._fail(wanted, "no C++ compiler found (set CXX to name one)")
            return
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        (build_dir / "build.ninja").write_text(ninja_file(cxx, build_dir, target), encoding="utf-8")
        try:
            subprocess.run([*ninja_command(), "-C", str(build_dir)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            self._fail(wanted, f"the build failed: {error}")

    def _fail(self, wanted: str, why: str) -> None:
        if wanted == "1":
            raise RuntimeError(f"hallo_numguard._native: {why}; HALLO_NUMGUARD_BUILD_NATIVE=1 asks for it")
        self.announce(f"hallo_numguard is installed without its CPU kernels: {why}", level=3)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


def ninja_command() -> list[str]:
    try:
        from ninja import BIN_DIR
    except ImportError:
        return ["ninja"]
    return [str(Path(BIN_DIR) / "ninja")]


def wants_native() -> bool:
    wanted = os.environ.get("HALLO_NUMGUARD_BUILD_NATIVE", "auto")
    if wanted not in ("0", "1", "auto"):
        raise ValueError(f"HALLO_NUMGUARD_BUILD_NATIVE must be 0, 1 or auto, got {wanted!r}")
    return wanted != "0"


setup(
    ext_modules=[Extension("hallo_numguard._native", sources=list(units()), optional=True)] if wants_native() else [],
    cmdclass={"build_ext": NinjaBuildExt},
)
