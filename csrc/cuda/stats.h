// Launches of the GPU kernels. Plain C++: including it needs no CUDA header.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../dtypes.h"
#include "../record.h"

namespace numguard::cuda {

// Where to launch: a device by its number, and a stream of it (a cudaStream_t).
struct Queue {
  int device;
  uintptr_t stream;
};

// The chunks of one dtype in the chunk table.
struct Launch {
  Dtype dtype;
  int64_t first_chunk;
  int64_t chunks;
};

// The tables of a call, all in the device's memory (contents: hallo_numguard/ops/backends/chunks.py).
struct Tables {
  uintptr_t chunks;  // rows of 4 int32
  std::vector<Launch> launches;
  uintptr_t splits;  // rows of 3 int32
  int64_t n_splits;
};

// Why the kernels cannot run on a device: empty if they can.
std::string unavailable(int device);

// How many addresses a launch can take as arguments.
int inline_capacity();

// Writes the records of segments that begin `starts[i]` bytes after `base`; `starts` is in the device's memory.
// Asynchronous: one launch per dtype, and one more if a segment has several chunks. Throws std::runtime_error with
// CUDA's own message.
void scan_table(Queue queue, const Tables& tables, uint64_t base, uintptr_t starts, bool detail, uintptr_t records);

// The same for segments at addresses in the host's memory, at most `inline_capacity()` of them: they travel with the
// launch, without a copy.
void scan_inline(Queue queue, const Tables& tables, const uint64_t* addresses, int64_t count, bool detail,
                 uintptr_t records);

}  // namespace numguard::cuda
