#include "tensor_list.h"

#include "../dtypes.h"
#include "dlpack.h"

namespace numguard {
namespace {

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

constexpr Py_ssize_t kAhead = 8;   // objects that are on their way to the cache
constexpr int kBytesBehind = 192;  // of the C++ tensor

}  // namespace

const dlpack::ExchangeApi* dlpack::api_of(PyObject* capsule) {
  const auto* api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule, kCapsuleName));
  if (api == nullptr) PyErr_Clear();
  while (api != nullptr && api->major_version > kMajorVersion) api = api->older;
  if (api == nullptr || api->major_version != kMajorVersion) return nullptr;
  return api->tensor_from_object != nullptr ? api : nullptr;
}

bool TensorReader::read(PyObject* object, PlainTensor* out) const {
  if (!is_tensor(object)) return false;
  dlpack::Tensor tensor{};
  if (api_->tensor_from_object(object, &tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  const int dtype = dtype_of(tensor);
  const int64_t size = size_of(tensor);
  if (dtype < 0 || (size > 0 && (tensor.data == nullptr || !is_row_major(tensor)))) return false;
  if (tensor.device_type != dlpack::kCpu && tensor.device_type != dlpack::kCuda) return false;
  const uint64_t address = reinterpret_cast<uintptr_t>(tensor.data) + tensor.byte_offset;
  if (address % static_cast<uint64_t>(kItemSize[dtype]) != 0) return false;
  *out = {address, size, tensor.device_type, tensor.device_index, static_cast<uint8_t>(dtype)};
  return true;
}

std::optional<TensorList> TensorReader::read_list(PyObject* sequence, int32_t only_device) const {
  if (!(PyList_Check(sequence) || PyTuple_Check(sequence))) return std::nullopt;
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(sequence);
  PyObject** const items = PySequence_Fast_ITEMS(sequence);
  TensorList list;
  list.addresses.resize(static_cast<size_t>(count));
  list.sizes.resize(static_cast<size_t>(count));
  list.dtypes.resize(static_cast<size_t>(count));
  for (Py_ssize_t index = 0; index < count; ++index) {
    // Objects, and the C++ tensors behind them, are out of the cache in a step. torch keeps its pointer in the first
    // word after the header; whatever is there, a prefetch reads nothing. In a function of its own GCC drops the calls.
    if (index + 2 * kAhead < count) __builtin_prefetch(items[index + 2 * kAhead]);
    if (index + kAhead < count && is_tensor(items[index + kAhead])) {
      const char* const behind = *reinterpret_cast<const char* const*>(items[index + kAhead] + 1);
      for (int offset = 0; offset < kBytesBehind; offset += 64) __builtin_prefetch(behind + offset);
    }
    PlainTensor tensor;
    if (!read(items[index], &tensor)) return std::nullopt;
    if (index == 0) {
      list.device_type = tensor.device_type;
      list.device_index = tensor.device_index;
      if (only_device != 0 && tensor.device_type != only_device) return std::nullopt;
    }
    if (tensor.device_type != list.device_type || tensor.device_index != list.device_index) return std::nullopt;
    list.addresses[static_cast<size_t>(index)] = tensor.address;
    list.sizes[static_cast<size_t>(index)] = tensor.size;
    list.dtypes[static_cast<size_t>(index)] = tensor.dtype;
  }
  return list;
}

}  // namespace numguard
