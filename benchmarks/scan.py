"""How fast files are scanned, with the page cache warm and cold, against all else that reads them.

    python benchmarks/scan.py [--mib 1024] [--threads 1 --threads 2] [--rounds 11] [--json FILE]

Candidates take turns in every round, in a new order each time. Warm, every one stands between two plain reads of the
same file with the same threads (`preadv` into a buffer of 1 MiB that each thread uses again), and its fraction is their
time over its own; cold, the file is dropped from the page cache before each, and the plain read is one of them.

Exit code: 0 done, 2 no native extension.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import torch
from machine import prepare
from output import json_option, make_console, print_facts, write_json
from page import print_results
from safetensors import safe_open
from safetensors.torch import save_file
from timing import Call, alternate, host_clock, measure, median_ratio

import hallo_numguard as ng
from hallo_numguard.files.formats import open_source
from hallo_numguard.files.scan.reading import read_file

BUFFER_BYTES = 1 << 20
PLAIN = "plain preadv"
LAYER = {"query": (1024, 1024), "dense": (4096, 1024), "output": (1024, 4096), "norm": (1024,), "bias": (4096,)}
LAYER_NUMEL = sum(torch.Size(shape).numel() for shape in LAYER.values())


@dataclass(frozen=True)
class Result:
    """What one candidate took.

    Attributes:
        candidate: Name of the candidate.
        threads: Threads that it may use.
        cold: Whether the file had to come from the disk.
        seconds: Median over the rounds.
        gb_per_s: Gigabytes of the file a second.
        fraction: Time of a plain read over its time, median over the rounds.
    """

    candidate: str
    threads: int
    cold: bool
    seconds: float
    gb_per_s: float
    fraction: float


def make_file(folder: Path, mib: int, dtype: torch.dtype) -> dict[str, Path]:
    """Writes the same weights as safetensors and as torch.save does; returns the files by layout."""
    layers = max(1, (mib << 20) // (LAYER_NUMEL * dtype.itemsize))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"layers.{layer}.{name}": (torch.randn(shape, generator=generator) * 0.05).to(dtype)
        for layer in range(layers)
        for name, shape in LAYER.items()
    }
    files = {"safetensors": folder / "weights.safetensors", "torch": folder / "weights.pt"}
    save_file(tensors, files["safetensors"])
    torch.save(tensors, files["torch"])
    for file in files.values():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    return files


def plain_read(path: Path, threads: int) -> None:
    """Reads a file with so many threads, each into a buffer of its own that it uses again."""
    descriptor = os.open(path, os.O_RDONLY)
    offsets = iter(range(0, os.fstat(descriptor).st_size, BUFFER_BYTES))
    lock = threading.Lock()

    def take() -> int | None:
        with lock:
            return next(offsets, None)

    def work() -> None:
        buffer = memoryview(bytearray(BUFFER_BYTES))
        while (offset := take()) is not None:
            os.preadv(descriptor, [buffer], offset)

    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(work) for _ in range(threads)]:
            future.result()
    os.close(descriptor)


def isfinite(path: Path, threads: int) -> bool:
    """What people write: every tensor through the library, and torch's own flag."""
    torch.set_num_threads(threads)
    with safe_open(path, framework="pt") as file:
        return all(bool(torch.isfinite(file.get_tensor(name)).all()) for name in file.keys())  # noqa: SIM118 - no mapping


def candidates(files: dict[str, Path], threads: int) -> dict[str, Call]:
    """Returns what is timed, by name."""
    weights, archive = files["safetensors"], files["torch"]
    entries = open_source(weights).entries
    return {
        "scan, safetensors": lambda: ng.scan(weights, threads=threads),
        "read_file, no digests": lambda: read_file(weights, entries, (), threads=threads),
        "scan, torch.save (CRC-32 too)": lambda: ng.scan(archive, threads=threads),
        "read_file with sha256": lambda: read_file(weights, entries, threads=threads),
        "safetensors + torch.isfinite": lambda: isfinite(weights, threads),
        "sha256sum": lambda: subprocess.run(["sha256sum", weights], check=True, capture_output=True),
    }


def measure_files(files: dict[str, Path], threads: int, rounds: int, cold: bool) -> list[Result]:
    """Times all candidates in turns, each between two plain reads; cold, a plain read is one of them."""
    calls, plain = candidates(files, threads), partial(plain_read, files["safetensors"], threads)
    if cold:
        seconds = alternate({**calls, PLAIN: plain}, rounds, prepare=partial(drop_from_cache, files))
        fractions = {name: 1 / median_ratio(taken, seconds[PLAIN]) for name, taken in seconds.items()}
    else:
        series = measure(host_clock(warm=False), plain, calls, seconds=0.0, min_rounds=rounds)
        seconds = {name: [each / 1e9 for each in found.nanoseconds] for name, found in series.items()}
        fractions = {name: statistics.median(found.fractions) for name, found in series.items()}
    size = files["safetensors"].stat().st_size
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    return [
        Result(name, threads, cold, median, size / median / 1e9, fractions[name]) for name, median in medians.items()
    ]


def drop_from_cache(files: dict[str, Path]) -> None:
    """Makes the next read of the files come from the disk."""
    for path in files.values():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@click.command()
@click.option("--mib", type=click.IntRange(min=1), default=1024, show_default=True, help="Size of the file, MiB.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--threads", "counts", type=click.IntRange(min=1), multiple=True, default=(1, 2), show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=11, show_default=True, help="Samples of each candidate.")
@click.option("--cold/--no-cold", default=True, help="Also from the disk.")
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), help="Folder on the disk to be measured.")
@json_option
def main(
    mib: int, dtype: str, counts: tuple[int, ...], rounds: int, cold: bool, folder: Path | None, json_path: Path | None
) -> None:
    """Measure how fast files are scanned."""
    console, machine = make_console(), prepare() | {"file": f"{mib} MiB, {dtype}"}
    print_facts(console, machine)
    results: list[Result] = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        files = make_file(Path(scratch), mib, getattr(torch, dtype))
        for is_cold in (False, True) if cold else (False,):
            for threads in counts:
                results += measure_files(files, threads, max(3, rounds // 3) if is_cold else rounds, is_cold)
    print_results(console, "scan", results)
    write_json(json_path, machine, results)


if __name__ == "__main__":
    main()
