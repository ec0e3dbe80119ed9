// The GPU kernels in CUDA C++: from chunks of memory to records, and from the records of a segment to one.
//
// The same passes as hallo_numguard/ops/backends/triton_kernels.py, with the same bits as results: the sum of an
// element depends on its address alone, sums are added as a tree of neighbours, and no product that rounds is fused
// into an addition. No atomics, no memory that must be zero before.
#pragma once

#include "../record.h"
#include "formats.cuh"

namespace numguard::cuda {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocks = 9;         // of chunk_kernel on a multiprocessor, at least: 36 warps, at most 56 registers
constexpr int kChunk = 1 << 15;    // elements of a chunk, at most
constexpr int kAlignment = 32;     // bytes: one sector of DRAM, and the widest load
constexpr int kRescanGroups = 4;   // sums per thread in the exact pass: element i goes to sum i mod (4 * kThreads)
constexpr int kLoadsInFlight = 4;  // of 16 bytes, per thread
constexpr int kNowhere = 0x7fffffff;

// A row of the chunk table (hallo_numguard/ops/backends/chunks.py).
struct alignas(16) Chunk {
  int32_t segment;
  int32_t number;  // inside the segment
  int32_t length;  // elements
  int32_t row;     // of its record
};

// A segment of several chunks, and the rows of their records: [first_row, end_row).
struct Split {
  int32_t segment, first_row, end_row;
};

// Where segments begin: a table in the device's memory, in bytes from `base`.
struct AddressTable {
  uint64_t base;
  const uint64_t* starts;
  __device__ __forceinline__ uint64_t operator[](int32_t segment) const { return base + starts[segment]; }
};

// Where segments begin, as an argument of the kernel: nothing to copy first. Arguments may take 4 KiB on any GPU.
struct InlineAddresses {
  static constexpr int kCapacity = 480;
  uint64_t starts[kCapacity];
  __device__ __forceinline__ uint64_t operator[](int32_t segment) const { return starts[segment]; }
};

// Adds neighbours until one is left.
template <int kCount, typename T>
__device__ __forceinline__ double tree_sum(const T* values) {
  if constexpr (kCount == 1)
    return static_cast<double>(values[0]);
  else
    return tree_sum<kCount / 2>(values) + tree_sum<kCount / 2>(values + kCount / 2);
}

// The same over the threads of a warp.
__device__ __forceinline__ double warp_tree_sum(double value) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {  // of integers, in any order
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

template <typename T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value = max(value, __shfl_xor_sync(kAllLanes, value, distance));
  return value;
}

__device__ __forceinline__ int thread_id() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ bool is_first_of_warp() { return thread_id() % 32 == 0; }
__device__ __forceinline__ int warp_id() { return thread_id() / 32; }

template <typename T>
__device__ __forceinline__ T sum_of_warps(const T* values) {
  T total = values[0];
  for (int warp = 1; warp < kWarps; ++warp) total += values[warp];
  return total;
}

template <typename T>
__device__ __forceinline__ T max_of_warps(const T* values) {
  T largest = values[0];
  for (int warp = 1; warp < kWarps; ++warp) largest = max(largest, values[warp]);
  return largest;
}

template <typename T>
__device__ __forceinline__ T min_of_warps(const T* values) {
  T smallest = values[0];
  for (int warp = 1; warp < kWarps; ++warp) smallest = min(smallest, values[warp]);
  return smallest;
}

enum { kNan, kPosInf, kNegInf, kZeros, kSubnormals, kCounts };  // of a record

// Adds up what the warps have counted: kCounts rows of kWarps.
template <typename T>
__device__ __forceinline__ void write_counts(Record& record, const T* warp_counts) {
  record.nan = sum_of_warps(warp_counts + kNan * kWarps);
  record.pos_inf = sum_of_warps(warp_counts + kPosInf * kWarps);
  record.neg_inf = sum_of_warps(warp_counts + kNegInf * kWarps);
  record.zeros = sum_of_warps(warp_counts + kZeros * kWarps);
  record.subnormals = sum_of_warps(warp_counts + kSubnormals * kWarps);
}

// Writes the record of a chunk with everything counted, and squares in double. All threads call it.
template <Dtype kDtype, bool kDetail>
__device__ __forceinline__ void write_exact(Record* record, const BitsOf<kDtype>* data, int length, int64_t begin) {
  using F = Format<kDtype>;
  using Bits = BitsOf<kDtype>;
  using Wide = decltype(Peak<kDtype>{}.bits());  // 32 bits are the least that a shuffle moves
  NUMGUARD_SHARED(double, warp_sums, kRescanGroups* kWarps);
  NUMGUARD_SHARED(uint32_t, warp_counts, kCounts* kWarps);
  NUMGUARD_SHARED(Wide, warp_peaks, kWarps);
  NUMGUARD_SHARED(int, warp_first, kWarps);

  double sums[kRescanGroups] = {};
  uint32_t counts[kCounts] = {};
  Wide peak = 0;
  int first = kNowhere;
#pragma unroll 1
  for (int step = 0; step < length; step += kRescanGroups * kThreads) {
#pragma unroll
    for (int group = 0; group < kRescanGroups; ++group) {
      const int index = step + group * kThreads + thread_id();
      if (index >= length) continue;
      const Bits bits = __ldg(data + index);
      const Bits magnitude = magnitude_of<kDtype>(bits);
      if (magnitude >= F::kInfinity) {
        const bool infinite = F::kHasInfinity && magnitude == F::kInfinity;
        counts[kNan] += !infinite;
        counts[kPosInf] += infinite && bits == magnitude;
        counts[kNegInf] += infinite && bits != magnitude;
        first = min(first, index);
        continue;
      }
      if constexpr (kDetail) {
        counts[kZeros] += magnitude == 0;
        counts[kSubnormals] += magnitude != 0 && magnitude < F::kSmallestNormal;
      }
      peak = max(peak, static_cast<Wide>(magnitude));
      add_square<kDtype>(sums[group], static_cast<double>(widened<kDtype>(bits)) * F::kScale);
    }
  }

  peak = warp_max(peak);
  first = -warp_max(-first);
#pragma unroll
  for (int group = 0; group < kRescanGroups; ++group) sums[group] = warp_tree_sum(sums[group]);
#pragma unroll
  for (int kind = 0; kind < kCounts; ++kind) counts[kind] = warp_sum(counts[kind]);
  if (is_first_of_warp()) {
    warp_peaks[warp_id()] = peak;
    warp_first[warp_id()] = first;
    for (int group = 0; group < kRescanGroups; ++group) warp_sums[group * kWarps + warp_id()] = sums[group];
    for (int kind = 0; kind < kCounts; ++kind) warp_counts[kind * kWarps + warp_id()] = counts[kind];
  }
  __syncthreads();
  if (thread_id() != 0) return;
  first = min_of_warps(warp_first);
  Record result;
  write_counts(result, warp_counts);
  result.first_nonfinite = first == kNowhere ? -1 : begin + first;
  result.absmax = static_cast<double>(widened<kDtype>(static_cast<Bits>(max_of_warps(warp_peaks)))) * F::kScale;
  result.sumsq = tree_sum<kRescanGroups * kWarps>(warp_sums);
  *record = result;
}

// Writes the record of one chunk, which lies inside one segment. One block per chunk.
//
// Segments of a bucket begin anywhere, so the chunk is cut into a head (up to the first aligned address), an interior
// of whole vectors of kAlignment bytes, and a tail; a thread takes at most one element of head and tail. The interior
// is taken in windows: in each, a thread has the same two vectors of 16 bytes (one, if elements are one byte), side by
// side where a load of 32 bytes exists.
template <Dtype kDtype, bool kDetail, typename Addresses>
__global__ void __launch_bounds__(kThreads, kBlocks)
    chunk_kernel(const __grid_constant__ Addresses addresses, const Chunk* __restrict__ chunks,
                 Record* __restrict__ records) {
  using F = Format<kDtype>;
  using Bits = BitsOf<kDtype>;
  constexpr int kItem = kItemOf<kDtype>;
  constexpr int kVector = kAlignment / kItem;   // elements
  constexpr int kVectors = kItem == 1 ? 1 : 2;  // of 16 bytes, per thread and window
  constexpr bool kAdjacent = NUMGUARD_WIDE_LOADS && kVectors == 2;
  constexpr int kWindow = kVectors * kThreads;  // vectors of 16 bytes
  constexpr int kUnroll = kLoadsInFlight / kVectors;
  constexpr int kTrees = kAdjacent ? 1 : kVectors;
  using State = Lanes<kDtype, kDetail, kVectors>;
  using PeakBits = decltype(State{}.peak_bits());
  static_assert(2 * kVector <= kThreads, "one thread an element of head and tail");

  const Chunk chunk = chunks[blockIdx.x];
  const int64_t begin = static_cast<int64_t>(chunk.number) * kChunk;
  const uint64_t address = addresses[chunk.segment] + static_cast<uint64_t>(begin) * kItem;
  const uint64_t aligned = (address + kAlignment - 1) / kAlignment * kAlignment;
  const Bits* const data = reinterpret_cast<const Bits*>(address);
  const int head = min(static_cast<int>(aligned - address) / kItem, chunk.length);
  const int interior = (chunk.length - head) / kVector * kVector;
  const int n_vectors = interior * kItem / 16;

  const int position = kAdjacent ? 2 * thread_id() : thread_id();  // of the first vector, in a window
  const uint4* const vectors = reinterpret_cast<const uint4*>(aligned) + position;
  const auto load = [&](int window, uint4(&words)[kVectors]) {
    const uint4* const from = vectors + window * kWindow;
    if constexpr (kAdjacent) {
      load_pair_once(from, words[0], words[1]);
    } else {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) words[i] = load_once(from + i * kThreads);
    }
  };

  State lanes;
  const int windows = n_vectors / kWindow;
  int window = 0;
#pragma unroll 1
  for (; window + kUnroll <= windows; window += kUnroll) {
    uint4 words[kUnroll][kVectors];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) load(window + i, words[i]);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
#pragma unroll
      for (int j = 0; j < kVectors; ++j) lanes.take(words[i][j], j);
    }
  }
#pragma unroll 1
  for (; window < windows; ++window) {
    uint4 words[kVectors];
    load(window, words);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) lanes.take(words[i], i);
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int offset = kAdjacent ? i : i * kThreads;
    if (windows * kWindow + position + offset < n_vectors)
      lanes.take(load_once(vectors + windows * kWindow + offset), i);
  }

  typename State::Sum edge = 0;
  const int tail = chunk.length - head - interior;
  const int at = thread_id() < kVector ? thread_id() : head + interior + thread_id() - kVector;
  const bool in_head = thread_id() < head;
  const bool in_tail = thread_id() >= kVector && thread_id() < kVector + tail;
  if (in_head || in_tail) lanes.take_one(__ldg(data + at), edge);

  NUMGUARD_SHARED(PeakBits, warp_peaks, kWarps);
  NUMGUARD_SHARED(double, warp_sums, (kTrees + 1) * kWarps);
  NUMGUARD_SHARED(uint32_t, warp_counts, 2 * kWarps);
  double sums[kTrees + 1];
#pragma unroll
  for (int tree = 0; tree < kTrees; ++tree) sums[tree] = tree_sum<State::kItems * kVectors / kTrees>(lanes.sums[tree]);
  sums[kTrees] = static_cast<double>(edge);
  const PeakBits warp_peak = warp_max(lanes.peak_bits());
#pragma unroll
  for (int tree = 0; tree <= kTrees; ++tree) sums[tree] = warp_tree_sum(sums[tree]);
  if constexpr (kDetail) {
    lanes.zeros = warp_sum(lanes.zeros);
    lanes.small = warp_sum(lanes.small);
  }
  if (is_first_of_warp()) {
    warp_peaks[warp_id()] = warp_peak;
    for (int tree = 0; tree <= kTrees; ++tree) warp_sums[tree * kWarps + warp_id()] = sums[tree];
    if constexpr (kDetail) {
      warp_counts[warp_id()] = lanes.zeros;
      warp_counts[kWarps + warp_id()] = lanes.small;
    }
  }
  __syncthreads();

  Record* const record = records + chunk.row;
  const auto peak = Peak<kDtype>::number(max_of_warps(warp_peaks));
  bool safe;  // not so if the peak is NaN
  if constexpr (kDtype == kFloat64)
    safe = max_of_warps(warp_peaks) < F::kInfinity;
  else
    safe = peak == 0.0f || (peak >= F::kSafeLow && peak < F::kSafeHigh);
  if (!safe) {
    write_exact<kDtype, kDetail>(record, data, chunk.length, begin);
  } else if (thread_id() == 0) {
    Record result = {0, 0, 0, 0, 0, -1, 0.0, 0.0};
    if constexpr (kDetail) {
      result.zeros = sum_of_warps(warp_counts);
      result.subnormals = sum_of_warps(warp_counts + kWarps) - result.zeros;
    }
    constexpr double kScale = F::kScale;
    result.absmax = static_cast<double>(peak) * kScale;
    result.sumsq =
        (tree_sum<kTrees * kWarps>(warp_sums) + tree_sum<kWarps>(warp_sums + kTrees * kWarps)) * (kScale * kScale);
    *record = result;
  }
}

// Writes the record of one segment: its chunks', merged in an order fixed by their number. One block per segment.
__global__ void __launch_bounds__(kThreads) combine_kernel(const Split* __restrict__ splits, Record* records) {
  NUMGUARD_SHARED(double, warp_sums, kWarps);
  NUMGUARD_SHARED(long long, warp_peaks, kWarps);
  NUMGUARD_SHARED(long long, warp_counts, kCounts* kWarps);
  NUMGUARD_SHARED(long long, warp_first, kWarps);
  constexpr long long kFar = 0x7fffffffffffffffLL;

  const Split split = splits[blockIdx.x];
  double sum = 0;
  long long peak = 0;  // as bits
  long long counts[kCounts] = {};
  long long first = kFar;
  for (int row = split.first_row + thread_id(); row < split.end_row; row += kThreads) {
    const Record part = records[row];
    counts[kNan] += part.nan;
    counts[kPosInf] += part.pos_inf;
    counts[kNegInf] += part.neg_inf;
    counts[kZeros] += part.zeros;
    counts[kSubnormals] += part.subnormals;
    if (part.first_nonfinite >= 0) first = min(first, static_cast<long long>(part.first_nonfinite));
    peak = max(peak, __double_as_longlong(part.absmax));
    sum = __dadd_rn(sum, part.sumsq);
  }

  sum = warp_tree_sum(sum);
  peak = warp_max(peak);
  first = -warp_max(-first);
#pragma unroll
  for (int kind = 0; kind < kCounts; ++kind) counts[kind] = warp_sum(counts[kind]);
  if (is_first_of_warp()) {
    warp_sums[warp_id()] = sum;
    warp_peaks[warp_id()] = peak;
    warp_first[warp_id()] = first;
    for (int kind = 0; kind < kCounts; ++kind) warp_counts[kind * kWarps + warp_id()] = counts[kind];
  }
  __syncthreads();
  if (thread_id() != 0) return;
  first = min_of_warps(warp_first);
  Record result;
  write_counts(result, warp_counts);
  result.first_nonfinite = first == kFar ? -1 : first;
  result.absmax = __longlong_as_double(max_of_warps(warp_peaks));
  result.sumsq = tree_sum<kWarps>(warp_sums);
  records[split.segment] = result;
}

}  // namespace numguard::cuda
