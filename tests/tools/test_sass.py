"""The reader of machine code, and how it finds a kernel's main loop."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools"))

from kernel_checks import Variant, figures_of, main_loop
from sass import Function, Loop, UnknownCode, functions_in


def function(*lines: str) -> Function:
    """A kernel of these instructions, as nvdisasm lists them."""
    parts = [re.fullmatch(r"(@\S+)?\s*(\S+)\s*(.*)", line).groups() for line in lines]
    keys = ("predicate", "opcode", "operands")
    listed = [{key: part for key, part in zip(keys, entry, strict=True) if part} for entry in parts]
    (parsed,) = functions_in(json.dumps([{}, [{"function-name": "kernel", "start": 0, "sass-instructions": listed}]]))
    return parsed


def only_loop(*lines: str) -> Loop:
    (loop,) = function(*lines).loops
    return loop


def test_instructions_are_parsed():
    load, jump, nothing = function("LDG.E.EF.128 R20, desc[UR6][R58.64+-0x2000]", "@!P0 BRA 0x0", "EXIT").instructions
    assert (load.address, load.name, load.width) == (0, "LDG", 16)
    assert (jump.guard, jump.target, jump.is_conditional) == ("!P0", 0, True)
    assert (nothing.opcode, nothing.operands) == ("EXIT", "")


def test_helpers_belong_to_their_kernel():
    listing = [
        {"function-name": name, "start": start, "sass-instructions": [{"opcode": "CALL", "operands": "helper"}]}
        for name, start in (("one", 0), ("helper", 16), ("other", 0))
    ]
    one, other = functions_in(json.dumps([{}, listing]))
    assert [len(one.instructions), len(other.instructions)] == [2, 1]
    assert one.instructions[0].target == one.instructions[1].address
    with pytest.raises(UnknownCode, match="helper does not follow the code of other"):
        functions_in(json.dumps([{}, [listing[2], {**listing[1], "start": 32}]]))


@pytest.mark.parametrize(
    ("opcode", "width"),
    [
        ("LDG.E", 4),
        ("LDG.E.64", 8),
        ("LDG.E.128.CONSTANT", 16),
        ("LDG.E.NA.ENL2.256.CONSTANT", 32),
        ("LDG.E.U16", 2),
        ("LD.E.U8", 1),
    ],
)
def test_width_of_a_load(opcode, width):
    (load, _) = function(f"{opcode} R4, [R2.64]", "EXIT").instructions
    assert load.is_global_load
    assert load.width == width


def test_a_loop():
    loop = only_loop("MOV R1, RZ", "LDG.E.128 R4, [R2.64]", "FADD R8, R4, R8", "@P0 BRA 0x10", "EXIT", "BRA 0x50")
    assert (loop.header, len(loop.body), loop.loaded_bytes, loop.is_innermost) == (0x10, 3, 16, True)


def test_a_jump_back_that_is_no_loop():
    lines = ["@P0 BRA 0x30", "LDG.E R4, [R2.64]", "EXIT", "MOV R2, RZ", "BRA 0x10"]
    assert function(*lines).loops == ()


def test_predicates_as_operands_are_conditions():
    assert only_loop("LDG.E R4, [R2.64]", "BRA.U UP0, 0x0", "EXIT").header == 0
    assert only_loop("LDG.E R4, [R2.64]", "BRA P1, 0x0", "EXIT").header == 0


def test_a_call_that_leaves_a_loop():
    loop = only_loop("LDG.E R4, [R2.64]", "@P0 CALL.REL.NOINC 0x30", "BRA 0x0", "EXIT")
    assert len(loop.body) == 3


def test_lanes_that_meet_again():
    """BSYNC goes where BSSY said, which may be far from it."""
    loop = only_loop(
        "BSSY B0, 0x40", "@P0 BRA 0x70", "LDG.E R4, [R2.64]", "BSYNC B0", "@P1 BRA 0x0", "EXIT", "NOP", "BRA 0x30"
    )
    assert {one.address for one in loop.body} == {0x00, 0x10, 0x20, 0x30, 0x40, 0x70}


def test_nested_loops():
    outer, inner = function("MOV R1, RZ", "LDG.E R4, [R2.64]", "@P0 BRA 0x10", "@P1 BRA 0x0", "EXIT").loops
    assert (outer.is_innermost, inner.is_innermost) == (False, True)
    assert outer.leads_to == {inner.header}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["BRX R2 -0x10", "EXIT"], "a jump to an address in a register"),
        (["BRA 0x1000", "EXIT"], "a jump to 0x1000, where no instruction is"),
        (["BSYNC B0", "EXIT"], "a BSYNC without its BSSY"),
        (["EXIT", "LDG.E R4, [R2.64]", "EXIT"], "no path was found to a load"),
        (["@P0 BRA 0x20", "MOV R1, R2", "MOV R2, R3", "@P1 BRA 0x10", "EXIT"], "a loop with two ways in"),
    ],
)
def test_what_is_not_understood_is_refused(lines, message):
    with pytest.raises(UnknownCode, match=message):
        _ = function(*lines).loops


def test_figures_of_a_loop():
    body = ["LDG.E.128 R4, [R2.64]", "LD.E.64 R8, [R2.64]", "FADD R0, R4, R8", "IADD3 R2, R2, 0x20, RZ"]
    code = function(*body, "@P0 BRA 0x0", "EXIT")
    figures = figures_of(Variant("triton", "chunk", "float32"), 90, (32, 0, 0), code)
    assert figures.loads == {8: 1, 16: 1}
    assert (figures.generic_loads, figures.instructions) == (1, 5)
    assert code.loops[0].loaded_bytes == 24


STREAM = ["LDG.E.128 R4, [R2.64]", "FADD R0, R4, R0"]
EXACT = ["LDG.E.U16 R4, [R2.64]", "F2F.F64.F32 R4, R4", "DADD R6, R4, R6"]


def two_loops(first: list[str], second: list[str]) -> Function:
    behind = 16 * (len(first) + 1)
    return function(*first, "@P0 BRA 0x0", *second, f"@P0 BRA {behind:#x}", "EXIT")


def test_the_main_loop_comes_first():
    assert main_loop(two_loops(STREAM, EXACT), is_double=False).loaded_bytes == 16
    longer = [*STREAM, "LDG.E.128 R8, [R2.64]", "FADD R0, R8, R0"]
    assert main_loop(two_loops(STREAM, longer), is_double=False).loaded_bytes == 16


@pytest.mark.parametrize(
    ("code", "is_double", "message"),
    [
        (two_loops(EXACT, STREAM), False, "computes in double precision"),
        (two_loops(EXACT, STREAM), True, r"takes 2\.00 instructions a byte, but the one at 0x40 only 0\.19"),
        (function("MOV R1, RZ", "EXIT"), False, "of 0 loops that load, 0 come before all others"),
        (
            function("@P1 BRA 0x50", *STREAM, "@P0 BRA 0x10", "EXIT", *STREAM, "@P0 BRA 0x50", "EXIT"),
            False,
            "of 2 loops that load, 0 come before all others: 0x10, 0x50",
        ),
    ],
    ids=["double", "dear", "none", "unordered"],
)
def test_an_unclear_main_loop_is_refused(code, is_double, message):
    with pytest.raises(UnknownCode, match=message):
        main_loop(code, is_double)
