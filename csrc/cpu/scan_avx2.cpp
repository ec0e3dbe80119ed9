// Compiled for AVX2, FMA, F16C: vectors of 256 bits.
#include <immintrin.h>

#include "formats.h"
#include "scan.h"

namespace numguard::cpu {
namespace {

struct DoubleSums {
  __m256d low, high;
};

inline double add_all(const DoubleSums& totals) {
  const __m256d sum = _mm256_add_pd(totals.low, totals.high);
  const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(sum), _mm256_extractf128_pd(sum, 1));
  return _mm_cvtsd_f64(half) + _mm_cvtsd_f64(_mm_unpackhi_pd(half, half));
}

inline uint32_t largest_u32(__m256i peak) {
  __m128i lanes = _mm_max_epu32(_mm256_castsi256_si128(peak), _mm256_extracti128_si256(peak, 1));
  lanes = _mm_max_epu32(lanes, _mm_shuffle_epi32(lanes, 0x4e));
  lanes = _mm_max_epu32(lanes, _mm_shuffle_epi32(lanes, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(lanes));
}

inline uint16_t largest_u16(__m128i lanes) {  // by the one horizontal instruction, a minimum
  const __m128i least = _mm_minpos_epu16(_mm_xor_si128(lanes, _mm_set1_epi16(-1)));
  return static_cast<uint16_t>(~_mm_cvtsi128_si32(least));
}

inline uint16_t largest_u16(__m256i peak) {
  return largest_u16(_mm_max_epu16(_mm256_castsi256_si128(peak), _mm256_extracti128_si256(peak, 1)));
}

inline uint8_t largest_u8(__m256i peak) {
  const __m128i lanes = _mm_max_epu8(_mm256_castsi256_si128(peak), _mm256_extracti128_si256(peak, 1));
  return static_cast<uint8_t>(
      largest_u16(_mm_max_epu16(_mm_srli_epi16(lanes, 8), _mm_and_si128(lanes, _mm_set1_epi16(0xff)))));
}

inline uint64_t largest_u64(__m256i peak) {
  alignas(32) uint64_t lanes[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), peak);
  const uint64_t low = lanes[0] > lanes[1] ? lanes[0] : lanes[1], high = lanes[2] > lanes[3] ? lanes[2] : lanes[3];
  return low > high ? low : high;
}

template <class Lane>
inline int64_t add_all_lanes(__m256i counts) {
  alignas(32) Lane lanes[32 / sizeof(Lane)];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), counts);
  int64_t sum = 0;
  for (Lane lane : lanes) sum += lane;
  return sum;
}

inline __m256i load_256(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

// 32 bytes of zeros, then 32 of ones: a load at byte n is a mask of the last n bytes of a vector.
alignas(64) constexpr int8_t kLastBytes[64] = {
    0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,
    0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
    -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
};

// What there is of a vector between `from` and `end`, in its last bytes, with zeros before: loaded where the vector
// ends at `end`, for AVX2 has no masked loads of small elements. What others own is masked off.
inline __m256i load_256_before(const uint8_t* from, const uint8_t* end) {
  const int64_t left = end - from;
  const int64_t own = left < 0 ? 0 : left > 32 ? 32 : left;
  const uint8_t* const last = end - 32;
  const __m256i mask = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kLastBytes + own));
  return _mm256_and_si256(load_256(from < last ? from : last), mask);
}

// Through the stack, with zeros behind: for the exact pass.
inline __m256i load_bytes(const uint8_t* from, int bytes) {
  alignas(32) uint8_t buffer[32] = {};
  memcpy(buffer, from, static_cast<size_t>(bytes));
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(buffer));
}

// 8 elements as float bits. Magnitudes have no sign, so signed comparison orders them too.
struct WideFloat {
  using Bits = __m256i;
  using Sums = DoubleSums;
  static constexpr int kLanes = 8;
  static constexpr uint32_t kInfinity = kFloatInfinity;
  static Bits zero() { return _mm256_setzero_si256(); }
  static Bits magnitude(Bits bits) { return _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)); }
  static Bits max(Bits a, Bits b) { return _mm256_max_epu32(a, b); }
  static uint32_t mask(Bits lanes) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(lanes))); }
  static uint32_t at_least(Bits magnitude, uint32_t limit) {
    return mask(_mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(static_cast<int>(limit) - 1)));
  }
  static uint32_t sign(Bits bits) { return mask(bits); }
  static Bits clear(Bits bits, uint32_t lanes) {
    const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i chosen = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(lanes)), lane_bit);
    return _mm256_andnot_si256(_mm256_cmpeq_epi32(chosen, lane_bit), bits);
  }
  static Sums no_sums() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
  static void add_squares(Sums& sums, Bits bits) {
    const __m256 values = _mm256_castsi256_ps(bits);
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(values));
    const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(values, 1));
    sums.low = _mm256_fmadd_pd(low, low, sums.low);
    sums.high = _mm256_fmadd_pd(high, high, sums.high);
  }
  static double largest(Bits peak) { return float_from_bits(largest_u32(peak)); }
  static double total(const Sums& sums) { return add_all(sums); }
};

// Raw vectors, whatever their elements.
struct RawLanes {
  using Bits = __m256i;
  static constexpr bool kNeedsVector = true, kShifts = false;
  static Bits zero() { return _mm256_setzero_si256(); }
  static Bits load(const uint8_t* from) { return load_256(from); }
  static Bits load_before(const uint8_t* from, const uint8_t* end) { return load_256_before(from, end); }
};

// Squares in single precision within a group, groups in double.
struct FloatSums : RawLanes {
  using Wide = WideFloat;
  using Sums = __m256;
  using Totals = DoubleSums;
  static constexpr bool kInFloat = true;
  static constexpr int kSquares = 1;  // in a lane, of one vector
  static constexpr double kLow = 0;   // where no square is too small
  static Sums no_sum() { return _mm256_setzero_ps(); }
  static Sums add(Sums a, Sums b) { return _mm256_add_ps(a, b); }
  static Totals no_totals() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
  static void add_to(Totals& totals, Sums sum) {
    totals.low = _mm256_add_pd(totals.low, _mm256_cvtps_pd(_mm256_castps256_ps128(sum)));
    totals.high = _mm256_add_pd(totals.high, _mm256_cvtps_pd(_mm256_extractf128_ps(sum, 1)));
  }
  static double total(const Totals& totals) { return add_all(totals); }
};

struct Float32 : FloatSums {
  static constexpr int kBytes = 4, kLanes = 8, kUnroll = 4, kSums = 1, kDepth = 24, kBlocks = 4;
  static constexpr int64_t kMostCounted = UINT32_MAX;
  static constexpr double kLow = kSafeLow;
  static constexpr uint32_t kWideSmallestNormal = kFloat32SmallestNormal;
  static Bits load_wide(const uint8_t* from, int count) {
    return count == kLanes ? load(from) : load_bytes(from, 4 * count);
  }
  static Bits magnitude(Bits raw) { return WideFloat::magnitude(raw); }
  static Bits max(Bits a, Bits b) { return _mm256_max_epu32(a, b); }
  static void add_squares(Sums* sums, Bits raw) {
    const __m256 values = _mm256_castsi256_ps(raw);
    sums[0] = _mm256_fmadd_ps(values, values, sums[0]);
  }
  static void add_squares_at(Sums* sums, Bits raw, const uint8_t*) { add_squares(sums, raw); }
  static bool too_large(Bits peak) { return WideFloat::at_least(peak, kSafeHigh) != 0; }
  static double largest(Bits peak) { return WideFloat::largest(peak); }
  static Bits count_zero(Bits counts, Bits magnitude) {
    return _mm256_sub_epi32(counts, _mm256_cmpeq_epi32(magnitude, zero()));
  }
  static Bits count_small(Bits counts, Bits magnitude) {
    return _mm256_sub_epi32(counts, _mm256_cmpgt_epi32(_mm256_set1_epi32(kFloat32SmallestNormal), magnitude));
  }
  static int64_t add_lanes(Bits counts) { return add_all_lanes<uint32_t>(counts); }
};

// Common code of the two 16-bit formats.
template <uint16_t kLargestSubnormal>
struct Lanes16 : FloatSums {
  static constexpr int kBytes = 2, kLanes = 16, kUnroll = 4, kSums = 2, kDepth = 24, kBlocks = 4;
  static constexpr int64_t kMostCounted = UINT16_MAX;
  static __m128i load_half(const uint8_t* from, int count) {
    if (count == 8) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_si128(load_bytes(from, 2 * count));
  }
  static Bits magnitude(Bits raw) { return _mm256_and_si256(raw, _mm256_set1_epi16(0x7fff)); }
  static Bits max(Bits a, Bits b) { return _mm256_max_epu16(a, b); }
  static bool any_at_least(Bits magnitude, uint16_t limit) {
    const __m256i below = _mm256_set1_epi16(static_cast<short>(limit - 1));
    return _mm256_movemask_epi8(_mm256_cmpgt_epi16(magnitude, below)) != 0;
  }
  static Bits count_zero(Bits counts, Bits magnitude) {
    return _mm256_sub_epi16(counts, _mm256_cmpeq_epi16(magnitude, _mm256_setzero_si256()));
  }
  static Bits count_small(Bits counts, Bits magnitude) {
    return _mm256_sub_epi16(counts, _mm256_cmpgt_epi16(_mm256_set1_epi16(kLargestSubnormal + 1), magnitude));
  }
  static int64_t add_lanes(Bits counts) { return add_all_lanes<uint16_t>(counts); }
};

struct Float16 : Lanes16<kFloat16LargestSubnormal> {
  static constexpr uint32_t kWideSmallestNormal = kFloat16SmallestNormal;
  static Bits load_wide(const uint8_t* from, int count) {
    return _mm256_castps_si256(_mm256_cvtph_ps(load_half(from, count)));
  }
  static void add_squares(Sums* sums, Bits raw) {
    const __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(raw));
    const __m256 high = _mm256_cvtph_ps(_mm256_extracti128_si256(raw, 1));
    sums[0] = _mm256_fmadd_ps(low, low, sums[0]);
    sums[1] = _mm256_fmadd_ps(high, high, sums[1]);
  }
  // Two conversions that load take fewer instructions than one load, a shuffle and two conversions.
  static void add_squares_at(Sums* sums, Bits, const uint8_t* from) {
    const __m256 low = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    const __m256 high = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16)));
    sums[0] = _mm256_fmadd_ps(low, low, sums[0]);
    sums[1] = _mm256_fmadd_ps(high, high, sums[1]);
  }
  static bool too_large(Bits peak) { return any_at_least(peak, kFloat16Infinity); }
  static double largest(Bits peak) { return float_from_bits(widen_float16(largest_u16(peak))); }
};

struct BFloat16 : Lanes16<kBFloat16LargestSubnormal> {
  static constexpr double kLow = kSafeLow;
  static constexpr uint32_t kWideSmallestNormal = kFloat32SmallestNormal;
  static Bits load_wide(const uint8_t* from, int count) {
    return _mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(from, count)), 16);
  }
  static void add_squares(Sums* sums, Bits raw) {
    const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(raw, 16));
    const __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(raw, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
    sums[0] = _mm256_fmadd_ps(even, even, sums[0]);
    sums[1] = _mm256_fmadd_ps(odd, odd, sums[1]);
  }
  static void add_squares_at(Sums* sums, Bits raw, const uint8_t*) { add_squares(sums, raw); }
  static bool too_large(Bits peak) { return any_at_least(peak, kSafeHigh >> 16); }
  static double largest(Bits peak) { return float_from_bits(widen_bfloat16(largest_u16(peak))); }
};

// 4 elements of float64; AVX2 lacks the unsigned 64-bit maximum, a comparison and a blend make one.
struct Float64 : RawLanes {
  using Sums = __m256d;
  using Totals = __m256d;
  using Wide = Float64;
  static constexpr bool kInFloat = false;
  static constexpr int kBytes = 8, kLanes = 4, kUnroll = 4, kSums = 1, kSquares = 1, kDepth = 32, kBlocks = 2;
  static constexpr int64_t kMostCounted = INT64_MAX;
  static constexpr double kLow = 0;
  static constexpr uint64_t kInfinity = kDoubleInfinity;
  static constexpr uint64_t kWideSmallestNormal = kFloat64SmallestNormal;
  static Bits load_wide(const uint8_t* from, int count) {
    return count == kLanes ? load(from) : load_bytes(from, 8 * count);
  }
  static Bits magnitude(Bits raw) { return _mm256_and_si256(raw, _mm256_set1_epi64x(0x7fffffffffffffffll)); }
  static Bits max(Bits a, Bits b) { return _mm256_blendv_epi8(a, b, _mm256_cmpgt_epi64(b, a)); }
  static uint32_t mask(Bits lanes) { return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(lanes))); }
  static uint32_t at_least(Bits magnitude, uint64_t limit) {
    return mask(_mm256_cmpgt_epi64(magnitude, _mm256_set1_epi64x(static_cast<long long>(limit) - 1)));
  }
  static uint32_t sign(Bits bits) { return mask(bits); }
  static Bits clear(Bits bits, uint32_t lanes) {
    const __m256i lane_bit = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i chosen = _mm256_and_si256(_mm256_set1_epi64x(lanes), lane_bit);
    return _mm256_andnot_si256(_mm256_cmpeq_epi64(chosen, lane_bit), bits);
  }
  static Sums no_sum() { return _mm256_setzero_pd(); }
  static Sums no_sums() { return no_sum(); }
  static Totals no_totals() { return no_sum(); }
  static void add_squares(Sums* sums, Bits raw) { add_squares(sums[0], raw); }
  static void add_squares(Sums& sums, Bits raw) {
    sums = _mm256_fmadd_pd(_mm256_castsi256_pd(raw), _mm256_castsi256_pd(raw), sums);
  }
  static void add_squares_at(Sums* sums, Bits raw, const uint8_t*) { add_squares(sums, raw); }
  static Sums add(Sums a, Sums b) { return _mm256_add_pd(a, b); }
  static void add_to(Totals& totals, Sums sum) { totals = _mm256_add_pd(totals, sum); }
  static double total(const Totals& totals) { return add_all({totals, _mm256_setzero_pd()}); }
  static bool too_large(Bits peak) { return at_least(peak, kInfinity) != 0; }
  static double largest(Bits peak) { return double_from_bits(largest_u64(peak)); }
  static Bits count_zero(Bits counts, Bits magnitude) {
    return _mm256_sub_epi64(counts, _mm256_cmpeq_epi64(magnitude, zero()));
  }
  static Bits count_small(Bits counts, Bits magnitude) {
    const __m256i normal = _mm256_set1_epi64x(static_cast<long long>(kFloat64SmallestNormal));
    return _mm256_sub_epi64(counts, _mm256_cmpgt_epi64(normal, magnitude));
  }
  static int64_t add_lanes(Bits counts) { return add_all_lanes<uint64_t>(counts); }
};

// Common code of the two 8-bit formats: 32 raw bytes become four vectors of float by way of float16.
template <uint8_t kLargestSubnormal>
struct Lanes8 : FloatSums {
  static constexpr int kBytes = 1, kLanes = 32, kUnroll = 1, kSums = 4, kDepth = 24, kBlocks = 4;
  static constexpr int64_t kMostCounted = UINT8_MAX;
  static __m128i load_as_16(const uint8_t* from, int count) {
    return _mm_cvtepu8_epi16(_mm256_castsi256_si128(load_bytes(from, count)));
  }
  static Bits magnitude(Bits raw) { return _mm256_and_si256(raw, _mm256_set1_epi8(0x7f)); }
  static Bits max(Bits a, Bits b) { return _mm256_max_epu8(a, b); }
  static bool any_at_least(Bits magnitude, uint8_t limit) {
    const __m256i below = _mm256_set1_epi8(static_cast<char>(limit - 1));
    return _mm256_movemask_epi8(_mm256_cmpgt_epi8(magnitude, below)) != 0;
  }
  static void add_half_squares(Sums* sums, __m256i halves) {
    const __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    const __m256 high = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
    sums[0] = _mm256_fmadd_ps(low, low, sums[0]);
    sums[1] = _mm256_fmadd_ps(high, high, sums[1]);
  }
  static Bits count_zero(Bits counts, Bits magnitude) {
    return _mm256_sub_epi8(counts, _mm256_cmpeq_epi8(magnitude, _mm256_setzero_si256()));
  }
  static Bits count_small(Bits counts, Bits magnitude) {
    return _mm256_sub_epi8(counts, _mm256_cmpgt_epi8(_mm256_set1_epi8(kLargestSubnormal + 1), magnitude));
  }
  static int64_t add_lanes(Bits counts) { return add_all_lanes<uint8_t>(counts); }
};

struct Float8E5M2 : Lanes8<kFloat8E5M2LargestSubnormal> {
  static constexpr uint32_t kWideSmallestNormal = kFloat16SmallestNormal;
  static Bits load_wide(const uint8_t* from, int count) {
    return _mm256_castps_si256(_mm256_cvtph_ps(_mm_slli_epi16(load_as_16(from, count), 8)));
  }
  static void add_squares(Sums* sums, Bits raw) {
    add_half_squares(sums, _mm256_slli_epi16(raw, 8));
    add_half_squares(sums + 2, _mm256_and_si256(raw, _mm256_set1_epi16(static_cast<short>(0xff00))));
  }
  static void add_squares_at(Sums* sums, Bits raw, const uint8_t*) { add_squares(sums, raw); }
  static bool too_large(Bits peak) { return any_at_least(peak, kFloat8E5M2Infinity); }
  static double largest(Bits peak) { return float_from_bits(widen_float8_e5m2(largest_u8(peak))); }
};

struct Float8E4M3FN : Lanes8<kFloat8E4M3FNLargestSubnormal> {
  static constexpr uint32_t kWideSmallestNormal = kFloat8E4M3FNSmallestNormal;
  static Bits load_wide(const uint8_t* from, int count) {
    const __m128i raw = load_as_16(from, count);
    const __m128i magnitude = _mm_and_si128(raw, _mm_set1_epi16(0x7f));
    const __m128i sign = _mm_slli_epi16(_mm_and_si128(raw, _mm_set1_epi16(0x80)), 8);
    const __m256 scaled = _mm256_cvtph_ps(_mm_or_si128(sign, _mm_slli_epi16(magnitude, 7)));
    const __m256i values = _mm256_castps_si256(_mm256_mul_ps(scaled, _mm256_set1_ps(256.0f)));
    const __m256i is_nan = _mm256_cvtepi16_epi32(_mm_cmpeq_epi16(magnitude, _mm_set1_epi16(kFloat8E4M3FNNan)));
    return _mm256_or_si256(values, _mm256_and_si256(is_nan, _mm256_set1_epi32(0x7fc00000)));
  }
  static void add_squares(Sums* sums, Bits raw) {
    add_half_squares(sums, _mm256_slli_epi16(_mm256_and_si256(raw, _mm256_set1_epi16(0x007f)), 7));
    add_half_squares(sums + 2, _mm256_srli_epi16(_mm256_and_si256(raw, _mm256_set1_epi16(0x7f00)), 1));
  }
  static void add_squares_at(Sums* sums, Bits raw, const uint8_t*) { add_squares(sums, raw); }
  static void add_to(Totals& totals, Sums sum) {
    FloatSums::add_to(totals, _mm256_mul_ps(sum, _mm256_set1_ps(kFloat8E4M3FNSquareScale)));
  }
  static bool too_large(Bits peak) { return any_at_least(peak, kFloat8E4M3FNNan); }
  static double largest(Bits peak) { return float_from_bits(widen_float8_e4m3fn(largest_u8(peak))); }
};

inline uint64_t read_rest(__m256i* sums, const uint8_t* data, int64_t bytes, int64_t at) {
  for (int k = 1; k < 8; ++k) sums[0] = _mm256_or_si256(sums[0], sums[k]);
  uint64_t rest = 0;
  for (; at < bytes; ++at) rest += data[at];
  return rest + static_cast<uint64_t>(add_all_lanes<uint64_t>(sums[0]));
}

inline void read_part(__m256i* sums, const uint8_t* data, int64_t bytes) {
#pragma GCC unroll 1
  for (int64_t at = 0; at < bytes; at += 256)
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) sums[k] = _mm256_or_si256(sums[k], load_256(data + at + 32 * k));
}

uint64_t read(const uint8_t* data, int64_t bytes) {
  __m256i sums[8] = {};
  read_part(sums, data, bytes / 256 * 256);
  return read_rest(sums, data, bytes, bytes / 256 * 256);
}

uint64_t read_prefetched(const uint8_t* data, int64_t bytes) {
  __m256i sums[8] = {};
  int64_t at = 0;
  for (; at + 256 <= bytes; at += 256) {
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
      if (k % 2 == 0) __builtin_prefetch(data + at + 32 * k + kPrefetchBytes);
      sums[k] = _mm256_or_si256(sums[k], load_256(data + at + 32 * k));
    }
  }
  return read_rest(sums, data, bytes, at);
}

// As scan_streams does, in places that lie a part of `bytes` apart.
uint64_t read_streams(const uint8_t* data, int64_t bytes) {
  __m256i sums[8] = {};
  const int64_t part = bytes / kStreams / kTurnBytes * kTurnBytes;
  for (int64_t at = 0; at < part; at += kTurnBytes)
    for (int k = 0; k < kStreams; ++k) read_part(sums, data + k * part + at, kTurnBytes);
  return read_rest(sums, data, bytes, kStreams * part);
}

}  // namespace

const Kernels kAvx2 = {
    {scanner<Float32, false>, scanner<Float16, false>, scanner<BFloat16, false>, scanner<Float64, false>,
     scanner<Float8E4M3FN, false>, scanner<Float8E5M2, false>},
    {scanner<Float32, true>, scanner<Float16, true>, scanner<BFloat16, true>, scanner<Float64, true>,
     scanner<Float8E4M3FN, true>, scanner<Float8E5M2, true>},
    {read, read_prefetched, read_streams},
};

}  // namespace numguard::cpu
