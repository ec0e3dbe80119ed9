"""The machine code of the GPU kernels, on every architecture: what it must not do, and that the reader would see it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hallo_numguard.ops.formats import FORMATS

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
DOCUMENT = ROOT / "docs" / "gpu.md"
sys.path.append(str(BENCHMARKS))

import gpu_binaries  # noqa: E402
from gpu_figures import Resources, loop_figures, main_loop  # noqa: E402
from gpu_roofline import architectures, resident_warps  # noqa: E402
from gpu_sass import Function, Loop, UnknownCode, parse  # noqa: E402

NVCC = gpu_binaries.nvcc_command()
TRITON = importlib.util.find_spec("triton")
needs_triton = pytest.mark.skipif(TRITON is None, reason="triton is not installed")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed: the CUDA compile gate was left out")
compiles = pytest.mark.timeout(600)  # whichever test comes first waits for all to be compiled: half a minute alone

DTYPES = [str(dtype).removeprefix("torch.") for dtype in FORMATS]
CHUNK_KERNELS = [f"chunk {dtype}{detail}" for dtype in DTYPES for detail in ("", " detail")]
TRITON_KERNELS = [f"triton {kernel}" for kernel in (*CHUNK_KERNELS, "combine")]
CUDA_KERNELS = [f"cuda {kernel} {where}" for kernel in CHUNK_KERNELS for where in ("inline", "table")] + [
    "cuda combine"
]


def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=BENCHMARKS,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the script wrote what it found, and the document if it could."""
    folder = tmp_path_factory.mktemp("gpu_code")
    document = ["--markdown", folder / "gpu.md"] if NVCC else []
    done = run("gpu_code.py", "--json", folder / "report.json", *document)
    assert done.returncode in (0, 1), done.stderr
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def assert_clean(report: dict[str, Any], variant: str, arch: int) -> None:
    (found,) = [one for one in report["kernels"] if (one["variant"], one["arch"]) == (variant, arch)]
    assert found["violations"] == []


# The kernels


@compiles
@needs_triton
@pytest.mark.parametrize("arch", architectures(), ids=lambda arch: f"sm_{arch}")
@pytest.mark.parametrize("kernel", TRITON_KERNELS)
def test_triton(report, kernel, arch):
    assert_clean(report, kernel, arch)


@compiles
@needs_triton
@needs_nvcc
@pytest.mark.parametrize("arch", architectures(), ids=lambda arch: f"sm_{arch}")
@pytest.mark.parametrize("kernel", CUDA_KERNELS)
def test_cuda(report, kernel, arch):
    assert_clean(report, kernel, arch)


@compiles
@needs_triton
@pytest.mark.parametrize("kernel", TRITON_KERNELS)
def test_triton_for_amd(report, kernel):
    (found,) = [one for one in report["hip"] if one["variant"] == kernel]
    assert found["violations"] == []


@compiles
@needs_triton
def test_there_are_no_other_kernels(report):
    names = {one["variant"] for one in report["kernels"]}
    assert names == set(TRITON_KERNELS) | (set(CUDA_KERNELS) if NVCC else set())


@compiles
@needs_triton
@needs_nvcc
def test_the_document_is_what_the_code_says(folder, report):
    written = DOCUMENT.read_text()
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    named = re.search(r" with (.*); do not edit", written.splitlines()[0])
    assert named is not None
    if named[1] != versions:
        pytest.skip(f"docs/gpu.md was written with {named[1]}; here are {versions}")
    assert written == (folder / "gpu.md").read_text(), "run: python benchmarks/gpu_code.py --markdown docs/gpu.md"


# The command


@compiles
@needs_triton
def test_a_violation_is_said_and_gives_1():
    stricter = "import gpu_gate; gpu_gate.BUDGETS['triton', 'chunk', 4, False] = 8; import gpu_code; gpu_code.main()"
    done = run("-c", stricter, "--arch", "90", "--backend", "triton")
    assert done.returncode == 1, done.stderr
    assert re.search(r"triton chunk float32, sm_90: takes \d+ registers, more than 8", done.stdout)


@compiles
@needs_triton
def test_without_nvcc_the_rest_is_checked_and_this_is_said():
    done = run("gpu_code.py", "--arch", "90", PATH="", CUDACXX="", CUDA_HOME="", CUDA_PATH="")
    assert done.returncode == 0, done.stderr
    assert "left out: cuda: nvcc is not installed" in done.stdout


@needs_triton
def test_a_backend_that_is_asked_for_must_be_there():
    done = run("gpu_code.py", "--backend", "cuda", PATH="", CUDACXX="", CUDA_HOME="", CUDA_PATH="")
    assert done.returncode == 2
    assert "nvcc is not installed" in done.stderr


def test_without_triton_nothing_can_be_checked():
    hidden = "import sys; sys.modules['triton'] = None; import gpu_code; gpu_code.main()"
    done = run("-c", hidden)
    assert done.returncode == 2
    assert "triton is not installed" in done.stderr


# Planted faults


@pytest.fixture(scope="module")
def planted() -> dict[str, list[str]]:
    done = run(ROOT / "tests" / "planted_gpu_kernels.py")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@compiles
@needs_triton
def test_a_kernel_without_a_fault_passes(planted):
    assert planted["clean"] == []


@compiles
@needs_triton
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("spills", r"keeps values in local memory: \d+ instructions that spill, \d+ bytes of stack"),
        ("takes too many registers", r"takes \d+ registers, more than 64: 16 warps a multiprocessor in place of 32"),
        ("takes too many registers", r"bytes in flight a multiprocessor .* less than the 43,243"),
        ("loads narrow", r"loads less than 16 bytes at a time in its main loop: 32 of 4 bytes"),
        ("waits in the loop", r"waits at a barrier in its main loop"),
        ("computes in double", r"the first loop that loads computes in double precision"),
    ],
)
def test_a_planted_fault_is_found(planted, fault, message):
    assert any(re.search(message, text) for text in planted[fault]), planted[fault]


# The reader of machine code


def function(*lines: str) -> Function:
    """A kernel of these instructions, 16 bytes each."""
    listing = [f"        /*{16 * index:04x}*/  {line} ;  /* 0x00 */" for index, line in enumerate(lines)]
    (parsed,) = parse("\n".join(["\t\tFunction : kernel", "\t.headerflags\t@...", *listing]))
    return parsed


def only_loop(*lines: str) -> Loop:
    (loop,) = function(*lines).loops
    return loop


def test_instructions_are_parsed():
    load, jump, nothing = function("LDG.E.EF.128 R20, desc[UR6][R58.64+-0x2000]", "@!P0 BRA 0x0", "EXIT").instructions
    assert (load.address, load.name, load.width) == (0, "LDG", 16)
    assert load.loaded_registers == {20, 21, 22, 23}
    assert load.mentioned_registers == {20, 58}
    assert (jump.guard, jump.target, jump.is_conditional) == ("!P0", 0, True)
    assert (nothing.opcode, nothing.operands) == ("EXIT", "")


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


def test_a_load_of_32_bytes_has_two_destinations():
    (load, _) = function("LDG.E.ENL2.256 R12, R8, desc[UR10][R38.64]", "EXIT").instructions
    assert load.loaded_registers == set(range(8, 16))


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


@pytest.mark.parametrize(
    ("body", "count", "flying"),
    [
        (["LDG.E.128 R4, [R2.64]", "LDG.E.128 R8, [R2.64]", "FADD R0, R5, R9"], 2, 32),
        (["LDG.E.128 R4, [R2.64]", "FADD R0, R4, R0", "LDG.E.128 R8, [R2.64]", "FADD R0, R8, R0"], 1, 16),
        (["FADD R0, R4, R0", "LDG.E.128 R4, [R2.64]"], 1, 16),
        (["FADD R0, R4, R8", "LDG.E.128 R4, [R2.64]", "LDG.E.64 R8, [R2.64]"], 2, 24),
        (["LDG.E R4, [R2.64]", "LDG.E R4, [R2.64]"], 1, 4),
        (["LDG.E.64 R2, [R2.64]", "LDG.E R4, [R2.64]", "FADD R0, R4, R0"], 1, 8),
    ],
    ids=["batched", "one by one", "used in the next iteration", "two in the next", "overwritten", "an address"],
)
def test_loads_in_flight(body, count, flying):
    figures = loop_figures(only_loop(*body, "@P0 BRA 0x0", "EXIT"))
    assert (figures.in_flight, figures.bytes_in_flight) == (count, flying)


def test_figures_of_a_loop():
    body = ["LDG.E.128 R4, [R2.64]", "LD.E.64 R8, [R2.64]", "FADD R0, R4, R8", "IADD3 R2, R2, 0x20, RZ"]
    figures = loop_figures(only_loop(*body, "@P0 BRA 0x0", "EXIT"))
    assert figures.loads == {8: 1, 16: 1}
    assert (figures.generic, figures.instructions, figures.loaded_bytes) == (1, 5, 24)
    assert figures.bytes_per_warp_instruction == 32 * 24 / 5
    assert figures.instructions_per_element(4) == 5 * 4 / 24


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


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "warps"),
    [
        (90, 128, 32, 64),
        (90, 128, 56, 36),
        (90, 128, 64, 32),
        (90, 128, 65, 28),
        (80, 128, 128, 16),
        (120, 128, 32, 48),
        (90, 1024, 64, 32),
        (90, 1024, 65, 0),
        (100, 32, 16, 32),
    ],
)
def test_warps_that_fit_a_multiprocessor(arch, threads, registers, warps):
    """As NVIDIA's occupancy calculator has them."""
    assert resident_warps(arch, Resources(threads, registers, 0, 0, 1024)) == warps
