#include "direct.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <vector>

#include "../cpu/stats.h"
#include "dlpack.h"
#include "tensor_list.h"

namespace py = pybind11;

namespace numguard {
namespace {

constexpr int64_t kWords = sizeof(Record) / sizeof(int64_t);

struct Prepared {
  const dlpack::ExchangeApi* api;
  TensorReader reader;
  PyObject* threads;  // owned, for ever
};
std::optional<Prepared> prepared;

// Options of a scan that do not depend on the tensors.
struct Options {
  bool detail;
  cpu::Isa isa;
};

// A tensor of records that torch has allocated, and whoever fills it does not own yet.
class Records {
 public:
  explicit Records(int64_t count) {
    const int64_t shape[2] = {count, kWords};
    const dlpack::Tensor like{nullptr, dlpack::kCpu, 0, 2, dlpack::kInt, 64, 1, shape, nullptr, 0};
    const auto ignore = [](void*, const char*, const char*) {};
    if (prepared->api->allocate(&like, &managed_, nullptr, ignore) != 0) managed_ = nullptr;
    PyErr_Clear();
  }
  ~Records() {
    if (managed_ != nullptr && managed_->deleter != nullptr) managed_->deleter(managed_);
  }
  Records(const Records&) = delete;
  Records& operator=(const Records&) = delete;

  bool allocated() const { return managed_ != nullptr; }
  Record* data() const {
    return reinterpret_cast<Record*>(static_cast<uint8_t*>(managed_->tensor.data) + managed_->tensor.byte_offset);
  }
  PyObject* to_tensor() {  // null with a Python exception
    void* object = nullptr;
    dlpack::ManagedTensor* const managed = managed_;
    managed_ = nullptr;
    return prepared->api->to_object(managed, &object) == 0 ? static_cast<PyObject*>(object) : nullptr;
  }

 private:
  dlpack::ManagedTensor* managed_ = nullptr;
};

thread_local bool shares_work = true;

// Number of threads for so many bytes; 0 with a Python exception.
int threads_for(int64_t bytes) {
  if (bytes < cpu::kSerialBytes || !shares_work) return 1;
  PyObject* const result = PyObject_CallNoArgs(prepared->threads);
  if (result == nullptr) return 0;
  const long count = PyLong_AsLong(result);
  Py_DECREF(result);
  if (count < 1 && PyErr_Occurred()) return 0;
  return static_cast<int>(std::max(count, 1L));
}

// Exchanges infinities where the tensor shows the negative of what lies in memory. False with a Python exception.
bool correct_signs(PyObject* tensor, Record* records, int64_t count) {
  const auto is_infinite = [](const Record& record) { return record.pos_inf + record.neg_inf > 0; };
  if (std::none_of(records, records + count, is_infinite)) return true;
  PyObject* const answer = PyObject_CallMethod(tensor, "is_neg", nullptr);
  if (answer == nullptr) return false;
  const bool is_negated = answer == Py_True;
  Py_DECREF(answer);
  if (is_negated)
    for (int64_t index = 0; index < count; ++index) std::swap(records[index].pos_inf, records[index].neg_inf);
  return true;
}

std::optional<Options> options_from(PyObject* detail, PyObject* isa) {
  const int wants_detail = PyObject_IsTrue(detail);
  const long number = PyLong_AsLong(isa);
  if (wants_detail < 0 || (number < 0 && PyErr_Occurred())) return std::nullopt;
  return Options{wants_detail != 0, static_cast<cpu::Isa>(number)};
}

void scan(const cpu::Plan& plan, cpu::Source source, Dtype dtype, Options options, int threads, Record* out) {
  const py::gil_scoped_release unlocked;
  cpu::tensor_stats(plan, source, dtype, options.detail, options.isa, threads, out);
}

// The plans of the last lists: gradients keep their sizes from step to step. Guarded by the GIL.
class Plans {
 public:
  std::shared_ptr<const cpu::Plan> of(const std::vector<int64_t>& sizes) {
    for (const Entry& entry : entries_)
      if (entry.plan != nullptr && entry.sizes == sizes) return entry.plan;
    std::vector<int64_t> offsets(sizes.size() + 1);
    for (size_t index = 0; index < sizes.size(); ++index) offsets[index + 1] = offsets[index] + sizes[index];
    Entry& entry = entries_[next_];
    entry = {sizes, std::make_shared<const cpu::Plan>(std::move(offsets))};
    next_ = (next_ + 1) % entries_.size();
    return entry.plan;
  }

 private:
  struct Entry {
    std::vector<int64_t> sizes;
    std::shared_ptr<const cpu::Plan> plan;
  };
  std::array<Entry, 16> entries_;
  size_t next_ = 0;
};

Plans& plans() {
  static Plans* const all = new Plans;  // never destroyed: a thread may still scan when the process ends
  return *all;
}

PyObject* scan_one(PyObject* object, PyObject* plan_object, Options options) {
  PlainTensor tensor;
  if (!prepared->reader.read(object, &tensor) || tensor.device_type != dlpack::kCpu) Py_RETURN_NONE;
  std::optional<cpu::Plan> whole;
  if (plan_object == Py_None) whole.emplace(std::vector<int64_t>{0, tensor.size});
  const cpu::Plan& plan = whole.has_value() ? *whole : py::handle(plan_object).cast<const cpu::Plan&>();
  if (plan.end() > tensor.size) Py_RETURN_NONE;
  const auto dtype = static_cast<Dtype>(tensor.dtype);
  const int threads = threads_for(plan.elements() * kItemSize[dtype]);
  if (threads == 0) return nullptr;
  Records records(plan.segments());
  if (!records.allocated()) Py_RETURN_NONE;
  scan(plan, {reinterpret_cast<const uint8_t*>(tensor.address), nullptr}, dtype, options, threads, records.data());
  if (!correct_signs(object, records.data(), plan.segments())) return nullptr;
  return records.to_tensor();
}

// Scans tensors of one dtype. False with a Python exception.
bool scan_alike(const std::vector<uint64_t>& addresses, const std::vector<int64_t>& sizes, Dtype dtype, Options options,
                Record* out) {
  const std::shared_ptr<const cpu::Plan> plan = plans().of(sizes);
  const int threads = threads_for(plan->elements() * kItemSize[dtype]);
  if (threads == 0) return false;
  scan(*plan, {nullptr, addresses.data()}, dtype, options, threads, out);
  return true;
}

// Scans those of one dtype among others. False with a Python exception.
bool scan_dtype(const TensorList& list, Dtype dtype, Options options, Record* out) {
  std::vector<size_t> rows;
  std::vector<uint64_t> addresses;
  std::vector<int64_t> sizes;
  for (size_t row = 0; row < list.dtypes.size(); ++row) {
    if (list.dtypes[row] != dtype) continue;
    rows.push_back(row);
    addresses.push_back(list.addresses[row]);
    sizes.push_back(list.sizes[row]);
  }
  if (rows.empty()) return true;
  std::vector<Record> part(rows.size());
  if (!scan_alike(addresses, sizes, dtype, options, part.data())) return false;
  for (size_t index = 0; index < part.size(); ++index) out[rows[index]] = part[index];
  return true;
}

bool scan_all(const TensorList& list, Options options, Record* out) {
  const uint8_t first = list.dtypes.front();
  if (std::all_of(list.dtypes.begin(), list.dtypes.end(), [first](uint8_t dtype) { return dtype == first; }))
    return scan_alike(list.addresses, list.sizes, static_cast<Dtype>(first), options, out);
  for (int dtype = 0; dtype < kDtypes; ++dtype)
    if (!scan_dtype(list, static_cast<Dtype>(dtype), options, out)) return false;
  return true;
}

PyObject* scan_list(PyObject* sequence, Options options) {
  const std::optional<TensorList> list = prepared->reader.read_list(sequence, dlpack::kCpu);
  if (!list.has_value() || list->dtypes.empty()) Py_RETURN_NONE;
  const auto count = static_cast<int64_t>(list->dtypes.size());
  Records records(count);
  if (!records.allocated()) Py_RETURN_NONE;
  if (!scan_all(*list, options, records.data())) return nullptr;
  for (int64_t row = 0; row < count; ++row)
    if (!correct_signs(PySequence_Fast_GET_ITEM(sequence, row), records.data() + row, 1)) return nullptr;
  return records.to_tensor();
}

// A C++ exception as a Python exception.
template <class Call>
PyObject* guarded(Call call) {
  try {
    return call();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyObject* wrong_number_of_arguments() {
  PyErr_SetString(PyExc_TypeError, "wrong number of arguments, or prepare() was not called");
  return nullptr;
}

PyObject* scan_tensor(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 4 || !prepared.has_value()) return wrong_number_of_arguments();
  const std::optional<Options> options = options_from(args[2], args[3]);
  if (!options.has_value()) return nullptr;
  return guarded([&] { return scan_one(args[0], args[1], *options); });
}

PyObject* scan_tensors(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3 || !prepared.has_value()) return wrong_number_of_arguments();
  const std::optional<Options> options = options_from(args[1], args[2]);
  if (!options.has_value()) return nullptr;
  return guarded([&] { return scan_list(args[0], *options); });
}

PyObject* prepare(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 4) return wrong_number_of_arguments();
  const dlpack::ExchangeApi* const api = dlpack::api_of(args[0]);
  if (api == nullptr || api->allocate == nullptr || api->to_object == nullptr) Py_RETURN_FALSE;
  if (prepared.has_value()) Py_DECREF(prepared->threads);
  Py_INCREF(args[3]);
  const TensorReader reader(api, reinterpret_cast<PyTypeObject*>(args[1]), reinterpret_cast<PyTypeObject*>(args[2]));
  prepared.emplace(Prepared{api, reader, args[3]});
  Py_RETURN_TRUE;
}

PyObject* stay_on_this_thread(PyObject*, PyObject*) {
  shares_work = false;
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"stay_on_this_thread", stay_on_this_thread, METH_NOARGS, nullptr},
    {"scan_tensor", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(scan_tensor)), METH_FASTCALL, nullptr},
    {"scan_tensors", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(scan_tensors)), METH_FASTCALL, nullptr},
    {"prepare", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(prepare)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void add_direct_calls(PyObject* module) {
  if (PyModule_AddFunctions(module, methods) != 0) throw py::error_already_set();
}

}  // namespace numguard
