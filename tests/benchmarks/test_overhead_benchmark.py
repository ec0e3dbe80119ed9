from __future__ import annotations

import json
import sys
import time
import types

import pytest
import torch
from benchmark_support import BENCHMARKS, needs_native, run_python

from hallo_numguard.ops import dispatch
from hallo_numguard.ops.backends import triton
from hallo_numguard.ops.native_extension import extension

TINY = ["--size", "0.00390625", "--size", "0.0625", "--seconds", "1", "--no-compile"]
PEERS = {
    "isfinite_all",
    "idiom",
    "idiom_per_segment",
    "aminmax_norm",
    "aminmax_foreach_norm",
    "aminmax",
    "vector_norm",
    "foreach_norm",
    "amp_unscale",
}
OURS = {"ours_native", "ours_public", "ours_public_detail", "ours_public_one_segment", "ours_list"}
ON_GPU = ["--device", "cuda", *TINY]


@needs_native
def test_quick_run_measures_ours_and_the_peers(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed, which draws the picture")
    found, picture = tmp_path / "found.json", tmp_path / "picture.png"
    done = run_python("overhead.py", "--quick", *TINY, "--json", str(found), "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    run = json.loads(found.read_text())
    measured = {sample["candidate"] for sample in run["samples"]}
    assert {"read", "read_prefetched", "read_in_turns"} | OURS | PEERS <= measured
    assert ("deepspeed" in measured) != ("deepspeed" in run["skipped"])
    assert "compile" in run["skipped"]
    for sample in run["samples"]:
        assert sample["fraction"] > 0, sample
        assert 0 < sample["p20_us"] <= sample["median_us"] <= sample["p80_us"], sample
    assert {sample["size"] for sample in run["samples"]} == {4096, 65536}
    assert {sample["dtype"] for sample in run["samples"]} == {"fp32", "bf16"}
    assert all({"promise", "figure", "met"} == set(target) for target in run["targets"])
    assert "ours: tensor_stats" in done.stdout
    assert "Targets" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


@needs_native
def test_no_more_segments_than_elements(tmp_path):
    found = tmp_path / "found.json"
    tiny = ["--size", "0.0000152587890625", "--dtype", "fp32", "--seconds", "0.1"]
    done = run_python("overhead.py", "--quick", *tiny, "--no-compile", "--json", str(found))
    assert done.returncode == 0, done.stderr
    assert {sample["segments"] for sample in json.loads(found.read_text())["samples"]} == {4}


@needs_native
def test_wrong_result_stops_it():
    lie = "candidates._idiom = lambda values: (torch.ones(()),) * 3"
    lying = f"import overhead, candidates, torch; {lie}; overhead.main()"
    done = run_python("-c", lying, "--quick", *TINY)
    assert done.returncode == 1
    assert "wrong result" in done.stderr
    assert "isfinite + abs.max + norm" in done.stderr


@needs_native
def test_other_backend_is_refused():
    done = run_python("overhead.py", "--quick", *TINY, **{dispatch.BACKEND_VARIABLE: "reference"})
    assert done.returncode == 2
    assert dispatch.BACKEND_VARIABLE in done.stderr


def test_missing_extension_is_said():
    hidden = "import sys; sys.modules['hallo_numguard._native'] = None; import overhead; overhead.main()"
    done = run_python("-c", hidden, "--quick", *TINY)
    assert done.returncode == 2
    assert "there is no extension, for it does not load: import of hallo_numguard._native halted" in done.stderr


def test_missing_matplotlib_is_said():
    if extension() is None:
        pytest.skip("the extension was not built, and it is asked for before matplotlib is")
    hidden = "import sys; sys.modules['matplotlib'] = None; import overhead; overhead.main()"
    done = run_python("-c", hidden, "--quick", *TINY, "--plot", "never.png")
    assert done.returncode == 2
    assert "hallo-numguard[bench]" in done.stderr


class FakeRuntime:
    """Where a GPU's runtime would be: the CPU's tensors, and the host's clock for events."""

    device = torch.device("cpu")

    def __init__(self, free_memory: int = 1 << 40) -> None:
        self._free_memory = free_memory
        self._filler = torch.zeros(1 << 16)
        self.flushes = 0

    def unavailable(self) -> str | None:
        return None

    def record(self) -> int:
        return time.perf_counter_ns()

    def elapsed(self, begin: int, end: int) -> float:
        return float(end - begin)

    def synchronize(self) -> None:
        pass

    def flush(self) -> None:
        self._filler.sum()
        self.flushes += 1

    def free_memory(self) -> int:
        return self._free_memory

    def describe(self) -> dict[str, str]:
        return {"gpu": "Fake GPU", "L2": "0.25 MiB"}


@pytest.fixture
def benchmarks(monkeypatch):
    """The modules of the benchmark, importable. Interpreted, the Triton backend would take minutes."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.delenv(dispatch.BACKEND_VARIABLE, raising=False)
    triton.kernels()  # looks at the variable once: other tests want it interpreted
    monkeypatch.delenv(triton.INTERPRET_VARIABLE, raising=False)


def run_on_fake(monkeypatch, runtime: FakeRuntime, *arguments: str):
    import devices
    import overhead
    from click.testing import CliRunner

    monkeypatch.setitem(devices.DEVICES, "cuda", devices.gpu(runtime))
    return CliRunner().invoke(overhead.main, ["--quick", *ON_GPU, *arguments])


@needs_native
def test_gpu_run_from_option_to_picture(benchmarks, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed, which draws the picture")
    found, picture = tmp_path / "found.json", tmp_path / "picture.png"
    runtime = FakeRuntime()
    done = run_on_fake(monkeypatch, runtime, "--json", str(found), "--plot", str(picture))
    assert done.exit_code == 0, done.output
    run = json.loads(found.read_text())

    assert run["device"] == "Fake GPU"
    assert run["machine"]["gpu"] == "Fake GPU"
    assert run["machine"]["backend of the public calls"] == "hallo_numguard.ops.backends.cpu"
    assert "device-to-device copy" in run["limit"]
    measured = {sample["candidate"] for sample in run["samples"]}
    assert {"copy", "sum_int32", "ours_native_list"} | OURS | PEERS <= measured
    assert "ours_triton" in run["skipped"]
    for key in ("deepspeed", "apex", "transformer_engine"):
        assert (key in measured) != (key in run["skipped"]), key
    for sample in run["samples"]:
        assert sample["threads"] is None, sample
        assert sample["host_us"] > 0, sample
        assert sample["repeats"] == 1, sample
        assert 0 < sample["p20_us"] <= sample["median_us"] <= sample["p80_us"], sample
    copies = [sample["fraction"] for sample in run["samples"] if sample["candidate"] == "copy"]
    assert copies == [0.5] * 4  # it moves every byte twice
    assert runtime.flushes > sum(sample["rounds"] for sample in run["samples"])

    promises = {target["promise"]: target["met"] for target in run["targets"]}
    assert [met for promise, met in promises.items() if promise.startswith("256 MiB")] == [None] * 3
    assert sum(met is not None for met in promises.values()) == 3
    assert "not measured" in done.output
    assert "host us" in done.output
    assert picture.read_bytes().startswith(b"\x89PNG")


@needs_native
def test_gpu_sizes_without_room_are_left_out(benchmarks, monkeypatch, tmp_path):
    found = tmp_path / "found.json"
    done = run_on_fake(monkeypatch, FakeRuntime(free_memory=1 << 16), "--dtype", "fp32", "--json", str(found))
    assert done.exit_code == 0, done.output
    run = json.loads(found.read_text())
    assert {sample["size"] for sample in run["samples"]} == {4096}
    assert "are free" in run["skipped"]["64 KiB"]
    done = run_on_fake(monkeypatch, FakeRuntime(free_memory=0))
    assert done.exit_code == 2
    assert "4 KiB" in done.output


@needs_native
def test_threads_are_refused_on_a_gpu(benchmarks, monkeypatch):
    done = run_on_fake(monkeypatch, FakeRuntime(), "--threads", "2")
    assert done.exit_code == 2
    assert "--threads" in done.output


def test_a_core_that_another_thread_shares_is_noticed(benchmarks):
    from timing import OwnCore

    shares = iter([1.3, 1.0, *[1.1] * 198, 1.1, 1.2, 0.8, 1.1])
    own = OwnCore(lambda: next(shares))
    assert [own(), own(), own(), own()] == [True, False, True, False]


@pytest.mark.parametrize(("alone", "kept"), [(5, 5), (2, 8)])
def test_samples_of_a_divided_core_are_left_out_if_enough_others_remain(benchmarks, alone, kept):
    from timing import Series, Spent

    series = Series(repeats=1)
    for number in range(8):
        series.add(Spent(work=10.0, host=None), 5.0 if number < alone else 4.0, on_own_core=number < alone)
    series.leave_out_divided()
    assert len(series.fractions) == len(series.nanoseconds) == kept


@needs_native
def test_the_share_of_a_core_is_known_where_there_are_vectors():
    module = extension()
    assert (module.core_share() > 0) == ("avx2" in module.isas())


def test_gpu_clock_queues_ahead_of_the_call(benchmarks):
    """On a device with a clock of its own: flushes until the host has launched, and nothing else between events."""
    from timing import event_clock

    class Stream:
        """Every operation takes the device a microsecond, a flush 10."""

        def __init__(self) -> None:
            self.now, self.log = 0.0, []

        def launch(self, name: str, nanoseconds: float) -> None:
            self.log.append(name)
            self.now += nanoseconds

        def record(self) -> float:
            self.log.append("record")
            return self.now

        def elapsed(self, begin: float, end: float) -> float:
            return end - begin

        def synchronize(self) -> None:
            self.log.append("synchronize")

        def flush(self) -> None:
            self.launch("flush", 10_000.0)

    stream = Stream()
    sampler = event_clock(stream)(lambda: stream.launch("call", 1_000.0))
    stream.log.clear()
    spent = sampler.take()
    assert spent.work == 1_000.0
    assert spent.host > 0
    assert stream.log[:2] == ["synchronize", "call"]
    assert stream.log[-4:] == ["record", "call", "record", "synchronize"]
    assert set(stream.log[2:-4]) == {"flush"}


@needs_native
def test_gpu_backends_are_checked_apart(benchmarks, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    from candidates import gpu_backends
    from problems import make_problem
    from verify import check

    monkeypatch.setenv(triton.INTERPRET_VARIABLE, "1")
    problem = make_problem(1 << 12, "fp32", 5, torch.device("cpu"))
    made = gpu_backends(problem)
    assert not [reason for reason in made.values() if isinstance(reason, str)]
    assert set(check(problem, made.values())) == {"ours_native", "ours_native_list", "ours_triton", "ours_triton_list"}


@needs_native
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "fp64"])
def test_multi_tensor_norm_peers_are_called_and_believed(benchmarks, monkeypatch, dtype):
    """With what apex and TransformerEngine promise where they would be: their own kernels need a GPU."""
    from candidates import GPU_PEERS
    from problems import make_problem
    from verify import check

    def kernel(chunk_size, flag, lists, per_tensor):
        assert flag.dtype == torch.int32
        assert per_tensor
        norms = torch.stack([tensor.double().norm() for tensor in lists[0]])
        return norms.norm().reshape(1), norms

    def applier(function, flag, lists, *arguments):
        return function(2048 * 32, flag, lists, *arguments)

    names = ("apex", "apex.multi_tensor_apply", "amp_C", "transformer_engine", "transformer_engine.pytorch")
    for name in (*names, "transformer_engine.pytorch.optimizers"):
        module = types.ModuleType(name)
        module.multi_tensor_applier, module.multi_tensor_l2norm = applier, kernel
        monkeypatch.setitem(sys.modules, name, module)
    problem = make_problem(1 << 16, dtype, 7, torch.device("cpu"))
    made = [maker(problem) for maker in GPU_PEERS.values()]
    assert set(check(problem, made)) == set(GPU_PEERS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so nothing is missing to be told of")
def test_missing_gpu_is_said():
    done = run_python("overhead.py", "--device", "cuda")
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert "--device cpu" in done.stderr


@needs_native
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_quick_run_on_a_gpu(tmp_path):
    found = tmp_path / "found.json"
    done = run_python("overhead.py", "--quick", *ON_GPU, "--json", str(found), TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    assert {"copy", "ours_public"} <= {sample["candidate"] for sample in json.loads(found.read_text())["samples"]}
