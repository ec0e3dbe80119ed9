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
    {scanner<Float32, false>, scanner<Float16, false>, scanner<BFloat16, false>, scanner<Float64, false>,
     scanner<Float8E4M3FN, false>, scanner<Float8E5M2, false>},
    {scanner<Float32, true>, scanner<Float16, true>, scanner<BFloat16, true>, scanner<Float64, true>,
     scanner<Float8E4M3FN, true>, scanner<Float8E5M2, true>},
    {read<0>, read<kPrefetchBytes>, nullptr},
};

const Kernels kAvx512Linewise = {
    {linewise_scanner<Float32, false>, linewise_scanner<Float16, false>, linewise_scanner<BFloat16, false>,
     linewise_scanner<Float64, false>, linewise_scanner<Float8E4M3FN, false>, linewise_scanner<Float8E5M2, false>},
    {linewise_scanner<Float32, true>, linewise_scanner<Float16, true>, linewise_scanner<BFloat16, true>,
     linewise_scanner<Float64, true>, linewise_scanner<Float8E4M3FN, true>, linewise_scanner<Float8E5M2, true>},
    {read<0>, read<kPrefetchBytes>, nullptr},
};

}  // namespace numguard::cpu
