// Reading tensors costs most of a small step, so they are read through DLPack's C interface: about 40 ns each.
#include "from_python.h"

#include <algorithm>
#include <cstring>

namespace flatkern {
namespace {

bool dlpack_enabled = true;

// What of torch is needed, looked up at the first tensor: importing this module does not import torch.
struct Torch {
  PyTypeObject* tensor = nullptr;
  PyObject *float32 = nullptr, *float16 = nullptr, *bfloat16 = nullptr, *float64 = nullptr, *int64 = nullptr,
           *uint8 = nullptr;
  PyObject* increment_version = nullptr;
  DlpackReader read = nullptr;  // null before torch 2.10
};

const Torch* torch() {
  static Torch found;
  if (found.tensor != nullptr) return &found;
  PyObject* module = PyImport_ImportModule("torch");
  if (module == nullptr) return nullptr;
  Torch t;
  t.float32 = PyObject_GetAttrString(module, "float32");
  t.float16 = PyObject_GetAttrString(module, "float16");
  t.bfloat16 = PyObject_GetAttrString(module, "bfloat16");
  t.float64 = PyObject_GetAttrString(module, "float64");
  t.int64 = PyObject_GetAttrString(module, "int64");
  t.uint8 = PyObject_GetAttrString(module, "uint8");
  PyObject* tensor = PyObject_GetAttrString(module, "Tensor");
  PyObject* functions = PyObject_GetAttrString(module, "_C");
  if (functions != nullptr) t.increment_version = PyObject_GetAttrString(functions, "_increment_version");
  Py_XDECREF(functions);
  Py_DECREF(module);
  if (tensor == nullptr || !t.float32 || !t.float16 || !t.bfloat16 || !t.float64 || !t.int64 || !t.uint8 ||
      !t.increment_version)
    return nullptr;
  t.tensor = reinterpret_cast<PyTypeObject*>(tensor);
  PyObject* capsule = PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__");
  if (capsule != nullptr && PyCapsule_IsValid(capsule, dlpack::kCapsuleName)) {
    auto* api = static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, dlpack::kCapsuleName));
    while (api != nullptr && api->version_major != 1) api = api->previous;
    if (api != nullptr) t.read = api->dltensor_from_py_object_no_sync;
  }
  Py_XDECREF(capsule);
  PyErr_Clear();
  found = t;
  return &found;
}

// Sorts (stride, size) of the dims that matter; a dense tensor's strides are the running products.
bool is_dense(const View& v) {
  constexpr int kMostDims = 64;
  if (v.ndim > kMostDims) return false;
  std::pair<int64_t, int64_t> dims[kMostDims];
  int count = 0;
  for (int d = 0; d < v.ndim; ++d)
    if (v.shape[d] != 1) dims[count++] = {v.strides[d], v.shape[d]};
  std::sort(dims, dims + count);
  int64_t expected = 1;
  for (int d = 0; d < count; ++d) {
    if (dims[d].first != expected) return false;
    expected *= dims[d].second;
  }
  return true;
}

// Fills what follows from shape and strides.
void derive(View& v) {
  int64_t numel = 1;
  bool contiguous = true;
  for (int d = v.ndim - 1; d >= 0; --d) {
    contiguous &= v.shape[d] == 1 || v.strides[d] == numel;
    numel *= v.shape[d];
  }
  v.numel = numel;
  v.rows = v.ndim >= 2 ? v.shape[0] : 1;
  v.cols = v.rows == 1 ? numel : v.rows > 0 ? numel / v.rows : 0;
  v.dense = contiguous || numel == 0 || is_dense(v);
  v.outer = contiguous || v.ndim < 2 || v.rows == 1 || numel == 0 || v.strides[0] == v.cols;
}

DType dtype_of(const dlpack::Tensor& t) {
  if (t.lanes != 1) return DType::kOther;
  if (t.code == dlpack::kCodeFloat && t.bits == 32) return DType::kFloat32;
  if (t.code == dlpack::kCodeFloat && t.bits == 64) return DType::kFloat64;
  if (t.code == dlpack::kCodeFloat && t.bits == 16) return DType::kFloat16;
  if (t.code == dlpack::kCodeBfloat && t.bits == 16) return DType::kBFloat16;
  if (t.code == dlpack::kCodeInt && t.bits == 64) return DType::kInt64;
  if (t.code == dlpack::kCodeUInt && t.bits == 8) return DType::kUInt8;
  return DType::kOther;
}

Device device_of(const dlpack::Tensor& t) {
  if (t.device_type == dlpack::kDeviceCpu || t.device_type == dlpack::kDeviceCudaHost) return {DeviceType::kCpu, 0};
  return {t.device_type == dlpack::kDeviceCuda ? DeviceType::kCuda : DeviceType::kOther, t.device_id};
}

bool read_through_dlpack(const Torch& torch, PyObject* object, View& v) {
  dlpack::Tensor t;
  if (torch.read(object, &t) != 0) return false;
  v.data = static_cast<char*>(t.data) + t.byte_offset;
  if (t.data == nullptr) v.data = nullptr;
  v.shape = t.shape;
  v.strides = t.strides;
  v.ndim = t.ndim;
  v.dtype = dtype_of(t);
  v.device = device_of(t);
  derive(v);
  return true;
}

// Appends a tuple of ints to `dims`, which grows; views are pointed into it once it does not grow any more.
struct Dims {
  Ints values;
  int64_t size = 0;

  bool append(PyObject* tuple) {
    if (tuple == nullptr || !PyTuple_Check(tuple)) {
      Py_XDECREF(tuple);
      if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "a tensor's shape is not a tuple");
      return false;
    }
    const Py_ssize_t count = PyTuple_GET_SIZE(tuple);
    if (size + count > values.size()) {
      Ints larger(2 * (size + count));
      if (size > 0) std::memcpy(&larger[0], &values[0], size * sizeof(int64_t));
      values = std::move(larger);
    }
    for (Py_ssize_t d = 0; d < count; ++d) values[size++] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, d));
    Py_DECREF(tuple);
    return !PyErr_Occurred();
  }
};

bool read_device(PyObject* object, Device& device) {
  device = {DeviceType::kOther, 0};
  PyObject* on_cpu = PyObject_GetAttrString(object, "is_cpu");
  if (on_cpu == Py_True) device.type = DeviceType::kCpu;
  PyObject* on_cuda = on_cpu == Py_False ? PyObject_GetAttrString(object, "is_cuda") : nullptr;
  PyObject* index = on_cuda == Py_True ? PyObject_CallMethod(object, "get_device", nullptr) : nullptr;
  if (index != nullptr) device = {DeviceType::kCuda, static_cast<int32_t>(PyLong_AsLong(index))};
  Py_XDECREF(on_cpu);
  Py_XDECREF(on_cuda);
  Py_XDECREF(index);
  return !PyErr_Occurred();
}

bool read_through_attributes(const Torch& torch, PyObject* object, View& v, Dims& dims) {
  PyObject* pointer = PyObject_CallMethod(object, "data_ptr", nullptr);
  if (pointer == nullptr) return false;
  v.data = PyLong_AsVoidPtr(pointer);
  Py_DECREF(pointer);
  const int64_t before = dims.size;
  if (!dims.append(PyObject_GetAttrString(object, "shape"))) return false;
  v.ndim = static_cast<int32_t>(dims.size - before);
  if (!dims.append(PyObject_CallMethod(object, "stride", nullptr))) return false;
  PyObject* dtype = PyObject_GetAttrString(object, "dtype");
  v.dtype = dtype == torch.float32    ? DType::kFloat32
            : dtype == torch.float16  ? DType::kFloat16
            : dtype == torch.bfloat16 ? DType::kBFloat16
            : dtype == torch.float64  ? DType::kFloat64
            : dtype == torch.int64    ? DType::kInt64
            : dtype == torch.uint8    ? DType::kUInt8
                                      : DType::kOther;
  Py_XDECREF(dtype);
  return read_device(object, v.device);
}

bool read_all(PyObject* const* objects, Py_ssize_t count, Table& out) {
  const Torch* torch = flatkern::torch();
  if (torch == nullptr) return false;
  const bool fast = dlpack_enabled && torch->read != nullptr;
  out.present = true;
  out.views = Array<View>(count);
  Dims dims;
  for (Py_ssize_t k = 0; k < count; ++k) {
    if (!PyObject_TypeCheck(objects[k], torch->tensor)) {
      PyErr_Format(PyExc_TypeError, "entry %zd is a %s, not a tensor", k, Py_TYPE(objects[k])->tp_name);
      return false;
    }
    View& view = out.views[k];
    if (!(fast ? read_through_dlpack(*torch, objects[k], view)
               : read_through_attributes(*torch, objects[k], view, dims)))
      return false;
  }
  if (fast) return true;
  int64_t at = 0;
  for (Py_ssize_t k = 0; k < count; ++k) {
    View& view = out.views[k];
    view.shape = dims.size > 0 ? &dims.values[at] : nullptr;
    view.strides = view.shape + view.ndim;
    at += 2 * view.ndim;
    derive(view);
  }
  out.dims = std::move(dims.values);
  return true;
}

bool is_list(PyObject* object, const char* of) {
  if (PyList_Check(object) || PyTuple_Check(object)) return true;
  PyErr_Format(PyExc_TypeError, "expected a list of %s, got a %s", of, Py_TYPE(object)->tp_name);
  return false;
}

bool read_tensors(PyObject* object, Given& out) {
  out.list = object;
  return is_list(object, "tensors") && read_all(PySequence_Fast_ITEMS(object), PySequence_Fast_GET_SIZE(object), out);
}

template <class T, class Convert>
bool read_list(PyObject* object, const char* of, Array<T>& out, Convert convert) {
  if (!is_list(object, of)) return false;
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(object);
  PyObject** items = PySequence_Fast_ITEMS(object);
  out = Array<T>(count);
  for (Py_ssize_t i = 0; i < count; ++i) out[i] = convert(items[i]);
  return !PyErr_Occurred();
}

}  // namespace

bool read(PyObject* object, Tensors& out) { return read_tensors(object, out); }

bool read(PyObject* object, MaybeTensors& out) { return object == Py_None || read_tensors(object, out); }

bool read(PyObject* object, Tensor& out) { return read_all(&object, 1, out); }

bool read(PyObject* object, MaybeTensor& out) { return object == Py_None || read_all(&object, 1, out); }

bool read(PyObject* object, Floats& out) {
  return read_list(object, "floats", out,
                   [](PyObject* x) { return PyFloat_CheckExact(x) ? PyFloat_AS_DOUBLE(x) : PyFloat_AsDouble(x); });
}

bool read(PyObject* object, Ints& out) {
  return read_list(object, "ints", out, [](PyObject* x) -> int64_t { return PyLong_AsLongLong(x); });
}

bool read(PyObject* object, Bools& out) {
  return read_list(object, "bools", out,
                   [](PyObject* x) { return x == Py_True || (x != Py_False && PyObject_IsTrue(x) == 1); });
}

bool increment_version(PyObject* tensors) {
  const Torch* torch = flatkern::torch();
  if (torch == nullptr) return false;
  PyObject* none = PyObject_CallOneArg(torch->increment_version, tensors);
  Py_XDECREF(none);
  return none != nullptr;
}

DlpackReader dlpack_reader() {
  const Torch* torch = flatkern::torch();
  return torch != nullptr && dlpack_enabled ? torch->read : nullptr;
}

bool use_dlpack(bool enabled) { return std::exchange(dlpack_enabled, enabled); }

PyObject* gather_state(PyObject* state, PyObject* params, PyObject* keys) {
  if (!PyDict_Check(state)) {
    PyErr_SetString(PyExc_TypeError, "gather_state: state is not a dict");
    return nullptr;
  }
  if (!is_list(params, "tensors") || !is_list(keys, "keys")) return nullptr;
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(params), key_count = PySequence_Fast_GET_SIZE(keys);
  PyObject* result = PyTuple_New(key_count);
  if (result == nullptr) return nullptr;
  for (Py_ssize_t j = 0; j < key_count; ++j) PyTuple_SET_ITEM(result, j, PyList_New(count));

  // The state is as a rule in the order of the parameters, and walking it spares hashing them.
  Py_ssize_t position = 0;
  PyObject *key = nullptr, *value = nullptr;
  bool more = PyDict_Next(state, &position, &key, &value);
  for (Py_ssize_t k = 0; k < count; ++k) {
    PyObject* param = PySequence_Fast_GET_ITEM(params, k);
    PyObject* entry;
    if (more && key == param) {
      entry = value;
      more = PyDict_Next(state, &position, &key, &value);
    } else {
      entry = PyDict_GetItemWithError(state, param);
    }
    for (Py_ssize_t j = 0; j < key_count; ++j) {
      PyObject* item = entry != nullptr && PyDict_Check(entry)
                           ? PyDict_GetItemWithError(entry, PySequence_Fast_GET_ITEM(keys, j))
                           : nullptr;
      if (item == nullptr) {
        Py_DECREF(result);
        if (PyErr_Occurred()) return nullptr;
        Py_RETURN_NONE;
      }
      Py_INCREF(item);
      PyList_SET_ITEM(PyTuple_GET_ITEM(result, j), k, item);
    }
  }
  return result;
}

}  // namespace flatkern
