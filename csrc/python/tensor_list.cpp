#include "tensor_list.h"

#include "../dtypes.h"

namespace numguard {
namespace {

// The parts of DLPack's C interface (version 1.x, which keeps them stable) that are needed here.
namespace dlpack {

constexpr const char* kCapsuleName = "dlpack_exchange_api";
constexpr uint32_t kMajorVersion = 1;
constexpr int32_t kCpu = 1, kCuda = 2;
constexpr uint8_t kFloat = 2, kBFloat = 4, kFloat8E4M3FN = 10, kFloat8E5M2 = 12;

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

struct ExchangeApi {
  uint32_t major_version;
  uint32_t minor_version;
  const ExchangeApi* older;
  void* managed_tensor_allocator;
  void* managed_tensor_from_object;
  void* managed_tensor_to_object;
  int (*tensor_from_object)(PyObject* object, Tensor* out);  // borrows; 0, or -1 with a Python exception
  void* current_work_stream;
};

}  // namespace dlpack

int dtype_of(const dlpack::Tensor& tensor) {
  if (tensor.dtype_lanes != 1) return -1;
  switch (tensor.dtype_code) {
    case dlpack::kFloat:
      return tensor.dtype_bits == 32   ? kFloat32
             : tensor.dtype_bits == 16 ? kFloat16
             : tensor.dtype_bits == 64 ? kFloat64
                                       : -1;
    case dlpack::kBFloat:
      return tensor.dtype_bits == 16 ? kBFloat16 : -1;
    case dlpack::kFloat8E4M3FN:
      return kFloat8E4M3FN;
    case dlpack::kFloat8E5M2:
      return kFloat8E5M2;
    default:
      return -1;
  }
}

int64_t size_of(const dlpack::Tensor& tensor) {
  int64_t size = 1;
  for (int32_t axis = 0; axis < tensor.dimensions; ++axis) size *= tensor.shape[axis];
  return size;
}

bool is_row_major(const dlpack::Tensor& tensor) {
  if (tensor.strides == nullptr) return true;
  int64_t expected = 1;
  for (int32_t axis = tensor.dimensions - 1; axis >= 0; --axis) {
    if (tensor.shape[axis] != 1 && tensor.strides[axis] != expected) return false;
    expected *= tensor.shape[axis];
  }
  return true;
}

// Adds one tensor; false if a kernel cannot read it without a copy.
bool append(TensorList& list, const dlpack::Tensor& tensor) {
  const int dtype = dtype_of(tensor);
  const int64_t size = size_of(tensor);
  if (dtype < 0 || (size > 0 && !is_row_major(tensor))) return false;
  if (list.addresses.empty()) {
    list.device_type = tensor.device_type;
    list.device_index = tensor.device_index;
  }
  const bool known_device = tensor.device_type == dlpack::kCpu || tensor.device_type == dlpack::kCuda;
  if (!known_device || tensor.device_type != list.device_type || tensor.device_index != list.device_index) return false;
  const uint64_t address = reinterpret_cast<uintptr_t>(tensor.data) + tensor.byte_offset;
  if (address % static_cast<uint64_t>(kItemSize[dtype]) != 0) return false;
  list.addresses.push_back(address);
  list.sizes.push_back(size);
  list.dtypes.push_back(static_cast<uint8_t>(dtype));
  return true;
}

const dlpack::ExchangeApi* api_of(PyObject* capsule) {
  const auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, dlpack::kCapsuleName));
  while (api != nullptr && api->major_version > dlpack::kMajorVersion) api = api->older;
  if (api == nullptr || api->major_version != dlpack::kMajorVersion) return nullptr;
  return api->tensor_from_object != nullptr ? api : nullptr;
}

}  // namespace

std::optional<TensorList> read_tensors(PyObject* sequence, PyObject* exchange_capsule, PyTypeObject* tensor_type,
                                       PyTypeObject* parameter_type) {
  const dlpack::ExchangeApi* api = api_of(exchange_capsule);
  if (api == nullptr || !(PyList_Check(sequence) || PyTuple_Check(sequence))) {
    PyErr_Clear();
    return std::nullopt;
  }
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(sequence);
  PyObject** const items = PySequence_Fast_ITEMS(sequence);
  TensorList list;
  list.addresses.reserve(static_cast<size_t>(count));
  list.sizes.reserve(static_cast<size_t>(count));
  list.dtypes.reserve(static_cast<size_t>(count));
  for (Py_ssize_t index = 0; index < count; ++index) {
    const PyTypeObject* type = Py_TYPE(items[index]);
    if (type != tensor_type && type != parameter_type) return std::nullopt;
    dlpack::Tensor tensor{};
    if (api->tensor_from_object(items[index], &tensor) != 0) {
      PyErr_Clear();
      return std::nullopt;
    }
    if (!append(list, tensor)) return std::nullopt;
  }
  return list;
}

}  // namespace numguard
