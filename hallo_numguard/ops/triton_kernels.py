# The language of @triton.jit only looks like Python; its types are Triton's own.
# mypy: ignore-errors
"""The GPU kernels, in Triton: chunks of memory to partial records, and those to records.

As on the CPU (csrc/cpu/scan.h): the bits of a float without their sign order like integers, so an
integer maximum is both the absolute maximum and the test for NaN and Inf, and squares are added in
single precision. Only a chunk whose maximum says that this was not exact is read again, from cache,
with everything counted.

A format is told apart by its number of mantissa bits, which no two share. A record is eight int64
words, those of `records.RECORD_FIELDS`; floats are written and compared as bits.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["base", "first_chunk"])
def chunk_kernel(
    base,  # int64: added to every address
    addresses_ptr,  # int64 [segments]: where each begins, in bytes from `base`
    chunks_ptr,  # int32 [chunks, 3]: segment, number inside the segment, length in elements
    partials_ptr,  # int64 [chunks, 8]: a record a chunk
    first_chunk,  # the chunk of program 0
    BITS: tl.constexpr,  # integer type of an element
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    INFINITY: tl.constexpr,  # bits of the smallest magnitude that is not a number
    HAS_INF: tl.constexpr,
    SAFE_LOW: tl.constexpr,  # bits: squares are safe if the chunk's maximum is 0 or in [low, high)
    SAFE_HIGH: tl.constexpr,
    DETAIL: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    RESCAN_BLOCK: tl.constexpr,
):
    """Writes the record of one chunk, which lies inside one segment.

    Segments of a bucket begin anywhere, but a load of 16 bytes must not: the compiler splits it
    into single elements unless it can prove the address and the mask aligned. So the chunk is cut
    into a head (up to the first address that 16 divides), an interior of whole 16-byte vectors, and
    a tail; head and tail, each shorter than a vector, share one load.
    """
    ITEM: tl.constexpr = BITS.primitive_bitwidth // 8
    VECTOR: tl.constexpr = 16 // ITEM

    chunk = first_chunk + tl.program_id(0).to(tl.int64)
    segment = tl.load(chunks_ptr + 3 * chunk).to(tl.int64)
    begin = tl.load(chunks_ptr + 3 * chunk + 1).to(tl.int64) * CHUNK
    length = tl.load(chunks_ptr + 3 * chunk + 2)
    address = base + tl.load(addresses_ptr + segment) + begin * ITEM
    data = address.to(tl.pointer_type(BITS))

    aligned_address = (address + 15) // 16 * 16
    aligned = tl.multiple_of(aligned_address.to(tl.pointer_type(BITS)), 16)
    head = tl.minimum(((aligned_address - address) // ITEM).to(tl.int32), length)
    interior = (length - head) // VECTOR * VECTOR
    full = interior // BLOCK * BLOCK

    lane = tl.arange(0, BLOCK)
    peaks = tl.zeros([BLOCK], BITS)
    sums = _no_sums(BLOCK, MANTISSA)
    zeros = tl.zeros([BLOCK], tl.int32)
    small = tl.zeros([BLOCK], tl.int32)  # zero or subnormal
    for offset in tl.range(0, full, BLOCK, loop_unroll_factor=UNROLL):
        raw = tl.load(aligned + offset + lane, eviction_policy="evict_first")
        peaks, sums, zeros, small = _take(raw, peaks, sums, zeros, small, EXPONENT, MANTISSA, DETAIL)
    raw = tl.load(aligned + full + lane, mask=lane < interior - full, other=0)
    peaks, sums, zeros, small = _take(raw, peaks, sums, zeros, small, EXPONENT, MANTISSA, DETAIL)

    edge = tl.arange(0, 2 * VECTOR)
    in_tail = edge >= VECTOR
    edge_index = tl.where(in_tail, edge - VECTOR + head + interior, edge)
    edge_end = tl.where(in_tail, length, head)
    raw = tl.load(data + edge_index, mask=edge_index < edge_end, other=0)
    none = tl.zeros([2 * VECTOR], tl.int32)
    edge_peaks, edge_sums, edge_zeros, edge_small = _take(
        raw, none.to(BITS), _no_sums(2 * VECTOR, MANTISSA), none, none, EXPONENT, MANTISSA, DETAIL
    )

    peak = tl.maximum(tl.max(peaks), tl.max(edge_peaks))
    record = partials_ptr + 8 * chunk
    if (peak >= SAFE_HIGH) | ((peak > 0) & (peak < SAFE_LOW)):
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
    else:
        n_zeros = tl.sum(zeros) + tl.sum(edge_zeros)
        n_subnormals = tl.sum(small) + tl.sum(edge_small) - n_zeros
        if DETAIL:
            n_zeros -= full + BLOCK + 2 * VECTOR - length  # lanes that the masks filled up
        sumsq = tl.sum(sums.to(tl.float64)) + tl.sum(edge_sums.to(tl.float64))
        absmax = _decode(peak, EXPONENT, MANTISSA).to(tl.int64, bitcast=True)
        _write(record, 0, 0, 0, n_zeros, n_subnormals, -1, absmax, sumsq)


@triton.jit
def combine_kernel(
    partials_ptr,  # int64 [chunks, 8]
    bounds_ptr,  # int32 [segments, 2]: the segment's first chunk, and the one after its last
    records_ptr,  # int64 [segments, 8]
    BLOCK: tl.constexpr,
):
    """Writes the record of one segment: its chunks', merged in an order fixed by their number."""
    NOWHERE: tl.constexpr = 0x7FFFFFFFFFFFFFFF
    segment = tl.program_id(0).to(tl.int64)
    first_chunk = tl.load(bounds_ptr + 2 * segment)
    end = tl.load(bounds_ptr + 2 * segment + 1)
    lane = tl.arange(0, BLOCK)
    nan = tl.zeros([BLOCK], tl.int64)
    pos_inf = tl.zeros([BLOCK], tl.int64)
    neg_inf = tl.zeros([BLOCK], tl.int64)
    zeros = tl.zeros([BLOCK], tl.int64)
    subnormals = tl.zeros([BLOCK], tl.int64)
    first = tl.full([BLOCK], NOWHERE, tl.int64)
    absmax_bits = tl.zeros([BLOCK], tl.int64)
    sumsq = tl.zeros([BLOCK], tl.float64)
    for chunk in range(first_chunk, end, BLOCK):
        live = chunk + lane < end
        partial = partials_ptr + 8 * (chunk + lane).to(tl.int64)
        nan += tl.load(partial, mask=live, other=0)
        pos_inf += tl.load(partial + 1, mask=live, other=0)
        neg_inf += tl.load(partial + 2, mask=live, other=0)
        zeros += tl.load(partial + 3, mask=live, other=0)
        subnormals += tl.load(partial + 4, mask=live, other=0)
        found = tl.load(partial + 5, mask=live, other=-1)
        first = tl.minimum(first, tl.where(found < 0, NOWHERE, found))
        absmax_bits = tl.maximum(absmax_bits, tl.load(partial + 6, mask=live, other=0))
        sumsq += tl.load(partial + 7, mask=live, other=0).to(tl.float64, bitcast=True)
    earliest = tl.min(first)
    _write(
        records_ptr + 8 * segment,
        tl.sum(nan),
        tl.sum(pos_inf),
        tl.sum(neg_inf),
        tl.sum(zeros),
        tl.sum(subnormals),
        tl.where(earliest == NOWHERE, -1, earliest),
        tl.max(absmax_bits),
        tl.sum(sumsq),
    )


@triton.jit
def _take(
    raw,
    peaks,
    sums,
    zeros,
    small,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    DETAIL: tl.constexpr,
):
    """Adds raw elements to the running maximum, squares and counts of each lane."""
    magnitude = _magnitude(raw, EXPONENT, MANTISSA)
    if DETAIL:
        zeros += (magnitude == 0).to(tl.int32)
        small += (magnitude < (1 << MANTISSA)).to(tl.int32)
    return tl.maximum(peaks, magnitude), _add_squares(sums, magnitude, MANTISSA), zeros, small


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
    absmax = _decode(tl.max(peaks), EXPONENT, MANTISSA)
    _write(
        record,
        tl.sum(nan),
        tl.sum(pos_inf),
        tl.sum(neg_inf),
        tl.sum(zeros),
        tl.sum(subnormals),
        tl.where(earliest == NOWHERE, -1, begin + earliest),
        absmax.to(tl.int64, bitcast=True),
        tl.sum(sums),
    )


@triton.jit
def _write(record, nan, pos_inf, neg_inf, zeros, subnormals, first, absmax_bits, sumsq):
    tl.store(record, nan)
    tl.store(record + 1, pos_inf)
    tl.store(record + 2, neg_inf)
    tl.store(record + 3, zeros)
    tl.store(record + 4, subnormals)
    tl.store(record + 5, first)
    tl.store(record + 6, absmax_bits)
    tl.store(record + 7, sumsq.to(tl.int64, bitcast=True))


@triton.jit
def _magnitude(raw, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    """All bits but the sign."""
    return raw & ((1 << (EXPONENT + MANTISSA)) - 1)


@triton.jit
def _no_sums(LANES: tl.constexpr, MANTISSA: tl.constexpr):
    return tl.zeros([LANES], tl.float64 if MANTISSA == 52 else tl.float32)


@triton.jit
def _add_squares(sums, magnitude, MANTISSA: tl.constexpr):
    """Adds the squares in the precision of the sums; the hardware widens float8 and float16."""
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
    else:  # e4m3fn has float16's mantissa but for its length, and a bias that is 8 less
        value = (magnitude.to(tl.int16) << 7).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return sums + value * value


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
