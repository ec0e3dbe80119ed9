// The one pass over memory, written once for every instruction set and every dtype.
//
// A vector of raw bits costs four instructions: load, mask the sign off, integer maximum, square and add. The bits of
// a float without their sign order like integers, so the integer maximum is both the absolute maximum and the test for
// NaN and Inf, and squares are added in single precision, on three levels:
//
//   stride  kUnroll vectors, each with accumulators of its own: as many as hide the latency of an addition
//   block   kDepth strides; then the accumulators are added up as a tree
//   group   kBlocks blocks, added up one after the other; then the maximum is looked at, and the sum goes to double
//
// A group whose maximum shows a non-finite value, or one whose square single precision cannot hold, is read again in
// small blocks, and the bad ones among them exactly. That squares were not too small is looked at once, at the end. A
// clean group never pays for counting.
//
// Accuracy: on its way to double a square is rounded kDepth times in its lane, once at each level of the tree, once a
// block and once for the rest of the elements. `Bounds` keeps that at 32, so a norm is within 32 * 2^-25 = 9.5e-7.
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

// Squares of magnitudes below 2^59 are below 2^118, and a lane adds up fewer than 2^10 of them.
constexpr uint32_t kSafeHigh = 0x5d000000u;  // bits of 2^59f
constexpr int kMostSquares = 1 << 10;

// What single precision loses of a square, because it is too small, is at most 2^-150. That is below 2^-30 of the sum
// of 2^20 squares whose largest is 2^-100, so a smaller maximum alone asks for the exact pass.
constexpr double kSafeLow = 0x1p-50;

constexpr int kMostRoundings = 32;

// How far ahead the loads are prefetched on Zen 5, whose own prefetcher leaves a fifth of the L3 bandwidth unused; a
// distance below 4 KiB gets in its way in DRAM. On Zen 4 any prefetch costs bandwidth (both measured:
// docs/benchmarks.md).
constexpr int kPrefetchBytes = 8192;

// Bytes that a stream reads in its turn: of 512 to 4,096, the most bandwidth on Zen 4.
constexpr int kTurnBytes = 1024;

constexpr int kSmallBlock = 256;  // elements that are scanned exactly because of one of them
constexpr int64_t kPiece = 1 << 16;

inline int popcount(uint32_t bits) { return __builtin_popcount(bits); }

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int log2_of(int power) { return power <= 1 ? 0 : 1 + log2_of(power / 2); }

// Exact pass: counts, first index, and squares in double.
template <class Lanes, bool kDetail>
__attribute__((noinline)) void rescan(const uint8_t* data, int64_t count, int64_t base, Record* out) {
  using Wide = typename Lanes::Wide;  // elements widened to float (or double) bits, which hold every value exactly
  typename Wide::Bits peak = Wide::zero();
  typename Wide::Sums sums = Wide::no_sums();
  for (int64_t i = 0; i < count; i += Wide::kLanes) {
    const int live = static_cast<int>(smaller(count - i, Wide::kLanes));
    const uint32_t live_mask = (1u << live) - 1;
    typename Wide::Bits bits = Lanes::load_wide(data + i * Lanes::kBytes, live);
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
  static void add_squares(typename Lanes::Sums* sums, typename Lanes::Bits raw, const uint8_t* from) {
    Lanes::add_squares_at(sums, raw, from);
  }
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
  static void add_squares(typename Lanes::Sums* sums, typename Lanes::Bits raw, const uint8_t*) {
    Lanes::add_squares(sums, raw);
  }

 private:
  const uint8_t* line_;
  typename Lanes::Bits shift_;
  typename Lanes::Bits left_;
};

// Sizes that follow from those of `Lanes`, and the bounds that they keep.
template <class Lanes>
struct Bounds {
  static constexpr int kAccumulators = Lanes::kUnroll * Lanes::kSums;
  static constexpr int kVectorBytes = Lanes::kLanes * Lanes::kBytes;
  static constexpr int kStrideBytes = Lanes::kUnroll * kVectorBytes;
  static constexpr int kStrides = Lanes::kDepth * Lanes::kBlocks;  // of a group
  static constexpr int kSmallStrides = kSmallBlock / (Lanes::kUnroll * Lanes::kLanes);
  static constexpr int kTurn = kTurnBytes / kStrideBytes;  // strides of a stream before it is another's turn

  static_assert(kSmallStrides > 0 && kSmallStrides <= kStrides && kSmallBlock % (Lanes::kUnroll * Lanes::kLanes) == 0);
  static_assert((kAccumulators & (kAccumulators - 1)) == 0, "added up as a tree");
  static constexpr int kRoundings = Lanes::kDepth * Lanes::kSquares + log2_of(kAccumulators) + Lanes::kBlocks + 1;
  static constexpr int kLaneSquares = kAccumulators * Lanes::kSquares * (kStrides + 1);
  static_assert(!Lanes::kInFloat || (kRoundings <= kMostRoundings && kLaneSquares < kMostSquares));
  static_assert((kStrides + 1) * Lanes::kUnroll <= Lanes::kMostCounted, "zeros are counted in lanes");
};

// What a group has found so far.
template <class Lanes>
struct Group {
  typename Lanes::Sums sum = Lanes::no_sum();
  typename Lanes::Bits peak = Lanes::zero();
  typename Lanes::Bits zeros = Lanes::zero(), small = Lanes::zero();  // of each lane, with detail; small: zeros too
};

template <class Lanes>
inline void clear(typename Lanes::Sums* sums) {
#pragma GCC unroll 16
  for (int k = 0; k < Bounds<Lanes>::kAccumulators; ++k) sums[k] = Lanes::no_sum();
}

template <class Lanes>
inline typename Lanes::Sums add_up(typename Lanes::Sums* sums) {
#pragma GCC unroll 8
  for (int half = Bounds<Lanes>::kAccumulators / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int k = 0; k < half; ++k) sums[k] = Lanes::add(sums[k], sums[k + half]);
  return sums[0];
}

template <class Lanes>
inline void count_lanes(Group<Lanes>& group, typename Lanes::Bits magnitude) {
  group.zeros = Lanes::count_zero(group.zeros, magnitude);
  group.small = Lanes::count_small(group.small, magnitude);
}

// The strides from `at` to `stop`, of one block: at least one.
template <class Lanes, bool kDetail, bool kPrefetch, class Stream>
inline __attribute__((always_inline)) void add_block(Stream& stream, const uint8_t* at, const uint8_t* stop,
                                                     typename Lanes::Sums* sums, Group<Lanes>& group) {
  using Size = Bounds<Lanes>;
  typename Lanes::Bits peak = group.peak;
#pragma GCC unroll 1
  do {
    typename Lanes::Bits largest = Lanes::zero();
#pragma GCC unroll 8
    for (int k = 0; k < Lanes::kUnroll; ++k) {
      const uint8_t* const from = at + k * Size::kVectorBytes;
      // One line per vector; a shorter vector asks for the same line twice, which costs nothing but the slot.
      if (kPrefetch) __builtin_prefetch(from + kPrefetchBytes);
      const typename Lanes::Bits raw = stream.next(from);
      const typename Lanes::Bits magnitude = Lanes::magnitude(raw);
      largest = k == 0 ? magnitude : Lanes::max(largest, magnitude);
      if (kDetail) count_lanes<Lanes>(group, magnitude);
      Stream::add_squares(sums + k * Lanes::kSums, raw, from);
    }
    peak = Lanes::max(peak, largest);
    at += Size::kStrideBytes;
  } while (at != stop);
  group.peak = peak;
}

// Whole strides from `at` on, one block after the other.
template <class Lanes, bool kDetail, bool kPrefetch, class Stream>
inline void scan_strides(const uint8_t* at, int64_t strides, Group<Lanes>& group) {
  using Size = Bounds<Lanes>;
  Stream stream(at);
  const uint8_t* const end = at + strides * Size::kStrideBytes;
  while (at != end) {
    const uint8_t* const stop = at + smaller(end - at, Lanes::kDepth * Size::kStrideBytes);
    typename Lanes::Sums sums[Size::kAccumulators];
    clear<Lanes>(sums);
    add_block<Lanes, kDetail, kPrefetch>(stream, at, stop, sums, group);
    group.sum = Lanes::add(group.sum, add_up<Lanes>(sums));
    at = stop;
  }
}

// Less than a stride, without a branch: as many vectors as a stride has, with zeros beyond the end.
// `end` is at least a vector after the first byte that may be read.
template <class Lanes, bool kDetail>
inline void scan_rest(const uint8_t* at, const uint8_t* end, Group<Lanes>& group) {
  typename Lanes::Sums sums[Bounds<Lanes>::kAccumulators];
  clear<Lanes>(sums);
#pragma GCC unroll 8
  for (int k = 0; k < Lanes::kUnroll; ++k) {
    const typename Lanes::Bits raw = Lanes::load_before(at + k * Bounds<Lanes>::kVectorBytes, end);
    const typename Lanes::Bits magnitude = Lanes::magnitude(raw);
    group.peak = Lanes::max(group.peak, magnitude);
    if (kDetail) count_lanes<Lanes>(group, magnitude);
    Lanes::add_squares(sums + k * Lanes::kSums, raw);
  }
  group.sum = Lanes::add(group.sum, add_up<Lanes>(sums));
}

// The elements of one piece, from the first to the last.
template <class Lanes, bool kDetail, bool kPrefetch, class Stream>
class Pass {
 public:
  // What the clean groups have found.
  struct Kept {
    typename Lanes::Bits peak = Lanes::zero();
    typename Lanes::Totals totals = Lanes::no_totals();
  };

  Pass() = default;
  Pass(const uint8_t* data, const uint8_t* end, int64_t base, Record* out)
      : data_(data), end_(end), whole_(end - (end - data) % Size::kStrideBytes), base_(base), out_(out) {}

  const uint8_t* whole() const { return whole_; }
  const uint8_t* end() const { return end_; }

  void run() {
    const uint8_t* at = data_;
    Kept kept;
    do {
      Group<Lanes> group;
      const uint8_t* const stop = scan_part(at, Size::kStrides, group);
      at = close(group, at, stop, kept);
    } while (at != end_);
    finish(kept);
  }

  // Ends the group from `begin` to `stop`. Returns where the next one begins.
  const uint8_t* close(const Group<Lanes>& group, const uint8_t* begin, const uint8_t* stop, Kept& kept) {
    if (__builtin_expect(Lanes::too_large(group.peak), 0)) {
      Kept copy = kept;  // so that `kept` itself may stay in registers
      const uint8_t* const next = scan_carefully(begin, copy);
      kept = copy;
      return next;
    }
    keep(kept, group, stop);
    return stop;
  }

  void finish(const Kept& kept) {
    const double absmax = Lanes::largest(kept.peak);
    if (absmax > out_->absmax) out_->absmax = absmax;
    if (__builtin_expect(out_->absmax < Lanes::kLow && out_->absmax > 0, 0)) return scan_exactly();
    out_->sumsq += Lanes::total(kept.totals);
  }

 private:
  using Size = Bounds<Lanes>;

  // At most so many strides, and behind the last the rest. Returns where it ends.
  const uint8_t* scan_part(const uint8_t* at, int strides, Group<Lanes>& group) {
    const uint8_t* const stop = at + smaller(whole_ - at, strides * Size::kStrideBytes);
    scan_strides<Lanes, kDetail, kPrefetch, Stream>(at, (stop - at) / Size::kStrideBytes, group);
    if (stop != whole_) return stop;
    if (stop != end_) scan_rest<Lanes, kDetail>(stop, end_, group);
    return end_;
  }

  // Small blocks from `at` on, until a group of them is clean. Returns where it ends.
  __attribute__((noinline)) const uint8_t* scan_carefully(const uint8_t* at, Kept& kept) {
    int clean = 0;
    while (at != end_ && clean < Size::kStrides) {
      Group<Lanes> group;
      const uint8_t* const stop = scan_part(at, Size::kSmallStrides, group);
      if (Lanes::too_large(group.peak)) {
        rescan<Lanes, kDetail>(at, (stop - at) / Lanes::kBytes, base_ + (at - data_) / Lanes::kBytes, out_);
        clean = 0;
      } else {
        keep(kept, group, stop);
        clean += Size::kSmallStrides;
      }
      at = stop;
    }
    return at;
  }

  void keep(Kept& kept, const Group<Lanes>& group, const uint8_t* stop) {
    kept.peak = Lanes::max(kept.peak, group.peak);
    Lanes::add_to(kept.totals, group.sum);
    if (kDetail) {
      const int64_t zeros = Lanes::add_lanes(group.zeros);
      // The rest was filled up with zeros.
      const int64_t padding =
          stop == end_ && whole_ != end_ ? (Size::kStrideBytes - (end_ - whole_)) / Lanes::kBytes : 0;
      out_->zeros += zeros - padding;
      out_->subnormals += Lanes::add_lanes(group.small) - zeros;
    }
  }

  __attribute__((noinline)) void scan_exactly() {
    *out_ = kEmptyRecord;
    const int64_t count = (end_ - data_) / Lanes::kBytes;
    for (int64_t at = 0; at < count; at += kPiece)
      rescan<Lanes, kDetail>(data_ + at * Lanes::kBytes, smaller(count - at, kPiece), base_ + at, out_);
  }

  const uint8_t* data_ = nullptr;
  const uint8_t* end_ = nullptr;
  const uint8_t* whole_ = nullptr;  // end of the last whole stride
  int64_t base_ = 0;
  Record* out_ = nullptr;
};

// kLinewise: vectors that lie across two cache lines are put together from whole ones, and lines are prefetched.
template <class Lanes, bool kDetail, bool kLinewise = false>
void scan(const uint8_t* data, int64_t count, int64_t base, Record* out) {
  *out = kEmptyRecord;
  if (count <= 0) return;
  const uint8_t* const end = data + count * Lanes::kBytes;
  if constexpr (Lanes::kNeedsVector) {
    if (__builtin_expect(count < Lanes::kLanes, 0)) {
      // The rest reads the last whole vector. As zeros in front are nothing but a shift of the lanes, there is none of
      // another's to mask off, and only the base of the indices moves.
      alignas(64) uint8_t few[Bounds<Lanes>::kVectorBytes] = {};
      constexpr int64_t kBytes = Bounds<Lanes>::kVectorBytes;
      memcpy(few + kBytes - (end - data), data, static_cast<size_t>(end - data));
      Pass<Lanes, kDetail, false, Direct<Lanes>>(few, few + kBytes, base - (Lanes::kLanes - count), out).run();
      if (kDetail) out->zeros -= Lanes::kLanes - count;
      return;
    }
  }
  if constexpr (kLinewise && Lanes::kShifts) {
    if (count >= Lanes::kLanes && Shifted<Lanes>::pays(data))
      return Pass<Lanes, kDetail, true, Shifted<Lanes>>(data, end, base, out).run();
  }
  Pass<Lanes, kDetail, kLinewise, Direct<Lanes>>(data, end, base, out).run();
}

// One of several streams that take turns: the pieces of a queue, one after the other. It adds up what `Pass::run` does,
// in the same order, so a record is the same bits.
template <class Lanes, bool kDetail>
class TurnTaker {
 public:
  // Pieces that are too small for a turn are scanned at once. Returns whether there is one for turns.
  bool begin(Queue queue) {
    queue_ = queue;
    return begin_piece();
  }

  // Reads kTurnBytes, or to the end of a block. Returns whether there is more.
  bool take_turn() {
    const int64_t strides = smaller(Size::kTurn, (block_end_ - at_) / Size::kStrideBytes);
    const uint8_t* const stop = at_ + strides * Size::kStrideBytes;
    for (int line = 0; line < kAheadLines; ++line) __builtin_prefetch(stop + 64 * line, 0, 2);
    add_strides(stop);
    if (at_ != block_end_) return true;
    group_.sum = Lanes::add(group_.sum, add_up<Lanes>(sums_));
    if (at_ == group_end_ && !end_group()) return false;
    begin_block();
    return true;
  }

 private:
  using Size = Bounds<Lanes>;
  using OnePass = Pass<Lanes, kDetail, false, Direct<Lanes>>;
  static constexpr int kAheadLines = 4;  // asked for into the L2 cache, for the next turn

  __attribute__((noinline)) void add_strides(const uint8_t* stop) {
    typename Lanes::Sums sums[Size::kAccumulators];
#pragma GCC unroll 16
    for (int k = 0; k < Size::kAccumulators; ++k) sums[k] = sums_[k];
    Direct<Lanes> stream(at_);
    add_block<Lanes, kDetail, false>(stream, at_, stop, sums, group_);
#pragma GCC unroll 16
    for (int k = 0; k < Size::kAccumulators; ++k) sums_[k] = sums[k];
    at_ = stop;
  }

  bool begin_piece() {
    while (queue_.begin != queue_.end) {
      const Piece& piece = *queue_.begin++;
      const uint8_t* const end = piece.data + piece.count * Lanes::kBytes;
      if (end - piece.data < Size::kStrideBytes) {
        scan<Lanes, kDetail>(piece.data, piece.count, piece.base, piece.out);
        continue;
      }
      *piece.out = kEmptyRecord;
      pass_ = OnePass(piece.data, end, piece.base, piece.out);
      kept_ = typename OnePass::Kept();
      at_ = piece.data;
      begin_group();
      begin_block();
      return true;
    }
    return false;
  }

  void begin_group() {
    group_ = Group<Lanes>();
    group_begin_ = at_;
    group_end_ = at_ + smaller(pass_.whole() - at_, Size::kStrides * Size::kStrideBytes);
  }

  void begin_block() {
    clear<Lanes>(sums_);
    block_end_ = at_ + smaller(group_end_ - at_, Lanes::kDepth * Size::kStrideBytes);
  }

  // Returns whether there is another group, in this piece or in the next.
  bool end_group() {
    const uint8_t* stop = at_;
    for (;;) {
      if (stop == pass_.whole() && stop != pass_.end()) {
        scan_rest<Lanes, kDetail>(stop, pass_.end(), group_);
        stop = pass_.end();
      }
      at_ = pass_.close(group_, group_begin_, stop, kept_);
      if (at_ == pass_.end()) {
        pass_.finish(kept_);
        return begin_piece();
      }
      begin_group();
      if (group_end_ != at_) return true;
      stop = at_;  // nothing but the rest is left
    }
  }

  Queue queue_{};
  OnePass pass_;
  typename OnePass::Kept kept_;
  Group<Lanes> group_;
  typename Lanes::Sums sums_[Size::kAccumulators];
  const uint8_t* at_ = nullptr;
  const uint8_t* block_end_ = nullptr;
  const uint8_t* group_begin_ = nullptr;
  const uint8_t* group_end_ = nullptr;
};

// Several streams of memory in turn. One alone leaves a third of the DRAM bandwidth unused: the hardware prefetcher
// stops at the end of a page, and has a page of another stream under way meanwhile.
template <class Lanes, bool kDetail>
void scan_streams(const Queue* queues) {
  TurnTaker<Lanes, kDetail> streams[kStreams];
  TurnTaker<Lanes, kDetail>* live[kStreams];
  int count = 0;
  for (int k = 0; k < kStreams; ++k)
    if (streams[k].begin(queues[k])) live[count++] = &streams[k];
  while (count > 0) {
    for (int k = 0; k < count;) {
      if (live[k]->take_turn()) {
        ++k;
      } else {
        live[k] = live[--count];
      }
    }
  }
}

template <class Lanes, bool kDetail>
constexpr Scanner scanner = {scan<Lanes, kDetail>, scan_streams<Lanes, kDetail>};

template <class Lanes, bool kDetail>
constexpr Scanner linewise_scanner = {scan<Lanes, kDetail, true>, nullptr};

}  // namespace
}  // namespace numguard::cpu
