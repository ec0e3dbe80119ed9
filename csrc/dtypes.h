// The dtypes by number, as hallo_numguard/ops/formats.py has them.
#pragma once

namespace numguard {

enum Dtype : int { kFloat32, kFloat16, kBFloat16, kFloat64, kFloat8E4M3FN, kFloat8E5M2, kDtypes };

constexpr int kItemSize[kDtypes] = {4, 2, 2, 8, 1, 1};

}  // namespace numguard
