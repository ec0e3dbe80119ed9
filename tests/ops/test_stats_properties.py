"""The kernels against the oracle, on any bits that a tensor may hold and any layout."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stats import assert_records

import hallo_numguard as ng
from hallo_numguard.ops.backends import reference
from hallo_numguard.ops.formats import FORMATS

from backends import NATIVE, forced_backend
from cases import from_bits

DTYPES = list(FORMATS)
SIZES = st.sampled_from([0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 500, 1023, 1024, 1025, 2049, 5000])

pytestmark = pytest.mark.skipif(not NATIVE, reason="the extension was not built")
fixed = functools.partial(settings, derandomize=True, deadline=None, database=None)


@st.composite
def buckets(draw: st.DrawFn) -> tuple[torch.Tensor, list[int]]:
    """A flat tensor of arbitrary bits, more of them special than chance would give; and offsets."""
    dtype = draw(st.sampled_from(DTYPES))
    sizes = draw(st.lists(SIZES, max_size=6))
    start, padding = draw(st.integers(0, 40)), draw(st.integers(0, 5))
    offsets = list(itertools.accumulate(sizes, initial=start))
    size = offsets[-1] + padding

    spec = FORMATS[dtype]
    width = 8 * dtype.itemsize
    infinity, normal = spec.infinity, spec.smallest_normal
    nan = infinity + 1 if spec.has_inf else infinity
    special = st.sampled_from([0, 1, normal - 1, normal, infinity - 1, infinity, nan, spec.magnitude_mask])
    anything = st.integers(0, (1 << (width - 1)) - 1)
    # A narrow range of exponents is what real tensors have, and what the fast paths are for.
    shift = draw(st.integers(0, spec.exponent - 1))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    bits = torch.randint(-(2**62), 2**62, (size,), generator=random) >> (62 - width + 1)
    one_exponent = draw(anything) & spec.magnitude_mask & ~((spec.smallest_normal << shift) - 1)
    sign_and_rest = ~spec.magnitude_mask | ((spec.smallest_normal << shift) - 1)
    if draw(st.booleans()):
        bits = (bits & sign_and_rest) | one_exponent
    if size > 0:
        for position in draw(st.lists(st.integers(0, size - 1), max_size=4)):
            bits[position] = draw(special | anything) * draw(st.sampled_from([1, -1]))
    return from_bits(bits, dtype), offsets


@pytest.mark.parametrize("backend", NATIVE)
@fixed(max_examples=500)
@given(bucket=buckets())
def test_any_bits_in_any_layout(backend: str, bucket: tuple[torch.Tensor, list[int]]) -> None:
    flat, offsets = bucket
    oracle = ng.StatsTable(reference.tensor_stats(flat, ng.Layout(offsets), detail=True), detail=True).to_host()
    segments = [flat[begin:end] for begin, end in itertools.pairwise(offsets)]
    with forced_backend(backend):
        assert_records(ng.tensor_stats(flat, offsets, detail=True), oracle, backend)
        assert_records(ng.multi_tensor_stats(segments, detail=True), oracle, backend)


@pytest.mark.parametrize("backend", NATIVE)
@fixed(max_examples=200)
@given(bucket=buckets(), cut=st.floats(0, 1))
def test_two_halves_add_up_to_the_whole(backend: str, bucket: tuple[torch.Tensor, list[int]], cut: float) -> None:
    flat, _ = bucket
    middle = int(cut * flat.numel())
    with forced_backend(backend):
        left, right, whole = ng.multi_tensor_stats([flat[:middle], flat[middle:], flat], detail=True).to_host()
    assert whole.nan == left.nan + right.nan
    assert whole.nonfinite == left.nonfinite + right.nonfinite
    assert whole.zeros == left.zeros + right.zeros
    assert whole.subnormals == left.subnormals + right.subnormals
    assert whole.absmax == max(left.absmax, right.absmax)
    first = right.first_nonfinite + middle if right.nonfinite else -1
    assert whole.first_nonfinite == (left.first_nonfinite if left.nonfinite else first)
