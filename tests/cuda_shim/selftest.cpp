// Tests the shim, as far as the kernels of csrc/cuda do not: `selftest FAULT ORDER` runs a kernel with the named fault
// planted in it, `selftest shared_contents ORDER` one that is right. Ends with 0 if the results are right, with 1 and
// "wrong: ..." if not.
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

// Writes last, so that the next block sees what it finds.
__global__ void read_shared(unsigned* found) {
  NUMGUARD_SHARED(unsigned, array, 64);
  found[blockIdx.x * 64 + threadIdx.x] = array[threadIdx.x];
  array[threadIdx.x] = 0;
}

void shared_contents() {
  std::vector<unsigned> found(2 * 64);
  cuda_shim::launch(2, 64, [&] { read_shared(found.data()); });
  expect(found == std::vector<unsigned>(found.size(), 0xcbcbcbcbu), "shared memory is poisoned before every block");
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
      __shfl_xor_sync(kFullMask, 1, 1);
    } else {
      __shfl_xor_sync(kFullMask, 1, 1);
    }
  });
}

void divergent_masks() {
  cuda_shim::launch(1, 32, [] { __shfl_xor_sync(threadIdx.x < 16 ? kFullMask : ~1u, 1, 1); });
}

void shuffle_from_outside_of_mask() {
  cuda_shim::launch(1, 32, [] {
    if (threadIdx.x < 16) __shfl_xor_sync(0xffffu, 1, 16);
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
      __shfl_xor_sync(kFullMask, 1, 1);
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
  cuda_shim::launch(1, 32, [&] {
    NUMGUARD_SHARED(int, tile, 4);
    kept = tile;
  });
  kept[0] = 1;
}

void signed_overflow() {
  std::vector<int> data(64, INT32_MAX);
  cuda_shim::launch(1, 64, [&] { data[threadIdx.x] += static_cast<int>(threadIdx.x); });
}

const std::map<std::string, void (*)()> kModes = {
    {"shared_contents", shared_contents},
    {"missing_barrier_in_one_order", missing_barrier_in_one_order},
    {"missing_second_barrier", missing_second_barrier},
    {"divergent_shuffle", divergent_shuffle},
    {"divergent_branches", divergent_branches},
    {"divergent_masks", divergent_masks},
    {"shuffle_from_outside_of_mask", shuffle_from_outside_of_mask},
    {"barriers_at_two_sites", barriers_at_two_sites},
    {"deadlock", deadlock},
    {"block_too_large", block_too_large},
    {"empty_grid", empty_grid},
    {"write_past_shared", write_past_shared},
    {"index_past_shared", index_past_shared},
    {"read_past_local", read_past_local},
    {"use_shared_after_block", use_shared_after_block},
    {"signed_overflow", signed_overflow},
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
