// Reads Python lists of tensors and numbers into the plain arrays of csrc/cpu/table.h, through CPython's C API alone.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "cpu/table.h"

namespace flatkern {

// The types of the schemas in flatkern/ops.py: Tensor[], Tensor[]?, Tensor and Tensor?.
struct Tensors : cpu::Table {};
struct MaybeTensors : cpu::Table {};
struct Tensor : cpu::Table {};
struct MaybeTensor : cpu::Table {};

// Lists may be tuples, and 0-dim tensors are numbers too. False with a Python error set where the type is wrong.
bool read(PyObject* object, Tensors& out);
bool read(PyObject* object, MaybeTensors& out);
bool read(PyObject* object, Tensor& out);
bool read(PyObject* object, MaybeTensor& out);
bool read(PyObject* object, cpu::Floats& out);
bool read(PyObject* object, cpu::Ints& out);
bool read(PyObject* object, cpu::Bools& out);

// Whether tensors are read through DLPack where torch offers it, or through their Python attributes. For tests.
bool use_dlpack(bool enabled);

// state[param][key] for every param and key, as a tuple of one list per key; None where any is missing.
// Never calls a defaultdict's factory. Null with a Python error set.
PyObject* gather_state(PyObject* state, PyObject* params, PyObject* keys);

}  // namespace flatkern
