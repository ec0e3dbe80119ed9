"""What only a GPU would show, on a CPU: streams and the model's device are labels here."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import deepspeed_support as support

pytestmark = pytest.mark.deepspeed


class Streams(TorchDispatchMode):
    """A current and a side stream: tells of what the side reads before it has waited for what made it.

    Attributes:
        races: Operators that read so.
        reads: Number of operators on the side stream.
    """

    def __init__(self):
        super().__init__()
        self.races, self.reads = [], 0
        self._is_aside = False
        self._fresh = {}  # made on the current stream since the side has waited; kept, so that no address comes again

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self._is_aside:
            self.reads += 1
            read = [id(x.untyped_storage()) for x in args if isinstance(x, torch.Tensor)]
            self.races += [str(func) for storage in read if storage in self._fresh]
        elif isinstance(result, torch.Tensor):
            self._fresh[id(result.untyped_storage())] = result
        return result

    @contextlib.contextmanager
    def aside(self, _):
        self._is_aside = True
        yield
        self._is_aside = False

    def wait_stream(self, _):
        self._fresh.clear()


class DefaultStream:
    def wait_stream(self, _):
        pass


def test_deepspeeds_stream_waits_for_the_flag_that_it_is_given(make, monkeypatch):
    engine, _ = make("fp16", stage=3)
    accelerator = type(__import__("deepspeed").accelerator.get_accelerator())
    check, streams = engine.optimizer.has_overflow, Streams()

    def watched(*args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(accelerator, "stream", lambda _, stream: stream.aside(stream))
            patch.setattr(accelerator, "resolves_data_dependency", lambda _: False)
            patch.setattr(accelerator, "default_stream", lambda *_: DefaultStream())
            patch.setattr(engine.optimizer, "reduce_and_partition_stream", streams)
            with streams:
                return check(*args, **kwargs)

    monkeypatch.setattr(engine.optimizer, "has_overflow", watched)
    support.train_step(engine)
    assert streams.reads > 0
    assert streams.races == []


@pytest.mark.parametrize("stage", [2, 3])
def test_all_that_ranks_reduce_is_on_their_device_with_offload(make, stage):
    engine, guard = make("fp16", stage=stage, offload=True)
    collector = guard._session._collector
    views = []
    scan = collector.scan

    def scan_as_if_the_model_was_elsewhere(step):
        here, collector._model = collector._model, dataclasses.replace(collector._model, device=torch.device("meta"))
        views.append(scan(step))
        collector._model = here
        return scan(step)

    collector.scan = scan_as_if_the_model_was_elsewhere
    support.train_step(engine, 0, poison=float("nan"))
    (view,) = views
    held = [
        tensor
        for part in view
        for tensor in (part if isinstance(part, tuple) else [part])
        if isinstance(tensor, torch.Tensor)
    ]
    assert len(held) == 4 * 3 + 3  # statistics of weights, gradients, state and local gradients; marks and two flags
    assert {tensor.device.type for tensor in held} == {"meta"}
