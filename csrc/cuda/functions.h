// Python's functions, from the bindings to torch.cpp.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace flatkern::cuda {

void use_functions(PyObject* allocate, PyObject* upload, PyObject* stream);

}  // namespace flatkern::cuda
