// The floating-point formats as bits: limits, and one value at a time. Internal linkage, as in scan.h.
#pragma once

#include <cstdint>
#include <cstring>

namespace numguard::cpu {
namespace {

constexpr uint32_t kFloatInfinity = 0x7f800000u;
constexpr uint64_t kDoubleInfinity = 0x7ff0000000000000u;

inline float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline double double_from_bits(uint64_t bits) {
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Widens a small float (sign, kExponent bits, kMantissa bits) to float bits. NaN stays NaN, its payload does not
// matter.
template <int kExponent, int kMantissa>
inline uint32_t widen_bits(uint32_t raw) {
  constexpr int kBias = (1 << (kExponent - 1)) - 1;
  const uint32_t sign = (raw >> (kExponent + kMantissa)) << 31;
  const uint32_t exponent = (raw >> kMantissa) & ((1u << kExponent) - 1);
  const uint32_t mantissa = raw & ((1u << kMantissa) - 1);
  if (exponent == (1u << kExponent) - 1) return sign | kFloatInfinity | (mantissa << (23 - kMantissa));
  if (exponent != 0) return sign | ((exponent + 127 - kBias) << 23) | (mantissa << (23 - kMantissa));
  constexpr int kSmallest =
      127 + 1 - kBias - kMantissa;  // exponent bits of the smallest subnormal, which is normal here
  return sign | float_bits(static_cast<float>(mantissa) * float_from_bits(static_cast<uint32_t>(kSmallest) << 23));
}

inline uint32_t widen_float16(uint32_t raw) { return widen_bits<5, 10>(raw); }
inline uint32_t widen_bfloat16(uint32_t raw) { return raw << 16; }
inline uint32_t widen_float8_e5m2(uint32_t raw) { return widen_float16(raw << 8); }

// e4m3fn has no infinity: its largest exponent holds numbers, and only all ones is NaN.
inline uint32_t widen_float8_e4m3fn(uint32_t raw) {
  const uint32_t sign = (raw & 0x80u) << 24;
  if ((raw & 0x7fu) == 0x7fu) return sign | 0x7fc00000u;
  const float scaled = float_from_bits(widen_float16((raw & 0x7fu) << 7));  // same mantissa, bias 15 in place of 7
  return sign | float_bits(scaled * 256.0f);
}

// Per dtype: bits of infinity (or of the first NaN where there is none) and of the largest subnormal, without sign;
// and the smallest normal number as float bits.
constexpr uint16_t kFloat16Infinity = 0x7c00, kFloat16LargestSubnormal = 0x03ff;
constexpr uint16_t kBFloat16Infinity = 0x7f80, kBFloat16LargestSubnormal = 0x007f;
constexpr uint8_t kFloat8E5M2Infinity = 0x7c, kFloat8E5M2LargestSubnormal = 0x03;
constexpr uint8_t kFloat8E4M3FNNan = 0x7f, kFloat8E4M3FNLargestSubnormal = 0x07;
constexpr uint32_t kFloat32LargestSubnormal = 0x007fffffu;
constexpr uint64_t kFloat64LargestSubnormal = 0x000fffffffffffffu;

constexpr uint32_t kFloat32SmallestNormal = 0x00800000u;       // 2^-126, bfloat16 too
constexpr uint32_t kFloat16SmallestNormal = 0x38800000u;       // 2^-14, float8_e5m2 too
constexpr uint32_t kFloat8E4M3FNSmallestNormal = 0x3c800000u;  // 2^-6
constexpr uint64_t kFloat64SmallestNormal = 0x0010000000000000u;

// Squares of e4m3fn values that were widened as if they were float16 are 2^16 too small.
constexpr float kFloat8E4M3FNSquareScale = 65536.0f;

}  // namespace
}  // namespace numguard::cpu
