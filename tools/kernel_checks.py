"""What the machine code of a kernel must not do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from sass import Function, Loop, UnknownCode

from hallo_numguard.ops.formats import FORMATS

MIN_LOAD_BYTES = 16  # of a load in the main loop, per thread

# Most registers of a thread, by backend, kernel, bytes of an element and detail. Each is a step of the occupancy above
# what the compilers take now, on the architecture where they take most. nvcc is told to keep to 56 by
# __launch_bounds__, so there is no slack in that.
BUDGETS = {
    ("triton", "chunk", 1, False): 96,
    ("triton", "chunk", 2, False): 64,
    ("triton", "chunk", 4, False): 64,
    ("triton", "chunk", 8, False): 80,
    ("triton", "chunk", 1, True): 128,
    ("triton", "chunk", 2, True): 128,
    ("triton", "chunk", 4, True): 80,
    ("triton", "chunk", 8, True): 96,
    ("triton", "combine", 0, False): 64,
    **{("cuda", "chunk", item_size, detail): 56 for item_size in (1, 2, 4, 8) for detail in (False, True)},
    ("cuda", "combine", 0, False): 48,
}

_ITEM_SIZES = {str(dtype).removeprefix("torch."): dtype.itemsize for dtype in FORMATS}
_DOUBLE_ARITHMETIC = ("DADD", "DMUL", "DFMA")
_LOCAL_ACCESSES = ("STL", "LDL")
_MAX_RELATIVE_COST = 2.0  # over the cheapest loop, in instructions a byte: an exact pass takes 2.5 and more


@dataclass(frozen=True)
class Variant:
    """Which kernel it is, and what it was compiled for.

    Attributes:
        backend: `triton` or `cuda`.
        kernel: `chunk` or `combine`.
        dtype: Elements' dtype, as torch names it; empty for `combine`.
        detail: Whether zeros and subnormals are counted.
        addresses: Where the CUDA kernel finds the tensors' addresses: `table` or `inline`; empty for Triton, which has
            only a table.
    """

    backend: str
    kernel: str
    dtype: str = ""
    detail: bool = False
    addresses: str = ""

    @property
    def budget(self) -> int:
        """The registers that a thread may take."""
        return BUDGETS[self.backend, self.kernel, _ITEM_SIZES.get(self.dtype, 0), self.detail]

    def __str__(self) -> str:
        parts = (self.backend, self.kernel, self.dtype, "detail" if self.detail else "", self.addresses)
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Figures:
    """A kernel on one architecture of NVIDIA.

    Attributes:
        variant: Kernel and what it was compiled for.
        arch: Compute capability, as 90.
        registers: Registers of a thread.
        stack: Bytes of stack of a thread.
        local: Bytes of local memory of a thread.
        spills: Number of instructions that access local memory.
        loads: Loads of the main loop, by width in bytes.
        generic_loads: Loads of the main loop that do not know that their address is global.
        barriers: Barriers in the main loop.
        instructions: Instructions of the main loop.
    """

    variant: Variant
    arch: int
    registers: int
    stack: int
    local: int
    spills: int
    loads: dict[int, int]
    generic_loads: int
    barriers: int
    instructions: int

    @property
    def violations(self) -> list[str]:
        """What is wrong with the kernel, a sentence each."""
        return [*self._resource_violations(), *(self._loop_violations() if self.variant.kernel == "chunk" else ())]

    def __str__(self) -> str:
        return f"{self.variant}, sm_{self.arch}"

    def _resource_violations(self) -> Iterator[str]:
        if self.spills or self.stack or self.local:
            yield (
                f"keeps values in local memory: {self.spills} instructions that spill, "
                f"{self.stack} bytes of stack, {self.local} of local memory"
            )
        if self.registers > self.variant.budget:
            yield f"takes {self.registers} registers, more than {self.variant.budget}"

    def _loop_violations(self) -> Iterator[str]:
        narrow = [f"{count} of {width} bytes" for width, count in self.loads.items() if width < MIN_LOAD_BYTES]
        if narrow:
            yield f"loads less than {MIN_LOAD_BYTES} bytes at a time in its main loop: {', '.join(narrow)}"
        if self.generic_loads:
            yield f"has {self.generic_loads} loads in its main loop that do not know that their address is global"
        if self.barriers:
            yield "waits at a barrier in its main loop"


@dataclass(frozen=True)
class HipFigures:
    """A kernel for an AMD GPU, as its compiler reports it."""

    variant: Variant
    target: str
    registers: int
    spills: int

    @property
    def violations(self) -> list[str]:
        """What is wrong with the kernel, a sentence each."""
        return [f"spills {self.spills} registers"] if self.spills else []

    def __str__(self) -> str:
        return f"{self.variant}, {self.target}"


def figures_of(variant: Variant, arch: int, usage: tuple[int, int, int], function: Function) -> Figures:
    """Returns the figures of a kernel.

    Args:
        variant: Kernel and what it was compiled for.
        arch: Compute capability, as 90.
        usage: Registers, bytes of stack and bytes of local memory that a thread takes.
        function: Machine code.

    Raises:
        UnknownCode: If its machine code is not understood, or several loops could be the main one.
    """
    try:
        loop = main_loop(function, is_double=variant.dtype in ("", "float64"))
    except UnknownCode as error:
        raise UnknownCode(f"{variant}, sm_{arch}: {error}") from error
    return Figures(
        variant,
        arch,
        *usage,
        spills=function.count(*_LOCAL_ACCESSES),
        loads=dict(sorted(Counter(one.width for one in loop.loads).items())),
        generic_loads=loop.count("LD"),
        barriers=loop.count("BAR"),
        instructions=len(loop.body),
    )


def main_loop(function: Function, is_double: bool) -> Loop:
    """Returns the loop that streams through memory.

    A kernel has up to three loops that load: the main one, unrolled; one for the iterations that are left over; and the
    exact pass, which reads a chunk again. Compilers unroll the second as they like, so sizes tell nothing; the order
    does. The main loop is the one that the others follow, and that follows none.

    That it is not the exact pass is checked. This alone adds squares in double precision, unless elements are doubles;
    and then it still counts each kind of element, which costs several times the instructions a byte.

    Args:
        function: The machine code.
        is_double: Whether double arithmetic belongs into the main loop.

    Raises:
        UnknownCode: If there is none, or it is not clear which it is.
    """
    loading = [loop for loop in function.loops if loop.is_innermost and loop.loads]
    headers = {loop.header for loop in loading}
    first = [loop for loop in loading if headers - {loop.header} <= loop.leads_to]
    if len(first) != 1:
        places = ", ".join(hex(header) for header in sorted(headers))
        raise UnknownCode(f"of {len(loading)} loops that load, {len(first)} come before all others: {places or 'none'}")
    loop = first[0]
    if not is_double and loop.count(*_DOUBLE_ARITHMETIC):
        raise UnknownCode(f"the first loop that loads computes in double precision: at {loop.header:#x}")
    cheapest = min(loading, key=_cost)
    if is_double and _cost(loop) > _MAX_RELATIVE_COST * _cost(cheapest):
        raise UnknownCode(
            f"the first loop that loads, at {loop.header:#x}, takes {_cost(loop):.2f} instructions a byte, "
            f"but the one at {cheapest.header:#x} only {_cost(cheapest):.2f}"
        )
    return loop


def _cost(loop: Loop) -> float:
    """Instructions a byte."""
    return len(loop.body) / loop.loaded_bytes
