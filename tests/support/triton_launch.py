"""Runs the Triton launcher on GPUs that are none, and prints what it would have launched, as JSON.

Triton itself is real, up to the machine code for an H100: it specialises, compiles and binds the arguments as always.
Only its driver is replaced, which would load the code and start it. In a process of its own, because tests elsewhere
have Triton's interpreter on.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import hallo_numguard as ng
from hallo_numguard.ops.backends import triton as launcher

import fake_gpu
from fake_gpu import on_gpu, reveal


@dataclass
class Launch:
    """One launch, as a driver sees it."""

    kernel: str
    device: int
    stream: int
    blocks: int
    dtype_bits: int
    pointers: list[int]
    integers: list[int]


class RecordingDriver:
    """What Triton asks of a driver, for an H100; a launch is written down instead."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.device = 0
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return fake_gpu.current_stream(device).cuda_stream

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 228 << 10}

    def load_binary(self, name: str, code: bytes, shared: int, device: int) -> tuple[int, str, int, int, int]:
        return 1, name, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        names = source.fn.arg_names

        def launch(x: int, y: int, z: int, stream: int, function: str, *rest: Any) -> None:
            values = dict(zip(names, rest[-len(names) :], strict=True))
            runtime = [value for name, value in values.items() if name.islower()]
            bits = values.get("BITS")
            self.launches.append(
                Launch(
                    kernel=function,
                    device=self.device,
                    stream=stream,
                    blocks=x * y * z,
                    dtype_bits=bits.primitive_bitwidth if bits is not None else 0,
                    pointers=[value.data_ptr() for value in runtime if isinstance(value, torch.Tensor)],
                    integers=[value for value in runtime if isinstance(value, int)],
                )
            )

        return launch

    def take(self) -> list[dict[str, Any]]:
        launches, self.launches = self.launches, []
        return [asdict(launch) for launch in launches]


class CurrentDevice:
    """torch.cuda.device, for Triton to see."""

    def __init__(self, device: torch.device) -> None:
        self.index = device.index

    def __enter__(self) -> None:
        self.before, recorder.device = recorder.device, self.index

    def __exit__(self, *_: Any) -> None:
        recorder.device = self.before


recorder = RecordingDriver()


def main() -> None:
    """Calls the public functions on fake GPUs."""
    driver.set_active(recorder)
    found: dict[str, Any] = {"triton": triton.__version__}
    with fake_gpu.fake_gpus(None, None, backend="triton"):
        torch.cuda.device = CurrentDevice
        assert launcher.unavailable("cuda") is None
        flat, layout = on_gpu(torch.randn(100_000)), ng.Layout([0, 10, 90_000, 100_000])
        tensors = [on_gpu(torch.randn(index % 50), gpu=1) for index in range(1000)]
        tensors += [on_gpu(torch.randn(40_000, dtype=torch.bfloat16), gpu=1)]
        with fake_gpu.setting_up():
            ng.tensor_stats(flat, layout), ng.tensor_stats(flat), ng.multi_tensor_stats(tensors)
        recorder.take()
        table = ng.tensor_stats(flat, layout, detail=False)
        found["flat"] = {"address": reveal(flat).data_ptr(), "launches": recorder.take()}
        ng.tensor_stats(flat)
        found["one"] = {"address": reveal(flat).data_ptr(), "launches": recorder.take()}
        ng.multi_tensor_stats(tensors)
        found["list"] = {"launches": recorder.take()}
        found["device"] = str(table.packed.device)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
