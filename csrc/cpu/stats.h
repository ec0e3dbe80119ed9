// Segments in, records out: the grid of chunks, the threads, and the choice of the instruction set.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"

namespace numguard::cpu {

// Instruction sets, and last the choices of kernels that were measured to be the fastest on a CPU.
enum Isa : int { kIsaPortable, kIsaAvx2, kIsaAvx512, kIsaAvx512Bf16, kIsaZen5, kIsaZen4, kIsas };

const char* isa_name(Isa isa);
bool isa_supported(Isa isa);  // by this CPU, and built into this binary
Isa fastest_isa();

ScanKernel scan_kernel(Isa isa, Dtype dtype);  // without detail

constexpr int64_t kSerialBytes = 512 << 10;  // below, one thread does it: to wake another takes longer than the scan

// How the segments of a layout are cut into chunks. It depends on the sizes alone, never on the number of threads, so
// that results are the same bits for any number. Immutable; may be used from many threads at once.
class Plan {
 public:
  // Segment i is [offsets[i], offsets[i + 1]); offsets never decrease.
  explicit Plan(std::vector<int64_t> offsets);

  int64_t segments() const { return static_cast<int64_t>(offsets_.size()) - 1; }
  int64_t end() const { return offsets_.back(); }
  int64_t elements() const { return offsets_.back() - offsets_.front(); }

 private:
  friend class Scan;
  struct Chunk {
    int64_t begin;  // inside the segment
    int32_t length;
    int32_t segment;
    int32_t part;  // number of its record among those of split segments; -1 if it is all of its segment
  };
  struct Split {
    int32_t segment;
    int32_t first_part, last_part;
  };
  std::vector<int64_t> offsets_;
  std::vector<Chunk> chunks_;
  std::vector<int32_t> empty_segments_;
  std::vector<Split> splits_;   // segments of several chunks
  std::vector<int32_t> tasks_;  // first chunk of each task, and one more entry at the end
  int32_t split_chunks_ = 0;
};

// Place of a plan's segments: at their offsets from `flat`, or each at an address of its own.
struct Source {
  const uint8_t* flat = nullptr;
  const uint64_t* addresses = nullptr;
};

// Writes one record per segment to `out`. Reads every element once; allocates 64 bytes for each chunk of
// a segment that has several.
void tensor_stats(const Plan& plan, Source source, Dtype dtype, bool detail, Isa isa, int threads, Record* out);

// Reads `bytes` bytes and does nothing with them, on the same threads and in pieces of the same size.
uint64_t read_memory(const uint8_t* data, int64_t bytes, ReadKind kind, Isa isa, int threads);

}  // namespace numguard::cpu
