"""Builds the optional extensions `hallo_numguard._native` and `_native_cuda`. Everything else is in pyproject.toml.

HALLO_NUMGUARD_BUILD_NATIVE = auto (default: build the CPU kernels if there is a C++ compiler), 1 (or fail), 0 (never).
HALLO_NUMGUARD_CUDA = auto (default: build the CUDA kernels if there is nvcc), 1 (or fail), 0 (never).
CXX names the C++ compiler, CUDACXX nvcc. TORCH_CUDA_ARCH_LIST names the GPUs, as for torch's own extensions
(default: "8.0 9.0 10.0 12.0+PTX", as far as nvcc knows them). No GPU is needed or looked for.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
NATIVE, CUDA = "hallo_numguard._native", "hallo_numguard._native_cuda"
SETTINGS = {NATIVE: "HALLO_NUMGUARD_BUILD_NATIVE", CUDA: "HALLO_NUMGUARD_CUDA"}

FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread", "-Wall", "-Wextra"]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]

# Every translation unit with the flags that it alone gets: one unit an instruction set, chosen between at run time.
PORTABLE_UNITS: dict[str, list[str]] = {
    "csrc/python/cpu_bindings.cpp": [],
    "csrc/python/direct.cpp": [],
    "csrc/cpu/core_share.cpp": [],
    "csrc/cpu/file.cpp": [],
    "csrc/cpu/pool.cpp": [],
    "csrc/cpu/scan_portable.cpp": [],
    "csrc/cpu/stats.cpp": [],
    "csrc/python/tensor_list.cpp": [],
}
X86_UNITS: dict[str, list[str]] = {
    "csrc/cpu/scan_avx2.cpp": AVX2,
    "csrc/cpu/scan_avx512.cpp": AVX512,
    "csrc/cpu/scan_avx512bf16.cpp": [*AVX512, "-mavx512bf16"],
}
CUDA_UNITS: dict[str, list[str]] = {"csrc/python/cuda_bindings.cpp": [], "csrc/cuda/stats.cu": []}

CUDA_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Wno-deprecated-gpu-targets"]
CUDA_ARCHITECTURES = "8.0 9.0 10.0 12.0+PTX"
OLDEST_ARCHITECTURE = 80  # the first whose maximum carries NaN along


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def units(name: str) -> dict[str, list[str]]:
    if name == CUDA:
        return CUDA_UNITS
    return {**PORTABLE_UNITS, **X86_UNITS} if is_x86() else PORTABLE_UNITS


def find_command(*candidates: str | None) -> list[str] | None:
    """The first of these commands that is there."""
    for command in candidates:
        if command and shutil.which(shlex.split(command)[0]):
            return shlex.split(command)
    return None


def cxx_command() -> list[str] | None:
    return find_command(os.environ.get("CXX"), "c++", "g++", "clang++")


def nvcc_command() -> list[str] | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    return find_command(os.environ.get("CUDACXX"), *[str(Path(home, "bin", "nvcc")) for home in homes if home], "nvcc")


def architecture_flags(nvcc: list[str]) -> list[str]:
    """Machine code for every wanted GPU that this nvcc knows; `+PTX` adds what later GPUs compile when they load it.

    Without `+PTX` anywhere the newest gets it, for GPUs that are newer still.
    """
    listed = subprocess.run([*nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = {int(number) for number in re.findall(r"compute_(\d+)\b", listed)}
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
    named = re.findall(r"(\d+)\.(\d)([af]?)(\+PTX)?", wanted)
    usable = [(int(major + minor), suffix, ptx) for major, minor, suffix, ptx in named]
    usable = sorted(entry for entry in usable if entry[0] in known and entry[0] >= OLDEST_ARCHITECTURE)
    if not usable:
        raise ValueError(
            f"nvcc knows none of the GPUs in TORCH_CUDA_ARCH_LIST={wanted!r}, or they are older than "
            f"{OLDEST_ARCHITECTURE / 10:.1f}; it knows {', '.join(f'{number / 10:.1f}' for number in sorted(known))}"
        )
    flags = [f"-gencode=arch=compute_{number}{suffix},code=sm_{number}{suffix}" for number, suffix, _ in usable]
    portable = [number for number, suffix, ptx in usable if ptx and not suffix] or [usable[-1][0]]
    return flags + [f"-gencode=arch=compute_{number},code=compute_{number}" for number in portable]


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(name: str, cxx: list[str], nvcc: list[str], build_dir: Path, target: Path) -> str:
    """The text of build.ninja: a rule a compiler, one to link, one edge a translation unit."""
    import pybind11

    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    flags = [*FLAGS, *(["-DNUMGUARD_X86"] if is_x86() else []), *include]
    # nvcc finds its own runtime library. Linked statically, the module loads where there is no CUDA at all.
    link = [*nvcc, "-shared", "-cudart=static"] if name == CUDA else [*cxx, "-shared", "-pthread"]
    if platform.system() == "Darwin":
        link += ["-undefined", "dynamic_lookup"]
    lines = [
        "rule compile",
        f"  command = {shlex.join([*cxx, *flags])} $own -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {shlex.join(link)} $in -o $out",
    ]
    if name == CUDA:
        lines += [
            "rule compile_cuda",
            f"  command = {shlex.join([*nvcc, *CUDA_FLAGS, *architecture_flags(nvcc)])} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
    objects = []
    for source, own in units(name).items():
        objects.append(build_dir / (Path(source).name + ".o"))
        rule = "compile_cuda" if source.endswith(".cu") else "compile"
        lines += [f"build {escape(objects[-1])}: {rule} {escape(ROOT / source)}", f"  own = {shlex.join(own)}"]
    lines.append(f"build {escape(target)}: link {' '.join(map(escape, objects))}")
    return "\n".join(lines) + "\n"


class NinjaBuildExt(build_ext):
    """Compiles with ninja: in parallel, only what changed, and with flags for each translation unit."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext.name)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            self._fail(ext.name, f"the build failed: {error}")

    def _build(self, name: str) -> None:
        cxx, nvcc = cxx_command(), nvcc_command() if name == CUDA else []
        if cxx is None:
            return self._fail(name, "no C++ compiler found (set CXX to name one)")
        if nvcc is None:
            return self._fail(name, "no nvcc found (set CUDACXX or CUDA_HOME)")
        build_dir = Path(self.build_temp).resolve() / name
        build_dir.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        (build_dir / "build.ninja").write_text(ninja_file(name, cxx, nvcc, build_dir, target), encoding="utf-8")
        subprocess.run([*ninja_command(), "-C", str(build_dir)], check=True)
        return None

    def _fail(self, name: str, why: str) -> None:
        if setting(name) == "1":
            raise RuntimeError(f"{name}: {why}; {SETTINGS[name]}=1 asks for it")
        self.announce(f"hallo_numguard is installed without {name}: {why}", level=3)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


def ninja_command() -> list[str]:
    try:
        from ninja import BIN_DIR
    except ImportError:
        return ["ninja"]
    return [str(Path(BIN_DIR) / "ninja")]


def setting(name: str) -> str:
    wanted = os.environ.get(SETTINGS[name], "auto")
    if wanted not in ("0", "1", "auto"):
        raise ValueError(f"{SETTINGS[name]} must be 0, 1 or auto, got {wanted!r}")
    return wanted


setup(
    ext_modules=[
        Extension(name, sources=list(units(name)), optional=True) for name in SETTINGS if setting(name) != "0"
    ],
    cmdclass={"build_ext": NinjaBuildExt},
)
