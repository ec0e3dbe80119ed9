"""What the machine code of a kernel says about its speed: registers, spills, and the figures of its main loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from gpu_sass import Function, Instruction, Loop, UnknownCode

from hallo_numguard.ops.formats import FORMATS

WARP = 32
ITEM_SIZES = {str(dtype).removeprefix("torch."): dtype.itemsize for dtype in FORMATS}
DTYPE_OF_CODE = {spec.code: str(dtype).removeprefix("torch.") for dtype, spec in FORMATS.items()}

_DOUBLE = ("DADD", "DMUL", "DFMA")
_SPILLS = ("STL", "LDL")
_EXACT = 2.0  # times the instructions a byte of the cheapest loop: an exact pass takes 2.5 and more


@dataclass(frozen=True)
class Variant:
    """Which kernel it is, and what it was compiled for.

    Attributes:
        backend: `triton` or `cuda`.
        kernel: `chunk` or `combine`.
        dtype: Of the elements, as torch names it; nothing for `combine`.
        detail: Whether zeros and subnormals are counted.
        addresses: Where the CUDA kernel finds them: `table` or `inline`; nothing for Triton, which has only a table.
    """

    backend: str
    kernel: str
    dtype: str = ""
    detail: bool = False
    addresses: str = ""

    @property
    def item_size(self) -> int:
        """Bytes of an element; 0 where there are none."""
        return ITEM_SIZES.get(self.dtype, 0)

    def __str__(self) -> str:
        parts = (self.backend, self.kernel, self.dtype, "detail" if self.detail else "", self.addresses)
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Resources:
    """What a block takes of a multiprocessor. Bytes, but for the registers of a thread."""

    threads: int
    registers: int
    stack: int
    local: int
    shared: int


@dataclass(frozen=True)
class LoopFigures:
    """An iteration of the main loop, of one thread.

    Attributes:
        loads: How many, by their width in bytes.
        generic: How many of them do not know that their address is global.
        instructions: All of them.
        opcodes: The same, by name.
        in_flight: Loads that are under way at once, at most: issued, and no register of theirs used yet.
        bytes_in_flight: The same, in bytes.
    """

    loads: dict[int, int]
    generic: int
    instructions: int
    opcodes: dict[str, int]
    in_flight: int
    bytes_in_flight: int

    @property
    def loaded_bytes(self) -> int:
        """Bytes that are loaded."""
        return sum(width * count for width, count in self.loads.items())

    @property
    def bytes_per_warp_instruction(self) -> float:
        """Bytes that a warp loads for each instruction that it issues."""
        return WARP * self.loaded_bytes / self.instructions

    def instructions_per_element(self, item_size: int) -> float:
        """Instructions for each element."""
        return self.instructions * item_size / self.loaded_bytes


@dataclass(frozen=True)
class Figures:
    """All that is reported about a kernel on one architecture."""

    variant: Variant
    arch: int
    resources: Resources
    spills: int
    loop: LoopFigures


def figures_of(variant: Variant, arch: int, resources: Resources, function: Function) -> Figures:
    """Returns the figures of a kernel.

    Raises:
        UnknownCode: If its machine code is not understood, or several loops could be the main one.
    """
    try:
        loop = main_loop(function, is_double=variant.dtype in ("", "float64"))
    except UnknownCode as error:
        raise UnknownCode(f"{variant}, sm_{arch}: {error}") from error
    return Figures(variant, arch, resources, function.count(*_SPILLS), loop_figures(loop))


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
    if not is_double and loop.has(*_DOUBLE):
        raise UnknownCode(f"the first loop that loads computes in double precision: at {loop.header:#x}")
    cheapest = min(loading, key=_cost)
    if is_double and _cost(loop) > _EXACT * _cost(cheapest):
        raise UnknownCode(
            f"the first loop that loads, at {loop.header:#x}, takes {_cost(loop):.2f} instructions a byte, "
            f"but the one at {cheapest.header:#x} only {_cost(cheapest):.2f}"
        )
    return loop


def loop_figures(loop: Loop) -> LoopFigures:
    """Returns the figures of a loop."""
    in_flight = most_in_flight(loop.body)
    return LoopFigures(
        loads=dict(sorted(Counter(one.width for one in loop.loads).items())),
        generic=sum(one.name == "LD" for one in loop.loads),
        instructions=len(loop.body),
        opcodes=dict(sorted(Counter(one.name for one in loop.body).items())),
        in_flight=len(in_flight),
        bytes_in_flight=sum(one.width for one in in_flight),
    )


def most_in_flight(body: Sequence[Instruction]) -> list[Instruction]:
    """Returns the loads that are under way when most bytes are.

    A warp issues in order, and stops at the first instruction that names a register on its way. The loop goes round
    twice, for loads at its end that the next iteration uses.
    """
    most: list[Instruction] = []
    flying: list[Instruction] = []
    for one in (*body, *body):
        flying = [load for load in flying if not load.loaded_registers & one.mentioned_registers]
        if one.is_global_load:
            flying.append(one)
        if sum(load.width for load in flying) > sum(load.width for load in most):
            most = list(flying)
    return most


def _cost(loop: Loop) -> float:
    return len(loop.body) / loop.loaded_bytes
