// The parts of DLPack's C interface (version 1.x, which keeps them stable) that torch's tensors are read and made with.
#pragma once

#include <Python.h>

#include <cstdint>

namespace numguard::dlpack {

constexpr const char* kCapsuleName = "dlpack_exchange_api";
constexpr uint32_t kMajorVersion = 1;
constexpr int32_t kCpu = 1, kCuda = 2;
constexpr uint8_t kInt = 0, kFloat = 2, kBFloat = 4, kFloat8E4M3FN = 10, kFloat8E5M2 = 12;

struct Tensor {
  void* data;
  int32_t device_type;
  int32_t device_index;
  int32_t dimensions;
  uint8_t dtype_code;
  uint8_t dtype_bits;
  uint16_t dtype_lanes;
  const int64_t* shape;
  const int64_t* strides;  // elements; null means row-major
  uint64_t byte_offset;
};

struct ManagedTensor {
  uint32_t major_version;
  uint32_t minor_version;
  void* context;
  void (*deleter)(ManagedTensor* self);
  uint64_t flags;
  Tensor tensor;
};

using SetError = void (*)(void* context, const char* kind, const char* message);

struct ExchangeApi {
  uint32_t major_version;
  uint32_t minor_version;
  const ExchangeApi* older;
  int (*allocate)(const Tensor* prototype, ManagedTensor** out, void* error_context, SetError set_error);
  void* managed_tensor_from_object;
  int (*to_object)(ManagedTensor* tensor, void** out);       // takes the tensor; 0, or -1 with a Python exception
  int (*tensor_from_object)(PyObject* object, Tensor* out);  // borrows; 0, or -1 with a Python exception
  void* current_work_stream;
};

// The table in a capsule; null, and no Python exception, if it is not of this version.
const ExchangeApi* api_of(PyObject* capsule);

}  // namespace numguard::dlpack
