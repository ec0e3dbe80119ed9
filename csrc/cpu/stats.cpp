#include "stats.h"

#ifdef NUMGUARD_X86
#include <cpuid.h>
#endif

#include <algorithm>
#include <cstring>
#include <utility>

#include "float_state.h"
#include "pool.h"

namespace numguard::cpu {
namespace {

constexpr int64_t kChunk = 1 << 16;      // elements; a chunk lies inside one segment
constexpr int64_t kSmallTask = 1 << 16;  // elements that are worth handing to another thread
constexpr int64_t kLargeTask = 1 << 19;  // beyond, a longer task no longer helps the prefetchers
constexpr int64_t kTasks = 64;           // of a layout between those two, so that no thread is left alone at the end
constexpr int64_t kChunkCost = 256;      // cost of starting a chunk, in elements
constexpr int64_t kSerialBytes = 512 << 10;  // below, waking a worker takes longer than the scan

ScanKernel kernel_of(const Kernels& kernels, Dtype dtype, bool detail) {
  return detail ? kernels.scan_detail[dtype] : kernels.scan[dtype];
}

ScanKernel kernel_for(Isa isa, Dtype dtype, bool detail) {
  switch (isa) {
#ifdef NUMGUARD_X86
    case kIsaZen4:
      // Vectors of 512 bits are two halves there: no faster in cache, slower where they straddle lines, and float16 is
      // converted at two thirds of the speed.
      if (!detail && (dtype == kFloat32 || dtype == kFloat16)) return kernel_of(kAvx2, dtype, detail);
      return kernel_for(kIsaAvx512Bf16, dtype, detail);
    case kIsaZen5:
      if (dtype == kBFloat16) return detail ? kAvx512Bf16ScanLinewiseDetail : kAvx512Bf16ScanLinewise;
      return kernel_of(kAvx512Linewise, dtype, detail);
    case kIsaAvx512Bf16:
      if (dtype == kBFloat16) return detail ? kAvx512Bf16ScanDetail : kAvx512Bf16Scan;
      [[fallthrough]];
    case kIsaAvx512:
      return kernel_of(kAvx512, dtype, detail);
    case kIsaAvx2:
      return kernel_of(kAvx2, dtype, detail);
#endif
    default:
      return kernel_of(kPortable, dtype, detail);
  }
}

ReadKernel read_kernel_for(Isa isa, bool prefetch) {
  const Kernels* kernels = &kPortable;
#ifdef NUMGUARD_X86
  if (isa == kIsaAvx2) kernels = &kAvx2;
  if (isa > kIsaAvx2) kernels = &kAvx512;
#else
  (void)isa;
#endif
  return prefetch ? kernels->read_prefetched : kernels->read;
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

ScanKernel scan_kernel(Isa isa, Dtype dtype) { return kernel_for(isa, dtype, false); }

Plan::Plan(std::vector<int64_t> offsets) : offsets_(std::move(offsets)) {
  const int64_t count = segments();
  first_chunk_.reserve(static_cast<size_t>(count) + 1);
  const int64_t total = offsets_.back() - offsets_.front();
  chunks_.reserve(static_cast<size_t>(count + total / kChunk));
  const int64_t task = std::clamp(total / kTasks, kSmallTask, kLargeTask);
  int64_t cost = task;  // so that the first chunk begins a task
  for (int64_t segment = 0; segment < count; ++segment) {
    first_chunk_.push_back(static_cast<int32_t>(chunks_.size()));
    const int64_t length = offsets_[segment + 1] - offsets_[segment];
    for (int64_t begin = 0; begin < length; begin += kChunk) {
      const int64_t piece = std::min(kChunk, length - begin);
      if (cost + piece > task) {
        tasks_.push_back(static_cast<int32_t>(chunks_.size()));
        cost = 0;
      }
      cost += piece + kChunkCost;
      chunks_.push_back({begin, static_cast<int32_t>(piece), static_cast<int32_t>(segment)});
    }
  }
  first_chunk_.push_back(static_cast<int32_t>(chunks_.size()));
  tasks_.push_back(static_cast<int32_t>(chunks_.size()));
}

// One call: state shared by the tasks of a plan.
class Scan {
 public:
  Scan(const Plan& plan, Source source, Dtype dtype, bool detail, Isa isa, Record* out)
      : plan_(plan),
        source_(source),
        item_size_(kItemSize[dtype]),
        kernel_(kernel_for(isa, dtype, detail)),
        out_(out) {}

  void run(int threads) {
    parts_.resize(plan_.chunks_.size());
    const int64_t bytes = (plan_.offsets_.back() - plan_.offsets_.front()) * item_size_;
    const int tasks = static_cast<int>(plan_.tasks_.size()) - 1;
    parallel_for(tasks, bytes < kSerialBytes ? 1 : threads, [this](int task) { run_task(task); });
    const FloatState state;
    for (int64_t segment = 0; segment < plan_.segments(); ++segment) combine(segment);
  }

 private:
  const uint8_t* address(int32_t segment) const {
    if (source_.addresses != nullptr) return reinterpret_cast<const uint8_t*>(source_.addresses[segment]);
    return source_.flat + plan_.offsets_[segment] * item_size_;
  }

  void run_task(int task) {
    const FloatState state;
    for (int32_t index = plan_.tasks_[task]; index < plan_.tasks_[task + 1]; ++index) {
      const Plan::Chunk& chunk = plan_.chunks_[index];
      kernel_(address(chunk.segment) + chunk.begin * item_size_, chunk.length, chunk.begin, &parts_[index]);
    }
  }

  void combine(int64_t segment) {
    Record record = kEmptyRecord;
    for (int32_t index = plan_.first_chunk_[segment]; index < plan_.first_chunk_[segment + 1]; ++index)
      append(record, parts_[index]);
    out_[segment] = record;
  }

  const Plan& plan_;
  const Source source_;
  const int item_size_;
  const ScanKernel kernel_;
  Record* const out_;
  std::vector<Record> parts_;
};

void tensor_stats(const Plan& plan, Source source, Dtype dtype, bool detail, Isa isa, int threads, Record* out) {
  Scan(plan, source, dtype, detail, isa, out).run(threads);
}

uint64_t read_memory(const uint8_t* data, int64_t bytes, bool prefetch, Isa isa, int threads) {
  const int64_t piece = std::clamp<int64_t>(bytes / kTasks, 256 << 10, 2 << 20);
  const ReadKernel kernel = read_kernel_for(isa, prefetch);
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
