// The extension module for CUDA: addresses and tables in, launches out. It links no torch and no shared CUDA runtime.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string_view>
#include <tuple>
#include <vector>

#include "../cuda/stats.h"

namespace py = pybind11;
namespace cuda = numguard::cuda;

namespace {

// (address of the chunk table, [(dtype, first chunk, chunks)], address of the splits, number of splits)
using TablesTuple = std::tuple<uintptr_t, std::vector<std::tuple<int, int64_t, int64_t>>, uintptr_t, int64_t>;

cuda::Tables tables_of(const TablesTuple& tuple) {
  const auto& [chunks, launches, splits, n_splits] = tuple;
  cuda::Tables tables{chunks, {}, splits, n_splits};
  for (const auto& [dtype, first, count] : launches)
    tables.launches.push_back({static_cast<numguard::Dtype>(dtype), first, count});
  return tables;
}

void scan_table(int device, uintptr_t stream, const TablesTuple& tables, uint64_t base, uintptr_t starts, bool detail,
                uintptr_t records) {
  cuda::scan_table({device, stream}, tables_of(tables), base, starts, detail, records);
}

// `addresses`: uint64, one per segment.
void scan_inline(int device, uintptr_t stream, const TablesTuple& tables, std::string_view addresses, bool detail,
                 uintptr_t records) {
  cuda::scan_inline({device, stream}, tables_of(tables), reinterpret_cast<const uint64_t*>(addresses.data()),
                    static_cast<int64_t>(addresses.size() / sizeof(uint64_t)), detail, records);
}

}  // namespace

PYBIND11_MODULE(_native_cuda, module) {
  module.doc() = "CUDA kernels of hallo_numguard. Private: use hallo_numguard.tensor_stats.";
  const py::call_guard<py::gil_scoped_release> unlocked;
  module.def("unavailable", &cuda::unavailable, unlocked);
  module.def("scan_table", &scan_table, unlocked);
  module.def("scan_inline", &scan_inline, unlocked);
  module.attr("INLINE_CAPACITY") = cuda::inline_capacity();
}
