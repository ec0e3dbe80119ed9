"""What was promised, a device, and whether a run keeps it."""

from __future__ import annotations

from candidates import NATIVE, PUBLIC, PUBLIC_ONE
from peers import AMINMAX, AMINMAX_PER_SEGMENT, ISFINITE
from results import KIB, MANY, MANY_ONE, MIB, Run, Sample, Target, join, size_label, threads_label

_LARGE = 256 * MIB
_CPU_LARGE_FRACTION = 0.95
_GPU_LARGE_FRACTION = 0.9
_GPU_LARGE_DTYPES = ("fp32", "bf16", "fp16")
_CACHED = 4 * MIB
_CACHED_FRACTIONS = {"fp32": 0.85, "bf16": 0.80, "fp16": 0.45}
_MANY_RATIO = 1.3
_SMALL = 4 * KIB
_SMALL_MICROSECONDS = 20.0


def cpu_targets(run: Run) -> list[Target]:
    """Holds a run on the CPU against what was promised."""
    isfinite = f"isfinite.all from {size_label(_SMALL)} on"
    return [
        *_cpu_large(run),
        *_cpu_cached(run),
        *_cpu_many(run),
        _never_slower(run, PUBLIC_ONE, ISFINITE, f"{isfinite}, as one segment", smallest=_SMALL),
        _never_slower(run, PUBLIC, ISFINITE, f"{isfinite}, with all segments", smallest=_SMALL),
        _cpu_small(run),
    ]


def gpu_targets(run: Run) -> list[Target]:
    """Holds a run on a GPU against what was promised."""
    return [
        *[_gpu_large(run, dtype) for dtype in _GPU_LARGE_DTYPES],
        _never_slower(run, PUBLIC, AMINMAX_PER_SEGMENT, "aminmax + _foreach_norm, on all segments"),
        _never_slower(run, PUBLIC_ONE, AMINMAX, "aminmax + vector_norm, on one segment"),
        _gpu_host(run),
    ]


def _cpu_large(run: Run) -> list[Target]:
    promise = f"{size_label(_LARGE)}: at least {_CPU_LARGE_FRACTION} of the read limit"
    found = []
    for public in run.find(PUBLIC, size=_LARGE):
        native = run.find(NATIVE, _LARGE, public.dtype, public.threads)
        fraction = max(sample.fraction for sample in [public, *native])
        where = f"{promise} ({_conditions(public)})"
        found.append(Target(where, f"{fraction:.2f}", fraction >= _CPU_LARGE_FRACTION))
    return found or [_unknown(promise)]


def _cpu_cached(run: Run) -> list[Target]:
    found = []
    for dtype, wanted in _CACHED_FRACTIONS.items():
        conditions = join(dtype, threads_label(1))
        promise = f"{size_label(_CACHED)}: native entry at least {wanted:.2f} of the read limit ({conditions})"
        samples = run.find(NATIVE, _CACHED, dtype, threads=1)
        found.append(_at_least(promise, samples[0].fraction, wanted) if samples else _unknown(promise))
    return found


def _cpu_many(run: Run) -> list[Target]:
    promise = f"10,000 segments of 8 KiB: within {_MANY_RATIO}x of one segment"
    found = []
    for many in run.find(MANY):
        one = run.find(MANY_ONE, many.size, many.dtype, many.threads)[0]
        ratio = one.fraction / many.fraction
        found.append(Target(f"{promise} ({_conditions(many)})", f"{ratio:.2f}x", ratio <= _MANY_RATIO))
    return found or [_unknown(promise)]


def _cpu_small(run: Run) -> Target:
    promise = f"{size_label(_SMALL)}: public call below {_SMALL_MICROSECONDS:g} microseconds"
    samples = run.find(PUBLIC, size=_SMALL)
    if not samples:
        return _unknown(promise)
    worst = max(samples, key=lambda sample: sample.median_us)
    figure = f"{worst.median_us:.1f} at worst ({worst.dtype}, {worst.segments} segments)"
    return Target(promise, figure, worst.median_us < _SMALL_MICROSECONDS)


def _gpu_large(run: Run, dtype: str) -> Target:
    promise = f"{size_label(_LARGE)}: at least {_GPU_LARGE_FRACTION} of the copy limit ({dtype})"
    samples = run.find(PUBLIC, _LARGE, dtype)
    return _at_least(promise, samples[0].fraction, _GPU_LARGE_FRACTION) if samples else _unknown(promise)


def _gpu_host(run: Run) -> Target:
    """Launching decides where buckets are small."""
    promise = "host time of a public call never above that of aminmax + _foreach_norm, on all segments"
    pairs = [
        (public.host_us / peer.host_us, public, f"{public.host_us:.1f} against {peer.host_us:.1f} microseconds")
        for public, peer in _pairs(run, PUBLIC, AMINMAX_PER_SEGMENT)
        if public.host_us is not None and peer.host_us is not None
    ]
    if not pairs:
        return _unknown(promise)
    ratio, worst, times = max(pairs, key=lambda pair: pair[0])
    return Target(promise, f"{times} at worst ({_where(worst)}, {worst.segments} segments)", ratio <= 1)


def _never_slower(run: Run, ours: str, other: str, what: str, smallest: int = 0) -> Target:
    promise = f"never slower than {what}"
    ratios = [
        (sample.fraction / peer.fraction, sample)
        for sample, peer in _pairs(run, ours, other)
        if sample.size >= smallest
    ]
    if not ratios:
        return _unknown(promise)
    ratio, worst = min(ratios, key=lambda pair: pair[0])
    return Target(promise, f"{ratio:.2f}x as fast at worst ({_where(worst)})", ratio >= 1)


def _pairs(run: Run, ours: str, other: str) -> list[tuple[Sample, Sample]]:
    """The samples of two candidates under the same conditions."""
    return [
        (sample, peer)
        for sample in run.find(ours)
        for peer in run.find(other, sample.size, sample.dtype, sample.threads)
    ]


def _at_least(promise: str, fraction: float, wanted: float) -> Target:
    return Target(promise, f"{fraction:.2f}", fraction >= wanted)


def _conditions(sample: Sample) -> str:
    return join(sample.dtype, threads_label(sample.threads))


def _where(sample: Sample) -> str:
    return join(size_label(sample.size), _conditions(sample))


def _unknown(promise: str) -> Target:
    return Target(promise, "-", None)
