// The module of csrc/cuda as Python loads it, with every launch run by the shim, and a second module that tells what
// was launched. Both are in one library with csrc/cuda/stats.cu, and so share the shim's state.
#include "../../csrc/python/cuda_bindings.cpp"

PYBIND11_MODULE(_cuda_shim_log, module) {
  // [(device, stream, blocks)] since the last call.
  module.def("take_launches", [] {
    std::vector<std::tuple<int, uintptr_t, unsigned>> launches;
    for (const cuda_shim::LaunchRecord& one : cuda_shim::launch_records)
      launches.emplace_back(one.device, one.stream, one.blocks);
    cuda_shim::launch_records.clear();
    return launches;
  });
  module.def("current_device", [] { return cuda_shim::current_device; });
  module.def("set_order", &cuda_shim::set_order);
}
