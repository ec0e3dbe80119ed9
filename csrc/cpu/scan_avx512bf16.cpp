// Compiled for AVX-512 BF16 on top of AVX-512: squares of bfloat16 pairs in one instruction.
#include "lanes_avx512.h"

namespace numguard::cpu {
namespace {

struct BFloat16Dot : BFloat16Base {
  // Two squares a lane, and perhaps two roundings.
  static constexpr int kUnroll = 8, kSums = 1, kSquares = 2, kDepth = 12, kBlocks = 4;
  // The instruction flushes subnormals, and products that are, whatever the caller's state. Twice 2^17 of them, all of
  // a call, are below 2^-26 of a sum whose largest square is 2^-82.
  static constexpr double kLow = 0x1p-41;
  static void add_squares(Sums* sums, Bits raw) {
    sums[0] = _mm512_dpbf16_ps(sums[0], reinterpret_cast<__m512bh>(raw), reinterpret_cast<__m512bh>(raw));
  }
  static void add_squares_at(Sums* sums, Bits raw, const uint8_t*) { add_squares(sums, raw); }
};

}  // namespace

const Scanner kAvx512Bf16Scan = scanner<BFloat16Dot, false>;
const Scanner kAvx512Bf16ScanDetail = scanner<BFloat16Dot, true>;
const Scanner kAvx512Bf16ScanLinewise = linewise_scanner<BFloat16Dot, false>;
const Scanner kAvx512Bf16ScanLinewiseDetail = linewise_scanner<BFloat16Dot, true>;

}  // namespace numguard::cpu
