# The language of @triton.jit resembles Python only; its types are Triton's own.
# mypy: ignore-errors
"""The GPU kernels, in Triton: from chunks of memory to records, and from the records of a segment to one.

The largest magnitude of a chunk is kept with NaN carried along, so one maximum is both the absolute maximum and the
test for NaN and Inf; squares are added in single precision. Only a chunk whose maximum shows that this was not exact
is read again, from cache, with everything counted.

Results are the same bits as those of csrc/cuda/kernels.cuh, on any GPU and in the interpreter: which element goes to
which lane depends on its address alone, lanes are added as a tree of neighbours, and no product that rounds is fused
into an addition (the launcher switches that off).

Formats are identified by their number of mantissa bits. A record is eight int64 words, those of
`records.RECORD_FIELDS`; floats are written as bits.
"""

import triton
import triton.language as tl

ALIGNMENT = tl.constexpr(32)  # bytes: one sector of DRAM, and the widest load of any GPU


@triton.jit(do_not_specialize=["base", "first_chunk"])
def chunk_kernel(
    base: tl.int64,  # added to every address
    addresses_ptr,  # int64 [segments]: where each begins, in bytes from `base`
    chunks_ptr,  # int32 [chunks, 4]: segment, number inside the segment, length in elements, row of its record
    records_ptr,  # int64 [rows, 8]
    first_chunk: tl.int32,  # the chunk of program 0
    BITS: tl.constexpr,  # integer type of an element
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    INFINITY: tl.constexpr,  # bits of the smallest magnitude that is not a number
    HAS_INF: tl.constexpr,
    SAFE_LOW: tl.constexpr,  # squares are safe if the chunk's maximum, as `_widened`, is 0 or in [low, high)
    SAFE_HIGH: tl.constexpr,
    SCALE: tl.constexpr,  # of a value, over the value as `_widened`
    DETAIL: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    RESCAN_BLOCK: tl.constexpr,
):
    """Writes the record of one chunk, which lies inside one segment.

    Segments of a bucket begin anywhere, but wide loads must not: the compiler splits them into single elements unless
    it can prove the address and the mask aligned. So the chunk is cut into a head (up to the first aligned address),
    an interior of whole vectors, and a tail; head and tail, each shorter than a vector, share one load.
    """
    ITEM: tl.constexpr = BITS.primitive_bitwidth // 8
    VECTOR: tl.constexpr = ALIGNMENT // ITEM

    row_of_chunk = chunks_ptr + 4 * (first_chunk + tl.program_id(0).to(tl.int64))
    segment = tl.load(row_of_chunk).to(tl.int64)
    begin = tl.load(row_of_chunk + 1).to(tl.int64) * CHUNK
    length = tl.load(row_of_chunk + 2)
    record = records_ptr + 8 * tl.load(row_of_chunk + 3).to(tl.int64)
    address = base + tl.load(addresses_ptr + segment) + begin * ITEM
    data = address.to(tl.pointer_type(BITS))

    aligned_address = (address + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    aligned = tl.multiple_of(aligned_address.to(tl.pointer_type(BITS)), ALIGNMENT)
    head = tl.minimum(((aligned_address - address) // ITEM).to(tl.int32), length)
    interior = (length - head) // VECTOR * VECTOR
    full = interior // BLOCK * BLOCK

    lane = tl.arange(0, BLOCK)
    peaks, sums, counts = _nothing(BLOCK, MANTISSA)
    for offset in tl.range(0, full, BLOCK, loop_unroll_factor=UNROLL):
        raw = tl.load(aligned + offset + lane, eviction_policy="evict_first")
        peaks, sums, counts = _take(raw, peaks, sums, counts, EXPONENT, MANTISSA, DETAIL)
    raw = tl.load(aligned + full + lane, mask=lane < interior - full, other=0)
    peaks, sums, counts = _take(raw, peaks, sums, counts, EXPONENT, MANTISSA, DETAIL)

    edge = tl.arange(0, 2 * VECTOR)
    in_tail = edge >= VECTOR
    edge_index = tl.where(in_tail, edge - VECTOR + head + interior, edge)
    edge_end = tl.where(in_tail, length, head)
    raw = tl.load(data + edge_index, mask=edge_index < edge_end, other=0)
    edge_peaks, edge_sums, edge_counts = _nothing(2 * VECTOR, MANTISSA)
    edge_peaks, edge_sums, edge_counts = _take(raw, edge_peaks, edge_sums, edge_counts, EXPONENT, MANTISSA, DETAIL)

    peak = tl.maximum(_largest(peaks), _largest(edge_peaks)).to(sums.dtype, bitcast=True)
    if (peak == 0) | ((peak >= SAFE_LOW) & (peak < SAFE_HIGH)):
        if DETAIL:
            both = tl.sum(counts.to(tl.int64)) + tl.sum(edge_counts.to(tl.int64))
            n_zeros = both & 0xFFFF
            n_subnormals = (both >> 16) - n_zeros
            n_zeros -= full + BLOCK + 2 * VECTOR - length  # lanes that the masks filled up
        else:
            n_zeros = 0
            n_subnormals = 0
        sumsq = _tree_sum(sums.to(tl.float64)) + _tree_sum(edge_sums.to(tl.float64))
        absmax = peak.to(tl.float64) * SCALE
        _write(record, 0, 0, 0, n_zeros, n_subnormals, -1, absmax, sumsq * (SCALE * SCALE))
    else:
        _write_exact(
            record,
            data,
            length,
            begin,
            BITS,
            EXPONENT,
            MANTISSA,
            INFINITY,
            HAS_INF,
            DETAIL,
            RESCAN_BLOCK,
        )


@triton.jit
def combine_kernel(
    splits_ptr,  # int32 [splits, 3]: a segment of several chunks, the first row of theirs, and the one after the last
    records_ptr,  # int64 [rows, 8]
    BLOCK: tl.constexpr,
):
    """Writes the record of one segment: its chunks', merged in an order fixed by their number."""
    NOWHERE: tl.constexpr = 0x7FFFFFFFFFFFFFFF
    split = splits_ptr + 3 * tl.program_id(0).to(tl.int64)
    segment = tl.load(split).to(tl.int64)
    first_row = tl.load(split + 1)
    end = tl.load(split + 2)
    lane = tl.arange(0, BLOCK)
    nan = tl.zeros([BLOCK], tl.int64)
    pos_inf = tl.zeros([BLOCK], tl.int64)
    neg_inf = tl.zeros([BLOCK], tl.int64)
    zeros = tl.zeros([BLOCK], tl.int64)
    subnormals = tl.zeros([BLOCK], tl.int64)
    first = tl.full([BLOCK], NOWHERE, tl.int64)
    absmax_bits = tl.zeros([BLOCK], tl.int64)
    sumsq = tl.zeros([BLOCK], tl.float64)
    for row in range(first_row, end, BLOCK):
        live = row + lane < end
        part = records_ptr + 8 * (row + lane).to(tl.int64)
        nan += tl.load(part, mask=live, other=0)
        pos_inf += tl.load(part + 1, mask=live, other=0)
        neg_inf += tl.load(part + 2, mask=live, other=0)
        zeros += tl.load(part + 3, mask=live, other=0)
        subnormals += tl.load(part + 4, mask=live, other=0)
        found = tl.load(part + 5, mask=live, other=-1)
        first = tl.minimum(first, tl.where(found < 0, NOWHERE, found))
        absmax_bits = tl.maximum(absmax_bits, tl.load(part + 6, mask=live, other=0))
        sumsq += tl.load(part + 7, mask=live, other=0).to(tl.float64, bitcast=True)
    earliest = tl.min(first)
    _write(
        records_ptr + 8 * segment,
        tl.sum(nan),
        tl.sum(pos_inf),
        tl.sum(neg_inf),
        tl.sum(zeros),
        tl.sum(subnormals),
        tl.where(earliest == NOWHERE, -1, earliest),
        tl.max(absmax_bits).to(tl.float64, bitcast=True),
        _tree_sum(sumsq),
    )


@triton.jit
def _nothing(LANES: tl.constexpr, MANTISSA: tl.constexpr):
    """Empty state of each lane: no maximum, no squares, nothing counted."""
    number: tl.constexpr = tl.float64 if MANTISSA == 52 else tl.float32
    peaks = tl.zeros([LANES], tl.int64 if MANTISSA == 52 else tl.float32)
    return peaks, tl.zeros([LANES], number), tl.zeros([LANES], tl.int32)


@triton.jit
def _take(
    raw,
    peaks,
    sums,
    counts,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    DETAIL: tl.constexpr,
):
    """Adds raw elements to the running maximum, squares and counts of each lane.

    A count has zeros in its lower half, and zeros and subnormals in its upper one: one register in place of two, and a
    chunk has fewer than 2^16 elements.
    """
    magnitude = _magnitude(raw, EXPONENT, MANTISSA)
    value = _widened(magnitude, MANTISSA)
    if MANTISSA == 52:  # no instruction finds the maximum of two doubles and keeps NaN; as integers they order alike
        peaks = tl.maximum(peaks, magnitude)
    else:
        peaks = tl.maximum(peaks, value, propagate_nan=tl.PropagateNan.ALL)
    if MANTISSA < 23:  # the product is exact, so that fused or not the result is the same
        sums = tl.fma(value, value, sums)
    else:
        sums += value * value
    if DETAIL:
        counts += (magnitude == 0).to(tl.int32) + ((magnitude < (1 << MANTISSA)).to(tl.int32) << 16)
    return peaks, sums, counts


@triton.jit
def _write_exact(
    record,
    data,
    length,
    begin,
    BITS: tl.constexpr,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    INFINITY: tl.constexpr,
    HAS_INF: tl.constexpr,
    DETAIL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the record of a chunk with everything counted, and squares in double."""
    SMALLEST_NORMAL: tl.constexpr = 1 << MANTISSA
    NOWHERE: tl.constexpr = 0x7FFFFFFF
    lane = tl.arange(0, BLOCK)
    nan = tl.zeros([BLOCK], tl.int32)
    pos_inf = tl.zeros([BLOCK], tl.int32)
    neg_inf = tl.zeros([BLOCK], tl.int32)
    zeros = tl.zeros([BLOCK], tl.int32)
    subnormals = tl.zeros([BLOCK], tl.int32)
    first = tl.full([BLOCK], NOWHERE, tl.int32)
    peaks = tl.zeros([BLOCK], BITS)
    sums = tl.zeros([BLOCK], tl.float64)
    for offset in range(0, length, BLOCK):
        index = offset + lane
        live = index < length
        raw = tl.load(data + index, mask=live, other=0)
        magnitude = _magnitude(raw, EXPONENT, MANTISSA)
        bad = magnitude >= INFINITY
        infinite = bad & (magnitude == INFINITY) & HAS_INF
        nan += (bad & ~infinite).to(tl.int32)
        pos_inf += (infinite & (raw >= 0)).to(tl.int32)
        neg_inf += (infinite & (raw < 0)).to(tl.int32)
        first = tl.minimum(first, tl.where(bad, index, NOWHERE))
        if DETAIL:
            zeros += (live & (magnitude == 0)).to(tl.int32)
            subnormals += ((magnitude > 0) & (magnitude < SMALLEST_NORMAL)).to(tl.int32)
        finite = tl.where(bad, tl.zeros_like(magnitude), magnitude)
        peaks = tl.maximum(peaks, finite)
        value = _decode(finite, EXPONENT, MANTISSA)
        sums += value * value
    earliest = tl.min(first)
    _write(
        record,
        tl.sum(nan),
        tl.sum(pos_inf),
        tl.sum(neg_inf),
        tl.sum(zeros),
        tl.sum(subnormals),
        tl.where(earliest == NOWHERE, -1, begin + earliest),
        _decode(tl.max(peaks), EXPONENT, MANTISSA),
        _tree_sum(sums),
    )


@triton.jit
def _write(record, nan, pos_inf, neg_inf, zeros, subnormals, first, absmax, sumsq):
    tl.store(record, nan)
    tl.store(record + 1, pos_inf)
    tl.store(record + 2, neg_inf)
    tl.store(record + 3, zeros)
    tl.store(record + 4, subnormals)
    tl.store(record + 5, first)
    tl.store(record + 6, absmax.to(tl.int64, bitcast=True))
    tl.store(record + 7, sumsq.to(tl.int64, bitcast=True))


@triton.jit
def _magnitude(raw, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    """All bits but the sign."""
    return raw & ((1 << (EXPONENT + MANTISSA)) - 1)


@triton.jit
def _widened(magnitude, MANTISSA: tl.constexpr):
    """The value in the precision of the sums, divided by SCALE: 256 for e4m3fn, whose bias is 8 less than float16's.

    The hardware widens float16; float8 have its mantissa but for the length. NaN of e4m3fn becomes a number that is
    larger than all others.
    """
    if MANTISSA == 52:
        value = magnitude.to(tl.float64, bitcast=True)
    elif MANTISSA == 23:
        value = magnitude.to(tl.float32, bitcast=True)
    elif MANTISSA == 7:
        value = (magnitude.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif MANTISSA == 10:
        value = magnitude.to(tl.float16, bitcast=True).to(tl.float32)
    elif MANTISSA == 2:
        value = (magnitude.to(tl.int16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = (magnitude.to(tl.int16) << 7).to(tl.float16, bitcast=True).to(tl.float32)
    return value


@triton.jit
def _largest(peaks):
    """Bits of the largest: as integers, magnitudes order as they do as numbers, and NaN comes last."""
    return tl.max(peaks.to(tl.int32 if peaks.dtype == tl.float32 else tl.int64, bitcast=True))


@triton.jit
def _tree_sum(x):
    """Adds neighbours until one is left. The order of `tl.sum` depends on the compiler's choice of a layout."""
    if x.shape[0] == 1:
        return tl.sum(x)
    else:
        return _tree_sum(tl.sum(tl.reshape(x, [x.shape[0] // 2, 2]), axis=1))


@triton.jit
def _decode(magnitude, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    """float64: the value of finite magnitudes, whatever the hardware does with subnormals."""
    if MANTISSA == 52:
        value = magnitude.to(tl.float64, bitcast=True)
    else:
        bits = magnitude.to(tl.int32)
        exponent = bits >> MANTISSA
        fraction = bits & ((1 << MANTISSA) - 1)
        significand = tl.where(exponent > 0, fraction + (1 << MANTISSA), fraction)
        power = tl.maximum(exponent, 1) + (1 - (1 << (EXPONENT - 1)) - MANTISSA)
        scale = ((power + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)
        value = significand.to(tl.float64) * scale
    return value
