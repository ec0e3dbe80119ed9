// The kernels of one instruction set, as a table of function pointers that stats.cpp chooses from.
#pragma once

#include <cstdint>

#include "../dtypes.h"
#include "../record.h"

namespace numguard::cpu {

// Writes the record of `count` contiguous elements; indices count from the first of them, plus `base`.
using ScanKernel = void (*)(const uint8_t* data, int64_t count, int64_t base, Record* out);

// Reads `bytes` bytes and does the least that keeps the loads alive: the limit that a scan is measured against.
using ReadKernel = uint64_t (*)(const uint8_t* data, int64_t bytes);

struct Kernels {
  ScanKernel scan[kDtypes];
  ScanKernel scan_detail[kDtypes];  // zeros and subnormals too
  ReadKernel read;
  ReadKernel read_prefetched;
};

extern const Kernels kPortable;
#ifdef NUMGUARD_X86
extern const Kernels kAvx2;
// Linewise: cache line by cache line, and prefetched, which pays on Zen 5 and costs on Zen 4. The same bits.
extern const Kernels kAvx512, kAvx512Linewise;
extern const ScanKernel kAvx512Bf16Scan, kAvx512Bf16ScanLinewise;  // replace the entries of bfloat16
extern const ScanKernel kAvx512Bf16ScanDetail, kAvx512Bf16ScanLinewiseDetail;
#endif

}  // namespace numguard::cpu
