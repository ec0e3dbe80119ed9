// The statistics of one segment, and how two of them merge. Shared by the CPU and the CUDA kernels.
#pragma once

#include <cstdint>

namespace numguard {

// Eight 8-byte words, in the order of hallo_numguard/core/records.py: one cache line per segment.
struct Record {
  int64_t nan;
  int64_t pos_inf;
  int64_t neg_inf;
  int64_t zeros;            // stays 0 without detail
  int64_t subnormals;       // stays 0 without detail
  int64_t first_nonfinite;  // flat index inside the segment, -1 if every element is finite
  double absmax;            // over the finite elements, 0 if there are none
  double sumsq;             // sum of squares of the finite elements
};
static_assert(sizeof(Record) == 64, "a record is one cache line, and Python reads it as eight words");

constexpr Record kEmptyRecord{0, 0, 0, 0, 0, -1, 0.0, 0.0};

// Appends the record of the elements that follow. Only this order gives the first index, and a sum whose bits
// do not depend on who computed which part.
inline void append(Record& left, const Record& right) {
  left.nan += right.nan;
  left.pos_inf += right.pos_inf;
  left.neg_inf += right.neg_inf;
  left.zeros += right.zeros;
  left.subnormals += right.subnormals;
  if (left.first_nonfinite < 0) left.first_nonfinite = right.first_nonfinite;
  if (right.absmax > left.absmax) left.absmax = right.absmax;
  left.sumsq += right.sumsq;
}

}  // namespace numguard
