"""Reads SASS, the machine code of NVIDIA's GPUs, as `cuobjdump -sass` prints it: functions, instructions, loops."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_FUNCTION = re.compile(r"^\s*Function : (\S+)")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_TARGET = re.compile(r"(?:^|[\s,(`])(0x[0-9a-f]+)\)?$")
_REGISTER = re.compile(r"\bR(\d+)\b")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}  # bytes; 4 if none is named
# A call is a jump here: some never come back; the others are the slow ways of shuffles, whose fast ways lead on, too.
_JUMPS = ("BRA", "CALL")
_ENDS = ("EXIT", "RET")
_UNFOLLOWED = ("BRX", "BRXU", "JMP", "JMX", "JMXU")


class UnknownCode(Exception):
    """This module does not understand the machine code, so nothing is proved about it."""


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address: Of it, in bytes from the start of the function.
        guard: The predicate that it depends on, as `!P0`, or nothing.
        opcode: With its modifiers, as `LDG.E.128`.
        operands: The rest, as printed.
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
        """Bytes that a load moves, a thread."""
        modifiers = self.opcode.split(".")[1:]
        return next((_WIDTHS[modifier] for modifier in modifiers if modifier in _WIDTHS), 4)

    @property
    def loaded_registers(self) -> frozenset[int]:
        """Those that a load writes. A load of 32 bytes names two destinations of four."""
        destinations = _REGISTER.findall(self.operands.split("[")[0].replace("desc", ""))
        per_destination = max(1, self.width // 4) // max(1, len(destinations))
        return frozenset(int(first) + i for first in destinations for i in range(max(1, per_destination)))

    @property
    def mentioned_registers(self) -> frozenset[int]:
        """Those whose numbers it has. Of a pair or a vector that is the first: enough to see that it is used."""
        return frozenset(map(int, _REGISTER.findall(self.operands)))

    @property
    def target(self) -> int:
        """Where a jump goes."""
        found = _TARGET.search(self.operands.strip())
        if found is None:
            raise UnknownCode(f"a jump without a target: {self}")
        return int(found[1], 16)

    @property
    def is_conditional(self) -> bool:
        """Whether a jump may fall through: for its guard, or for a predicate that it has as operand."""
        return bool(self.guard) or "," in self.operands

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{self.address:04x}: {guard}{self.opcode} {self.operands}".strip()


@dataclass(frozen=True)
class Loop:
    """A natural loop: whatever can come back to its header, which is the only way in.

    Attributes:
        header: The address of its first instruction.
        body: Its instructions, by address.
        is_innermost: Whether there is no other loop in it.
        leads_to: The headers of the loops that can follow it, or are in it.
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

    def has(self, *names: str) -> bool:
        """Whether one of these opcodes is in it."""
        return any(one.name in names for one in self.body)


@dataclass(frozen=True)
class Function:
    """The machine code of one kernel."""

    name: str
    instructions: tuple[Instruction, ...]

    def count(self, *names: str) -> int:
        """How many instructions with these opcodes there are."""
        return sum(one.name in names for one in self.instructions)

    @functools.cached_property
    def loops(self) -> tuple[Loop, ...]:
        """All natural loops, in the order of their headers.

        Raises:
            UnknownCode: If there is a cycle that is none, or a load that no path leads to.
        """
        return _loops(self)


def parse(text: str) -> list[Function]:
    """Returns the functions of a listing."""
    functions: list[tuple[str, list[Instruction]]] = []
    for line in text.splitlines():
        if found := _FUNCTION.match(line):
            functions.append((found[1], []))
        elif found := _INSTRUCTION.match(line):
            if not functions:
                raise UnknownCode("an instruction before the first function")
            address, guard, opcode, operands = found.groups()
            functions[-1][1].append(Instruction(int(address, 16), guard or "", opcode, operands.strip()))
    return [Function(name, tuple(instructions)) for name, instructions in functions]


# The flow of control


def _loops(function: Function) -> tuple[Loop, ...]:
    graph = _Graph(function)
    bodies: dict[int, set[int]] = {}
    for latch, header in graph.back_edges():
        bodies.setdefault(header, {header}).update(graph.reaching(latch, header))
    loops = []
    for header, blocks in sorted(bodies.items()):
        body = [one for block in sorted(blocks) for one in graph.blocks[block]]
        others = bodies.keys() - {header}
        following = {graph.address(other) for other in others & graph.reached_from(header)}
        loops.append(Loop(graph.address(header), tuple(body), not others & blocks, frozenset(following)))
    return tuple(loops)


class _Graph:
    """Basic blocks, by number, and the edges among those that the entry reaches."""

    def __init__(self, function: Function) -> None:
        self.blocks = [tuple(block) for block in _blocks(function.instructions)]
        self._at = {block[0].address: number for number, block in enumerate(self.blocks)}
        self.successors = self._edges()
        self._refuse_unreached_loads(function)
        self._dominators = self._find_dominators()

    def back_edges(self) -> list[tuple[int, int]]:
        """Edges to a block that all paths to their start go through. Without them there must be no cycle."""
        edges = [(start, end) for start, ends in self.successors.items() for end in ends]
        back = [(start, end) for start, end in edges if end in self._dominators[start]]
        forward: dict[int, set[int]] = {start: set() for start in self.successors}
        for start, end in set(edges) - set(back):
            forward[start].add(end)
        _refuse_cycles(forward)
        return back

    def reaching(self, latch: int, header: int) -> set[int]:
        """The blocks from which `latch` is reached without passing `header`."""
        found, todo = {header}, [latch]
        while todo:
            block = todo.pop()
            if block not in found:
                found.add(block)
                todo += [start for start, ends in self.successors.items() if block in ends]
        return found

    def reached_from(self, block: int) -> set[int]:
        """The blocks that some path from `block` leads to."""
        found: set[int] = set()
        todo = [block]
        while todo:
            for successor in self.successors[todo.pop()] - found:
                found.add(successor)
                todo.append(successor)
        return found

    def address(self, block: int) -> int:
        """Where a block begins."""
        return self.blocks[block][0].address

    def _edges(self) -> dict[int, set[int]]:
        """Follows all paths from the entry, with what BSSY has said about where a later BSYNC goes."""
        edges: dict[int, set[int]] = {}
        todo: list[tuple[int, frozenset[tuple[str, int]]]] = [(0, frozenset())]
        seen = set(todo)
        while todo:
            number, meetings = todo.pop()
            block = self.blocks[number]
            for one in block:
                if one.name == "BSSY":
                    barrier = _barrier(one)
                    meetings = frozenset(pair for pair in meetings if pair[0] != barrier) | {(barrier, one.target)}
            following = self._following(number, dict(meetings))
            edges.setdefault(number, set()).update(following)
            for state in ((successor, meetings) for successor in following):
                if state not in seen:
                    seen.add(state)
                    todo.append(state)
        return edges

    def _following(self, number: int, meetings: dict[str, int]) -> set[int]:
        last = self.blocks[number][-1]
        if last.name in _UNFOLLOWED:
            raise UnknownCode(f"a jump to an address in a register: {last}")
        following: set[int] = set()
        falls_through = True
        if last.name in _JUMPS:
            following.add(self._block_at(last.target))
            falls_through = last.is_conditional
        elif last.name == "BSYNC":
            barrier = _barrier(last)
            if barrier not in meetings:
                raise UnknownCode(f"a BSYNC without its BSSY: {last}")
            following.add(self._block_at(meetings[barrier]))
            falls_through = bool(last.guard)
        elif last.name in _ENDS:
            falls_through = bool(last.guard)
        if falls_through and number + 1 < len(self.blocks):
            following.add(number + 1)
        return following

    def _block_at(self, address: int) -> int:
        if address not in self._at:
            raise UnknownCode(f"a jump to {address:#x}, where no instruction is")
        return self._at[address]

    def _refuse_unreached_loads(self, function: Function) -> None:
        reached = {one.address for number in self.successors for one in self.blocks[number]}
        for one in function.instructions:
            if one.is_global_load and one.address not in reached:
                raise UnknownCode(f"no path was found to a load: {one}")

    def _find_dominators(self) -> dict[int, set[int]]:
        """Of each block, those that every path to it goes through."""
        before: dict[int, set[int]] = {number: set() for number in self.successors}
        for start, ends in self.successors.items():
            for end in ends:
                before[end].add(start)
        everything = set(self.successors)
        dominators = {number: {number} if number == 0 else everything for number in self.successors}
        changed = True
        while changed:
            changed = False
            for number in sorted(everything - {0}):
                found = {number} | set.intersection(*(dominators[start] for start in before[number]))
                changed |= found != dominators[number]
                dominators[number] = found
        return dominators


def _blocks(instructions: Iterable[Instruction]) -> Iterator[list[Instruction]]:
    """Cuts where a jump goes to, and behind whatever may jump."""
    code = list(instructions)
    if not code:
        raise UnknownCode("a function without instructions")
    starts = {one.target for one in code if one.name in (*_JUMPS, "BSSY")}
    block: list[Instruction] = []
    for one in code:
        if block and one.address in starts:
            yield block
            block = []
        block.append(one)
        if one.name in (*_JUMPS, *_ENDS, *_UNFOLLOWED, "BSYNC"):
            yield block
            block = []
    if block:
        yield block


def _barrier(instruction: Instruction) -> str:
    return instruction.operands.split(",")[0].strip()


def _refuse_cycles(successors: dict[int, set[int]]) -> None:
    """Takes away blocks that nothing leads to, until none is left."""
    incoming = {number: 0 for number in successors}
    for ends in successors.values():
        for end in ends:
            incoming[end] += 1
    todo = [number for number, count in incoming.items() if count == 0]
    removed = 0
    while todo:
        removed += 1
        for end in successors[todo.pop()]:
            incoming[end] -= 1
            if incoming[end] == 0:
                todo.append(end)
    if removed < len(successors):
        raise UnknownCode("a loop with two ways in")
