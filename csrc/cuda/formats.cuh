// The floating-point formats: how 16 bytes of each add to a thread's running maximum, squares and counts.
#pragma once

#include "../dtypes.h"
#include "platform.cuh"

namespace numguard::cuda {

// A format as bits, as hallo_numguard/ops/formats.py has it, and the constants of its arithmetic.
//
//   Bits               unsigned integer of the size of an element
//   kInfinity          bits of the smallest magnitude that is not a number
//   kHasInfinity       false for e4m3fn, whose largest exponent holds numbers, and only all ones is NaN
//   kSmallestNormal    bits; smaller magnitudes but zero are subnormal
//   kSafeLow, High     single precision holds the squares of values up to `kScale` times these (or zero)
//   kScale             ratio of a value to its widened form
template <Dtype>
struct Format;

template <>
struct Format<kFloat32> {
  using Bits = uint32_t;
  static constexpr Bits kInfinity = 0x7f800000u, kSmallestNormal = 0x00800000u;
  static constexpr bool kHasInfinity = true;
  static constexpr float kSafeLow = 0x1p-50f, kSafeHigh = 0x1p60f, kScale = 1.0f;
};

template <>
struct Format<kBFloat16> {
  using Bits = uint16_t;
  static constexpr Bits kInfinity = 0x7f80, kSmallestNormal = 0x0080;
  static constexpr bool kHasInfinity = true;
  static constexpr float kSafeLow = 0x1p-50f, kSafeHigh = 0x1p60f, kScale = 1.0f;
};

template <>
struct Format<kFloat16> {
  using Bits = uint16_t;
  static constexpr Bits kInfinity = 0x7c00, kSmallestNormal = 0x0400;
  static constexpr bool kHasInfinity = true;
  static constexpr float kSafeLow = 0.0f, kSafeHigh = 65536.0f, kScale = 1.0f;
};

template <>
struct Format<kFloat8E5M2> {
  using Bits = uint8_t;
  static constexpr Bits kInfinity = 0x7c, kSmallestNormal = 0x04;
  static constexpr bool kHasInfinity = true;
  static constexpr float kSafeLow = 0.0f, kSafeHigh = 65536.0f, kScale = 1.0f;
};

// Read as if it were float16, whose bias is 8 larger; there NaN is the number after the largest.
template <>
struct Format<kFloat8E4M3FN> {
  using Bits = uint8_t;
  static constexpr Bits kInfinity = 0x7f, kSmallestNormal = 0x08;
  static constexpr bool kHasInfinity = false;
  static constexpr float kSafeLow = 0.0f, kSafeHigh = 480.0f / 256.0f, kScale = 256.0f;
};

template <>
struct Format<kFloat64> {
  using Bits = uint64_t;
  static constexpr Bits kInfinity = 0x7ff0000000000000u, kSmallestNormal = 0x0010000000000000u;
  static constexpr bool kHasInfinity = true;
  static constexpr double kSafeLow = 0.0, kScale = 1.0;  // high: infinity
};

template <Dtype kDtype>
using BitsOf = typename Format<kDtype>::Bits;

template <Dtype kDtype>
constexpr int kItemOf = sizeof(BitsOf<kDtype>);

template <Dtype kDtype>
__device__ __forceinline__ BitsOf<kDtype> magnitude_of(BitsOf<kDtype> bits) {
  constexpr auto kAllButSign = static_cast<BitsOf<kDtype>>(~uint64_t{0} >> (65 - 8 * kItemOf<kDtype>));
  return bits & kAllButSign;
}

// The value over kScale, without its sign where that costs nothing. Exact.
template <Dtype kDtype>
__device__ __forceinline__ auto widened(BitsOf<kDtype> bits) {
  if constexpr (kDtype == kFloat64) {
    return __longlong_as_double(static_cast<long long>(bits));
  } else if constexpr (kDtype == kFloat32) {
    return __uint_as_float(bits);
  } else if constexpr (kDtype == kBFloat16) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  } else {
    float low, high;
    uint32_t half = bits;
    if constexpr (kDtype == kFloat8E5M2) half = half << 8;
    if constexpr (kDtype == kFloat8E4M3FN) half = (half & 0x7fu) << 7;
    widen_float16_pair(half, low, high);
    return low;
  }
}

// Adds a square in the precision of the sum. Narrow formats have exact products, so fused or not is the same; with
// the others nothing is fused, so that the bits are those that Triton's interpreter gives as well.
template <Dtype kDtype>
__device__ __forceinline__ void add_square(float& sum, float value) {
  if constexpr (kItemOf<kDtype> < 4)
    sum = __fmaf_rn(value, value, sum);
  else
    sum = __fadd_rn(sum, __fmul_rn(value, value));
}

template <Dtype>
__device__ __forceinline__ void add_square(double& sum, double value) {
  sum = __dadd_rn(sum, __dmul_rn(value, value));
}

// The largest magnitude that a thread has seen, NaN carried along. Two-byte formats keep one for each half of a word,
// and one-byte formats are spread to two bytes first.
template <Dtype kDtype>
class Peak {
 public:
  __device__ __forceinline__ void take(float value) { largest_ = max_or_nan(largest_, fabsf(value)); }
  __device__ __forceinline__ uint32_t bits() const { return __float_as_uint(largest_); }
  static __device__ __forceinline__ float number(uint32_t bits) { return __uint_as_float(bits); }

 private:
  float largest_ = 0.0f;
};

template <>
class Peak<kFloat64> {  // no instruction keeps NaN; as integers magnitudes order alike, and NaN comes last
 public:
  __device__ __forceinline__ void take(double value) {
    largest_ = max(largest_, magnitude_of<kFloat64>(static_cast<uint64_t>(__double_as_longlong(value))));
  }
  __device__ __forceinline__ uint64_t bits() const { return largest_; }
  static __device__ __forceinline__ double number(uint64_t bits) {
    return __longlong_as_double(static_cast<long long>(bits));
  }

 private:
  uint64_t largest_ = 0;
};

// A thread's state for the elements it has seen. There is one sum for each element of its vectors: the sum of an
// element depends on its address alone.
template <Dtype kDtype, bool kDetail, int kVectors>
struct Lanes {
  using Sum = decltype(widened<kDtype>(BitsOf<kDtype>{}));
  static constexpr int kItems = 16 / kItemOf<kDtype>;

  Sum sums[kVectors][kItems] = {};
  Peak<kDtype> peak;
  uint32_t pair_peak = 0;  // of two-byte words, instead of `peak`
  uint32_t zeros = 0;
  uint32_t small = 0;  // zero or subnormal

  __device__ __forceinline__ void take(const uint4& words, int vector) {
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
    Sum* const to = sums[vector];
    if constexpr (kItemOf<kDtype> == 8) {
#pragma unroll
      for (int i = 0; i < 2; ++i) take_one(static_cast<uint64_t>(word[2 * i + 1]) << 32 | word[2 * i], to[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) take_word(word[i], to + i * (4 / kItemOf<kDtype>));
    }
  }

  // One element alone, with a sum of its own.
  __device__ __forceinline__ void take_one(BitsOf<kDtype> bits, Sum& sum) {
    const Sum value = widened<kDtype>(bits);
    peak.take(value);
    add_square<kDtype>(sum, value);
    count(magnitude_of<kDtype>(bits));
  }

  __device__ __forceinline__ auto peak_bits() const {
    if constexpr (kItemOf<kDtype> < 4) {
      constexpr Dtype kPair = kDtype == kBFloat16 ? kBFloat16 : kFloat16;
      Peak<kDtype> all = peak;
      all.take(widened<kPair>(static_cast<uint16_t>(pair_peak)));
      all.take(widened<kPair>(static_cast<uint16_t>(pair_peak >> 16)));
      return all.bits();
    } else {
      return peak.bits();
    }
  }

 private:
  __device__ __forceinline__ void take_word(uint32_t word, Sum* to) {
    if constexpr (kDtype == kFloat32) {
      take_one(word, to[0]);
    } else if constexpr (kDtype == kBFloat16) {
      add_square<kDtype>(to[0], __uint_as_float(word << 16));
      add_square<kDtype>(to[1], __uint_as_float(word & 0xffff0000u));
      pair_peak = max_magnitudes_bfloat16(pair_peak, word);
      count_pair(word);
    } else if constexpr (kDtype == kFloat16) {
      take_float16_pair(word, to);
      count_pair(word);
    } else {
      take_float16_pair(spread(word, 0x1404u), to);
      take_float16_pair(spread(word, 0x3424u), to + 2);
#pragma unroll
      for (int i = 0; i < 4 && kDetail; ++i) count(magnitude_of<kDtype>(static_cast<uint8_t>(word >> (8 * i))));
    }
  }

  __device__ __forceinline__ void take_float16_pair(uint32_t pair, Sum* to) {
    float low, high;
    widen_float16_pair(pair, low, high);
    add_square<kDtype>(to[0], low);
    add_square<kDtype>(to[1], high);
    pair_peak = max_magnitudes_float16(pair_peak, pair);
  }

  // Two of four one-byte elements, as `widened` reads them: into the upper byte of each half, then one bit down.
  static __device__ __forceinline__ uint32_t spread(uint32_t word, uint32_t bytes) {
    const uint32_t pair = __byte_perm(word, 0, bytes);
    return kDtype == kFloat8E4M3FN ? (pair >> 1) & 0x3f803f80u : pair;
  }

  __device__ __forceinline__ void count_pair(uint32_t word) {
    count(magnitude_of<kDtype>(static_cast<uint16_t>(word)));
    count(magnitude_of<kDtype>(static_cast<uint16_t>(word >> 16)));
  }

  __device__ __forceinline__ void count(BitsOf<kDtype> magnitude) {
    if constexpr (kDetail) {
      zeros += magnitude == 0;
      small += magnitude < Format<kDtype>::kSmallestNormal;
    }
  }
};

}  // namespace numguard::cuda
