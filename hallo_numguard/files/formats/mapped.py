"""The values of one tensor, by memory map."""

from __future__ import annotations

import math
import mmap

import torch

from hallo_numguard.files.formats.source import DamagedFile, TensorEntry


def load(entry: TensorEntry) -> torch.Tensor:
    """Returns the values of a tensor without reading them yet: pages come from the file when they are looked at.

    Writing into the result changes a private copy of the page, never the file.

    Raises:
        DamagedFile: If the file is shorter than the entry says.
        OSError: If it cannot be opened.
    """
    if entry.nbytes == 0:
        return torch.empty(entry.shape, dtype=entry.dtype)
    first = entry.offset - entry.offset % mmap.ALLOCATIONGRANULARITY
    with entry.file.open("rb") as file:
        try:
            view = mmap.mmap(file.fileno(), entry.offset + entry.nbytes - first, access=mmap.ACCESS_COPY, offset=first)
        except ValueError as error:
            raise DamagedFile(f"{entry.file.name} ends before the data of {entry.name}") from error
    count = entry.nbytes // entry.dtype.itemsize
    run = torch.frombuffer(view, dtype=entry.dtype, count=count, offset=entry.offset - first)
    if entry.stride is not None:
        return run.as_strided(entry.shape, entry.stride)
    return run.view(entry.shape) if math.prod(entry.shape) == count else run
