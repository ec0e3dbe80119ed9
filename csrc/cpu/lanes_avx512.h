// Vectors of 512 bits: AVX-512 F, BW, DQ, VL. Included by the translation units that are compiled for them.
#pragma once

#include <immintrin.h>

#include "formats.h"
#include "scan.h"

namespace numguard::cpu {
namespace {

// `count` up to 255; all lanes if it is more than there are.
inline uint64_t first_lanes(int64_t count) { return _bzhi_u64(~0ull, static_cast<uint64_t>(count)); }

// Lanes of what there is of a vector between two addresses.
template <class Lanes>
inline uint64_t lanes_between(const uint8_t* from, const uint8_t* end) {
  const int64_t left = (end - from) / Lanes::kBytes;
  return first_lanes(left < 0 ? 0 : left > Lanes::kLanes ? Lanes::kLanes : left);
}

struct DoubleSums {
  __m512d low, high;
};

inline void add_floats(DoubleSums& totals, __m512 values) {
  totals.low = _mm512_add_pd(totals.low, _mm512_cvtps_pd(_mm512_castps512_ps256(values)));
  totals.high = _mm512_add_pd(totals.high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(values, 1)));
}

inline double add_all(const DoubleSums& totals) { return _mm512_reduce_add_pd(_mm512_add_pd(totals.low, totals.high)); }

// 16 elements as float bits.
struct WideFloat {
  using Bits = __m512i;
  using Sums = DoubleSums;
  static constexpr int kLanes = 16;
  static constexpr uint32_t kInfinity = kFloatInfinity;
  static Bits zero() { return _mm512_setzero_si512(); }
  static Bits magnitude(Bits bits) { return _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)); }
  static Bits max(Bits a, Bits b) { return _mm512_max_epu32(a, b); }
  static uint32_t at_least(Bits magnitude, uint32_t limit) {
    return _mm512_cmpge_epu32_mask(magnitude, _mm512_set1_epi32(static_cast<int>(limit)));
  }
  static uint32_t sign(Bits bits) { return _mm512_movepi32_mask(bits); }
  static Bits clear(Bits bits, uint32_t lanes) { return _mm512_maskz_mov_epi32(static_cast<__mmask16>(~lanes), bits); }
  static Sums no_sums() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
  static void add_squares(Sums& sums, Bits bits) {
    const __m512 values = _mm512_castsi512_ps(bits);
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(values));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(values, 1));
    sums.low = _mm512_fmadd_pd(low, low, sums.low);
    sums.high = _mm512_fmadd_pd(high, high, sums.high);
  }
  static double largest(Bits peak) { return float_from_bits(_mm512_reduce_max_epu32(peak)); }
  static double total(const Sums& sums) { return add_all(sums); }
};

// Raw vectors, whatever their elements.
struct RawLanes {
  using Bits = __m512i;
  static constexpr bool kNeedsVector = false;
  static Bits zero() { return _mm512_setzero_si512(); }
  static Bits load(const uint8_t* from) { return _mm512_loadu_si512(from); }
};

// Squares in single precision within a group, groups in double.
struct FloatSums : RawLanes {
  using Wide = WideFloat;
  using Sums = __m512;
  using Totals = DoubleSums;
  static constexpr bool kInFloat = true;
  static constexpr int kSquares = 1;  // in a lane, of one vector
  static constexpr double kLow = 0;   // where no square is too small
  static Sums no_sum() { return _mm512_setzero_ps(); }
  static Sums add(Sums a, Sums b) { return _mm512_add_ps(a, b); }
  static Totals no_totals() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
  static void add_to(Totals& totals, Sums sum) { add_floats(totals, sum); }
  static double total(const Totals& totals) { return add_all(totals); }
};

struct Float32 : FloatSums {
  static constexpr int kBytes = 4, kLanes = 16, kUnroll = 4, kSums = 1, kDepth = 24, kBlocks = 4;
  static constexpr int64_t kMostCounted = UINT32_MAX;
  static constexpr double kLow = kSafeLow;
  static constexpr uint32_t kWideSmallestNormal = kFloat32SmallestNormal;
  static Bits load_before(const uint8_t* from, const uint8_t* end) {
    return _mm512_maskz_loadu_epi32(static_cast<__mmask16>(lanes_between<Float32>(from, end)), from);
  }
  static Bits load_wide(const uint8_t* from, int count) {
    return _mm512_maskz_loadu_epi32(static_cast<__mmask16>(first_lanes(count)), from);
  }
  static constexpr bool kShifts = true;
  static Bits shift_by(int lanes) {
    return _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                            _mm512_set1_epi32(lanes));
  }
  static Bits shift(Bits left, Bits by, Bits right) { return _mm512_permutex2var_epi32(left, by, right); }
  static Bits magnitude(Bits raw) { return WideFloat::magnitude(raw); }
  static Bits max(Bits a, Bits b) { return _mm512_max_epu32(a, b); }
  static void add_squares(Sums* sums, Bits raw) {
    const __m512 values = _mm512_castsi512_ps(raw);
    sums[0] = _mm512_fmadd_ps(values, values, sums[0]);
  }
  static void add_squares_at(Sums* sums, Bits raw, const uint8_t*) { add_squares(sums, raw); }
  static bool too_large(Bits peak) { return WideFloat::at_least(peak, kSafeHigh) != 0; }
  static double largest(Bits peak) { return WideFloat::largest(peak); }
  static Bits count_zero(Bits counts, Bits magnitude) {
    return _mm512_mask_sub_epi32(counts, _mm512_testn_epi32_mask(magnitude, magnitude), counts, _mm512_set1_epi32(-1));
  }
  static Bits count_small(Bits counts, Bits magnitude) {
    const __mmask16 small = _mm512_cmple_epu32_mask(magnitude, _mm512_set1_epi32(kFloat32LargestSubnormal));
    return _mm512_mask_sub_epi32(counts, small, counts, _mm512_set1_epi32(-1));
  }
  static int64_t add_lanes(Bits counts) { return _mm512_reduce_add_epi32(counts); }
};

// Common code of the two 16-bit formats.
template <uint16_t kLargestSubnormal>
struct Lanes16 : FloatSums {
  static constexpr int kBytes = 2, kLanes = 32;
  static constexpr int64_t kMostCounted = UINT16_MAX;
  static Bits load_before(const uint8_t* from, const uint8_t* end) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>(lanes_between<Lanes16>(from, end)), from);
  }
  static __m256i load_half(const uint8_t* from, int count) {
    return _mm256_maskz_loadu_epi16(static_cast<__mmask16>(first_lanes(count)), from);
  }
  static constexpr bool kShifts = true;
  static Bits shift_by(int lanes) {
    return _mm512_add_epi16(
        _mm512_cvtepu8_epi16(_mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20,
                                              21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31)),
        _mm512_set1_epi16(static_cast<short>(lanes)));
  }
  static Bits shift(Bits left, Bits by, Bits right) { return _mm512_permutex2var_epi16(left, by, right); }
  static Bits magnitude(Bits raw) { return _mm512_and_si512(raw, _mm512_set1_epi16(0x7fff)); }
  static Bits max(Bits a, Bits b) { return _mm512_max_epu16(a, b); }
  static uint32_t at_least(Bits magnitude, uint16_t limit) {
    return _mm512_cmpge_epu16_mask(magnitude, _mm512_set1_epi16(static_cast<short>(limit)));
  }
  static uint32_t largest_raw(Bits peak) {
    const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(peak), _mm512_extracti64x4_epi64(peak, 1));
    const __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    const __m128i ones = _mm_set1_epi16(-1);
    return 0xffffu & ~static_cast<uint32_t>(_mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(quarter, ones)), 0));
  }
  static Bits count_zero(Bits counts, Bits magnitude) {
    return _mm512_mask_sub_epi16(counts, _mm512_testn_epi16_mask(magnitude, magnitude), counts, _mm512_set1_epi16(-1));
  }
  static Bits count_small(Bits counts, Bits magnitude) {
    const __mmask32 small = _mm512_cmple_epu16_mask(magnitude, _mm512_set1_epi16(kLargestSubnormal));
    return _mm512_mask_sub_epi16(counts, small, counts, _mm512_set1_epi16(-1));
  }
  static int64_t add_lanes(Bits counts) {
    return _mm512_reduce_add_epi32(_mm512_madd_epi16(counts, _mm512_set1_epi16(1)));
  }
};

struct Float16 : Lanes16<kFloat16LargestSubnormal> {
  static constexpr int kUnroll = 4, kSums = 2, kDepth = 24, kBlocks = 4;
  static constexpr uint32_t kWideSmallestNormal = kFloat16SmallestNormal;
  static Bits load_wide(const uint8_t* from, int count) {
    return _mm512_castps_si512(_mm512_cvtph_ps(load_half(from, count)));
  }
  static void add_squares(Sums* sums, Bits raw) {
    const __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(raw));
    const __m512 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(raw, 1));
    sums[0] = _mm512_fmadd_ps(low, low, sums[0]);
    sums[1] = _mm512_fmadd_ps(high, high, sums[1]);
  }
  // Conversions that load spare the extraction.
  static void add_squares_at(Sums* sums, Bits, const uint8_t* from) {
    const __m512 low = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    const __m512 high = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32)));
    sums[0] = _mm512_fmadd_ps(low, low, sums[0]);
    sums[1] = _mm512_fmadd_ps(high, high, sums[1]);
  }
  static bool too_large(Bits peak) { return at_least(peak, kFloat16Infinity) != 0; }
  static double largest(Bits peak) { return float_from_bits(widen_float16(largest_raw(peak))); }
};

struct BFloat16Base : Lanes16<kBFloat16LargestSubnormal> {
  static constexpr uint32_t kWideSmallestNormal = kFloat32SmallestNormal;
  static constexpr double kLow = kSafeLow;
  static Bits load_wide(const uint8_t* from, int count) {
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32(load_half(from, count)), 16);
  }
  static bool too_large(Bits peak) { return at_least(peak, kSafeHigh >> 16) != 0; }
  static double largest(Bits peak) { return float_from_bits(widen_bfloat16(largest_raw(peak))); }
};

struct BFloat16 : BFloat16Base {
  static constexpr int kUnroll = 4, kSums = 2, kDepth = 24, kBlocks = 4;
  static void add_squares(Sums* sums, Bits raw) {
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16));
    const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
    sums[0] = _mm512_fmadd_ps(even, even, sums[0]);
    sums[1] = _mm512_fmadd_ps(odd, odd, sums[1]);
  }
  static void add_squares_at(Sums* sums, Bits raw, const uint8_t*) { add_squares(sums, raw); }
};

// 8 elements of float64. Squares go straight into double sums, the widest there are.
struct Float64 : RawLanes {
  using Sums = __m512d;
  using Totals = __m512d;
  using Wide = Float64;
  static constexpr bool kInFloat = false;
  static constexpr int kBytes = 8, kLanes = 8, kUnroll = 4, kSums = 1, kSquares = 1, kDepth = 32, kBlocks = 2;
  static constexpr int64_t kMostCounted = INT64_MAX;
  static constexpr double kLow = 0;
  static constexpr uint64_t kInfinity = kDoubleInfinity;
  static constexpr uint64_t kWideSmallestNormal = kFloat64SmallestNormal;
  static Bits load_before(const uint8_t* from, const uint8_t* end) {
    return _mm512_maskz_loadu_epi64(static_cast<__mmask8>(lanes_between<Float64>(from, end)), from);
  }
  static Bits load_wide(const uint8_t* from, int count) {
    return _mm512_maskz_loadu_epi64(static_cast<__mmask8>(first_lanes(count)), from);
  }
  static constexpr bool kShifts = true;
  static Bits shift_by(int lanes) {
    return _mm512_add_epi64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_epi64(lanes));
  }
  static Bits shift(Bits left, Bits by, Bits right) { return _mm512_permutex2var_epi64(left, by, right); }
  static Bits magnitude(Bits raw) { return _mm512_and_si512(raw, _mm512_set1_epi64(0x7fffffffffffffffll)); }
  static Bits max(Bits a, Bits b) { return _mm512_max_epu64(a, b); }
  static uint32_t at_least(Bits magnitude, uint64_t limit) {
    return _mm512_cmpge_epu64_mask(magnitude, _mm512_set1_epi64(static_cast<long long>(limit)));
  }
  static uint32_t sign(Bits bits) { return _mm512_movepi64_mask(bits); }
  static Bits clear(Bits bits, uint32_t lanes) { return _mm512_maskz_mov_epi64(static_cast<__mmask8>(~lanes), bits); }
  static Sums no_sum() { return _mm512_setzero_pd(); }
  static Sums no_sums() { return no_sum(); }
  static Totals no_totals() { return no_sum(); }
  static void add_squares(Sums* sums, Bits raw) { add_squares(sums[0], raw); }
  static void add_squares(Sums& sums, Bits raw) {
    sums = _mm512_fmadd_pd(_mm512_castsi512_pd(raw), _mm512_castsi512_pd(raw), sums);
  }
  static void add_squares_at(Sums* sums, Bits raw, const uint8_t*) { add_squares(sums, raw); }
  static Sums add(Sums a, Sums b) { return _mm512_add_pd(a, b); }
  static void add_to(Totals& totals, Sums sum) { totals = _mm512_add_pd(totals, sum); }
  static double total(const Totals& totals) { return _mm512_reduce_add_pd(totals); }
  static bool too_large(Bits peak) { return at_least(peak, kInfinity) != 0; }
  static double largest(Bits peak) { return double_from_bits(_mm512_reduce_max_epu64(peak)); }
  static Bits count_zero(Bits counts, Bits magnitude) {
    return _mm512_mask_sub_epi64(counts, _mm512_testn_epi64_mask(magnitude, magnitude), counts, _mm512_set1_epi64(-1));
  }
  static Bits count_small(Bits counts, Bits magnitude) {
    const __mmask8 small = _mm512_cmple_epu64_mask(magnitude, _mm512_set1_epi64(kFloat64LargestSubnormal));
    return _mm512_mask_sub_epi64(counts, small, counts, _mm512_set1_epi64(-1));
  }
  static int64_t add_lanes(Bits counts) { return _mm512_reduce_add_epi64(counts); }
};

// Common code of the two 8-bit formats: 64 raw bytes become four vectors of float by way of float16.
template <uint8_t kLargestSubnormal>
struct Lanes8 : FloatSums {
  static constexpr int kBytes = 1, kLanes = 64, kUnroll = 2, kSums = 4, kDepth = 24, kBlocks = 4;
  static constexpr int64_t kMostCounted = UINT8_MAX;
  static constexpr bool kShifts = false;  // needs AVX-512 VBMI, and is not the bottleneck here
  static Bits load_before(const uint8_t* from, const uint8_t* end) {
    return _mm512_maskz_loadu_epi8(lanes_between<Lanes8>(from, end), from);
  }
  static __m256i load_as_16(const uint8_t* from, int count) {
    return _mm256_cvtepu8_epi16(_mm_maskz_loadu_epi8(static_cast<__mmask16>(first_lanes(count)), from));
  }
  static Bits magnitude(Bits raw) { return _mm512_and_si512(raw, _mm512_set1_epi8(0x7f)); }
  static Bits max(Bits a, Bits b) { return _mm512_max_epu8(a, b); }
  static bool any_at_least(Bits magnitude, uint8_t limit) {
    return _mm512_cmpge_epu8_mask(magnitude, _mm512_set1_epi8(static_cast<char>(limit))) != 0;
  }
  static void add_half_squares(Sums* sums, __m512i halves) {
    const __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
    const __m512 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
    sums[0] = _mm512_fmadd_ps(low, low, sums[0]);
    sums[1] = _mm512_fmadd_ps(high, high, sums[1]);
  }
  static uint32_t largest_raw(Bits peak) {
    alignas(64) uint8_t lanes[kLanes];
    _mm512_store_si512(lanes, peak);
    uint8_t largest = 0;
    for (uint8_t lane : lanes) largest = lane > largest ? lane : largest;
    return largest;
  }
  static Bits count_zero(Bits counts, Bits magnitude) {
    return _mm512_mask_sub_epi8(counts, _mm512_testn_epi8_mask(magnitude, magnitude), counts, _mm512_set1_epi8(-1));
  }
  static Bits count_small(Bits counts, Bits magnitude) {
    const __mmask64 small = _mm512_cmple_epu8_mask(magnitude, _mm512_set1_epi8(kLargestSubnormal));
    return _mm512_mask_sub_epi8(counts, small, counts, _mm512_set1_epi8(-1));
  }
  static int64_t add_lanes(Bits counts) {
    return _mm512_reduce_add_epi64(_mm512_sad_epu8(counts, _mm512_setzero_si512()));
  }
};

struct Float8E5M2 : Lanes8<kFloat8E5M2LargestSubnormal> {
  static constexpr uint32_t kWideSmallestNormal = kFloat16SmallestNormal;
  static Bits load_wide(const uint8_t* from, int count) {
    return _mm512_castps_si512(_mm512_cvtph_ps(_mm256_slli_epi16(load_as_16(from, count), 8)));
  }
  static void add_squares(Sums* sums, Bits raw) {
    add_half_squares(sums, _mm512_slli_epi16(raw, 8));
    add_half_squares(sums + 2, _mm512_and_si512(raw, _mm512_set1_epi16(static_cast<short>(0xff00))));
  }
  static void add_squares_at(Sums* sums, Bits raw, const uint8_t*) { add_squares(sums, raw); }
  static bool too_large(Bits peak) { return any_at_least(peak, kFloat8E5M2Infinity); }
  static double largest(Bits peak) { return float_from_bits(widen_float8_e5m2(largest_raw(peak))); }
};

struct Float8E4M3FN : Lanes8<kFloat8E4M3FNLargestSubnormal> {
  static constexpr uint32_t kWideSmallestNormal = kFloat8E4M3FNSmallestNormal;
  static Bits load_wide(const uint8_t* from, int count) {
    const __m256i raw = load_as_16(from, count);
    const __m256i magnitude = _mm256_and_si256(raw, _mm256_set1_epi16(0x7f));
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(raw, _mm256_set1_epi16(0x80)), 8);
    const __m512 scaled = _mm512_cvtph_ps(_mm256_or_si256(sign, _mm256_slli_epi16(magnitude, 7)));
    const __m512 values = _mm512_mul_ps(scaled, _mm512_set1_ps(256.0f));
    const __mmask16 nan = _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(kFloat8E4M3FNNan));
    return _mm512_mask_or_epi32(_mm512_castps_si512(values), nan, _mm512_castps_si512(values),
                                _mm512_set1_epi32(0x7fc00000));
  }
  static void add_squares(Sums* sums, Bits raw) {
    add_half_squares(sums, _mm512_slli_epi16(_mm512_and_si512(raw, _mm512_set1_epi16(0x007f)), 7));
    add_half_squares(sums + 2, _mm512_srli_epi16(_mm512_and_si512(raw, _mm512_set1_epi16(0x7f00)), 1));
  }
  static void add_squares_at(Sums* sums, Bits raw, const uint8_t*) { add_squares(sums, raw); }
  static void add_to(Totals& totals, Sums sum) {
    FloatSums::add_to(totals, _mm512_mul_ps(sum, _mm512_set1_ps(kFloat8E4M3FNSquareScale)));
  }
  static bool too_large(Bits peak) { return any_at_least(peak, kFloat8E4M3FNNan); }
  static double largest(Bits peak) { return float_from_bits(widen_float8_e4m3fn(largest_raw(peak))); }
};

}  // namespace
}  // namespace numguard::cpu
