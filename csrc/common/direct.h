// Reads tensors where torch keeps them: a third of the time of the same through torch's Python bindings, which take the
// GIL again and count references for every tensor.
//
// Two functions of libtorch are looked up by their names, and where an object holds its tensor is found out, by
// comparing with what torch says of tensors that are made for it. Nothing of torch's is declared here, and whatever is
// not as expected is left to torch's own interface: other versions, other types than torch.Tensor and Parameter, and
// every tensor that cannot be read.
#pragma once

#if defined(__linux__)
#include <dlfcn.h>
#endif

#include <cstring>

#include "from_python.h"

namespace flatkern::direct {

// void at::toDLPackNonOwning(const at::Tensor&, DLTensor*)
using Fill = void (*)(const void* tensor, dlpack::Tensor* out);
constexpr char kFill[] = "_ZN2at17toDLPackNonOwningERKNS_6TensorEP8DLTensor";
// void torch::autograd::impl::bump_version(const at::Tensor&)
using Bump = void (*)(const void* tensor);
constexpr char kBump[] = "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE";

struct State {
  DlpackReader bindings = nullptr;  // torch's own way
  Fill fill = nullptr;              // null where it cannot be used
  Bump bump = nullptr;
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
  Py_ssize_t offset = 0;  // of the at::Tensor in an object

  // The at::Tensor of an object; null where it may be elsewhere, or not be there.
  const void* find(PyObject* object) const {
    if (Py_TYPE(object) != tensor && Py_TYPE(object) != parameter) return nullptr;
    const char* at = reinterpret_cast<const char*>(object) + offset;
    const void* implementation;
    std::memcpy(&implementation, at, sizeof(implementation));
    return implementation == nullptr ? nullptr : at;
  }
};

inline State& state() {
  static State found;
  return found;
}

// A DlpackReader.
inline int read(void* object, dlpack::Tensor* out) {
  const State& s = state();
  const void* tensor = s.find(static_cast<PyObject*>(object));
  if (tensor != nullptr) {
    try {
      s.fill(tensor, out);
      return 0;
    } catch (...) {  // torch's own way says what is wrong
    }
  }
  return s.bindings(object, out);
}

// Bumps the versions of a tuple's tensors up to the first for which that is not possible here; returns how many.
inline Py_ssize_t bump(PyObject* tensors) {
  const State& s = state();
  const Py_ssize_t count = PyTuple_GET_SIZE(tensors);
  for (Py_ssize_t k = 0; k < count; ++k) {
    const void* tensor = s.bump == nullptr ? nullptr : s.find(PyTuple_GET_ITEM(tensors, k));
    if (tensor == nullptr) return k;
    try {
      s.bump(tensor);
    } catch (...) {  // of an inference tensor
      return k;
    }
  }
  return count;
}

// Whether `object` is read as torch reads it.
inline bool reads(PyObject* object) {
  dlpack::Tensor a, b;
  std::memset(&a, 0, sizeof(a)), std::memset(&b, 0, sizeof(b));
  const State& s = state();
  const void* tensor = s.find(object);
  if (tensor == nullptr || s.bindings(object, &a) != 0) return false;
  try {
    s.fill(tensor, &b);
  } catch (...) {
    return false;
  }
  return std::memcmp(&a, &b, sizeof(a)) == 0;
}

// Whether the word at `offset` of a tensor's object is where torch says that its implementation is.
inline bool is_at(Py_ssize_t offset, PyObject* object) {
  const Reference number(PyObject_GetAttrString(object, "_cdata"));
  const void* expected = number.get() == nullptr ? nullptr : PyLong_AsVoidPtr(number.get());
  return expected != nullptr &&
         std::memcmp(reinterpret_cast<const char*>(object) + offset, &expected, sizeof(expected)) == 0;
}

inline long version_of(PyObject* object) {
  const Reference version(PyObject_GetAttrString(object, "_version"));
  return version.get() == nullptr ? -1 : PyLong_AsLong(version.get());
}

// Whether `bump` does to `object` what a write would.
inline bool bumps(PyObject* object) {
  const long before = version_of(object);
  const Reference tuple(PyTuple_Pack(1, object));
  return before >= 0 && tuple.get() != nullptr && bump(tuple.get()) == 1 && version_of(object) == before + 1;
}

// Finds out whether tensors can be read so, where `bindings` is torch's way and `torch` its module; `read`, or null. No
// Python error is left.
inline DlpackReader try_out(DlpackReader bindings, PyObject* torch) {
#if defined(__linux__)
  State& s = state();
  s.bindings = bindings;
  void* library = bindings == nullptr ? nullptr : dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return nullptr;
  s.fill = reinterpret_cast<Fill>(dlsym(library, kFill));
  s.bump = reinterpret_cast<Bump>(dlsym(library, kBump));

  const Reference type(PyObject_GetAttrString(torch, "Tensor")), nn(PyObject_GetAttrString(torch, "nn"));
  const Reference parameter(nn.get() == nullptr ? nullptr : PyObject_GetAttrString(nn.get(), "Parameter"));
  const Reference plain(PyObject_CallMethod(torch, "zeros", "((iii))", 3, 2, 5));
  const Reference made(plain.get() == nullptr || parameter.get() == nullptr
                           ? nullptr
                           : PyObject_CallOneArg(parameter.get(), plain.get()));
  const Reference part(plain.get() == nullptr ? nullptr : PyObject_CallMethod(plain.get(), "select", "ii", 1, 1));
  bool good = s.fill != nullptr && type.get() != nullptr && made.get() != nullptr && part.get() != nullptr;
  if (good) {
    s.tensor = reinterpret_cast<PyTypeObject*>(type.get());
    s.parameter = reinterpret_cast<PyTypeObject*>(parameter.get());
    const Py_ssize_t end = s.tensor->tp_basicsize - static_cast<Py_ssize_t>(sizeof(void*));
    s.offset = sizeof(PyObject);
    while (s.offset <= end && !is_at(s.offset, plain.get())) s.offset += sizeof(void*);
    good = s.offset <= end;
    for (PyObject* object : {plain.get(), made.get(), part.get()})
      good = good && is_at(s.offset, object) && reads(object);
    if (good && !(bumps(plain.get()) && bumps(made.get()))) s.bump = nullptr;
  }
  PyErr_Clear();
  if (good) return read;
#endif
  return nullptr;
}

}  // namespace flatkern::direct
