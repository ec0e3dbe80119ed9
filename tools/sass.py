"""SASS, the machine code of NVIDIA GPUs: the functions that `nvdisasm -json` lists, and the loops in them."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from typing import Any

import networkx as nx  # type: ignore[import-untyped, unused-ignore]

INSTRUCTION_BYTES = 16

_TARGET = re.compile(r"(?:^|[\s,(`])(0x[0-9a-f]+)\)?$")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}  # bytes; 4 if none is named
# A call counts as a jump: some never return; the others are slow paths of shuffles, whose fast paths lead on as well.
_JUMPS = ("BRA", "CALL")
_ENDS = ("EXIT", "RET")
_INDIRECT_JUMPS = ("BRX", "BRXU", "JMP", "JMX", "JMXU")


class UnknownCode(Exception):
    """The machine code has a form that is not understood here, so nothing is proved about it."""


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address: Offset from the start of the function, bytes.
        guard: Predicate that the instruction depends on, as `!P0`; empty if there is none.
        opcode: Name with modifiers, as `LDG.E.128`.
        operands: Operands, as printed.
    """

    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".", 1)[0]

    @property
    def is_global_load(self) -> bool:
        """Whether it reads global memory. `LD` does where the compiler cannot tell that the address is global."""
        return self.name in ("LDG", "LD")

    @property
    def width(self) -> int:
        """Bytes that a load moves, per thread."""
        modifiers = self.opcode.split(".")[1:]
        return next((_WIDTHS[modifier] for modifier in modifiers if modifier in _WIDTHS), 4)

    @property
    def barrier(self) -> str:
        """The convergence barrier of a BSSY or BSYNC."""
        return self.operands.split(",")[0].strip()

    @property
    def target(self) -> int:
        """Address that a jump or a BSSY names."""
        found = _TARGET.search(self.operands.strip())
        if found is None:
            raise UnknownCode(f"a jump without a target: {self}")
        return int(found[1], 16)

    @property
    def is_conditional(self) -> bool:
        """Whether a jump may fall through: because of its guard, or of a predicate among its operands."""
        return bool(self.guard) or "," in self.operands

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{self.address:04x}: {guard}{self.opcode} {self.operands}".strip()


@dataclass(frozen=True)
class Loop:
    """A natural loop: all that can come back to its header, which is the only way in.

    Attributes:
        header: Address of the first instruction.
        body: Instructions, by address.
        is_innermost: Whether the loop contains no other loop.
        leads_to: Headers of the loops that can follow it, or are in it.
    """

    header: int
    body: tuple[Instruction, ...]
    is_innermost: bool
    leads_to: frozenset[int]

    @property
    def loads(self) -> tuple[Instruction, ...]:
        """The loads from global memory."""
        return tuple(one for one in self.body if one.is_global_load)

    @property
    def loaded_bytes(self) -> int:
        """Bytes that a thread loads in an iteration."""
        return sum(one.width for one in self.loads)

    def count(self, *names: str) -> int:
        """Number of its instructions with these opcodes."""
        return sum(one.name in names for one in self.body)


@dataclass(frozen=True)
class Function:
    """The machine code of one kernel."""

    name: str
    instructions: tuple[Instruction, ...]

    def count(self, *names: str) -> int:
        """Number of instructions with these opcodes."""
        return sum(one.name in names for one in self.instructions)

    @functools.cached_property
    def loops(self) -> tuple[Loop, ...]:
        """All natural loops, in the order of their headers.

        Raises:
            UnknownCode: If there is a cycle that is not a natural loop, or a load that no path leads to.
        """
        graph = self._flow()
        # From each instruction to the next that all paths to it go through; none comes before the entry.
        dominators = nx.DiGraph((node, over) for node, over in nx.immediate_dominators(graph, 0).items() if node)
        dominators.add_node(0)
        # The header of a loop is found before the rest of it, so an edge back to it is not one that finds a node.
        others = ((latch, header) for latch, header, kind in nx.dfs_labeled_edges(graph, 0) if kind == "nontree")
        back_edges = [
            (latch, header) for latch, header in others if header in {latch, *nx.descendants(dominators, latch)}
        ]
        if not nx.is_directed_acyclic_graph(nx.restricted_view(graph, [], back_edges)):
            raise UnknownCode("a loop with two ways in")
        bodies: dict[int, set[int]] = {}
        for latch, header in back_edges:
            body = bodies.setdefault(header, {header})
            if latch != header:
                body |= {latch} | nx.ancestors(nx.restricted_view(graph, [header], []), latch)
        loops = []
        for header, body in sorted(bodies.items()):
            other_headers = bodies.keys() - {header}
            following = {self.instructions[other].address for other in other_headers & nx.descendants(graph, header)}
            code = tuple(self.instructions[index] for index in sorted(body))
            loops.append(Loop(self.instructions[header].address, code, not other_headers & body, frozenset(following)))
        return tuple(loops)

    def _flow(self) -> nx.DiGraph:
        """Follows all paths from the entry, with the targets that BSSY has set for a later BSYNC."""
        if not self.instructions:
            raise UnknownCode("a function without instructions")
        graph = nx.DiGraph()
        graph.add_node(0)
        todo: list[tuple[int, frozenset[tuple[str, int]]]] = [(0, frozenset())]
        seen = set(todo)
        while todo:
            index, barriers = todo.pop()
            one = self.instructions[index]
            if one.name == "BSSY":
                barriers = frozenset(pair for pair in barriers if pair[0] != one.barrier) | {(one.barrier, one.target)}
            for successor in self._successors(index, dict(barriers)):
                graph.add_edge(index, successor)
                if (successor, barriers) not in seen:
                    seen.add((successor, barriers))
                    todo.append((successor, barriers))
        for index, one in enumerate(self.instructions):
            if one.is_global_load and index not in graph:
                raise UnknownCode(f"no path was found to a load: {one}")
        return graph

    def _successors(self, index: int, barriers: dict[str, int]) -> set[int]:
        """Indices of the instructions that can come next."""
        one = self.instructions[index]
        if one.name in _INDIRECT_JUMPS:
            raise UnknownCode(f"a jump to an address in a register: {one}")
        successors: set[int] = set()
        falls_through = True
        if one.name in _JUMPS:
            successors.add(self._index_at(one.target))
            falls_through = one.is_conditional
        elif one.name == "BSYNC":
            if one.barrier not in barriers:
                raise UnknownCode(f"a BSYNC without its BSSY: {one}")
            successors.add(self._index_at(barriers[one.barrier]))
            falls_through = bool(one.guard)
        elif one.name in _ENDS:
            falls_through = bool(one.guard)
        if falls_through and index + 1 < len(self.instructions):
            successors.add(index + 1)
        return successors

    def _index_at(self, address: int) -> int:
        index, rest = divmod(address, INSTRUCTION_BYTES)
        if rest or index >= len(self.instructions):
            raise UnknownCode(f"a jump to {address:#x}, where no instruction is")
        return index


def functions_in(document: str) -> list[Function]:
    """Returns the kernels of a document that `nvdisasm -json` wrote.

    What does not start at 0 is a helper that only the kernel before it calls: it belongs to that one's code.
    """
    _, entries = json.loads(document)
    kernels: list[list[dict[str, Any]]] = []
    for entry in entries:
        if entry["start"] == 0:
            kernels.append([])
        kernels[-1].append(entry)
    return [_function(parts) for parts in kernels]


def _function(parts: list[dict[str, Any]]) -> Function:
    """Joins a kernel and its helpers, whose names stand for addresses in calls."""
    name = parts[0]["function-name"]
    addresses = {part["function-name"]: hex(part["start"]) for part in parts}
    code: list[Instruction] = []
    for part in parts:
        if part["start"] != INSTRUCTION_BYTES * len(code):
            raise UnknownCode(f"{part['function-name']} does not follow the code of {name}")
        for listed in part["sass-instructions"]:
            operands = listed.get("operands", "")
            guard = listed.get("predicate", "").removeprefix("@")
            address = INSTRUCTION_BYTES * len(code)
            code.append(Instruction(address, guard, listed["opcode"], addresses.get(operands, operands)))
    return Function(name, tuple(code))
