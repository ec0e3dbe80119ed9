// The extension module: addresses and sizes in, records out. Argument checks that need torch are made in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <vector>

#include "cpu/stats.h"

namespace py = pybind11;
using numguard::Record;
namespace cpu = numguard::cpu;

namespace {

Record* records_at(uintptr_t address) { return reinterpret_cast<Record*>(address); }
const uint8_t* bytes_at(uintptr_t address) { return reinterpret_cast<const uint8_t*>(address); }

void scan_one(uintptr_t out, uintptr_t data, int64_t count, int dtype, bool detail, int isa, int threads) {
  const cpu::Plan plan({0, count});
  cpu::tensor_stats(plan, {bytes_at(data), nullptr}, static_cast<cpu::Dtype>(dtype), detail, static_cast<cpu::Isa>(isa),
                    threads, records_at(out));
}

void scan_flat(uintptr_t out, uintptr_t data, const cpu::Plan& plan, int dtype, bool detail, int isa, int threads) {
  cpu::tensor_stats(plan, {bytes_at(data), nullptr}, static_cast<cpu::Dtype>(dtype), detail, static_cast<cpu::Isa>(isa),
                    threads, records_at(out));
}

void scan_list(uintptr_t out, const std::vector<uint64_t>& addresses, const cpu::Plan& plan, int dtype, bool detail,
               int isa, int threads) {
  if (static_cast<int64_t>(addresses.size()) != plan.segments()) throw py::value_error("one address a segment");
  const py::gil_scoped_release unlocked;
  cpu::tensor_stats(plan, {nullptr, addresses.data()}, static_cast<cpu::Dtype>(dtype), detail,
                    static_cast<cpu::Isa>(isa), threads, records_at(out));
}

uint64_t read_memory(uintptr_t data, int64_t bytes, bool prefetch, int isa, int threads) {
  return cpu::read_memory(bytes_at(data), bytes, prefetch, static_cast<cpu::Isa>(isa), threads);
}

std::vector<std::string> isas() {  // slowest first; the position is the number that the scans take
  std::vector<std::string> names;
  for (int isa = 0; isa < cpu::kIsas; ++isa)
    if (cpu::isa_supported(static_cast<cpu::Isa>(isa))) names.emplace_back(cpu::isa_name(static_cast<cpu::Isa>(isa)));
  return names;
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
  module.def("scan_list", &scan_list);
  module.def("read_memory", &read_memory, unlocked);
  module.def("isas", &isas);
}
