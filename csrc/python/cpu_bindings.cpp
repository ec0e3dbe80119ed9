// The extension module: addresses and sizes in, records out. Argument checks that need torch are made in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "../cpu/core_share.h"
#include "../cpu/file.h"
#include "../cpu/stats.h"
#include "direct.h"
#include "tensor_list.h"

namespace py = pybind11;
using numguard::Record;
namespace cpu = numguard::cpu;

namespace {

Record* records_at(uintptr_t address) { return reinterpret_cast<Record*>(address); }
const uint8_t* bytes_at(uintptr_t address) { return reinterpret_cast<const uint8_t*>(address); }

void scan_one(uintptr_t out, uintptr_t data, int64_t count, int dtype, bool detail, int isa, int threads) {
  const cpu::Plan plan({0, count});
  cpu::tensor_stats(plan, {bytes_at(data), nullptr}, static_cast<numguard::Dtype>(dtype), detail,
                    static_cast<cpu::Isa>(isa), threads, records_at(out));
}

void scan_flat(uintptr_t out, uintptr_t data, const cpu::Plan& plan, int dtype, bool detail, int isa, int threads) {
  cpu::tensor_stats(plan, {bytes_at(data), nullptr}, static_cast<numguard::Dtype>(dtype), detail,
                    static_cast<cpu::Isa>(isa), threads, records_at(out));
}

// `addresses`: uint64, one per segment of the plan.
void scan_list(uintptr_t out, const std::string_view addresses, const cpu::Plan& plan, int dtype, bool detail, int isa,
               int threads) {
  if (static_cast<int64_t>(addresses.size() / sizeof(uint64_t)) != plan.segments())
    throw py::value_error("one address per segment");
  cpu::tensor_stats(plan, {nullptr, reinterpret_cast<const uint64_t*>(addresses.data())},
                    static_cast<numguard::Dtype>(dtype), detail, static_cast<cpu::Isa>(isa), threads, records_at(out));
}

// `runs`: three int64 each, as FileRun has them. `words`: one int64 per page.
int scan_file(uintptr_t out, uintptr_t words, int descriptor, int64_t begin, int64_t end, const std::string_view runs,
              int isa) {
  const auto count = static_cast<int64_t>(runs.size() / sizeof(cpu::FileRun));
  return cpu::scan_file(descriptor, begin, end, reinterpret_cast<const cpu::FileRun*>(runs.data()), count,
                        static_cast<cpu::Isa>(isa), records_at(out), reinterpret_cast<int64_t*>(words));
}

uint64_t read_memory(uintptr_t data, int64_t bytes, int kind, int isa, int threads) {
  return cpu::read_memory(bytes_at(data), bytes, static_cast<cpu::ReadKind>(kind), static_cast<cpu::Isa>(isa), threads);
}

std::vector<std::string> isas() {  // the position is the number that the scans take
  std::vector<std::string> names;
  for (int isa = 0; isa < cpu::kIsas; ++isa)
    if (cpu::isa_supported(static_cast<cpu::Isa>(isa))) names.emplace_back(cpu::isa_name(static_cast<cpu::Isa>(isa)));
  return names;
}

template <typename T>
py::bytes as_bytes(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

// (addresses, sizes, dtypes, device type, device index), or None.
py::object read_tensors(py::object sequence, py::object exchange, py::type tensor, py::type parameter) {
  const numguard::dlpack::ExchangeApi* api = numguard::dlpack::api_of(exchange.ptr());
  if (api == nullptr) return py::none();
  const numguard::TensorReader reader(api, reinterpret_cast<PyTypeObject*>(tensor.ptr()),
                                      reinterpret_cast<PyTypeObject*>(parameter.ptr()));
  const auto list = reader.read_list(sequence.ptr());
  if (!list.has_value()) return py::none();
  return py::make_tuple(as_bytes(list->addresses), as_bytes(list->sizes), as_bytes(list->dtypes), list->device_type,
                        list->device_index);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "CPU kernels of hallo_numguard. Private: use hallo_numguard.tensor_stats.";
  py::class_<cpu::Plan, std::shared_ptr<cpu::Plan>>(module, "Plan")
      .def(py::init<std::vector<int64_t>>(), py::arg("offsets"))
      .def_property_readonly("segments", &cpu::Plan::segments);
  const py::call_guard<py::gil_scoped_release> unlocked;
  module.def("scan_one", &scan_one, unlocked);
  module.def("scan_flat", &scan_flat, unlocked);
  module.def("scan_list", &scan_list, unlocked);
  module.def("scan_file", &scan_file, unlocked);
  module.def("read_memory", &read_memory, unlocked);
  module.def("core_share", &cpu::core_share);
  module.def("isas", &isas);
  module.def("fastest_isa", [] { return static_cast<int>(cpu::fastest_isa()); });
  module.def("read_tensors", &read_tensors);
  numguard::add_direct_calls(module.ptr());
}
