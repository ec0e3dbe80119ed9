"""Runs the CUDA kernels on the calls in a file: `kernel_runner.py LIBRARY ORDER CALLS RECORDS`.

In a process of its own, which the shim or a sanitizer may end, and which is quick to start. CALLS has a pickle a call,
as `Call.packed` of tests/ops/test_cuda_kernels.py makes it. RECORDS gets the records of a call's segments as soon as it
is done, so that their number tells which call ended the process.
"""

from __future__ import annotations

import ctypes
import importlib.util
import pickle
import sys
from array import array
from pathlib import Path
from types import ModuleType
from typing import Any

ALIGNMENT = 64
RECORD_BYTES = 64

libc = ctypes.CDLL(None)
forbid = getattr(libc, "__asan_poison_memory_region", None)  # there is one if a sanitizer is loaded


def load(library: str, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def place(contents: bytes, offset: int = 0) -> int:
    """Returns the address of a copy, which lies `offset` bytes behind an aligned address.

    It ends with the allocation, and so at memory that the sanitizer does not let anybody read; what lies in front is
    forbidden too, down to the last 8 bytes. Nothing is freed: the process is short.
    """
    if not contents:
        return 0  # as torch has it
    allocation = ctypes.c_void_p()
    size = ctypes.c_size_t(offset + len(contents))
    assert libc.posix_memalign(ctypes.byref(allocation), ctypes.c_size_t(ALIGNMENT), size) == 0
    assert allocation.value is not None
    ctypes.memmove(allocation.value + offset, contents, len(contents))
    if forbid is not None:
        forbid(allocation, ctypes.c_size_t(offset))
    return allocation.value + offset


def run(extension: ModuleType, call: dict[str, Any], garbage: bytes) -> bytes:
    """Returns the records of a call; `garbage` is what was in them before."""
    memories = [place(contents, offset) for offset, contents in call["memories"]]
    addresses = [memories[memory] + start for memory, start in call["starts"]]
    # Those of one tensor count from its address, those of a list from 0, as in the launcher.
    base = memories[0] if len(memories) == 1 else 0
    starts = place(array("Q", [address - base for address in addresses]).tobytes())
    tables = (place(call["chunks"]), call["launches"], place(call["splits"]), call["n_splits"])
    size, before = RECORD_BYTES * call["segments"], garbage * (RECORD_BYTES * call["rows"])
    records = place(before)
    extension.scan_table(0, 0, tables, base, starts, call["detail"], records)
    found = ctypes.string_at(records, len(before))
    if len(addresses) <= extension.INLINE_CAPACITY:
        others = place(before)
        extension.scan_inline(0, 0, tables, array("Q", addresses).tobytes(), call["detail"], others)
        if ctypes.string_at(others, len(before)) != found:
            sys.exit("addresses in a table and in the arguments give different records")
    return found[:size]


def main() -> None:
    library, order, calls, results = sys.argv[1:]
    load(library, "_cuda_shim_log").set_order(order)
    extension = load(library, "_native_cuda")
    with Path(calls).open("rb") as source, Path(results).open("wb", buffering=0) as target:
        number = 0
        while source.peek(1):
            number += 1
            target.write(run(extension, pickle.load(source), bytes([number % 255 + 1])))


if __name__ == "__main__":
    main()
