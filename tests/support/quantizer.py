"""DeepSpeed's quantizer in PyTorch, for ZeRO++ on a CPU: what its CUDA operator computes, not how.

As there, the largest value of a group passes NaN over, and a NaN becomes 0; where a value is infinite, the scale is 0,
and what comes back of the whole group is NaN. Source: deepspeed/ops/csrc/includes/quantization_utils.h.
"""

from __future__ import annotations

import torch

Symmetric = 0


def quantize(values: torch.Tensor, groups: int, bits: int, kind: int) -> list[torch.Tensor]:
    """Returns 8-bit numbers in the shape of `values`, and what each group's are multiplied by, float32 [groups].

    The operator's are [groups, 1]: gloo wants them flat.
    """
    assert (bits, kind) == (8, Symmetric)
    rows = values.reshape(groups, -1).float()
    largest = rows.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(dim=1, keepdim=True)
    scale = torch.where(largest == 0, 1.0, (1 << bits) / (2 * largest))
    half = 1 << (bits - 1)
    numbers = (rows * scale).nan_to_num(nan=0.0).round().clamp(-half, half - 1).to(torch.int8)
    return [numbers.reshape(values.shape), (1 / scale).flatten()]


def dequantize(numbers: torch.Tensor, scales: torch.Tensor, groups: int, bits: int, kind: int) -> torch.Tensor:
    """Returns float16 in the shape of `numbers`."""
    assert (bits, kind) == (8, Symmetric)
    return (numbers.reshape(groups, -1).float() * scales.reshape(groups, 1)).half().reshape(numbers.shape)
