// Compiled for AVX-512 F, BW, DQ, VL.
#include "lanes_avx512.h"

namespace numguard::cpu {
namespace {

// Two streams, because the hardware prefetcher stops at a page's end; eight accumulators to hide the latency of the
// add.
template <int kPrefetch>
uint64_t read(const uint8_t* data, int64_t bytes) {
  constexpr int64_t kStep = 256;
  const int64_t half = bytes / 2 / kStep * kStep;
  __m512i sums[8];
  for (auto& sum : sums) sum = _mm512_setzero_si512();
  for (int64_t at = 0; at < half; at += kStep) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const uint8_t* first = data + at + 64 * k;
      if (kPrefetch > 0) {
        __builtin_prefetch(first + kPrefetch);
        __builtin_prefetch(first + half + kPrefetch);
      }
      sums[k] = _mm512_add_epi64(sums[k], _mm512_loadu_si512(first));
      sums[4 + k] = _mm512_add_epi64(sums[4 + k], _mm512_loadu_si512(first + half));
    }
  }
  uint64_t rest = 0;
  for (int64_t at = 2 * half; at < bytes; ++at) rest += data[at];
  for (int k = 1; k < 8; ++k) sums[0] = _mm512_add_epi64(sums[0], sums[k]);
  return rest + static_cast<uint64_t>(_mm512_reduce_add_epi64(sums[0]));
}

}  // namespace

const Kernels kAvx512 = {
    {scan<Float32, false>, scan<Float16, false>, scan<BFloat16, false>, scan<Float64, false>, scan<Float8E4M3FN, false>,
     scan<Float8E5M2, false>},
    {scan<Float32, true>, scan<Float16, true>, scan<BFloat16, true>, scan<Float64, true>, scan<Float8E4M3FN, true>,
     scan<Float8E5M2, true>},
    read<0>,
    read<kPrefetchBytes>,
};

const Kernels kAvx512Linewise = {
    {scan<Float32, false, true>, scan<Float16, false, true>, scan<BFloat16, false, true>, scan<Float64, false, true>,
     scan<Float8E4M3FN, false, true>, scan<Float8E5M2, false, true>},
    {scan<Float32, true, true>, scan<Float16, true, true>, scan<BFloat16, true, true>, scan<Float64, true, true>,
     scan<Float8E4M3FN, true, true>, scan<Float8E5M2, true, true>},
    read<0>,
    read<kPrefetchBytes>,
};

}  // namespace numguard::cpu
