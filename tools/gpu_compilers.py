"""Compiles the GPU kernels for GPUs that are not present, and has their machine code read.

The Triton kernels are compiled by calling the real launcher, with each launch replaced by a compilation: so the types
and the specialisations of the arguments are those of a user's call. The CUDA kernels are those of the extension as it
was built. Triton caches what it compiles.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from kernel_checks import Figures, HipFigures, Variant, figures_of
from sass import UnknownCode, functions_in

from hallo_numguard.ops import tensor_list
from hallo_numguard.ops.backends import triton as launcher
from hallo_numguard.ops.backends.chunks import CHUNK
from hallo_numguard.ops.formats import FORMATS

CUDA_EXTENSION = "hallo_numguard._native_cuda"
CUDA_ARCHITECTURES = (80, 90, 100, 120)
HIP_TARGET = "gfx942"

_WARP = {"cuda": 32, "hip": 64}
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
_MANGLED_CHUNK = re.compile(r"12chunk_kernelILNS_5DtypeE(\d+)ELb([01])ENS0_\d+(InlineAddresses|AddressTable)E")
_ADDRESSES = {"InlineAddresses": "inline", "AddressTable": "table"}
_DTYPE_OF_CODE = {spec.code: str(dtype).removeprefix("torch.") for dtype, spec in FORMATS.items()}


class CannotCheck(Exception):
    """A tool is missing, or a compiler failed: nothing is proved."""


def cuda_extension() -> Path | None:
    """Returns the library with the CUDA kernels, or None if it is not built."""
    spec = importlib.util.find_spec(CUDA_EXTENSION)
    return None if spec is None or spec.origin is None else Path(spec.origin)


def compiler_versions() -> dict[str, str]:
    """Returns the versions that decide the machine code, by name of the tool."""
    import triton

    versions = {"triton": triton.__version__}
    for name in ("ptxas", "ptxas-blackwell"):
        found = re.search(r"\bV(\d[\d.]*)", _output([str(_triton_tool(name)), "--version"]))
        versions[f"triton's {name}"] = found[1] if found else "unknown"
    return versions


def triton_figures(arch: int) -> list[Figures]:
    """Compiles all Triton kernels for an NVIDIA architecture, and returns the figures of each."""
    figures = []
    for variant, compiled in _compiled_for("cuda", arch):
        figures += read_cubin(compiled.asm["cubin"], arch, {compiled.metadata.name: variant}.__getitem__)
    return figures


def hip_figures() -> list[HipFigures]:
    """Compiles all Triton kernels for an AMD GPU, and returns the figures of each."""
    figures = []
    for variant, compiled in _compiled_for("hip", HIP_TARGET):
        found = re.findall(r"\.([sv]gpr_\w*count):\s+(\d+)", compiled.asm["amdgcn"])
        counts = {name: int(count) for name, count in found}
        spills = counts["vgpr_spill_count"] + counts["sgpr_spill_count"]
        figures.append(HipFigures(variant, HIP_TARGET, counts["vgpr_count"], spills))
    return figures


def cuda_figures(arch: int) -> list[Figures]:
    """Returns the figures of each CUDA kernel of the extension for an architecture."""
    library = cuda_extension()
    if library is None:
        raise CannotCheck("the extension with the CUDA kernels is not built")
    with tempfile.TemporaryDirectory() as folder:
        _output([str(_triton_tool("cuobjdump")), "-xelf", f"sm_{arch}", str(library)], folder)
        cubins = [path.read_bytes() for path in Path(folder).iterdir()]
    if not cubins:
        raise CannotCheck(f"{library.name} has no machine code for sm_{arch}: it was built for other GPUs")
    return [kernel for cubin in cubins for kernel in read_cubin(cubin, arch, _cuda_variant)]


def read_cubin(cubin: bytes, arch: int, variant_of: Callable[[str], Variant]) -> list[Figures]:
    """Returns the figures of every kernel in a cubin.

    Args:
        cubin: Machine code, an ELF file.
        arch: Compute capability that it is for, as 90.
        variant_of: Maps the name of a function to the kernel that it is.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output([str(_triton_tool("cuobjdump")), "-res-usage", file.name])
        listing = _output([str(_triton_tool("nvdisasm")), "-json", file.name])
    functions = {function.name: function for function in functions_in(listing)}
    resources = {
        name: (int(registers), int(stack), int(local)) for name, registers, stack, local in _USAGE.findall(usage)
    }
    if functions.keys() != resources.keys():
        raise UnknownCode(f"machine code of {sorted(functions)}, but resources of {sorted(resources)}")
    return [figures_of(variant_of(name), arch, resources[name], functions[name]) for name in sorted(functions)]


class CompilingDriver:
    """A driver of Triton that names the GPU to compile for, and cannot launch."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        """Returns the GPU."""
        return self._target

    def get_current_device(self) -> str:
        """Returns a name of the GPU: Triton keeps a table of compiled kernels for each."""
        return str(self._target)

    def get_current_stream(self, device: str) -> int:
        """Returns a stream that is never used."""
        return 0


def _compiled_for(backend: str, arch: int | str) -> Iterator[tuple[Variant, Any]]:
    """Calls the launcher in each way there is, and returns each kernel that it would have launched, once."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    if os.environ.get(launcher.INTERPRET_VARIABLE) == "1":
        raise CannotCheck(f"{launcher.INTERPRET_VARIABLE}=1 is set: nothing is compiled then")
    driver.set_active(CompilingDriver(GPUTarget(backend, arch, _WARP[backend])))
    run = JITFunction.run
    found: dict[str, Any] = {}

    def compile_only(kernel: Any, *arguments: Any, warmup: bool, **options: Any) -> None:
        compiled = run(kernel, *arguments, warmup=True, **options)
        found.setdefault(compiled.hash, compiled)

    for dtype in FORMATS:
        for detail in (False, True):
            known = set(found)
            with mock.patch.object(JITFunction, "run", compile_only):
                flat = torch.zeros(2 * CHUNK).to(dtype)  # two chunks, so that they are combined
                launcher.tensor_stats(flat, None, detail)
                launcher.multi_tensor_stats(tensor_list.read([flat, flat]), detail)
            for compiled in [found[key] for key in found if key not in known]:
                is_chunk = compiled.metadata.name == "chunk_kernel"
                name = str(dtype).removeprefix("torch.")
                yield Variant("triton", "chunk", name, detail) if is_chunk else Variant("triton", "combine"), compiled


def _cuda_variant(mangled: str) -> Variant:
    if "14combine_kernel" in mangled:
        return Variant("cuda", "combine")
    found = _MANGLED_CHUNK.search(mangled)
    if found is None:
        raise UnknownCode(f"a kernel that is neither chunk_kernel nor combine_kernel: {mangled}")
    code, detail, addresses = found.groups()
    return Variant("cuda", "chunk", _DTYPE_OF_CODE[int(code)], detail == "1", _ADDRESSES[addresses])


def _triton_tool(name: str) -> Path:
    """Returns one of NVIDIA's tools that Triton comes with."""
    spec = importlib.util.find_spec("triton")
    if spec is None or not spec.submodule_search_locations:
        raise CannotCheck("triton is not installed: its wheel has the tools that read machine code")
    path = Path(spec.submodule_search_locations[0], "backends", "nvidia", "bin", name)
    if not path.exists():
        raise CannotCheck(f"this triton comes without {name}: {path}")
    return path


def _output(command: list[str], folder: str | None = None) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CannotCheck(f"{shlex.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
