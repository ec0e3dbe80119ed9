// Compiled for AVX-512 BF16 on top of AVX-512: squares of bfloat16 pairs in one instruction.
#include "lanes_avx512.h"

namespace numguard::cpu {
namespace {

struct BFloat16Dot : BFloat16Base {
  static constexpr int kUnroll = 8, kSums = 1, kBlock = 2048;
  static void add_squares(Sums* sums, Bits raw) {
    // Flushes subnormals whatever the caller's state; beside kSafeLow they are below 2^-150 of the block.
    sums[0] = _mm512_dpbf16_ps(sums[0], reinterpret_cast<__m512bh>(raw), reinterpret_cast<__m512bh>(raw));
  }
};

}  // namespace

const ScanKernel kAvx512Bf16Scan = scan<BFloat16Dot, false>;
const ScanKernel kAvx512Bf16ScanDetail = scan<BFloat16Dot, true>;

}  // namespace numguard::cpu
