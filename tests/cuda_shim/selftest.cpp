// Tests the shim: `selftest checks ORDER` runs kernels that must give the right result, `selftest FAULT ORDER` runs a
// kernel with the named fault planted in it. Ends with 0 if the results are right, with 1 and "wrong: ..." if not.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <map>
#include <numeric>
#include <string>
#include <vector>

namespace {

constexpr unsigned kFullMask = 0xffffffffu;

int g_wrong = 0;

void expect(bool right, const char* what) {
  if (right) return;
  fprintf(stderr, "wrong: %s\n", what);
  ++g_wrong;
}

std::vector<int> counting(size_t count) {
  std::vector<int> values(count);
  std::iota(values.begin(), values.end(), 1);
  return values;
}

// ---- Kernels that are right -----------------------------------------------------------------------------------------

template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads) reverse_blocks(T* data) {
  NUMGUARD_SHARED(T, tile, kThreads);
  T* const own = data + blockIdx.x * kThreads + threadIdx.x;
  tile[threadIdx.x] = *own;
  __syncthreads();
  *own = tile[kThreads - 1 - threadIdx.x];
}

template <class T, int kThreads>
void check_reversal(const char* what) {
  constexpr unsigned kBlocks = 3;
  std::vector<T> data(kBlocks * kThreads), reversed(data.size());
  for (size_t i = 0; i < data.size(); ++i) {
    data[i] = static_cast<T>(i);
    reversed[i / kThreads * kThreads + kThreads - 1 - i % kThreads] = data[i];
  }
  cuda_shim::launch(kBlocks, kThreads, [&] { reverse_blocks<T, kThreads>(data.data()); });
  expect(data == reversed, what);
}

__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
  for (int flips = warpSize / 2; flips > 0; flips /= 2) value += __shfl_xor_sync(kFullMask, value, flips);
  return value;
}

// Called twice by the kernel below: both calls share one array and one barrier, as in CUDA.
__device__ double block_sum(double value) {
  NUMGUARD_SHARED(double, sums, 32);
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += sums[warp];
  __syncthreads();
  return total;
}

__global__ void sum_twice(const int* values, double* sums, double* squares) {
  const int value = values[blockIdx.x * blockDim.x + threadIdx.x];
  const double sum = block_sum(value), square = block_sum(1.0 * value * value);
  sums[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  squares[blockIdx.x * blockDim.x + threadIdx.x] = square;
}

void check_block_sums(unsigned blocks, unsigned threads) {
  const std::vector<int> values = counting(size_t{blocks} * threads);
  std::vector<double> sums(values.size()), squares(values.size());
  cuda_shim::launch(blocks, threads, [&] { sum_twice(values.data(), sums.data(), squares.data()); });
  bool right = true;
  for (unsigned block = 0; block < blocks; ++block) {
    double sum = 0, square = 0;
    for (unsigned i = block * threads; i < (block + 1) * threads; ++i) {
      sum += values[i];
      square += 1.0 * values[i] * values[i];
    }
    for (unsigned i = block * threads; i < (block + 1) * threads; ++i)
      right = right && sums[i] == sum && squares[i] == square;
  }
  expect(right, "sums of blocks");
}

// Each result of a collective in a row of its own, a column per thread.
enum Row { kBroadcast, kUp, kDown, kXor, kGroup, kBallot, kAny, kAll, kAdd, kMin, kMax, kCount, kOr, kAnd, kRows };

__global__ void collectives(unsigned* results) {
  const unsigned thread = threadIdx.x, lane = thread % 32, value = 10 * thread + 7;
  unsigned* const own = results + thread;
  const unsigned row = blockDim.x;
  own[kBroadcast * row] = __shfl_sync(kFullMask, value, 5);
  own[kUp * row] = __shfl_up_sync(kFullMask, value, 3u);
  own[kDown * row] = __shfl_down_sync(kFullMask, value, 3u, 8);
  own[kXor * row] = __shfl_xor_sync(kFullMask, value, 3);
  own[kGroup * row] = __shfl_sync(kFullMask, value, 9, 8);
  own[kBallot * row] = __ballot_sync(kFullMask, lane % 3 == 0);
  own[kAny * row] = static_cast<unsigned>(__any_sync(kFullMask, thread == 40));
  // Two groups of one warp, each with its own mask and at its own time.
  if (lane < 4) {
    own[kAll * row] = static_cast<unsigned>(__all_sync(0xfu, lane < 4));
  } else {
    own[kAll * row] = static_cast<unsigned>(__all_sync(~0xfu, lane < 5));
  }
  __syncwarp();
  own[kAdd * row] = __reduce_add_sync(kFullMask, value);
  own[kMin * row] = __reduce_min_sync(kFullMask, value);
  own[kMax * row] = __reduce_max_sync(kFullMask, value);
  own[kCount * row] = static_cast<unsigned>(__syncthreads_count(thread % 2 == 0));
  own[kOr * row] = static_cast<unsigned>(__syncthreads_or(thread == 1));
  own[kAnd * row] = static_cast<unsigned>(__syncthreads_and(thread != 1));
}

// The same by plain loops. A last warp may have fewer lanes, but at least 8 and a multiple of 8 here.
void check_collectives(unsigned threads) {
  std::vector<unsigned> results(kRows * threads);
  cuda_shim::launch(1, threads, [&] { collectives(results.data()); });
  const auto value = [](unsigned thread) { return 10 * thread + 7; };
  for (unsigned thread = 0; thread < threads; ++thread) {
    const unsigned lane = thread % 32, first = thread - lane, lanes = std::min(32u, threads - first);
    unsigned wanted[kRows] = {};
    wanted[kBroadcast] = value(first + 5);
    wanted[kUp] = value(lane >= 3 ? thread - 3 : thread);
    wanted[kDown] = value(lane % 8 + 3 < 8 ? thread + 3 : thread);
    wanted[kXor] = value(thread ^ 3u);
    wanted[kGroup] = value(thread / 8 * 8 + 1);
    for (unsigned i = 0; i < lanes; ++i) {
      wanted[kBallot] |= (i % 3 == 0 ? 1u : 0u) << i;
      wanted[kAdd] += value(first + i);
    }
    wanted[kAny] = first == 32;
    wanted[kAll] = lane < 4;
    wanted[kMin] = value(first);
    wanted[kMax] = value(first + lanes - 1);
    wanted[kCount] = threads / 2;
    wanted[kOr] = 1;
    wanted[kAnd] = 0;
    for (unsigned row = 0; row < kRows; ++row) {
      const std::string what = "collective " + std::to_string(row) + " of thread " + std::to_string(thread);
      expect(results[row * threads + thread] == wanted[row], what.c_str());
    }
  }
}

struct Totals {
  int sum;
  unsigned bits;
  unsigned long long count, least, most;
};

__global__ void add_up(const int* values, int count, Totals* totals) {
  const int stride = static_cast<int>(blockDim.x * gridDim.x);
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < count; i += stride) {
    const int value = __ldg(values + i);
    atomicAdd(&totals->sum, value);
    atomicAdd(&totals->count, 1);
    atomicMin(&totals->least, value);
    atomicMax(&totals->most, value);
    atomicOr(&totals->bits, static_cast<unsigned>(value));
  }
}

void check_atomics() {
  const std::vector<int> values = counting(1000);
  Totals totals{0, 0, 0, ~0ull, 0};
  cuda_shim::launch(7, 48, [&] { add_up(values.data(), 1000, &totals); });
  expect(totals.sum == 500500 && totals.count == 1000, "atomic sums");
  expect(totals.least == 1 && totals.most == 1000 && totals.bits == 1023, "atomic minimum, maximum and bits");
  int wraps = INT32_MAX;
  cuda_shim::launch(1, 1, [&] { atomicAdd(&wraps, 1); });
  expect(wraps == INT32_MIN, "an atomic sum wraps around");
}

__global__ void number_all(unsigned* numbers) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  numbers[block * blockDim.x * blockDim.y * blockDim.z + thread] += thread + 1;
}

void check_dimensions() {
  const dim3 grid(2, 3, 4), block(5, 4, 2);
  std::vector<unsigned> numbers(24 * 40);
  cuda_shim::launch(grid, block, [&] { number_all(numbers.data()); });
  bool right = true;
  for (size_t i = 0; i < numbers.size(); ++i) right = right && numbers[i] == i % 40 + 1;
  expect(right, "every thread of every block runs once");
}

// Writes first, so that the next block sees what it finds.
__global__ void shared_contents(unsigned* found) {
  NUMGUARD_SHARED(unsigned, array, 64);
  found[blockIdx.x * 64 + threadIdx.x] = array[threadIdx.x];
  array[threadIdx.x] = 0;
}

void check_poison() {
  std::vector<unsigned> found(2 * 64);
  cuda_shim::launch(2, 64, [&] { shared_contents(found.data()); });
  expect(found == std::vector<unsigned>(found.size(), 0xcbcbcbcbu), "shared memory is poisoned before every block");
}

void check_arithmetic() {
  expect(__half2float(__half_raw{0x3c00}) == 1.0f && __half2float(__half_raw{0xfbff}) == -65504.0f, "halves");
  expect(__half2float(__half_raw{0x0001}) == 0x1p-24f && std::signbit(__half2float(__half_raw{0x8000})),
         "small halves");
  expect(std::isnan(__half2float(__half_raw{0x7c01})) && __half2float(__half_raw{0xfc00}) == -INFINITY, "wild halves");
  expect(__uint_as_float(__float_as_uint(-1.5f)) == -1.5f && __float_as_uint(1.0f) == 0x3f800000u, "bits of floats");
  expect(__longlong_as_double(__double_as_longlong(0.1)) == 0.1, "bits of doubles");
  expect(__fmaf_rn(0x1.000002p0f, 0x1.000002p0f, -0x1.000004p0f) == 0x1p-46f, "a fused product is not rounded");
  expect(__fadd_rn(__fmul_rn(0x1.000002p0f, 0x1.000002p0f), -0x1.000004p0f) == 0.0f, "a single product is rounded");
  expect(__fma_rn(3.0, 5.0, 1.0) == 16.0 && __dadd_rn(__dmul_rn(3.0, 5.0), 1.0) == 16.0, "doubles");
  expect(__popc(0xf0fu) == 8 && __clz(1) == 31 && __clz(0) == 32 && __ffs(8) == 4 && __ffs(0) == 0, "bit counts");
  expect(max(-1, 1u) == 0xffffffffu && min(2, 1) == 1 && max(NAN, 1.0f) == 1.0f, "minimum and maximum");
  expect(sizeof(uint4) == 16 && alignof(uint4) == 16 && alignof(ulonglong4_32a) == 32, "vector types");
}

void run_checks() {
  check_reversal<int, 256>("reversal of int");
  check_reversal<double, 64>("reversal of double");
  check_reversal<uint8_t, 40>("reversal of bytes in a partial warp");
  check_block_sums(1, 32);
  check_block_sums(3, 256);
  check_block_sums(1, 1024);
  check_collectives(64);
  check_collectives(72);
  check_atomics();
  check_dimensions();
  check_poison();
  check_arithmetic();
}

// ---- Kernels with a fault -------------------------------------------------------------------------------------------

__global__ void reverse_without_barrier(int* data) {
  NUMGUARD_SHARED(int, tile, 64);
  tile[threadIdx.x] = data[threadIdx.x];
  data[threadIdx.x] = tile[63 - threadIdx.x];
}

void missing_barrier() {
  std::vector<int> data = counting(64), reversed(data.rbegin(), data.rend());
  cuda_shim::launch(1, 64, [&] { reverse_without_barrier(data.data()); });
  expect(data == reversed, "reversal");
}

// Right whenever thread 0 comes first.
__global__ void broadcast_without_barrier(int* data) {
  NUMGUARD_SHARED(int, first, 1);
  if (threadIdx.x == 0) first[0] = data[0];
  data[threadIdx.x] = first[0];
}

void missing_barrier_in_one_order() {
  std::vector<int> data = counting(64);
  cuda_shim::launch(1, 64, [&] { broadcast_without_barrier(data.data()); });
  expect(data == std::vector<int>(64, 1), "broadcast");
}

// The array is written again while others still read it.
__global__ void reuse_without_barrier(const int* data, int* results) {
  NUMGUARD_SHARED(int, tile, 64);
  int sum = 0;
  for (int round = 0; round < 2; ++round) {
    tile[threadIdx.x] = data[64 * round + threadIdx.x];
    __syncthreads();
    sum += tile[63 - threadIdx.x];
  }
  results[threadIdx.x] = sum;
}

void missing_second_barrier() {
  const std::vector<int> data = counting(128);
  std::vector<int> results(64);
  cuda_shim::launch(1, 64, [&] { reuse_without_barrier(data.data(), results.data()); });
  for (int i = 0; i < 64; ++i) expect(results[63 - i] == data[i] + data[64 + i], "sum over two rounds");
}

void divergent_shuffle() {
  cuda_shim::launch(1, 32, [] {
    if (threadIdx.x < 16) __shfl_xor_sync(kFullMask, 1, 1);
  });
}

void divergent_branches() {
  cuda_shim::launch(1, 32, [] {
    if (threadIdx.x < 16) {
      __any_sync(kFullMask, 1);
    } else {
      __ballot_sync(kFullMask, 1);
    }
  });
}

void divergent_masks() {
  cuda_shim::launch(1, 32, [] { __syncwarp(threadIdx.x < 16 ? kFullMask : ~1u); });
}

void outside_of_own_mask() {
  cuda_shim::launch(1, 32, [] { __syncwarp(0xffffu); });
}

void shuffle_from_outside_of_mask() {
  cuda_shim::launch(1, 32, [] {
    if (threadIdx.x < 16) __shfl_sync(0xffffu, 1, 16);
  });
}

void shuffle_from_missing_lane() {
  cuda_shim::launch(1, 40, [] { __shfl_xor_sync(kFullMask, 1, 16); });
}

void divergent_barrier() {
  cuda_shim::launch(1, 64, [] {
    if (threadIdx.x < 40) __syncthreads();
  });
}

void barriers_at_two_sites() {
  cuda_shim::launch(1, 64, [] {
    if (threadIdx.x < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  });
}

void deadlock() {
  cuda_shim::launch(1, 64, [] {
    if (threadIdx.x < 40) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  });
}

void block_too_large() {
  cuda_shim::launch(1, 1025, [] {});
}

void empty_grid() {
  cuda_shim::launch(0, 32, [] {});
}

// Through a pointer, so that AddressSanitizer has to find it: an index into the array itself is UBSan's.
void write_past_shared() {
  cuda_shim::launch(1, 64, [] {
    NUMGUARD_SHARED(int, tile, 63);
    int* volatile start = tile;
    start[threadIdx.x] = 1;
  });
}

void index_past_shared() {
  cuda_shim::launch(1, 64, [] {
    NUMGUARD_SHARED(int, tile, 63);
    tile[threadIdx.x] = 1;
  });
}

void read_past_global() {
  const std::vector<int> data = counting(63);
  std::vector<int> copy(64);
  cuda_shim::launch(1, 64, [&] { copy[threadIdx.x] = data.data()[threadIdx.x]; });
}

void read_past_local() {
  std::vector<int> copy(64);
  cuda_shim::launch(1, 64, [&] {
    int local[8] = {};
    int* volatile start = local;
    __syncthreads();
    copy[threadIdx.x] = start[threadIdx.x / 7];
  });
}

void use_shared_after_block() {
  int* kept = nullptr;
  cuda_shim::launch(1, 1, [&] {
    NUMGUARD_SHARED(int, tile, 4);
    kept = tile;
  });
  kept[0] = 1;
}

void signed_overflow() {
  std::vector<int> data(64, INT32_MAX);
  cuda_shim::launch(1, 64, [&] { data[threadIdx.x] += static_cast<int>(threadIdx.x); });
}

void misaligned_load() {
  alignas(16) unsigned words[8] = {};
  uint4 loaded;
  cuda_shim::launch(1, 1, [&] { loaded = *reinterpret_cast<const uint4*>(words + 1); });
}

const std::map<std::string, void (*)()> kModes = {
    {"checks", run_checks},
    {"missing_barrier", missing_barrier},
    {"missing_barrier_in_one_order", missing_barrier_in_one_order},
    {"missing_second_barrier", missing_second_barrier},
    {"divergent_shuffle", divergent_shuffle},
    {"divergent_branches", divergent_branches},
    {"divergent_masks", divergent_masks},
    {"outside_of_own_mask", outside_of_own_mask},
    {"shuffle_from_outside_of_mask", shuffle_from_outside_of_mask},
    {"shuffle_from_missing_lane", shuffle_from_missing_lane},
    {"divergent_barrier", divergent_barrier},
    {"barriers_at_two_sites", barriers_at_two_sites},
    {"deadlock", deadlock},
    {"block_too_large", block_too_large},
    {"empty_grid", empty_grid},
    {"write_past_shared", write_past_shared},
    {"index_past_shared", index_past_shared},
    {"read_past_global", read_past_global},
    {"read_past_local", read_past_local},
    {"use_shared_after_block", use_shared_after_block},
    {"signed_overflow", signed_overflow},
    {"misaligned_load", misaligned_load},
};

}  // namespace

int main(int count, char** arguments) {
  if (count != 3 || kModes.count(arguments[1]) == 0) {
    fprintf(stderr, "usage: selftest MODE ORDER, where MODE is one of:\n");
    for (const auto& mode : kModes) fprintf(stderr, "  %s\n", mode.first.c_str());
    return 2;
  }
  cuda_shim::set_order(arguments[2]);
  kModes.at(arguments[1])();
  return g_wrong > 0 ? 1 : 0;
}
