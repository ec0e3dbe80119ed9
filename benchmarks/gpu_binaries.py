"""Compiles the GPU kernels for GPUs that are not here, and has their machine code read.

The Triton kernels are compiled by calling the real launcher, with each launch replaced by a compilation: so the types
and the specialisations of the arguments are those of a user's call. The CUDA kernels are compiled by nvcc as the build
does. Everything that is cached is Triton's.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_figures import DTYPE_OF_CODE, Figures, Resources, Variant, figures_of
from gpu_sass import UnknownCode, parse

from hallo_numguard.ops import tensor_list
from hallo_numguard.ops.backends import triton as launcher
from hallo_numguard.ops.backends.chunks import CHUNK
from hallo_numguard.ops.formats import FORMATS
from hallo_numguard.ops.layout import Layout

ROOT = Path(__file__).resolve().parent.parent
CUDA_SOURCE = ROOT / "csrc" / "cuda" / "stats.cu"
HIP_TARGET = "gfx942"
CUDA_FLAGS = ("-cubin", "-O3", "-std=c++17")

_HIP_WAVE = 64
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_THREADS = re.compile(  # a block has exactly so many, or at most
    r"^\.nv\.info\.(\S+)$|EIATTR_(?:REQNTID|MAX_THREADS)\s+Format:\s+\S+\s+Value:\s+(0x[0-9a-f]+)", re.MULTILINE
)
_MANGLED_CHUNK = re.compile(r"12chunk_kernelILNS_5DtypeE(\d+)ELb([01])ENS0_\d+(InlineAddresses|AddressTable)E")
_ADDRESSES = {"InlineAddresses": "inline", "AddressTable": "table"}


class CannotCheck(Exception):
    """Something is missing, or a compiler failed: nothing is proved."""


@dataclass(frozen=True)
class HipFigures:
    """What the compiler for AMD's GPUs says about a kernel."""

    variant: Variant
    target: str
    registers: int
    spills: int


@dataclass(frozen=True)
class Call:
    """The launches of a call of the launcher, and the bytes of the tables and records that they read and write."""

    blocks: list[int]
    data_bytes: int
    other_bytes: int


# Tools


def triton_tool(name: str) -> Path:
    """Returns one of NVIDIA's tools that Triton comes with.

    Raises:
        CannotCheck: If it is not there.
    """
    spec = importlib.util.find_spec("triton")
    if spec is None or not spec.submodule_search_locations:
        raise CannotCheck("triton is not installed: its wheel has the tools that read machine code")
    path = Path(spec.submodule_search_locations[0], "backends", "nvidia", "bin", name)
    if not path.exists():
        raise CannotCheck(f"this triton comes without {name}: {path}")
    return path


def nvcc_command() -> list[str] | None:
    """Returns the nvcc that the build would take (see setup.py), or None if there is none."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    for command in (os.environ.get("CUDACXX"), *[str(Path(home, "bin", "nvcc")) for home in homes if home], "nvcc"):
        if command and shutil.which(shlex.split(command)[0]):
            return shlex.split(command)
    return None


def compiler_versions() -> dict[str, str]:
    """Returns what decides the machine code, by name."""
    versions = {}
    if importlib.util.find_spec("triton") is not None:
        import triton

        versions["triton"] = triton.__version__
        for name in ("ptxas", "ptxas-blackwell"):
            versions[f"triton's {name}"] = _version_of([str(triton_tool(name))])
    nvcc = nvcc_command()
    if nvcc is not None:
        versions["nvcc"] = _version_of(nvcc)
    return versions


def _version_of(command: list[str]) -> str:
    found = re.search(r"\bV(\d[\d.]*)", _output([*command, "--version"]))
    return found[1] if found else "unknown"


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CannotCheck(f"{shlex.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


# Triton


def triton_figures(arch: int) -> list[Figures]:
    """Compiles all Triton kernels for an NVIDIA architecture, and returns the figures of each."""
    figures = []
    for variant, compiled in _compiled_for("cuda", arch, 32):
        figures += read_cubin(compiled.asm["cubin"], arch, {compiled.metadata.name: variant}.__getitem__)
    return figures


def hip_figures() -> list[HipFigures]:
    """Compiles all Triton kernels for an AMD GPU."""
    found = []
    for variant, compiled in _compiled_for("hip", HIP_TARGET, _HIP_WAVE):
        text = compiled.asm["amdgcn"]
        counts = {name: int(count) for name, count in re.findall(r"\.([sv]gpr_\w*count):\s+(\d+)", text)}
        spills = counts["vgpr_spill_count"] + counts["sgpr_spill_count"]
        found.append(HipFigures(variant, HIP_TARGET, counts["vgpr_count"], spills))
    return found


def bucket_call(elements: int, segments: int) -> Call:
    """Returns what a call on a float32 bucket launches."""
    bounds = torch.linspace(0, elements, segments + 1, dtype=torch.float64).long().tolist()
    flat = torch.empty(elements)  # never touched
    with _Compilation("cuda", 90, 32) as compilation:
        launcher.tensor_stats(flat, Layout(bounds), False)
    tensors = [argument for launch in compilation.launches for argument in launch.arguments]
    other_bytes = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
    return Call([launch.grid[0] for launch in compilation.launches], flat.nbytes, other_bytes)


def _compiled_for(backend: str, arch: int | str, warp: int) -> Iterator[tuple[Variant, Any]]:
    """Calls the launcher in each way there is, and returns each kernel that it would have launched, once."""
    seen = set()
    for dtype in FORMATS:
        for detail in (False, True):
            flat = torch.zeros(2 * CHUNK).to(dtype)  # two chunks, so that they are combined
            with _Compilation(backend, arch, warp) as compilation:
                launcher.tensor_stats(flat, None, detail)
                launcher.multi_tensor_stats(tensor_list.read([flat, flat]), detail)
            for launch in compilation.launches:
                if launch.compiled.hash not in seen:
                    seen.add(launch.compiled.hash)
                    name = str(dtype).removeprefix("torch.")
                    is_chunk = launch.name == "chunk_kernel"
                    yield (
                        Variant("triton", "chunk", name, detail) if is_chunk else Variant("triton", "combine"),
                        launch.compiled,
                    )


@dataclass(frozen=True)
class _Launch:
    name: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    compiled: Any


class _Compilation:
    """While it is entered, the launcher compiles for a GPU that is not here, and launches nothing."""

    def __init__(self, backend: str, arch: int | str, warp: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.launches: list[_Launch] = []
        self._target = GPUTarget(backend, arch, warp)
        self._kernels: dict[str, Any] = {}

    def __enter__(self) -> _Compilation:
        from triton.runtime.driver import driver

        module = launcher.kernels()
        if os.environ.get(launcher.INTERPRET_VARIABLE) == "1":
            raise CannotCheck(f"{launcher.INTERPRET_VARIABLE}=1 is set: nothing is compiled then")
        driver.set_active(CompilingDriver(self._target))
        self._kernels = {name: kernel for name, kernel in vars(module).items() if name.endswith("_kernel")}
        for name, kernel in self._kernels.items():
            setattr(module, name, _CompiledInstead(name, kernel, self.launches))
        return self

    def __exit__(self, *_: object) -> None:
        for name, kernel in self._kernels.items():
            setattr(launcher.kernels(), name, kernel)


class _CompiledInstead:
    """Stands where a kernel was, and takes its launches."""

    def __init__(self, name: str, kernel: Any, launches: list[_Launch]) -> None:
        self._name = name
        self._kernel = kernel
        self._launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            compiled = self._kernel.warmup(*arguments, grid=grid, **constants)
            self._launches.append(_Launch(self._name, grid, arguments, compiled))

        return launch


class CompilingDriver:
    """What Triton asks of a driver when it compiles: for which GPU."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        """The GPU."""
        return self._target

    def get_current_device(self) -> str:
        """Names it: Triton keeps a table of compiled kernels for each."""
        return str(self._target)

    def get_current_stream(self, device: str) -> int:
        """None is ever used."""
        return 0


# CUDA


def cuda_figures(arch: int) -> list[Figures]:
    """Compiles the CUDA kernels for an architecture, and returns the figures of each."""
    nvcc = nvcc_command()
    if nvcc is None:
        raise CannotCheck("nvcc is not installed (set CUDACXX or CUDA_HOME)")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        _output([*nvcc, *CUDA_FLAGS, f"-arch=sm_{arch}", str(CUDA_SOURCE), "-o", str(cubin)])
        return read_cubin(cubin.read_bytes(), arch, _cuda_variant)


def _cuda_variant(mangled: str) -> Variant:
    if "14combine_kernel" in mangled:
        return Variant("cuda", "combine")
    found = _MANGLED_CHUNK.search(mangled)
    if found is None:
        raise UnknownCode(f"a kernel that is neither chunk_kernel nor combine_kernel: {mangled}")
    code, detail, addresses = found.groups()
    return Variant("cuda", "chunk", DTYPE_OF_CODE[int(code)], detail == "1", _ADDRESSES[addresses])


# Both


def read_cubin(cubin: bytes, arch: int, variant_of: Callable[[str], Variant]) -> list[Figures]:
    """Returns the figures of every kernel in a cubin.

    Args:
        cubin: The machine code, an ELF file.
        arch: What it is for, as 90.
        variant_of: Tells from its name which kernel it is.
    """
    tool = str(triton_tool("cuobjdump"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass, elf = (_output([tool, option, file.name]) for option in ("-res-usage", "-sass", "-elf"))
    functions = {function.name: function for function in parse(sass)}
    resources = _resources(usage, _block_sizes(elf))
    if functions.keys() != resources.keys():
        raise UnknownCode(f"machine code of {sorted(functions)}, but resources of {sorted(resources)}")
    return [figures_of(variant_of(name), arch, resources[name], functions[name]) for name in sorted(functions)]


def _resources(usage: str, block_sizes: dict[str, int]) -> dict[str, Resources]:
    found = {}
    for name, *numbers in _USAGE.findall(usage):
        registers, stack, shared, local = map(int, numbers)
        found[name] = Resources(block_sizes[name], registers, stack, local, shared)
    return found


def _block_sizes(elf: str) -> dict[str, int]:
    """Reads the attributes of each kernel, which stand behind a line with its name."""
    sizes: dict[str, int] = {}
    name = ""
    for section, size in _THREADS.findall(elf):
        if section:
            name = section
        else:
            sizes[name] = int(size, 16)
    return sizes
