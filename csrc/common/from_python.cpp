// Reading tensors costs most of a small step, so they are read where torch keeps them, or through DLPack's C interface:
// about 15 or 40 ns each.
#include "from_python.h"

#include <algorithm>
#include <cstring>

#include "direct.h"

namespace flatkern {
namespace {

constexpr char kLibtorch[] = "libtorch", kDlpack[] = "dlpack", kAttributes[] = "attributes";
std::string fastest = kLibtorch;  // that may be used

// What of torch is needed, looked up at the first tensor: importing this module does not import torch.
struct Torch {
  PyTypeObject* tensor = nullptr;
  PyObject *float32 = nullptr, *float16 = nullptr, *bfloat16 = nullptr, *float64 = nullptr, *int64 = nullptr,
           *uint8 = nullptr;
  PyObject* increment_version = nullptr;
  DlpackReader dlpack = nullptr;  // null before torch 2.10
  DlpackReader direct = nullptr;  // null where tensors are not where they are looked for

  // How to read a tensor now; null for its attributes.
  DlpackReader reader() const {
    if (fastest == kAttributes) return nullptr;
    return direct != nullptr && fastest == kLibtorch ? direct : dlpack;
  }
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
  const Reference kept(module);
  if (tensor == nullptr || !t.float32 || !t.float16 || !t.bfloat16 || !t.float64 || !t.int64 || !t.uint8 ||
      !t.increment_version)
    return nullptr;
  t.tensor = reinterpret_cast<PyTypeObject*>(tensor);
  PyObject* capsule = PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__");
  if (capsule != nullptr && PyCapsule_IsValid(capsule, dlpack::kCapsuleName)) {
    auto* api = static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, dlpack::kCapsuleName));
    while (api != nullptr && api->version_major != 1) api = api->previous;
    if (api != nullptr) t.dlpack = api->dltensor_from_py_object_no_sync;
  }
  Py_XDECREF(capsule);
  PyErr_Clear();
  t.direct = direct::try_out(t.dlpack, module);
  found = t;
  return &found;
}

// Whether the strides, in order of size, are the running products of the shape. Dims of size 1 may have any stride.
bool is_dense(const View& v) {
  constexpr int kMaxDims = 64;
  if (v.ndim > kMaxDims) return false;
  std::pair<int64_t, int64_t> dims[kMaxDims];
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

// Fills in what follows from shape and strides.
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

bool read_through_dlpack(DlpackReader reader, PyObject* object, View& v) {
  dlpack::Tensor t;
  if (reader(object, &t) != 0) return false;
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

// Shapes and strides of several tensors, one behind the other. It grows, so views point into it only in the end.
struct Dims {
  Ints values;
  int64_t size = 0;

  // Appends a tuple of ints; returns how many, or -1 with a Python error set.
  Py_ssize_t append(const Reference& tuple) {
    if (tuple.get() == nullptr) return -1;
    if (!PyTuple_Check(tuple.get())) {
      PyErr_SetString(PyExc_TypeError, "a tensor's shape or stride is not a tuple");
      return -1;
    }
    const Py_ssize_t count = PyTuple_GET_SIZE(tuple.get());
    if (size + count > values.size()) {
      Ints larger(2 * (size + count));
      if (size > 0) std::memcpy(&larger[0], &values[0], size * sizeof(int64_t));
      values = std::move(larger);
    }
    for (Py_ssize_t d = 0; d < count; ++d) {
      const int64_t value = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.get(), d));
      if (value < 0) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "a tensor's shape or stride is negative");
        return -1;
      }
      values[size++] = value;
    }
    return count;
  }
};

bool read_device(PyObject* object, Device& device) {
  device = {DeviceType::kCpu, 0};
  const Reference on_cpu(PyObject_GetAttrString(object, "is_cpu"));
  if (on_cpu.get() == nullptr || on_cpu.get() == Py_True) return on_cpu.get() != nullptr;
  const Reference on_cuda(PyObject_GetAttrString(object, "is_cuda"));
  if (on_cuda.get() == nullptr) return false;
  device.type = on_cuda.get() == Py_True ? DeviceType::kCuda : DeviceType::kOther;
  const Reference index(PyObject_CallMethod(object, "get_device", nullptr));
  if (index.get() == nullptr) return false;
  device.index = static_cast<int32_t>(PyLong_AsLong(index.get()));
  return !PyErr_Occurred();
}

bool read_through_attributes(const Torch& torch, PyObject* object, View& v, Dims& dims) {
  const Reference pointer(PyObject_CallMethod(object, "data_ptr", nullptr));
  if (pointer.get() == nullptr) return false;
  v.data = PyLong_AsVoidPtr(pointer.get());
  if (v.data == nullptr && PyErr_Occurred()) return false;
  const Py_ssize_t ndim = dims.append(Reference(PyObject_GetAttrString(object, "shape")));
  if (ndim < 0) return false;
  const Py_ssize_t strides = dims.append(Reference(PyObject_CallMethod(object, "stride", nullptr)));
  if (strides < 0) return false;
  if (strides != ndim) {
    PyErr_Format(PyExc_ValueError, "a tensor has %zd dims, but %zd strides", ndim, strides);
    return false;
  }
  v.ndim = static_cast<int32_t>(ndim);
  const Reference dtype(PyObject_GetAttrString(object, "dtype"));
  if (dtype.get() == nullptr) return false;
  v.dtype = dtype.get() == torch.float32    ? DType::kFloat32
            : dtype.get() == torch.float16  ? DType::kFloat16
            : dtype.get() == torch.bfloat16 ? DType::kBFloat16
            : dtype.get() == torch.float64  ? DType::kFloat64
            : dtype.get() == torch.int64    ? DType::kInt64
            : dtype.get() == torch.uint8    ? DType::kUInt8
                                            : DType::kOther;
  return read_device(object, v.device);
}

bool is_tensor(const Torch& torch, PyObject* object, Py_ssize_t k) {
  if (PyObject_TypeCheck(object, torch.tensor)) return true;
  PyErr_Format(PyExc_TypeError, "entry %zd is a %s, not a tensor", k, Py_TYPE(object)->tp_name);
  return false;
}

bool read_all(PyObject* const* objects, Py_ssize_t count, Table& out) {
  const Torch* torch = flatkern::torch();
  if (torch == nullptr) return false;
  const DlpackReader reader = torch->reader();
  out.present = true;
  out.views = Array<View>(count);
  Dims dims;
  for (Py_ssize_t k = 0; k < count; ++k) {
    if (!is_tensor(*torch, objects[k], k)) return false;
    View& view = out.views[k];
    if (!(reader != nullptr ? read_through_dlpack(reader, objects[k], view)
                            : read_through_attributes(*torch, objects[k], view, dims)))
      return false;
  }
  if (reader != nullptr) return true;
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

// What is in a list now, as an exact tuple: nobody changes one, and iterating over it runs no Python code.
Reference items_of(PyObject* list) {
  if (PyTuple_CheckExact(list)) return Reference(Py_NewRef(list));
  return Reference(PyList_Check(list) ? PyList_AsTuple(list) : PyTuple_GetSlice(list, 0, PyTuple_GET_SIZE(list)));
}

bool take_list(PyObject* object, TensorArgument& out) {
  if (!is_list(object, "tensors")) return false;
  out.passed = items_of(object);
  return out.passed.get() != nullptr;
}

bool take_single(PyObject* object, TensorArgument& out) {
  const Torch* torch = flatkern::torch();
  if (torch == nullptr || !is_tensor(*torch, object, 0)) return false;
  out.passed = Reference(Py_NewRef(object));
  return true;
}

// exact(item, to) converts what needs no Python code for it, and returns whether it did; convert(item, to) converts
// anything, or returns false with a Python error set.
template <class T, class Exact, class Convert>
bool read_list(PyObject* object, const char* of, Array<T>& out, Exact exact, Convert convert) {
  if (!is_list(object, of)) return false;
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(object);
  out = Array<T>(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (i >= PySequence_Fast_GET_SIZE(object)) {
      PyErr_Format(PyExc_RuntimeError, "a list of %s became shorter while it was read", of);
      return false;
    }
    PyObject* item = PySequence_Fast_GET_ITEM(object, i);
    if (exact(item, out[i])) continue;
    const Reference kept(Py_NewRef(item));
    if (!convert(item, out[i])) return false;
  }
  return true;
}

}  // namespace

bool read(PyObject* object, Tensors& out) { return take_list(object, out); }

bool read(PyObject* object, MaybeTensors& out) { return object == Py_None || take_list(object, out); }

bool read(PyObject* object, Tensor& out) { return take_single(object, out); }

bool read(PyObject* object, MaybeTensor& out) { return object == Py_None || take_single(object, out); }

bool read_table(TensorArgument& argument) {
  PyObject* passed = argument.passed.get();
  if (passed == nullptr) return true;
  return PyTuple_Check(passed) ? read_all(PySequence_Fast_ITEMS(passed), PyTuple_GET_SIZE(passed), argument)
                               : read_all(&passed, 1, argument);
}

bool read(PyObject* object, Floats& out) {
  const auto exact = [](PyObject* x, double& to) {
    if (!PyFloat_CheckExact(x)) return false;
    to = PyFloat_AS_DOUBLE(x);
    return true;
  };
  const auto convert = [](PyObject* x, double& to) {
    to = PyFloat_AsDouble(x);
    return to != -1.0 || !PyErr_Occurred();
  };
  return read_list(object, "floats", out, exact, convert);
}

bool read(PyObject* object, Ints& out) {
  const auto convert = [](PyObject* x, int64_t& to) {
    to = PyLong_AsLongLong(x);
    return to != -1 || !PyErr_Occurred();
  };
  const auto exact = [](PyObject* x, int64_t& to) {
    if (!PyLong_CheckExact(x)) return false;
    int overflow;
    to = PyLong_AsLongLongAndOverflow(x, &overflow);
    return overflow == 0;
  };
  return read_list(object, "ints", out, exact, convert);
}

bool read(PyObject* object, Bools& out) {
  const auto exact = [](PyObject* x, bool& to) {
    to = x == Py_True;
    return to || x == Py_False;
  };
  const auto convert = [](PyObject* x, bool& to) {
    const int truth = PyObject_IsTrue(x);
    to = truth == 1;
    return truth >= 0;
  };
  return read_list(object, "bools", out, exact, convert);
}

bool increment_version(PyObject* tensors) {
  const Torch* torch = flatkern::torch();
  if (torch == nullptr || !is_list(tensors, "tensors")) return false;
  const Reference items = items_of(tensors);
  if (items.get() == nullptr) return false;
  const bool directly = torch->direct != nullptr && fastest == kLibtorch;
  const Py_ssize_t done = directly ? direct::bump(items.get()) : 0, count = PyTuple_GET_SIZE(items.get());
  if (done == count) return true;
  const Reference rest(PyTuple_GetSlice(items.get(), done, count));
  return rest.get() != nullptr && Reference(PyObject_CallOneArg(torch->increment_version, rest.get())).get() != nullptr;
}

DlpackReader dlpack_reader() {
  const Torch* torch = flatkern::torch();
  return torch != nullptr ? torch->reader() : nullptr;
}

std::string readers() {
  const Torch* torch = flatkern::torch();
  if (torch == nullptr) return "";
  const std::string direct = torch->direct != nullptr ? "libtorch " : "",
                    dlpack = torch->dlpack != nullptr ? "dlpack " : "";
  return direct + dlpack + kAttributes;
}

std::string read_through(const std::string& name) { return std::exchange(fastest, name); }

namespace {

// Looks keys up in a dict that as a rule has them in the order in which they are asked for: then none has to be hashed.
class DictWalk {
 public:
  explicit DictWalk(PyObject* dict) : dict_(dict) { advance(); }

  // The value of `key`; null where it is missing, or with a Python error set.
  Reference find(PyObject* key) {
    if (next_key_.get() != key) return Reference(Py_XNewRef(PyDict_GetItemWithError(dict_, key)));
    Reference value = std::move(next_value_);
    advance();
    return value;
  }

 private:
  // The entry is owned: Python code that runs until it is asked for may remove it from the dict.
  void advance() {
    PyObject *key = nullptr, *value = nullptr;
    const bool more = PyDict_Next(dict_, &position_, &key, &value);
    next_key_ = Reference(more ? Py_NewRef(key) : nullptr);
    next_value_ = Reference(more ? Py_NewRef(value) : nullptr);
  }

  PyObject* dict_;
  Py_ssize_t position_ = 0;
  Reference next_key_, next_value_;
};

}  // namespace

PyObject* gather_state(PyObject* state, PyObject* params, PyObject* keys) {
  if (!PyDict_Check(state)) {
    PyErr_SetString(PyExc_TypeError, "gather_state: state is not a dict");
    return nullptr;
  }
  if (!is_list(params, "tensors") || !is_list(keys, "keys")) return nullptr;
  // Copies, because comparing keys may run Python code.
  const Reference all_params = items_of(params), all_keys = items_of(keys);
  if (all_params.get() == nullptr || all_keys.get() == nullptr) return nullptr;
  const Py_ssize_t count = PyTuple_GET_SIZE(all_params.get()), key_count = PyTuple_GET_SIZE(all_keys.get());
  const Reference result(PyTuple_New(key_count));
  if (result.get() == nullptr) return nullptr;
  for (Py_ssize_t j = 0; j < key_count; ++j) {
    PyObject* list = PyList_New(count);
    if (list == nullptr) return nullptr;
    PyTuple_SET_ITEM(result.get(), j, list);
  }
  DictWalk walk(state);
  for (Py_ssize_t k = 0; k < count; ++k) {
    const Reference entry = walk.find(PyTuple_GET_ITEM(all_params.get(), k));
    for (Py_ssize_t j = 0; j < key_count; ++j) {
      PyObject* item = entry.get() != nullptr && PyDict_Check(entry.get())
                           ? PyDict_GetItemWithError(entry.get(), PyTuple_GET_ITEM(all_keys.get(), j))
                           : nullptr;
      if (item == nullptr) {
        if (PyErr_Occurred()) return nullptr;
        Py_RETURN_NONE;
      }
      PyList_SET_ITEM(PyTuple_GET_ITEM(result.get(), j), k, Py_NewRef(item));
    }
  }
  return Py_NewRef(result.get());
}

}  // namespace flatkern
