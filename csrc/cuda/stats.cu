#include "stats.h"

#include <cstring>
#include <stdexcept>

#include "kernels.cuh"

namespace numguard::cuda {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, cudaStream_t stream, const Arguments&... arguments) {
  const dim3 grid(static_cast<unsigned>(blocks)), block(kThreads);
#ifdef NUMGUARD_CUDA_SHIM
  cuda_shim::launch_on(stream, grid, block, [&] { kernel(arguments...); });
#else
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "launch the statistics");
#endif
}

// Makes a device the target of launches, for its own lifetime.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    check(cudaGetDevice(&before_), "which device is current");
    changed_ = before_ != device;
    if (changed_) check(cudaSetDevice(device), "make the device current");
  }
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

template <Dtype kDtype, typename Addresses>
void launch_chunks_of(const Addresses& addresses, const Chunk* chunks, int64_t count, bool detail, Record* records,
                      cudaStream_t stream) {
  if (detail)
    launch(chunk_kernel<kDtype, true, Addresses>, count, stream, addresses, chunks, records);
  else
    launch(chunk_kernel<kDtype, false, Addresses>, count, stream, addresses, chunks, records);
}

template <typename Addresses>
void launch_chunks(Dtype dtype, const Addresses& addresses, const Chunk* chunks, int64_t count, bool detail,
                   Record* records, cudaStream_t stream) {
  switch (dtype) {
    case kFloat32:
      return launch_chunks_of<kFloat32>(addresses, chunks, count, detail, records, stream);
    case kFloat16:
      return launch_chunks_of<kFloat16>(addresses, chunks, count, detail, records, stream);
    case kBFloat16:
      return launch_chunks_of<kBFloat16>(addresses, chunks, count, detail, records, stream);
    case kFloat64:
      return launch_chunks_of<kFloat64>(addresses, chunks, count, detail, records, stream);
    case kFloat8E4M3FN:
      return launch_chunks_of<kFloat8E4M3FN>(addresses, chunks, count, detail, records, stream);
    case kFloat8E5M2:
      return launch_chunks_of<kFloat8E5M2>(addresses, chunks, count, detail, records, stream);
    default:
      throw std::runtime_error("no kernel for dtype " + std::to_string(dtype));
  }
}

template <typename Addresses>
void scan(Queue queue, const Tables& tables, const Addresses& addresses, bool detail, uintptr_t records) {
  const CurrentDevice current(queue.device);
  const auto stream = reinterpret_cast<cudaStream_t>(queue.stream);
  const auto* chunks = reinterpret_cast<const Chunk*>(tables.chunks);
  auto* rows = reinterpret_cast<Record*>(records);
  for (const Launch& one : tables.launches)
    launch_chunks(one.dtype, addresses, chunks + one.first_chunk, one.chunks, detail, rows, stream);
  if (tables.n_splits > 0)
    launch(combine_kernel, tables.n_splits, stream, reinterpret_cast<const Split*>(tables.splits), rows);
}

}  // namespace

std::string unavailable(int device) {
  try {
    const CurrentDevice current(device);
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, combine_kernel), "load the kernels (which architectures are they for?)");
  } catch (const std::runtime_error& error) {
    cudaGetLastError();  // else the next caller finds it
    return error.what();
  }
  return "";
}

int inline_capacity() { return InlineAddresses::kCapacity; }

void scan_table(Queue queue, const Tables& tables, uint64_t base, uintptr_t starts, bool detail, uintptr_t records) {
  scan(queue, tables, AddressTable{base, reinterpret_cast<const uint64_t*>(starts)}, detail, records);
}

void scan_inline(Queue queue, const Tables& tables, const uint64_t* addresses, int64_t count, bool detail,
                 uintptr_t records) {
  if (count > InlineAddresses::kCapacity) throw std::runtime_error("too many addresses for the arguments of a launch");
  InlineAddresses copy;
  std::memcpy(copy.starts, addresses, static_cast<size_t>(count) * sizeof *addresses);
  scan(queue, tables, copy, detail, records);
}

}  // namespace numguard::cuda
