// The one pass over memory, written once for every instruction set and every dtype.
//
// A vector of raw bits costs four instructions: load, mask the sign off, integer maximum, square and add. The bits of
// a float without their sign order like integers, so the integer maximum is both the absolute maximum and the test for
// NaN and Inf, and squares are added in single precision. After each block (small enough to stay in L1) the maximum is
// checked: if the block holds a non-finite value, or values whose squares single precision cannot hold, the block is
// scanned again, exactly; else its partial sums are added up in double. A clean block never pays for counting.
//
// The vector type comes from the `Lanes` of the including translation unit. Everything here has internal linkage: the
// linker must never pick code compiled for one instruction set for another, and for the same reason nothing here
// instantiates a template of the standard library.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace numguard::cpu {
namespace {

// Single precision keeps every square of a block while the largest magnitude lies in [2^-50, 2^60): squares stay below
// 2^120, at most 64 are added up, and what underflows is below 2^-40 of the block.
constexpr uint32_t kSafeLow = 0x26800000u;   // bits of 2^-50f
constexpr uint32_t kSafeHigh = 0x5d800000u;  // bits of 2^60f

// How far ahead the loads of a scan are prefetched. On Zen 5 the hardware prefetcher alone leaves a fifth of the L3
// bandwidth unused, and a distance below 4 KiB gets in its way in DRAM (measured: docs/benchmarks.md).
constexpr int kPrefetchBytes = 8192;

inline int popcount(uint32_t bits) { return __builtin_popcount(bits); }

inline int smaller(int64_t a, int b) { return a < b ? static_cast<int>(a) : b; }

// Exact pass over part of a block: counts, first index, and squares in double.
template <class Lanes, bool kDetail>
__attribute__((noinline)) void rescan(const uint8_t* data, int count, int64_t base, Record* out) {
  using Wide = typename Lanes::Wide;  // elements widened to float (or double) bits, which hold every value exactly
  typename Wide::Bits peak = Wide::zero();
  typename Wide::Sums sums = Wide::no_sums();
  for (int i = 0; i < count; i += Wide::kLanes) {
    const int live = smaller(count - i, Wide::kLanes);
    const uint32_t live_mask = (1u << live) - 1;
    typename Wide::Bits bits = Lanes::load_wide(data + static_cast<int64_t>(i) * Lanes::kBytes, live);
    typename Wide::Bits magnitude = Wide::magnitude(bits);
    const uint32_t bad = Wide::at_least(magnitude, Wide::kInfinity);
    if (__builtin_expect(bad != 0, 0)) {
      const uint32_t nan = Wide::at_least(magnitude, Wide::kInfinity + 1);
      const uint32_t negative = Wide::sign(bits);
      out->nan += popcount(nan);
      out->pos_inf += popcount(bad & ~nan & ~negative);
      out->neg_inf += popcount(bad & ~nan & negative);
      if (out->first_nonfinite < 0) out->first_nonfinite = base + i + __builtin_ctz(bad);
      bits = Wide::clear(bits, bad);
      magnitude = Wide::magnitude(bits);
    }
    if (kDetail) {
      const uint32_t finite = live_mask & ~bad;
      const uint32_t nonzero = Wide::at_least(magnitude, 1);
      const uint32_t normal = Wide::at_least(magnitude, Lanes::kWideSmallestNormal);
      out->zeros += popcount(finite & ~nonzero);
      out->subnormals += popcount(finite & nonzero & ~normal);
    }
    peak = Wide::max(peak, magnitude);
    Wide::add_squares(sums, bits);
  }
  const double absmax = Wide::largest(peak);
  if (absmax > out->absmax) out->absmax = absmax;
  out->sumsq += Wide::total(sums);
}

// Vectors one after the other, loaded where they lie.
template <class Lanes>
struct Direct {
  explicit Direct(const uint8_t*) {}
  typename Lanes::Bits next(const uint8_t* from) { return Lanes::load(from); }
};

// The same vectors out of whole cache lines: a load that straddles two lines costs a third of the DRAM bandwidth on
// Zen 5, a shuffle of two registers nothing. Shifting, rather than starting at the next line, keeps every element in
// its lane, so the bits of a sum do not depend on the address. The first and the last line are read whole: a line never
// crosses a page, and foreign bytes are shifted out.
template <class Lanes>
class Shifted {
 public:
  explicit Shifted(const uint8_t* data)
      : line_(data - misalignment(data)), shift_(Lanes::shift_by(misalignment(data) / Lanes::kBytes)) {
    left_ = Lanes::load(line_);
  }
  static int misalignment(const uint8_t* data) { return static_cast<int>(reinterpret_cast<uintptr_t>(data) % 64); }
  static bool pays(const uint8_t* data) { return misalignment(data) != 0 && misalignment(data) % Lanes::kBytes == 0; }
  typename Lanes::Bits next(const uint8_t*) {
    line_ += 64;
    const typename Lanes::Bits right = Lanes::load(line_);
    const typename Lanes::Bits vector = Lanes::shift(left_, shift_, right);
    left_ = right;
    return vector;
  }

 private:
  const uint8_t* line_;
  typename Lanes::Bits shift_;
  typename Lanes::Bits left_;
};

template <class Lanes, bool kDetail, class Stream>
inline void scan_stream(const uint8_t* data, int64_t count, int64_t base, Record* out) {
  using Bits = typename Lanes::Bits;
  constexpr int kStride = Lanes::kLanes * Lanes::kUnroll;
  constexpr int kVectorBytes = Lanes::kLanes * Lanes::kBytes;
  static_assert(Lanes::kBlock % kStride == 0, "a full block has no rest");

  *out = kEmptyRecord;
  Bits peak = Lanes::zero();
  typename Lanes::Totals totals = Lanes::no_totals();
  Stream stream(data);

  for (int64_t at = 0; at < count; at += Lanes::kBlock) {
    const int length = smaller(count - at, Lanes::kBlock);
    const uint8_t* block = data + at * Lanes::kBytes;
    typename Lanes::Sums sums[Lanes::kUnroll * Lanes::kSums];
    Bits peaks[Lanes::kUnroll];
    Bits zeros = Lanes::zero(), small = Lanes::zero();  // per lane; at most kBlock / kLanes, which fits every lane
#pragma GCC unroll 8
    for (auto& sum : sums) sum = Lanes::no_sum();
#pragma GCC unroll 8
    for (auto& lane : peaks) lane = Lanes::zero();

    const auto take = [&](Bits raw, int k) __attribute__((always_inline)) {
      const Bits magnitude = Lanes::magnitude(raw);
      peaks[k] = Lanes::max(peaks[k], magnitude);
      if (kDetail) {
        zeros = Lanes::count_zero(zeros, magnitude);
        small = Lanes::count_small(small, magnitude);  // zero or subnormal
      }
      Lanes::add_squares(&sums[k * Lanes::kSums], raw);
    };

    int i = 0;
    for (; i + kStride <= length; i += kStride) {
      const uint8_t* from = block + static_cast<int64_t>(i) * Lanes::kBytes;
#pragma GCC unroll 8
      for (int k = 0; k < Lanes::kUnroll; ++k) {
        // One line per vector; a shorter vector asks for the same line twice, which costs nothing but the slot.
        if (kVectorBytes >= 32) __builtin_prefetch(from + k * kVectorBytes + kPrefetchBytes);
        take(stream.next(from + k * kVectorBytes), k);
      }
    }
    for (; i + Lanes::kLanes <= length; i += Lanes::kLanes)
      take(stream.next(block + static_cast<int64_t>(i) * Lanes::kBytes), 0);
    const int rest = length - i;
    if (rest > 0) take(Lanes::load_partial(block + static_cast<int64_t>(i) * Lanes::kBytes, rest), 0);

#pragma GCC unroll 8
    for (int k = 1; k < Lanes::kUnroll; ++k) peaks[0] = Lanes::max(peaks[0], peaks[k]);
    if (__builtin_expect(Lanes::needs_rescan(peaks[0]), 0)) {
      rescan<Lanes, kDetail>(block, length, base + at, out);
      continue;
    }
    peak = Lanes::max(peak, peaks[0]);
    Lanes::fold(totals, sums);
    if (kDetail) {
      const int padding = rest > 0 ? Lanes::kLanes - rest : 0;  // a partial load fills up with zeros
      const int64_t n_zeros = Lanes::add_lanes(zeros);
      out->zeros += n_zeros - padding;
      out->subnormals += Lanes::add_lanes(small) - n_zeros;
    }
  }
  const double absmax = Lanes::largest(peak);
  if (absmax > out->absmax) out->absmax = absmax;
  out->sumsq += Lanes::total(totals);
}

template <class Lanes, bool kDetail>
void scan(const uint8_t* data, int64_t count, int64_t base, Record* out) {
  if constexpr (Lanes::kShifts) {
    if (count >= Lanes::kLanes && Shifted<Lanes>::pays(data))
      return scan_stream<Lanes, kDetail, Shifted<Lanes>>(data, count, base, out);
  }
  scan_stream<Lanes, kDetail, Direct<Lanes>>(data, count, base, out);
}

}  // namespace
}  // namespace numguard::cpu
