#include "stats.h"

#ifdef NUMGUARD_X86
#include <cpuid.h>
#endif

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

#include "float_state.h"
#include "pool.h"

namespace numguard::cpu {
namespace {

constexpr int64_t kChunk = 1 << 16;      // elements; a chunk lies inside one segment
constexpr int64_t kSmallTask = 1 << 16;  // elements that are worth handing to another thread
constexpr int64_t kLargeTask = 1 << 19;  // beyond, a longer task no longer helps the prefetchers
constexpr int64_t kTasks = 64;           // of a layout between those two, so that no thread is left alone at the end
constexpr int32_t kAhead = 4;            // chunks whose first bytes are on their way to the cache
constexpr int64_t kChunkCost = 256;      // cost of starting a chunk, in elements
constexpr int64_t kStreamedBytes = 32 << 20;  // from here on, most comes from DRAM

Scanner scanner_of(const Kernels& kernels, Dtype dtype, bool detail) {
  return detail ? kernels.scan_detail[dtype] : kernels.scan[dtype];
}

Scanner scanner_for(Isa isa, Dtype dtype, bool detail) {
  switch (isa) {
#ifdef NUMGUARD_X86
    case kIsaZen4:
      // Vectors of 512 bits are two halves there: no faster in cache, slower where they straddle lines, and float16 is
      // converted at two thirds of the speed.
      if (!detail && (dtype == kFloat32 || dtype == kFloat16)) return scanner_of(kAvx2, dtype, detail);
      return scanner_for(kIsaAvx512Bf16, dtype, detail);
    case kIsaZen5:
      if (dtype == kBFloat16) return detail ? kAvx512Bf16ScanLinewiseDetail : kAvx512Bf16ScanLinewise;
      return scanner_of(kAvx512Linewise, dtype, detail);
    case kIsaAvx512Bf16:
      if (dtype == kBFloat16) return detail ? kAvx512Bf16ScanDetail : kAvx512Bf16Scan;
      [[fallthrough]];
    case kIsaAvx512:
      return scanner_of(kAvx512, dtype, detail);
    case kIsaAvx2:
      return scanner_of(kAvx2, dtype, detail);
#endif
    default:
      return scanner_of(kPortable, dtype, detail);
  }
}

ReadKernel read_kernel_for(Isa isa, ReadKind kind) {
#ifdef NUMGUARD_X86
  if (isa > kIsaAvx2 && kAvx512.read[kind] != nullptr) return kAvx512.read[kind];
  if (isa >= kIsaAvx2 && kAvx2.read[kind] != nullptr) return kAvx2.read[kind];
#else
  (void)isa;
  (void)kind;
#endif
  return kPortable.read[kReadPlain];
}

#ifdef NUMGUARD_X86
// Family of AMD's processors, as its manuals count them; 0 for those of others.
int amd_family() {
  unsigned int eax = 0, vendor[3] = {};
  if (__get_cpuid(0, &eax, &vendor[0], &vendor[2], &vendor[1]) == 0 || memcmp(vendor, "AuthenticAMD", 12) != 0)
    return 0;
  unsigned int signature = 0, ebx, ecx, edx;
  __get_cpuid(1, &signature, &ebx, &ecx, &edx);
  return static_cast<int>(((signature >> 8) & 0xf) + ((signature >> 20) & 0xff));
}
#endif

}  // namespace

const char* isa_name(Isa isa) {
  constexpr const char* kNames[kIsas] = {"portable", "avx2", "avx512", "avx512bf16", "zen5", "zen4"};
  return kNames[isa];
}

bool isa_supported(Isa isa) {
#ifdef NUMGUARD_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case kIsaZen5:
    case kIsaZen4:
    case kIsaAvx512Bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16");
    case kIsaAvx512:
      return avx512;
    case kIsaAvx2:
      return avx2;
    default:
      return true;
  }
#else
  return isa == kIsaPortable;
#endif
}

Isa fastest_isa() {
#ifdef NUMGUARD_X86
  constexpr int kFamilyZen4 = 0x19, kFamilyZen5 = 0x1a;
  for (Isa isa : {kIsaAvx512Bf16, kIsaAvx512, kIsaAvx2}) {
    if (!isa_supported(isa)) continue;
    if (isa != kIsaAvx512Bf16) return isa;
    return amd_family() == kFamilyZen4 ? kIsaZen4 : amd_family() == kFamilyZen5 ? kIsaZen5 : isa;
  }
#endif
  return kIsaPortable;
}

ScanKernel scan_kernel(Isa isa, Dtype dtype) { return scanner_for(isa, dtype, false).scan; }

Plan::Plan(std::vector<int64_t> offsets) : offsets_(std::move(offsets)) {
  const int64_t count = segments();
  const int64_t total = offsets_.back() - offsets_.front();
  chunks_.reserve(static_cast<size_t>(count + total / kChunk));
  const int64_t task = std::clamp(total / kTasks, kSmallTask, kLargeTask);
  int64_t cost = task;  // so that the first chunk begins a task
  for (int64_t segment = 0; segment < count; ++segment) {
    const int32_t number = static_cast<int32_t>(segment);
    const int64_t length = offsets_[segment + 1] - offsets_[segment];
    if (length == 0) empty_segments_.push_back(number);
    if (length > kChunk) splits_.push_back({number, split_chunks_, split_chunks_});
    for (int64_t begin = 0; begin < length; begin += kChunk) {
      const int64_t piece = std::min(kChunk, length - begin);
      if (cost + piece > task) {
        tasks_.push_back(static_cast<int32_t>(chunks_.size()));
        cost = 0;
      }
      cost += piece + kChunkCost;
      chunks_.push_back({begin, static_cast<int32_t>(piece), number, length > kChunk ? split_chunks_++ : -1});
    }
    if (length > kChunk) splits_.back().last_part = split_chunks_;
  }
  tasks_.push_back(static_cast<int32_t>(chunks_.size()));
}

// One call: state shared by the tasks of a plan.
class Scan {
 public:
  Scan(const Plan& plan, Source source, Dtype dtype, bool detail, Isa isa, Record* out)
      : plan_(plan),
        source_(source),
        item_size_(kItemSize[dtype]),
        scanner_(scanner_for(isa, dtype, detail)),
        out_(out) {}

  void run(int threads) {
    if (plan_.split_chunks_ > 0) parts_.reset(new Record[static_cast<size_t>(plan_.split_chunks_)]);
    const int64_t bytes = (plan_.offsets_.back() - plan_.offsets_.front()) * item_size_;
    const int tasks = static_cast<int>(plan_.tasks_.size()) - 1;
    if (bytes < kSerialBytes) threads = 1;
    if (bytes >= kStreamedBytes && scanner_.scan_streams != nullptr && tasks >= kStreams) {
      pieces_.reset(new Piece[plan_.chunks_.size()]);
      for (size_t index = 0; index < plan_.chunks_.size(); ++index) pieces_[index] = piece_of(plan_.chunks_[index]);
      const int rounds = (tasks + kStreams - 1) / kStreams;
      parallel_for(rounds, threads, [this, tasks, rounds](int round) { run_streams(round, rounds, tasks); });
    } else if (threads == 1) {
      const FloatState state;
      for (int task = 0; task < tasks; ++task) run_task(task);
    } else {
      parallel_for(tasks, threads, [this](int task) {
        const FloatState state;
        run_task(task);
      });
    }
    combine();
  }

 private:
  const uint8_t* address(int32_t segment) const {
    if (source_.addresses != nullptr) return reinterpret_cast<const uint8_t*>(source_.addresses[segment]);
    return source_.flat + plan_.offsets_[segment] * item_size_;
  }

  Piece piece_of(const Plan::Chunk& chunk) const {
    Record* const out = chunk.part < 0 ? out_ + chunk.segment : &parts_[chunk.part];
    return {address(chunk.segment) + chunk.begin * item_size_, chunk.length, chunk.begin, out};
  }

  void run_task(int task) {
    const int32_t end = plan_.tasks_[task + 1];
    for (int32_t index = plan_.tasks_[task]; index < end; ++index) {
      if (index + kAhead < end) __builtin_prefetch(piece_of(plan_.chunks_[index + kAhead]).data);
      const Piece piece = piece_of(plan_.chunks_[index]);
      scanner_.scan(piece.data, piece.count, piece.base, piece.out);
    }
  }

  // Tasks that lie a part of the memory apart, together.
  void run_streams(int round, int rounds, int tasks) {
    Queue queues[kStreams] = {};
    for (int stream = 0; stream < kStreams; ++stream) {
      const int task = stream * rounds + round;
      if (task < tasks) queues[stream] = {&pieces_[plan_.tasks_[task]], &pieces_[plan_.tasks_[task + 1]]};
    }
    const FloatState state;
    scanner_.scan_streams(queues);
  }

  // The records of the segments that no chunk has written.
  void combine() {
    const FloatState state;
    for (int32_t segment : plan_.empty_segments_) out_[segment] = kEmptyRecord;
    for (const Plan::Split& split : plan_.splits_) {
      Record record = kEmptyRecord;
      for (int32_t part = split.first_part; part < split.last_part; ++part) append(record, parts_[part]);
      out_[split.segment] = record;
    }
  }

  const Plan& plan_;
  const Source source_;
  const int item_size_;
  const Scanner scanner_;
  Record* const out_;
  std::unique_ptr<Piece[]> pieces_;  // the chunks, if streams take turns
  std::unique_ptr<Record[]> parts_;  // of the chunks of segments that have several
};

void tensor_stats(const Plan& plan, Source source, Dtype dtype, bool detail, Isa isa, int threads, Record* out) {
  Scan(plan, source, dtype, detail, isa, out).run(threads);
}

uint64_t read_memory(const uint8_t* data, int64_t bytes, ReadKind kind, Isa isa, int threads) {
  int64_t piece = std::clamp<int64_t>(bytes / kTasks, 256 << 10, 2 << 20);
  if (kind == kReadInTurns) piece *= kStreams;
  const ReadKernel kernel = read_kernel_for(isa, kind);
  std::vector<uint64_t> sums(static_cast<size_t>((bytes + piece - 1) / piece));
  parallel_for(static_cast<int>(sums.size()), bytes < kSerialBytes ? 1 : threads, [&](int task) {
    const int64_t begin = task * piece;
    sums[static_cast<size_t>(task)] = kernel(data + begin, std::min(piece, bytes - begin));
  });
  uint64_t total = 0;
  for (uint64_t sum : sums) total += sum;
  return total;
}

}  // namespace numguard::cpu
