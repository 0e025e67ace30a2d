// The functions that torch.h promises.
#include "torch.h"

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "functions.h"

namespace flatkern::cuda {
namespace {

PyObject *allocator = nullptr, *uploader = nullptr, *stream_getter = nullptr;

Buffer buffer_of(PyObject* tensor) {
  if (tensor == nullptr) throw PythonError();
  PyObject* pointer = PyObject_CallMethod(tensor, "data_ptr", nullptr);
  void* data = pointer != nullptr ? PyLong_AsVoidPtr(pointer) : nullptr;
  Py_XDECREF(pointer);
  // A tensor that only pretends has none, and a plan with it would be found again by every later call.
  if (data == nullptr && !PyErr_Occurred())
    PyErr_SetString(PyExc_RuntimeError, "torch gives no memory here; leave FakeTensorMode or what traces the call");
  if (PyErr_Occurred()) {
    Py_DECREF(tensor);
    throw PythonError();
  }
  return Buffer(tensor, data);
}

void replace(PyObject*& old, PyObject* given) {
  Py_INCREF(given);
  Py_XDECREF(std::exchange(old, given));
}

}  // namespace

void use_functions(PyObject* allocate, PyObject* upload, PyObject* stream) {
  replace(allocator, allocate);
  replace(uploader, upload);
  replace(stream_getter, stream);
}

Buffer::~Buffer() { Py_XDECREF(static_cast<PyObject*>(tensor_)); }

Buffer allocate(int device, size_t bytes) {
  return buffer_of(PyObject_CallFunction(allocator, "in", device, static_cast<Py_ssize_t>(bytes)));
}

Buffer upload(int device, const void* data, size_t bytes) {
  return buffer_of(PyObject_CallFunction(uploader, "iy#", device, data, static_cast<Py_ssize_t>(bytes)));
}

Stream current_stream(int device) {
  PyObject* handle = PyObject_CallFunction(stream_getter, "i", device);
  if (handle == nullptr) throw PythonError();
  void* stream = PyLong_AsVoidPtr(handle);
  Py_DECREF(handle);
  if (PyErr_Occurred()) throw PythonError();
  return stream;
}

WithoutGil::WithoutGil() : state_(PyEval_SaveThread()) {}
WithoutGil::~WithoutGil() { PyEval_RestoreThread(static_cast<PyThreadState*>(state_)); }

}  // namespace flatkern::cuda
