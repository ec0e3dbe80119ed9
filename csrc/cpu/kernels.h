// The kernels of one instruction set, as a table of function pointers that stats.cpp chooses from.
#pragma once

#include <cstdint>

#include "../dtypes.h"
#include "../record.h"

namespace numguard::cpu {

// Writes the record of `count` contiguous elements; indices count from the first of them, plus `base`.
using ScanKernel = void (*)(const uint8_t* data, int64_t count, int64_t base, Record* out);

// What one call of a ScanKernel would take.
struct Piece {
  const uint8_t* data;
  int64_t count;
  int64_t base;
  Record* out;
};

// The pieces of one place of memory, in order.
struct Queue {
  const Piece* begin;
  const Piece* end;
};

// The same records, bit by bit, of `kStreams` queues that are read in turns. Faster where they come from DRAM.
constexpr int kStreams = 4;
using StreamsKernel = void (*)(const Queue* queues);

struct Scanner {
  ScanKernel scan;
  StreamsKernel scan_streams;  // null where it does not pay
};

// Reads `bytes` bytes and does the least that keeps the loads alive: the limit that a scan is measured against.
using ReadKernel = uint64_t (*)(const uint8_t* data, int64_t bytes);
enum ReadKind : int { kReadPlain, kReadPrefetched, kReadInTurns, kReadKinds };

struct Kernels {
  Scanner scan[kDtypes];
  Scanner scan_detail[kDtypes];  // zeros and subnormals too
  ReadKernel read[kReadKinds];   // null where a unit has none
};

extern const Kernels kPortable;
#ifdef NUMGUARD_X86
extern const Kernels kAvx2;
// Linewise: cache line by cache line, and prefetched, which pays on Zen 5 and costs on Zen 4. The same bits.
extern const Kernels kAvx512, kAvx512Linewise;
extern const Scanner kAvx512Bf16Scan, kAvx512Bf16ScanLinewise;  // replace the entries of bfloat16
extern const Scanner kAvx512Bf16ScanDetail, kAvx512Bf16ScanLinewiseDetail;
#endif

}  // namespace numguard::cpu
