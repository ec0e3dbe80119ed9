// Compiled for AVX-512 BF16 on top of AVX-512: squares of bfloat16 pairs in one instruction.
#include "lanes_avx512.h"

namespace numguard::cpu {
namespace {

struct BFloat16Dot : BFloat16Base {
  static constexpr int kUnroll = 8, kSums = 1, kBlock = 2048;
  static void add_squares(Sums* sums, Bits raw) {
    // Flushes subnormals, and products that are, whatever the caller's state: see needs_rescan.
    sums[0] = _mm512_dpbf16_ps(sums[0], reinterpret_cast<__m512bh>(raw), reinterpret_cast<__m512bh>(raw));
  }
  // 2048 squares below 2^-126 are less than 2^-26 of a block whose largest magnitude is 2^-44.
  static bool needs_rescan(Bits peak) {
    constexpr uint16_t kLow = 0x2980;  // bits of 2^-44
    if (at_least(peak, kSafeHigh >> 16) != 0) return true;
    return at_least(peak, kLow) == 0 && at_least(peak, 1) != 0;
  }
};

}  // namespace

const ScanKernel kAvx512Bf16Scan = scan<BFloat16Dot, false>;
const ScanKernel kAvx512Bf16ScanDetail = scan<BFloat16Dot, true>;

}  // namespace numguard::cpu
