// Any CPU: one element at a time, squares in double.
#include "formats.h"
#include "scan.h"

namespace numguard::cpu {
namespace {

template <class Raw, class WideBits, WideBits (*kWiden)(Raw), WideBits kInfinityBits, WideBits kSmallestNormal>
struct Scalar {
  using Bits = WideBits;
  using Sums = double;
  using Totals = double;
  using Wide = Scalar;
  static constexpr bool kNeedsVector = false, kShifts = false, kInFloat = false;
  static constexpr int kBytes = sizeof(Raw), kLanes = 1, kUnroll = 4, kSums = 1, kSquares = 1, kDepth = 256;
  static constexpr int kBlocks = 1;
  static constexpr int64_t kMostCounted = UINT32_MAX;
  static constexpr double kLow = 0;
  static constexpr Bits kInfinity = kInfinityBits;
  static constexpr Bits kWideSmallestNormal = kSmallestNormal;
  static constexpr Bits kSign = static_cast<Bits>(1) << (8 * sizeof(Bits) - 1);
  static Bits zero() { return 0; }
  static Bits load(const uint8_t* from) {
    Raw raw;
    memcpy(&raw, from, sizeof raw);
    return kWiden(raw);
  }
  static Bits load_before(const uint8_t* from, const uint8_t* end) { return from < end ? load(from) : 0; }
  static Bits load_wide(const uint8_t* from, int) { return load(from); }
  static Bits magnitude(Bits bits) { return bits & ~kSign; }
  static Bits max(Bits a, Bits b) { return a > b ? a : b; }
  static uint32_t at_least(Bits magnitude, Bits limit) { return magnitude >= limit; }
  static uint32_t sign(Bits bits) { return (bits & kSign) != 0; }
  static Bits clear(Bits bits, uint32_t lanes) { return lanes ? 0 : bits; }
  static Sums no_sum() { return 0.0; }
  static Sums no_sums() { return 0.0; }
  static Totals no_totals() { return 0.0; }
  static double value(uint32_t bits) { return float_from_bits(bits); }
  static double value(uint64_t bits) { return double_from_bits(bits); }
  static void add_squares(Sums* sums, Bits bits) { add_squares(sums[0], bits); }
  static void add_squares(Sums& sums, Bits bits) { sums += value(bits) * value(bits); }
  static void add_squares_at(Sums* sums, Bits bits, const uint8_t*) { add_squares(sums[0], bits); }
  static Sums add(Sums a, Sums b) { return a + b; }
  static void add_to(Totals& totals, Sums sum) { totals += sum; }
  static double total(double totals) { return totals; }
  static bool too_large(Bits peak) { return peak >= kInfinity; }
  static double largest(Bits peak) { return value(peak); }
  static Bits count_zero(Bits counts, Bits magnitude) { return counts + (magnitude == 0); }
  static Bits count_small(Bits counts, Bits magnitude) { return counts + (magnitude < kWideSmallestNormal); }
  static int64_t add_lanes(Bits counts) { return static_cast<int64_t>(counts); }
};

uint32_t from_float32(uint32_t raw) { return raw; }
uint64_t from_float64(uint64_t raw) { return raw; }
uint32_t from_float16(uint16_t raw) { return widen_float16(raw); }
uint32_t from_bfloat16(uint16_t raw) { return widen_bfloat16(raw); }
uint32_t from_float8_e4m3fn(uint8_t raw) { return widen_float8_e4m3fn(raw); }
uint32_t from_float8_e5m2(uint8_t raw) { return widen_float8_e5m2(raw); }

using Float32 = Scalar<uint32_t, uint32_t, from_float32, kFloatInfinity, kFloat32SmallestNormal>;
using Float64 = Scalar<uint64_t, uint64_t, from_float64, kDoubleInfinity, kFloat64SmallestNormal>;
using Float16 = Scalar<uint16_t, uint32_t, from_float16, kFloatInfinity, kFloat16SmallestNormal>;
using BFloat16 = Scalar<uint16_t, uint32_t, from_bfloat16, kFloatInfinity, kFloat32SmallestNormal>;
using Float8E4M3FN = Scalar<uint8_t, uint32_t, from_float8_e4m3fn, kFloatInfinity, kFloat8E4M3FNSmallestNormal>;
using Float8E5M2 = Scalar<uint8_t, uint32_t, from_float8_e5m2, kFloatInfinity, kFloat16SmallestNormal>;

uint64_t read(const uint8_t* data, int64_t bytes) {
  uint64_t sum = 0;
  for (int64_t at = 0; at + 8 <= bytes; at += 8) {
    uint64_t word;
    memcpy(&word, data + at, sizeof word);
    sum += word;
  }
  for (int64_t at = bytes / 8 * 8; at < bytes; ++at) sum += data[at];
  return sum;
}

}  // namespace

const Kernels kPortable = {
    {{scan<Float32, false>, nullptr},
     {scan<Float16, false>, nullptr},
     {scan<BFloat16, false>, nullptr},
     {scan<Float64, false>, nullptr},
     {scan<Float8E4M3FN, false>, nullptr},
     {scan<Float8E5M2, false>, nullptr}},
    {{scan<Float32, true>, nullptr},
     {scan<Float16, true>, nullptr},
     {scan<BFloat16, true>, nullptr},
     {scan<Float64, true>, nullptr},
     {scan<Float8E4M3FN, true>, nullptr},
     {scan<Float8E5M2, true>, nullptr}},
    {read, nullptr, nullptr},
};

}  // namespace numguard::cpu
